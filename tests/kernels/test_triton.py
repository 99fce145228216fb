"""The Triton kernels without a GPU: interpreted, compiled ahead of time, and simulated where there is a simulator."""

from __future__ import annotations

import functools
import importlib
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import fastalign as fa
from fastalign import _backends
from fastalign.ops.call import TokenCall

pytest.importorskip("triton", reason="needs the package triton")
ROOT = Path(__file__).resolve().parents[2]
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
KINDS = ("forward", "backward", "objective")
VOCABS = (1000, 4000, 32000, 151937)
"""In bfloat16 and float32 together: rows in registers, on 1 to 32 warps, walked over, and read twice."""


@functools.cache
def static(name="gpu.triton"):
    """A module of bench/, whose modules import each other by plain names."""
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "bench"))


# ------------------------------------------------------------------------------------------------------- interpreted
def test_in_the_interpreter():
    """Every test of `interpreted_triton.py`, in two processes that share its dtypes."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(Path(__file__).with_name("interpreted_triton.py")), "-q", "-x"]
    command += ["--import-mode=importlib", "-p", "no:cacheprovider", f"--rootdir={tempfile.gettempdir()}"]
    running = [
        subprocess.Popen(
            [*command, "-k", selection],
            env=environment,
            cwd=tempfile.gettempdir(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for selection in ("no_less_exact and not float16", "not no_less_exact or (no_less_exact and float16)")
    ]
    for process in running:
        output, _ = process.communicate()
        assert process.returncode == 0, output[-4000:]
        assert " passed" in output
        assert " skipped" not in output


# -------------------------------------------------------------------------------------------------------- the choice
def test_it_serves_gpus_alone():
    assert "serves float32, bfloat16, float16 tensors on cuda or xpu" in _backends.triton.serves(
        torch.empty(1), "tokens"
    )
    assert "got torch.float64 on meta" in _backends.triton.serves(
        torch.empty(1, dtype=torch.float64, device="meta"), "gae"
    )


def test_it_has_a_reason_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    assert "no CUDA, ROCm or XPU device" in fa.backends()["triton"]
    with pytest.raises(RuntimeError, match="backend 'triton' is not available"), fa.use_backend("triton"):
        pass


def test_importing_fastalign_does_not_import_triton():
    code = "import sys, fastalign; fastalign.backends(); print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tempfile.gettempdir())
    assert done.stdout.strip() == "False"


def everything_program(row):
    """PPO with every term and every statistic, and what its program is given."""
    from fastalign.ops.token_programs import trace_token

    def loss(t):
        logps = 0.9 * t.logps + 0.1 * (t.mean - t.lse)
        ratio = (logps - t.old).clamp(-60, 60).exp()
        policy = torch.maximum(-t.advantages * ratio, -t.advantages * ratio.clamp(0.8, 1.3))
        bounded = torch.where((t.advantages < 0) & (policy > -3 * t.advantages), -3 * t.advantages, policy)
        return bounded + 0.1 * t.kl - 0.01 * t.entropy + 0.01 * t.lse.square()

    program = trace_token(loss, ["old", "advantages"])
    return program, (row,) * len(program.inputs)


# ---------------------------------------------------------------------------------------------------------- compiled
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_spills_and_16_byte_accesses(arch, dtype):
    """The default configurations, ahead of time for every architecture."""
    for row in static().rows(False, archs=[arch], dtypes=[dtype], vocabs=VOCABS):
        assert row.spill_bytes == 0, row
        assert row.vector_bytes == 16, row
        assert row.registers <= 128, row


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_no_spills_with_everything_asked_for(arch, dtype):
    """Entropy, exact KL, label smoothing, soft-cap, diagnostics: the largest kernels."""
    from fastalign.kernels.triton import objectives_triton, token_stats_triton

    def inputs(vocab):
        return torch.empty(2, vocab, dtype=dtype), torch.zeros(2, dtype=torch.int64), torch.ones(2)

    options, lanes = (-100, 0.7, 30.0), static().TARGETS[arch].warp_size
    program, given = everything_program(torch.ones(2))
    x, labels, w = inputs(16000)
    half, call = x[:, :8000], TokenCall(x, labels, x, *options)
    launches = [
        *token_stats_triton.forward(TokenCall(half, labels, half, *options), True, True, True, lanes=lanes)[0],
        *token_stats_triton.forward(call, True, True, True, lanes=lanes)[0],
        *token_stats_triton.backward(call, torch.zeros(2, 4), w, w, (w,) * 5, x),
    ]
    for vocab in (8000, 32000):  # in registers, and read twice
        x, labels, w = inputs(vocab)
        call = TokenCall(x, labels, x, *options)
        launches += objectives_triton.objective(call, program, w, given, True, x, lanes=lanes)[0]
    assert [launch.arguments.get("FITS") for launch in launches] == [True, False, None, True, False]
    for launch in launches:
        made = static().compiled(launch, arch)
        assert made.spill_bytes == 0, launch.kernel
        assert made.vector_bytes == 16, launch.kernel


def test_nothing_compiles_for_a_new_shape():
    """Constants and types of a kernel are the same for any batch, strides and vocabularies of a configuration."""
    module = static()
    one = module.signature(module.plan("forward", torch.empty(2, 32000), torch.zeros(2, dtype=torch.int64))[0])
    other = module.plan("forward", torch.empty(3, 5, 40000)[:, 1:, :39999], torch.zeros(3, 4, dtype=torch.int64))[0]
    assert module.signature(other) == one
    for parameter in other.kernel.params:
        if not parameter.is_constexpr:
            number = parameter.annotation_type
            assert parameter.do_not_specialize_on_alignment or parameter.do_not_specialize or number.startswith("fp")


# --------------------------------------------------------------------------------------------------------- simulated
def exact(logits, labels):
    """(log-probabilities of the labels, gradient of their sum) in float64."""
    logp = torch.log_softmax(logits.double(), -1)
    gradient = -logp.exp()
    gradient.scatter_add_(-1, labels.unsqueeze(-1), torch.ones_like(logp[..., :1]))
    return logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1), gradient


# bfloat16: a forward that reads once and is bound by memory 1.5 times over; 1.8 times where it writes as well.
@pytest.mark.parametrize("vocab", [1000, 1001, 32000, 128256, 151937])
def test_traffic_margin_and_numbers(vocab):
    pytest.importorskip("ptxsim", reason="needs the PTX simulator ptxsim")
    module, limits = static(), static("gpu.row").limits
    logits = torch.randn(module.ROWS, vocab, generator=torch.Generator().manual_seed(vocab)).mul_(2).bfloat16()
    labels = torch.randint(vocab, (module.ROWS,))
    logps, gradient = exact(logits[:9], labels[:9])
    margins = {"forward": 1.5, "backward": 1.8, "objective": 1.8}
    for kind in KINDS:
        launch, results = module.plan(kind, logits, labels)
        stats = module.simulated(launch, module.compiled(launch, "sm_90"))
        bound, margin = limits(stats)
        two = kind == "objective" and not launch.arguments["FITS"]
        assert 1 <= stats.read_passes("x_ptr") / (2 if two else 1) <= 1.02
        assert bound == "memory"
        assert margin >= margins[kind]
        # Sectors of a request: 16 bytes a lane are 16 whole sectors, and two more where a row starts off a boundary.
        buffer = stats.buffer("x_ptr")
        assert buffer["read_sectors"] * 32 <= 1.1 * buffer["read_bytes"] + 64 * module.ROWS
        if kind != "backward":
            torch.testing.assert_close(results["logps"][:9].double(), logps, rtol=1e-5, atol=1e-5)
        if kind != "forward":
            assert 1 <= stats.write_passes("out_ptr") <= 1.02
            sign = 1 if kind == "backward" else -1
            error = (sign * results["out"][:9].double() - gradient).norm() / gradient.norm()
            assert error <= 2**-8
        else:
            assert stats.write_passes("x_ptr") == 0


@pytest.mark.parametrize("vocab", [1001, 40001])
def test_diagnostics_in_the_compiled_code(vocab):
    """In the one read of the others, in registers and in a walk; of equal logits the first, wherever a row starts."""
    pytest.importorskip("ptxsim", reason="needs the PTX simulator ptxsim")
    from fastalign.kernels.triton import token_stats_triton

    x = (2 * torch.randn(32, vocab, generator=torch.Generator().manual_seed(vocab))).bfloat16()
    x[8:, vocab // 3 :: 50] = 11.0
    x[3, 7], x[5] = torch.nan, -torch.inf
    labels = torch.arange(32)
    labels[1] = -100
    call = TokenCall(x, labels, None, -100, 1.0, 0.0)
    launches, (*_, found, best) = token_stats_triton.forward(call, True, False, True)
    for launch in launches:
        stats = static().simulated(launch, static().compiled(launch, "sm_90"))
    assert stats.read_passes("x_ptr") <= 1.05
    rows = torch.tensor([i for i in range(32) if i not in (1, 3, 5)])
    assert best[[1, 3, 5]].tolist() == [-1] * 3
    assert torch.equal(best[rows], x[rows].argmax(-1))
    exact_numbers = (2 * x[rows].double().log_softmax(-1)).logsumexp(-1)
    torch.testing.assert_close(found[rows].double(), exact_numbers, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_statistic_in_the_compiled_code(dtype):
    """What the interpreter cannot show: the compiler's contractions, NaN and -inf, odd rows, in place, a masked row."""
    pytest.importorskip("ptxsim", reason="needs the PTX simulator ptxsim")
    from fastalign.kernels.eager import token_stats_eager
    from fastalign.kernels.triton import token_stats_triton

    offset = 1e4 if dtype == torch.float32 else 1e3
    x, z = ((offset + torch.randn(4, 1003)).to(dtype) for _ in range(2))
    x[1, 5:300] = -torch.inf
    x[2] = torch.nan
    labels = torch.tensor([7, 900, -100, 1002])
    options = (-100, 0.7, 0.0)
    grads = tuple(torch.randn(4) for _ in range(4))
    call, wide = TokenCall(x, labels, z, *options), TokenCall(x.double(), labels, z.double(), *options)
    launches, results = token_stats_triton.forward(call, True, False)
    want = token_stats_eager.forward(wide, True, False)
    plain = token_stats_eager.forward(call, True, False)
    for launch in launches:
        static().simulated(launch, static().compiled(launch, "sm_90"), check_uninit=True, check_races=True)
    for got, exact_value, eager in zip(results[:4], want[:4], plain[:4], strict=True):
        assert (got - exact_value).abs().max() <= 1.5 * (eager - exact_value).abs().max() + 2e-6
    out, expected = x.clone(), torch.empty_like(x, dtype=torch.float64)
    token_stats_eager.backward(wide, want[5], *want[2:4], (*grads, None), expected)
    over = call._replace(logits=out)
    for launch in token_stats_triton.backward(over, results[5], *results[2:4], (*grads, None), out):
        static().simulated(launch, static().compiled(launch, "sm_90"))
    unit = 2**-11 if dtype == torch.float16 else 1e-5
    assert (out - expected).norm() <= unit * expected.norm()
    assert not out[2].any()
    assert math.isfinite(float(out.sum()))


