"""Imports run one way, from the command line down to the kernels. Read from the syntax tree."""

import ast
import sys
from pathlib import Path

import pytest

import fastalign

PACKAGE = Path(fastalign.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Folder or file of the package → rank. A module imports from its own folder and from lower ranks, without exception.
COMPILED = ("_C", "_cuda")
LAYERS = (
    (*COMPILED, "kernels", "utils"),
    ("_backends",),
    ("ops",),
    ("head",),
    ("losses",),
    ("rl",),
    ("reference", "models", "memory", "api"),
    ("integrations",),
    ("trainers",),
    ("evaluation",),
    ("demo", "doctor"),
    ("study", "examples"),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
TOP = RANK["models"]  # from here on other packages than torch may be needed
LIGHT = {"torch", "numpy"}  # all that the layer below the trainers may need besides the standard library


def room(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path):
    """(module inside fastalign or top-level package name, is it ours) for every import statement of a file."""
    package = ("fastalign", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [module] if module != "fastalign" else [f"fastalign.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            ours = name.split(".")[0] == "fastalign"
            name = "fastalign.api" if name == "fastalign" else name  # whose names these are
            yield name.split(".")[1 if ours else 0], ours


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    here = room(path)
    if here == "__init__":
        return
    for name, ours in imported(path):
        if ours and name != here:
            assert RANK[name] < RANK[here], f"{here} must not import {name}"
            below = name not in (*COMPILED, "kernels") or here in ("_backends", "kernels")
            assert below, f"only _backends may import {name}, not {here}"


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if RANK.get(room(p), TOP) < TOP or room(p) == "reference"],
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_the_core_needs_torch_alone(path):
    for name, ours in imported(path):
        light = LIGHT | ({"triton"} if path.stem.endswith("_triton") else set())  # these are imported when needed
        assert ours or name in light or name in sys.stdlib_module_names, f"{room(path)} must not need {name}"


def test_the_reader_sees_relative_imports():
    assert {("kernels", True), ("torch", False)} <= set(imported(PACKAGE / "_backends" / "eager.py"))
    assert ("ops", True) in set(imported(PACKAGE / "losses" / "base.py"))


def test_losses_reach_logits_through_one_door():
    """No loss computes a softmax over the vocabulary by itself."""
    for path in (PACKAGE / "losses").glob("*.py"):
        calls = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
        assert not calls & {"log_softmax", "softmax", "cross_entropy"}, path.name
