"""`fastalign bench sweep` and `behind`: which sizes, in pieces, and what is told of the results."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def module(monkeypatch):
    """A module of bench/, its neighbours importable while it is; nothing is compiled."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(BENCH)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(BENCH)):
            del sys.modules[name]


@pytest.fixture
def sweep(module, monkeypatch):
    found = module("sweep")
    for name in ("harness.variants", "harness.sweep_jobs"):
        monkeypatch.setattr(module(name), "compiled", lambda function: function)
    return found


def test_the_grid_reaches_from_end_to_end_within_its_bound(sweep, module):
    points = sweep.grid()
    key = module("harness.results").key
    assert len({key(point.to_dict()) for point in points}) == len(points)
    assert all(p.rows * p.vocab <= 2**27 for p in points)
    assert {p.suite for p in points} == set(sweep.SUITES)
    for suite in ("logps", "sft", "cross_entropy", "dpo"):
        of = [p for p in points if p.suite == suite]
        assert {p.dtype for p in of} == {"float32", "bfloat16"}
        assert {p.vocab for p in of} == {256, 4096, 32000, 262144}
        assert {p.rows for p in of} == {2 if suite == "dpo" else 1, 16, 256, 4096, 65536}
    assert {p.threads for p in points} == {1, 2}
    assert {p.list_length for p in points} >= {2, 64}
    assert {p.hidden for p in points} >= {128, 4096}


def measured(sweep, path, *more):
    sizes = ["--tokens", "1,8", "--vocab", "33", "--dtype", "float32", "--threads", "1", "--seconds-per-case", "0.001"]
    assert sweep.main(["--json", str(path), "--only", "logps,sft,cross_entropy,dpo", *sizes, *more]) == 0
    return json.loads(path.read_text())["cases"] if path.exists() else []


def test_in_pieces(sweep, tmp_path, capsys):
    path = tmp_path / "sweep.json"
    assert measured(sweep, path, "--minutes", "0") == []
    assert "8 of 8 cases left" in capsys.readouterr().out
    first = measured(sweep, path)
    assert {(c["suite"], c["rows"]) for c in first} == {
        *((suite, rows) for suite in ("logps", "sft", "cross_entropy") for rows in (1, 8)),
        ("dpo", 2),
        ("dpo", 8),
    }
    assert measured(sweep, path) == first  # nothing is left to do
    again = measured(sweep, path, "--again")
    assert len(again) == 8
    assert again != first


def test_everyone_computes_the_same(sweep, tmp_path):
    for case in measured(sweep, tmp_path / "sweep.json"):
        assert len(case["variants"]) >= 3
        assert case["ratios"].keys() == {"fastalign"}
        assert 0 <= case["checks"]["difference"] < 1e-5
        assert case["suite"] == "logps" or 0 <= case["checks"]["gradient_difference"] < 1e-5
        assert case["threads"] == 1
        assert all(len(row["seconds"]) >= 3 for row in case["variants"].values())


@pytest.mark.parametrize("wrong", ["gradient_difference", "difference"])
def test_whoever_computes_something_else_is_seen(sweep, module, monkeypatch, wrong):
    """A gradient that half of the vocabulary does not get; a result that is NaN."""
    jobs, by = module("harness.sweep_jobs"), math.nan if wrong == "difference" else 1.0

    def peer(logits, labels, ref_logps):
        kept = torch.cat([logits[..., :16], logits[..., 16:].detach()], -1)
        return by * torch.nn.functional.cross_entropy(kept.flatten(0, -2), labels.flatten())

    both = {"fastalign": jobs._FIXED["sft"]["fastalign"], "eager": module("harness.variants").Variant(lambda: peer)}
    monkeypatch.setitem(jobs._FIXED, "sft", both)
    point = jobs.Point("sft", "both", 8, 33, "float32", 1)
    assert sweep.measure(point, module("harness.suite").Options(threads=1, device="cpu"), 0.001)["checks"][wrong] > 0.1


@pytest.mark.parametrize("suite", ["pro", "gae"])
def test_lists_and_advantages(sweep, module, suite):
    jobs, options = module("harness.sweep_jobs"), module("harness.suite").Options(threads=1, device="cpu")
    size = {"pro": ("both", 64, 33), "gae": ("forward", 4, 70)}[suite]
    point = jobs.Point(suite, *size, "float32", 1, list_length=4 if suite == "pro" else 0)
    case = sweep.measure(point, options, 0.001)
    assert case["checks"]["difference"] < 1e-5
    assert case["ratios"]["fastalign"].keys() >= {"eager"}


def test_who_takes_no_part_is_told_why(sweep, module):
    absent = sweep.unavailable(("sft", "head"))
    assert absent["Liger cross_entropy"] == "runs on a GPU alone"
    assert absent["Liger FusedLinearDPOLoss"] == "is a DPO loss"
    head = module("head")
    assert not set(absent) & set(head.available((), "sft"))
    assert set(head.VARIANTS) == set(head.available((), "sft")) | set(head.unavailable("sft"))


def case(ours, best, limit=None):
    rows = {"fastalign": {"ours": True, "median": ours}, "eager": {"ours": False, "median": best}}
    rows["TRL"] = {"ours": False, "median": 9.0}
    if limit is not None:
        rows["fastalign"]["of_limit"] = limit
    return {"suite": "sft", "job": "both", "rows": int(1e9 * ours), "vocab": 4, "dtype": "float32", "variants": rows}


@pytest.mark.parametrize(
    ("ours", "best", "late"),
    [(60e-6, 50e-6, False), (64e-6, 50e-6, True), (1.04, 1.0, False), (1.06, 1.0, True), (0.5, 1.0, False)],
)
def test_behind_is_five_percent_and_ten_microseconds(module, tmp_path, capsys, ours, best, late):
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"environment": {"cpu": "x", "threads": 1}, "cases": [case(ours, best)]}))
    assert module("behind").main([str(file)]) == late
    out = capsys.readouterr().out
    assert f"{int(late)} of 1 cases behind" in out
    assert ("eager" in out) == late


def test_furthest_from_the_limit(module):
    cases = [case(1e-3 * (2 + i), 1.0, share) for i, share in enumerate([0.9, 0.2, 0.5])] + [case(1e-5, 1.0, 0.01)]
    found = module("behind").furthest({"cases": cases}, 2)
    assert [share for share, _ in found] == [0.2, 0.5]  # what takes 10 us is not looked at


def test_a_table_of_sweeps(module, tmp_path):
    """A row each: how many are behind, and the ratios of large and of small cases."""
    env = {"cpu": "x", "threads": 1, "isa": "avx2", "date": "2026-01-02T03", "commit": "abc", "dirty": False}
    cases = [case(1.0, 2.0), case(0.5, 0.4), case(1e-5, 3e-5)]  # two of 4e9 and 2e9 logits, one of 40,000
    file, page = tmp_path / "results.json", tmp_path / "page.md"
    file.write_text(json.dumps({"environment": env, "cases": cases}))
    behind = module("behind")
    page.write_text(f"before\n{behind.BEGIN}\nold\n{behind.END}\nafter\n")
    for _ in range(2):
        assert behind.main([str(file), str(file), "--update", str(page)]) == 0
        large, small = "0.80 to 2.0, median 1.40 (2)", "3.00 to 3.0, median 3.00 (1)"
        row = f"| x, 1 threads, avx2, 2026-01-02, abc | 3 | 1 | {large} | {small} |"
        assert page.read_text().splitlines()[4:6] == [row, row]
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("\nafter\n")
