"""Distillation: a student that learns a teacher, on data and on what models write, the same when it is resumed."""

from __future__ import annotations

import math
import os

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")

from fastalign.cli.commands import main
from fastalign.demo.models import small_model
from fastalign.reference import distillation as reference
from fastalign.trainers.common import run
from fastalign.trainers.common.callbacks import LOG_NAME, read_log
from fastalign.trainers.distill import DistillConfig, DistillTrainer

ENDINGS = [" is good and fun", " is great", " is long", " is a dull film", " is awful , awful and bad"]
ROWS = [{"prompt": "the movie", "completion": ENDINGS[i % 5]} for i in range(6)]
LINE = {"divergence", "nll", "on_policy", "loss", "num_tokens"}


@pytest.fixture
def teacher(tiny_tokenizer):
    """Larger than the student."""
    return small_model(len(tiny_tokenizer), hidden_size=24, layers=2, seed=7)


@pytest.fixture
def make(tiny_model, tiny_tokenizer, teacher, tmp_path):
    def build(rows=ROWS, eval_rows=None, name="run", **options):
        shared = {"output_dir": str(tmp_path / name), "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
        shared |= {"logging_steps": 1, "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_steps": 1}
        shared |= {"optim": "sgd", "max_grad_norm": 0.0, "max_new_tokens": 5, "lmbda": 0.0}
        args = DistillConfig(**{**shared, **options})
        return DistillTrainer(tiny_model(), args, rows, eval_rows, tiny_tokenizer, teacher=teacher)

    return build


def log_of(trainer):
    return read_log(os.path.join(trainer.args.output_dir, LOG_NAME))


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def expected(student, teacher, tokenizer, rows, *, temperature=1.0, sequences=False):
    """The mean JSD by torch, one row at a time without padding."""
    found = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            both = [(m.eval()(ids).logits[0, len(prompt) - 1 : -1] / temperature) for m in (student, teacher)]
        found.append(reference.jsd(0.5)(*(x.double().log_softmax(-1) for x in both)))
    return float(torch.stack([x.mean() for x in found]).mean() if sequences else torch.cat(found).mean())


@pytest.mark.parametrize("fused_head", [True, False])
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"normalization": "sequence"}], ids=str)
def test_loss_is_the_formulas_whatever_the_batching(make, tiny_model, teacher, tiny_tokenizer, options, fused_head):
    want = expected(
        *(tiny_model(), teacher, tiny_tokenizer, ROWS),
        temperature=options.get("temperature", 1.0),
        sequences="normalization" in options,
    )
    after = []
    for size, steps in ((6, 1), (2, 3)):
        trainer = make(
            per_device_train_batch_size=size, gradient_accumulation_steps=steps, fused_head=fused_head, **options
        )
        trainer.train()
        line = log_of(trainer)[0]
        assert set(line) >= LINE
        assert line["loss"] == pytest.approx(want, rel=1e-4)
        assert line["on_policy"] == 0.0
        after.append(weights(trainer))
    torch.testing.assert_close(after[0], after[1], rtol=1e-4, atol=1e-6)


def test_the_student_learns_the_teacher(make):
    trainer = make(ROWS, ROWS, optim="adamw_torch", learning_rate=0.01, max_steps=60, divergence="forward_kl")
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before / 3
    assert after["eval_loss"] == pytest.approx(after["eval_divergence"], rel=1e-5)


def test_on_policy_trains_on_what_the_student_writes(make):
    """The prompts stay; the completions are the student's own draws, of every update, or by lmbda of a share."""
    trainer = make(lmbda=1.0, max_steps=4, per_device_train_batch_size=3)
    seen = []
    inner = trainer.update_batches

    def noting(batches):
        found = inner(batches)
        seen.append((batches, found))
        return found

    trainer.update_batches = noting
    trainer.train()
    assert [line["on_policy"] for line in log_of(trainer) if "loss" in line] == [1.0] * 4
    for (given,), (written,) in seen:
        first = int((given["labels"][0] != -100).int().argmax()) + 1
        assert torch.equal(given["input_ids"][:, :first], written["input_ids"][:, :first])
        assert ((written["labels"] != -100).sum(-1) <= 5).all()
        assert ((written["labels"] != -100).sum(-1) >= 1).all()
        assert given["labels"].shape != written["labels"].shape or not torch.equal(given["labels"], written["labels"])
    some = make(lmbda=0.5, max_steps=24, name="half")
    some.train()
    shares = [line["on_policy"] for line in log_of(some) if "loss" in line]
    assert set(shares) == {0.0, 1.0}


