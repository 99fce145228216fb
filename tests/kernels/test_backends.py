"""Choosing a backend and an instruction set: never silently, always with a reason."""

import asyncio
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch

import fastalign as fa
from fastalign import _backends

X, L = torch.randn(2, 5), torch.tensor([1, 2])


def python(code, **env):
    # Not in the source tree, whose fastalign/ would come before the installed one.
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        cwd=tempfile.gettempdir(),
    )


def test_the_backends_of_a_cpu_are_here():
    known = fa.backends()
    assert list(known) == ["cpu", "cuda", "triton", "eager"]
    assert known["cpu"] == known["eager"] == "available"


def test_automatic_choice():
    assert _backends.automatic(X) == "cpu"
    assert _backends.automatic(X.bfloat16()) == "cpu"
    assert _backends.automatic(X.double()) == "eager"
    assert _backends.automatic(X.to("meta")) == "eager"


def test_unknown_and_unfit_backends_are_refused():
    with (
        pytest.raises(ValueError, match="backend must be one of cpu, cuda, triton, eager; got 'tpu'"),
        fa.use_backend("tpu"),
    ):
        pass
    with fa.use_backend("cpu"), pytest.raises(RuntimeError, match=r"serves float32.*got torch\.float64 on cpu"):
        fa.token_logps(X.double(), L)


def test_use_backend_is_undone(monkeypatch):
    isa = _backends.cpu_isa()

    def fail():
        with fa.use_backend("eager", isa=_backends.cpu_isas()[-1]):
            assert _backends.choose(X) == "eager"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert _backends.choose(X) == "cpu"
    assert _backends.cpu_isa() == isa


def test_an_unavailable_backend_gives_its_reason(monkeypatch):
    monkeypatch.setattr(_backends.cpu, "_C", None)
    monkeypatch.setattr(_backends.cpu, "_C_ERROR", "it was never built")
    assert fa.backends()["cpu"] == "it was never built"
    assert _backends.automatic(X) == "eager"
    with pytest.raises(RuntimeError, match="backend 'cpu' is not available: it was never built"), fa.use_backend("cpu"):
        pass


@pytest.mark.parametrize("isa", _backends.cpu_isas())
def test_environment_forces_the_instruction_set(isa):
    code = "from fastalign import _backends as b; print(b.cpu_isa())"
    assert python(code, FASTALIGN_CPU_ISA=isa).stdout.strip() == isa


def test_environment_with_an_unknown_instruction_set():
    result = python("import fastalign", FASTALIGN_CPU_ISA="mmx")
    assert result.returncode != 0
    assert "FASTALIGN_CPU_ISA must be one of" in result.stderr
    assert "'mmx'" in result.stderr


def test_environment_forces_the_backend():
    code = "import torch; from fastalign import _backends as b; print(b.choose(torch.ones(1)))"
    assert python(code, FASTALIGN_BACKEND="eager").stdout.strip() == "eager"
    assert "FASTALIGN_BACKEND must be one of cpu, cuda" in python("import fastalign", FASTALIGN_BACKEND="gpu").stderr


