"""What the CUDA kernels read, write and are bound by, counted by a PTX simulator on the figures of an H100. No time is
predicted: a lower bound says what a kernel cannot beat, and which limit it meets first."""

from types import SimpleNamespace

import pytest
import torch

from fastalign._backends import cuda
from fastalign.ops.call import TokenCall
from fastalign.ops.token_programs import trace_token

ROWS = 132  # one for each multiprocessor
CHIP = "H100"


def clip(t):
    """PPO's loss of a token."""
    ratio = (t.logps - t.old).clamp(-60, 60).exp()
    return torch.maximum(-t.advantages * ratio, -t.advantages * ratio.clamp(0.8, 1.2))


def clip_and_more(t):
    smoothed = SimpleNamespace(logps=0.9 * t.logps + 0.1 * (t.mean - t.lse), old=t.old, advantages=t.advantages)
    return clip(smoothed) + 0.05 * (smoothed.logps - t.old).square() - 0.01 * t.entropy


CLIP = trace_token(clip, ("old", "advantages"))
KERNELS = ("forward", "backward", "objective")


def launch(simulator, vocab, dtype, misaligned=0):
    """Forward, backward and one-launch objective of the same logits; kernel → launches."""
    rows = ROWS if vocab > 4096 else 8 * ROWS * 2  # eight short rows to a block
    x = torch.empty(rows * vocab + misaligned).normal_(0, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = x[misaligned:].view(rows, vocab)
    out, row = torch.empty_like(x), torch.ones(rows)
    labels = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(1))
    call = TokenCall(x, labels, None, -100, 1.0, 0.0)
    with simulator() as launches, simulator.raising():
        saved = cuda.forward(call, False, False)[5]
        cuda.backward(call, saved, None, None, (row, None, None, None, None), out)
        cuda.objective(call, CLIP, row, (-row, row), False, out)
        found = {"forward": launches[:1], "backward": launches[1:2], "objective": launches[2:]}
    return x, found


def passes(launches, x, key):
    size = x.numel() * x.element_size()
    return sum(b[key] for one in launches for b in one.stats.raw["buffers"] if b["size"] == size) / size


def margin(one):
    """Memory's lower bound over the next one."""
    bound = one.stats.bound(CHIP)
    return bound["t_mem"] / max(bound[f"t_{name}"] for name in ("issue", "sfu", "shared"))


@pytest.mark.parametrize(
    ("vocab", "dtype", "misaligned"),
    [
        (1000, torch.bfloat16, 0),
        (4096, torch.bfloat16, 0),
        (32000, torch.bfloat16, 0),
        (50257, torch.bfloat16, 0),
        (50257, torch.bfloat16, 1),
        (128256, torch.bfloat16, 0),
        (128256, torch.float16, 3),
        (151936, torch.float32, 0),
        (151937, torch.bfloat16, 0),
        (256000, torch.bfloat16, 0),
    ],
)
def test_one_read_and_one_write(cuda_simulator, vocab, dtype, misaligned):
    x, found = launch(cuda_simulator, vocab, dtype, misaligned)
    for kernel in KERNELS:
        assert len(found[kernel]) == 1
        assert 0.999 <= passes(found[kernel], x, "read_bytes") <= 1.01, kernel
        written = passes(found[kernel], x, "write_bytes")
        assert written == 0 if kernel == "forward" else 0.999 <= written <= 1.01, kernel
        raw = found[kernel][0].stats.raw
        assert found[kernel][0].stats.bank_conflicts <= 0.05 * raw["shared_wavefronts"], kernel
    if dtype == torch.bfloat16 and not misaligned:
        assert margin(found["forward"][0]) >= 1.8
        assert margin(found["backward"][0]) >= 2
        # Each of the ten steps of the loss's program takes up to 90 instructions, forward and backward, of one warp for
        # the eight short rows of its block, whose logits take 5,200 altogether. Of long rows they and the question
        # whether a row is sure of its target leave 1.989 at least.
        assert margin(found["objective"][0]) >= (1.7 if vocab <= 1000 else 1.98)


@pytest.mark.parametrize(("arch", "vocab", "steps"), [("sm_80", 32000, 1), ("sm_80", 128256, 2), ("sm_120", 151936, 1)])
def test_a_row_that_does_not_fit_is_read_twice(cuda_simulator, arch, vocab, steps):
    """The launch code's choice on other devices, with the same kernels."""
    cuda_simulator.pretend(arch)
    try:
        x, found = launch(cuda_simulator, vocab, torch.bfloat16)
    finally:
        cuda_simulator.pretend("sm_90a")
    assert len(found["objective"]) == steps
    assert passes(found["objective"], x, "read_bytes") == pytest.approx(steps, rel=0.01)
    assert passes(found["objective"], x, "write_bytes") == pytest.approx(1, rel=0.01)


def test_two_reads_give_the_same_gradient(cuda_simulator):
    g = torch.Generator().manual_seed(0)
    x, row = (torch.randn(5, 100000, generator=g) * 3).bfloat16(), torch.randn(5, generator=g)
    labels = torch.randint(0, 100000, (5,), generator=g)
    labels[3] = -100
    call = TokenCall(x, labels, None, -100, 0.8, 0.0)
    program, results = trace_token(clip_and_more, ("old", "advantages")), []
    assert program.inputs == ("old", "advantages")
    for arch in ("sm_90a", "sm_80"):
        cuda_simulator.pretend(arch)
        out = torch.empty_like(x)
        with cuda_simulator(), cuda_simulator.raising():
            stats = cuda.objective(call, program, row.abs(), (row - 9, row), True, out)
        results.append((stats, out))
    cuda_simulator.pretend("sm_90a")
    (one, a), (two, b) = results
    for s, t in zip(one, two, strict=True):
        assert (s is None) == (t is None)
        assert s is None or torch.allclose(s, t, rtol=1e-6, atol=2e-6)
    assert torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize("vocab", [1001, 50257, 128256])
def test_diagnostics_come_with_the_one_read(cuda_simulator, vocab):
    x = (2 * torch.randn(ROWS, vocab, generator=torch.Generator().manual_seed(vocab))).bfloat16()
    labels = torch.arange(ROWS)
    call = TokenCall(x, labels, None, -100, 1.0, 0.0)
    with cuda_simulator() as launches, cuda_simulator.raising():
        *_, found, best = cuda.forward(call, True, True, True)
    assert len(launches) == 1
    assert 0.999 <= passes(launches, x, "read_bytes") <= 1.05  # the tile of the largest is looked at once more
    assert torch.equal(best, x.argmax(-1))
    exact = (2 * x.double().log_softmax(-1)).logsumexp(-1)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
