"""The tables of bench/README.md and of the README: every number is of the results that are kept, and up to date."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def estimate(mean, half=None):
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return {"mean": mean, "se": None, "low": low, "high": high}


@pytest.fixture
def bench(tmp_path):
    """A bench/ of its own, so that nothing is written to the real one; runs studies.py there."""
    folder = tmp_path / "bench"
    for name in ("results", "harness"):
        (folder / name).mkdir(parents=True)
    for name in ("studies.py", "report.py", "harness/results.py"):
        shutil.copyfile(ROOT / "bench" / name, folder / name)

    def run(*arguments):
        command = [sys.executable, str(folder / "studies.py"), *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", check=True)

    return folder, run


BENCH_PAGE = ROOT / "bench" / "README.md"


def test_studies_are_up_to_date(bench):
    folder, run = bench
    for path in (ROOT / "bench" / "results").iterdir():
        shutil.copyfile(path, folder / "results" / path.name)
    page = folder / "README.md"
    shutil.copyfile(BENCH_PAGE, page)
    run("--update", page)
    assert page.read_text(encoding="utf-8") == BENCH_PAGE.read_text(encoding="utf-8")


def rewritten(page, tmp_path, script, *arguments):
    """A copy of the page after a script of bench/ wrote to it."""
    copy = tmp_path / page.name
    shutil.copyfile(page, copy)
    command = [sys.executable, ROOT / "bench" / script, *arguments, "--update", copy]
    subprocess.run([str(word) for word in command], check=True, cwd=tmp_path)
    return copy.read_text(encoding="utf-8")


def named_results(pattern):
    """The results files that bench/README.md names where a line of it matches the pattern."""
    (line,) = re.findall(pattern, BENCH_PAGE.read_text(encoding="utf-8"))
    return [ROOT / name for name in re.findall(r"bench/results/[\w.-]+\.json", line)]


def test_trainers_are_up_to_date(tmp_path):
    name = re.search(r"results/(dpo-trl-[\d-]+\.json)", BENCH_PAGE.read_text(encoding="utf-8"))[1]
    show = ("--show", ROOT / "bench" / "results" / name)
    assert rewritten(BENCH_PAGE, tmp_path, "trainers.py", *show) == BENCH_PAGE.read_text(encoding="utf-8")


CPU_TABLE = r"The table is `python bench/report\.py bench/results/cpu-.*"
DEVICE_TABLE = r"The table is `python bench/report\.py bench/results/h100-.*"


@pytest.mark.parametrize(
    ("page", "pattern", "more"),
    [
        (BENCH_PAGE, CPU_TABLE, ()),
        (BENCH_PAGE, DEVICE_TABLE, ()),
        (ROOT / "README.md", CPU_TABLE, ("--short",)),
    ],
    ids=["cpu", "gpu", "short"],
)
def test_benchmarks_are_up_to_date(page, pattern, more, tmp_path):
    files = named_results(pattern)
    assert files
    assert rewritten(page, tmp_path, "report.py", *files, *more) == page.read_text(encoding="utf-8")


def test_every_table_of_measurements_is_in_one_file():
    """The README has two extracts alone, and no figure that no script writes but one that the page has too."""
    readme, page = (path.read_text(encoding="utf-8") for path in (ROOT / "README.md", BENCH_PAGE))
    assert readme.count("<!-- ") == 4
    for name in re.findall(r"\]\((results/[\w.-]+)\)", page):
        assert (ROOT / "bench" / name).is_file(), name
    for figure in ("up to 1.4 times as fast", "60 to 80 µs against 45 to 60 of `F.cross_entropy`"):
        assert figure in " ".join(readme.split())
        assert figure in " ".join(page.split())


def described(path):
    """What report.py wrote into a picture: its title, variants and numbers."""
    png = path.read_bytes()
    at = png.index(b"tEXtDescription\0")
    return json.loads(png[at + len(b"tEXtDescription\0") : at + 4 + int.from_bytes(png[at - 4 : at], "big")])


def test_the_picture_is_of_the_results(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib (the extra `train`)")
    (picture,) = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    drawn = tmp_path / "drawn.png"
    command = [sys.executable, ROOT / "bench" / "report.py", *named_results(CPU_TABLE), "--picture", drawn]
    subprocess.run([str(word) for word in command], check=True, cwd=tmp_path)
    found = described(drawn)
    assert found == described(ROOT / picture)
    assert found["variants"][0] == "fastalign"
    assert found["ms"].keys() == found["MiB beyond the logits"].keys() == {"float32", "bfloat16"}
    short = (ROOT / "README.md").read_text(encoding="utf-8")
    for dtype, times in found["ms"].items():
        (row,) = re.findall(rf"^\| DPO loss.* {dtype} \| ([\d.]+) ms", short, re.MULTILINE)
        assert float(row) == pytest.approx(times[0], abs=0.06)


def test_the_sweeps_are_those_of_the_committed_files(tmp_path):
    """In both pages: a row for each file, as `bench/behind.py` writes it."""
    for page in (ROOT / "README.md", BENCH_PAGE):
        copy = tmp_path / page.name
        copy.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
        files = [ROOT / "bench" / "results" / f"sweep-{name}.json" for name in ("2026-12-01", "avx2-2026-12-01")]
        subprocess.run([sys.executable, ROOT / "bench" / "behind.py", *files, "--update", copy], check=True)
        assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8"), page


def test_what_a_trainer_does_before_a_step_counts(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """As giving free memory back does, which is part of how little of it ours takes."""
    pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")
    from fastalign.trainers.common import resident
    from fastalign.trainers.common.callbacks import GiveBackCallback

    if not resident.measurable():
        pytest.skip("needs Linux's /proc")
    spec = importlib.util.spec_from_file_location("bench_trainers_under_test", ROOT / "bench" / "trainers.py")
    trainers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(trainers)
    tiny_model().save_pretrained(tmp_path / "m")
    tiny_tokenizer.save_pretrained(tmp_path / "m")
    row = {"prompt": "the movie is", "chosen": " good", "rejected": " bad"}
    monkeypatch.setattr(trainers, "word_pairs", lambda *_: [row] * 2)
    monkeypatch.setattr(GiveBackCallback, "on_step_begin", lambda *_, **__: time.sleep(0.5))
    settings = {"model": str(tmp_path / "m"), "one": "fastalign", "folder": str(tmp_path), "ops": False, "until": None}
    numbers = {
        "pairs": 1,
        "steps": 2,
        "tokens": 64,
        "seed": 0,
        "threads": torch.get_num_threads(),
        "learning_rate": 1e-5,
    }
    found = trainers.run_one(SimpleNamespace(**settings, **numbers))
    assert len(found["steps"]) == len(found["losses"]) == 2
    assert all(step["step"] > 0.5 and step["rest"] > 0.4 for step in found["steps"])


def test_results_are_taken_and_told(bench):
    folder, run = bench
    point = {"kl": estimate(2.0), "kl_k1": {"mean": 2.3, "se": 0.1}, "kl_k3": {"mean": 2.19, "se": 0.1}}
    point["kl"]["se"] = 0.0
    point["finished"] = 0.5
    results = {
        "study": "frontier",
        "command": "fastalign study frontier --quick true",
        "machine": {"date": "2031-02-03T04:05:06+00:00", "cpu": "Some CPU", "cores": 7},
        "seeds": 2,
        "first_seed": 3,
        "grounds": {
            f"grounds/seed-{i}": {"proxy": {"accuracy": 0.7 + i / 10}, "samples": {"pairs": 50 + i}} for i in (0, 1)
        },
        "cells": {
            "a": {"method": "best-of-n", "seed": 0, "points": [{"gold": 0.25, "figures": {"finished": 0.75}}]},
            "b": {"method": "dpo", "seed": 0, "points": [point]},
        },
        "summary": {
            "budgets": [1.0, 4.0],
            "envelope": {"dpo": [estimate(None), estimate(0.5, 0.25)], "ppo-gold": [estimate(0.125, 0.0625)] * 2},
            "differences": {
                "dpo - ppo-gold": [estimate(0.375, 1.0)] * 2,
                "ppo-gold - ppo-learned": [estimate(9.0)] * 2,
            },
        },
    }
    source = folder.parent / "left"
    source.mkdir()
    (source / "frontier.json").write_text(json.dumps(results))
    (source / "frontier.png").write_bytes(b"picture")
    (folder / "results" / "frontier-2030-01-01.csv").write_text("old")
    (folder / "results" / "cpu-2030-01-01.json").write_text("{}")
    readme = folder.parent / "README.md"
    begin, end = "<!-- studies: written by bench/studies.py -->", "<!-- end of studies -->"
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    run("--take", source, "--update", readme)
    kept = {path.name for path in (folder / "results").iterdir()}
    assert kept == {"cpu-2030-01-01.json", "frontier-2031-02-03.json", "frontier-2031-02-03.png"}
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{begin}\n**")
    assert text.endswith(f"\n{end}\nafter\n")
    for line in (
        "| DPO | - | 0.50 [0.25, 0.75] |",
        "| PPO, gold reward | 0.12 [0.06, 0.19] | 0.12 [0.06, 0.19] |",
        "| DPO minus PPO, gold reward | 0.38 [-0.62, 1.38] | 0.38 [-0.62, 1.38] |",
        "`fastalign study frontier --quick true`; seeds 3 to 4; 2031-02-03; Some CPU, 7 cores",
        "right on 0.70 to 0.80 of held-out pairs",
        "gold reward of 0.25; 50 to 51 pairs a seed",
        "end by themselves: 0.75 before; at the ends of the runs DPO 0.50.",
        "Of 1 policies, 0 (k1) and 1 (k3) have a sampled KL",
        "[png](results/frontier-2031-02-03.png), [json](results/frontier-2031-02-03.json)",
    ):
        assert line in text
    assert "9.00" not in text
