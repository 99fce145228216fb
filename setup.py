"""Builds fastalign._C. Sources and their flags are spelled out; everything else is in pyproject.toml.

No torch is needed to build: the module takes addresses, and finds torch's OpenMP runtime in the process that loads it.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

X86 = platform.machine().lower() in ("x86_64", "amd64")
MSVC = sys.platform == "win32"
HEADERS = [
    f"kernels/{name}.h"
    for name in (
        "gae_cpu",
        "objectives",
        "parallel",
        "probes_cpu",
        "token_powers_cpu",
        "token_rows_cpu",
        "token_stats",
        "token_stats_cpu",
        "simd_types",
        "simd_avx512",
        "simd_avx2",
        "simd_portable",
    )
]

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
    # same expression must give the same bits wherever it is inlined.
    COMMON = [
        "-std=c++17",
        "-O3",
        "-fvisibility=hidden",
        "-fno-math-errno",
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


class Build(build_ext):
    """Compiles each source with its own flags, in parallel, and links the objects in order."""

    def build_extension(self, ext):
        units = [("kernels/cpu_dispatch.cpp", "dispatch", ["-DFA_HAVE_X86"] if X86 else [])]
        for isa, flags in ISAS.items():
            header = f"simd_{isa.removesuffix('_bf16')}.h"
            defines = [f"-DFA_ISA={isa}", f'-DFA_ISA_NAME="{isa}"', f'-DFA_SIMD_HEADER="{header}"']
            units.append(("kernels/token_stats_cpu.cpp", isa, [*defines, *flags]))
        units += [("kernels/gae_cpu.cpp", "gae", []), ("csrc/bindings.cpp", "bindings", [])]
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


setup(
    ext_modules=[
        Extension(
            "fastalign._C",
            sources=[
                "csrc/bindings.cpp",
                "kernels/cpu_dispatch.cpp",
                "kernels/gae_cpu.cpp",
                "kernels/token_stats_cpu.cpp",
            ],
            depends=HEADERS,
            include_dirs=[pybind11.get_include()],
            language="c++",
        )
    ],
    cmdclass={"build_ext": Build},
)
