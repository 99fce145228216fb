"""fa.linear_cross_entropy against torch's function of the same name, of which it takes the arguments."""

import pytest
import torch
from torch.nn import functional as F

import fastalign as fa

N, C, H = 7, 50, 5

pytestmark = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="needs torch 2.13 or later")


def problem(dtype=torch.float64, rows=(N,)):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, H, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    w = torch.randn(C, H, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    b = torch.randn(C, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return x, w, b, torch.randint(0, C, rows, generator=g)


def outcome(function, tensors, target, upstream, **options):
    x, w, b = tensors
    loss = function(x, w, target, linear_bias=b, **options)
    leaves = [t for t in tensors if t is not None]
    return loss, torch.autograd.grad(loss, leaves, upstream.expand(loss.shape).to(loss.dtype))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "class weights"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_equals_torchs(reduction, biased, weighted, smoothing):
    x, w, b, target = problem()
    target[2] = -100
    options = {"reduction": reduction, "label_smoothing": smoothing}
    if weighted:
        options["weight"] = torch.linspace(0.5, 2.0, C, dtype=torch.float64)
    upstream = torch.tensor(0.7, dtype=torch.float64)
    tensors = (x, w, b if biased else None)
    want = outcome(F.linear_cross_entropy, tensors, target, upstream, **options)
    for plan in (None, "keep", "recompute", "objective") if reduction != "none" and not weighted else (None, "keep"):
        got = outcome(fa.linear_cross_entropy, tensors, target, upstream, plan=plan, chunk_bytes=160, **options)
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("rows", [(), (1,), (0,), (2, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_shapes(reduction, rows):
    x, w, b, target = problem(rows=rows)
    flat = x.reshape(-1, H) if len(rows) > 1 else x
    want = F.linear_cross_entropy(flat, w, target.reshape(flat.shape[:-1]), linear_bias=b, reduction=reduction)
    got = fa.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction)
    torch.testing.assert_close(got, want.reshape(got.shape), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_is_no_less_exact_than_torchs(dtype):
    x, w, b, target = problem(dtype, (200,))
    upstream = torch.tensor(1.0)
    wide = tuple(t.detach().double().requires_grad_() for t in (x, w, b))
    _, want = outcome(F.linear_cross_entropy, wide, target, upstream)
    _, theirs = outcome(F.linear_cross_entropy, (x, w, b), target, upstream)
    loss, got = outcome(fa.linear_cross_entropy, (x, w, b), target, upstream)
    assert loss.dtype == dtype
    for mine, other, exact in zip(got, theirs, want, strict=True):
        assert (mine - exact).norm() <= 1.05 * (other - exact).norm() + 1e-7 * exact.norm()


def test_nothing_counts():
    x, w, _, target = problem()
    target[:] = 3
    for reduction, want in (("mean", torch.nan), ("sum", 0.0)):
        loss = fa.linear_cross_entropy(x, w, target, ignore_index=3, reduction=reduction)
        torch.testing.assert_close(loss, torch.tensor(want, dtype=torch.float64), equal_nan=True)
        for gradient in torch.autograd.grad(loss, [x, w]):
            assert not gradient.any()


def test_small_integers_and_torchs_options_are_taken():
    x, w, b, target = problem()
    want = F.linear_cross_entropy(x, w, target, linear_bias=b)
    options = torch.nn.LinearCrossEntropyOptions()
    for dtype in (torch.uint8, torch.int32):
        got = fa.linear_cross_entropy(x, w, target.to(dtype), linear_bias=b, options=options)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"linear_weight": torch.zeros(C, 2, H)}, ValueError, "linear_weight must be"),
        ({"linear_weight": torch.zeros(C, H + 1)}, ValueError, r"input must be \[..., 6\]"),
        ({"target": torch.zeros(N, C)}, TypeError, "class probabilities"),
        ({"target": torch.zeros(N + 1, dtype=torch.long)}, ValueError, r"target must be \[7\], input without H"),
        ({"target": torch.full((N,), C)}, ValueError, r"target must be in \[0, 50\).*got 50 at flat position 0"),
        ({"reduction": "average"}, ValueError, "reduction must be one of"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int"),
        ({"weight": torch.ones(C - 1)}, ValueError, "weight must have shape"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_bad_input_is_named(change, error, message):
    g = torch.Generator().manual_seed(0)
    arguments = {
        "input": torch.randn(N, H, generator=g),
        "linear_weight": torch.randn(C, H, generator=g),
        "target": torch.zeros(N, dtype=torch.long),
    }
    with pytest.raises(error, match=message):
        fa.linear_cross_entropy(**{**arguments, **change})
