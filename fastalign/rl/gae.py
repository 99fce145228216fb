"""From rewards to advantages: GAE, returns, whitening, and the group baselines of RLOO and GRPO."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backends
from ..losses.base import check_float, check_mask, check_range, hide, masked_mean
from ..losses.reductions import as_real


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) and the returns it implies.

    A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t, with value and advantage 0 after the last
    real token: every response is a finished episode. Hidden tokens, wherever they lie (padding on either side, tool
    output inside), are not part of the episode: t + 1 means the next real token, with no discount for those between.

    Args:
        rewards: [..., T], reward of each token.
        values: [..., T], V(s_t), the value before the token.
        mask: [..., T], boolean, True = real. What it hides may hold anything, NaN too, and changes nothing.
        gamma: discount, in [0, 1].
        lam: lambda, in [0, 1]: 0 is the one-step TD error, 1 the Monte Carlo return minus the value.

    Returns:
        (advantages, returns): [..., T] each, 0 where hidden; returns = advantages + values. Constants: no gradient
        flows to rewards or values. float32, or float64 if either input is.

    Raises:
        TypeError: not a floating-point tensor, or a mask that is not boolean.
        ValueError: shapes or devices that differ, gamma or lam outside [0, 1].
    """
    check_float("rewards", rewards)
    if rewards.dim() == 0:
        raise ValueError("rewards must be [..., T]; got a tensor without axes")
    check_float("values", values, rewards.shape, "rewards")
    check_mask("mask", mask, rewards.shape, "rewards")
    for name, t in (("values", values), ("mask", mask)):
        if t.device != rewards.device:
            raise ValueError(f"{name} must be on the device of rewards, {rewards.device}; got {t.device}")
    check_range("gamma", gamma, 0, 1)
    check_range("lam", lam, 0, 1)
    dtype = torch.promote_types(torch.promote_types(rewards.dtype, values.dtype), torch.float32)
    with torch.no_grad():
        rewards, values = rewards.to(dtype), values.to(dtype)
        return _backends.pick(rewards, "gae").gae(rewards, values, mask, gamma, lam)


def discounted_returns(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Return of each token, sum_k gamma^k r_{t+k} over the real tokens from t on: [..., T], 0 where hidden.

    Args:
        rewards: [..., T].
        mask: [..., T], boolean, True = real; hidden tokens are stepped over as in `gae`.
        gamma: discount, in [0, 1].

    Raises:
        TypeError, ValueError: as `gae` does.
    """
    check_float("rewards", rewards)
    returns, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)
    return returns


def masked_whiten(x: Tensor, mask: Tensor, *, unbiased: bool = False, shift_mean: bool = True) -> Tensor:
    """x scaled to unit variance over all real entries (Ziegler et al. 2019), its mean moved to 0 with `shift_mean`.

    (x - mean) / sqrt(var + 1e-8), plus the mean if it is to stay (as for rewards, whose mean matters to the value
    function).

    Args:
        x: [...], floating point.
        mask: [...], boolean, True = real; hidden entries change nothing and come back as 0.
        unbiased: Bessel's correction, n - 1 for n in the variance.
        shift_mean: subtract the mean.

    Returns:
        [...], float32 or float64. Equal entries, and a single one, have no variance and give exactly 0 (or themselves).

    Raises:
        TypeError: not a floating-point tensor, or a mask that is not boolean.
        ValueError: shapes that differ.
    """
    check_float("x", x)
    check_mask("mask", mask, x.shape, "x")
    x = as_real(x, mask)
    off, mean = centred(x, mask)
    variance = masked_mean(off.square(), mask)
    if unbiased:
        count = mask.sum().to(x.dtype)
        variance = variance * count / (count - 1).clamp(min=1)
    scaled = off * torch.rsqrt(variance + 1e-8)
    return scaled if shift_mean else hide(scaled + mean, mask)


def centred(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(x minus its mean over the real entries and 0 where hidden, that mean): exactly 0 where all of them are equal.

    The mean of equal numbers, rounded, need not be that number, and what is left over, divided by a deviation that is
    as small, has one sign for all. So distances to the first real entry are centred, which are 0 where all are equal.

    Args:
        x: [...], floating point.
        mask: [...], boolean, True = real.
    """
    if x.numel() == 0:
        return x, x.sum()
    first = x.flatten().gather(0, mask.flatten().int().argmax(0, keepdim=True))  # an index: no host synchronisation
    off = hide(x - first, mask)
    mean = masked_mean(off, mask)
    return hide(off - mean, mask), first.squeeze(0) + mean


def centred_group(rewards: Tensor) -> Tensor:
    """The same over the last axis."""
    off = rewards - rewards[..., :1]
    return off - off.mean(-1, keepdim=True)


def group_deviation(rewards: Tensor) -> Tensor:
    """[..., 1]: sample standard deviation (n - 1) of each group [..., K]; exactly 0 where its rewards are equal."""
    return (rewards - rewards[..., :1]).std(-1, keepdim=True)


def rloo_advantages(rewards: Tensor) -> Tensor:
    """Each reward minus the mean of its group's others: RLOO (Kool et al. 2019; Ahmadian et al. 2024).

    Args:
        rewards: [..., K], K >= 2 samples of one prompt along the last axis.

    Returns:
        [..., K], constants; exactly 0 in a group of equal rewards.

    Raises:
        TypeError: not a floating-point tensor. ValueError: fewer than two samples in a group.
    """
    rewards = group_rewards(rewards, 2)
    size = rewards.shape[-1]
    return centred_group(rewards) * (size / (size - 1))


def grpo_advantages(rewards: Tensor, *, scale: bool = True, eps: float = 1e-4) -> Tensor:
    """Rewards centred on their group's mean and, with `scale`, divided by its standard deviation plus `eps`.

    GRPO (Shao et al. 2024, sec. 4.1.2), with the sample standard deviation (n - 1) that its implementations use;
    scale=False is Dr. GRPO (Liu et al. 2025, sec. 3.2), which drops the division for the bias it puts on easy and hard
    prompts. A group of one or of equal rewards has advantages of exactly 0.

    Args:
        rewards: [..., K], K samples of one prompt along the last axis.
        scale: divide by the standard deviation.
        eps: >= 0, added to the standard deviation.

    Returns:
        [..., K], constants.

    Raises:
        TypeError: not a floating-point tensor. ValueError: an empty group, a negative eps.
    """
    rewards = group_rewards(rewards, 1)
    check_range("eps", eps, 0)
    off = centred_group(rewards)
    if not scale or rewards.shape[-1] == 1:
        return off
    deviation = group_deviation(rewards)
    return torch.where(deviation > 0, off / (deviation + eps), 0)


def group_rewards(rewards: Tensor, least: int) -> Tensor:
    """The rewards, checked, as constants in float32 at least."""
    check_float("rewards", rewards)
    if rewards.dim() == 0 or rewards.shape[-1] < least:
        raise ValueError(f"rewards must be [..., K] with K of {least} or more; got shape {list(rewards.shape)}")
    return rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32))
