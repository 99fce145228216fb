"""Runs that go wrong: rows that cannot be learnt from, gradients and weights that are no numbers, rewards that fail."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")

from transformers import AutoModelForCausalLM, TrainerCallback

from fastalign.cli import commands as cli
from fastalign.demo.models import small_model
from fastalign.trainers.common.checkpoints import checkpoints
from fastalign.trainers.dpo import DPOConfig, DPOTrainer
from fastalign.trainers.grpo import GRPOConfig, GRPOTrainer
from fastalign.trainers.ppo import PPOConfig, PPOTrainer
from fastalign.trainers.pro import PROConfig, PROTrainer
from fastalign.trainers.reward import RewardConfig, RewardTrainer, load_reward_model
from fastalign.trainers.sft import SFTConfig, SFTTrainer

INF = float("inf")
PAIRS = [{"prompt": "the movie", "chosen": f" is good {i}", "rejected": " is bad"} for i in range(8)]
SFT = [{"prompt": "the movie", "completion": f" is good {i}"} for i in range(8)]
LISTS = [{"prompt": "the movie", "completions": [" is good", " is bad"], "rewards": [1.0, 0.0]} for _ in range(8)]


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


class _Break(TrainerCallback):
    """Makes one weight of the model NaN where a step begins, so that every loss after it is; and back."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            model.handle = model.lm_head.register_forward_hook(lambda *_: _[-1] * math.nan)


@pytest.fixture
def options(tmp_path):
    return {
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "max_steps": 3,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "fused_head": False,
        "disable_tqdm": True,
    }


