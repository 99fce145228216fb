"""Builds fastalign._C and, where there is an nvcc, fastalign._cuda. Sources and their flags are spelled out; everything
else is in pyproject.toml.

No torch is needed to build: the modules take addresses, and `_C` finds torch's OpenMP runtime in the process that loads
it. FASTALIGN_CUDA=auto (the default) builds the CUDA kernels if nvcc is found, 0 never, 1 fails without it.
"""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

X86 = platform.machine().lower() in ("x86_64", "amd64")
MSVC = sys.platform == "win32"


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

if MSVC:
    COMMON = ["/std:c++17", "/O2", "/EHsc", "/Zc:preprocessor"]
else:
    # No -ffast-math: NaN and infinities are part of the contract, and sums must not be reordered. No contraction: the
    # same expression must give the same bits wherever it is inlined. Nobody reads the flags that exceptions leave.
    COMMON = [
        "-std=c++17",
        "-O3",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=off",
        "-g0",
        "-Wall",
        "-Wextra",
    ]
    # GCC 12 warns about its own AVX-512 header.
    COMMON += ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-pragmas"]
if sys.platform == "linux":
    # Compiled for OpenMP but not linked with a runtime: torch, which is imported first, has made its own global.
    COMMON.append("-fopenmp")


# ------------------------------------------------------------------------------------------------- CUDA
# Machine code for each generation, and PTX that later ones translate for themselves.
CUDA_TARGETS = {"sm_80": "compute_80", "sm_90a": "compute_90a", "sm_100a": "compute_100a", "sm_120": "compute_120"}
CUDA_PTX = "compute_90"
CUDA_SOURCES = ["kernels/gae_cuda.cu", "kernels/loss_cuda.cu", "kernels/token_stats_cuda.cu"]
CUDA_HOST_SOURCES = ["csrc/bindings_cuda.cpp", "kernels/loss_launch.cpp", "kernels/loss_program.cpp"]


def nvcc_candidates():
    """Where an nvcc may be: CUDA_HOME, PATH, and the package nvidia-cuda-nvcc in one of its layouts."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield os.path.join(os.environ[variable], "bin", "nvcc")
    yield shutil.which("nvcc") or ""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations if spec else None) or ():
        yield from map(str, sorted(Path(root).glob("*/bin/nvcc")))


def find_nvcc():
    """Path of nvcc, or None where CUDA is not to be built."""
    wanted = os.environ.get("FASTALIGN_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"FASTALIGN_CUDA must be auto, 0 or 1; got {wanted!r}")
    if wanted == "0" or (wanted == "auto" and sys.platform != "linux"):
        return None
    if sys.platform != "linux":
        raise SystemExit(f"FASTALIGN_CUDA=1: the CUDA kernels are built on Linux only, not on {sys.platform}")
    found = next(filter(os.path.exists, nvcc_candidates()), None)
    if found is None and wanted == "1":
        raise SystemExit(
            "FASTALIGN_CUDA=1, but there is no nvcc: set CUDA_HOME, put nvcc on PATH, or install nvidia-cuda-nvcc into "
            "the environment that builds (pip install --no-build-isolation)"
        )
    return found


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


class Build(build_ext):
    """Compiles each source with its own flags, in parallel, and links the objects in order."""

    def build_extension(self, ext):
        {"fastalign._C": self.build_cpu, "fastalign._cuda": self.build_cuda}[ext.name](ext)

    def build_cuda(self, ext):
        nvcc, folder = find_nvcc(), Path(self.build_temp, "cuda")
        folder.mkdir(parents=True, exist_ok=True)
        codes = [f"arch={compute},code={arch}" for arch, compute in CUDA_TARGETS.items()]
        codes.append(f"arch={CUDA_PTX},code={CUDA_PTX}")
        flags = ["-std=c++17", "-O3", "-Xptxas", "-v", "-Xcompiler", "-fPIC,-fvisibility=hidden,-g0"]
        flags += [part for code in codes for part in ("-gencode", code)]
        flags += ["--threads", str(os.cpu_count())]  # architectures side by side
        objects, log = [], ""
        for source in CUDA_SOURCES:
            objects.append(str(folder / f"{Path(source).stem}.o"))
            command = [nvcc, "-c", *flags, source, "-o", objects[-1]]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
            log += done.stderr
        includes, libraries = cuda_flags(nvcc)
        defines = [f'-DFA_CUDA_ARCHITECTURES="{" ".join(CUDA_TARGETS)} {CUDA_PTX}"']
        # What the assembler said goes into the module: the tests look at it, and bench/gpu_static.py prints it.
        (folder / "cuda_usage.h").write_text(f'#define FA_CUDA_USAGE R"json({json.dumps(usage(log))})json"\n')
        include_dirs = [*ext.include_dirs, *includes, str(folder)]
        objects += self.compiler.compile(
            CUDA_HOST_SOURCES,
            output_dir=str(folder),
            include_dirs=include_dirs,
            extra_postargs=[*COMMON, *defines],
        )
        # The static runtime looks for a driver when it is first used, not when it is loaded.
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            library_dirs=libraries,
            libraries=["cudart_static", "dl", "rt", "pthread"],
            target_lang="c++",
            build_temp=self.build_temp,
        )

    def build_cpu(self, ext):
        units = [("kernels/cpu_dispatch.cpp", "dispatch", ["-DFA_HAVE_X86"] if X86 else [])]
        for isa, flags in ISAS.items():
            header = f"simd_{isa.removesuffix('_bf16')}.h"
            defines = [f"-DFA_ISA={isa}", f'-DFA_ISA_NAME="{isa}"', f'-DFA_SIMD_HEADER="{header}"']
            units.append(("kernels/token_stats_cpu.cpp", isa, [*defines, *flags]))
        units += [
            (f"kernels/{name}.cpp", name, [])
            for name in ("fresh_pages", "large_blocks", "gae_cpu", "loss_interpreter", "loss_program")
        ]
        units += [("csrc/bindings.cpp", "bindings", [])]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda unit: self.compile_one(ext, *unit), units))
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), target_lang="c++", build_temp=self.build_temp
        )

    def compile_one(self, ext, source, name, flags):
        directory = os.path.join(self.build_temp, name)  # one source, several objects
        return self.compiler.compile(
            [source], output_dir=directory, include_dirs=ext.include_dirs, extra_postargs=[*COMMON, *flags]
        )[0]


cuda = [
    Extension(
        "fastalign._cuda",
        sources=[*CUDA_HOST_SOURCES, *CUDA_SOURCES],
        depends=headers(without="cpu"),
        include_dirs=[pybind11.get_include()],
        language="c++",
    )
]
setup(
    ext_modules=[
        *(cuda if find_nvcc() else []),
        Extension(
            "fastalign._C",
            sources=[
                "csrc/bindings.cpp",
                "kernels/cpu_dispatch.cpp",
                "kernels/fresh_pages.cpp",
                "kernels/gae_cpu.cpp",
                "kernels/large_blocks.cpp",
                "kernels/loss_interpreter.cpp",
                "kernels/loss_program.cpp",
                "kernels/token_stats_cpu.cpp",
            ],
            # All of them, and what only the other module is made of: a source distribution holds what is named here.
            depends=[*headers(without="cuda"), *headers(without="cpu"), *CUDA_SOURCES, *CUDA_HOST_SOURCES],
            include_dirs=[pybind11.get_include()],
            language="c++",
        ),
    ],
    cmdclass={"build_ext": Build},
)
