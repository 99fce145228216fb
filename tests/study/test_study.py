"""The studies: cells that run once and go on after a cut, envelopes without the luck of the best, whole reports."""

from __future__ import annotations

import base64
import csv
import importlib
import inspect
import json
import math
import re
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("sklearn", reason="needs scikit-learn (the extra `train`)")
pytest.importorskip("matplotlib", reason="needs matplotlib (the extra `train`)")
pytest.importorskip("rich", reason="needs rich (the extra `train`)")

from rich.console import Console

from fastalign.cli import commands as cli
from fastalign.study import frontier
from fastalign.study.callbacks import marks
from fastalign.study.config import StudyConfig
from fastalign.study.envelope import Point, difference, envelope, over_seeds
from fastalign.study.methods import METHODS
from fastalign.study.report import interval, page, table
from fastalign.study.runs import Cell, Runner, read
from fastalign.study.setup import Setup
from fastalign.study.study import run_study, written

SMALL = {
    **{"vocab_size": 320, "hidden_size": 32, "layers": 1, "held_out": 80, "max_new_tokens": 20, "sft_rows": 320},
    **{"sft_epochs": 6.0, "sft_learning_rate": 1e-2, "prompts": 40, "min_gap": 0.05, "eval_prompts": 8},
    **{"evaluations": 2, "best_of": 4, "preference_updates": 6, "preference_batch_size": 8},
    **{"preference_learning_rate": 3e-3, "policy_steps": 2, "policy_batch_size": 8, "policy_learning_rate": 1e-3},
}


def count(root, config, name):
    """A cell's work that says how often it was done; `broken` fails."""
    if name.endswith("broken"):
        raise ValueError("as it should")
    with open(root / "calls.txt", "a", encoding="utf-8") as file:
        file.write(name + "\n")
    print("said by the cell")
    return {"of": config}


@pytest.fixture
def work(tmp_path, monkeypatch):
    """`count` in a module of its own, so that other processes can import it."""
    (tmp_path / "cell_work.py").write_text(inspect.getsource(count))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("cell_work").count
    del sys.modules["cell_work"]


def cells(names, work):
    return [Cell(name, work) for name in names]


class TestRunner:
    def runner(self, tmp_path, processes=1, deadline=None):
        return Runner(tmp_path, 3, processes, deadline, Console(quiet=True))

    def test_each_cell_is_run_once(self, tmp_path, capfd):
        names = [f"cells/c-{i}" for i in range(3)]
        assert self.runner(tmp_path).run(cells(names[:2], count)) == 0
        assert self.runner(tmp_path).run(cells(names, count)) == 0
        assert (tmp_path / "calls.txt").read_text().split() == names
        assert read(tmp_path, names[0])["of"] == 3
        assert read(tmp_path, names[0])["seconds"] >= 0
        assert "said by the cell" in (tmp_path / names[0] / "output.txt").read_text()
        assert "said by the cell" not in capfd.readouterr().out

    def test_two_processes_do_the_same(self, tmp_path, work):
        names = ["cells/a", "cells/broken", "cells/b"]
        with pytest.raises(ValueError, match=r"cell cells/broken failed: as it should"):
            self.runner(tmp_path, 2).run(cells(names, work))
        assert "cells/a" in (tmp_path / "calls.txt").read_text().split()
        assert read(tmp_path, "cells/a")["of"] == 3

    def test_none_is_started_after_the_deadline(self, tmp_path):
        assert self.runner(tmp_path, deadline=time.monotonic() - 1).run(cells(["a", "b"], count)) == 2
        assert not (tmp_path / "calls.txt").exists()

    def test_a_failure_leaves_the_finished_and_runs_again(self, tmp_path):
        with pytest.raises(ValueError, match=r"cell broken failed: as it should") as caught:
            self.runner(tmp_path).run(cells(["a", "broken", "b"], count))
        assert isinstance(caught.value.__cause__, ValueError)
        assert (tmp_path / "calls.txt").read_text().split() == ["a"]
        with pytest.raises(ValueError, match="broken"):
            self.runner(tmp_path).run(cells(["a", "broken"], count))
        assert (tmp_path / "calls.txt").read_text().split() == ["a"]

    @pytest.mark.parametrize("processes", [1, 2])
    def test_none_is_started_before_what_it_needs(self, tmp_path, work, processes):
        runner = self.runner(tmp_path, processes)
        assert (
            runner.run([Cell("late", work, needs="early"), Cell("never", work, needs="lost"), Cell("early", work)]) == 1
        )
        assert (tmp_path / "calls.txt").read_text().split() == ["early", "late"]


