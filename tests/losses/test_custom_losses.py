"""Losses of the user's own: as autograd has them in float64, from logits, heads and parts of heads; what does not trace
runs all the same and says why."""

import pytest
import torch
import torch.nn.functional as F

import fastalign as fa
from fastalign.losses import DPOLoss, PairLoss, PPOLoss, TokenLoss

B, T, V, H = 4, 7, 53, 16


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(B, T, H, generator=g), 0.5 * torch.randn(V, H, generator=g)
    labels = torch.randint(0, V, (B, T), generator=g)
    labels[0, :2], labels[2, 5:] = -100, -100
    logps = torch.log_softmax(hidden @ weight.t(), -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    old = logps + 0.4 * torch.randn(B, T, generator=g)
    return hidden, weight, labels, old, torch.randn(B, T, generator=g), torch.randn(B, generator=g)


def clip(t):
    ratio = torch.exp(t.logps - t.old)
    return torch.maximum(-t.advantages * ratio, -t.advantages * ratio.clamp(0.8, 1.2)) - 0.01 * t.entropy


def by_sorting(t):
    return -t.logps * t.logps.detach().argsort(-1).argsort(-1)


def sigmoid(p):
    return -F.logsigmoid(0.1 * (p.chosen_logps - p.rejected_logps - p.ref_gap))


def by_length(p):
    return F.softplus(p.rejected_logps / p.rejected_lengths - p.chosen_logps / p.chosen_lengths + p.margin)


def sources(hidden, weight):
    """Name → (leaves, what stands for logits), for every way in."""
    for dtype in (torch.float32, torch.float64):
        h, w = (x.to(dtype).requires_grad_() for x in (hidden, weight))
        yield f"logits {dtype}", (h, w), h @ w.t()
        for plan in ("keep", "recompute", "objective"):
            h, w = (x.to(dtype).requires_grad_() for x in (hidden, weight))
            yield f"{plan} {dtype}", (h, w), fa.Head(h, w, chunk_bytes=4 * V * 6, plan=plan)


def exact(hidden, weight, labels, loss_of):
    """Loss and gradients by autograd in float64 alone."""
    h, w = (x.double().requires_grad_() for x in (hidden, weight))
    logits = h @ w.t()
    logps = torch.log_softmax(logits, -1)
    entropy = -(logps.exp() * logps).sum(-1)
    loss = loss_of(logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1), entropy, labels != -100)
    return loss, torch.autograd.grad(loss, (h, w))


class Named:
    def __init__(self, **fields):
        self.__dict__.update(fields)


@pytest.mark.parametrize("formula", [clip, by_sorting])
@pytest.mark.parametrize("by_sequence", [False, True])
def test_tokens_from_every_source(formula, by_sequence):
    hidden, weight, labels, old, advantages, own = batch()
    given = {"old": old, "advantages": own if by_sequence else advantages}

    def wanted(logps, entropy, mask):
        a = (own.unsqueeze(-1) if by_sequence else advantages).double()
        losses = formula(Named(logps=logps * mask, old=old.double(), advantages=a, entropy=entropy))
        return losses[mask].mean()

    loss, grads = exact(hidden, weight, labels, wanted)
    for name, leaves, logits in sources(hidden, weight):
        module = TokenLoss(formula, metrics={"nll": lambda t: -t.logps})
        out = module(logits, labels, **given)
        found = torch.autograd.grad(out.loss, leaves)
        margin = 1e-12 if "float64" in name else 2e-6
        torch.testing.assert_close(out.loss.double(), loss, rtol=margin, atol=margin, msg=name)
        for a, b in zip(found, grads, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=margin, atol=float(margin * b.abs().max()), msg=name)
        assert not out.metrics["nll"].requires_grad
        reason = "argsort" if formula is by_sorting else "program of"
        assert "float64" in name or reason in module.explain()


@pytest.mark.parametrize("formula", [sigmoid, by_length])
def test_pairs_from_every_source(formula):
    hidden, weight, labels, *_ = batch()
    gap, margin_of = torch.randn(B // 2), 0.3

    def wanted(logps, entropy, mask):
        sums, counts = (logps * mask).sum(-1).chunk(2), mask.sum(-1).chunk(2)
        p = Named(
            chosen_logps=sums[0],
            rejected_logps=sums[1],
            chosen_lengths=counts[0],
            rejected_lengths=counts[1],
            ref_gap=gap.double(),
            margin=margin_of,
        )
        return formula(p).mean()

    loss, grads = exact(hidden, weight, labels, wanted)
    for name, leaves, logits in sources(hidden, weight):
        module = PairLoss(formula, metrics={"gap": lambda p: p.chosen_logps - p.rejected_logps})
        out = module(logits, labels, ref_gap=gap, margin=margin_of)
        margin = 1e-12 if "float64" in name else 2e-6
        torch.testing.assert_close(out.loss.double(), loss, rtol=margin, atol=margin, msg=name)
        for a, b in zip(torch.autograd.grad(out.loss, leaves), grads, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=margin, atol=float(margin * b.abs().max()), msg=name)
        assert out.metrics["gap"].shape == (B // 2,)


def test_ours_rewritten_is_ours():
    hidden, weight, labels, old, advantages, _ = batch()
    logits = (hidden @ weight.t()).requires_grad_()

    def formula(t):
        ratio = torch.exp((t.logps - t.old_logps).clamp(-60, 60))
        return torch.maximum(-t.advantages * ratio, -t.advantages * ratio.clamp(0.8, 1.2))

    own = TokenLoss(formula)(logits, labels, old_logps=old, advantages=advantages).loss
    ours = PPOLoss()(logits, labels, old, advantages).loss
    assert torch.equal(own, ours)
    assert torch.equal(*(torch.autograd.grad(x, logits)[0] for x in (own, ours)))
    pairs = PairLoss(lambda p: -F.logsigmoid(0.1 * (p.chosen_logps - p.rejected_logps)))(logits, labels).loss
    assert torch.equal(pairs, DPOLoss()(logits, labels).loss)


def test_what_is_wrong_is_said():
    hidden, weight, labels, old, advantages, _ = batch()
    logits = hidden @ weight.t()
    with pytest.raises(TypeError, match="formula must be a function"):
        TokenLoss("logps")
    with pytest.raises(ValueError, match="normalization must be one of"):
        TokenLoss(lambda t: -t.logps, normalization="mean")
    with pytest.raises(ValueError, match=r"old must have one of the shapes .*; got \[7, 4\]"):
        TokenLoss(clip)(logits, labels, old=old.t(), advantages=advantages)
    with pytest.raises(TypeError, match="old must be a tensor or a number; got list"):
        TokenLoss(clip)(logits, labels, old=[1.0], advantages=advantages)
    with pytest.raises(ValueError, match="logits must be"):
        PairLoss(sigmoid)(logits[:3], labels[:3], ref_gap=0.0)
    with pytest.raises(ValueError, match="labels must"):
        TokenLoss(lambda t: -t.logps)(logits, labels[:, 1:])
