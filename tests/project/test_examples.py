"""The examples that come with the package: each runs as a program, soon, and says what it is meant to show."""

from __future__ import annotations

import importlib
import re
import runpy
import sys
import time
from pathlib import Path

import pytest

import fastalign.examples
from fastalign.examples import tiny

FOLDER = Path(fastalign.examples.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "tiny"))
NEEDS = {
    "bare_loop": (),
    "custom_loss": (),
    "transformers_trainer": ("transformers", "accelerate"),
    "trl_dpo": ("trl", "datasets"),
    "ppo_reward": ("transformers", "accelerate", "datasets"),
}
EXTRAS = {"trl_dpo": "trl"}
SECONDS = 20


def numbers(line):
    return [float(x) for x in re.findall(r"\d+\.\d+(?:e-?\d+)?", line)]


def bare_loop(said):
    first, last = numbers(said[-1])
    assert first == 0.6931  # policy and reference are the same: ln 2
    assert last < 0.35
    assert int(re.search(r"(\d+)%", said[-1])[1]) >= 90


def custom_loss(said):
    assert [line.partition(":")[0] for line in said[:-1] if "program of" in line] == ["TokenLoss", "PairLoss"]
    assert max(numbers(said[-1])) < 1e-6


def transformers_trainer(said):
    first, last, apart = numbers(said[-1])
    assert last < first / 2
    assert apart < 1e-5
    assert "logits of [16, " in said[-1]


def trl_dpo(said):
    first, last, apart = numbers(said[-1])
    assert first == 0.6931
    assert last < first / 2
    assert apart < 1e-3  # Adam's first steps follow the sign of a gradient, so that where it is rounding they differ


def ppo_reward(said):
    first, last = numbers(said[-1])
    assert last > first + 0.3


CHECKS = {check.__name__: check for check in (bare_loop, custom_loss, transformers_trainer, trl_dpo, ppo_reward)}


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_soon_and_shows_what_it_is_for(name, capsys):
    for package in NEEDS[name]:
        pytest.importorskip(package, reason=f"needs {package} (the extra `dev`)")
    begin = time.process_time()
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"fastalign.examples.{name}", run_name="__main__", alter_sys=True)
    assert end.value.code == 0
    assert time.process_time() - begin < SECONDS
    CHECKS[name](capsys.readouterr().out.strip().splitlines())


@pytest.mark.parametrize("name", [name for name in NAMES if NEEDS[name]])
def test_a_package_that_is_missing_is_named_with_its_extra(name, monkeypatch, capsys):
    package = NEEDS[name][0]
    for loaded in [key for key in sys.modules if key.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, package, None)
    module = importlib.import_module(f"fastalign.examples.{name}")
    extra = EXTRAS.get(name, "train")
    assert tiny.run(module.main, extra) == 1
    said = capsys.readouterr().err
    assert f"the package '{package}' is missing" in said
    assert said.endswith(f"pip install 'fastalign[{extra}]'\n")
    pyproject = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(rf"^{extra} = .*{package}|^{extra} = .*fastalign\[train\]", pyproject, re.MULTILINE)


def test_an_import_of_ours_that_fails_is_not_hidden():
    def broken():
        raise ModuleNotFoundError("No module named 'fastalign.gone'", name="fastalign.gone")

    with pytest.raises(ModuleNotFoundError, match="gone"):
        tiny.run(broken, "train")


def test_the_package_lists_them_all():
    listed = re.findall(r"python -m fastalign\.examples\.(\w+)", fastalign.examples.__doc__)
    assert sorted(listed) == NAMES == sorted(CHECKS) == sorted(NEEDS)
    for name in NAMES:
        said = importlib.import_module(f"fastalign.examples.{name}").__doc__
        assert f"    python -m fastalign.examples.{name}\n" in said
