"""Modules and their contents under the names that they had before: importing one gives what it is today and a
DeprecationWarning."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

MOVED = {
    "packed": "ops.packed",
    "objective": "losses.objective",
    "trainers.model_logits": "models.logits",
    "trainers.shared_prompts": "models.shared_prompts",
    "trainers.lora": "models.lora",
    "trainers.actor_critic": "models.actor_critic",
    "trainers.draw": "models.sampling",
    "trainers.modes": "utils.modes",
    "trainers.arguments": "trainers.common.arguments",
    "trainers.base": "trainers.common.base",
    "trainers.callbacks": "trainers.common.callbacks",
    "trainers.checkpoints": "trainers.common.checkpoints",
    "trainers.config": "trainers.common.config",
    "trainers.run": "trainers.common.run",
    "trainers.even": "trainers.common.even",
    "trainers.sharding": "trainers.common.sharding",
    "trainers.resident": "trainers.common.resident",
    "trainers.allocator": "trainers.common.allocator",
    "trainers.ref_cache": "trainers.common.ref_cache",
    "trainers.watch": "trainers.common.preference_callback",
    "trainers.policy_checkpoint": "trainers.policy.checkpoint",
    "trainers.policy_config": "trainers.policy.config",
    "trainers.policy_rewards": "trainers.policy.rewards",
    "trainers.policy_run": "trainers.policy.run",
    "trainers.policy_trainer": "trainers.policy.trainer",
    "trainers.policy_trust_region": "trainers.policy.trust_region",
    "trainers.policy_update": "trainers.policy.update",
    "trainers.rollout": "trainers.policy.rollout",
    "trainers.eval.agreement": "evaluation.agreement",
    "trainers.eval.best_of_n": "evaluation.best_of_n",
    "trainers.eval.chat_judge": "evaluation.chat_judge",
    "trainers.eval.diversity": "evaluation.diversity",
    "trainers.eval.estimates": "evaluation.estimates",
    "trainers.eval.gold": "evaluation.gold",
    "trainers.eval.judges": "evaluation.judges",
    "trainers.eval.labelers": "evaluation.labelers",
    "trainers.eval.perplexity": "evaluation.perplexity",
    "trainers.eval.policy": "evaluation.policy",
    "trainers.eval.sampling": "evaluation.sampling",
    "trainers.eval.scorers": "evaluation.scorers",
    "trainers.eval.winrate": "evaluation.winrate",
    "trainers.eval": "evaluation",
    "trainers.evaluate": "evaluation.evaluate",
    "trainers.sample": "evaluation.sample",
    "trainers.data.sampled": "evaluation.ranked_samples",
    "trainers.demo": "demo.command",
    "trainers.demo_config": "demo.config",
    "trainers.demo_models": "demo.models",
    "trainers.demo_report": "demo.report",
    "trainers.demo_stages": "demo.stages",
    "trainers.step_memory": "demo.step_memory",
    "trainers.doctor": "doctor.command",
    "trainers.doctor_data": "doctor.data",
    "trainers.doctor_model": "doctor.model",
    "study.ground": "study.setup",
    "study.cells": "study.runs",
    "study.watch": "study.callbacks",
    "bench_command": "cli.bench",
}
"""Old name → new name, both below `fastalign`."""

NAMES = {"TokenStatsAndExtras": "TokenStats"}
"""Old name → new name of what modules offer."""


def renamed(module: str, contents: Mapping[str, object], stacklevel: int = 2) -> Callable[[str], object]:
    """A `__getattr__` for a module: what has another name now."""

    def __getattr__(name: str) -> object:
        if NAMES.get(name) not in contents:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(f"{module}.{name} is now {module}.{NAMES[name]}", DeprecationWarning, stacklevel=stacklevel)
        return contents[NAMES[name]]

    return __getattr__


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the old names.

    Asked first: else the files in a moved package would be found a second time, under its old name.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, old = fullname.partition(".")
        if package != "fastalign" or old not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        new = f"fastalign.{MOVED[spec.name.partition('.')[2]]}"
        warnings.warn(f"{spec.name} is now {new}", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        # The import system writes the old name's spec into what it is given; the module keeps its own.
        self._own = module.__spec__, module.__loader__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__, module.__loader__ = self._own


def install() -> None:
    """Lets the old names be imported."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Moved())