# ----------------------------------------------------------------------------------------------------- numbers in rows
@pytest.mark.parametrize("bad", [INF, -INF, float("nan")])
@pytest.mark.parametrize(
    ("config", "trainer", "row", "named"),
    [
        (PROConfig, PROTrainer, {**LISTS[0], "rewards": [1.0, 0.0]}, "rewards"),
        (DPOConfig, DPOTrainer, {**PAIRS[0], "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}, "ref_chosen_logps"),
        (
            DPOConfig,
            DPOTrainer,
            {**PAIRS[0], "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0},
            "ref_rejected_logps",
        ),
        (RewardConfig, RewardTrainer, {**PAIRS[0], "margin": 1.0}, "margin"),
        (RewardConfig, RewardTrainer, {"prompt": "a", "completions": [" b", " c"], "ranks": [0.0, 1.0]}, "ranks"),
    ],
)
def test_numbers_that_are_not_finite_are_refused_with_their_row(
    tiny_model, tiny_tokenizer, options, tmp_path, bad, config, trainer, row, named
):
    broken = {**row, named: [bad, 0.0] if isinstance(row[named], list) else bad}
    model = tiny_model()
    if trainer is RewardTrainer:
        model.save_pretrained(tmp_path / "m")
        tiny_tokenizer.save_pretrained(tmp_path / "m")
        model, tiny_tokenizer = load_reward_model(str(tmp_path / "m"), config(output_dir=str(tmp_path / "x")))
    with pytest.raises(ValueError, match=rf"row 5 \(from 0\).*{named}|{named}.*row 5 \(from 0\)"):
        trainer(model, config(**options), [row] * 5 + [broken, row], processing_class=tiny_tokenizer)


# ------------------------------------------------------------------------------------------------ gradients and weights
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize(
    ("config", "trainer", "rows"),
    [(SFTConfig, SFTTrainer, SFT), (DPOConfig, DPOTrainer, PAIRS), (PROConfig, PROTrainer, LISTS)],
)
def test_a_gradient_that_is_no_number_ends_the_run_with_a_checkpoint(
    tiny_model, tiny_tokenizer, options, config, trainer, rows, max_grad_norm
):
    args = config(**options, max_grad_norm=max_grad_norm)
    run = trainer(tiny_model(), args, rows, None, tiny_tokenizer, callbacks=[_Break(2)])
    with pytest.raises(
        FloatingPointError, match=r"update 3 was not made: .* rows 4, 5 \(from 0\) of dataset.*checkpoint-2"
    ):
        run.train()
    assert weights(run).isfinite().all()
    (kept,) = checkpoints(args.output_dir)
    stored = AutoModelForCausalLM.from_pretrained(kept).state_dict()
    assert all(torch.equal(value, run.model.state_dict()[name]) for name, value in stored.items())
    again = config(**options, max_grad_norm=max_grad_norm, resume_from_checkpoint="auto")
    resumed = trainer(tiny_model(), again, rows, None, tiny_tokenizer)
    resumed.train(resume_from_checkpoint=kept)
    assert resumed.state.global_step == 3
    assert resumed.state.num_input_tokens_seen > run.state.num_input_tokens_seen > 0


def test_only_the_rows_at_fault_are_named(tiny_model, tiny_tokenizer, options):
    """Row 3's reference makes its loss infinite; the row beside it in the update is not accused."""
    model = tiny_model()
    plain = model.forward

    def forward(*args, input_ids=None, **kwargs):
        out = plain(*args, input_ids=input_ids, **kwargs)
        if (input_ids == marked).any():
            out.logits = out.logits * math.nan
        return out

    model.forward = forward
    marked = tiny_tokenizer("7")["input_ids"][-1]
    rows = [*SFT[:3], {"prompt": "the movie", "completion": " is 7"}]
    run = SFTTrainer(model, SFTConfig(**options), rows, processing_class=tiny_tokenizer)
    with pytest.raises(FloatingPointError, match=r"not finite among row 3 \(from 0\) of dataset"):
        run.train()


def test_packed_rows_are_named_by_their_numbers(tiny_model, tiny_tokenizer, options):
    args = SFTConfig(**options, packing=True, max_length=64)
    run = SFTTrainer(tiny_model(), args, SFT, None, tiny_tokenizer, callbacks=[_Break(0)])
    with pytest.raises(FloatingPointError, match=r"rows 0, 1, 2, .*first one: nothing has changed"):
        run.train()
    assert not checkpoints(args.output_dir)


def test_nan_is_not_saved_over_a_model(tiny_model, tiny_tokenizer, options, tmp_path):
    run = SFTTrainer(tiny_model(), SFTConfig(**options), SFT, processing_class=tiny_tokenizer)
    run.save_whole()
    before = {name: (tmp_path / "run" / name).read_bytes() for name in os.listdir(tmp_path / "run")}
    with torch.no_grad():
        run.model.transformer.h[0].attn.c_proj.bias[3] = math.nan
    for save in (run.save_whole, run.save_model, lambda: run.save_model(str(tmp_path / "elsewhere"))):
        with pytest.raises(FloatingPointError, match=r"c_proj.bias holds NaN"):
            save()
    assert {name: (tmp_path / "run" / name).read_bytes() for name in os.listdir(tmp_path / "run")} == before
    assert not os.path.exists(tmp_path / "elsewhere" / "config.json")


def test_a_vocabulary_masked_by_minus_infinity_is_saved(tiny_model, tiny_tokenizer, options, tmp_path):
    model = tiny_model()
    model.lm_head.bias = torch.nn.Parameter(torch.full((model.config.vocab_size,), -INF), requires_grad=False)
    run = SFTTrainer(model, SFTConfig(**options), SFT, processing_class=tiny_tokenizer)
    run.save_model(str(tmp_path / "m"))
    assert (tmp_path / "m" / "config.json").exists()


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_a_run_that_diverges_fails_as_a_command(tiny_tokenizer, tmp_path, capsys, command, monkeypatch):
    """A rate of 1e37 ruins the weights in a step or two: no exit status 0, no model, no `saved to`."""
    small_model(len(tiny_tokenizer), hidden_size=16, layers=1, seed=0).save_pretrained(tmp_path / "m")
    tiny_tokenizer.save_pretrained(tmp_path / "m")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in {"sft": SFT, "dpo": PAIRS}[command]))
    argv = [command, "--model", str(tmp_path / "m"), "--dataset", str(rows), "--output_dir", str(tmp_path / "run")]
    argv += ["--use_cpu", "--learning_rate", "1e37", "--optim", "sgd", "--max_steps", "6", "--disable_tqdm", "true"]
    assert cli.main([*argv, "--per_device_train_batch_size", "2", "--max_grad_norm", "0"]) == 1
    out = capsys.readouterr()
    assert out.err.strip().splitlines()[-1].startswith(f"fastalign {command}: error: ")
    assert "Traceback" not in out.err
    assert "saved to" not in out.out
    assert not (tmp_path / "run" / "config.json").exists()


# ---------------------------------------------------------------------------------------------------- ppo and grpo
POLICIES = pytest.mark.parametrize(("trainer", "config"), [(PPOTrainer, PPOConfig), (GRPOTrainer, GRPOConfig)])


def fails_at(step: int, how):
    """A reward that is a number for as many steps, and then what `how` returns or raises."""
    calls = []

    def score(completions):
        calls.append(torch.rand(()))  # a reward may draw: what failed is drawn again
        return how(completions) if len(calls) > step else [len(c) % 7 - 3.0 for c in completions]

    return score


def interrupt(_):
    raise KeyboardInterrupt


@POLICIES
@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        (lambda texts: [math.nan] * len(texts), ValueError, "number 0 of 8 .*checkpoint-1 holds the run up to there"),
        (lambda texts: 1 // 0, ValueError, "ZeroDivisionError.*checkpoint-1 holds the run up to there"),
        (interrupt, KeyboardInterrupt, None),
    ],
)
def test_a_reward_that_fails_loses_no_step(make, trainer, config, how, error, said):
    """Without any save_steps: what the last step's reward spoils is that step, and the run goes on to the bit."""
    extra = {"num_generations": 2, "total_episodes": 24}
    whole = make(trainer, config, output_dir=make(trainer, config, **extra).args.output_dir + "-whole", **extra)
    whole.train()
    cut = make(trainer, config, reward=fails_at(1, how), **extra)
    with pytest.raises(error, match=said):
        cut.train()
    (kept,) = checkpoints(cut.args.output_dir)
    assert os.path.basename(kept) == "checkpoint-1"
    resumed = make(trainer, config, **extra)
    resumed.train(kept)
    for name, value in whole.inner.state_dict().items():
        assert torch.equal(resumed.inner.state_dict()[name], value), name


