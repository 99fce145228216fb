"""Advantages with other baselines than a group's mean or its others': OPO, OTB, pass@k, GPG, GDPO, ReMax,
REINFORCE++."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..losses.base import check_float, check_mask, check_range
from .gae import centred_group, discounted_returns, group_deviation, group_rewards, grpo_advantages, masked_whiten


def opo_advantages(rewards: Tensor, lengths: Tensor) -> Tensor:
    """Each reward minus its group's mean, weighted by length: OPO (Hao et al. 2025, arXiv:2505.23585).

    The baseline of least variance weighs a response by its squared score, which grows as its length.

    Args:
        rewards: [..., K], K samples of one prompt along the last axis.
        lengths: [..., K], real tokens of each, whole numbers.

    Returns:
        [..., K], constants; exactly 0 in a group of equal rewards.

    Raises:
        TypeError: rewards that are not floating-point. ValueError: an empty group, shapes that differ.
    """
    rewards = group_rewards(rewards, 1)
    if lengths.shape != rewards.shape:
        raise ValueError(f"lengths must have shape {list(rewards.shape)}, that of rewards; got {list(lengths.shape)}")
    off = rewards - rewards[..., :1]
    weights = lengths.to(off.dtype)
    return off - (weights * off).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True).clamp(min=1)


def otb_advantages(rewards: Tensor, mask: Tensor, logps: Tensor, log_sum_sq_probs: Tensor) -> Tensor:
    """Each token's return minus the baseline of least variance at its place: OTB (Li et al. 2026, arXiv:2602.07078).

    The baseline at t is sum_i W_t G_t / sum_i W_t over the group's responses that have a token there, with the return
    G_t and W_t = sum_{j <= t} (1 - 2 pi_j + sum_v pi(v)^2), the squared norm of the gradient of the tokens'
    log-probabilities so far by their logits: the paper's logit-gradient proxy. verl's `optimal_token_baseline`.

    Args:
        rewards: [..., K, T], of each token of K samples of one prompt, as `shape_rewards` makes them.
        mask: [..., K, T], boolean, True = real.
        logps: [..., K, T], log-probabilities of the tokens under the policy that sampled them.
        log_sum_sq_probs: [..., K, T], log sum_v pi(v)^2 of its distribution at each token: a diagnostic of
            `token_stats`.

    Returns:
        [..., K, T], constants, 0 where hidden; exactly 0 where all responses with a token have one return, or where
        one of them alone has a token.

    Raises:
        TypeError: not floating-point tensors, or a mask that is not boolean. ValueError: shapes that differ.
    """
    shape = check_float("rewards", rewards).shape
    if len(shape) < 2:
        raise ValueError(f"rewards must be [..., K, T]; got shape {list(shape)}")
    check_mask("mask", mask, shape, "rewards")
    check_float("logps", logps, shape, "rewards")
    check_float("log_sum_sq_probs", log_sum_sq_probs, shape, "rewards")
    returns = discounted_returns(rewards.detach(), mask, gamma=1.0)
    norms = 1 - 2 * logps.detach().exp() + log_sum_sq_probs.detach().exp()
    weights = torch.where(mask, torch.where(mask, norms, 0).cumsum(-1), 0).to(returns.dtype)
    # Against the first response that has a token there, so that equal returns are exactly 0 whatever the weights.
    first = returns.gather(-2, mask.to(torch.uint8).argmax(-2, keepdim=True))
    off = torch.where(mask, returns - first, 0)
    total = weights.sum(-2, keepdim=True)
    baseline = (weights * off).sum(-2, keepdim=True) / total.clamp(min=torch.finfo(total.dtype).tiny)
    return torch.where(mask, off - baseline, 0)


def passk_advantages(rewards: Tensor, *, scale: bool = True, eps: float = 1e-6) -> Tensor:
    """What the best of a group adds to its maximum, r_1st - r_2nd; 0 for others (Tang et al. 2025, arXiv:2503.19595).

    The gradient of the expected best of K; verl's `grpo_passk`.

    Args:
        rewards: [..., K], K >= 2 samples of one prompt along the last axis.
        scale: divide by the group's standard deviation (n - 1) plus `eps`.
        eps: >= 0.

    Returns:
        [..., K], constants; exactly 0 where two are the best.

    Raises:
        TypeError: not a floating-point tensor. ValueError: fewer than two samples in a group, a negative eps.
    """
    rewards = group_rewards(rewards, 2)
    check_range("eps", eps, 0)
    best, second = rewards.topk(2, dim=-1).values.split(1, dim=-1)
    gain = torch.where(rewards == best, best - second, 0)
    return torch.where(gain > 0, gain / (group_deviation(rewards) + eps), 0) if scale else gain


def gpg_advantages(rewards: Tensor) -> Tensor:
    """Rewards centred on their group's mean, times groups over groups with spread: GPG (arXiv:2504.02546).

    Chu et al. 2025. Groups of equal rewards have no gradient, but count in the loss's mean: the factor undoes that.

    Args:
        rewards: [P, K], K samples of each of P prompts.

    Returns:
        [P, K], constants; exactly 0 in a group of equal rewards.

    Raises:
        TypeError: not a floating-point tensor. ValueError: an empty group.
    """
    off = centred_group(group_rewards(rewards, 1))
    return off * spread_factor((off != 0).any(-1))


def spread_factor(has_spread: Tensor) -> Tensor:
    """Groups over groups with spread, boolean [...] → []; 1 where no group has any."""
    there = has_spread.sum()
    return torch.where(there > 0, has_spread.numel() / there.clamp(min=1), 1.0)


def gdpo_advantages(rewards: Tensor, weights: Sequence[float] | None = None, *, eps: float = 1e-4) -> Tensor:
    """Several rewards, each standardised in its group, then their weighted sum in the batch: GDPO.

    A reward of wide spread does not hide the others, as it does in a sum that is standardised (Liu et al. 2026,
    arXiv:2601.05242).

    Args:
        rewards: [P, K, N], N rewards of each of K samples of P prompts.
        weights: N numbers; 1 each by default.
        eps: >= 0, added to the standard deviations.

    Returns:
        [P, K], constants. A reward that is equal in a group adds exactly 0 there before the batch is standardised.

    Raises:
        TypeError: not a floating-point tensor. ValueError: another shape, weights of another number, a negative eps.
    """
    check_float("rewards", rewards)
    if rewards.dim() != 3:
        raise ValueError(f"rewards must be [P, K, N]; got shape {list(rewards.shape)}")
    each = grpo_advantages(rewards.movedim(-1, 0), eps=eps)
    factors = [1.0] * rewards.shape[-1] if weights is None else [float(w) for w in weights]
    if len(factors) != rewards.shape[-1]:
        raise ValueError(f"weights must be {rewards.shape[-1]} numbers, one for each reward; got {len(factors)}")
    total = (each * torch.tensor(factors, dtype=each.dtype, device=each.device)[:, None, None]).sum(0)
    return grpo_advantages(total.flatten(), eps=eps).view_as(total)


def remax_advantages(rewards: Tensor, greedy_rewards: Tensor) -> Tensor:
    """Each reward minus that of the prompt's greedy response: ReMax (Li et al. 2023, arXiv:2310.10505).

    Args:
        rewards: [..., K], K samples of one prompt along the last axis.
        greedy_rewards: [...], of the response to each prompt that takes the likeliest token at each place.

    Returns:
        [..., K], constants.

    Raises:
        TypeError: not a floating-point tensor. ValueError: an empty group, shapes that differ.
    """
    rewards = group_rewards(rewards, 1)
    check_float("greedy_rewards", greedy_rewards, rewards.shape[:-1], "rewards without its samples")
    return rewards - greedy_rewards.detach().to(rewards.dtype).unsqueeze(-1)


def reinforce_pp_advantages(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Each token's return, whitened over the batch's real tokens: REINFORCE++ (Hu 2025, arXiv:2501.03262).

    Args:
        rewards: [..., T], of each token, as `shape_rewards` makes them.
        mask: [..., T], boolean, True = real.
        gamma: discount, in [0, 1].

    Returns:
        [..., T], constants, 0 where hidden.

    Raises:
        TypeError, ValueError: as `gae` does.
    """
    return masked_whiten(discounted_returns(rewards, mask, gamma=gamma), mask, unbiased=True)


def reinforce_pp_baseline_advantages(rewards: Tensor, mask: Tensor) -> Tensor:
    """Rewards centred on their group's mean, whitened over the batch's real tokens: REINFORCE++-baseline (Hu 2025).

    Args:
        rewards: [..., K], K samples of one prompt along the last axis.
        mask: [..., K, T], boolean, True = real.

    Returns:
        [..., K, T], constants, 0 where hidden; exactly 0 where all groups have equal rewards.

    Raises:
        TypeError: not a floating-point tensor, or a mask that is not boolean. ValueError: shapes that do not fit.
    """
    off = centred_group(group_rewards(rewards, 1))
    check_mask("mask", mask, (*off.shape, mask.shape[-1] if mask.dim() else 0), "rewards and its tokens")
    return masked_whiten(off.unsqueeze(-1).expand(mask.shape), mask, unbiased=True)
