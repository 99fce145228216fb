"""Trainers: the right loss whatever the batching, the right reference, exact resume, models that load again."""

from __future__ import annotations

import json
import math
import os
import shutil

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")

from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from fastalign.demo.config import DemoConfig
from fastalign.trainers.common import run
from fastalign.trainers.common.callbacks import LOG_NAME, read_log
from fastalign.trainers.common.config import TrainingConfig
from fastalign.trainers.dpo import DPOConfig, DPOTrainer
from fastalign.trainers.sft import SFTConfig, SFTTrainer

WORDS = ["the", "movie", "is", "good", "bad", "great", "dull", "film", "fun", "awful", "long", "and"]


def text(i: int, words: int) -> str:
    return "".join(" " + WORDS[(i * 5 + j * j) % len(WORDS)] for j in range(words))


SFT_ROWS = [{"prompt": "the movie", "completion": text(i, 1 + i % 5)} for i in range(8)]
PAIRS = [{"prompt": "a film", "chosen": text(i, 1 + i % 4), "rejected": text(i + 3, 2 + i % 3)} for i in range(8)]


@pytest.fixture
def options(tmp_path):
    """Options of a run small enough to look at: plain SGD in the data's order, so that updates can be compared."""
    return {
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def log_of(trainer) -> list[dict]:
    return read_log(os.path.join(trainer.args.output_dir, LOG_NAME))


def cross_entropy(model, tokenizer, rows) -> torch.Tensor:
    """Per row: summed NLL of the completion and its length, by torch and one row at a time."""
    out = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        targets = torch.tensor(ids[len(prompt) :])
        nll = torch.nn.functional.cross_entropy(logits[len(prompt) - 1 : -1], targets, reduction="sum")
        out.append(torch.stack([nll, torch.tensor(float(len(targets)))]))
    return torch.stack(out)


class TestSFT:
    @pytest.mark.parametrize("normalization", ["token", "sequence"])
    def test_loss_is_the_cross_entropy_of_completions(self, tiny_model, tiny_tokenizer, options, normalization):
        model = tiny_model()
        nll = cross_entropy(model, tiny_tokenizer, SFT_ROWS[:4])
        args = SFTConfig(**{**options, "max_steps": 1}, normalization=normalization)
        trainer = SFTTrainer(model, args, SFT_ROWS, processing_class=tiny_tokenizer)
        trainer.train()
        expected = {"token": nll[:, 0].sum() / nll[:, 1].sum(), "sequence": (nll[:, 0] / nll[:, 1]).mean()}
        assert log_of(trainer)[0]["loss"] == pytest.approx(float(expected[normalization]), rel=1e-5)

    def test_evaluation_loss_is_exact_whatever_the_batches(self, tiny_model, tiny_tokenizer, options):
        nll = cross_entropy(tiny_model(), tiny_tokenizer, SFT_ROWS[:7])
        for size in (2, 3, 7):
            args = SFTConfig(**options, per_device_eval_batch_size=size)
            trainer = SFTTrainer(tiny_model(), args, None, SFT_ROWS[:7], tiny_tokenizer)
            assert trainer.evaluate()["eval_loss"] == pytest.approx(float(nll[:, 0].sum() / nll[:, 1].sum()), rel=1e-5)

    @pytest.mark.parametrize("normalization", ["token", "sequence"])
    @pytest.mark.parametrize("rows", [8, 7])
    def test_accumulated_micro_batches_equal_one_batch(self, tiny_model, tiny_tokenizer, options, normalization, rows):
        """Micro-batches of unequal token counts; with 7 rows the last one also has fewer sequences."""
        results = []
        for size, steps in ((8, 1), (2, 4)):
            sized = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
            args = SFTConfig(**{**options, **sized}, normalization=normalization)
            trainer = SFTTrainer(tiny_model(), args, SFT_ROWS[:rows], processing_class=tiny_tokenizer)
            trainer.train()
            results.append((weights(trainer), [line["loss"] for line in log_of(trainer)[:2]]))
        torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
        assert results[1][1] == pytest.approx(results[0][1], rel=1e-5)

    def test_packing_changes_neither_loss_nor_update(self, tiny_model, tiny_tokenizer, options):
        results = []
        for extra in ({"packing": True, "max_length": 32}, {}):
            sized = {**options, "max_steps": 1, "per_device_train_batch_size": 8, **extra}
            trainer = SFTTrainer(tiny_model(), SFTConfig(**sized), SFT_ROWS, SFT_ROWS, tiny_tokenizer)
            before = trainer.evaluate()["eval_loss"]
            trainer.train()
            results.append((weights(trainer), before, log_of(trainer)[0]["num_tokens"], len(trainer.train_dataset)))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-6)
        assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)
        assert results[0][2] == results[1][2]
        assert results[0][3] < results[1][3]

    def test_num_tokens_counts_real_tokens(self, tiny_model, tiny_tokenizer, options):
        trainer = SFTTrainer(tiny_model(), SFTConfig(**options), SFT_ROWS, processing_class=tiny_tokenizer)
        trainer.train()
        lengths = [len(tiny_tokenizer(r["prompt"] + r["completion"])["input_ids"]) + 1 for r in SFT_ROWS]
        assert [line["num_tokens"] for line in log_of(trainer)[:2]] == [sum(lengths[:4]), sum(lengths)]


