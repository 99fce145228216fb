"""The CUDA backend as far as a machine without a GPU shows it: the build, what the assembler says of every kernel, why
the backend is unavailable, and the formulas that the kernels share with the host."""

import ctypes
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import fastalign as fa
from fastalign._backends import cuda

ROOT = Path(__file__).resolve().parents[2]
TESTS = Path(__file__).resolve().parent
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a", "sm_120")
MODES = ("plain", "moments", "reference", "diagnostics")


# ------------------------------------------------------------------------------------------------------ the build
@pytest.fixture(scope="module")
def usage():
    """Architecture → kernel → what the assembler said when the package was built."""
    if cuda._cuda is None:
        pytest.skip("needs a package built with nvcc")
    return json.loads(cuda._cuda.usage)


def name_of(mangled):
    """Kernel and mode of a mangled name; every element type, with and without a soft-cap, shares a limit."""
    kernel = re.search(r"\d([a-z_]+)_kernel[IE]", mangled)[1]
    mode = re.search(r"ModeE(\d)", mangled)
    return kernel if mode is None else f"{kernel} {MODES[int(mode[1])]}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_kernel_spills_or_outgrows_its_registers(usage, arch):
    if arch not in usage:
        pytest.skip(f"needs a package built for {arch} (FASTALIGN_CUDA_ARCHS=all)")
    recorded = json.loads((TESTS / "cuda_registers.json").read_text())[arch]
    kernels = usage[arch]
    # forward, backward and objective in 3 modes, and the forward of diagnostics, with and without a soft-cap, for
    # 3 dtypes; those for short rows, of one tile and of several, for 3 dtypes; scale in 3; gae in 2; loss
    assert len(kernels) == (3 * 3 + 1) * 2 * 3 + 3 * 2 * 3 + 3 + 2 + 1
    found = {}
    for mangled, entry in kernels.items():
        assert entry["spill_bytes"] == 0, mangled
        found[name_of(mangled)] = max(found.get(name_of(mangled), 0), entry["registers"])
    assert found.keys() == recorded.keys()
    grown = {name: (count, recorded[name]) for name, count in found.items() if count > recorded[name]}
    assert not grown, f"registers now, and recorded: {grown}"


def test_the_module_imports_without_driver_and_device():
    if cuda._cuda is None:
        pytest.skip("needs a package built with nvcc")
    code = "import fastalign._cuda as c; print(c.architectures)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tempfile.gettempdir(),
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    found = done.stdout.split()
    assert found
    assert found == [name for name in (*ARCHITECTURES, "compute_90") if name in found]
    assert found == list(cuda.ARCHITECTURES)


def test_a_call_without_a_driver_says_so():
    """The static runtime looks for a driver when it is first used; without one the call fails and touches nothing."""
    if cuda._cuda is None:
        pytest.skip("needs a package built with nvcc")
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a CUDA device")
    with pytest.raises(RuntimeError, match=r"fastalign scale on cuda:0: cudaError\w+"):
        cuda._cuda.scale(0, 0, 8, 0, 0, 0)
    cuda._cuda.scale(0, 0, 0, 0, 0, 0)  # nothing to do: no device is asked for


def test_the_reason_is_given():
    reason = fa.backends()["cuda"]
    if torch.cuda.is_available() and cuda._cuda is not None:
        assert reason == "available"
        return
    expected = "built without CUDA kernels" if cuda._cuda is None else "without CUDA|no CUDA device"
    assert re.search(expected, reason)
    with pytest.raises(RuntimeError, match=expected), fa.use_backend("cuda"):
        pass
    assert re.search(expected, cuda.serves(torch.zeros(2, 3), "tokens"))


