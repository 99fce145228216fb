"""KTO: TRL's loss, baseline and pairing; rows made of pairs; any batching, resumed runs, and a policy that learns."""

from __future__ import annotations

import json
import os

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")

from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

from fastalign.cli import commands as cli
from fastalign.doctor.command import DoctorConfig, examine
from fastalign.losses import kto_loss
from fastalign.trainers.common import run
from fastalign.trainers.common.callbacks import LOG_NAME, read_log
from fastalign.trainers.kto import KTOConfig, KTOTrainer, mismatched

PROMPTS = ["the movie", "a film", "the plot", "a story"]
GOOD, BAD = [" is good", " is great and fun", " is fun"], [" is bad", " is dull , awful and long"]
ROWS = [
    {"prompt": PROMPTS[i % 4], "completion": BAD[i % 2] if i % 3 == 0 else GOOD[i % 3], "label": i % 3 != 0}
    for i in range(9)
]
PAIRS = [{"prompt": p, "chosen": GOOD[i % 3], "rejected": BAD[i % 2]} for i, p in enumerate(PROMPTS)]


@pytest.fixture
def make(tiny_model, tiny_tokenizer, tmp_path):
    def build(rows=ROWS, eval_rows=None, callbacks=(), model=None, **options):
        shared = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
        shared |= {"logging_steps": 1, "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_steps": 3}
        shared |= {"optim": "sgd", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential"}
        shared |= {"per_device_train_batch_size": 3, "report_to": "none"}
        args = KTOConfig(**{**shared, **options})
        model = model or tiny_model()
        return KTOTrainer(model, args, rows, eval_rows, tiny_tokenizer, callbacks=list(callbacks))

    return build


def lines_of(trainer, name="loss"):
    return [line for line in read_log(os.path.join(trainer.args.output_dir, LOG_NAME)) if name in line]


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def sums(model, tokenizer, texts):
    """Log-probabilities of completions, one at a time without padding."""
    found = []
    for prompt, completion in texts:
        start = len(tokenizer(prompt)["input_ids"])
        ids = tokenizer(prompt + completion)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        found.append(logps.gather(1, torch.tensor(ids[1:])[:, None])[start - 1 :].sum())
    return torch.stack(found)


@pytest.mark.parametrize("options", [{}, {"desirable_weight": 1.5, "undesirable_weight": 0.5, "beta": 0.4}], ids=str)
@pytest.mark.parametrize("precompute", [True, False])
def test_loss_is_the_papers_with_completions_of_the_rows_before(make, tiny_model, tiny_tokenizer, options, precompute):
    """Every micro-batch by itself, against its own rows rotated by one: away from the reference, so that z_0 > 0."""
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    trainer = make(model=model, precompute_ref_log_probs=precompute, learning_rate=0.0, **options)
    trainer.ref_model = None
    reference = tiny_model()
    own = make(model=tiny_model(), **options)  # whose reference is the unchanged model
    if precompute:
        trainer.train_dataset = own.train_dataset
    else:
        trainer.ref_model = reference
    trainer.train()
    baselines = []
    for step, line in enumerate(lines_of(trainer)):
        rows = ROWS[3 * step : 3 * step + 3]
        texts = [(r["prompt"], r["completion"]) for r in rows]
        others = [(r["prompt"], rows[i - 1]["completion"]) for i, r in enumerate(rows)]
        both = [[sums(m, tiny_tokenizer, t) for m in (model, reference)] for t in (texts, others)]
        labels = torch.tensor([r["label"] for r in rows])
        kl = {"kl_logps": both[1][0], "ref_kl_logps": both[1][1]}
        want = kto_loss(both[0][0], labels, both[0][1], **{"beta": 0.1, **options}, **kl)
        assert line["loss"] == pytest.approx(float(want.loss), rel=1e-5)
        assert line["kl"] == pytest.approx(float(want.kl), rel=1e-3, abs=1e-5)
        for name in ("chosen", "rejected"):
            assert line[f"rewards/{name}"] == pytest.approx(float(getattr(want, f"{name}_rewards")), abs=1e-5)
        assert line["rewards/margins"] == pytest.approx(float(want.margins), abs=2e-5)
        assert line["logps/chosen"] == pytest.approx(float(want.logps[labels].mean()), rel=1e-5)
        assert line["desirable"] == pytest.approx(2 / 3)
        baselines.append(float(want.kl))
    assert len(baselines) == 3
    assert max(baselines) > 0.05


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_a_run_is_trls(make, tiny_model, tiny_tokenizer, tmp_path, loss_type):
    """Six updates at a rate that moves the policy, with uneven weights: the same losses and baselines all along."""
    trl = pytest.importorskip("trl", reason="needs TRL (the extra `dev`)")
    rows = (ROWS * 2)[:12]
    shared = {"loss_type": loss_type, "desirable_weight": 1.3, "max_steps": 6, "learning_rate": 0.5, "beta": 0.3}
    ours = make(rows=rows, **shared)
    ours.train()
    options = {"output_dir": str(tmp_path / "theirs"), "use_cpu": True, "save_strategy": "no", "report_to": "none"}
    options |= {"logging_steps": 1, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0}
    options |= {"per_device_train_batch_size": 3, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}
    args = trl.KTOConfig(**options, **shared, max_length=1024, train_sampling_strategy="sequential")
    given = {"args": args, "train_dataset": Dataset.from_list(rows), "processing_class": tiny_tokenizer}
    theirs = trl.KTOTrainer(model=tiny_model(), ref_model=tiny_model(), **given)
    mine = ours.train_dataset
    for name in ("prompt_ids", "completion_ids"):
        assert mine[name] == theirs.train_dataset[name]
    if loss_type == "kto":
        assert mine["kl_ids"] == theirs.train_dataset["KL_completion_ids"]
    theirs.train()
    for line, other in zip(lines_of(ours), [x for x in theirs.state.log_history if "kl" in x], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=2e-4, abs=1e-5)
        assert line["kl"] == pytest.approx(other["kl"], rel=2e-3, abs=1e-4)
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
            assert line[name] == pytest.approx(other[name], rel=2e-3, abs=1e-3)
    assert abs(lines_of(ours)[-1]["rewards/margins"]) > 0.01


class TestData:
    def test_both_sides_of_pairs_become_rows(self, make, tiny_tokenizer):
        trainer = make(rows=PAIRS)
        rows = trainer.train_dataset
        assert rows["label"] == [True, False] * 4
        texts = [tiny_tokenizer.decode(ids[:-1]) for ids in rows["completion_ids"]]
        assert texts == [row[side] for row in PAIRS for side in ("chosen", "rejected")]
        labelled = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in PAIRS
            for side in ("chosen", "rejected")
        ]
        assert rows["completion_ids"] == make(rows=labelled).train_dataset["completion_ids"]

    def test_the_other_completion_is_of_another_prompt(self, make):
        """Sides of one pair stand next to each other: neither is the other's mismatched completion."""
        rows = make(rows=PAIRS, per_device_train_batch_size=4).train_dataset
        prompts, ids = rows["prompt_ids"], rows["completion_ids"]
        for i, found in enumerate(rows["kl_ids"]):
            block = range(i // 4 * 4, i // 4 * 4 + 4)
            assert found in [ids[j] for j in block if prompts[j] != prompts[i]]

    def test_a_last_block_of_one_row_takes_the_row_before(self, make):
        rows = make(rows=ROWS[:7]).train_dataset
        assert rows["kl_ids"][6] == rows["completion_ids"][5]
        assert rows["kl_ids"][0] == rows["completion_ids"][2]

    def test_what_does_not_fit_is_cut(self, make):
        long = [{"prompt": "the movie is long and the plot", "completion": " bad", "label": False}]
        trainer = make(rows=[*long, {"prompt": "a", "completion": " good" * 5, "label": True}], max_length=14)
        rows = trainer.train_dataset
        assert len(rows["prompt_ids"][0]) + len(rows["kl_ids"][0]) == 14
        assert rows["kl_ids"][0] == rows["completion_ids"][1][: len(rows["kl_ids"][0])]
        assert rows["longest"][0] == 14

    def test_padding_on_the_left_changes_nothing(self, make):
        lines = []
        for side in ("right", "left"):
            trainer = make(padding_side=side)
            trainer.train()
            lines.append([(line["loss"], line["kl"]) for line in lines_of(trainer)])
        assert lines[0] == lines[1]

    def test_conversations(self, make, tiny_tokenizer):
        messages = [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["completion"]}],
                "label": row["label"],
            }
            for row in ROWS
        ]
        template = (
            "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
        )
        tiny_tokenizer.chat_template = template
        try:
            rows = make(rows=messages).train_dataset
        finally:
            tiny_tokenizer.chat_template = None
        plain = make().train_dataset
        assert rows["completion_ids"] == plain["completion_ids"]

    @pytest.mark.parametrize(
        ("rows", "options", "message"),
        [
            ([{"prompt": "a", "completion": " b", "label": "maybe"}] * 2, {}, "column 'label' must hold true or false"),
            ([{"prompt": "a", "completion": " b"}] * 2, {}, "needs the columns prompt, completion and label, or pairs"),
            (ROWS[:1], {}, "must have two rows or more"),
            (ROWS, {"per_device_train_batch_size": 1}, "per_device_train_batch_size must be at least 2"),
            (ROWS, {"loss_type": "bco"}, "loss_type must be one of kto, apo_zero_unpaired"),
            (ROWS, {"desirable_weight": -1.0}, r"desirable_weight must be in \[0"),
            (ROWS, {"beta": 0.0}, r"beta must be in \(0"),
        ],
    )
    def test_refusals(self, make, rows, options, message):
        with pytest.raises(ValueError, match=message):
            make(rows=rows, **options)

    def test_labels_may_be_numbers_or_texts(self, make):
        found = [make(rows=[{**r, "label": as_is(r["label"])} for r in ROWS]) for as_is in (bool, int, str)]
        assert found[0].train_dataset["label"] == found[1].train_dataset["label"] == found[2].train_dataset["label"]


