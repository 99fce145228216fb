"""PRO: the paper's loss on ragged ranked lists, whatever the batching, and a policy that learns the ranking."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")

from fastalign.losses import pro_loss
from fastalign.trainers.common.callbacks import LOG_NAME, read_log
from fastalign.trainers.pro import PROConfig, PROTrainer

ENDINGS = [" is good and fun", " is great", " is long", " is a dull film", " is awful , awful and bad"]
LISTS = [{"prompt": "the movie", "completions": ENDINGS[i % 3 : i % 3 + 1 + (i * 2) % 4]} for i in range(9)]
REWARDED = [
    {**row, "completions": row["completions"][::-1], "rewards": [0.5 * k for k in range(len(row["completions"]))]}
    for row in LISTS
]


@pytest.fixture
def make(tiny_model, tiny_tokenizer, tmp_path):
    def build(rows, eval_rows=None, **options):
        shared = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
        shared |= {"logging_steps": 1, "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_steps": 1}
        shared |= {"optim": "sgd", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential"}
        args = PROConfig(**{**shared, **options})
        return PROTrainer(tiny_model(), args, rows, eval_rows, tiny_tokenizer)

    return build


def expected(model, tokenizer, rows, *, average=True, rewards=False, **options):
    """PROOutput by torch, one completion at a time without padding."""
    width = max(len(row["completions"]) for row in rows)
    sums, counts = torch.zeros(len(rows), width), torch.ones(len(rows), width)
    mask, gold = torch.zeros(len(rows), width, dtype=torch.bool), torch.zeros(len(rows), width)
    for i, row in enumerate(rows):
        prompt = tokenizer(row["prompt"])["input_ids"]
        for k, text in enumerate(row["completions"]):
            ids = tokenizer(row["prompt"] + text)["input_ids"] + [tokenizer.eos_token_id]
            with torch.no_grad():
                logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            targets = torch.tensor(ids[1:])
            sums[i, k] = logps.gather(1, targets[:, None])[len(prompt) - 1 :].sum()
            counts[i, k], mask[i, k] = len(ids) - len(prompt), True
            gold[i, k] = row["rewards"][k] if rewards else 0.0
    scores = sums / counts if average else sums
    return pro_loss(scores, mask=mask, rewards=gold if rewards else None, sft_logps=sums, **options)


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (LISTS, {}),
        (LISTS, {"form": "infonce"}),
        (LISTS, {"average": False, "sft_weight": 0.0}),
        (REWARDED, {"rewards": True}),
    ],
)
def test_loss_is_the_papers_on_ragged_lists(make, tiny_model, tiny_tokenizer, rows, options):
    options = {"sft_weight": 0.05, **options}
    out = expected(tiny_model(), tiny_tokenizer, rows, **options)
    trainer = make(rows, per_device_train_batch_size=9, **{k: v for k, v in options.items() if k != "rewards"})
    trainer.train()
    line = read_log(os.path.join(trainer.args.output_dir, LOG_NAME))[0]
    assert line["loss"] == pytest.approx(float(out.loss), rel=1e-4)
    assert line["loss/list"] == pytest.approx(float(out.list_loss), rel=1e-4)
    assert line["loss/sft"] == pytest.approx(float(out.sft_loss), rel=1e-4)
    assert line["accuracy"] == pytest.approx(float(out.accuracy))
    assert line["top1_accuracy"] == pytest.approx(float(out.top1_accuracy))
    assert line["margin"] == pytest.approx(float(out.margin), rel=1e-3, abs=1e-5)


def test_order_comes_from_ranks_rewards_or_positions_alike(make):
    ranked = [{**row, "completions": row["completions"][::-1]} for row in LISTS]
    for row in ranked:
        row["ranks"] = list(range(len(row["completions"])))[::-1]
    losses = []
    for rows, options in ((LISTS, {}), (ranked, {}), (REWARDED, {"reward_temperatures": False})):
        losses.append(make(None, rows, **options).evaluate()["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
    tempered = make(None, REWARDED).evaluate()["eval_loss"]
    assert abs(tempered - losses[0]) > 1e-3


def test_equal_ranks_are_not_compared(make):
    rows = [{"prompt": "the movie", "completions": ENDINGS[:3], "ranks": [0, 1, 1]}]
    tied = make(None, rows, sft_weight=0.0).evaluate()["eval_loss"]
    straight = make(None, [{**rows[0], "ranks": [0, 1, 2]}], sft_weight=0.0).evaluate()["eval_loss"]
    assert tied < straight


@pytest.mark.parametrize("rows", [LISTS, REWARDED])
def test_micro_batches_of_ragged_lists_equal_one_batch(make, rows):
    results = []
    for size, steps in ((9, 1), (2, 5)):
        trainer = make(rows, per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=2)
        trainer.train()
        lines = read_log(os.path.join(trainer.args.output_dir, LOG_NAME))
        results.append((torch.cat([p.detach().flatten() for p in trainer.model.parameters()]), lines[1]))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-6)
    for name in ("loss", "accuracy", "margin", "logps/best"):
        assert results[1][1][name] == pytest.approx(results[0][1][name], rel=1e-4, abs=1e-6)


def test_policy_learns_the_ranking_and_pairs_are_lists_of_two(make):
    trainer = make(LISTS, LISTS, optim="adamw_torch", learning_rate=0.01, max_steps=40)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_accuracy"] > max(0.9, before["eval_accuracy"])
    assert after["eval_logps/best"] > before["eval_logps/best"]
    pairs = [{"prompt": "the movie", "chosen": ENDINGS[0], "rejected": ENDINGS[3]}]
    lists = [{"prompt": "the movie", "completions": [ENDINGS[0], ENDINGS[3]]}]
    assert make(None, pairs).evaluate()["eval_loss"] == make(None, lists).evaluate()["eval_loss"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"completions": []}, "row 0 .*at least one completion"),
        ({"completions": ["a", " "]}, r"number 1 .*must not be empty; it is in row 0"),
        ({"completions": ["a", "b"], "rewards": [1.0]}, "row 0 .*one number for each of the 2"),
        ({"completions": ["a", "b"], "rewards": [1.0, float("nan")]}, "row 0 .*one number for each"),
        ({"completions": ["a", "b"], "rewards": [1.0, 2.0], "ranks": [0, 1]}, "has both"),
        ({"answers": ["a"]}, "dataset needs the columns"),
    ],
)
def test_bad_lists_are_refused_with_their_row(make, columns, message):
    with pytest.raises(ValueError, match=message):
        make([{"prompt": "x", **columns}])


@pytest.mark.parametrize(
    ("options", "message"), [({"form": "pl"}, "form must be"), ({"sft_weight": -1.0}, "sft_weight")]
)
def test_bad_configuration_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        PROConfig(output_dir=str(tmp_path), **options)


def test_loss_takes_ranks_or_rewards():
    scores = torch.tensor([[0.1, 0.4, -0.2]])
    ranks = torch.tensor([[2, 0, 1]])
    sorted_loss = pro_loss(scores[:, [1, 2, 0]], sft_weight=0.1)
    assert pro_loss(scores, ranks=ranks, sft_weight=0.1).loss == pytest.approx(float(sorted_loss.loss))
    with pytest.raises(ValueError, match="ranks must be None"):
        pro_loss(scores, ranks=ranks, rewards=scores)