class TestDPO:
    def test_first_step_and_metric_names(self, tiny_model, tiny_tokenizer, options):
        args = DPOConfig(**options, per_device_eval_batch_size=3)
        trainer = DPOTrainer(tiny_model(), args, PAIRS, PAIRS, tiny_tokenizer)
        trainer.train()
        first = log_of(trainer)[0]
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
        assert first["logps/chosen"] < 0
        names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/rejected")
        metrics = trainer.evaluate()
        assert {*names, "num_tokens"} <= set(first)
        assert {f"eval_{name}" for name in names} <= set(metrics)
        assert metrics["eval_rewards/margins"] == pytest.approx(
            metrics["eval_rewards/chosen"] - metrics["eval_rewards/rejected"], abs=1e-5
        )

    def test_precomputed_reference_equals_reference_per_step(self, tiny_model, tiny_tokenizer, options):
        results = []
        for precompute in (True, False):
            args = DPOConfig(**{**options, "max_steps": 6}, precompute_ref_log_probs=precompute, beta=0.5)
            trainer = DPOTrainer(tiny_model(), args, PAIRS, processing_class=tiny_tokenizer)
            assert (trainer.ref_model is None) is precompute
            trainer.train()
            results.append((weights(trainer), [line["loss"] for line in log_of(trainer)[:6]]))
        assert results[0][1][5] < results[0][1][0]
        assert results[1][1] == pytest.approx(results[0][1], abs=1e-5)
        torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-6)

    def test_reference_model_that_is_another_one(self, tiny_model, tiny_tokenizer, options):
        other = tiny_model()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
        losses = []
        for precompute in (True, False):
            args = DPOConfig(**options, precompute_ref_log_probs=precompute)
            trainer = DPOTrainer(tiny_model(), args, PAIRS, processing_class=tiny_tokenizer, ref_model=other)
            trainer.train()
            losses.append(log_of(trainer)[0]["loss"])
        assert abs(losses[0] - math.log(2)) > 1e-4
        assert losses[1] == pytest.approx(losses[0], abs=1e-5)

    def test_reference_columns_of_the_data_are_used(self, tiny_model, tiny_tokenizer, options):
        rows = [{**row, "ref_chosen_logps": -5.0, "ref_rejected_logps": -9.0} for row in PAIRS]
        trainer = DPOTrainer(tiny_model(), DPOConfig(**options), rows, processing_class=tiny_tokenizer)
        trainer.train()
        line = log_of(trainer)[0]
        assert line["rewards/chosen"] == pytest.approx(0.1 * (line["logps/chosen"] + 5), rel=1e-5)

    def test_losses_without_reference_compute_none(self, tiny_model, tiny_tokenizer, options):
        for extra in ({"loss_type": "simpo"}, {"reference_free": True}):
            trainer = DPOTrainer(tiny_model(), DPOConfig(**options, **extra), PAIRS, processing_class=tiny_tokenizer)
            assert trainer.ref_model is None
            assert "ref_chosen_logps" not in trainer.train_dataset.column_names
            trainer.train()
            assert math.isfinite(log_of(trainer)[0]["loss"])

    def test_accumulated_micro_batches_equal_one_batch(self, tiny_model, tiny_tokenizer, options):
        results = []
        for size, steps in ((7, 1), (2, 4)):
            sized = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
            trainer = DPOTrainer(
                tiny_model(), DPOConfig(**{**options, **sized}), PAIRS[:7], processing_class=tiny_tokenizer
            )
            trainer.train()
            results.append((weights(trainer), log_of(trainer)[1]))
        torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
        for name in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen"):
            assert results[1][1][name] == pytest.approx(results[0][1][name], rel=1e-4, abs=1e-6)

    def test_dropout_is_off(self, tiny_model, tiny_tokenizer, options):
        model = tiny_model()
        model.add_module("drop", torch.nn.Dropout(0.5))
        model.drop.attention_dropout = 0.5  # as many models keep the rate of what their attention function drops
        DPOTrainer(model, DPOConfig(**options), PAIRS, processing_class=tiny_tokenizer)
        assert (model.drop.p, model.drop.attention_dropout) == (0.0, 0.0)

    def test_a_tokenizer_must_be_given(self, tiny_model, options):
        for trainer, config in ((DPOTrainer, DPOConfig), (SFTTrainer, SFTConfig)):
            with pytest.raises(ValueError, match="processing_class must be the model's tokenizer; got None"):
                trainer(tiny_model(), config(**options), PAIRS)

    def test_rows_beyond_the_models_learned_positions_are_refused(self, tiny_model, tiny_tokenizer, options):
        """On a GPU they would end all use of it. The model has 256 positions, and rotary ones have no end."""
        rows = [{"prompt": "a film", "chosen": text(1, 300), "rejected": text(2, 3)}]
        args = DPOConfig(**options, max_length=257)
        with pytest.raises(ValueError, match=r"max_length must be at most 256, .* dataset has; got 257 and a row of"):
            DPOTrainer(tiny_model(), args, rows, None, tiny_tokenizer)
        with pytest.raises(ValueError, match="such rows as eval_dataset has"):
            DPOTrainer(tiny_model(), args, PAIRS, rows, tiny_tokenizer)
        DPOTrainer(tiny_model(), DPOConfig(**options, max_length=256), rows, None, tiny_tokenizer).train()
        packed = SFTConfig(**options, max_length=400, packing=True)  # each of its sequences begins anew
        SFTTrainer(tiny_model(), packed, SFT_ROWS * 20, None, tiny_tokenizer).train()

    def test_several_gpus_need_several_processes(self, tiny_model, tiny_tokenizer, options):
        args = DPOConfig(**options)
        args._n_gpu = 2  # as on a machine with two, without a launcher
        with pytest.raises(ValueError, match="one device; got 2 GPUs: start it with torchrun"):
            DPOTrainer(tiny_model(), args, PAIRS, processing_class=tiny_tokenizer)


