"""TR-DPO: a reference that follows the model, as TRL moves it; checkpoints hold it; what does not go is refused."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")

from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from fastalign.trainers.common import run
from fastalign.trainers.common.callbacks import LOG_NAME, read_log
from fastalign.trainers.dpo import DPOConfig, DPOTrainer

PAIRS = [
    {"prompt": "the movie", "chosen": " is good" * (1 + i % 3), "rejected": " is bad and long"[: 7 + 3 * (i % 4)]}
    for i in range(8)
]
MOVING = {"sync_ref_model": True, "ref_model_sync_steps": 2}


@pytest.fixture
def make(tiny_model, tiny_tokenizer, tmp_path):
    def build(rows=PAIRS, callbacks=(), ref_model=None, model=None, **options):
        shared = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
        shared |= {"logging_steps": 1, "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_steps": 6}
        shared |= {"optim": "sgd", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential", "beta": 0.5}
        shared |= {"per_device_train_batch_size": 4, "report_to": "none"}
        args = DPOConfig(**{**shared, **options})
        model = model or tiny_model()
        return DPOTrainer(model, args, rows, None, tiny_tokenizer, callbacks=list(callbacks), ref_model=ref_model)

    return build


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def lines_of(trainer):
    return [line for line in read_log(os.path.join(trainer.args.output_dir, LOG_NAME)) if "loss" in line]


class _Recorder(TrainerCallback):
    """The model's and the reference's weights after every update."""

    def __init__(self):
        self.trainer, self.models, self.references = None, [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.models.append(flat(self.trainer.model))
            self.references.append(flat(self.trainer.ref_model))


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_the_reference_moves_as_the_paper_says(make, tiny_model, alpha):
    """Soft: ref = a policy + (1 - a) ref; hard: the policy itself. At every second update and at no other."""
    seen = _Recorder()
    trainer = make(**MOVING, ref_model_mixup_alpha=alpha, callbacks=[seen])
    seen.trainer = trainer
    trainer.train()
    reference = flat(tiny_model())
    for step, (model, found) in enumerate(zip(seen.models, seen.references, strict=True), 1):
        if step % 2 == 0:
            reference = model if alpha == 1 else alpha * model + (1 - alpha) * reference
        torch.testing.assert_close(found, reference, rtol=1e-6, atol=1e-7)
        assert torch.equal(found, model) == (alpha == 1 and step % 2 == 0)
    margins = [line["rewards/margins"] for line in lines_of(trainer)]
    assert (margins[2] == 0) == (alpha == 1)  # the update after a hard move: policy and reference are one


def test_a_run_is_trls(make, tiny_model, tiny_tokenizer, tmp_path):
    trl = pytest.importorskip("trl", reason="needs TRL (the extra `dev`)")
    ours = make(**MOVING)  # their default share, 0.6
    ours.train()
    mine = lines_of(ours)
    options = {"output_dir": str(tmp_path / "theirs"), "use_cpu": True, "save_strategy": "no", "report_to": "none"}
    options |= {"logging_steps": 1, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0}
    options |= {"per_device_train_batch_size": 4, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}
    options |= {"learning_rate": 0.5, "max_steps": 6, "beta": 0.5, "train_sampling_strategy": "sequential"}
    given = {"train_dataset": Dataset.from_list(PAIRS), "processing_class": tiny_tokenizer}
    theirs = trl.DPOTrainer(
        model=tiny_model(), ref_model=tiny_model(), args=trl.DPOConfig(**options, **MOVING), **given
    )
    theirs.train()
    lines = [x for x in theirs.state.log_history if "rewards/margins" in x]
    for line, other in zip(mine, lines, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert line["rewards/margins"] == pytest.approx(other["rewards/margins"], rel=1e-3, abs=1e-4)
    torch.testing.assert_close(flat(ours.ref_model), flat(theirs.ref_model), rtol=1e-3, atol=1e-4)
    still = make()
    still.train()
    assert lines_of(still)[-1]["loss"] != pytest.approx(mine[-1]["loss"], rel=1e-3)


class _StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 5


def test_a_resumed_run_has_the_reference_that_it_had(make, tmp_path):
    shared = {**MOVING, "ref_model_sync_steps": 3, "max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    shared |= {"optim": "adamw_torch", "learning_rate": 1e-2}
    whole = make(**shared, output_dir=str(tmp_path / "whole"))
    whole.train()
    make(**shared, output_dir=str(tmp_path / "cut"), callbacks=[_StopAt()]).train()
    resumed = make(**shared, output_dir=str(tmp_path / "cut"), resume_from_checkpoint="auto")
    start = run.start_point(resumed.args)
    stored = load_file(os.path.join(start, "reference.safetensors"))
    assert set(stored) == {name for name, _ in resumed.model.named_parameters()}
    resumed.train(resume_from_checkpoint=start)
    assert torch.equal(flat(resumed.model), flat(whole.model))
    assert torch.equal(flat(resumed.ref_model), flat(whole.ref_model))
    kept = [[(x["step"], x["loss"]) for x in lines_of(t)] for t in (whole, resumed)]
    assert kept[0] == kept[1]


def test_a_checkpoint_without_a_reference_is_refused(make, tmp_path):
    shared = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make(**shared).train()
    moving = make(**MOVING, **{**shared, "max_steps": 4})
    with pytest.raises(ValueError, match=r"must hold reference\.safetensors to go on with sync_ref_model"):
        moving.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


REFERENCED = [{**row, "ref_chosen_logps": -3.0, "ref_rejected_logps": -4.0} for row in PAIRS]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs must be false with sync_ref_model"),
        ({"rows": REFERENCED}, "dataset must not have the column ref_chosen_logps with sync_ref_model"),
        ({"lora_rank": 2}, "lora_rank must be 0 with sync_ref_model"),
        ({"loss_type": "simpo"}, "sync_ref_model moves a reference, and this loss uses none"),
        ({"reference_free": True}, "sync_ref_model moves a reference, and this loss uses none"),
        ({"ref_model_mixup_alpha": 0.0}, r"ref_model_mixup_alpha must be in \(0"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps must be"),
    ],
)
def test_refusals(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**{**MOVING, **options})


def test_another_model_as_the_reference_is_refused(make, tiny_tokenizer):
    from fastalign.demo.models import small_model

    wide = small_model(len(tiny_tokenizer), hidden_size=32, layers=1, seed=0)
    with pytest.raises(ValueError, match="ref_model must have the model's weights with sync_ref_model; they differ in"):
        make(**MOVING, ref_model=wide)


def test_without_it_nothing_moves_and_references_are_precomputed(make):
    assert "ref_chosen_logps" in make().train_dataset.column_names
    held = make(precompute_ref_log_probs=False)
    before = flat(held.ref_model)
    held.train()
    assert torch.equal(flat(held.ref_model), before)
