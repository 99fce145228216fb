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
    valid = labels != -100
    count = valid.sum() if normalization == "token" else valid.any(-1).sum()
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


# ------------------------------------------------------------------------------------------- weights, DFT, reductions
def ways(logits, labels, weights=None, **options):
    """Loss and gradient from logits in one call and in one launch, and from a head whole and by parts."""
    import fastalign as fa

    found = {}
    for name, more in (("logits", {}), ("one launch", {"fuse_backward": True})):
        leaf = logits.float().requires_grad_()
        out = SFTLoss(**options, **more)(leaf, labels, weights=weights)
        found[name] = (out.loss.detach(), torch.autograd.grad(out.loss, leaf)[0])
    for plan in ("keep", "objective"):
        leaf = logits.float().requires_grad_()
        chunk = 2 * 6 * 11 * 4 if plan == "objective" else None
        head = fa.Head(leaf, torch.eye(11).requires_grad_(), plan=plan, chunk_bytes=chunk)
        out = SFTLoss(**options)(head, labels, weights=weights)
        found[plan] = (out.loss.detach(), torch.autograd.grad(out.loss, leaf)[0])
    return found


@pytest.mark.parametrize("normalization", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_weights_are_of_a_weighted_mean_by_every_way(normalization, loss_type):
    logits, labels = batch()
    weights = torch.rand(labels.shape, generator=torch.Generator().manual_seed(3))
    weights[0, 1] = 0.0
    leaf = logits.clone().requires_grad_()
    logps = leaf.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    each = -logps * (logps.detach().exp() if loss_type == "dft" else 1)
    real = weights.double() * (labels != -100)
    if normalization == "token":
        want = (each * real).sum() / real.sum()
    else:
        want = torch.stack([(e * w).sum() / w.sum() for e, w in zip(each, real, strict=True) if w.any()]).mean()
    (expected,) = torch.autograd.grad(want, leaf)
    for name, (loss, grad) in ways(logits, labels, weights, normalization=normalization, loss_type=loss_type).items():
        torch.testing.assert_close(loss.double(), want.detach(), rtol=1e-6, atol=1e-6, msg=name)
        torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_a_weight_of_nothing_is_as_an_ignored_label(normalization):
    logits, labels = batch()
    hidden = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    hidden[3] = True
    left = labels.masked_fill(hidden, -100)
    want = ways(logits, left, normalization=normalization)
    for name, (loss, grad) in ways(logits, labels, 2.0 * ~hidden, normalization=normalization).items():
        torch.testing.assert_close(loss, want[name][0], rtol=1e-6, atol=1e-6, msg=name)
        torch.testing.assert_close(grad, want[name][1], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_weighted_micro_batches_sum_to_the_batch(normalization):
    logits, labels = batch()
    weights = 0.1 * torch.rand(labels.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole = SFTLoss(normalization=normalization)(logits, labels, weights=weights).loss
    real = weights * (labels != -100)
    items = real.sum() if normalization == "token" else (real > 0).any(-1).sum()
    loss = SFTLoss(normalization=normalization)
    parts = [
        loss(*(t[i : i + 1] for t in (logits, labels)), num_items=items, weights=weights[i : i + 1]) for i in range(4)
    ]
    torch.testing.assert_close(sum(part.loss for part in parts), whole)


def test_reductions():
    logits, labels = batch()
    mean = SFTLoss()(logits, labels)
    total = SFTLoss(reduction="sum")(logits, labels)
    torch.testing.assert_close(total.loss, mean.loss * mean.num_tokens)
    weights = torch.linspace(0, 2, labels.numel()).view(labels.shape).double()
    for dtype in (torch.float64, torch.float32):
        leaf = logits.to(dtype).requires_grad_()
        each = SFTLoss(reduction="none")(leaf, labels, weights=weights.to(dtype)).loss
        assert each.shape == labels.shape
        assert not each[labels == -100].any()
        torch.testing.assert_close(each.sum(), SFTLoss(reduction="sum")(leaf, labels, weights=weights.to(dtype)).loss)
        upstream = torch.randn(labels.shape, dtype=dtype)
        (got,) = torch.autograd.grad(each, leaf, upstream)
        losses = F.cross_entropy(leaf.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        torch.testing.assert_close(got, torch.autograd.grad(losses * weights.to(dtype), leaf, upstream)[0])
    out = sft_loss(torch.tensor([[-1.0, math.nan]]), torch.tensor([[True, False]]), reduction="none")
    assert out.loss.tolist() == [[1.0, 0.0]]


def test_dft_is_trls():
    """As TRL's SFTTrainer.compute_loss forms it from log-probabilities, the sum over the update's tokens."""
    logits, labels = batch()
    leaf = logits.requires_grad_()
    log_probs = -F.cross_entropy(leaf.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    per_token = -log_probs * log_probs.exp().detach() * (labels != -100)
    theirs, ours = per_token.sum() / 50, SFTLoss(loss_type="dft")(leaf, labels, num_items=50).loss
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaf)[0] for x in (ours, theirs)))


def test_what_sft_refuses():
    logits, labels = batch()
    for options, message in (
        ({"loss_type": "mse"}, "loss_type must be one of nll, dft; got 'mse'"),
        ({"reduction": "max"}, "reduction must be one of mean, sum, none; got 'max'"),
        ({"loss_type": "dft", "label_smoothing": 0.1}, "label_smoothing must be 0 with loss_type='dft'"),
        ({"reduction": "none", "fuse_backward": True}, "fuse_backward forms the gradient of one number"),
    ):
        with pytest.raises(ValueError, match=message):
            SFTLoss(**options)
    with pytest.raises(ValueError, match="num_items is what a mean divides by; got it with reduction='sum'"):
        SFTLoss(reduction="sum")(logits, labels, num_items=3)
    with pytest.raises(ValueError, match=r"weights must be at least 0; got -1\.0"):
        SFTLoss()(logits, labels, weights=torch.full(labels.shape, -1.0))
    with pytest.raises(ValueError, match=r"weights must have shape \[4, 6\], that of labels; got \[4\]"):
        SFTLoss()(logits, labels, weights=torch.ones(4))
