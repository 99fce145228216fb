"""Every key that a command can be told is read by something that the command runs."""

from __future__ import annotations

import ast
import importlib
import sys
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")

from transformers import TrainingArguments

import fastalign
from fastalign.demo.config import DemoConfig
from fastalign.doctor.command import DoctorConfig
from fastalign.evaluation.evaluate import EvalConfig
from fastalign.evaluation.sample import SampleConfig
from fastalign.trainers.dpo import DPOConfig
from fastalign.trainers.grpo import GRPOConfig
from fastalign.trainers.kto import KTOConfig
from fastalign.trainers.online_dpo import OnlineDPOConfig
from fastalign.trainers.policy.config import PolicyConfig
from fastalign.trainers.ppo import PPOConfig
from fastalign.trainers.pro import PROConfig
from fastalign.trainers.reward import RewardConfig
from fastalign.trainers.sft import SFTConfig
from fastalign.trainers.tpo import TPOConfig


def attributes_read(source: str) -> set[str]:
    """Keys that a file reads from a configuration: as `args.key`, or spelt out in a tuple that it goes through.

    What `__post_init__` checks is not read, nor is a tuple that nothing else in the file uses.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            node.body = [n for n in node.body if getattr(n, "name", "") != "__post_init__"]
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    tree.body = [n for n in tree.body if not isinstance(n, ast.Assign) or getattr(n.targets[0], "id", "") in used]
    nodes = list(ast.walk(tree))
    loaded = [n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)]
    owner = lambda n: getattr(n.value, "id", getattr(n.value, "attr", ""))  # noqa: E731
    read = {n.attr for n in loaded if owner(n) in ("args", "config", "self")}
    tuples = [n.elts for n in nodes if isinstance(n, ast.Tuple)]
    return read | {e.value for elements in tuples for e in elements if isinstance(e, ast.Constant)}


CONFIGS = (SFTConfig, DPOConfig, RewardConfig, PROConfig, DemoConfig, SampleConfig, EvalConfig, DoctorConfig)
CONFIGS += (PPOConfig, GRPOConfig, KTOConfig, TPOConfig, OnlineDPOConfig)


def files_used(module: str) -> set[Path]:
    """The package's files that one of its modules imports, at any remove, itself included: what its command runs."""
    root = Path(fastalign.__file__).parent
    found, rest = set(), [Path(sys.modules[module].__file__)]
    while rest:
        path = rest.pop()
        if path in found or root not in path.parents or not path.exists():
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                place = path.parents[node.level - 1] / (node.module or "").replace(".", "/")
                rest += [place.with_suffix(".py"), *(place / f"{alias.name}.py" for alias in node.names)]
    return found


STARTS = {DemoConfig: "demo.command"}  # its configuration is in a file that imports nothing


@pytest.mark.parametrize("config", CONFIGS)
def test_every_key_of_ours_is_read_by_its_command(config):
    start = f"fastalign.{STARTS[config]}" if config in STARTS else config.__module__
    importlib.import_module(start)
    read = set().union(*(attributes_read(path.read_text(encoding="utf-8")) for path in files_used(start)))
    given = {f.name for f in fields(config) if f.init}
    unread = given - {f.name for f in fields(TrainingArguments)} - read
    if issubclass(config, PolicyConfig):  # no TrainingArguments: nothing but what the trainers read has an effect
        unread |= given - read
    assert not unread


def test_a_key_that_is_only_checked_counts_as_unread():
    source = "CHECKED = ('c', 'd')\nclass C:\n    a: int = 1\n    b: int = 2\n"
    source += "    def __post_init__(self): self.a, CHECKED\n    def f(self): self.b, other.a\n"
    assert attributes_read(source) == {"b"}
