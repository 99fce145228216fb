"""Large separate gradients, which are written past the caches into pages made ready beforehand, equal small ones."""

from __future__ import annotations

import pytest
import torch

import fastalign as fa
from fastalign._backends import cpu

pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason="the compiled CPU kernels are not built")

GUARD = 97  # elements on either side of a result; odd, so that its rows are not aligned


@pytest.fixture(params=cpu.cpu_isas() if not cpu.unavailable() else ())
def isa(request):
    before = cpu.cpu_isa()
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)


def gradient_between_guards(monkeypatch, logits, labels, fresh, start):
    """The backward's result, in the middle of a buffer whose other elements it must leave alone."""
    monkeypatch.setattr(cpu, "_fresh", lambda out, logits: fresh)
    rows, vocab = logits.shape
    *_, saved = cpu.forward(logits, labels, None, -100, 1.0, 0.0, False, False)
    held = torch.full((start + rows * vocab + GUARD,), 7.0, dtype=logits.dtype)
    out = held[start : start + rows * vocab].view(rows, vocab)
    grads = (torch.linspace(-1, 1, rows), None, None, None, None)
    cpu.backward(logits, labels, None, saved, None, None, grads, -100, 1.0, 0.0, out)
    assert (held[:start] == 7).all()
    assert (held[start + rows * vocab :] == 7).all()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 1001), (3, 70_001), (70, 32_000)])
@pytest.mark.parametrize("start", [0, GUARD])
def test_equal_to_the_ordinary_way_to_the_bit(monkeypatch, isa, dtype, shape, start):
    torch.manual_seed(0)
    logits, labels = torch.randn(shape).to(dtype), torch.randint(shape[1], shape[:1])
    labels[shape[0] // 2 : shape[0] // 2 + shape[0] // 3] = -100
    plain, fresh = (gradient_between_guards(monkeypatch, logits, labels, f, start) for f in (False, True))
    assert torch.equal(plain, fresh)
    assert fresh.abs().sum() > 0 or shape == (1, 1)


@pytest.mark.parametrize("kind", ["backward", "one launch"])
def test_a_gradient_beyond_the_caches(kind):
    """40 MB in float32, so on the fresh way without being told; half of it masked, threads changed."""
    torch.manual_seed(0)
    rows, vocab = 640, 16_411
    logits, labels = torch.randn(rows, vocab), torch.randint(vocab, (rows,))
    labels[::2] = -100
    loss = fa.losses.SFTLoss(one_launch=kind == "one launch")
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