class _StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize(
    ("config", "trainer_class", "rows", "order"),
    [(SFTConfig, SFTTrainer, SFT_ROWS, "random"), (DPOConfig, DPOTrainer, PAIRS, "group_by_length")],
)
def test_resumed_run_equals_uninterrupted_one(
    tiny_model, tiny_tokenizer, options, tmp_path, config, trainer_class, rows, order
):
    """To the bit: weights and losses, through a stop in the middle of an epoch, with momentum and a shuffled order."""
    shared = {**options, "optim": "adamw_torch", "max_steps": 7, "per_device_train_batch_size": 3, "save_steps": 2}
    shared |= {"train_sampling_strategy": order, "save_strategy": "steps", "lr_scheduler_type": "cosine"}

    def make(name, *callbacks, **more):
        args = config(**{**shared, "output_dir": str(tmp_path / name)}, **more)
        return trainer_class(tiny_model(), args, rows, None, tiny_tokenizer, callbacks=list(callbacks))

    whole = make("whole")
    whole.train()
    make("cut", _StopAt(5)).train()
    resumed = make("cut", resume_from_checkpoint="auto")
    start = run.start_point(resumed.args)
    assert os.path.basename(start) in ("checkpoint-4", "checkpoint-5")
    resumed.train(resume_from_checkpoint=start)
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.state.num_input_tokens_seen == whole.state.num_input_tokens_seen
    lines = [[(line["step"], line["loss"]) for line in log_of(t) if "loss" in line] for t in (whole, resumed)]
    assert lines[0] == lines[1]
    assert [step for step, _ in lines[0]] == list(range(1, 8))


