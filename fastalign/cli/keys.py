"""The keys of the commands, read from the source: to refuse a mistyped one before anything heavy is imported.

Transformers, datasets and accelerate take seconds to import. A configuration's keys are the annotated fields of its
class and of the classes that it inherits from; a test holds them to what the classes themselves say.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]

CONFIGS = {
    "sft": ("trainers.sft", "SFTConfig"),
    "dpo": ("trainers.dpo", "DPOConfig"),
    "kto": ("trainers.kto", "KTOConfig"),
    "tpo": ("trainers.tpo", "TPOConfig"),
    "online-dpo": ("trainers.online_dpo", "OnlineDPOConfig"),
    "ppo": ("trainers.ppo", "PPOConfig"),
    "grpo": ("trainers.grpo", "GRPOConfig"),
    "pro": ("trainers.pro", "PROConfig"),
    "distill": ("trainers.distill", "DistillConfig"),
    "reward": ("trainers.reward", "RewardConfig"),
    "eval": ("evaluation.evaluate", "EvalConfig"),
    "sample": ("evaluation.sample", "SampleConfig"),
    "doctor": ("doctor.command", "DoctorConfig"),
    "demo": ("demo.config", "DemoConfig"),
}
"""Command → module inside the package, and class, of its configuration."""


def known_keys(command: str) -> set[str] | None:
    """Every key of the command; None for one that has no configuration, or where the source cannot be read."""
    if command not in CONFIGS:
        return None
    module, name = CONFIGS[command]
    try:
        return {key for key, settable in _fields("fastalign." + module, name).items() if settable}
    except (OSError, SyntaxError, LookupError):  # left to the command itself
        return None


def _fields(module: str, name: str) -> dict[str, bool]:
    """The class's fields, its own over those that it inherits; whether they can be given."""
    path, tree = _source(module)
    node = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    found: dict[str, bool] = {}
    for base in reversed(node.bases):
        if isinstance(base, ast.Name):
            found |= _inherited(module, path, tree, base.id)
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and "ClassVar" not in _text(line):
            found[line.target.id] = "init=False" not in _text(line)
    return found


def _text(line: ast.AnnAssign) -> str:
    return ast.unparse(line.annotation) + (ast.unparse(line.value) if line.value is not None else "")


def _inherited(module: str, path: Path, tree: ast.Module, name: str) -> dict[str, bool]:
    """The fields of a base class that this module defines or imports."""
    if any(isinstance(n, ast.ClassDef) and n.name == name for n in tree.body):
        return _fields(module, name)
    for line in tree.body:
        if isinstance(line, ast.ImportFrom) and name in {alias.name for alias in line.names}:
            if not line.level:
                return _fields("transformers.training_args", name) if line.module == "transformers" else {}
            package = module.split(".")[: -line.level + (path.name == "__init__.py") or None]
            return _fields(".".join([*package, *(line.module or "").split(".")]), name)
    return {}


def _source(module: str) -> tuple[Path, ast.Module]:
    package, *rest = module.split(".")
    root = _PACKAGE if package == "fastalign" else _root(package)
    path = root.joinpath(*rest).with_suffix(".py")
    if not path.exists():
        path = root.joinpath(*rest, "__init__.py")
    return path, ast.parse(path.read_text(encoding="utf-8"))


def _root(package: str) -> Path:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise LookupError(f"there is no package {package}")
    return Path(spec.submodule_search_locations[0])
