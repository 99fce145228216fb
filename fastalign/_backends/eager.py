"""The backend of plain PyTorch operations: any device, any floating dtype, always there."""

from __future__ import annotations

from torch import Tensor

from ..kernels.eager import divergence_eager, gae_eager, token_stats_eager
from ..kernels.token_call import TokenCall
from ._interface import Forward, Statistics, TokenProgram, check_labels

gae = gae_eager.gae
divergence = divergence_eager.divergence


def unavailable() -> str:
    return ""


def serves(tensor: Tensor, job: str) -> str:
    return ""


def forward(call: TokenCall, want_entropy: bool, want_mean: bool, want_diagnostics: bool = False) -> Forward:
    check_labels(call.labels, call.ignore_index, call.logits.shape[-1])
    return token_stats_eager.forward(call, want_entropy, want_mean, want_diagnostics)


def backward(
    call: TokenCall,
    saved: Tensor,
    entropy: Tensor | None,
    kl: Tensor | None,
    grads: tuple[Tensor | None, ...],
    out: Tensor,
) -> None:
    check_labels(call.labels, call.ignore_index, call.logits.shape[-1])
    token_stats_eager.backward(call, saved, entropy, kl, grads, out)


def objective(
    call: TokenCall,
    program: TokenProgram,
    weight: Tensor,
    inputs: tuple[Tensor, ...],
    want_entropy: bool,
    out: Tensor,
) -> Statistics:
    raise RuntimeError(
        "the one-launch objective needs the backend 'cpu' or 'triton' (float32, bfloat16 or float16 on cpu or a GPU); "
        f"{call.logits.dtype} on {call.logits.device} is served by 'eager': use two steps (fuse_backward=False)"
    )


def scale(gradient: Tensor, by: Tensor) -> None:
    # Off the CPU, looking at the value would stop the host.
    if by.device.type != "cpu" or by.item() != 1.0:
        gradient.mul_(by)
