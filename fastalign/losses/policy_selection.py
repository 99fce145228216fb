"""Which tokens of a batch a policy loss treats apart: of large covariance of A and log pi, or of large entropy.

No gradient goes through a choice, so it is made from the statistics before the loss is formed, and given to it. What a
micro-batch or a process sees is a batch of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.sequences import wide_dtype
from .base import masked_mean
from .policy_objectives import KINDS, Terms


def _covariance(t: Terms) -> Tensor:
    """(A - mean A) (log pi - mean log pi) of each token, means over the batch's real tokens (Cui et al. 2025).

    Its mean is how fast the policy's entropy falls.
    """
    return (t.advantages - masked_mean(t.advantages, t.mask)) * (t.logps - masked_mean(t.logps, t.mask))


def _largest(key: Tensor, among: Tensor, mask: Tensor, share: float) -> Tensor:
    """True at the tokens of the largest keys: that share of the real tokens, rounded down, but at least one."""
    most = (mask.sum().to(wide_dtype(key)) * share).floor().clamp(min=1)
    order = key.masked_fill(~among, -torch.inf).flatten().argsort(descending=True, stable=True)
    return (order.argsort().view(mask.shape) < most) & among  # ranks: no host synchronisation


def _clip_cov(t: Terms) -> Tensor:
    """Some of those between the bounds, drawn by torch's generator, that PPO-clip would not cut anyway (eq. 10-11)."""
    covariance, uncut = _covariance(t), ~KINDS["clip"](t).clipped
    among = t.mask & uncut & (covariance > t.options.clip_cov_lb) & (covariance < t.options.clip_cov_ub)
    return _largest(torch.rand_like(covariance), among, t.mask, t.options.clip_cov_ratio)


def _kl_cov(t: Terms) -> Tensor:
    """Those of the largest (eq. 12)."""
    return _largest(_covariance(t), t.mask, t.mask, t.options.kl_cov_ratio)


SELECTIONS: dict[str, Callable[[Terms], Tensor]] = {"clip_cov": _clip_cov, "kl_cov": _kl_cov}
"""Kind → the tokens that it treats apart, boolean [..., T]."""


def high_entropy(entropy: Tensor, mask: Tensor, share: float) -> Tensor:
    """True at the real tokens whose entropy is at least the quantile 1 - share of all of them (Wang et al. 2025,
    arXiv:2506.01939); interpolated as `torch.quantile` does, without a limit of the number of tokens."""
    ordered = entropy.masked_fill(~mask, torch.inf).flatten().sort().values
    if not len(ordered):
        return mask
    place = (mask.sum() - 1).clamp(min=0).to(wide_dtype(entropy)) * (1 - share)
    low = place.floor()
    below, above = (ordered[at.long().view(1)] for at in (low, place.ceil()))
    return (entropy >= below.lerp(above, (place - low).to(entropy.dtype))) & mask
