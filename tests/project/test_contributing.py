"""The dry run of .github/CONTRIBUTING.md: its blocks, in a copy of the package, are losses like any other."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastalign

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```python\n# (fastalign/\S+), before: ([^\n]+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall(GUIDE)

MEASURE = """
import importlib.util, json, sys, torch
from fastalign.losses import DPOLoss, PPOLoss
from fastalign.reference import CASES, Sizes, cast

spec = importlib.util.spec_from_file_location("counts", sys.argv[1])
counts = importlib.util.module_from_spec(spec)
sys.modules["counts"] = counts
spec.loader.exec_module(counts)

x = torch.randn(2, 1, 256, generator=torch.Generator().manual_seed(0)).requires_grad_()
y, rows = torch.tensor([[3], [5]]), torch.tensor([-5.0])
pairs = {"ref_chosen_logps": rows, "ref_rejected_logps": rows}
tokens = {"old_logps": torch.full((2, 1), -5.0), "advantages": torch.tensor([0.5, -1.0])}

def calls(module, given):
    return counts.python_calls(lambda: module(x, y, **given).loss.backward())

pair, kind = DPOLoss(loss_type="square_hinge", hinge_margin=0.7), PPOLoss(kind="soft_clip")
found = {
    "calls": {
        "square_hinge": [calls(pair, pairs), calls(DPOLoss(), pairs)],
        "soft_clip": [calls(kind, tokens), calls(PPOLoss(), tokens)],
    },
    "explain": [pair.fused[False].explain(), kind.fused.explain()],
    "errors": {},
}
for case in CASES:
    if case.name in ("dpo:square_hinge", "soft_clip"):
        given = cast(case.inputs(Sizes(), torch.Generator().manual_seed(1)), torch.float32)
        grads = []
        for function, dtype in ((case.fused, torch.float32), (case.reference, torch.float64)):
            own = {k: t.to(dtype) if t.is_floating_point() else t for k, t in given.items()}
            own["logits"] = own["logits"].clone().requires_grad_()
            loss = function(**own)
            grads.append((loss.detach().double(), torch.autograd.grad(loss, own["logits"])[0].double()))
        found["errors"][case.name] = [float((a - b).norm() / b.norm()) for a, b in zip(*grads)]
try:
    DPOLoss(loss_type="square_hinge", hinge_margin=0.0)
except ValueError as error:
    found["refused"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A folder with the package in it, the blocks inserted."""
    folder = tmp_path_factory.mktemp("dry-run")
    package = Path(fastalign.__file__).parent
    shutil.copytree(package, folder / "fastalign", ignore=shutil.ignore_patterns("__pycache__", "_cuda.*.so"))
    for name, anchor, block in BLOCKS:
        path = folder / name
        text = path.read_text(encoding="utf-8")
        assert text.count(f"\n{anchor}\n") == 1, f"{name} must hold this line once: {anchor}"
        space = "\n\n" if block.startswith("def ") else ""
        path.write_text(text.replace(f"\n{anchor}\n", f"\n{block}{space}{anchor}\n"), encoding="utf-8")
    return folder


def python(folder, *arguments):
    """Runs Python where the copy is the first that is found."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def measured(copy):
    if fastalign.backends()["cpu"] != "available":
        pytest.skip("needs the compiled module fastalign._C")
    return json.loads(python(copy, "-c", MEASURE, ROOT / "bench" / "counts.py").splitlines()[-1])


def test_two_files_each_and_no_cpp():
    assert len(BLOCKS) == GUIDE.count("```python")
    assert {name for name, _, _ in BLOCKS} == {
        "fastalign/losses/pairwise.py",
        "fastalign/losses/policy_objectives.py",
        "fastalign/reference/policy.py",
        "fastalign/reference/preference.py",
    }


def test_both_are_programs(measured):
    assert len(measured["explain"]) == 2
    for explained in measured["explain"]:
        assert re.search(r"program of \d+ steps", explained)
        assert "torch operations" not in explained


def test_both_are_their_float64_formulas(measured):
    assert set(measured["errors"]) == {"dpo:square_hinge", "soft_clip"}
    for errors in measured["errors"].values():
        assert max(errors) < 1e-6  # float32 of sums of a few dozen terms


def test_no_more_calls_than_an_option_may_cost(measured):
    for own, default in measured["calls"].values():
        assert 0 < own <= default + 30


def test_the_option_is_checked(measured):
    assert measured["refused"].startswith("hinge_margin must be")


def test_they_pass_the_tests_of_every_case(copy):
    code = "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"
    chosen = "(square_hinge or soft_clip or every or unique) and not test_every_sft"
    options = ("-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "-k", chosen)
    shown = python(copy, "-c", code, *options, ROOT / "tests" / "losses" / "test_cases.py")
    assert re.search(r"\b13 passed", shown), shown
