"""Types of the compiled module (csrc/bindings.cpp). Addresses are those of `Tensor.data_ptr()`; 0 is none."""

def token_stats_forward(tokens: tuple, outputs: tuple) -> int: ...
def token_stats_backward(
    tokens: tuple, per_row: tuple[int, ...], out: int, out_strides: tuple[int, ...], fresh: bool
) -> int: ...
def token_objective(
    tokens: tuple,
    options: tuple,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    out: int,
    out_strides: tuple[int, ...],
    fresh: bool,
) -> int: ...
def gae_float32(
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
def gae_float64(
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
def isa() -> str: ...
def isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def read(data: int, size: int, threads: int) -> float: ...
def copy(to: int, source: int, size: int, threads: int) -> None: ...
