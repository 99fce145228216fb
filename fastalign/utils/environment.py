"""Every environment variable that fastalign reads. No other module looks into the environment.

What chooses kernels and memory is read and checked when this module is imported, that is with `import fastalign`: a
value that means nothing is refused with the variable's name, what it may be, and what it was. Paths, keys and other
packages' variables are read when they are asked for. An empty value counts as none. Imports nothing heavy.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from .processors import allowed_processors

T = TypeVar("T")

BACKEND_NAMES = ("cpu", "cuda", "triton", "eager")
ISA_NAMES = ("avx512_bf16", "avx512", "avx2", "neon", "portable")

SPIN_COUNT = 2000
"""How often an idle thread of GNU's OpenMP looks for work before it sleeps, in `fastalign` commands: some 0.1 ms, more
than most pauses between two parallel regions of a step, and far less than the library's own 300,000 (15 ms), in which
threads that only wait keep other processes off the cores."""


def _given(name: str) -> str | None:
    return os.environ.get(name) or None


def _one_of(names: Sequence[str]) -> Callable[[str], str]:
    def read(value: str) -> str:
        if value not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return value

    return read


def _mebibytes(value: str) -> int:
    if not (value.isascii() and value.isdecimal()):
        raise ValueError("a whole number of MiB, 0 for none")
    return int(value) << 20


def _read(name: str, read: Callable[[str], T]) -> T | None:
    """What the variable says; None where it says nothing. `read` raises ValueError with what it wanted."""
    value = _given(name)
    try:
        return None if value is None else read(value)
    except ValueError as wanted:
        refuse(f"{name} must be {wanted}; got {value!r}")


def refuse(message: str) -> NoReturn:
    """Raises ValueError; but where a `fastalign` command is being started, prints the line and exits with status 2."""
    if not starts_command(sys.argv, sys.orig_argv) or wants_traceback():
        raise ValueError(message)
    print(f"fastalign: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def starts_command(argv: Sequence[str], original: Sequence[str]) -> bool:
    """Whether Python was started as `fastalign ...` or `python -m fastalign ...`; `original`: the words it got."""
    if not argv:
        return False
    if argv[0] == "-m":  # so it is while the module that is to be run is being found
        return "-m" in original and list(original)[original.index("-m") + 1 :][:1] == ["fastalign"]
    return Path(argv[0]).stem == "fastalign"


def wants_traceback() -> bool:
    """FASTALIGN_TRACEBACK: commands raise what they would print in one line."""
    return _given("FASTALIGN_TRACEBACK") is not None


# ------------------------------------------------------------------------------------------- read and checked at import
BACKEND: str | None = _read("FASTALIGN_BACKEND", _one_of(BACKEND_NAMES))
"""The backend of every call outside of `use_backend`; None: the automatic choice."""

CPU_ISA: str | None = _read("FASTALIGN_CPU_ISA", _one_of(ISA_NAMES))
"""The instruction set of the backend `cpu` outside of `use_backend`; None: the best one of the processor."""

CPU_GEMM: str | None = _read("FASTALIGN_CPU_GEMM", _one_of(("16bit", "float32")))
"""In which precision a head on the CPU forms its products of 16-bit tensors; None: as is quicker on the processor."""

KEPT_BYTES: int | None = _read("FASTALIGN_KEPT_MIB", _mebibytes)
"""How much memory of large results is kept for others; None: an eighth of the machine's."""


# -------------------------------------------------------------------------------------------------- read when asked for
def cache_dir() -> Path:
    """Where fetched files are kept: FASTALIGN_CACHE, else ~/.cache/fastalign."""
    return Path(_given("FASTALIGN_CACHE") or Path.home() / ".cache" / "fastalign")


def reference_cache_dir() -> Path:
    """Where log-probabilities of references are kept: FASTALIGN_REFERENCE_CACHE, else `reference` in the cache."""
    return Path(_given("FASTALIGN_REFERENCE_CACHE") or cache_dir() / "reference")


JUDGE_KEY = "FASTALIGN_JUDGE_KEY"
"""Name of the variable with the key of a chat judge's endpoint; none is sent without it."""


def judge_key() -> str | None:
    return _given(JUDGE_KEY)


# ------------------------------------------------------------------------------------------- other packages' variables
def triton_interprets() -> bool:
    """Whether Triton runs kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def launched_with_fsdp() -> bool:
    """Whether accelerate started this process for fully sharded training."""
    return os.environ.get("ACCELERATE_USE_FSDP", "") in ("true", "True", "1")


def is_first_process() -> bool:
    """Whether this is the first of the processes that a launcher started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def allocator_is_set() -> bool:
    """Whether the user has told glibc which blocks to map."""
    return "MALLOC_MMAP_THRESHOLD_" in os.environ


_TOLD = ("FASTALIGN_", "OMP_", "GOMP_", "KMP_", "MKL_", "TRITON_", "CUDA_VISIBLE", "ATEN_", "ONEDNN_", "PYTORCH_")


def told() -> dict[str, str]:
    """What is set of ours and of what torch's kernels read, for a report; of a key, that there is one."""
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_TOLD)}
    return {name: "(set)" if name == JUDGE_KEY else value for name, value in found.items()}


def prepare_threads() -> None:
    """Sets what OpenMP reads when torch loads it, for a command that may share its cores: idle threads soon sleep, and
    there are no more of them than processors that the process may use at a time.

    What the user set stays, and nothing is done where torch is loaded already.
    """
    if "torch" in sys.modules:
        return
    if not ({"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    count = allowed_processors()
    if "OMP_NUM_THREADS" not in os.environ and count is not None:
        os.environ["OMP_NUM_THREADS"] = str(count)
