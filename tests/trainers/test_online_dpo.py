"""Online DPO: pairs of the policy's own samples by a reward or a judge, ties left out and counted, exact resume."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")
pytest.importorskip("accelerate", reason="needs accelerate (the extra `train`)")

from transformers import AutoModelForCausalLM

from fastalign.cli import commands as cli
from fastalign.evaluation.judges import ScoreJudge
from fastalign.losses import dpo_loss
from fastalign.trainers.common.callbacks import LOG_NAME, read_log
from fastalign.trainers.online_dpo import OnlineDPOConfig, OnlineDPOTrainer, Pair
from fastalign.trainers.policy.judge import JudgeReward
from fastalign.trainers.policy.reward_functions import RewardError
from fastalign.trainers.policy.rollout import Episode, Prompt


def lengths(completions):
    return [len(text) % 7 - 3.0 for text in completions]


@pytest.fixture
def online(make):
    def build(**options):
        shared = {"num_ppo_epochs": 1, "num_mini_batches": 1, "total_episodes": 16, **options}
        judge = shared.pop("judge_function", None)
        if judge is None:
            return make(OnlineDPOTrainer, OnlineDPOConfig, **shared)

        def trainer(*given, reward=None, **more):
            return OnlineDPOTrainer(*given, judge=judge, **more)

        return make(trainer, OnlineDPOConfig, **shared)

    return build


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.inner.parameters()])


def lines_of(trainer):
    lines = read_log(os.path.join(trainer.args.output_dir, LOG_NAME))
    return [{k: v for k, v in line.items() if k not in ("time", "eps")} for line in lines]


def sums(model, episodes):
    """Log-probabilities of the responses, one at a time without padding."""
    found = []
    for e in episodes:
        ids = torch.tensor([e.prompt.ids + e.ids])
        logps = model(ids).logits[0, :-1].double().log_softmax(-1)
        found.append(logps.gather(1, ids[0, 1:, None])[len(e.prompt.ids) - 1 :].sum())
    return torch.stack(found)


@pytest.mark.parametrize("options", [{}, {"loss_type": "ipo", "beta": 0.3}, {"loss_type": "sigmoid_norm"}], ids=str)
@pytest.mark.parametrize("each", [2, 4])
def test_one_update_is_dpo_of_the_best_against_the_worst(online, tiny_model, options, each):
    """From the second epoch on policy and reference differ: the same steps from autograd of whole logits."""
    trainer = online(num_generations=each, num_ppo_epochs=2, learning_rate=1e-2, **options)
    trainer._ready()
    episodes = trainer.roll_out()
    shaped = trainer.shape(episodes, 0.0)
    found = trainer.advantages(episodes, shaped)
    groups = [episodes[i : i + each] for i in range(0, len(episodes), each)]
    want = []
    for group in groups:
        scores = lengths([e.text for e in group])
        assert [e.score for e in group] == pytest.approx(scores)
        if max(scores) > min(scores):
            want.append((group[scores.index(max(scores))], group[scores.index(min(scores))]))
    assert [(p.chosen, p.rejected) for p in trainer._pairs] == want
    assert found["objective/pairs"] == len(want)
    assert found["objective/ties"] == len(groups) - len(want)
    assert want
    model, reference = tiny_model().eval(), tiny_model().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses = []
    size = (
        {}
        if options.get("loss_type") != "sigmoid_norm"
        else {
            f"{side}_lengths": torch.tensor([len(p[k].ids) for p in want])
            for k, side in enumerate(("chosen", "rejected"))
        }
    )
    for epoch in range(2):
        policy = [sums(model, [p[side] for p in want]) for side in (0, 1)]
        with torch.no_grad():
            held = [sums(reference, [p[side] for p in want]) for side in (0, 1)]
        loss = dpo_loss(*policy, *held, **{"beta": 0.1, **options}, **size).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - epoch / (trainer.total_steps * 2))
        optimizer.step()
    metrics = trainer.update(episodes)
    assert metrics["loss/policy_avg"] == pytest.approx(sum(losses) / 2, rel=1e-4)
    # Adam's first steps follow the sign of a gradient: where that is rounding alone they may differ.
    ours, theirs = weights(trainer), torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float((ours - theirs).norm()) < 2e-2 * float((theirs - weights_of(tiny_model())).norm())


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_ties_are_left_out_and_counted(online):
    trainer = online(reward=lambda completions: [1.0] * len(completions))
    before = weights(trainer).clone()
    trainer.train()
    assert torch.equal(weights(trainer), before)
    for line in lines_of(trainer):
        if "objective/ties" in line:
            assert (line["objective/ties"], line["objective/pairs"]) == (2, 0)
            assert "loss/policy_avg" not in line


def test_what_the_reward_does_not_apply_to_is_in_no_pair(online):
    calls = []

    def second_only(completions):
        calls.append(len(completions))
        return [None if i % 2 else float(i) for i in range(len(completions))]

    trainer = online(reward=second_only)
    trainer.train()
    counted = [line for line in lines_of(trainer) if "objective/pairs" in line]
    assert calls
    assert all((line["objective/pairs"], line["objective/ties"]) == (0, 0) for line in counted)


def test_the_policy_learns_what_is_rewarded(online):
    trainer = online(
        reward=lambda completions: [float(len(c)) for c in completions],
        total_episodes=32 * 16,
        lr_scheduler_type="constant",
        per_device_train_batch_size=32,
        gradient_accumulation_steps=1,
        num_generations=4,
        learning_rate=2e-2,
        beta=0.05,
    )
    trainer.train()
    scores = [line["objective/scores"] for line in lines_of(trainer) if "objective/scores" in line]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 * 1.3
    assert lines_of(trainer)[-1]["rewards/accuracies"] > 0.5


@pytest.mark.parametrize("extra", [{}, {"num_generations": 4, "num_mini_batches": 2}, {"loss_type": "simpo"}], ids=str)
def test_resumed_run_equals_uninterrupted_one(online, tmp_path, extra):
    shared = {"total_episodes": 80, "save_steps": 2, "per_device_train_batch_size": 4, **extra}
    whole = online(**shared, output_dir=str(tmp_path / "whole"))
    whole.train()
    cut = online(**shared, output_dir=str(tmp_path / "cut"))
    step = cut.step
    cut.step = lambda: step() if cut.state.global_step < 3 else (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    torch.manual_seed(99)
    resumed = online(**shared, output_dir=str(tmp_path / "cut"))
    resumed.train(str(tmp_path / "cut" / "checkpoint-2"))
    assert torch.equal(weights(resumed), weights(whole))
    assert lines_of(resumed) == lines_of(whole)


def test_weighted_tokens_beyond_the_shorter_length_count_alike_on_both_sides(online):
    """A policy that is its reference has rewards of 0 and a loss of ln 2, LD-DPO's weights or not."""
    trainer = online(ld_alpha=0.3)
    long, short = trainer.roll_out()[:2]
    short.ids, short.ref_logps = short.ids[:3], short.ref_logps[:3]
    assert len(long.ids) > 3
    for pair in (Pair(long, short), Pair(short, long)):
        updater = trainer._ready()
        loss = updater.share([pair], trainer.loss(), 1, 1)
        found = updater.means.pop(lambda x: x)
        assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
        assert found["rewards/chosen"] == pytest.approx(0, abs=1e-6)
        side = "chosen" if pair.chosen is long else "rejected"
        want = float(long.ref_logps[:3].sum() + 0.3 * long.ref_logps[3:].sum())
        assert found[f"logps/{side}"] == pytest.approx(want, rel=1e-5)


