"""Large separate gradients, which are written past the caches into pages made ready beforehand, equal small ones."""

from __future__ import annotations

import pytest
import torch

import fastalign as fa
from fastalign._backends import cpu
from fastalign.ops.call import TokenCall

pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason="the compiled CPU kernels are not built")

GUARD = 97  # elements on either side of a result; odd, so that its rows are not aligned


@pytest.fixture(params=cpu.cpu_isas() if not cpu.unavailable() else ())
def isa(request):
    before = cpu.cpu_isa()
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)


def gradient_between_guards(logits, labels, grads, start):
    """The backward's result, in the middle of a buffer whose other elements it must leave alone."""
    rows, vocab = logits.shape
    call = TokenCall(logits, labels, None, -100, 1.0, 0.0)
    *_, saved = cpu.forward(call, False, False)
    held = torch.full((start + rows * vocab + GUARD,), 7.0, dtype=logits.dtype)
    out = held[start : start + rows * vocab].view(rows, vocab)
    cpu.backward(call, saved, None, None, (grads, None, None, None, None), out)
    assert (held[:start] == 7).all()
    assert (held[start + rows * vocab :] == 7).all()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1001, 4099, 32_000, 70_001])
@pytest.mark.parametrize("start", [0, GUARD])
def test_equal_to_the_ordinary_way_to_the_bit(isa, dtype, vocab, start):
    """Some 40 MB, which are written past the caches, against the same rows in eighths, which are not."""
    torch.manual_seed(0)
    rows = (40 << 20) // (vocab * dtype.itemsize)
    assert rows * vocab * dtype.itemsize > 32 << 20
    logits, labels = torch.randn(rows, vocab).to(dtype), torch.randint(vocab, (rows,))
    labels[rows // 2 : rows // 2 + rows // 3] = -100
    grads = torch.linspace(-1, 1, rows)
    fresh = gradient_between_guards(logits, labels, grads, start)
    eighths = (t.tensor_split(8) for t in (logits, labels, grads))
    plain = [gradient_between_guards(*part, start) for part in zip(*eighths, strict=True)]
    assert torch.equal(torch.cat(plain), fresh)
    assert fresh.any()


@pytest.mark.parametrize("kind", ["backward", "one launch"])
def test_a_gradient_beyond_the_caches(kind):
    """40 MB in float32, so on the fresh way without being told; half of it masked, threads changed."""
    torch.manual_seed(0)
    rows, vocab = 640, 16_411
    logits, labels = torch.randn(rows, vocab), torch.randint(vocab, (rows,))
    labels[::2] = -100
    loss = fa.losses.SFTLoss(fuse_backward=kind == "one launch")
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        try:
            leaf = logits.clone().requires_grad_()
            loss(leaf, labels).loss.backward()
            found.append(leaf.grad)
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])
    exact = logits[1::2].double().requires_grad_()
    torch.nn.functional.cross_entropy(exact, labels[1::2]).backward()
    assert (found[0][1::2] - exact.grad).abs().max() <= 1e-6 * exact.grad.abs().max()
    assert not found[0][::2].any()