def test_seq_kd_trains_on_what_the_teacher_writes(make, teacher):
    """A teacher that is sure writes one completion, whatever the data says."""
    with torch.no_grad():
        teacher.get_output_embeddings().weight.mul_(200)
    seen = []
    trainer = make(seq_kd=True, max_steps=2, name="theirs")
    inner = trainer.update_batches
    trainer.update_batches = lambda batches: seen.append(inner(batches)) or seen[-1]
    trainer.train()
    written = {tuple(row[row != -100].tolist()) for (batch,) in seen for row in batch["labels"]}
    assert len(written) == 1
    assert [line["on_policy"] for line in log_of(trainer) if "loss" in line] == [0.0, 0.0]


@pytest.mark.parametrize("options", [{"lmbda": 0.0}, {"lmbda": 0.5}, {"lmbda": 0.5, "seq_kd": True}], ids=str)
def test_a_resumed_run_equals_an_uninterrupted_one(make, options):
    shared = {"per_device_train_batch_size": 2, "optim": "adamw_torch", "learning_rate": 0.01, **options}
    whole = make(max_steps=6, name="whole", **shared)
    whole.train()
    cut = make(max_steps=3, name="cut", save_strategy="steps", save_steps=3, **shared)
    cut.train()
    resumed = make(max_steps=6, name="cut", resume_from_checkpoint="auto", **shared)
    resumed.train(resume_from_checkpoint=run.start_point(resumed.args))
    assert torch.equal(weights(resumed), weights(whole))
    lines = [
        [(line["step"], line["loss"], line["on_policy"]) for line in log_of(t) if "loss" in line]
        for t in (whole, resumed)
    ]
    assert lines[0] == lines[1]


def test_the_command(tiny_model, tiny_tokenizer, teacher, tmp_path, capsys):
    """From folders to a model that loads, with the keys of TRL."""
    from transformers import AutoModelForCausalLM

    for name, model in (("student", tiny_model()), ("teacher", teacher)):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "the movie", "completion": " is good"}\n' * 4)
    argv = ["distill", "--model", str(tmp_path / "student"), "--dataset", str(data), "--eval_dataset", str(data)]
    argv += ["--teacher_model_name_or_path", str(tmp_path / "teacher"), "--output_dir", str(tmp_path / "out")]
    argv += ["--max_steps", "2", "--max_new_tokens", "4", "--lmbda", "0.5", "--beta", "0.1", "--use_cpu", "true"]
    assert main(argv) == 0, capsys.readouterr().err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.hidden_size == 16
    metrics = (tmp_path / "out" / "metrics.json").read_text()
    assert "eval_divergence" in metrics
    assert all(math.isfinite(line["loss"]) for line in read_log(str(tmp_path / "out" / LOG_NAME)) if "loss" in line)


def test_what_is_refused(make, tiny_model, tiny_tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"lmbda must be in \[0, 1\]; got 1.5"):
        make(lmbda=1.5)
    with pytest.raises(ValueError, match="seq_kd must be false with lmbda=1"):
        make(lmbda=1.0, seq_kd=True)
    with pytest.raises(ValueError, match="divergence must be one of"):
        make(divergence="tv")
    with pytest.raises(ValueError, match="normalization must be one of"):
        make(normalization="dapo")
    args = DistillConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="teacher_model must be a model's folder, or teacher a model; got neither"):
        DistillTrainer(tiny_model(), args, ROWS, None, tiny_tokenizer)
    other = small_model(len(tiny_tokenizer) + 8, hidden_size=16, layers=1, seed=0)
    with pytest.raises(ValueError, match=r"teacher_model must have the student's vocabulary, of \d+ tokens"):
        DistillTrainer(tiny_model(), args, ROWS, None, tiny_tokenizer, teacher=other)
