"""TPO: TRL's losses and runs, single sums, and what is refused; its cases hold values and gradients to the formulas."""

from __future__ import annotations

import json
import os

import pytest
import torch

from fastalign import Head
from fastalign.losses import TPOLoss, dpo_loss, tpo_loss
from fastalign.losses.triple import TRIPLES

G = torch.Generator().manual_seed(0)
W, L, GOLD = (-20 * torch.rand(5, generator=G, dtype=torch.float64) for _ in range(3))
SIZES = {f"{side}_lengths": torch.randint(2, 9, (5,), generator=G) for side in ("chosen", "rejected")}
TOKENS = torch.randint(2, 9, (5,), generator=G)


@pytest.mark.parametrize("loss_type", TRIPLES)
def test_it_is_a_loss_of_pairs_and_the_gold_tokens_nll(loss_type):
    out = tpo_loss(W, L, GOLD, TOKENS, **SIZES, loss_type=loss_type, beta=0.2, tpo_alpha=0.5, tpo_l_gamma=0.3)
    margin = {"simpo_gamma": 0.3} if loss_type == "tpo-l" else {}
    pairs = dpo_loss(W, L, **SIZES, loss_type=TRIPLES[loss_type], beta=0.2, **margin)
    nll = -GOLD.sum() / TOKENS.sum()
    torch.testing.assert_close(out.loss, pairs.loss + 0.5 * nll)
    torch.testing.assert_close(out.nll, nll)
    assert torch.equal(out.margins, pairs.margins)
    assert torch.equal(out.chosen_logps, W)
    alone = tpo_loss(W, L, torch.full_like(GOLD, -torch.inf), TOKENS, **SIZES, loss_type=loss_type, tpo_alpha=0.0)
    assert alone.loss.isfinite()


@pytest.mark.parametrize("plan", ["keep", "recompute"])
def test_from_a_head_it_is_the_one_from_logits(plan):
    hidden, weight = torch.randn(6, 5, 8, generator=G), torch.randn(50, 8, generator=G)
    labels = torch.randint(0, 50, (6, 5), generator=G).masked_fill(torch.arange(5) < 1, -100)
    loss, results = TPOLoss(loss_type="tpo-l", beta=2.0), []
    for as_head in (False, True):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        source = Head(*leaves, plan=plan) if as_head else leaves[0] @ leaves[1].t()
        out = loss(source, labels).loss
        results.append([out.detach(), *torch.autograd.grad(out, leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TPOLoss(loss_type="simpo"), "loss_type must be one of"),
        (lambda: TPOLoss(beta=0.0), r"beta must be in \(0"),
        (lambda: TPOLoss(tpo_alpha=-1.0), r"tpo_alpha must be in \[0"),
        (lambda: TPOLoss(loss_type="hinge", label_smoothing=0.1), "label_smoothing has no effect on loss_type 'hinge'"),
        (lambda: TPOLoss()(torch.zeros(4, 3, 5), torch.zeros(4, 3).long()), r"logits must be \[3B, T, V\]"),
        (lambda: tpo_loss(W, L, GOLD[:2], TOKENS), "gold_logps must have shape"),
        (lambda: tpo_loss(W, L, GOLD, TOKENS[:2]), "gold_lengths must have shape"),
        (lambda: tpo_loss(W, L, GOLD, TOKENS, loss_type="ipo"), "chosen_lengths and rejected_lengths are needed"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------------------------------- trainer
GOOD, BAD = [" is good", " is great and fun", " is fun"], [" is bad", " is dull , awful and long"]
TRIPLE = [
    {"prompt": prompt, "chosen": GOOD[i % 3], "rejected": BAD[i % 2], "reference": GOOD[(i + 1) % 3] + " and good"}
    for i, prompt in enumerate(["the movie", "a film", "the plot", "a story", "the", "a great film"])
]


@pytest.fixture
def trained(tiny_model, tiny_tokenizer, tmp_path):
    pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
    pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")
    from fastalign.trainers.common.callbacks import LOG_NAME, read_log
    from fastalign.trainers.tpo import TPOConfig, TPOTrainer

    def build(rows=TRIPLE, **options):
        shared = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
        shared |= {"logging_steps": 1, "learning_rate": 0.3, "lr_scheduler_type": "constant", "max_steps": 4}
        shared |= {"optim": "sgd", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential", "beta": 0.3}
        shared |= {"per_device_train_batch_size": 3, "report_to": "none"}
        trainer = TPOTrainer(tiny_model(), TPOConfig(**{**shared, **options}), rows, None, tiny_tokenizer)
        trainer.train()
        return trainer, [x for x in read_log(os.path.join(trainer.args.output_dir, LOG_NAME)) if "loss" in x]

    return build


@pytest.mark.parametrize("options", [*({"loss_type": name} for name in TRIPLES), {"tpo_alpha": 0.0}], ids=str)
def test_a_run_is_trls(trained, tiny_model, tiny_tokenizer, tmp_path, options):
    pytest.importorskip("trl", reason="needs TRL (the extra `dev`)")
    from datasets import Dataset
    from trl.experimental.tpo import TPOConfig, TPOTrainer

    trainer, lines = trained(**options)
    shared = {"output_dir": str(tmp_path / "theirs"), "use_cpu": True, "save_strategy": "no", "report_to": "none"}
    shared |= {"logging_steps": 1, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0, "beta": 0.3}
    shared |= {"per_device_train_batch_size": 3, "bf16": False, "gradient_checkpointing": False, "max_steps": 4}
    shared |= {"learning_rate": 0.3, "disable_tqdm": True, "train_sampling_strategy": "sequential"}
    args = TPOConfig(**shared, **options)
    rows = Dataset.from_list(TRIPLE)
    theirs = TPOTrainer(model=tiny_model(), args=args, train_dataset=rows, processing_class=tiny_tokenizer)
    theirs.train()
    for line, other in zip(lines, [x for x in theirs.state.log_history if "rewards/margins" in x], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=2e-4)
        if options.get("loss_type") not in ("ipo", "tpo-l"):  # of which theirs are means per token
            assert line["logps/chosen"] == pytest.approx(other["logps/chosen"], rel=2e-3)
    ours, peer = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (trainer.model, theirs.model))
    torch.testing.assert_close(ours, peer, rtol=1e-3, atol=1e-4)


def test_the_command_and_its_mistakes(trained, tiny_model, tiny_tokenizer, tmp_path, capsys):
    from fastalign.cli import commands as cli

    with pytest.raises(ValueError, match="needs the columns"):
        trained(rows=[{"prompt": "a", "chosen": " b", "rejected": " c"}])
    with pytest.raises(ValueError, match="'reference' must not be empty"):
        trained(rows=[{**TRIPLE[0], "reference": " "}])
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    data = tmp_path / "triples.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in TRIPLE))
    argv = ["tpo", "--model", str(tmp_path / "base"), "--dataset", str(data), "--output_dir", str(tmp_path / "out")]
    assert cli.main([*argv, "--eval_dataset", str(data), "--use_cpu", "--max_steps", "2", "--tpo_alpha", "0.5"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {"eval_loss", "eval_loss/nll", "eval_rewards/accuracies"} <= set(metrics)