def test_accumulated_batches_are_means_over_rows(make):
    """Without a baseline the loss does not couple rows: nine at once, or in threes."""
    results = []
    for size, steps in ((9, 1), (3, 3)):
        trainer = make(
            loss_type="apo_zero_unpaired",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=2,
        )
        trainer.train()
        results.append((weights(trainer), [line["rewards/margins"] for line in lines_of(trainer)]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-5)


def test_evaluation_tells_the_same_figures(make):
    trainer = make(eval_rows=ROWS, per_device_eval_batch_size=9, learning_rate=0.5)
    before = trainer.evaluate()
    assert before["eval_kl"] == pytest.approx(0, abs=1e-5)
    assert before["eval_loss"] == pytest.approx(0.5, abs=1e-5)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_rewards/margins"] == pytest.approx(
        after["eval_rewards/chosen"] - after["eval_rewards/rejected"], abs=1e-6
    )
    assert after["eval_rewards/margins"] > 0
    assert after["eval_desirable"] == pytest.approx(6 / 9)


class _StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5},
        {"loss_type": "apo_zero_unpaired"},
    ],
    ids=str,
)
def test_resumed_run_equals_uninterrupted_one(make, tmp_path, extra):
    shared = {"max_steps": 7, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2}
    shared |= {"train_sampling_strategy": "group_by_length", **extra}
    whole = make(**shared, output_dir=str(tmp_path / "whole"))
    whole.train()
    make(**shared, output_dir=str(tmp_path / "cut"), callbacks=[_StopAt(5)]).train()
    resumed = make(**shared, output_dir=str(tmp_path / "cut"), resume_from_checkpoint="auto")
    resumed.train(resume_from_checkpoint=run.start_point(resumed.args))
    assert torch.equal(weights(resumed), weights(whole))
    kept = [[(x["step"], x["loss"], x.get("kl")) for x in lines_of(t)] for t in (whole, resumed)]
    assert kept[0] == kept[1]
    assert [step for step, *_ in kept[0]] == list(range(1, 8))


