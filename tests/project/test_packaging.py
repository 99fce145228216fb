"""What an installed package and a source distribution hold beside the modules."""

from __future__ import annotations

import importlib.resources
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TYPES = ("py.typed", "_C.pyi", "_cuda.pyi")


@pytest.fixture
def build_py(monkeypatch):
    """setuptools' command that copies modules and data files, of this project."""
    setuptools = pytest.importorskip("setuptools", reason="needs setuptools")
    monkeypatch.chdir(ROOT)
    project = setuptools.Distribution()
    project.parse_config_files(["pyproject.toml"], ignore_option_errors=False)
    command = project.get_command_obj("build_py")
    command.ensure_finalized()
    return command


def test_types_go_with_the_package(build_py):
    patterns = (build_py.package_data or {}).get("fastalign", [])
    assert {path.name for pattern in patterns for path in ROOT.joinpath("fastalign").glob(pattern)} == set(TYPES)


def test_a_source_distribution_holds_every_file_that_is_compiled(monkeypatch):
    """What the CPU's module names beside its sources: it is always built, the CUDA one only where there is an nvcc."""
    pytest.importorskip("pybind11", reason="needs pybind11")
    setuptools = pytest.importorskip("setuptools", reason="needs setuptools")
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("FASTALIGN_CUDA", "0")
    runpy.run_path("setup.py")
    (cpu,) = given["ext_modules"]
    kinds, folders = (".h", ".cuh", ".cpp", ".cu"), (ROOT / "csrc", ROOT / "kernels")
    there = {path.relative_to(ROOT).as_posix() for f in folders for path in f.rglob("*") if path.suffix in kinds}
    assert there == {*cpu.sources, *cpu.depends}


def test_every_folder_of_modules_is_a_package(build_py):
    packages = {path.parent for name in ("fastalign", "kernels") for path in ROOT.joinpath(name).rglob("*.py")}
    assert {Path(build_py.get_package_dir(name)).resolve() for name in build_py.packages} == packages


@pytest.mark.parametrize("name", TYPES)
def test_types_are_beside_what_is_imported(name):
    assert importlib.resources.files("fastalign").joinpath(name).is_file()
