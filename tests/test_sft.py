"""Supervised fine-tuning: torch's cross-entropy, by tokens and by sequences, under accumulation, with nothing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastalign.losses import SFTLoss, sft_loss


def batch(rows=4, length=6, vocab=11, seed=0):
    """Logits and ragged labels, row 2 without any; float64."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((rows, length, vocab), generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocab, (rows, length), generator=generator)
    ends = torch.randint(1, length + 1, (rows, 1), generator=generator)
    labels = labels.masked_fill(torch.arange(length) >= ends, -100)
    labels[2] = -100
    return logits, labels


def run(logits, labels, num_items=None, **options):
    leaf = logits.clone().requires_grad_()
    out = SFTLoss(**options)(leaf, labels, num_items=num_items)
    out.loss.backward()
    return out, leaf.grad


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_is_torchs_cross_entropy(smoothing):
    logits, labels = batch()
    out, grad = run(logits, labels, label_smoothing=smoothing)
    leaf = logits.clone().requires_grad_()
    F.cross_entropy(leaf.flatten(0, 1), labels.flatten(), label_smoothing=smoothing).backward()
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing)
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(grad, leaf.grad)
    assert out.num_tokens.item() == (labels != -100).sum()


def test_sequences_weigh_the_same_and_empty_ones_nothing():
    logps = torch.tensor([[-1.0, -3.0, -9.0], [-4.0, math.nan, math.inf], [math.nan] * 3])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    assert sft_loss(logps, mask, normalization="sequence").loss.item() == 3.0  # (2 + 4) / 2
    out = sft_loss(logps, mask)
    assert out.loss.item() == pytest.approx(8 / 3)
    assert out.nll.item() == pytest.approx(8 / 3)
    assert out.num_tokens.item() == 3


@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_nothing_to_learn_is_zero(normalization):
    logits = torch.full((2, 3, 5), math.nan)
    out, grad = run(logits, torch.full((2, 3), -100), normalization=normalization, z_loss=0.1, label_smoothing=0.1)
    assert out.loss.item() == 0.0
    assert torch.equal(grad, torch.zeros_like(grad))
    assert out.nll.item() == out.z_loss.item() == 0.0


@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_accumulation_sums_to_the_batch(normalization):
    """Micro-batches of very different token counts, divided by the whole batch's count, add up to the whole batch."""
    logits, labels = batch()
    whole, grad = run(logits, labels, normalization=normalization)
    live = labels != -100
    count = live.sum() if normalization == "token" else live.any(-1).sum()
    for num_items in (count, int(count), count.reshape(1)):
        parts = [run(logits[i : i + 1], labels[i : i + 1], num_items, normalization=normalization) for i in range(4)]
        torch.testing.assert_close(sum(part.loss for part, _ in parts), whole.loss)
        torch.testing.assert_close(torch.cat([part_grad for _, part_grad in parts]), grad)
        assert parts[0][0].loss.dim() == 0


def test_z_loss():
    logits, labels = batch()
    plain, _ = run(logits, labels)
    out, grad = run(logits, labels, z_loss=0.5)
    square = logits.logsumexp(-1).square()[labels != -100].mean()
    torch.testing.assert_close(out.z_loss, square)
    torch.testing.assert_close(out.loss, plain.loss + 0.5 * square)
    assert not out.z_loss.requires_grad
    # only the z-loss sees a shift of all logits: d/dc of 0.5 mean((lse + c)^2) is mean(lse)
    torch.testing.assert_close(grad.sum(), logits.logsumexp(-1)[labels != -100].mean())


@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_what_may_not_change_the_loss(normalization):
    logits, labels = batch()
    out, grad = run(logits, labels, normalization=normalization)
    for left, right in ((2, 0), (0, 3)):
        wide = F.pad(logits, (0, 0, left, right), value=math.nan)
        padded, wide_grad = run(wide, F.pad(labels, (left, right), value=-100), normalization=normalization)
        torch.testing.assert_close(padded.loss, out.loss)
        torch.testing.assert_close(wide_grad[:, left : left + 6], grad)
    shifted, _ = run(logits + 100 * torch.randn(4, 6, 1, dtype=torch.float64), labels, normalization=normalization)
    torch.testing.assert_close(shifted.loss, out.loss)
    order = torch.tensor([3, 1, 0, 2])
    permuted, permuted_grad = run(logits[order], labels[order], normalization=normalization)
    torch.testing.assert_close(permuted.loss, out.loss)
    torch.testing.assert_close(permuted_grad, grad[order])


def test_dtypes():
    logits, labels = batch()
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        out, grad = run(logits.to(dtype), labels)
        assert out.loss.dtype == expected
        assert grad.dtype == dtype
    half = sft_loss(torch.full((40000,), -2.0, dtype=torch.float16), torch.ones(40000).bool())
    assert half.loss.item() == 2.0  # a float16 sum would be infinite
    assert not half.nll.requires_grad


def test_gradcheck():
    _, labels = batch()
    logps = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    lse = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    for normalization in ("token", "sequence"):
        options = {"normalization": normalization, "z_loss": 0.3}
        assert torch.autograd.gradcheck(
            lambda x, y, o=options: sft_loss(x, labels != -100, lse=y, **o).loss, (logps, lse)
        )


ZEROS, MASK = torch.zeros(2, 3), torch.ones(2, 3).bool()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"normalization": "batch"}, ValueError, "normalization must be one of sequence, token"),
        ({"mask": ZEROS}, TypeError, "mask must be a boolean"),
        ({"mask": MASK[:1]}, ValueError, "mask must have shape"),
        ({"logps": ZEROS.long()}, TypeError, "logps must be a floating-point"),
        ({"num_items": -1}, ValueError, "num_items must be in"),
        ({"num_items": torch.ones(2)}, ValueError, "num_items must be one number"),
        ({"z_loss": -0.1}, ValueError, "z_loss must be in"),
        ({"z_loss": 0.1}, ValueError, "lse, the logsumexp"),
        ({"z_loss": 0.1, "lse": ZEROS[:1]}, ValueError, "lse must have shape"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        sft_loss(**{"logps": ZEROS, "mask": MASK, **arguments})


def test_bad_options_of_the_module():
    with pytest.raises(ValueError, match="normalization must be one of"):
        SFTLoss(normalization="mean")
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        SFTLoss(label_smoothing=-0.1)
