"""Types of the compiled module (csrc/bindings.cpp), whose arguments have no names there.

Addresses are those of `Tensor.data_ptr()`; 0 is none.
"""

from typing import Protocol

def token_stats_forward(tokens: tuple, outputs: tuple) -> int: ...
def token_stats_backward(tokens: tuple, per_row: tuple[int, ...], out: int, out_strides: tuple[int, ...]) -> int: ...
def token_objective(
    tokens: tuple,
    options: tuple,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    out: int,
    out_strides: tuple[int, ...],
) -> int: ...

UNUSUAL: int

def learn_tensors(type: object, dtypes: tuple, attributes: bool) -> None: ...
def mean_nll_forward(
    logits: object, labels: object, options: tuple, inplace: bool, loss: object, over: int, least: int, threads: int
) -> tuple: ...
def mean_nll_backward(
    logits: object,
    labels: object,
    options: tuple,
    saved: object,
    gradient: object,
    count: int,
    out: object,
    threads: int,
) -> int: ...
def pair_loss_forward(
    logits: object,
    labels: object,
    options: tuple,
    inplace: bool,
    references: tuple,
    loss: tuple[float, float, float],
    pairs: int,
    made: tuple,
    threads: int,
) -> tuple: ...
def policy_loss_forward(
    logits: object,
    labels: object,
    options: tuple,
    inplace: bool,
    inputs: tuple,
    objective: tuple,
    over: float,
    made: tuple,
    threads: int,
) -> tuple: ...
def list_loss_forward(
    logits: object, labels: object, options: tuple, inplace: bool, size: int, loss: tuple, made: tuple, threads: int
) -> tuple: ...
def logps_forward(
    logits: object, labels: object, options: tuple, inplace: bool, logps: object, lse: object, threads: int
) -> tuple: ...
def sums_forward(logits: object, labels: object, options: tuple, inplace: bool, sums: tuple, threads: int) -> tuple: ...
def logps_backward(
    logits: object, labels: object, options: tuple, saved: object, gradients: tuple, out: object, threads: int
) -> int: ...

class HeldBlock:
    def __init__(self, size: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def keep_at_most(size: int) -> None: ...
def kept_bytes() -> int: ...
def release_kept() -> int: ...

class _Gae(Protocol):
    def __call__(
        self,
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
        /,
    ) -> None: ...

gae_float32: _Gae
gae_float64: _Gae

def isas() -> list[str]: ...
def follow_isa(variable: object) -> None: ...
def read(data: int, size: int, threads: int) -> float: ...
def copy(to: int, source: int, size: int, threads: int) -> None: ...
