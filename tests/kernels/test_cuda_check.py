"""bench/gpu_check.py, the check for whoever has a GPU: on one, and where there is none against stand-ins: a simulated
device, the CPU's kernels, a checker that only looks at what it is asked."""

import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import fastalign as fa

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu_check.py"
CHECKS = ("numbers", "graph", "options", "cases", "head", "gae", "sizes", "streams", "compiled", "trainers")


def load(name):
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(SCRIPT.parent))


@pytest.fixture
def gpu_check(monkeypatch):
    module = load("gpu_check")
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "VOCABS", (1, 7, 1000, 2049))
    return module


def test_right_numbers_pass_and_wrong_ones_do_not(cuda_simulator, gpu_check, monkeypatch):
    with cuda_simulator(), cuda_simulator.raising():
        assert gpu_check.check_numbers("cuda") == "right for 12 cases"
    monkeypatch.setattr(gpu_check, "DTYPES", (torch.float32,))
    monkeypatch.setattr(load("gpu.checks"), "MARGIN", -1.0)
    with cuda_simulator(), cuda_simulator.raising(), pytest.raises(SystemExit, match="float32, vocabulary 1: error"):
        gpu_check.check_numbers("cuda")


@pytest.mark.parametrize("name", ["options", "cases", "head", "gae", "sizes"])
def test_a_check_passes_and_can_fail(monkeypatch, name):
    """With the CPU's kernels: what is left for a GPU to show is the GPU."""
    checks = load("gpu.checks")
    monkeypatch.setattr(checks, "LONG", 1 << 23)
    monkeypatch.setattr(checks, "CASES", checks.CASES[::7])
    assert checks.CHECKS[name]("cpu", "cpu")
    monkeypatch.setattr(checks, "MARGIN", -1.0)
    monkeypatch.setattr(checks, "token_objective", lambda x, *_: (None, torch.zeros_like(x)))
    with pytest.raises(SystemExit, match=r"error|differ"):
        checks.CHECKS[name]("cpu", "cpu")


def test_the_check_of_the_trainers_passes_and_can_fail(monkeypatch, tmp_path):
    pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
    if torch.accelerator.is_available():
        pytest.skip("needs a machine without an accelerator: commands take it")
    trainers = load("gpu.trainers")
    assert "repeat and resume to the last bit" in load("gpu.checks").CHECKS["trainers"]("cpu", "cpu")
    bench = trainers.Bench(tmp_path, "cpu")
    with pytest.raises(SystemExit, match="sft in still: not changed"):
        bench.run("sft", "still", learning_rate=0.0)
    monkeypatch.setattr(bench, "device", "meta")
    with pytest.raises(SystemExit, match="is on cpu"):
        bench.run("sft", "elsewhere", use_cpu=True)
    monkeypatch.undo()
    run = bench.run
    monkeypatch.setattr(
        bench, "run", lambda name, folder, **more: run(name, folder, seed=int("again" in folder), **more)
    )
    with pytest.raises(SystemExit, match="dpo, the same seed again: "):
        bench.repeats("dpo")


@pytest.mark.parametrize("kind", ["meta", "cpu"])
def test_what_a_forward_pass_ran_on_is_seen(kind):
    trainers, layer = load("gpu.trainers"), torch.nn.Linear(2, 2)
    with trainers.ran_on() as kinds:
        layer.to(kind)(torch.zeros(2, device=layer.weight.device))
    assert kinds == {kind}


def test_trainers_and_commands_keep_to_a_device_that_is_not_the_cpu():
    """On a stand-in, whose operations take no tensors of the CPU. In a process of its own: torch then has the device
    for good."""
    pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
    if torch.accelerator.is_available():
        pytest.skip("needs a machine without an accelerator, whose part the stand-in takes")
    pytest.importorskip("torch.utils.backend_registration", reason="needs devices written in Python")
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("needs devices written in Python (torch 2.10)")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("stand_in_device.py"))],
        capture_output=True, text=True, check=False, cwd=tempfile.gettempdir(),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(backend, name):
    if fa.backends()[backend] != "available":
        pytest.skip(f"needs the backend {backend}: {fa.backends()[backend]}")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--backend", backend, "--only", name],
        capture_output=True, text=True, check=False, cwd=tempfile.gettempdir(),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_sanitizer_is_run_with_each_tool(gpu_check, monkeypatch, tmp_path):
    checker = tmp_path / "compute-sanitizer"
    checker.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n[ "$2" != synccheck ]\n')
    checker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(subprocess.CalledProcessError):  # the last tool finds something
        gpu_check.sanitize("cuda")
    asked = [line.split() for line in (tmp_path / "asked").read_text().splitlines()]
    assert [line[1] for line in asked] == ["memcheck", "racecheck", "initcheck", "synccheck"]
    assert all(
        line[2:4] == ["--error-exitcode", "1"] and line[-4:] == ["--only", "numbers", "options", "gae"]
        for line in asked
    )


def test_it_says_what_is_missing():
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a CUDA device")
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False, cwd=tempfile.gettempdir()
    )
    assert done.returncode == 1
    assert "backend 'cuda' is not available" in done.stderr
