"""Soft-capped logits and a z-loss beside class weights, from logits and from a head, as Liger has them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

import fastalign as fa

ROWS, HIDDEN, CLASSES = 12, 6, 41
OPTIONS = list(itertools.product(("none", "mean", "sum"), (None, 3.0), (0.0, 0.03), (False, True), (0.0, 0.1)))


def problem(dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=draw, dtype=torch.float64).to(dtype)
    matrix = torch.randn(CLASSES, HIDDEN, generator=draw, dtype=torch.float64).to(dtype)
    target = torch.randint(CLASSES, (ROWS,), generator=draw)
    target[::4] = -100
    return hidden, matrix, target, torch.rand(CLASSES, generator=draw, dtype=torch.float64).to(dtype)


def by_hand(logits, target, weight, reduction, cap, z, smoothing):
    """Of plain torch; the z-loss is not weighed by classes, and its mean is over the targets that count."""
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    loss = F.cross_entropy(logits, target, weight, reduction=reduction, label_smoothing=smoothing)
    squares = torch.where(target >= 0, z * logits.logsumexp(-1).square(), 0.0)
    of = {"none": squares, "sum": squares.sum(), "mean": squares.sum() / (target >= 0).sum()}
    return loss + of[reduction]


def gradients(loss, *leaves):
    weights = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape) if loss.dim() else 1.0
    return torch.autograd.grad((loss * weights).sum(), leaves)


@pytest.mark.parametrize(("reduction", "cap", "z", "weighed", "smoothing"), OPTIONS)
def test_from_logits_and_from_a_head(reduction, cap, z, weighed, smoothing):
    hidden, matrix, target, weight = problem()
    weight = weight if weighed else None
    logits = (hidden @ matrix.T).requires_grad_()
    expected = by_hand(logits, target, weight, reduction, cap, z, smoothing)
    options = {"reduction": reduction, "label_smoothing": smoothing, "softcap": cap, "z_loss": z}
    found = fa.cross_entropy(logits, target, weight, **options)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, logits), gradients(expected, logits))
    leaves = hidden.clone().requires_grad_(), matrix.clone().requires_grad_()
    if cap is not None and weighed and smoothing:
        with pytest.raises(ValueError, match="softcap must be None with both weight and label_smoothing"):
            fa.linear_cross_entropy(leaves[0], leaves[1], target, weight=weight, **options)
        return
    of_head = fa.linear_cross_entropy(leaves[0], leaves[1], target, weight=weight, **options)
    theirs = by_hand(leaves[0] @ leaves[1].T, target, weight, reduction, cap, z, smoothing)
    torch.testing.assert_close(of_head, theirs)
    torch.testing.assert_close(gradients(of_head, *leaves), gradients(theirs, *leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_in_narrow_types(dtype, smoothing):
    """Against float64 of the same numbers: float32's roundings, and one of the gradient to 16 bits."""
    hidden, matrix, target, weight = problem(dtype)
    logits = (hidden.double() @ matrix.double().T).to(dtype).requires_grad_()
    options = {"label_smoothing": smoothing, "softcap": 3.0, "z_loss": 0.03}
    found = fa.cross_entropy(logits, target, weight, **options)
    wide = logits.detach().double().requires_grad_()
    exact = by_hand(wide, target, weight.double(), "mean", 3.0, 0.03, smoothing)
    unit = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(found.double(), exact, rtol=unit, atol=0)
    (slope,), (wanted,) = gradients(found, logits), gradients(exact, wide)
    torch.testing.assert_close(slope.double(), wanted, rtol=unit, atol=float(unit * wanted.abs().max()))


@pytest.mark.parametrize("plan", [None, "recompute", "objective"])
def test_every_plan_of_a_head(plan):
    hidden, matrix, target, _ = problem()
    hidden.requires_grad_()
    found = fa.linear_cross_entropy(hidden, matrix, target, softcap=3.0, z_loss=0.03, plan=plan)
    expected = by_hand(hidden @ matrix.T, target, None, "mean", 3.0, 0.03, 0.0)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, hidden), gradients(expected, hidden))


@pytest.mark.parametrize("function", ["cross_entropy", "linear_cross_entropy"])
def test_bad_options_are_named(function):
    hidden, matrix, target, _ = problem()
    given = (hidden @ matrix.T, target) if function == "cross_entropy" else (hidden, matrix, target)
    for options, message in (
        ({"z_loss": -1.0}, r"z_loss must be in \[0"),
        ({"softcap": 0.0}, "softcap must be None or a finite number above 0; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            getattr(fa, function)(*given, **options)
