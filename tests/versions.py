"""The losses and integrations in fresh environments of other versions, and the table of what passed.

    python tests/versions.py                       every row that can be had here
    python tests/versions.py torch-2.6 trl-1.15    these
    python tests/versions.py --update              and write the table into .github/docs/drop-in.md

One environment at a time, in a temporary folder: pip installs torch of the row, this package built from the sources
(FASTALIGN_CUDA=0, objects kept in build/objects) and the row's other packages; then the tests of `LOSSES` and, where
transformers is among them, `INTEGRATIONS` run. A row whose interpreter or torch cannot be had says so. Results are kept
in build/versions.json, so that rows may be run one by one. Exit status 1 if a row failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build" / "versions.json"
PAGE = ROOT / ".github" / "docs" / "drop-in.md"
BEGIN, END = "<!-- versions: written by tests/versions.py -->", "<!-- end of versions -->"

LOSSES = ("cases", "every_isa", "ops", "ops_torch", "head", "programs", "call", "cross_entropy", "custom_losses", "rl")
INTEGRATIONS = ("transformers", "model_logits", "lm_head")
TRL = ("trl",)
TOOLS = (
    "pytest>=8",
    "pytest-xdist",
    "hypothesis",
    "numpy",
    "setuptools",
)  # torch 2.6 imports without setuptools, not compiles


@dataclass(frozen=True)
class Row:
    """One environment: an interpreter, a torch, and what stands on it."""

    name: str
    python: str
    torch: str
    transformers: str = ""  # a requirement's version, as ==5.0.0; "": not installed
    trl: str = ""

    def packages(self) -> list[str]:
        found = [f"transformers{self.transformers}", "accelerate>=1.0", "datasets>=3.0", "peft>=0.17", "rich", "pyyaml"]
        found += ["scikit-learn"]
        return (found if self.transformers else []) + ([f"trl{self.trl}", "triton"] if self.trl else [])

    def tests(self) -> list[str]:
        names = (*LOSSES, *(INTEGRATIONS if self.transformers else ()), *(TRL if self.trl else ()))
        return [path.relative_to(ROOT).as_posix() for name in names for path in ROOT.glob(f"tests/*/test_{name}.py")]


ROWS = (
    Row("torch-2.6", "3.10", "==2.6.0", "==5.0.0"),
    Row("torch-2.10", "3.12", "==2.10.0"),
    Row("torch-2.13", "3.11", "==2.13.0", ">=5.24", "==1.16.0"),
    Row("transformers-5.0", "3.11", "==2.13.0", "==5.0.0", "==1.15.0"),
    Row("trl-1.15", "3.11", "==2.13.0", ">=5.24", "==1.15.0"),
    Row("torch-newest", "3.13", ""),
    Row("python-3.14", "3.14", ""),
)


def interpreter(version: str) -> str | None:
    """An interpreter of this version: on PATH, of pyenv, or of uv."""
    found = shutil.which(f"python{version}")
    candidates = [found] if found else []
    if pyenv := shutil.which("pyenv"):
        versions = Path(subprocess.run([pyenv, "root"], capture_output=True, text=True, check=False).stdout.strip())
        candidates += map(str, sorted(versions.glob(f"versions/{version}.*/bin/python")))
    if uv := shutil.which("uv"):
        candidates.append(
            subprocess.run([uv, "python", "find", version], capture_output=True, text=True).stdout.strip()
        )
    for path in filter(None, candidates):
        ask = [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]  # a shim may be there and not work
        if subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip() == version:
            return path
    return None


def run(row: Row, folder: Path) -> dict[str, str]:
    """What came of a row: versions, and the tests' last line or the reason why there is none."""
    python = interpreter(row.python)
    if python is None:
        return {"result": f"no Python {row.python} here"}
    subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
    inside = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    environment = os.environ | {"FASTALIGN_CUDA": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}

    def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [inside / "pip", "install", "--quiet", "--progress-bar", "off", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    for wanted in ([f"torch{row.torch}", *TOOLS], [".", *row.packages()]):
        done = pip(*wanted)
        if done.returncode:
            reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
            return {"result": f"not installed: {reasons[-1].removeprefix('ERROR: ')}"}
    freeze = subprocess.run([inside / "pip", "freeze"], capture_output=True, text=True, check=True).stdout.lower()
    versions = dict(re.findall(r"^(torch|transformers|trl)==(\S+)$", freeze, re.MULTILINE))
    command = [inside / "pytest", "-q", "-n", "logical", "--dist", "loadfile", *row.tests()]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout[-4000:] if done.returncode else "", flush=True)
    last = (done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1]
    return {**versions, "result": re.sub(r" in .*| ?=+ ?|, \d+ warnings?", "", last)}


def table(kept: dict[str, dict[str, str]]) -> str:
    lines = ["| Python | PyTorch | transformers | TRL | tests of losses and integrations |", "|---|---|---|---|---|"]
    for row in ROWS:
        found = kept.get(row.name)
        if found is None:
            continue
        asked = {"torch": row.torch or "newest", "transformers": row.transformers, "trl": row.trl}
        versions = [found.get(name, asked[name].strip("=") or "-") for name in ("torch", "transformers", "trl")]
        lines.append(f"| {row.python} | {' | '.join(versions)} | {found['result']} ({found['date']}) |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(row.name for row in ROWS)}; without: all")
    parser.add_argument("--update", action="store_true", help="write the table into the documentation")
    given = parser.parse_args()
    unknown = set(given.rows) - {row.name for row in ROWS}
    if unknown:
        parser.error(f"no row {', '.join(sorted(unknown))}")
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for row in ROWS:
        if given.rows and row.name not in given.rows:
            continue
        with tempfile.TemporaryDirectory() as folder:
            kept[row.name] = {**run(row, Path(folder)), "date": date.today().isoformat()}
        print(f"{row.name}: {kept[row.name]['result']}", flush=True)
        KEPT.parent.mkdir(exist_ok=True)
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    if given.update:
        text = PAGE.read_text(encoding="utf-8")
        start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
        PAGE.write_text(f"{text[:start]}\n{table(kept)}\n{text[end:]}", encoding="utf-8")
    print(table(kept))
    return int(any("failed" in found["result"] or "error" in found["result"] for found in kept.values()))


if __name__ == "__main__":
    sys.exit(main())
