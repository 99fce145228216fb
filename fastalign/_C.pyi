"""Types of the compiled module (csrc/bindings.cpp), whose arguments have no names there.

Addresses are those of `Tensor.data_ptr()`; 0 is none.
"""

def token_stats_forward(tokens: tuple, outputs: tuple) -> int: ...
def token_stats_backward(tokens: tuple, per_row: tuple[int, ...], out: int, out_strides: tuple[int, ...]) -> int: ...
def token_objective(
    tokens: tuple,
    program: bytes,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    out: int,
    out_strides: tuple[int, ...],
) -> int: ...

ISAS: tuple
UNUSUAL: int

def learn_tensors(type: object, dtypes: tuple, attributes: bool, make: object) -> bool: ...
def loss_program(
    steps: list, kinds: list[int], loss: int, outputs: list[int], lists: bool, found: list[int]
) -> object: ...

# From here to `logps_forward` arguments are taken by position alone.
def loss_forward(
    logits: object,
    labels: object,
    options: tuple,
    reference: object,
    inplace: bool,
    program: object,
    given: tuple,
    sequences: int,
    list_size: int,
    wanted: bool,
    dtype: int,
    threads: int,
) -> tuple: ...
def loss_terms(
    statistics: tuple,
    labels: object,
    ignore_index: int,
    program: object,
    given: tuple,
    sequences: int,
    list_size: int,
    wanted: bool,
    threads: int,
) -> tuple: ...
def loss_backward(
    logits: object,
    labels: object,
    options: tuple,
    reference: object,
    kept: object,
    upstream: tuple,
    which: int,
    out: object,
    threads: int,
) -> int: ...
def logps_forward(logits: object, labels: object, options: tuple, inplace: bool, threads: int) -> tuple: ...

class HeldBlock:
    def __init__(self, size: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    @staticmethod
    def keep_at_most(size: int) -> None: ...
    @staticmethod
    def kept_bytes() -> int: ...
    @staticmethod
    def release_kept() -> int: ...

def gae(
    wide: bool,
    rewards: int,
    values: int,
    mask: int,
    advantages: int,
    returns: int,
    rows: int,
    length: int,
    gamma: float,
    gamma_lam: float,
    threads: int,
) -> None: ...
def gemm(a: tuple, b: tuple, out: int, out_row: int, sizes: list, add: bool, threads: int) -> None: ...
def divergence(
    dtype: int,
    student: tuple,
    teacher: tuple,
    sizes: list[int],
    mixture: list[float],
    per_row: tuple[int, ...],
    out: int,
    out_row: int,
    threads: int,
) -> None: ...
def follow_isa(variable: object) -> None: ...
def probe(to: int, source: int, size: int, threads: int) -> float: ...