class TestEnvelope:
    def test_chosen_by_one_half_and_counted_by_the_other(self):
        points = [Point(0.0, (0.0, 0.1)), Point(1.0, (3.0, 1.0)), Point(2.0, (2.0, 5.0)), Point(9.0, (9.0, 9.0))]
        found = envelope(points, (-1, 0, 1, 2, 8, 9))
        # Within 2: the first half takes the second policy (counted 1.0), the other half the third (counted 2.0).
        np.testing.assert_array_equal(found, [np.nan, 0.05, 2.0, 1.5, 1.5, 9.0])

    def test_the_luck_of_the_best_is_gone(self):
        draw = np.random.default_rng(0)
        equal = [[Point(1.0, tuple(draw.normal(size=2))) for _ in range(20)] for _ in range(400)]
        found = [envelope(points, (1.0,)) for points in equal]
        e = over_seeds(found)[0]
        assert abs(e.mean) < 4 * e.se
        assert np.mean([max(sum(p.halves) / 2 for p in points) for points in equal]) > 1  # what picking the best says

    def test_differences_are_within_seeds(self):
        ours, theirs = [np.array([1.0]), np.array([11.0])], [np.array([0.0]), np.array([10.0])]
        assert difference(ours, theirs)[0] == (1.0, 0.0, 1.0, 1.0)
        assert math.isnan(over_seeds(ours[:1])[0].low)


def test_marks():
    assert marks(12, 3) == [4, 8, 12]
    assert marks(2, 5) == [1, 2]
    assert marks(7, 1) == [7]


class TestConfig:
    def test_sizes_and_mistakes(self):
        assert StudyConfig().settings() == StudyConfig(quick=True).settings()
        assert StudyConfig(full=True).model == "smollm2"
        assert StudyConfig(prompts=7).prompts == 7
        for options, message in {
            ("quick", "full"): "one of --quick and --full",
            ("max_seconds",): "max_seconds must be at least 0",
            ("seeds",): "seeds must be above 0",
            ("first_seed",): "first_seed must be at least 0",
        }.items():
            with pytest.raises(ValueError, match=message):
                StudyConfig(**{name: True if len(options) == 2 else -1 for name in options})
        with pytest.raises(ValueError, match="methods must be one of dpo"):
            frontier.FrontierConfig(methods=["dpo", "sft"])

    def test_the_command_that_is_written_down_makes_the_same_settings(self):
        from fastalign.trainers.common.arguments import parse

        chosen = ["dpo", "grpo"]
        config = frontier.FrontierConfig(seeds=4, first_seed=2, methods=chosen, prompts=9, processes=1, output_dir="x")
        again = parse(frontier.FrontierConfig, written(config).split(), command="study frontier")
        assert (again.settings(), list(again.all_seeds), again.methods) == (config.settings(), [2, 3, 4, 5], chosen)

    def test_command_line(self, capsys):
        assert cli.main(["study"]) == 0
        assert "frontier" in capsys.readouterr().out
        assert cli.main(["study", "moon"]) == 2
        assert "study must be one of frontier" in capsys.readouterr().err
        assert cli.main(["study", "frontier", "--help"]) == 0
        assert "--max_seconds" in capsys.readouterr().out


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.images, self.links, self.cells = [], [], []

    def handle_starttag(self, tag, attrs):
        self.images += [dict(attrs)["src"]] if tag == "img" else []
        self.links += [value for name, value in attrs if name in ("href", "src") and not value.startswith("data:")]

    def handle_data(self, data):
        self.cells.append(data)