@pytest.mark.parametrize(
    ("architecture", "runs", "does_not"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("sm_90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("sm_100a", [(10, 0)], [(10, 3), (12, 0)]),
        ("sm_120", [(12, 0), (12, 1)], [(10, 0)]),
        ("compute_90", [(9, 0), (10, 3), (13, 0)], [(8, 9)]),
    ],
)
def test_code_runs_on_its_own_generation(architecture, runs, does_not, monkeypatch):
    assert all(cuda._runs_on(architecture, capability) for capability in runs)
    assert not any(cuda._runs_on(architecture, capability) for capability in does_not)
    monkeypatch.setattr(cuda, "ARCHITECTURES", (architecture,))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [*runs, *does_not][index])
    reasons = [cuda._without_code.__wrapped__(i) for i in range(len(runs) + len(does_not))]
    assert reasons[: len(runs)] == [""] * len(runs)
    for reason, (major, minor) in zip(reasons[len(runs) :], does_not, strict=True):
        assert re.search(
            rf"(compute capability 8.0 and later|was built for {architecture}); got {major}.{minor}", reason
        )


def setup_py(**environment):
    return subprocess.run(
        [sys.executable, str(ROOT / "setup.py"), "--name"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH")} | environment,
    )


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
def test_the_builds_switch():
    pytest.importorskip("pybind11", reason="needs pybind11")
    pytest.importorskip("setuptools", reason="needs setuptools")
    refused = setup_py(FASTALIGN_CUDA="yes")
    assert refused.returncode != 0
    assert "FASTALIGN_CUDA must be auto, 0 or 1; got 'yes'" in refused.stderr
    assert setup_py(FASTALIGN_CUDA="0").returncode == 0
    with tempfile.TemporaryDirectory() as empty:
        assert setup_py(FASTALIGN_CUDA="auto", PATH=empty).returncode == 0
        missing = setup_py(FASTALIGN_CUDA="1", PATH=empty)
    if missing.returncode == 0:
        pytest.skip("needs an environment without the package nvidia-cuda-nvcc")
    assert "there is no nvcc: set CUDA_HOME, put nvcc on PATH, or install nvidia-cuda-nvcc" in missing.stderr


# ------------------------------------------------------------------------------------------------------ the formulas
@pytest.fixture(scope="module")
def formulas(tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("formulas") / "formulas.so"
    # Without contraction, and with float32 kept float32: as the device computes.
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(TESTS / "cuda_formulas.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def through(function, x):
    x = np.ascontiguousarray(x, dtype=np.float32)
    y = np.empty_like(x)
    function(*(ctypes.c_void_p(t.ctypes.data) for t in (x, y)), len(x))
    return y.astype(np.float64)


def test_exp2_polynomial(formulas):
    x = np.linspace(-126, 127, 1_000_001, dtype=np.float32)
    exact = np.exp2(x.astype(np.float64))
    assert np.abs(through(formulas.exp2_of, x) / exact - 1).max() < 2.5e-7
    assert through(formulas.exp2_of, np.arange(-126, 128)).tolist() == np.exp2(np.arange(-126, 128.0)).tolist()
    assert through(formulas.exp2_of, [-127.0, -200.0, -3e38, -np.inf]).tolist() == [0, 0, 0, 0]
    assert np.isnan(through(formulas.exp2_of, [np.nan])).all()


def test_tanh(formulas):
    x = np.concatenate([np.linspace(-12, 12, 1_000_001), np.logspace(-30, 0, 10001), [-3e38, 3e38]])
    x = x.astype(np.float32)[x != 0]
    assert np.abs(through(formulas.tanh_many, x) / np.tanh(x.astype(np.float64)) - 1).max() < 3.5e-7
    assert through(formulas.tanh_many, [0.0, -np.inf, np.inf]).tolist() == [0, -1, 1]


@pytest.mark.parametrize(("unit", "by"), [(1.0, 1.0), (30.0, 30 / math.log(2)), (1.1e-3, 0.5), (990.0, 990.0)])
def test_tanh_series(formulas, unit, by):
    """In the units that the kernels take it in, to the ends of the caps for which they do."""
    x = np.concatenate([np.linspace(-0.6, 0.6, 1_000_000), np.logspace(-15, -1, 1000)]).astype(np.float32)
    x = x * np.float32(unit)
    y = np.empty_like(x)
    pointers = (ctypes.c_void_p(t.ctypes.data) for t in (x, y))
    formulas.tanh_series_many(*pointers, len(x), ctypes.c_double(unit), ctypes.c_double(by))
    assert np.abs(y / (by * np.tanh(x.astype(np.float64) / unit)) - 1).max() < 2.5e-7


def test_natural_log(formulas):
    x = np.concatenate([np.logspace(-37, 38, 500_001), np.linspace(0.5, 2, 500_001)]).astype(np.float32)
    y = np.empty(len(x))
    formulas.natural_log_many(*(ctypes.c_void_p(t.ctypes.data) for t in (x, y)), len(x))
    assert np.abs(y - np.log(x.astype(np.float64))).max() < 5e-9
    special, y = np.array([0, np.inf, np.nan, 1], np.float32), np.empty(4)
    formulas.natural_log_many(*(ctypes.c_void_p(t.ctypes.data) for t in (special, y)), 4)
    np.testing.assert_array_equal(y, [-np.inf, np.inf, np.nan, 0])


def eager_row(x, z, label, temperature, g, dtype):
    """Statistics and gradient by plain PyTorch operations in the given dtype."""
    x = torch.tensor(x, dtype=dtype)[None].requires_grad_()
    z = torch.tensor(z, dtype=dtype)[None]
    with fa.use_backend("eager"):
        stats = fa.token_stats(x, torch.tensor([label]), ref_logits=z, kl=True, entropy=True, temperature=temperature)
    (gradient,) = torch.autograd.grad(sum(s.sum() * float(w) for s, w in zip(stats, g, strict=False)), x)
    return np.array([float(s.detach()) for s in stats]), gradient[0].double().numpy()


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("threads", [1, 32, 256])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sums_of_threads_become_statistics_and_a_gradient(formulas, threads, offset, temperature):
    """Threads with pivots of their own, merged in float32; entropy, KL and every coefficient from the sums."""
    random = np.random.default_rng(threads)
    vocab, label = 3001, 77
    x = (random.normal(0, 4, vocab) + offset).astype(np.float32)
    z = (x + random.normal(0, 0.3, vocab)).astype(np.float32)
    x[5], x[17::32] = x.max() + 30, np.finfo(np.float32).min  # a peak, and threads that have nothing
    z[17::32] = x[17::32]
    g = random.normal(0, 1, 5).astype(np.float32)
    g[4] = 0  # the mean of such a row overflows
    found, c = np.empty(9, np.float32), np.empty(9, np.float32)
    pointers = [ctypes.c_void_p(t.ctypes.data) for t in (x, z, g, found, c)]
    formulas.row(*pointers[:2], vocab, label, threads, ctypes.c_double(temperature), *pointers[2:])
    exact, gradient = eager_row(x, z, label, temperature, g, torch.float64)
    plain, plain_gradient = eager_row(x, z, label, temperature, g, torch.float32)
    errors = np.abs(found[:4] - exact)
    assert (errors <= np.abs(plain - exact) + 1e-6 * np.maximum(1, np.abs(exact))).all()
    # The canonical form, in float64: what is tested is the coefficients.
    by, at, ref_by, ref_at, *c = (float(number) for number in c)
    u, v = x.astype(np.float64) * by - at, z.astype(np.float64) * ref_by - ref_at
    power = np.exp2(u)
    terms = np.stack(np.broadcast_arrays(c[0], c[1] * u, -c[2] * v))
    terms = np.where(power == 0, 0, power * terms)
    ours = terms.sum(0) + c[3]
    ours[label] += c[4]
    # Where the reference gives the peak nothing, terms of 20 leave a slope below 1: each coefficient is a float32.
    rounding = 2.0**-24 * np.abs(terms).sum(0).max()
    assert np.abs(ours - gradient).max() <= np.abs(plain_gradient - gradient).max() + 1e-6 + rounding
