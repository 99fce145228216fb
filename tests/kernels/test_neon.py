"""The kernels for 64-bit Arm on a machine of another kind: cross-compiled, run by qemu, and held to float64 and, to the
bit, to the AVX2 kernels, which compute the same in the same lanes."""

from __future__ import annotations

import itertools
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import fastalign as fa
from fastalign import _backends
from fastalign._backends import TokenProgram

ROOT = Path(__file__).resolve().parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", ("qemu-aarch64-static", "qemu-aarch64")
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-Wall", "-Wextra"]
FLAGS += ["-Wno-unknown-pragmas", "-static", "-DFA_ISA=neon", '-DFA_ISA_NAME="neon"', '-DFA_SIMD_HEADER="simd_neon.h"']
SOURCES = ("tests/kernels/kernel_numbers.cpp", "kernels/cpu/token_stats_cpu.cpp", "kernels/cpu/fresh_pages.cpp")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
VOCABS = (1, 5, 67, 1003, 17_001)
OPTIONS = ((1.0, 0.0), (0.7, 20.0))  # temperature, soft-cap
# The project's rule: eager PyTorch's own error and a margin, relative for a number above 1 and absolute (nats) below.
MARGIN = 1e-6
# The program of one token without a step, whose loss is the first statistic.
THE_LOGPS = TokenProgram((), (), (), 0, (True,) + (False,) * 4, (True,) + (False,) * 4, struct.pack("4i", 0, 0, 0, 0))


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    """A function that gives an Arm program bytes and returns its answer."""
    emulator = next(filter(None, map(shutil.which, EMULATOR)), None)
    missing = [name for name, there in ((COMPILER, shutil.which(COMPILER)), (EMULATOR[0], emulator)) if not there]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")
    if not (ROOT / SOURCES[1]).exists():
        pytest.skip("needs the source tree")
    program = tmp_path_factory.mktemp("arm") / "kernels"
    subprocess.run([COMPILER, *FLAGS, *(str(ROOT / s) for s in SOURCES), "-o", str(program)], check=True)
    return lambda data: subprocess.run([emulator, str(program)], input=data, capture_output=True, check=True).stdout


def raw(t):
    """A tensor's bytes."""
    return t.contiguous().view(torch.int16 if t.element_size() == 2 else torch.uint8).numpy().tobytes()