def test_html_is_escaped():
    text = page("a < b", [table("x & y", ["<i>"], [["<script>"]])])
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "a &lt; b" in text
    assert interval({"mean": 1.0, "low": 0.5, "high": 1.5}) == "1.00 [0.50, 1.50]"
    assert interval({"mean": 1.0, "low": float("nan"), "high": float("nan")}) == "1.00"
    assert interval({"mean": float("nan"), "low": 0, "high": 0}) == "-"


def test_frontier_end_to_end(made_up_corpus, monkeypatch):
    """Every method once, on the made-up corpus, cut off after the setup and after the first cells."""
    for name, method in METHODS.items():
        monkeypatch.setitem(METHODS, name, method._replace(quick=method.quick[:1]))
    out = made_up_corpus / "study"
    options = {"output_dir": str(out), "seeds": 1, "first_seed": 4, "processes": 1, **SMALL}
    assert frontier.run_frontier(frontier.FrontierConfig(**options, max_seconds=1e-6)) is None
    assert not (out / "frontier.json").exists()
    assert frontier.run_frontier(frontier.FrontierConfig(**options, methods=["dpo"])) is not None
    done = {path: path.stat().st_mtime_ns for path in out.glob("*/*/result.json")}
    assert len(done) == 3  # the setup, best-of-n, dpo
    found = frontier.run_frontier(frontier.FrontierConfig(**options))
    assert all(path.stat().st_mtime_ns == before for path, before in done.items())
    assert not list(out.glob("frontier/*/work"))

    cells = {c["method"]: c["points"] for c in found["cells"].values()}
    assert set(cells) == {*METHODS, "best-of-n"}
    start = cells["best-of-n"][0]["figures"]
    assert start["kl"]["mean"] == pytest.approx(0, abs=1e-5)
    for name in METHODS:
        assert len(cells[name]) == 2
        for point in cells[name]:
            assert point["kl"]["mean"] > 0
            assert np.mean(point["halves"]) == pytest.approx(point["gold"]["mean"])
            # Estimators of one quantity on one set of samples: within their errors of each other.
            for estimator in ("kl_k1", "kl_k3"):
                gap = abs(point[estimator]["mean"] - point["kl"]["mean"])
                assert gap < 6 * (point[estimator]["se"] + point["kl"]["se"])
    gold = [p["gold"] for p in cells["best-of-n"]]
    assert gold == sorted(gold)
    assert cells["dpo"][-1]["gold"]["mean"] > start["gold"]["mean"]

    with open(out / "frontier.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(METHODS) + 3
    row = next(r for r in rows if r["method"] == "dpo")
    assert float(row["gold"]) == cells["dpo"][0]["gold"]["mean"]
    parsed = _Page()
    parsed.feed((out / "frontier.html").read_text(encoding="utf-8"))
    assert parsed.links == []  # it stands alone
    assert base64.b64decode(parsed.images[0].partition(",")[2]) == (out / "frontier.png").read_bytes()
    assert all(method.label in parsed.cells for method in METHODS.values())
    assert re.search(r"fastalign study frontier --quick true --seeds 1 .*--vocab_size 320", " ".join(parsed.cells))
    assert json.loads((out / "frontier.json").read_text())["summary"]["budgets"] == found["summary"]["budgets"]


def test_spread_is_that_within_prompts(tmp_path):
    """Around each prompt's own mean: deviations -1, 1, and -3, 0, 3, over 5 - 2 degrees of freedom."""
    setup = Setup(tmp_path, StudyConfig(), 0)
    rows = [{"prompt": "5 ", "completions": ["4", "6"]}, {"prompt": "90 ", "completions": ["7", "10", "13"]}]
    setup.path.mkdir(parents=True)
    setup.file("lists").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert setup.spread(lambda texts: np.array([sum(map(float, t.split())) for t in texts])) == pytest.approx(
        math.sqrt(20 / 3)
    )


def test_a_folder_of_other_settings_is_refused(made_up_corpus):
    def run(**options):
        config = StudyConfig(output_dir=str(made_up_corpus / "s"), seeds=1, processes=1, max_seconds=1e-6, **options)
        return run_study("frontier", config, [], count, Console(quiet=True))

    assert run() is None
    with pytest.raises(ValueError, match=r"holds a study with other settings \(prompts differ\)"):
        run(prompts=9)
    assert run(prompts=9, overwrite=True) is None
