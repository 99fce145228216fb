"""PRO on the CPU in one call: the numbers of the general path, from float64 formulas; else that path."""

import math

import pytest
import torch

from fastalign.losses import PROLoss

OPTIONS = [
    {},
    {"form": "infonce"},
    {"average": False},
    {"sft_weight": 0.05},
    {"sft_weight": 0.3, "sft_average": True, "form": "infonce", "average": False},
]


def problem(lists=3, size=4, length=5, vocab=31, dtype=torch.float32, scale=2.0):
    draw = torch.Generator().manual_seed(lists * size * length)
    x = torch.randn(lists * size, length, vocab, generator=draw).mul(scale).to(dtype)
    y = torch.randint(vocab, (lists * size, length), generator=draw)
    y[torch.rand(y.shape, generator=draw) < 0.3] = -100
    y[:, 0] = y[:, 0].clamp(min=0)
    return x.requires_grad_(), y, size


def outcome(options, x, y, size, scale=1.0, **more):
    out = PROLoss(**options)(x, y, **(more or {"list_size": size}))
    return [t.detach() for t in out], torch.autograd.grad(scale * out.loss, x)[0]


def general(programs, *args, **more):
    """As torch operations."""
    with programs.off():
        return outcome(*args, **more)


def wide(x, *rest):
    return x.detach().double().requires_grad_(), *rest


@pytest.mark.parametrize("size", [2, 3, 8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_further_from_float64_than_the_general_road(programs, options, dtype, size):
    given = problem(size=size, dtype=dtype)
    found, gradient = outcome(options, *given)
    assert programs.ran[0] is not None
    theirs, theirs_gradient = general(programs, options, *given)
    exact, exact_gradient = general(programs, options, *wide(*given))
    for got, other, want in zip(found, theirs, exact, strict=True):
        assert got.dtype == other.dtype
        assert got.shape == other.shape
        off, allowed = ((t.double() - want).abs() for t in (got, other))
        assert off <= allowed + 1e-6 * want.abs().clamp(min=1)  # relative above 1, in nats below
    off, allowed = ((t.double() - exact_gradient).abs().max() for t in (gradient, theirs_gradient))
    assert off <= allowed + 1e-6 * exact_gradient.abs().max()


@pytest.mark.parametrize("scale", [300.0, 1e4])
def test_scores_far_apart(programs, scale):
    given = problem(scale=scale)
    found, gradient = outcome({"average": False}, *given)
    exact, exact_gradient = general(programs, {"average": False}, *wide(*given))
    for got, want in zip([*found, gradient], [*exact, exact_gradient], strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=2e-6, atol=1e-6)


def test_lists_of_their_own_dimension():
    x, y, size = problem()
    found, gradient = outcome({}, x, y, size)
    z = x.detach().view(-1, size, *x.shape[1:]).requires_grad_()
    out = PROLoss()(z, y.view(-1, size, y.shape[-1]))
    assert all(torch.equal(a, b) for a, b in zip(out, found, strict=True))
    assert torch.equal(torch.autograd.grad(out.loss, z)[0].view(gradient.shape), gradient)


def test_scaled_and_in_place_and_without_gradients():
    x, y, size = problem()
    found, gradient = outcome({}, x, y, size)
    assert torch.equal(outcome({}, x, y, size, scale=4.0)[1], 4 * gradient)
    z = x * 1
    out = PROLoss(inplace_backward=True)(z, y, list_size=size)
    assert torch.equal(torch.autograd.grad(out.loss, x)[0], gradient)
    assert torch.equal(z.detach(), gradient)
    with torch.no_grad():
        out = PROLoss()(x, y, list_size=size)
    assert not out.loss.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(out, found, strict=True))


def test_a_second_derivative_is_refused():
    x, y, size = problem()
    (first,) = torch.autograd.grad(PROLoss()(x, y, list_size=size).loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(first.sum(), x)


def test_ties_are_no_success():
    x = torch.zeros(4, 3, 7, requires_grad=True)
    out = PROLoss()(x, torch.zeros(4, 3, dtype=torch.int64), list_size=2)
    assert (out.accuracy, out.top1_accuracy, out.margin, out.num_lists) == (0, 0, 0, 2)
    assert out.loss.item() == pytest.approx(math.log(2))


def hidden(x, y, size):
    y[1] = -100
    return {"list_size": size}


def masked(x, y, size):
    mask = torch.ones(len(y) // size, size, dtype=torch.bool)
    mask[0, 1] = False
    return {"mask": mask}


def impossible(x, y, size):
    x.data[2, 0, y[2, 0]] = -math.inf
    return {"list_size": size}


OTHERS = {
    "a response without labels": hidden,
    "a mask": masked,
    "rewards": lambda x, y, size: {"rewards": torch.randn(len(y) // size, size)},
    "lists of one": lambda x, y, size: {"list_size": 1},
    "a probability of 0": impossible,
}


@pytest.mark.parametrize("name", OTHERS)
def test_no_cliff_between_lists(programs, name):
    x, y, size = problem()
    more = OTHERS[name](x, y, size)
    found, gradient = outcome({}, x, y, size, **more)
    assert programs.ran[-1] is not None
    exact, exact_gradient = general(programs, {}, *wide(x, y, size), **more)
    for got, want in zip([*found, gradient], [*exact, exact_gradient], strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=3e-6, atol=3e-6, equal_nan=True)


def test_bad_labels_are_named():
    x, y, size = problem()
    y[1, 2] = 31
    with pytest.raises(ValueError, match=r"labels must be in \[0, 31\) .*got 31 at flat position 7"):
        PROLoss()(x, y, list_size=size)
