"""`fastalign bench`: the right files are run, two results are compared, pages are drawn, a missing checkout is said."""

import base64
import copy
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastalign.cli import bench as bench_command
from fastalign.cli import commands as cli

BENCH = Path(__file__).resolve().parents[2] / "bench"


def load(name):
    spec = importlib.util.spec_from_file_location(f"bench_{name}_under_test", BENCH / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(BENCH))  # where its neighbours are
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCH))
    return module


def results(scale=1.0):
    """Results of a sweep over two vocabularies, ours `scale` times as slow as it was."""
    cases = []
    for vocab in (1000, 4000):
        size = {"logits_bytes": 8 * vocab * 4, "read_bytes": 8 * vocab * 4, "copied_bytes": 0}
        case = {"suite": "logps", "job": "forward", "rows": 8, "vocab": vocab, "dtype": "float32", **size}
        rows = {"fastalign": scale * vocab * 1e-9, "eager": vocab * 4e-9}
        spread = {name: {"median": t, "p10": 0.9 * t, "p90": 1.1 * t, "seconds": [t]} for name, t in rows.items()}
        more = {"rate": 3e10, "of_limit": 0.9, "peak_bytes": 1 << 20, "error": {"output": 1e-7}}
        case["variants"] = {name: {"ours": name == "fastalign", **more, **row} for name, row in spread.items()}
        case["ratios"] = {"fastalign": {"eager": {"median": 4 / scale}}}
        case["probes"] = {"read": {"rate": 3e10}, "copy": {"rate": 4e10}}
        cases.append(case | {"checks": {}})
    environment = {"cpu": "some <cpu>", "threads": 2, "device": "cpu", "commit": None, "dirty": False, "isa": "avx2"}
    environment |= {"backend": "cpu", "versions": {"torch": "2.13"}, "date": "2026-11-23", "options": {"rounds": 1}}
    return {"schema": 1, "environment": environment, "cases": cases}


@pytest.fixture
def files(tmp_path):
    def write(**named):
        for name, content in named.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return [str(tmp_path / f"{name}.json") for name in named]

    return write


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    """The package may be installed elsewhere."""
    monkeypatch.chdir(BENCH)


# ------------------------------------------------------------------------------------------------------- what gets run
def test_suites_are_files_of_the_checkout():
    assert {path.name for path in BENCH.glob("bench_*.py")} == {
        f for files in bench_command.SUITES.values() for f in files
    }
    for name in bench_command._SCRIPTS.values():
        assert (BENCH / name).is_file()


def test_suites_and_options_are_told_apart():
    calls = []

    def run(*call):
        calls.append(call)
        return 3

    assert bench_command.main(["logps", "losses", "--rows", "8,16", "-q"], run) == 3
    assert bench_command.main(["--rounds", "2"], run) == 3
    assert calls == [(["logps", "losses"], ["--rows", "8,16", "-q"]), (list(bench_command.SUITES), ["--rounds", "2"])]
    with pytest.raises(ValueError, match=r"suite must be one of logps, .*; got 'loss'"):
        bench_command.main(["loss"], run)


def test_a_sweep_is_collected():
    options = [
        "--rows",
        "8,16",
        "--vocab",
        "32,64",
        "--dtype",
        "float32",
        "--variants",
        "eager",
        "--collect-only",
        "-q",
    ]
    command = [sys.executable, "-m", "fastalign", "bench", "logps", "losses", *options]
    done = subprocess.run(command, cwd=BENCH, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = set(re.findall(r"(\w+)-(\w+)-(\d+)x(\d+)-float32-eager", done.stdout))
    jobs = [
        ("logps", "forward"),
        ("logps", "backward"),
        ("logps", "both"),
        ("dpo", "forward"),
        ("dpo", "both"),
        ("ppo", "both"),
    ]
    assert found == {(*job, rows, vocab) for job in jobs for rows in ("8", "16") for vocab in ("32", "64")}


def test_a_fused_head_is_read_like_the_others(files, capsys):
    command = [sys.executable, BENCH / "head.py", "--tokens", "16", "--vocab", "64", "--hidden", "8", "--rounds", "2"]
    command += ["--dtype", "float32", "--threads", "1", "--no-memory", "--variants", "fastalign;eager;bare GEMMs"]
    (path,) = files(head={})
    done = subprocess.run([*command, "--json", path], cwd=BENCH, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (case,) = json.loads(Path(path).read_text())["cases"]
    assert case["probes"].keys() == {"bare GEMMs"}
    assert case["ratios"]["fastalign"].keys() == {"eager"}
    assert cli.main(["bench", "compare", path, path]) == 0
    assert cli.main(["bench", "report", path]) == 0
    assert "| head both | 16 x 64 float32, 8 hidden |" in capsys.readouterr().out
    assert cli.main(["bench", "report", path, "--details"]) == 0
    assert "GFLOP/s" in capsys.readouterr().out


def test_without_a_checkout(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_command, "roots", lambda: [tmp_path])
    for arguments in (["logps"], ["report", "x.json"], []):
        assert cli.main(["bench", *arguments]) == 1
        assert "part of the source checkout and not of the installed package" in capsys.readouterr().err
    assert cli.main(["bench", "--help"]) == 0
    assert "fastalign bench compare BEFORE.json AFTER.json" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- the gate
@pytest.mark.parametrize(
    ("scale", "ratio", "status"), [(1.0, 1.1, 0), (1.09, 1.1, 0), (1.2, 1.1, 1), (1.2, 1.3, 0), (0.5, 1.1, 0)]
)
def test_the_gate(files, capsys, scale, ratio, status):
    before, after = files(before=results(), after=results(scale))
    assert cli.main(["bench", "compare", before, after, "--ratio", str(ratio)]) == status
    out = capsys.readouterr().out
    assert out.count(f"{scale:.3f}x  (eager 1.000x)") == 2
    assert f"{0 if status else 2} of 2 within {ratio}x" in out


def test_a_case_that_is_gone_fails_and_other_machines_are_refused(files, capsys):
    compare = load("compare")
    less = results()
    del less["cases"][1]
    before, after = files(before=results(), after=less)
    assert cli.main(["bench", "compare", before, after]) == 1
    assert "missing" in capsys.readouterr().out
    other = copy.deepcopy(less)
    other["environment"]["threads"] = 4
    with pytest.raises(ValueError, match="threads is 2 in one and 4 in the other"):
        compare.changes(less, other)


# ----------------------------------------------------------------------------------------------------------- the report
def test_pages_stand_alone(files, tmp_path):
    (path,) = files(run=results())
    page, folder = tmp_path / "page.html", tmp_path / "plots"
    assert cli.main(["bench", "report", path, "--html", str(page), "--plots", str(folder)]) == 0
    images = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert set(images) == {"time.png", "memory.png", "roofline.png"}
    assert all(image.startswith(b"\x89PNG") and len(image) > 5000 for image in images.values())
    text = page.read_text(encoding="utf-8")
    held = {base64.b64decode(code) for code in re.findall(r'src="data:image/png;base64,([^"]+)"', text)}
    assert held == set(images.values())
    assert text.count("<tr>") == 3  # a heading and two cases
    assert "some &lt;cpu&gt;" in text
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_what_was_not_measured_is_not_drawn():
    plots = load("plots")
    bare = results()
    for case in bare["cases"]:
        del case["probes"]
        for row in case["variants"].values():
            row["peak_bytes"] = None
    assert set(plots.plots(bare)) == {"time.png"}
    assert plots.plots({"cases": []}) == {}
