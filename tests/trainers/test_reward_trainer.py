"""Reward models: the losses on the right scores, read at the last real token by anyone, and who agrees with them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")

from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from fastalign.losses import kwise_reward_loss, reward_loss
from fastalign.trainers.common.callbacks import LOG_NAME, read_log
from fastalign.trainers.reward import RewardConfig, RewardTrainer, load_reward_model, split_labelers

GOOD, BAD = ["good", "great", "fun"], ["bad", "dull", "awful"]


def review(words: list[str], i: int) -> str:
    return f" is {words[i % 3]} and {words[(i // 3) % 3]}" + " , the film" * (i % 4)


PAIRS = [{"prompt": "the movie", "chosen": review(GOOD, i), "rejected": review(BAD, 2 * i + 1)} for i in range(12)]
LISTS = [
    {"prompt": "the movie", "completions": [review(BAD, i), review(GOOD, i), " is long"][: 2 + i % 2]} for i in range(8)
]
for row, rewards in zip(LISTS, [[-2.0, 1.5, 0.0], [-1.0, 3.0, -1.0]] * 4, strict=True):
    row["rewards"] = rewards[: len(row["completions"])]


@pytest.fixture
def base(tiny_model, tiny_tokenizer, tmp_path):
    """Folder of a language model whose padding and end-of-sequence tokens are one."""
    assert tiny_tokenizer.pad_token_id == tiny_tokenizer.eos_token_id
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def make(base, tmp_path):
    """A trainer, made anew from the same base; options change its configuration."""

    def build(rows, eval_rows=None, **options):
        shared = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
        shared |= {"logging_steps": 1, "learning_rate": 0.01, "lr_scheduler_type": "constant", "max_steps": 1}
        args = RewardConfig(**{**shared, "train_sampling_strategy": "sequential", **options})
        set_seed(0)
        model, tokenizer = load_reward_model(base, args)
        return RewardTrainer(model, args, rows, eval_rows, tokenizer)

    return build


def score(model, tokenizer, texts: list[str]) -> torch.Tensor:
    """One at a time, by plain transformers, without any padding."""
    model.eval()
    with torch.no_grad():
        ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
        return torch.cat([model(torch.tensor([row])).logits[0] for row in ids])


def first_log(trainer) -> dict:
    return read_log(os.path.join(trainer.args.output_dir, LOG_NAME))[0]


def test_pairs_give_the_bradley_terry_loss_of_the_last_tokens_scores(make):
    trainer = make(PAIRS, per_device_train_batch_size=12)
    tokenizer = trainer.processing_class
    chosen, rejected = (
        score(trainer.model, tokenizer, [r["prompt"] + r[side] for r in PAIRS]) for side in ("chosen", "rejected")
    )
    trainer.model.train()
    trainer.train()
    line = first_log(trainer)
    expected = reward_loss(chosen, rejected)
    assert line["loss"] == pytest.approx(float(expected.loss), rel=1e-4)
    assert line["accuracy"] == pytest.approx(float(expected.accuracy))
    assert line["margin"] == pytest.approx(float(expected.margin), rel=1e-3, abs=1e-6)
    assert line["mean_reward"] == pytest.approx(float(expected.mean_reward), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("center", [0.0, 0.5])
def test_margin_and_centring(make, center):
    rows = [{**row, "margin": 0.25 * i} for i, row in enumerate(PAIRS)]
    trainer = make(rows, per_device_train_batch_size=12, center_rewards_coefficient=center)
    sides = [
        score(trainer.model, trainer.processing_class, [r["prompt"] + r[s] for r in rows])
        for s in ("chosen", "rejected")
    ]
    trainer.model.train()
    trainer.train()
    expected = reward_loss(*sides, margin=torch.tensor([r["margin"] for r in rows]), center_coefficient=center)
    assert first_log(trainer)["loss"] == pytest.approx(float(expected.loss), rel=1e-4)


@pytest.mark.parametrize("center", [0.0, 0.5])
def test_ragged_lists_give_the_kwise_loss(make, center):
    trainer = make(LISTS, per_device_train_batch_size=8, center_rewards_coefficient=center)
    scores, ranks = torch.zeros(8, 3), torch.zeros(8, 3)
    mask = torch.zeros(8, 3, dtype=torch.bool)
    for i, row in enumerate(LISTS):
        k = len(row["completions"])
        scores[i, :k] = score(trainer.model, trainer.processing_class, [row["prompt"] + c for c in row["completions"]])
        ranks[i, :k], mask[i, :k] = -torch.tensor(row["rewards"]), True
    trainer.model.train()
    trainer.train()
    expected = kwise_reward_loss(scores, ranks=ranks, mask=mask, center_coefficient=center)
    line = first_log(trainer)
    assert line["loss"] == pytest.approx(float(expected.loss), rel=1e-4)
    assert line["accuracy"] == pytest.approx(float(expected.accuracy))


@pytest.mark.parametrize("loss_type", ["pairwise", "plackett_luce", "best_of_k"])
def test_micro_batches_of_ragged_lists_equal_one_batch(make, loss_type):
    results = []
    for size, steps in ((8, 1), (3, 3)):
        trainer = make(
            LISTS, per_device_train_batch_size=size, gradient_accumulation_steps=steps, optim="sgd", loss_type=loss_type
        )
        trainer.train()
        results.append((torch.cat([p.detach().flatten() for p in trainer.model.parameters()]), first_log(trainer)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-6)
    for name in ("loss", "accuracy", "margin", "mean_reward"):
        assert results[1][1][name] == pytest.approx(results[0][1][name], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_saved_model_scores_alike_in_any_batch(make, side):
    """Learned to tell good from bad; loaded by plain transformers; alone, in a batch, padded on either side."""
    trainer = make(PAIRS, max_steps=40, per_device_train_batch_size=6, padding_side=side)
    trainer.train()
    trainer.save_whole()
    out = trainer.args.output_dir
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.num_labels == 1
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    texts = [r["prompt"] + r[s] for r in PAIRS for s in ("chosen", "rejected")]
    alone = score(model, tokenizer, texts)
    assert (alone[0::2] > alone[1::2]).all()
    torch.testing.assert_close(alone, score(trainer.model, tokenizer, texts))
    padded = tokenizer([t + tokenizer.eos_token for t in texts], padding=True, padding_side=side, return_tensors="pt")
    mask = padded["attention_mask"]
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        batched = model(padded["input_ids"], attention_mask=mask, position_ids=positions).logits[:, 0]
    torch.testing.assert_close(batched, alone, rtol=1e-4, atol=1e-5)


def test_evaluation_is_exact_whatever_the_batches(make):
    metrics = [make(None, LISTS, per_device_eval_batch_size=size).evaluate() for size in (3, 8)]
    for name in ("eval_loss", "eval_accuracy", "eval_margin", "eval_mean_reward"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-4, abs=1e-6)


def test_labelers_are_told_apart_and_held_out(make):
    """Labeler "contrary" judges the other way round: a model that learned from the rest disagrees with them."""
    names = ["anna", "ben", "contrary"]
    rows = [{**row, "labeler": names[i % 3]} for i, row in enumerate(PAIRS * 2)]
    for row in rows:
        if row["labeler"] == "contrary":
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    agreeing = [row for row in rows if row["labeler"] != "contrary"]
    trainer = make(agreeing, rows, max_steps=40, per_device_train_batch_size=8)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy/known_labelers"] == 1.0
    assert metrics["eval_accuracy/new_labelers"] == 0.0
    table = json.loads((Path(trainer.args.output_dir) / "labelers.json").read_text())
    assert {name: entry["accuracy"] for name, entry in table.items()} == {"anna": 1.0, "ben": 1.0, "contrary": 0.0}
    assert [table[name]["known"] for name in names] == [True, True, False]
    assert table["anna"]["pairs"] == 8


def test_held_out_labelers_are_evaluated_and_not_trained_on(make):
    rows = [{**row, "labeler": i % 4} for i, row in enumerate(PAIRS)]
    trainer = make(rows, held_out_labelers=0.25)
    assert len(trainer.train_dataset) == 9
    assert len(trainer.eval_dataset) == 3
    assert set(trainer.train_dataset["labeler"]) == {0, 1, 2}
    assert set(trainer.eval_dataset["labeler"]) == {3}
    assert trainer.evaluate()["eval_accuracy/known_labelers"] == 0.0  # there is none: 0 of 0
    again = make(rows, held_out_labelers=0.25)
    assert again.eval_dataset["completions_ids"] == trainer.eval_dataset["completions_ids"]
    with pytest.raises(ValueError, match="leaves nobody"):
        split_labelers(trainer.train_dataset, 0.01, 0)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{**r, "margin": 1.0} for r in PAIRS], {"loss_type": "best_of_k"}, "needs loss_type pairwise"),
        ([{"prompt": "a", "completions": ["b"]}], {}, "lists of two completions or more"),
        ([{"prompt": "a", "completions": ["b", "c"], "margin": 1.0}], {}, "must hold pairs"),
        ([{"prompt": "a", "chosen": "b", "rejected": "<|padding|>"}], {"append_eos": False}, "padding token.*row 0"),
        (PAIRS, {"held_out_labelers": 0.5}, "needs the column labeler"),
        (PAIRS, {"loss_type": "listwise"}, "loss_type must be one of"),
        (PAIRS, {"loss_type": "best_of_k", "center_rewards_coefficient": 0.1}, "term of loss_type pairwise"),
        (PAIRS, {"center_rewards_coefficient": -1.0}, "must be at least 0"),
        (PAIRS, {"held_out_labelers": 1.0}, "below 1"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(make, rows, options, message):
    with pytest.raises(ValueError, match=message):
        make(rows, **options)


def test_a_language_model_is_refused(tiny_model, tiny_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="sequence-classification model with one label"):
        RewardTrainer(tiny_model(), RewardConfig(output_dir=str(tmp_path)), PAIRS, processing_class=tiny_tokenizer)


def test_same_seed_same_model(make):
    runs = []
    for _ in range(2):
        trainer = make(PAIRS, max_steps=5, train_sampling_strategy="random")
        trainer.train()
        runs.append(trainer.model.score.weight.detach().clone())
    assert torch.equal(*runs)
    assert math.isfinite(float(runs[0].sum()))