def test_half_written_checkpoint_is_not_loaded(tmp_path):
    for name, state in (
        ("checkpoint-2", "{}"),
        ("checkpoint-10", "{}"),
        ("checkpoint-12", '{"global_st'),
        ("checkpoint-14", None),
    ):
        (tmp_path / name).mkdir()
        if state is not None:
            (tmp_path / name / "trainer_state.json").write_text(state)
    assert [os.path.basename(path) for path in run.checkpoints(str(tmp_path))] == ["checkpoint-2", "checkpoint-10"]
    args = TrainingConfig(output_dir=str(tmp_path), use_cpu=True, resume_from_checkpoint="auto")
    assert os.path.basename(run.start_point(args)) == "checkpoint-10"
    args.resume_from_checkpoint = str(tmp_path / "checkpoint-12")
    with pytest.raises(ValueError, match="whole checkpoint"):
        run.start_point(args)


def test_command_saves_a_model_that_loads(tiny_model, tiny_tokenizer, tmp_path):
    base, data, out = (tmp_path / name for name in ("base", "pairs.jsonl", "out"))
    tiny_model().save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {base}\ndataset: {data}\noutput_dir: {out}\nlearning_rate: 1e-2\nbeta: 7\n")
    options = [
        "--eval_dataset",
        str(data),
        "--num_train_epochs",
        "1",
        "--logging_steps=1",
        "--use_cpu",
        "--beta",
        "0.2",
    ]
    options += ["--save_strategy", "no", "--padding_side", "left"]
    assert run.run("dpo", DPOConfig, DPOTrainer, ["--config", str(config), *options]) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert not torch.equal(model.lm_head.weight, tiny_model().lm_head.weight)
    assert model.config.use_cache
    assert tokenizer("the movie")["input_ids"] == tiny_tokenizer("the movie")["input_ids"]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["eval_loss"] < math.log(2)
    first = read_log(str(out / LOG_NAME))[0]
    assert first["learning_rate"] == pytest.approx(1e-2)
    shutil.rmtree(out)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (SFTConfig, {"normalization": "word"}, "normalization must be one of token, sequence"),
        (SFTConfig, {"label_smoothing": 2.0}, "label_smoothing"),
        (SFTConfig, {"label_smoothing_factor": 0.1}, "use label_smoothing"),
        (SFTConfig, {"padding_side": "top"}, "padding_side must be one of"),
        (SFTConfig, {"packing": True, "normalization": "sequence"}, "packing needs normalization token"),
        (SFTConfig, {"max_length": 0}, "max_length must be above 0"),
        (DPOConfig, {"loss_type": "sigmoidal"}, "loss_type"),
        (DPOConfig, {"beta": 0.0}, "beta"),
        (DPOConfig, {"use_liger_kernel": True}, "own kernels"),
        (DemoConfig, {"samples_per_prompt": 1}, "samples_per_prompt"),
        (DemoConfig, {"hidden_size": -1}, "hidden_size must be above 0"),
    ],
)
def test_bad_configuration_is_refused(config, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(output_dir=str(tmp_path), **options)
