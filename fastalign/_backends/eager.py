"""The backend of plain PyTorch operations: any device, any floating dtype, always there."""

from __future__ import annotations

from torch import Tensor

from ..kernels import gae_eager, token_stats_eager
from ._interface import Statistics, TokenProgram, check_labels

gae = gae_eager.gae


def unavailable() -> str:
    return ""


def serves(tensor: Tensor, job: str) -> str:
    return ""


def forward(
    logits: Tensor, labels: Tensor, ref_logits: Tensor | None, ignore_index: int, *options
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    check_labels(labels, ignore_index, logits.shape[-1])
    return token_stats_eager.forward(logits, labels, ref_logits, ignore_index, *options)


def backward(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    saved: Tensor,
    entropy: Tensor | None,
    kl: Tensor | None,
    grads: tuple[Tensor | None, ...],
    ignore_index: int,
    temperature: float,
    softcap: float,
    out: Tensor,
) -> None:
    check_labels(labels, ignore_index, logits.shape[-1])
    token_stats_eager.backward(
        logits, labels, ref_logits, saved, entropy, kl, grads, ignore_index, temperature, softcap, out
    )


def objective(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    program: TokenProgram,
    weight: Tensor,
    inputs: tuple[Tensor, ...],
    ignore_index: int,
    temperature: float,
    softcap: float,
    want_entropy: bool,
    out: Tensor,
) -> Statistics:
    raise RuntimeError(
        "the one-launch objective needs the backend 'cpu' or 'triton' (float32, bfloat16 or float16 on cpu or a GPU); "
        f"{logits.dtype} on {logits.device} is served by 'eager': use two steps (fuse_backward=False)"
    )


def scale(gradient: Tensor, by: Tensor) -> None:
    # Off the CPU, looking at the value would stop the host.
    if by.device.type != "cpu" or by.item() != 1.0:
        gradient.mul_(by)
