"""What the package needs of torch's private names: asked for in one place, and a torch without one is told of it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastalign

PACKAGE = Path(fastalign.__file__).parent
HOME = PACKAGE / "utils" / "private.py"


def private_names(path: Path) -> list[str]:
    """Private names of torch's that a file reaches for: `torch._C`, `from torch._C import x`, `forward_ad._level`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            parts = ast.unparse(node).split(".")
            found += [".".join(parts)] if parts[0] == "torch" and parts[-1].startswith("_") else []
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in names if any(part.startswith("_") for part in name.split("."))]
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.startswith("torch.") and "._" in a.name]
    return found


PUBLIC = {"torch.__version__", "torch.utils._python_dispatch.TorchDispatchMode"}
"""The second is what torch's own documentation tells one to import."""


def test_no_other_file_reaches_for_them():
    files = [path for path in PACKAGE.rglob("*.py") if path != HOME]
    assert {str(path): bad for path in files if (bad := [n for n in private_names(path) if n not in PUBLIC])} == {}


def needed() -> list[str]:
    """The paths that the one place asks for."""
    calls = [n for n in ast.walk(ast.parse(HOME.read_text())) if isinstance(n, ast.Call)]
    return [n.args[0].value for n in calls if getattr(n.func, "id", "") == "of_torch"]


TAKE_AWAY = """
import sys, torch
from torch.autograd import forward_ad
*owner, name = sys.argv[1].split(".")
holder = torch
for part in owner:
    holder = getattr(holder, part)
delattr(holder, name)
import fastalign
"""


@pytest.mark.parametrize("path", ["_C._len_torch_dispatch_stack", "autograd.forward_ad._current_level"])
def test_a_torch_without_one_is_told_of_at_import(path, tmp_path):
    """In one sentence, with torch's version: as a program sees it that imports torch and this package."""
    import torch

    assert path in needed()
    done = subprocess.run([sys.executable, "-c", TAKE_AWAY, path], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        f"ImportError: fastalign needs torch.{path}, which is private to torch, and torch {torch.__version__} has none"
        ": install torch 2.13, with which fastalign was tried, or a fastalign that knows this torch"
    )


def test_every_one_of_them_is_asked_for_by_name(monkeypatch):
    import torch

    from fastalign.utils.private import of_torch

    assert len(needed()) > 10
    for path in needed():
        assert of_torch(path) is not None
        *owner, name = path.split(".")
        with monkeypatch.context() as patch:
            patch.delattr(of_torch(".".join(owner)), name)
            with pytest.raises(
                ImportError, match=rf"needs torch\.{path}, .* torch {re.escape(torch.__version__)} has none"
            ):
                of_torch(path)
