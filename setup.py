"""Builds fastalign._C and, where there is a GPU for it, fastalign._cuda. The rest is in pyproject.toml.

No torch is needed to build: the modules take addresses, and `_C` finds torch's OpenMP runtime in the process that loads
it. Objects are kept in build/objects/ under a hash of all that they were made of, so that a second build compiles what
has changed, whatever the Python. In the environment:

FASTALIGN_CUDA        auto (the default): the CUDA kernels where there are an nvcc and an NVIDIA driver with a GPU;
                      1: in any case; 0: never
FASTALIGN_CUDA_ARCHS  of 80, 90a, 100a, 120 and ptx, separated by commas, or all; without it, those of the GPUs that are
                      present, all where there is none
FASTALIGN_PURE        1: nothing is compiled, and all runs in PyTorch's operations and Triton
"""

import ctypes
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# What it is built for: of a cross build, as of macOS's with ARCHFLAGS, what Python says it is.
PLATFORM = (os.environ.get("_PYTHON_HOST_PLATFORM") or f"{sys.platform}-{platform.machine()}").lower()
X86 = PLATFORM.endswith(("x86_64", "amd64"))
ARM = PLATFORM.endswith(("aarch64", "arm64"))
MSVC = sys.platform == "win32"
if sys.platform == "darwin":  # one kind of processor, also with a Python that has both
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")
OBJECTS, KEPT_OBJECTS = Path("build", "objects"), 12


def say(text):
    """A line that `pip install -v` shows."""
    print(f"fastalign: {text}", flush=True)


def headers(without):
    """Every header of ours whose path does not say that it is for the other kind of processor, from the root."""
    kinds = [(folder, kind) for folder in ("csrc", "kernels") for kind in ("*.h", "*.cuh")]
    found = [path.as_posix() for folder, kind in kinds for path in Path(folder).rglob(kind)]
    return sorted(path for path in found if without not in path)


# Instruction set → compiler flags. Linked in this order, portable first: where two objects hold the same inline
# function of the standard library, the linker keeps the first, and that must be one that runs everywhere.
ISAS = {"portable": []}
if X86:
    ISAS["avx2"] = ["/arch:AVX2"] if MSVC else ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = (
        ["/arch:AVX512"] if MSVC else ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
    )
    # Zen 4, Cooper Lake, Sapphire Rapids and later: rounding to bfloat16 is one instruction.
    ISAS["avx512_bf16"] = [*ISAS["avx512"], *(["-D__AVX512BF16__"] if MSVC else ["-mavx512bf16"])]
if ARM and not MSVC:
    ISAS["neon"] = []  # every 64-bit Arm processor has it

if MSVC:
    COMMON = ["/std:c++17", "/O2", "/EHsc", "/Zc:preprocessor"]
