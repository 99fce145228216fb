"""What the type stubs of the compiled modules say is what these were built with."""

import ast
import importlib
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "fastalign"
KINDS = {
    "SupportsInt": "int",
    "SupportsFloat": "float",
    "Sequence": "list",
    "CapsuleType": "object",
}  # as pybind11 names what it converts, from its version 3 on


def of_stub(path):
    """Name → (kinds of its arguments, result) of a function or a class; name → kind of a constant."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    protocols, found = {}, {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.body[0].name == "__init__":
            found[node.name] = signature(node.body[0], 1)
        elif isinstance(node, ast.ClassDef):
            protocols[node.name] = signature(node.body[0], 1)
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = signature(node, 0)
        elif isinstance(node, ast.AnnAssign):
            kind = node.annotation.id
            found[node.target.id] = protocols.get(kind, kind)
    return found


def signature(function, skipped):
    arguments = [*function.args.posonlyargs, *function.args.args][skipped:]
    return [ast.unparse(a.annotation).partition("[")[0] for a in arguments], ast.unparse(function.returns)


def of_module(module):
    found = {}
    for name in dir(module):
        value = getattr(module, name)
        if name.startswith("__"):
            continue
        if not callable(value):
            found[name] = type(value).__name__
            continue
        text = value.__init__.__doc__ if isinstance(value, type) else value.__doc__
        arguments, result = re.match(r"\w+\((.*)\) -> (.*)", text).groups()
        kinds = re.findall(r"arg\d+: (?:\w+\.)*(\w+)", arguments)
        found[name] = ([KINDS.get(kind, kind) for kind in kinds], result.strip())
    return found


@pytest.mark.parametrize("name", ["_C", "_cuda"])
def test_signatures_agree(name):
    try:
        module = importlib.import_module(f"fastalign.{name}")
    except ImportError:
        pytest.skip(f"needs fastalign.{name}, which was not built")
    assert of_module(module) == of_stub(PACKAGE / f"{name}.pyi")
