"""setup.py: what it decides to build, what it says where it cannot, and which objects it uses again."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module, without its call of setup."""
    pytest.importorskip("pybind11", reason="needs pybind11")
    setuptools = pytest.importorskip("setuptools", reason="needs setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.chdir(ROOT)
    for name in ("FASTALIGN_CUDA", "FASTALIGN_CUDA_ARCHS", "FASTALIGN_PURE"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("setup_under_test", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.sys, "platform", "linux")
    return module


@pytest.fixture
def machine(build, monkeypatch):
    """A function that says what the machine has: an nvcc or none, GPUs of some capabilities."""

    def has(nvcc, *gpus):
        monkeypatch.setattr(build, "nvcc_candidates", lambda: [sys.executable] if nvcc else [])
        monkeypatch.setattr(build, "gpus", lambda: list(gpus))

    return has


@pytest.mark.parametrize(
    ("given", "gpus", "targets"),
    [
        (None, [], ["80", "90a", "100a", "120", "ptx"]),
        (None, [(9, 0), (9, 0)], ["90a"]),
        (None, [(12, 0), (8, 6)], ["80", "120"]),
        (None, [(10, 3)], ["ptx"]),
        (None, [(7, 5), (8, 0)], ["80"]),
        ("all", [(9, 0)], ["80", "90a", "100a", "120", "ptx"]),
        ("sm_90a,ptx", [], ["90a", "ptx"]),
        ("80 120", [(9, 0)], ["80", "120"]),
    ],
)
def test_targets_are_those_of_the_gpus_or_as_asked(build, machine, monkeypatch, given, gpus, targets):
    machine(True, *gpus)
    monkeypatch.setenv("FASTALIGN_CUDA", "1")
    if given is not None:
        monkeypatch.setenv("FASTALIGN_CUDA_ARCHS", given)
    (nvcc, found), line = build.find_nvcc()
    assert (nvcc, found) == (sys.executable, targets)
    assert f"CUDA kernels for {', '.join(targets)}" in line


@pytest.mark.parametrize(
    ("nvcc", "gpus", "built", "words"),
    [
        (True, [], False, f"no NVIDIA driver shows a GPU; FASTALIGN_CUDA=1 builds them with {sys.executable}"),
        (False, [], False, "without CUDA kernels: no NVIDIA driver shows a GPU"),
        (True, [(7, 5)], False, "older than compute capability 8.0"),
        (True, [(7, 5), (9, 0)], True, "for 90a"),
        (False, [(9, 0)], False, "no nvcc in"),
    ],
)
def test_without_a_wish_a_gpu_decides_and_one_line_says_so(build, machine, nvcc, gpus, built, words):
    machine(nvcc, *gpus)
    chosen, line = build.find_nvcc()
    assert (chosen is not None) == built
    assert words in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FASTALIGN_CUDA_ARCHS", "75", "FASTALIGN_CUDA_ARCHS must be all or of 80, 90a, 100a, 120, ptx; got '75'"),
        ("FASTALIGN_PURE", "yes", "FASTALIGN_PURE must be 0 or 1; got 'yes'"),
    ],
)
def test_what_means_nothing_is_refused(build, machine, monkeypatch, name, value, message):
    machine(True)
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=message):
        build.extensions()


def test_pure_compiles_nothing(build, monkeypatch):
    monkeypatch.setenv("FASTALIGN_PURE", "1")
    assert build.extensions()[0] == []


def test_without_a_compiler_one_sentence_says_so(tmp_path):
    pytest.importorskip("pybind11", reason="needs pybind11")
    pytest.importorskip("setuptools", reason="needs setuptools")
    given = {"CC": "no-such-compiler", "CXX": "no-such-compiler", "FASTALIGN_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path), "-t", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | given, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    message = "fastalign needs a C++17 compiler, not there: no-such-compiler; install g++ or set CXX; FASTALIGN_PURE=1"
    assert message in done.stderr
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------------------ objects
def test_an_object_depends_on_all_that_it_includes_and_on_nothing_else(build, tmp_path, monkeypatch):
    for folder in ("kernels", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    unit = build.Unit("kernels/cpu/token_stats_cpu.cpp", "avx2", [], ("simd_avx2.h",))

    def changed_by(name):
        path, before = tmp_path / name, build.fingerprint(unit, ["-O3"])
        text = path.read_text()
        path.write_text(text + "\n")
        after = build.fingerprint(unit, ["-O3"])
        path.write_text(text)
        assert build.fingerprint(unit, ["-O3"]) == before
        return after != before

    of_it = ("cpu/token_stats_cpu.cpp", "cpu/token_rows_cpu.h", "loss_program.h", "cpu/simd_avx2.h", "cpu/simd_types.h")
    assert all(changed_by(f"kernels/{name}") for name in of_it)
    others = ("kernels/cpu/simd_avx512.h", "kernels/cpu/gae_cpu.cpp", "csrc/bindings.cpp")
    assert not any(changed_by(name) for name in others)
    assert build.fingerprint(unit, ["-O2"]) != build.fingerprint(unit, ["-O3"])


def test_an_object_is_made_once(build, tmp_path, monkeypatch, capsys):
    setuptools = pytest.importorskip("setuptools", reason="needs setuptools")
    monkeypatch.setattr(build, "OBJECTS", tmp_path)
    command, made = build.Build(setuptools.Distribution()), []
    unit = build.Unit("kernels/cpu/gae_cpu.cpp", "gae_cpu", [])

    def compile_to(folder):
        made.append(folder)
        Path(folder, "x.o").write_text(f"object {len(made)}")
        return os.path.join(folder, "x.o"), "said"

    command.start(3, "starting")
    first, again = (command.kept(unit, ["-O3"], compile_to) for _ in range(2))
    assert first == again == (first[0], "said")
    assert Path(first[0]).read_text() == "object 1"
    other = command.kept(unit, ["-O2"], compile_to)
    assert other[0] != first[0]
    assert len(made) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(": ")[2] for line in lines[1:]] == ["0 s", "as before", "0 s"]
    assert lines[3].startswith("fastalign: [3/3] kernels/cpu/gae_cpu.cpp")
    for count in range(20):
        command.kept(unit, [count], compile_to)
    assert len(list(tmp_path.glob("gae_cpu-*.o"))) == build.KEPT_OBJECTS


# ---------------------------------------------------------------------------------------------------------- a checkout
def test_an_import_of_sources_says_what_to_do(tmp_path):
    """The package's folder as it lies in a checkout: without the kernels, and with no installation to be seen."""
    shutil.copytree(ROOT / "fastalign", tmp_path / "fastalign", ignore=shutil.ignore_patterns("kernels", "*.so"))
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import fastalign"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert f"which are not installed: run `pip install .` in {tmp_path}" in last