else:
    # No -ffast-math: NaN and infinities are part of the contract, and sums must not be reordered. No contraction: the
    # same expression must give the same bits wherever it is inlined. Nobody reads the flags that exceptions leave.
    COMMON = ["-std=c++17", "-O3", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra"]
    COMMON += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
    # GCC 12 warns about its own AVX-512 header.
    COMMON += ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-pragmas"]
if sys.platform == "linux":
    # Compiled for OpenMP but not linked with a runtime: torch, which is imported first, has made its own global.
    COMMON.append("-fopenmp")


# ------------------------------------------------------------------------------------------------- CUDA
# Machine code for each generation, and PTX that later ones translate for themselves.
CUDA_TARGETS = {
    "80": ("compute_80", "sm_80"),
    "90a": ("compute_90a", "sm_90a"),
    "100a": ("compute_100a", "sm_100a"),
    "120": ("compute_120", "sm_120"),
    "ptx": ("compute_90", "compute_90"),
}
CPU_SOURCES = ("cpu/loss_interpreter", "loss_program", "cpu/fresh_pages", "cpu/large_blocks", "cpu/gae_cpu")
CUDA_SOURCES = ["kernels/cuda/gae_cuda.cu", "kernels/cuda/loss_cuda.cu", "kernels/cuda/token_stats_cuda.cu"]
CUDA_HOST_SOURCES = ["csrc/bindings_cuda.cpp", "kernels/cuda/loss_launch.cpp", "kernels/loss_program.cpp"]


def nvcc_candidates():
    """Where an nvcc may be: CUDA_HOME, PATH, and the package nvidia-cuda-nvcc in one of its layouts."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield os.path.join(os.environ[variable], "bin", "nvcc")
    yield shutil.which("nvcc") or ""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations if spec else None) or ():
        yield from map(str, sorted(Path(root).glob("*/bin/nvcc")))


def gpus():
    """Compute capabilities (major, minor) of the GPUs that the NVIDIA driver shows; none where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, found = ctypes.c_int(), []
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    for device in range(count.value):
        parts = (ctypes.c_int(), ctypes.c_int())
        for part, attribute in zip(parts, (75, 76), strict=True):
            driver.cuDeviceGetAttribute(ctypes.byref(part), attribute, device)
        found.append(tuple(part.value for part in parts))
    return found


def target_of(capability):
    """The entry of CUDA_TARGETS that serves a GPU; None for one that is too old."""
    exact = {(9, 0): "90a", (10, 0): "100a"}  # code for 90a and 100a runs on these alone
    if capability in exact:
        return exact[capability]
    return {8: "80", 12: "120"}.get(capability[0], "ptx" if capability >= (9, 0) else None)


def cuda_targets(found):
    """Names in CUDA_TARGETS to build for, given the GPUs that are present."""
    wanted = os.environ.get("FASTALIGN_CUDA_ARCHS", "").replace(",", " ").replace("sm_", "").split()
    unknown = [name for name in wanted if name not in (*CUDA_TARGETS, "all")]
    if unknown:
        raise SystemExit(f"FASTALIGN_CUDA_ARCHS must be all or of {', '.join(CUDA_TARGETS)}; got {unknown[0]!r}")
    present = set(wanted) or {target_of(capability) for capability in found} - {None}
    return list(CUDA_TARGETS) if "all" in present or not present else [n for n in CUDA_TARGETS if n in present]


def find_nvcc():
    """(path of nvcc, names of targets), or None where CUDA is not to be built, and one line that says why."""
    wanted = os.environ.get("FASTALIGN_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"FASTALIGN_CUDA must be auto, 0 or 1; got {wanted!r}")
    if wanted == "0" or (wanted == "auto" and sys.platform != "linux"):
        return None, ""
    if sys.platform != "linux":
        raise SystemExit(f"FASTALIGN_CUDA=1: the CUDA kernels are built on Linux only, not on {sys.platform}")
    nvcc, present = next(filter(os.path.exists, nvcc_candidates()), None), gpus()
    if nvcc is None and wanted == "1":
        raise SystemExit(
            "FASTALIGN_CUDA=1, but there is no nvcc: set CUDA_HOME, put nvcc on PATH, or install nvidia-cuda-nvcc into "
            "the environment that builds (pip install --no-build-isolation)"
        )
    targets = cuda_targets(present)
    if wanted == "auto" and not any(map(target_of, present)):
        seen = "no NVIDIA driver shows a GPU" if not present else "the GPUs here are older than compute capability 8.0"
        return None, f"without CUDA kernels: {seen}" + (f"; FASTALIGN_CUDA=1 builds them with {nvcc}" if nvcc else "")
    if nvcc is None:
        return (
            None,
            "without CUDA kernels (Triton serves the GPU): no nvcc in CUDA_HOME, PATH or nvidia-cuda-nvcc",
        )
    return (nvcc, targets), f"CUDA kernels for {', '.join(targets)} by {nvcc}, some minutes; FASTALIGN_CUDA=0: without"


def cuda_flags(nvcc):
    """(include directories, library directories) that nvcc itself would use."""
    shown = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False).stderr
    settings = dict(re.findall(r"^#\$ (\w+)=(.*)$", shown, re.MULTILINE))
    top = settings.get("TOP", str(Path(os.path.realpath(nvcc)).parents[1])).strip()
    libraries = re.findall(r'"-L([^"]+)"', settings.get("LIBRARIES", ""))
    return [f"{top}/include"], [*libraries, f"{top}/lib64", f"{top}/lib"]


PTXAS = re.compile(
    r"Compiling entry function '(?P<kernel>\S+)' for '(?P<arch>\w+)'.*?(?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def usage(log):
    """Architecture → kernel → registers, bytes spilled and static shared memory, from the assembler's own words."""
    table = {}
    for m in PTXAS.finditer(log):
        shared = re.search(r"(\d+) bytes smem", m["rest"])
        table.setdefault(m["arch"], {})[m["kernel"]] = {
            "registers": int(m["registers"]),
            "spill_bytes": int(m["stores"]) + int(m["loads"]),
            "shared_bytes": int(shared[1]) if shared else 0,
        }
    return table


# ------------------------------------------------------------------------------------------------- objects
class Unit(NamedTuple):
    """One source with its own flags: the same source may be several objects."""

    source: str
    name: str
    flags: list
    headers: tuple = ()  # that are included by the name in a macro
    binds: bool = False  # to Python, so that its object is that version's alone


def included(path, seen):
    """Adds to `seen` the file and those of ours that it includes, and those that these include."""
    if path in seen or not path.exists():
        return seen
    seen.add(path)
    for name in re.findall(r'^\s*#include "([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
        for folder in (path.parent, Path("kernels")):
            included(Path(os.path.normpath(folder / name)), seen)
    return seen


def version_of(command):
    """What a compiler calls itself; cl.exe says it when it is given nothing to do."""
    done = subprocess.run(command if MSVC else [*command, "--version"], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def fingerprint(unit, words):
    """Of all that an object is made of."""
    files = included(Path(unit.source), set())
    for name in unit.headers:
        included(Path(unit.source).parent / name, files)
    made_of = hashlib.sha256(json.dumps(words).encode())
    for path in sorted(files):
        made_of.update(path.as_posix().encode() + path.read_bytes())
    return made_of.hexdigest()[:20]


def keep(name, suffix):
    """Forgets the objects of a name that were not used for longest."""
    there = sorted(OBJECTS.glob(f"{name}-*{suffix}"), key=os.path.getmtime, reverse=True)
    for path in there[KEPT_OBJECTS:]:
        path.unlink(missing_ok=True)


class Build(build_ext):
    """Compiles each source with its own flags, in parallel, and links the objects in order."""

    def build_extension(self, ext):
        OBJECTS.mkdir(parents=True, exist_ok=True)
        if MSVC:
            self.compiler.initialize()
            self.compiler_words, self.compiler_version = [], version_of([self.compiler.cc])
        else:
            self.find_compiler()
        {"fastalign._C": self.build_cpu, "fastalign._cuda": self.build_cuda}[ext.name](ext)

    def find_compiler(self):
        """SystemExit with what is missing, before the first error of a compiler; behind ccache, where there is one."""
        kinds = [k for k in ("compiler_so_cxx", "compiler_so") if getattr(self.compiler, k, None)]
        words = list(getattr(self.compiler, kinds[0]))
        pure = "FASTALIGN_PURE=1 installs without (PyTorch's own operations, far slower on the CPU)"
        if shutil.which(words[0]) is None:
            raise SystemExit(f"fastalign needs a C++17 compiler, not there: {words[0]}; install g++ or set CXX; {pure}")
        if not any(Path(folder, "Python.h").exists() for folder in (sysconfig.get_path("include"), *self.include_dirs)):
            raise SystemExit(f"fastalign needs Python.h: install python3-dev or python3-devel; {pure}")
        ccache = shutil.which("ccache")
        if ccache and "ccache" not in os.path.realpath(shutil.which(words[0])):
            for kind in kinds:
                setattr(self.compiler, kind, [ccache, *getattr(self.compiler, kind)])
        self.compiler_words = [word for word in words if not word.startswith("-I")]
        self.compiler_version = version_of(words[:1])

    # ------------------------------------------------------------------------------------------- one object
    def kept(self, unit, words, compile_to, suffix=".o"):
        """The object of a unit, and what its compiler said: of an earlier build, or by `compile_to(folder)`."""
        made = OBJECTS / f"{unit.name}-{fingerprint(unit, words)}{suffix}"
        log = made.with_suffix(".log")
        if made.exists() and log.exists():
            os.utime(made)
            self.tell(unit, "as before")
            return str(made), log.read_text()
        start = time.monotonic()
        with tempfile.TemporaryDirectory(dir=OBJECTS) as folder:  # two builds may run in one tree
            path, said = compile_to(folder)
            Path(folder, "log").write_text(said)
            os.replace(Path(folder, "log"), log)
            os.replace(path, made)
        keep(unit.name, suffix), keep(unit.name, ".log")
        self.tell(unit, f"{time.monotonic() - start:.0f} s")
        return str(made), said

    def tell(self, unit, how):
        self.done += 1
        kind = f" for {unit.name}" if unit.name in ISAS else ""
        say(f"[{self.done}/{self.count}] {unit.source}{kind}: {how}")

    def compile_host(self, unit, include_dirs, salt=""):
        def compile_to(folder):
            options = {"include_dirs": include_dirs, "extra_postargs": [*COMMON, *unit.flags]}
            return self.compiler.compile([unit.source], output_dir=folder, **options)[0], ""

        words = [PLATFORM, self.compiler_version, self.compiler_words, COMMON, unit.flags, salt]
        words += [sys.version, pybind11.__version__] if unit.binds else []
        return self.kept(unit, words, compile_to, ".obj" if MSVC else ".o")[0]

    def start(self, count, what):
        self.done, self.count, self.started = 0, count, time.monotonic()
        say(what)

    # ------------------------------------------------------------------------------------------- the modules
    def build_cpu(self, ext):
        units = [Unit("csrc/bindings.cpp", "bindings", [], binds=True)]
        for isa, flags in reversed(ISAS.items()):
            header = f"simd_{isa.removesuffix('_bf16')}.h"
            defines = [f"-DFA_ISA={isa}", f'-DFA_ISA_NAME="{isa}"', f'-DFA_SIMD_HEADER="{header}"']
            defines += [f"-DFA_BASE_ISA={isa.removesuffix('_bf16')}"] * isa.endswith("_bf16")
            units.append(Unit("kernels/cpu/token_stats_cpu.cpp", isa, [*defines, *flags], (header,)))
        units += [Unit(f"kernels/{name}.cpp", Path(name).name, []) for name in CPU_SOURCES]
        have = ["-DFA_HAVE_X86"] * ("avx2" in ISAS) + ["-DFA_HAVE_NEON"] * ("neon" in ISAS)
        units.append(Unit("kernels/cpu/cpu_dispatch.cpp", "dispatch", have))
        workers = os.cpu_count()
        self.start(len(units), f"compiling for {', '.join(ISAS)}, {workers} files at a time")
        with ThreadPoolExecutor(workers) as pool:  # the long ones first, linked the other way round
            objects = list(pool.map(lambda unit: self.compile_host(unit, ext.include_dirs), units))[::-1]
        path = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(objects, path, target_lang="c++", build_temp=self.build_temp)
        say(f"fastalign._C in {time.monotonic() - self.started:.0f} s")

    def build_cuda(self, ext):
        (nvcc, targets), _ = find_nvcc()
        units = [Unit(source, Path(source).stem, []) for source in CUDA_SOURCES]
        hosts = [Unit(s, f"{Path(s).stem}_host", [], binds=s.startswith("csrc")) for s in CUDA_HOST_SOURCES]
        self.start(len(units) + len(hosts), f"compiling CUDA kernels for {', '.join(targets)}")
        flags = ["-std=c++17", "-O3", "-Xptxas", "-v", "-Xcompiler", "-fPIC,-fvisibility=hidden,-g0"]
        for compute, code in map(CUDA_TARGETS.get, targets):
            flags += ["-gencode", f"arch={compute},code={code}"]
        version = version_of([nvcc])
        made = [self.kept(unit, [version, flags], lambda f, u=unit: self.by_nvcc(nvcc, flags, u, f)) for unit in units]
        objects, log = [path for path, _ in made], "".join(said for _, said in made)
        includes, libraries = cuda_flags(nvcc)
        defines = [f'-DFA_CUDA_ARCHITECTURES="{" ".join(CUDA_TARGETS[name][1] for name in targets)}"']
        # What the assembler said goes into the module: the tests look at it, and bench/gpu_static.py prints it.
        folder = Path(self.build_temp, "cuda")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cuda_usage.h").write_text(f'#define FA_CUDA_USAGE R"json({json.dumps(usage(log))})json"\n')
        include_dirs = [*ext.include_dirs, *includes, str(folder)]
        objects += [self.compile_host(u._replace(flags=defines), include_dirs, salt=[version, log]) for u in hosts]
        # The static runtime looks for a driver when it is first used, not when it is loaded.
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            library_dirs=libraries,
            libraries=["cudart_static", "dl", "rt", "pthread"],
            target_lang="c++",
            build_temp=self.build_temp,
        )
        say(f"fastalign._cuda in {time.monotonic() - self.started:.0f} s")

    @staticmethod
    def by_nvcc(nvcc, flags, unit, folder):
        path = os.path.join(folder, "object.o")
        command = [nvcc, "-c", *flags, "--threads", str(os.cpu_count()), unit.source, "-o", path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
        return path, done.stderr


def extensions():
    """The modules to compile, and a line that says it."""
    if os.environ.get("FASTALIGN_PURE", "0") not in ("", "0", "1"):
        raise SystemExit(f"FASTALIGN_PURE must be 0 or 1; got {os.environ['FASTALIGN_PURE']!r}")
    if os.environ.get("FASTALIGN_PURE") == "1":
        return [], "FASTALIGN_PURE=1: nothing is compiled"
    chosen, line = find_nvcc()
    common = {"include_dirs": [pybind11.get_include()], "language": "c++"}
    cpu_sources = [f"kernels/{name}.cpp" for name in CPU_SOURCES]
    cuda_sources = [*CUDA_HOST_SOURCES, *CUDA_SOURCES]
    cuda = Extension("fastalign._cuda", sources=cuda_sources, depends=headers(without="cpu"), **common)
    cpu = Extension(
        "fastalign._C",
        sources=["csrc/bindings.cpp", "kernels/cpu/token_stats_cpu.cpp", "kernels/cpu/cpu_dispatch.cpp", *cpu_sources],
        # All of them, and what only the other module is made of: a source distribution holds what is named here.
        depends=[*headers(without="cuda"), *headers(without="cpu"), *cuda_sources],
        **common,
    )
    return [*([cuda] if chosen else []), cpu], line


modules, said = extensions()
if said and {"build_ext", "bdist_wheel", "editable_wheel", "build"} & set(sys.argv):
    say(said)
setup(ext_modules=modules, cmdclass={"build_ext": Build})