# -------------------------------------------------------------------------------------------------------------- judges
def episodes_of(texts, prompts=None):
    prompts = prompts or [Prompt([1], "the", {})] * len(texts)
    return [Episode(prompt, [1], text, True) for prompt, text in zip(prompts, texts, strict=True)]


def longer(prompts, first, second):
    return [0.5 if len(a) == len(b) else float(len(a) > len(b)) for a, b in zip(first, second, strict=True)]


class TestJudge:
    def test_scores_are_shares_of_the_others_that_lose(self):
        scores = JudgeReward(longer, 4)(episodes_of(["aaa", "a", "aa", "a"]))
        assert scores.tolist() == pytest.approx([1.0, 1 / 6, 2 / 3, 1 / 6])

    def test_only_responses_of_one_prompt_are_compared(self):
        one, two = Prompt([1], "the", {}), Prompt([2], "a", {})
        scores = JudgeReward(longer, 2)(episodes_of(["a", "aa", "aaa", "aaaa", "a"], [one, one, two, two, one]))
        assert scores[:4].tolist() == [0.0, 1.0, 0.0, 1.0]
        assert scores[4].isnan()

    def test_one_that_looks_at_the_order_is_asked_both_ways(self):
        class First:
            positional = True

            def __call__(self, prompts, first, second):
                return [1.0] * len(first)

        assert JudgeReward(First(), 2)(episodes_of(["a", "b"])).tolist() == [0.5, 0.5]

    @pytest.mark.parametrize(
        ("judge", "message"),
        [
            (lambda prompts, first, second: [2.0], "verdicts from 0 to 1, or None; got 2.0"),
            (lambda prompts, first, second: ["first"], "verdicts from 0 to 1, or None; got 'first'"),
            (lambda prompts, first, second: [], "must return 1 verdicts"),
            (lambda prompts, first, second: 1 / 0, "judge failed: ZeroDivisionError"),
        ],
    )
    def test_what_is_no_verdict_is_refused(self, judge, message):
        with pytest.raises(RewardError, match=message):
            JudgeReward(judge, 2)(episodes_of(["a", "b"]))

    def test_a_judge_and_a_reward_of_the_same_mind_train_alike(self, online, tmp_path):
        """So do judges of evaluations."""
        judges = (longer, ScoreJudge(lambda prompts, answers: [len(a) for a in answers]))
        found = []
        for i, judge in enumerate(judges):
            trainer = online(judge_function=judge, output_dir=str(tmp_path / str(i)))
            trainer.train()
            found.append(weights(trainer))
        rewarded = online(reward=lambda completions: [len(c) for c in completions])
        rewarded.train()
        for other in found:
            assert torch.equal(other, weights(rewarded))

    def test_evaluation_without_a_comparison_has_no_score(self, online):
        trainer = online(judge_function=longer, eval_rows=[{"prompt": "the movie"}])
        trainer.train()
        (line,) = [line for line in lines_of(trainer) if "eval/kl" in line]
        assert "eval/score" not in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 1}, "num_generations must be at least 2, to make a pair"),
        ({"loss_type": "kto_pair"}, "loss_type 'kto_pair' is of single completions, not of pairs"),
        ({"beta": 0.0}, r"beta must be in \(0"),
        ({"judge": "somewhere:judge"}, "a judge takes the place of a reward"),
        ({"judge_function": longer, "missing_eos_penalty": 1.0}, "missing_eos_penalty is subtracted from a score"),
    ],
)
def test_refusals(online, options, message):
    with pytest.raises(ValueError, match=message):
        online(**options)


def test_keys_of_single_responses_are_no_keys_here(capsys):
    for name in ("cliprange", "entropy_coef", "sapo_temperature_pos", "kl_in"):
        assert cli.main(["online-dpo", f"--{name}", "1"]) == 2
        capsys.readouterr()


def test_the_command_takes_trls_names_and_a_judge(tiny_model, tiny_tokenizer, tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "the movie"}) + "\n" + json.dumps({"prompt": "a"}))
    (tmp_path / "judges.py").write_text(
        "def judge(prompts, first, second):\n    return [len(a) > len(b) for a, b in zip(first, second)]\n"
    )
    argv = ["online-dpo", "--model", str(tmp_path / "base"), "--dataset", str(tmp_path / "prompts.jsonl")]
    argv += ["--output_dir", str(tmp_path / "out"), "--judge", f"{tmp_path}/judges.py:judge", "--use_cpu"]
    argv += ["--max_new_tokens", "6", "--beta", "0.2", "--per_device_train_batch_size", "4", "--total_episodes", "8"]
    assert cli.main([*argv, "--learning_rate", "1e-2", "--disable_tqdm"]) == 0
    assert "objective/ties" in json.loads((tmp_path / "out" / "metrics.json").read_text())
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
