from typing import Protocol

architectures: str
usage: str

def token_stats_forward(tokens: tuple, outputs: tuple, device: int, stream: int) -> None: ...
def token_stats_backward(
    tokens: tuple, per_row: tuple, out: int, out_strides: tuple, device: int, stream: int
) -> None: ...
def token_objective(
    tokens: tuple,
    program: bytes,
    inputs: tuple,
    outputs: tuple,
    out: int,
    out_strides: tuple,
    device: int,
    stream: int,
) -> None: ...
def loss_program(codes: list, kinds: list, loss: int, outputs: list, lists: bool, found: list) -> object: ...
def loss_sizes(program: object, tokens: int, sequences: int, list_size: int) -> object: ...
def loss_terms(
    program: object,
    sizes: tuple,
    labels: tuple,
    statistics: list,
    given: tuple,
    results: list,
    slopes: int,
    scratch: int,
    device: int,
    stream: int,
) -> None: ...
def scale(dtype: int, data: int, count: int, factor: int, device: int, stream: int) -> None: ...

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
        device: int,
        stream: int,
        /,
    ) -> None: ...

gae_float32: _Gae
gae_float64: _Gae
one_tile_bytes: int
short_bytes: int
