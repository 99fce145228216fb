"""Choosing a backend and an instruction set: never silently, always with a reason."""

import os
import subprocess
import sys
import tempfile

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
    assert "backend must be one of" in python(code, FASTALIGN_BACKEND="gpu").stderr


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
