"""A mean negative log-likelihood: one node of the graph, no further from float64 than torch operations."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastalign as fa
from fastalign.losses import SFTLoss

LOSSES = {
    "mean": lambda x, y: (fa.cross_entropy(x, y),),
    "sum": lambda x, y: (fa.cross_entropy(x, y, reduction="sum"),),
    "sft": lambda x, y: SFTLoss()(x.unsqueeze(0), y.unsqueeze(0)),
    "sft in place": lambda x, y: SFTLoss(inplace_backward=True)(x.unsqueeze(0).clone(), y.unsqueeze(0)),
}


def outcome(loss, x, y):
    x = x.clone().requires_grad_()
    outputs = LOSSES[loss](x, y)
    (0.37 * outputs[0]).backward()
    return [*(t.detach() for t in outputs), x.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("hidden", ["none", "some", "all"])
def test_no_further_from_float64_than_torch_operations(programs, loss, hidden, dtype):
    draw = torch.Generator().manual_seed(0)
    for rows, vocab in ((1, 5), (7, 257), (64, 3000)):
        x, y = torch.randn(rows, vocab, generator=draw).mul(3).to(dtype), torch.randint(vocab, (rows,), generator=draw)
        share = {"none": 0.0, "some": 0.5, "all": 1.0}[hidden]
        y[torch.rand(rows, generator=draw) < share] = -100
        found = outcome(loss, x, y)
        with programs.off():
            others, exact = outcome(loss, x, y), outcome(loss, x.double(), y)
        # Two roundings apart: of the slope 1 / N to float32, and of its product with the upstream gradient.
        for got, other, want in zip(found, others, exact, strict=True):
            unit = 2 * torch.finfo(got.dtype).eps * want.double().abs() if got.is_floating_point() else 0
            error, allowed = (got.double() - want).abs(), (other.double() - want).abs() + unit
            assert torch.equal(got.isnan(), want.isnan())
            assert bool((error <= allowed)[~want.isnan()].all())


def test_it_is_one_node():
    x, y = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 4, -100])
    assert "FusedLoss" in type(SFTLoss()(x, y).loss.grad_fn).__name__
    assert "FusedLoss" in type(fa.cross_entropy(x, y).grad_fn).__name__
    assert "FusedLoss" not in type(fa.cross_entropy(x, y, label_smoothing=0.1).grad_fn).__name__


@pytest.mark.parametrize("loss", LOSSES)
def test_everything_stays_where_the_logits_are(loss):
    """Under `torch.set_default_device` too; meta stands for an accelerator."""
    x, y = torch.randn(3, 5), torch.tensor([0, 4, 2])
    found = outcome(loss, x, y)
    with torch.device("meta"):
        elsewhere = outcome(loss, x, y)
    for got, want in zip(elsewhere, found, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("loss", ["mean", "sft"])
def test_differentiated_once_and_refused_twice(loss):
    x, y = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 4, 2])
    (first,) = torch.autograd.grad(LOSSES[loss](x, y)[0], x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(first.sum(), x)


def test_written_over_logits_are_refused():
    x, y = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 4, 2])
    loss = fa.cross_entropy(x, y)
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("label", [-1, 5])
def test_bad_labels_are_named(label):
    x, y = torch.randn(2, 5, requires_grad=True), torch.tensor([0, label])
    for loss in LOSSES.values():
        with pytest.raises(ValueError, match=rf"(labels|target) must be in \[0, 5\) .*got {label} at flat position 1"):
            loss(x, y)


# ------------------------------------------------------------------------------------------------ onto the other path
class Watching(TorchDispatchMode):
    """Notes the operators that it is shown."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def problem():
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    return x.requires_grad_(), torch.tensor([0, -100, 6, 3])


def expected():
    x, y = problem()
    return torch.autograd.grad(fa.cross_entropy(x, y), x)[0]


def test_a_dispatch_mode_sees_the_operators():
    x, y = problem()
    with Watching() as mode:
        (found,) = torch.autograd.grad(fa.cross_entropy(x, y), x)
    assert {"fastalign.token_stats.default", "fastalign.token_stats_backward.default"} <= set(mode.seen)
    assert torch.equal(found, expected())


