"""What a PPO update adds to the policy loss: the value function's loss and the pretraining mix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .base import check_float, check_mask, check_range, masked_mean
from .reductions import as_real


class ValueLossOutput(NamedTuple):
    """`loss` is differentiable, the rest detached."""

    loss: Tensor
    """Scalar: half the mean squared error."""
    clipfrac: Tensor
    """Scalar: share of real tokens whose value was cut."""


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, cliprange_value: float | None = 0.2
) -> ValueLossOutput:
    """0.5 mean(max((v - R)^2, (clip(v, v_old - eps, v_old + eps) - R)^2)) over real tokens (Schulman et al. 2017).

    Args:
        values: [..., T], the value head's output, differentiated.
        old_values: [..., T], its output when the tokens were sampled.
        returns: [..., T], the targets R, from `rl.gae`.
        mask: [..., T], boolean, True = real; what it hides changes nothing.
        cliprange_value: eps >= 0; None for no clipping.

    Returns:
        ValueLossOutput(loss, clipfrac). The factor 1/2 is in the loss; a coefficient (vf_coef) is the caller's.

    Raises:
        TypeError: not a floating-point tensor, or a mask that is not boolean.
        ValueError: shapes that differ, a negative cliprange_value.
    """
    check_float("values", values)
    check_mask("mask", mask, values.shape, "values")
    check_float("old_values", old_values, values.shape, "values")
    check_float("returns", returns, values.shape, "values")
    value, target = as_real(values, mask), as_real(returns, mask).detach()
    error = (value - target).square()
    clipped = torch.zeros_like(mask)
    if cliprange_value is not None:
        check_range("cliprange_value", cliprange_value, 0)
        old = as_real(old_values, mask).detach()
        near = torch.minimum(torch.maximum(value, old - cliprange_value), old + cliprange_value)
        cut = (near - target).square()
        error, clipped = torch.maximum(error, cut), cut > error
    return ValueLossOutput(0.5 * masked_mean(error, mask), masked_mean(clipped.to(value.dtype), mask))


def ptx_loss(loss: Tensor, logps: Tensor, mask: Tensor, *, ptx_coef: float) -> Tensor:
    """loss - ptx_coef * E[log pi] over pretraining tokens: PPO-ptx (Ouyang et al. 2022, eq. 2; there ptx_coef = 27.8).

    Args:
        loss: scalar, a policy loss.
        logps: [..., T], the policy's log-probabilities of a batch of pretraining text.
        mask: [..., T], boolean, True = real. The expectation is the mean over real tokens.
        ptx_coef: gamma >= 0.
    """
    check_float("loss", loss, (), "a scalar")
    check_float("logps", logps)
    check_mask("mask", mask, logps.shape, "logps")
    if check_range("ptx_coef", ptx_coef, 0) == 0:  # not formed: 0 times an infinite mean would be NaN
        return loss
    return loss - ptx_coef * masked_mean(as_real(logps, mask), mask)
