"""The tensors that the kernels fill: one float32 number per row and statistic."""

import torch
from torch import Tensor


def new_statistics(
    labels: Tensor, entropy: bool, kl: bool, mean: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(logps, lse, entropy, kl, mean), unfilled, of the labels' shape and device, dense; None for those not wanted."""

    # `empty_like` takes half the time of torch.empty with a shape, less still where there is nothing else to say.
    logps = torch.empty_like(labels, dtype=torch.float32, memory_format=torch.contiguous_format)
    return (
        logps,
        torch.empty_like(logps),
        torch.empty_like(logps) if entropy else None,
        torch.empty_like(logps) if kl else None,
        torch.empty_like(logps) if mean else None,
    )


def new_diagnostics(logps: Tensor) -> tuple[Tensor, Tensor]:
    """(log_sum_sq, argmax), unfilled: float32 and int64 of their shape."""
    return torch.empty_like(logps), torch.empty_like(logps, dtype=torch.int64)


def new_saved(logps: Tensor) -> Tensor:
    """What the forward keeps for the backward, unfilled: (m, r) of the policy and of the reference, see `Stats`."""
    return logps.new_empty((*logps.shape, 4))
