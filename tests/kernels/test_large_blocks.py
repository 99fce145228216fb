"""Large results on the CPU take memory that earlier ones left, and hold on to no more than was in use at once."""

import subprocess
import sys
import tempfile

import pytest
import torch

import fastalign as fa
from fastalign import _backends
from fastalign._backends import cpu

pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason="the compiled CPU kernels are not built")

MIB = 1 << 20
LIKE = torch.zeros((), dtype=torch.float32)


def large(mib):
    return _backends.empty((mib, MIB // 4), LIKE)


@pytest.fixture(autouse=True)
def empty_stock():
    fa.keep_memory(1 << 30)
    fa.release_memory()
    yield
    fa.release_memory()
    fa.keep_memory(_backends.cache._default_limit())


def held():
    return cpu._C.HeldBlock.kept_bytes() // MIB


def test_freed_memory_is_used_again():
    first = large(40)
    first.fill_(7)
    where = first.data_ptr()
    assert where % (2 * MIB) == 0
    assert held() == 0
    del first
    assert held() == 40
    second = large(40)
    assert second.data_ptr() == where
    assert bool((second == 7).all())
    assert held() == 0


def test_views_and_storages_keep_a_block():
    block = large(40)
    row, storage = block[3], block.untyped_storage()
    del block
    assert held() == 0
    del row
    assert held() == 0
    del storage
    assert held() == 40


def test_smaller_ones_fit_into_it_but_not_much_smaller_ones():
    block = large(100)
    where = block.data_ptr()
    del block
    assert large(50).data_ptr() == where
    assert held() == 100
    other = large(40)
    assert other.data_ptr() != where
    assert held() == 0  # 140 MiB were never in use at once
    del other


def test_no_more_is_kept_than_was_in_use_at_once():
    sizes = [36, 80, 50, 170, 34, 60, 120, 90]
    for size in sizes:
        block = large(size)
        assert held() + block.nbytes // MIB <= max(sizes)
        del block
        assert held() <= max(sizes)
    together = [large(size) for size in (40, 90, 200)]
    del together
    assert 330 <= held() <= 360  # one of them had a block of 120


def test_a_limit():
    fa.keep_memory(100 * MIB)
    blocks = [large(60), large(40), large(36)]
    del blocks[0]
    assert held() == 60
    blocks.clear()
    assert held() in (96, 100)  # whichever of the two was freed first
    fa.keep_memory(50 * MIB)
    assert held() <= 50
    fa.keep_memory(0)
    assert held() == 0
    del blocks
    block = large(40)
    del block
    assert held() == 0


def test_release_says_how_much_that_was():
    blocks = [large(40), large(64)]
    assert fa.release_memory() == 0
    del blocks
    assert fa.release_memory() == 104 * MIB
    assert fa.release_memory() == 0


def test_a_negative_limit():
    with pytest.raises(ValueError, match="limit must be a number of bytes, 0 or more; got -1"):
        fa.keep_memory(-1)


def test_more_than_there_is():
    with pytest.raises(MemoryError):
        cpu._C.HeldBlock(1 << 60)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_gradient_that_is_still_held_is_not_written_over(inplace):
    """Two backwards through the same loss, and a step that is over."""
    x = torch.randn(300, 32_000, requires_grad=True)
    y = torch.randint(32_000, (300,))
    loss = fa.cross_entropy(x, y)
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    kept = first.clone()
    second = torch.autograd.grad(2 * loss, x)[0]
    assert torch.equal(first, kept)
    assert torch.equal(second, 2 * kept)
    del first, second
    z = (x * 1) if inplace else x
    module = fa.losses.SFTLoss(inplace_backward=inplace)
    torch.testing.assert_close(torch.autograd.grad(module(z, y).loss, x)[0], kept)
    assert torch.equal(fa.cross_entropy(x.detach(), y), loss.detach())


def test_a_gradient_becomes_a_leafs_own():
    x = torch.randn(300, 32_000, requires_grad=True)
    y = torch.randint(32_000, (300,))
    for times in (1, 2):
        fa.cross_entropy(x, y).backward()
        torch.testing.assert_close(x.grad, times * torch.autograd.grad(fa.cross_entropy(x, y), x)[0])
    x.grad = None
    assert held() > 0


def test_environment_variable():
    code = "import fastalign as fa, torch\nfrom fastalign import _backends\n"
    code += "x = _backends.empty((64 << 20,), torch.zeros(()), torch.int8)\ndel x\n"
    code += "print(_backends.cpu._C.HeldBlock.kept_bytes() >> 20)"
    for value, expected in (("0", "0"), ("63", "0"), ("64", "64"), ("many", "")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"FASTALIGN_KEPT_MIB": value, "PATH": ""},
            capture_output=True,
            text=True,
            cwd=tempfile.gettempdir(),
        )
        assert done.stdout.strip() == expected, done.stderr
    assert "FASTALIGN_KEPT_MIB must be a whole number of MiB, 0 for none; got 'many'" in done.stderr
