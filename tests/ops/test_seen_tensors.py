"""How compiled code sees tensors: by DLPack's exchange functions, and by attributes where torch has none."""

import pytest
import torch

import fastalign as fa
from fastalign._backends import cpu
from fastalign.losses import DPOLoss, SFTLoss

pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason="the compiled CPU kernels are not built")

PATHS = {
    "sft": lambda x, y: SFTLoss()(x, y).loss,
    "dpo": lambda x, y: DPOLoss(beta=0.3)(x, y).loss,
    "logps": lambda x, y: fa.token_logps(x, y).sum(),
    "sums": lambda x, y: fa.sequence_logps(x, y).square().sum(),
}
TENSORS = {
    "dense": lambda x, y: (x, y),
    "rows apart": lambda x, y: (torch.cat([x, x], -1)[..., : x.shape[-1]], y),
    "columns": lambda x, y: (x.mT.contiguous().mT, y),
    "an offset": lambda x, y: (torch.cat([x, x])[x.shape[0] :], torch.cat([y, y])[y.shape[0] :]),
    "one row for all": lambda x, y: (x[:1, :1].expand(x.shape), y),
    "labels apart": lambda x, y: (x, torch.stack([y, y], -1)[..., 0]),
    "int32": lambda x, y: (x, y.int()),
    "bfloat16": lambda x, y: (x.bfloat16(), y),
    "float16": lambda x, y: (x.half(), y),
    "float64": lambda x, y: (x.double(), y),
    "no tokens": lambda x, y: (x[:, :0], y[:, :0]),
    "negated": lambda x, y: (torch.complex(torch.zeros_like(x), x).conj().imag, y),
}


@pytest.fixture
def by_attributes():
    cpu._C.learn_tensors(*cpu._SEEN, True, cpu._new_tensor)
    yield
    cpu._C.learn_tensors(*cpu._SEEN, False, cpu._new_tensor)


def outcome(path, kind):
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 3, 11, generator=draw), torch.randint(11, (4, 3), generator=draw)
    y[0, 1] = -100
    leaf = x.requires_grad_()
    loss = PATHS[path](*TENSORS[kind](leaf, y))
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("path", PATHS)
def test_both_ways_agree_and_are_eager_torchs(request, path, kind):
    with fa.use_backend("eager"):
        expected = outcome(path, kind)
    found = outcome(path, kind)
    request.getfixturevalue("by_attributes")
    again = outcome(path, kind)
    for one, other, want in zip(found, again, expected, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, want, rtol=1e-2 if "float16" in kind else 1e-5, atol=1e-5)


def test_torch_has_them():
    """From 2.10 on; older versions are seen by their attributes."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    assert hasattr(torch.Tensor, "__dlpack_c_exchange_api__") == (version >= (2, 10))


@pytest.mark.parametrize("magnitude", [1e4, 1e9, 1e12, 1e20, 1e30, 3e38])
@pytest.mark.parametrize("sign", [1, -1, 0])
@pytest.mark.parametrize("vocab", [37, 3001])
def test_logits_of_any_size(vocab, sign, magnitude):
    """All of them that far out (-1e30 is a usual mask) leave no power of two that is known to float32's digits."""
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(16, vocab, generator=draw) * magnitude
    x = -x if sign < 0 else x if sign else torch.full_like(x, -magnitude)
    labels = torch.randint(vocab, (16,), generator=draw)
    exact, exact_gradient = differentiated(lambda x: x.log_softmax(-1), x.double(), labels)
    _, torchs_gradient = differentiated(lambda x: x.log_softmax(-1), x, labels)
    for isa in cpu.cpu_isas():
        with fa.use_backend("cpu", isa=isa):
            found, gradient = differentiated(None, x, labels)
        torch.testing.assert_close(found.double(), exact, rtol=2e-7, atol=2e-6)
        off, theirs = ((g - exact_gradient).abs().max() for g in (gradient, torchs_gradient))
        assert off <= theirs + 1e-6


def differentiated(log_softmax, x, labels):
    x = x.clone().requires_grad_()
    if log_softmax is None:
        logps = fa.token_logps(x, labels)
    else:
        logps = log_softmax(x).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return logps.detach(), torch.autograd.grad(logps.sum(), x)[0].double()


@pytest.mark.parametrize("statistic", ["logps", "lse", "entropy", "kl"])
def test_tensors_that_are_the_negative_of_their_memory(statistic):
    """A bit says so, of the imaginary part of a conjugate for example; kernels see the memory alone."""
    draw = torch.Generator().manual_seed(0)
    x, z, g = (torch.randn(size, generator=draw) for size in ((5, 11), (5, 11), (5,)))
    y = torch.randint(11, (5,), generator=draw)

    def outcome(x, z, g):
        x = x.requires_grad_()
        needs = statistic == "kl"
        stats = fa.token_stats(x, y, entropy=statistic == "entropy", kl=needs, ref_logits=z if needs else None)
        found = getattr(stats, statistic)
        return found.detach(), torch.autograd.grad(found, x, g)[0]

    lazy = [torch._neg_view(t) for t in (x, z, g)]
    assert all(t.is_neg() and t.stride(-1) == 1 for t in lazy)
    for found, want in zip(outcome(*lazy), outcome(-x, -z, -g), strict=True):
        assert torch.equal(found, want)


@pytest.mark.parametrize("one_launch", [False, True])
def test_the_gradient_is_not_written_where_it_would_be_read_with_the_other_sign(one_launch):
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 7, generator=draw, requires_grad=True), torch.randint(7, (2, 3), generator=draw)
    module = SFTLoss(inplace_backward=True, fuse_backward=one_launch)
    (found,) = torch.autograd.grad(module(torch._neg_view(x * 1), y).loss, x)
    assert torch.equal(found, torch.autograd.grad(module(-x, y).loss, x)[0])