@POLICIES
def test_a_first_step_that_fails_leaves_nothing(make, trainer, config):
    run = make(trainer, config, reward=lambda prompts: [math.inf] * len(prompts), num_generations=2)
    with pytest.raises(ValueError, match=r"is inf, .*It was the first step: nothing is lost"):
        run.train()
    assert not checkpoints(run.args.output_dir)


@POLICIES
def test_a_policy_gradient_that_is_no_number_ends_the_run(make, trainer, config):
    run = make(trainer, config, num_generations=2, total_episodes=24)
    plain = run.advantages

    def advantages(episodes, shaped):
        found = plain(episodes, shaped)
        if run.state.global_step == 2:
            episodes[3].advantages[0] = math.nan
        return found

    run.advantages = advantages
    with pytest.raises(FloatingPointError, match=r"gradient's norm is nan; .* rows .* of dataset. checkpoint-2 holds"):
        run.train()
    assert all(p.isfinite().all() for p in run.inner.parameters())
    (kept,) = checkpoints(run.args.output_dir)
    assert AutoModelForCausalLM.from_pretrained(kept).num_parameters()


@POLICIES
def test_a_policy_of_nan_is_not_saved(make, trainer, config):
    run = make(trainer, config, num_generations=2)
    run.save_model()
    with torch.no_grad():
        next(run.inner.policy.parameters())[0, 0] = INF
    with pytest.raises(FloatingPointError, match="holds NaN or inf"):
        run.save_model()
    assert AutoModelForCausalLM.from_pretrained(run.args.output_dir).num_parameters()


# ------------------------------------------------------------------------------------- rewards that do not apply
@POLICIES
def test_a_response_without_a_reward_teaches_nothing(make, trainer, config):
    """None for every second response: advantages of 0 there, and those of the others as if they were alone."""

    def half(prompts):
        return [float(i % 5) if i % 2 else None for i in range(len(prompts))]

    run = make(trainer, config, reward=half, num_generations=4, kl_coef=0.0)
    episodes = run.roll_out()
    run.advantages(episodes, run.shape(episodes, 0.0))
    without = [e for e in episodes if math.isnan(e.score)]
    assert len(without) == len(episodes) // 2
    assert all((e.advantages == 0).all() for e in without)
    assert any((e.advantages != 0).any() for e in episodes)
    if trainer is PPOTrainer:
        assert all(torch.equal(e.returns, e.values) for e in without)
    metrics = run.train()
    assert metrics["objective/reward_applies"] == 0.5
    assert metrics["objective/scores"] == pytest.approx(sum(i % 5 for i in (1, 3, 5, 7)) / 4)
    assert all(math.isfinite(value) for value in metrics.values())


@POLICIES
def test_a_reward_that_never_applies_leaves_the_policy_alone(make, trainer, config):
    run = make(trainer, config, reward=lambda prompts: [None] * len(prompts), num_generations=2, kl_coef=0.0)
    before = [p.clone() for p in run.inner.policy.parameters()]
    metrics = run.train()
    assert "objective/scores" not in metrics
    assert metrics["objective/reward_applies"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, run.inner.policy.parameters(), strict=True))
