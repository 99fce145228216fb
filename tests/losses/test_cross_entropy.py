"""`fastalign.cross_entropy` is `torch.nn.functional.cross_entropy`: values, gradients, shapes, dtypes, refusals."""

import itertools

import pytest
import torch
from torch.nn import functional as F

import fastalign as fa

C = 301
SHAPES = {"one": ((C,), ()), "rows": ((12, C), (12,)), "image": ((3, C, 4, 2), (3, 4, 2)), "time": ((2, C, 5), (2, 5))}
OPTIONS = [
    {"reduction": reduction, "label_smoothing": smoothing, "weight": weight}
    for reduction, smoothing, weight in itertools.product(("none", "mean", "sum"), (0.0, 0.1), (False, True))
]
# Our own error, as a share of the largest: of float32 sums of 301 terms; 16-bit results are rounded once.
MARGIN = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}


def problem(shape, dtype):
    g = torch.Generator().manual_seed(7)
    logits = (3 * torch.randn(shape[0], generator=g)).to(dtype)
    target = torch.randint(0, C, shape[1], generator=g)
    if target.numel() > 2:
        target.view(-1)[1::5] = -100
    # Coefficients exact in 16 bits: their rounding is nobody's error.
    return logits, target, torch.rand(C, generator=g).to(dtype), torch.randn(shape[1], generator=g).bfloat16().float()


def run(function, logits, target, weight, draw, options):
    """(loss, gradient); losses without reduction are summed with coefficients of their own."""
    options = options | {"weight": weight if options["weight"] else None}
    leaf = logits.detach().requires_grad_()
    loss = function(leaf, target, **options)
    scalar = (loss * draw.to(loss.dtype)).sum() if options["reduction"] == "none" else loss
    return loss.detach(), torch.autograd.grad(scalar, leaf)[0]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("dtype", MARGIN, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_error_is_no_larger_than_torchs(shape, dtype, options):
    problems = problem(shape, dtype)
    exact = run(F.cross_entropy, *(t if t.dtype == torch.int64 else t.double() for t in problems), options)
    theirs = run(F.cross_entropy, *problems, options)
    ours = run(fa.cross_entropy, *problems, options)
    for got, peer, want in zip(ours, theirs, exact, strict=True):
        assert (got.shape, got.dtype) == (peer.shape, peer.dtype)
        allowed = float((peer.double() - want).norm()) + MARGIN[dtype] * float(want.norm())
        assert float((got.double() - want).norm()) <= allowed


def test_the_eager_backend_and_gradcheck():
    logits, target, weight, _ = problem(SHAPES["rows"], torch.float64)
    with fa.use_backend("eager"):
        got = fa.cross_entropy(logits, target, weight, label_smoothing=0.2)
    torch.testing.assert_close(got, F.cross_entropy(logits, target, weight, label_smoothing=0.2), rtol=1e-14, atol=0)
    small = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 4], [7, 2], [1, 1]])
    assert torch.autograd.gradcheck(
        lambda x: fa.cross_entropy(x, labels, weight[:5], ignore_index=7, label_smoothing=0.3), (small,)
    )


def test_ignored_targets_are_not_read():
    logits, target, weight, _ = problem(SHAPES["rows"], torch.float32)
    spoilt = logits.clone()
    spoilt[target == -100] = torch.nan
    for options in ({}, {"weight": weight, "label_smoothing": 0.1}):
        a, b = spoilt.clone().requires_grad_(), logits.clone().requires_grad_()
        loss = fa.cross_entropy(a, target, **options)
        other = fa.cross_entropy(b, target, **options)
        assert torch.equal(loss, other)
        assert torch.equal(*(torch.autograd.grad(x, leaf)[0] for x, leaf in ((loss, a), (other, b))))


def test_without_a_target_as_in_torch():
    logits, target, *_ = problem(SHAPES["rows"], torch.float32)
    nothing = torch.full_like(target, -100)
    leaf = logits.requires_grad_()
    assert fa.cross_entropy(leaf, nothing).isnan()
    assert F.cross_entropy(leaf, nothing).isnan()
    assert fa.cross_entropy(leaf, nothing, reduction="sum") == 0
    assert (torch.autograd.grad(fa.cross_entropy(leaf, nothing), leaf)[0] == 0).all()


def test_autocast_positions_and_integer_types():
    logits, target, weight, _ = problem(SHAPES["time"], torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert fa.cross_entropy(logits, target).dtype == F.cross_entropy(logits, target).dtype == torch.float32
    positional = (logits.float(), target, weight.float(), None, -100, None, "sum", 0.1)
    torch.testing.assert_close(fa.cross_entropy(*positional), F.cross_entropy(*positional))
    assert torch.equal(fa.cross_entropy(logits, target.int()), fa.cross_entropy(logits, target))
    loss = torch.compile(fa.cross_entropy, fullgraph=True, backend="eager")
    torch.testing.assert_close(loss(logits, target), fa.cross_entropy(logits, target))


BAD = {
    "class probabilities are not supported": (TypeError, {"target": torch.rand(12, C)}),
    "target must be int64, int32 or uint8": (TypeError, {"target": torch.zeros(12, dtype=torch.int16)}),
    "target must be a torch.Tensor; got list": (TypeError, {"target": [1]}),
    "input must be a torch.Tensor; got NoneType": (TypeError, {"input": None}),
    "input must be a floating-point tensor": (TypeError, {"input": torch.zeros(12, C, dtype=torch.int64)}),
    "reduction must be one of mean, none, sum; got 'all'": (ValueError, {"reduction": "all"}),
    "label_smoothing must be in": (ValueError, {"label_smoothing": 1.5}),
    r"weight must have shape \[301\], that of a class": (ValueError, {"weight": torch.ones(3)}),
    "weight must be a torch.Tensor": (TypeError, {"weight": 2.0}),
    r"target must be \[12\], input without C; got \[11\]": (ValueError, {"target": torch.zeros(11, dtype=torch.int64)}),
    r"target must be in \[0, 301\)": (ValueError, {"target": torch.full((12,), C)}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    kind, change = BAD[message]
    good = {"input": torch.zeros(12, C), "target": torch.zeros(12, dtype=torch.int64)}
    with pytest.raises(kind, match=message):
        fa.cross_entropy(**(good | change))