@pytest.mark.parametrize(
    ("dtype", "everything"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float16, False), (torch.bfloat16, True)],
    ids=str,
)
@pytest.mark.parametrize("vocab", [1001, 40001])
def test_a_row_knows_nothing_of_its_place_in_the_compiled_code(dtype, everything, vocab):
    """Equal rows of an odd length start at every offset from a 16-byte boundary, and have equal bits: statistics,
    gradients and the objective in one launch; in registers and in a walk; of a likely target and one so unlikely that
    its row is summed twice."""
    pytest.importorskip("ptxsim", reason="needs the PTX simulator ptxsim")
    from fastalign.kernels.triton import objectives_triton, token_stats_triton

    generator = torch.Generator().manual_seed(vocab)
    x, z = ((3 * torch.randn(1, vocab, generator=generator)).to(dtype).repeat(16, 1) for _ in range(2))
    x[:, 78] = -40
    labels, w = torch.tensor([77] * 8 + [78] * 8), torch.ones(16)
    ref, more = (z, w) if everything else (None, None)
    options = (-100, 0.7, 30.0 if everything else 0.0)
    program, given = everything_program(w) if everything else (static().SFT, ())
    outs = torch.empty_like(x), torch.empty_like(x)
    call = TokenCall(x, labels, ref, *options)
    forward, found = token_stats_triton.forward(call, everything, everything, everything)
    grads = (w, w, more, more, None)
    back = token_stats_triton.backward(call, found[5], found[2], found[3], grads, outs[0])
    one, again = objectives_triton.objective(call, program, w, given, everything, outs[1])
    for launch in (*forward, *back, *one):
        static().simulated(launch, static().compiled(launch, "sm_90"))
    for number in (*found, *again, *outs):
        assert number is None or (number[:8] == number[:1]).all()
        assert number is None or (number[8:] == number[8:9]).all()


def test_advantages_in_the_compiled_code():
    pytest.importorskip("ptxsim", reason="needs the PTX simulator ptxsim")
    from fastalign.kernels.eager import gae_eager
    from fastalign.kernels.triton import gae_triton

    rewards, values, mask = torch.randn(3, 1300), torch.randn(3, 1300), torch.rand(3, 1300) < 0.8
    (launch,), results = gae_triton.gae(rewards, values, mask, 0.99, 0.95)
    static().simulated(launch, static().compiled(launch, "sm_90"))
    for got, want in zip(results, gae_eager.gae(rewards, values, mask, 0.99, 0.95), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
