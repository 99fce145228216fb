"""`fastalign bench`: the benchmarks of a source checkout, where they lie beside the package and not in it."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

SUITES: dict[str, tuple[str, ...]] = {
    "logps": ("bench_logps.py",),
    "losses": ("bench_dpo.py", "bench_ppo.py"),
    "rl": ("bench_gae.py",),
    "trainers": ("bench_trainers.py",),
    "overhead": ("bench_overhead.py",),
    "isa": ("bench_isa.py",),
}
"""Suite → its files, all of them run by pytest, interleaved and written to one results file."""

_SCRIPTS = {name: f"{name}.py" for name in ("head", "sweep", "report", "behind", "compare", "targets")}

USAGE = f"""usage: fastalign bench [SUITE ...] [--rows N,N] [--vocab V,V] [--dtype D,D] [--rounds N] [--json OUT]
       fastalign bench head [--tokens N] [--vocab V] [--hidden H] [--json OUT]
       fastalign bench sweep --json OUT [--minutes M] [--seconds-per-case S] [--only JOB,JOB]
       fastalign bench report RESULTS.json [--html OUT.html] [--plots FOLDER] [--details]
       fastalign bench behind RESULTS.json
       fastalign bench compare BEFORE.json AFTER.json [--ratio 1.1]
       fastalign bench targets RESULTS.json

suites: {", ".join(SUITES)}; none: all.
Alone: head, from hidden states; sweep, over sizes, in pieces if need be. `report`, `behind`, `compare` read all files.
Every other option is pytest's; `pytest bench --help` lists them."""


def roots() -> list[Path]:
    """Folders that may be a source checkout: the package's own, then the working folder and those above it."""
    return [Path(__file__).resolve().parents[2], Path.cwd(), *Path.cwd().parents]


def folder() -> Path:
    """Where the benchmarks are; FileNotFoundError where there is no checkout."""
    for root in roots():
        about = root / "pyproject.toml"
        ours = about.is_file() and 'name = "fastalign"' in about.read_text(encoding="utf-8")
        if ours and (root / "bench" / "conftest.py").is_file():
            return root / "bench"
    raise FileNotFoundError(
        "the benchmarks are part of the source checkout and not of the installed package: clone the repository and run "
        f"this inside it (looked in {roots()[0]}, and from {Path.cwd()} upwards)"
    )


def _script(name: str, arguments: list[str]) -> int:
    """Runs one of the folder's scripts as Python would, its neighbours importable."""
    path = folder() / name
    before = sys.argv, list(sys.path)
    sys.argv, sys.path = [str(path), *arguments], [str(path.parent), *sys.path]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv, sys.path = before
    return 0


def _pytest(suites: list[str], options: list[str]) -> int:
    import pytest

    files = [str(folder() / name) for suite in suites for name in SUITES[suite]]
    return int(pytest.main([*files, *options, "-p", "no:cacheprovider"]))


def main(argv: list[str], run: Callable[[list[str], list[str]], int] = _pytest) -> int:
    """Exit status of what was asked for.

    Raises:
        FileNotFoundError: no source checkout.
        ValueError: an unknown suite.
    """
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if argv and argv[0] in _SCRIPTS:
        return _script(_SCRIPTS[argv[0]], argv[1:])
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    unknown = [name for name in argv[:count] if name not in SUITES]
    if unknown:
        raise ValueError(f"suite must be one of {', '.join((*SUITES, *_SCRIPTS))}; got {unknown[0]!r}")
    return run(argv[:count] or list(SUITES), argv[count:])