def test_a_dispatch_mode_of_the_backward_alone_sees_it():
    x, y = problem()
    loss = fa.cross_entropy(x, y)
    with Watching() as mode:
        (found,) = torch.autograd.grad(loss, x)
    assert "fastalign.token_stats_backward.default" in mode.seen
    assert torch.equal(found, expected())


def test_fake_tensors_and_subclasses():
    with FakeTensorMode() as mode:
        x, y = (mode.from_tensor(t) for t in problem())
        (grad,) = torch.autograd.grad(fa.cross_entropy(x.requires_grad_(), y), x)
    assert grad.shape == x.shape
    x, y = problem()
    weight = torch.nn.Parameter(x.detach())
    assert torch.equal(torch.autograd.grad(fa.cross_entropy(weight, y), weight)[0], expected())


def test_compiled():
    x, y = problem()
    loss = torch.compile(fa.cross_entropy, fullgraph=True, backend="aot_eager")(x, y)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected(), rtol=1e-6, atol=1e-7)


def test_function_transforms_give_the_same():
    x, y = problem()
    found = torch.func.grad(lambda x: fa.cross_entropy(x, y))(x.detach())
    torch.testing.assert_close(found, expected(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_a_backend_that_was_asked_for(backend):
    x, y = problem()
    with fa.use_backend(backend):
        loss = fa.cross_entropy(x, y)
        (found,) = torch.autograd.grad(loss, x)
    assert ("FusedLoss" in type(loss.grad_fn).__name__) == (backend == "cpu")
    torch.testing.assert_close(found, expected(), rtol=1e-6, atol=1e-7)


def test_a_backend_that_changes_before_the_backward():
    x, y = problem()
    loss = fa.cross_entropy(x, y)
    with fa.use_backend("eager"):
        (found,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(found, expected(), rtol=1e-6, atol=1e-7)


def test_a_gradient_with_a_lazy_sign():
    """The imaginary part of a conjugate shares its memory and says by a bit that it is negative."""
    x, y = problem()
    negated = torch.tensor(1j).conj().imag
    assert negated.is_neg()
    (found,) = torch.autograd.grad(fa.cross_entropy(x, y), x, negated)
    assert torch.equal(found, -expected())


STRIDES = {
    "vocabulary": (lambda x: x.t().contiguous().t(), lambda y: y),
    "rows": (lambda x: torch.cat([x, x], 1)[:, : x.shape[1]], lambda y: y),
    "labels": (lambda x: x, lambda y: torch.stack([y, y], 1)[:, 0]),
    "int32": (lambda x: x, lambda y: y.int()),
    "nine dimensions": (lambda x: x.view(2, 1, 1, 1, 1, 1, 1, 2, -1), lambda y: y.view(2, 1, 1, 1, 1, 1, 1, 2)),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", STRIDES)
def test_strides(name, inplace):
    of_logits, of_labels = STRIDES[name]
    x, y = problem()
    loss = SFTLoss(inplace_backward=inplace)(of_logits(x * 1), of_labels(y)).loss
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected())


def test_logits_that_share_memory_are_not_written_over():
    x = torch.randn(1, 7, requires_grad=True)
    y = torch.tensor([0, 1, 2, 3])
    with pytest.raises(ValueError, match="inplace_backward needs logits whose elements do not share memory"):
        SFTLoss(inplace_backward=True)(x.expand(4, 7), y)
    (found,) = torch.autograd.grad(SFTLoss()(x.expand(4, 7), y).loss, x)
    (eager,) = torch.autograd.grad(torch.nn.functional.cross_entropy(x.expand(4, 7), y), x)
    torch.testing.assert_close(found, eager, rtol=1e-5, atol=1e-7)


def test_a_hook_that_stores_them_elsewhere():
    x, y = problem()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True).copy(), torch.from_numpy):
        loss = fa.cross_entropy(x, y)
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected())


def test_numbers_past_the_node():
    """Nothing of the outputs is shared: a caller may change them."""
    x, y = problem()
    first = SFTLoss()(x, y)
    first.z_loss.add_(1)
    first.num_tokens.add_(1)
    second = SFTLoss()(x, y)
    assert second.z_loss == 0
    assert second.num_tokens == 3
    assert second.num_tokens.dtype == torch.int64