def test_adapters_are_their_own_reference(make):
    pytest.importorskip("peft", reason="needs peft (the extra `train`)")
    logs = []
    for precompute in (True, False):
        trainer = make(lora_rank=4, precompute_ref_log_probs=precompute, learning_rate=1.0, max_steps=4)
        assert trainer.ref_model is None
        trainer.train()
        logs.append([line["loss"] for line in lines_of(trainer)])
    assert logs[0][0] == pytest.approx(0.5, abs=1e-6)
    assert logs[0] == pytest.approx(logs[1], abs=1e-5)


def test_the_mismatched_batch_is_the_prompts_with_the_other_completions(make):
    trainer = make()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    other = mismatched(batch)
    assert set(other) == {"input_ids", "attention_mask", "position_ids", "labels"}
    for row in range(3):
        ids = [x for x in other["labels"][row].tolist() if x != -100]
        assert ids == trainer.train_dataset[(row - 1) % 3]["completion_ids"]


def test_the_command_trains_on_pairs_and_saves_a_model_that_loads(tiny_model, tiny_tokenizer, tmp_path, capsys):
    base, data, out = (tmp_path / name for name in ("base", "pairs.jsonl", "out"))
    tiny_model().save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    argv = ["kto", "--model", str(base), "--dataset", str(data), "--eval_dataset", str(data), "--output_dir", str(out)]
    assert cli.main([*argv, "--use_cpu", "--learning_rate", "1e-2", "--num_train_epochs", "2", "--beta", "0.2"]) == 0
    assert "of 4 pairs both sides are rows of their own" in capsys.readouterr().err
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"eval_loss", "eval_kl", "eval_rewards/margins"} <= set(metrics)
    AutoModelForCausalLM.from_pretrained(out)


class TestDoctor:
    def look(self, tiny_model, tiny_tokenizer, tmp_path, rows):
        tiny_model().save_pretrained(tmp_path / "base")
        tiny_tokenizer.save_pretrained(tmp_path / "base")
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = examine(DoctorConfig(model=str(tmp_path / "base"), dataset=str(path)))
        return [f for f in found if f.check == "labels"]

    def test_balance_of_the_classes(self, tiny_model, tiny_tokenizer, tmp_path):
        (finding,) = self.look(tiny_model, tiny_tokenizer, tmp_path, ROWS)
        assert finding.level == "warning"
        assert "6 of 9 rows are desirable" in finding.text
        assert "undesirable_weight from 1.33 to 2" in finding.text
        (fine,) = self.look(tiny_model, tiny_tokenizer, tmp_path, ROWS[:6] + ROWS[:1])
        assert fine.level == "ok"

    def test_labels_that_are_none_and_a_class_that_is_missing(self, tiny_model, tiny_tokenizer, tmp_path):
        bad = [*ROWS, {"prompt": "a", "completion": " b", "label": None}]
        assert "row 9 (from 0)" in self.look(tiny_model, tiny_tokenizer, tmp_path, bad)[0].text
        (one,) = self.look(tiny_model, tiny_tokenizer, tmp_path, [r for r in ROWS if r["label"]])
        assert one.level == "error"
        assert "every label is true" in one.text