def test_a_choice_is_its_threads_own():
    """Neither of two threads that are within a choice at once sees the other's, nor does one that chose nothing."""
    meet, seen = threading.Barrier(2, timeout=30), {}

    def work(name):
        with fa.use_backend(name):
            meet.wait()
            seen[name] = _backends.choose(X)
            meet.wait()
        seen[name, "after"] = _backends.choose(X)

    with fa.use_backend("eager"):
        threads = [threading.Thread(target=work, args=(name,)) for name in ("eager", "cpu")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert _backends.choose(X) == "eager"
    assert seen == {"eager": "eager", "cpu": "cpu", ("eager", "after"): "cpu", ("cpu", "after"): "cpu"}


def test_a_choice_is_its_tasks_own():
    """Tasks of one thread that take turns within their choices: of backends and of instruction sets."""
    best, worst = _backends.cpu_isas()[0], _backends.cpu_isas()[-1]

    async def work(name, isa, turns):
        found = set()
        with fa.use_backend(name, isa=isa):
            for _ in range(turns):
                await asyncio.sleep(0)
                found.add((_backends.choose(X), _backends.cpu_isa()))
        return found

    async def both():
        return await asyncio.gather(work("eager", worst, 5), work("cpu", None, 3), work("cpu", worst, 2))

    assert asyncio.run(both()) == [{("eager", worst)}, {("cpu", best)}, {("cpu", worst)}]
    assert (_backends.choose(X), _backends.cpu_isa()) == ("cpu", best)


DEVICE_THREADS = """
import sys, threading
sys.path.insert(0, sys.argv[1])
import stand_in_device, torch, fastalign as fa
registered = stand_in_device.register()
x = torch.randn(2, 5).to(stand_in_device.DEVICE).requires_grad_()
threads = []
x.register_hook(lambda _: threads.append(threading.get_ident()))
logps = fa.token_logps(x, torch.tensor([1, 2]).to(stand_in_device.DEVICE))
def backward(name):
    with fa.use_backend(name):
        try:
            torch.autograd.grad(logps.sum(), x, retain_graph=True)
        except RuntimeError as error:
            return str(error)
print(backward("eager"), backward("cpu"), backward(None), sep="|")
assert threads and threading.get_ident() not in threads
"""


def test_a_choice_holds_where_autograd_has_a_thread_of_its_own():
    """Of another device than the CPU torch runs the backward in a thread of the device's, whoever calls it."""
    for package in ("transformers", "accelerate"):
        pytest.importorskip(package, reason=f"needs {package} (the extra `train`)")
    folder = str(Path(__file__).parent)
    code = f"import sys; sys.argv[1:] = [{folder!r}]\n{DEVICE_THREADS}"
    done = python(code)
    none, refused, automatic = done.stdout.strip().split("|") if done.stdout else pytest.fail(done.stderr)
    assert (none, automatic) == ("None", "None")
    assert "backend 'cpu' serves float32" in refused
    assert "on standin" in refused
    assert done.returncode == 0, done.stderr


def test_importing_the_package_loads_no_torch_until_a_name_is_used():
    code = """
import sys
import fastalign, fastalign.utils.environment
assert "torch" not in sys.modules
try: fastalign.nothing
except AttributeError as error: print(error)
import fastalign.losses  # a module alone, before any name of the package
from fastalign import *
from fastalign import Head, use_backend as chosen
import fastalign as fa
missing = [name for name in fa.__all__ if name not in globals() or name not in dir(fa)]
assert chosen is fa.use_backend is fa.api.use_backend, missing
print(missing, fa.ops.__name__, fa.losses.DPOLoss.__name__, callable(fa.cross_entropy))
"""
    done = python(code)
    assert done.stdout == "module 'fastalign' has no attribute 'nothing'\n[] fastalign.ops DPOLoss True\n", done.stderr


def test_operators_are_registered_at_once_where_torch_is_there():
    assert python("import torch, fastalign\nprint(torch.ops.fastalign.token_stats)").stdout == "fastalign.token_stats\n"


def test_every_instruction_set_of_this_processor_is_built():
    """A build without AVX-512 on a machine that has it would be slow in silence."""
    try:
        with open("/proc/cpuinfo") as f:
            flags = set(next(line for line in f if line.startswith("flags")).split())
    except (OSError, StopIteration):
        pytest.skip("needs /proc/cpuinfo with x86 flags, which this machine does not have")
    assert "portable" in _backends.cpu_isas()
    assert ("avx2" in _backends.cpu_isas()) == {"avx2", "fma", "f16c"}.issubset(flags)
    avx512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    assert ("avx512_bf16" in _backends.cpu_isas()) == (avx512 | {"avx512_bf16"}).issubset(flags)
    assert ("avx512" in _backends.cpu_isas()) == avx512.issubset(flags)


def test_instruction_sets_agree():
    x, labels = torch.randn(7, 3001), torch.randint(0, 3001, (7,))
    results = []
    for isa in _backends.cpu_isas():
        with fa.use_backend("cpu", isa=isa):
            results.append(fa.token_logps(x, labels))
    for r in results[1:]:
        torch.testing.assert_close(r, results[0], rtol=3e-7, atol=0)


def test_probes_touch_every_byte():
    x = torch.ones(300_000)
    whole = x.numel() // 65536 * 65536
    assert _backends.probe_read(x) == pytest.approx(whole)
    y = torch.zeros_like(x)
    _backends.probe_copy(y, x)
    assert torch.equal(x, y)
