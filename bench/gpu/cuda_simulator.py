"""The CUDA backend without a GPU: the real launch code, linked with a recorder in place of the CUDA runtime, hands each
launch to the PTX simulator (`ptxsim`), which runs it on CPU tensors and counts what it reads and writes.

Needs nvcc, a C++ compiler and pybind11; `ptxsim` where kernels are to run.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("token_stats_cuda", "gae_cuda", "loss_cuda")
SHARED_BYTES = {"sm_80": 166912, "sm_90a": 232448, "sm_100a": 232448, "sm_120": 101376}
"""Architecture → the most shared memory that a block may ask for."""


def _cache(*parts: str) -> Path:
    digest = hashlib.sha256("\n".join((*parts, sys.version)).encode())
    for folder in ("kernels", "csrc", "bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".cpp", ".h", ".cu", ".cuh"):
                digest.update(path.read_bytes())
    cache = Path(tempfile.gettempdir()) / f"fastalign-cuda-{os.getuid()}-{digest.hexdigest()[:16]}"
    cache.mkdir(exist_ok=True)
    return cache


def _run(*command: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stderr[:4000]}")
    return done.stderr


def compile_kernels(nvcc: str, arch: str) -> Path:
    """A folder with SOURCE.o (host code; device code as PTX) and SOURCE.ptx of each source, for one architecture."""
    folder = _cache(nvcc, arch)
    for source in SOURCES:
        if (folder / f"{source}.ptx").exists():
            continue
        compute = arch.replace("sm_", "compute_")
        with tempfile.TemporaryDirectory() as keep:
            _run(
                nvcc, "-c", "-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-gencode", f"arch={compute},code={compute}",
                "--keep", "--keep-dir", keep, ROOT / "kernels" / "cuda" / f"{source}.cu", "-o", folder / f"{source}.o",
            )  # fmt: skip
            shutil.copy(next(Path(keep).glob("*.ptx")), folder / f"{source}.ptx")
    return folder


def _link(folder: Path, nvcc: str) -> Path:
    target = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    if target.exists():
        return target
    import pybind11

    includes = [
        f"-I{p}" for p in (pybind11.get_include(), sysconfig.get_paths()["include"], _cuda_include(nvcc), folder)
    ]
    objects = [folder / f"{source}.o" for source in SOURCES]
    (folder / "cuda_usage.h").write_text('#define FA_CUDA_USAGE "{}"\n')
    sources = [ROOT / "csrc" / "bindings_cuda.cpp", ROOT / "bench" / "gpu" / "cuda_recorder.cpp"]
    sources += [ROOT / "kernels" / f"{name}.cpp" for name in ("cuda/loss_launch", "loss_program")]
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", '-DFA_CUDA_ARCHITECTURES="simulated"']
    _run(os.environ.get("CXX", "g++"), *flags, *includes, *sources, *objects, "-o", target)
    return target


def _cuda_include(nvcc: str) -> Path:
    home = Path(os.path.realpath(nvcc)).parents[1]
    shown = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False).stderr
    found = re.search(r"^#\$ TOP=(.*)$", shown, re.MULTILINE)
    return (Path(found.group(1)) if found else home) / "include"


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)


class Launch(NamedTuple):
    """One launch: what was asked for, and the simulator's counters."""

    kernel: str
    grid: int
    block: int
    cluster: int
    shared: int
    stats: Any


class Simulator:
    """The backend `cuda`, compiled for one architecture, on CPU tensors."""

    def __init__(self, nvcc: str, arch: str) -> None:
        self.arch = arch
        self.folder = compile_kernels(nvcc, arch)
        self.launches: list[Launch] = []
        self.options: dict[str, Any] = {}
        self._kernels: dict[str, Any] = {}
        self._tensors: list[torch.Tensor] = []
        self._error: BaseException | None = None
        self.module = self._load(_link(self.folder, nvcc))
        self._callback = _CALLBACK(self._launch)
        self.most_blocks = 0
        self.pretend(arch)

    def pretend(self, arch: str) -> None:
        """The launch code sees a device of this architecture; the kernels stay those that were compiled."""
        major = int(re.findall(r"\d+", arch)[0]) // 10
        self.recorder.recorder_setup(self._callback, major, SHARED_BYTES[arch])

    def _load(self, path: Path) -> ModuleType:
        self.recorder = ctypes.CDLL(str(path))
        loader = importlib.machinery.ExtensionFileLoader(f"simulated_{self.arch}._cuda", str(path))
        spec = importlib.util.spec_from_file_location(loader.name, path, loader=loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        return module

    @contextlib.contextmanager
    def __call__(self, **options: Any) -> Iterator[list[Launch]]:
        """Within the block the backend `cuda` serves CPU tensors by simulation; yields the list of launches."""
        from fastalign import _backends
        from fastalign._backends import cuda

        patches = {
            "_cuda": self.module,
            "unavailable": lambda: "",
            "serves": lambda tensor, job: "" if tensor.dtype in cuda.DTYPES[job] else "does not serve it",
            "_place": lambda tensor: (0, 0),
            "_address": self._address,
        }
        before = {name: getattr(cuda, name) for name in patches}
        deterministic = torch.are_deterministic_algorithms_enabled()
        self.most_blocks = options.pop("most_blocks", 0)
        self.options, self.launches, self._tensors = options, [], []
        try:
            for name, value in patches.items():
                setattr(cuda, name, value)
            # Memory that nothing has written is NaN: a result that a kernel leaves out shows.
            torch.use_deterministic_algorithms(True)
            with _backends.use_backend("cuda"):
                yield self.launches
        finally:
            torch.use_deterministic_algorithms(deterministic)
            for name, value in before.items():
                setattr(cuda, name, value)
            self._tensors = []

    def _address(self, t: torch.Tensor | None) -> int:
        if t is None:
            return 0
        self._tensors.append(t)
        return t.data_ptr()

    def _kernel(self, name: str) -> Any:
        import ptxsim

        if name not in self._kernels:
            for source in SOURCES:
                text = (self.folder / f"{source}.ptx").read_text()
                if f".entry {name}(" in text:
                    self._kernels[name] = ptxsim.Kernel(_only(text, name), name)
        return self._kernels[name]

    def _launch(self, name, grid, block, cluster, shared, arguments) -> int:
        try:
            kernel = self._kernel(name.decode())
            blocks = grid[0]
            if self.most_blocks:  # as if the grid had no room for more
                blocks = min(blocks, max(1, self.most_blocks // cluster) * cluster)
            values = [ctypes.string_at(arguments[i], p["size"]) for i, p in enumerate(kernel.params)]
            stats = kernel.launch(
                blocks, block[0], values, smem=shared, cluster=cluster, buffers=self._tensors, **self.options
            )
            self.launches.append(Launch(name.decode(), blocks, block[0], cluster, shared, stats))
        except BaseException as error:  # cannot pass through C++
            self._error = error
            return 719
        return 0

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Turns a launch's failure into the simulator's own error."""
        self._error = None
        try:
            yield
        except RuntimeError as error:
            raise (self._error or error) from error


def _only(text: str, name: str) -> str:
    """The module with one of its kernels and the functions apart: the simulator reads all that it is given."""
    head, *parts = re.split(r"(?m)^(?=\s*(?:(?:\.visible |\.weak )?\.entry |\.func ))", text)
    functions = [p for p in parts if p.lstrip().startswith(".func")]
    return "".join([head, *functions, next(p for p in parts if f".entry {name}(" in p.split("{")[0])])