def problem(rows, vocab, dtype, seed=0):
    """Logits of every size with one row all -inf but for a few and one with NaN, a reference, labels and weights."""
    g = torch.Generator().manual_seed(seed + vocab)
    x = 3 * torch.randn(rows, vocab, generator=g)
    x[1] *= 40  # sure rows
    x[2, ::2] = -torch.inf if vocab > 1 else 0.0
    x[3, vocab // 2] = torch.nan
    z = (x + 0.3 * torch.randn(rows, vocab, generator=g)).to(dtype)
    labels = torch.randint(0, vocab, (rows,), generator=g)
    labels[2], labels[4] = min(1, vocab - 1), -100
    return x.to(dtype), z, labels, torch.randn(5, rows, generator=g)


def asked(given, moments, reference, options):
    """The bytes of a call of the program."""
    x, z, labels, weights = given
    head = struct.pack("6q2d", 1, DTYPES[x.dtype], *x.shape, moments + 2 * reference, -100, *options)
    return head + raw(x) + (raw(z) if reference else b"") + raw(labels) + raw(weights)


class Answer:
    """What the program wrote, piece by piece."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, dtype, *shape):
        count = int(np.prod(shape)) * dtype.itemsize
        piece, self.at = self.data[self.at : self.at + count], self.at + count
        return torch.frombuffer(bytearray(piece), dtype=dtype).view(shape)


def here(given, moments, reference, options):
    """The same through a backend of this machine: statistics [5, rows], the gradient of their weighted sum, and that of
    the weighted logps, in one launch where the backend has it."""
    x, z, labels, weights = given
    call = _backends.TokenCall(x, labels, z if reference else None, -100, *options)
    backend, wanted = _backends.pick(x), (True, True, moments, reference, moments)
    *found, saved = backend.forward(call, moments, moments)
    grads = tuple(w if there else None for w, there in zip(weights.to(found[0].dtype), wanted, strict=True))
    gradient, plain = torch.empty_like(x), torch.empty_like(x)
    backend.backward(call, saved, found[2], found[3], grads, gradient)
    call = call._replace(reference=None)
    if backend is _backends.cpu:
        backend.objective(call, THE_LOGPS, grads[0], (), False, plain)
    else:
        *_, saved = backend.forward(call, False, False)
        backend.backward(call, saved, None, None, (grads[0], None, None, None, None), plain)
    return torch.stack([torch.zeros_like(found[0]) if s is None else s for s in found]), gradient, plain


@pytest.fixture(scope="module")
def answers(arm):
    """(what was asked, Arm's answer) of every dtype, vocabulary, statistic and option, by one run of the program."""
    forms = itertools.product(DTYPES, VOCABS, (False, True), (False, True), OPTIONS)
    asks = [(problem(7, vocab, dtype), *form) for dtype, vocab, *form in forms]
    answer = Answer(arm(b"".join(asked(*ask) for ask in asks)))
    found = []
    for ask in asks:
        x = ask[0][0]
        found.append(
            (ask, (answer.take(torch.float32, 5, len(x)), *(answer.take(x.dtype, *x.shape) for _ in range(2))))
        )
    assert answer.at == len(answer.data)
    return found


def test_statistics_and_gradients_are_exact(answers):
    for (given, *form), ours in answers:
        x, z, labels, weights = given
        with fa.use_backend("eager"):
            exact = here((x.double(), z.double(), labels, weights), *form)
            eager = here(given, *form)
        rows = [0, 1, 2, 4, 5, 6]  # but that with NaN
        for name, o, e, p in zip(("statistics", "gradient", "one launch"), ours, exact, eager, strict=True):
            o, e, p = (t[:, rows] if name == "statistics" else t[rows] for t in (o.double(), e, p.double()))
            assert torch.equal(o.isinf(), e.isinf()), name  # the mean of the row that has -inf
            o, e, p = (t[~e.isinf()] for t in (o, e, p))
            allowed = (p - e).abs().max() + MARGIN * max(1.0, e.abs().max())
            assert (o - e).abs().max() <= allowed, (name, x.dtype, x.shape, form, float((o - e).abs().max()))


def test_a_row_with_nan_is_nan(answers):
    for _, (found, gradient, plain) in answers:
        assert found[:2, 3].isnan().all()
        assert gradient[3].isnan().any()
        assert plain[3].isnan().any()


def test_the_bits_are_those_of_avx2(answers):
    if "avx2" not in _backends.cpu_isas():
        pytest.skip("needs a processor with AVX2")
    with fa.use_backend("cpu", isa="avx2"):
        for ask, ours in answers:
            for name, a, b in zip(("statistics", "gradient", "one launch"), ours, here(*ask), strict=True):
                assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), (
                    name,
                    ask[0][0].dtype,
                    ask[0][0].shape,
                    ask[1:],
                )


@pytest.mark.parametrize("types", list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_products(arm, types):
    """To the bit those of AVX2 where there is one, and those of float64 within the rounding of float32 sums."""
    m, n, k = 19, 37, 300
    g = torch.Generator().manual_seed(0)
    a, b, out = (torch.randn(*shape, generator=g) for shape in ((m, k), (k, n), (m, n)))
    a, b = a.to(types[0]), b.to(types[1])
    head = struct.pack("6q", 2, DTYPES[a.dtype], DTYPES[b.dtype], m, n, k)
    ours = Answer(arm(head + raw(a) + raw(b) + raw(out))).take(torch.float32, m, n)
    exact = out.double() + a.double() @ b.double()
    # k additions and a last one, each of relative error 2^-24 of a sum that the numbers' magnitudes bound.
    bound = (k + 1) * 2.0**-24 * (out.double().abs() + a.double().abs() @ b.double().abs())
    assert ((ours - exact).abs() <= bound).all()
    if "avx2" in _backends.cpu_isas():
        with fa.use_backend("cpu", isa="avx2"):
            _backends.cpu.add_product(out, a, b, first=False)
        assert torch.equal(ours, out)
