"""Generalised advantage estimation in Triton: one program for each row, which it scans from its end in blocks.

With t' the next real token after t (see `gae_eager.py`), A_t = delta_t + gamma lam A_t' is an affine recurrence, and so
is V_t', "the value of the nearest real token so far": both are associative scans. Hidden tokens are identities.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .token_stats_triton import Launch

BLOCK = 512


@triton.jit
def _compose(a, b, later_a, later_b):
    """x -> later_a x + later_b after x -> a x + b."""
    return later_a * a, later_a * b + later_b


@triton.jit(
    do_not_specialize=["length"],
    do_not_specialize_on_alignment=["rewards_ptr", "values_ptr", "mask_ptr", "advantages_ptr", "returns_ptr"],
)
def gae_kernel(
    rewards_ptr,
    values_ptr,
    mask_ptr,
    advantages_ptr,
    returns_ptr,
    length: tl.int32,
    gamma: tl.float64,
    lam: tl.float64,
    BLOCK: tl.constexpr,
):
    kind = rewards_ptr.dtype.element_ty
    start = tl.program_id(0).to(tl.int64) * length
    i = tl.arange(0, BLOCK)
    g = (tl.zeros([BLOCK], tl.float64) + gamma).to(kind)
    gl = (tl.zeros([BLOCK], tl.float64) + gamma * lam).to(kind)
    next_value = tl.full((), 0.0, kind)
    next_advantage = tl.full((), 0.0, kind)
    for done in range(0, length, BLOCK):
        t = length - 1 - done - i  # backwards in time
        inside = t >= 0
        real = tl.load(mask_ptr + start + t, inside, other=0) != 0
        value = tl.load(values_ptr + start + t, real, other=0.0)
        reward = tl.load(rewards_ptr + start + t, real, other=0.0)
        # V_t': from the tokens after t, each a map of slope 0 where it is real and the identity where not.
        after = tl.load(mask_ptr + start + t + 1, inside & (t + 1 < length), other=0) != 0
        keep = tl.where(after, 0.0, 1.0).to(kind)
        slope, offset = tl.associative_scan((keep, tl.load(values_ptr + start + t + 1, after, other=0.0)), 0, _compose)
        later_value = slope * next_value + offset
        delta = tl.where(real, reward + g * later_value - value, 0.0)
        slope, offset = tl.associative_scan((tl.where(real, gl, 1.0), delta), 0, _compose)
        advantage = slope * next_advantage + offset
        tl.store(advantages_ptr + start + t, tl.where(real, advantage, 0.0), inside)
        tl.store(returns_ptr + start + t, tl.where(real, advantage + value, 0.0), inside)
        last = i == BLOCK - 1
        next_value = tl.sum(tl.where(last, later_value, 0.0), 0)
        next_advantage = tl.sum(tl.where(last, advantage, 0.0), 0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
    """(launches, (advantages, returns)); arguments as in `gae_eager.gae`, float32 or float64."""
    rewards, values, mask = rewards.contiguous(), values.contiguous(), mask.contiguous()
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    length = rewards.shape[-1]
    arguments = {
        "rewards_ptr": rewards,
        "values_ptr": values,
        "mask_ptr": mask,
        "advantages_ptr": advantages,
        "returns_ptr": returns,
        "length": length,
        "gamma": gamma,
        "lam": lam,
        "BLOCK": BLOCK,
    }
    rows = rewards.numel() // length if length else 0
    return [Launch(gae_kernel, rows, arguments, 4)], (advantages, returns)
