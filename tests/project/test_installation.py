"""`fastalign doctor` without keys: what it reports of an installation, and that it finds wrong numbers."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import tempfile

import pytest
import torch

import fastalign as fa
from fastalign import _backends
from fastalign.cli import commands as cli
from fastalign.doctor import installation


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(installation, "_SECONDS", 0.0)
    monkeypatch.setattr(installation, "TIMED", installation.Sizes(batch=1, length=2, vocab=100))
    monkeypatch.setattr(installation, "BATCHES", installation.BATCHES[-1:])


def test_the_report_says_all_that_a_fault_needs(quick, monkeypatch, capsys):
    monkeypatch.setenv("FASTALIGN_JUDGE_KEY", "secret-of-mine")
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"fastalign   {fa.__version__} in " in out
    assert f"torch       {torch.__version__}" in out
    for name, state in fa.backends().items():
        assert f"backend     {name}: {state}\n" in out
    assert f"vectors     {_backends.cpu_isa()} of {', '.join(_backends.cpu_isas())}\n" in out
    for isa in _backends.cpu_isas():
        assert re.search(rf"^numbers     cpu {isa}: right \(float32 \S+, bfloat16 \S+\)$", out, re.MULTILINE)
    assert re.search(r"^numbers     eager: right", out, re.MULTILINE)
    assert (
        len(re.findall(r"^speed       cpu on cpu, 4 x 100 (?:float32|bfloat16): .* ms: \S+x$", out, re.MULTILINE)) == 2
    )
    assert "FASTALIGN_JUDGE_KEY=(set)" in out
    assert "secret" not in out
    assert out.splitlines()[-1].startswith("result      sound")


@pytest.mark.parametrize("wrong", [lambda loss: loss * (1 + 1e-4), lambda loss: loss * torch.nan], ids=["off", "nan"])
def test_wrong_numbers_are_found(quick, monkeypatch, capsys, wrong):
    cases = [
        dataclasses.replace(case, fused=lambda f=case.fused, **given: wrong(f(**given)))
        if case.name == "dpo:sigmoid"
        else case
        for case in installation.CASES
    ]
    monkeypatch.setattr(installation, "CASES", cases)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^numbers     cpu \w+: WRONG: dpo:sigmoid in float32: errors", out, re.MULTILINE)
    assert out.splitlines()[-1].startswith("result      NOT SOUND")


def test_torch_is_enough():
    """Neither transformers nor what else the trainers need is imported."""
    code = (
        "import sys; from fastalign.doctor import installation as i; i._SECONDS = 0.0; i.BATCHES = i.BATCHES[-1:]; "
        "i.report(); print({'transformers', 'datasets', 'rich'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tempfile.gettempdir(),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.splitlines()[-1] == "set()"
