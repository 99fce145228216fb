"""bench/gpu_check.py, the check for whoever has a GPU, against stand-ins: a simulated device, a checker that only looks
at what it is asked."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "gpu_check.py"


@pytest.fixture
def gpu_check(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_check_under_test", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "VOCABS", (1, 7, 1000, 2049))
    return module


def test_right_numbers_pass_and_wrong_ones_do_not(cuda_simulator, gpu_check, monkeypatch, capsys):
    with cuda_simulator(), cuda_simulator.raising():
        gpu_check.check_numbers("cuda")
    assert "numbers: right for 12 cases" in capsys.readouterr().out
    monkeypatch.setattr(gpu_check, "DTYPES", (torch.float32,))
    monkeypatch.setattr(gpu_check, "MARGIN", -1.0)
    with cuda_simulator(), cuda_simulator.raising(), pytest.raises(SystemExit, match="float32, vocabulary 1: error"):
        gpu_check.check_numbers("cuda")


def test_the_sanitizer_is_run_with_each_tool(gpu_check, monkeypatch, tmp_path):
    checker = tmp_path / "compute-sanitizer"
    checker.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n[ "$2" != synccheck ]\n')
    checker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(subprocess.CalledProcessError):  # the last tool finds something
        gpu_check.sanitize("cuda")
    asked = [line.split() for line in (tmp_path / "asked").read_text().splitlines()]
    assert [line[1] for line in asked] == ["memcheck", "racecheck", "initcheck", "synccheck"]
    assert all(line[2:4] == ["--error-exitcode", "1"] and line[-2:] == ["--only", "numbers"] for line in asked)


def test_it_says_what_is_missing():
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a CUDA device")
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False, cwd=tempfile.gettempdir()
    )
    assert done.returncode == 1
    assert "backend 'cuda' is not available" in done.stderr
