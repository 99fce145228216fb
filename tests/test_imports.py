"""Imports run one way: cli → trainers → losses → ops → _backends → kernels. Read from the syntax tree."""

import ast
import sys
from pathlib import Path

import pytest

import fastalign

PACKAGE = Path(fastalign.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Room → what it must not import from this package, and outside packages that it must do without.
COMPILED = ("_C", "_cuda")
RANK = dict.fromkeys((*COMPILED, "kernels", "utils"), 0) | {
    "_backends": 1,
    "_extras": 1.5,
    "_op_checks": 1.5,
    "_results": 1.5,
    "_token_op": 1.7,
    "ops": 2,
    "objective": 3,
    "_mean_nll": 3,
    "_known_slopes": 2.5,
    "_list_loss": 3,
    "_pair_loss": 3,
    "_policy_terms": 3,
    "_sequences": 3,
}
RANK |= {"packed": 2, "_head_tiles": 2, "_head_checks": 3, "_head_problem": 4, "head": 5}
RANK |= {"losses": 6, "rl": 6, "reference": 7}
TOP = 8  # trainers, integrations, cli and whatever else stands on everything
LIGHT = {"torch", "numpy"}  # all that the layer below the trainers may need besides the standard library


def room(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


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
            yield (name.split(".")[1] if ours and "." in name else name.split(".")[0]), ours


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    here = room(path)
    if here == "__init__":
        return
    rank = RANK.get(here, TOP)
    for name, ours in imported(path):
        if ours:
            same = {here, name} <= {"losses", "rl"}  # rl computes with the losses' checks and masked means
            assert name == here or same or rank == TOP or RANK.get(name, TOP) < rank, f"{here} must not import {name}"
            below = name not in (*COMPILED, "kernels") or here in ("_backends", "kernels")
            assert below, f"only _backends may import {name}, not {here}"


@pytest.mark.parametrize(
    "path", [p for p in FILES if RANK.get(room(p), TOP) < TOP], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_the_core_needs_torch_alone(path):
    for name, ours in imported(path):
        light = LIGHT | ({"triton"} if path.stem.endswith("_triton") else set())  # these are imported when needed
        assert ours or name in light or name in sys.stdlib_module_names, f"{room(path)} must not need {name}"


def test_the_reader_sees_relative_imports():
    assert {("kernels", True), ("torch", False)} <= set(imported(PACKAGE / "_backends" / "eager.py"))
    assert ("ops", True) in set(imported(PACKAGE / "losses" / "_common.py"))


def test_losses_reach_logits_through_one_door():
    """No loss computes a softmax over the vocabulary by itself."""
    for path in (PACKAGE / "losses").glob("*.py"):
        calls = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
        assert not calls & {"log_softmax", "softmax", "cross_entropy"}, path.name
