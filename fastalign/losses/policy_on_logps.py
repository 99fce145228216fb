"""The policy losses on log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..ops.fused_loss import BATCH, TOKEN, Input, Values
from .base import check_float, check_mask, lookup, resolve
from .kl import estimator_name
from .policy_checks import check_config, check_given, token_advantages
from .policy_formula import PolicyLossOutput, chosen_tokens, policy_formula
from .policy_objectives import KINDS
from .policy_options import KIND_ALIASES, named_options
from .reductions import NORMALIZATIONS, Count, check_normalization


def policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    kind: str = "clip",
    cliprange: float = 0.2,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
    ref_logps: Tensor | None = None,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k1",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    sampler_logps: Tensor | None = None,
    importance_level: str = "token",
    importance_cap: float | None = 2.0,
    normalization: str = "token",
    num_items: Count | None = None,
    max_length: int | None = None,
    importance_weights: Tensor | None = None,
    **options: Any,
) -> PolicyLossOutput:
    """Policy loss with KL and entropy terms. With rho = exp(logps - old_logps) and A the advantage, per token:

    | kind | loss | source |
    |---|---|---|
    | `reinforce` | -A log pi | Williams 1992; with `rl.rloo_advantages` RLOO |
    | `trpo` | -A rho | Schulman et al. 2015, eq. 14; see `rl.TrustRegion` |
    | `penalty` | -A rho + kl_coef KL(pi_old, pi) | Schulman et al. 2017, eq. 8; see `rl.SchulmanKL` |
    | `clip` | max(-A rho, -A clip(rho)) | Schulman et al. 2017, eq. 7 |
    | `gspo` | clip, rho = exp(mean_t log rho_t) | Zheng et al. 2025 (cliprange there: 3e-4) |
    | `gspo_token` | the same value, token-wise gradient | Zheng et al. 2025 |
    | `cispo` | -sg[clip(rho)] A log pi | MiniMax 2025, eq. 4 (no lower bound: cliprange=1) |
    | `sapo` | -A 4/tau sigmoid(tau (rho - 1)) | Gao et al. 2025, arXiv:2511.20347 |
    | `luspo` | `gspo` times the length, with normalization="grpo" | Liu et al. 2026, arXiv:2602.05261 |
    | `vespo` | -sg[phi(W)] A log pi, W = prod_t rho | Shen et al. 2026, arXiv:2602.10693 |
    | `gmpo` | -A exp(mean_t cut(log rho_t)), cut to [-cliprange, cliprange_high] | Zhao et al. 2025, arXiv:2507.20673 |
    | `dppo_tv` | -sg[rho] A log pi, 0 where pi went too far by total variation | Qi et al. 2026, arXiv:2602.04879 |
    | `dppo_kl` | the same by the KL of taking the token or not | Qi et al. 2026, arXiv:2602.04879 |
    | `dro` | -A log pi + beta/2 (log rho)^2 | Richemond et al. 2024, arXiv:2405.19107 |
    | `gpg` | -A log pi, as `reinforce` | Chu et al. 2025 (arXiv:2504.02546); with `rl.gpg_advantages` |
    | `clip_cov` | clip, but for some tokens of large covariance of A and log pi | Cui et al. 2025, arXiv:2505.22617 |
    | `kl_cov` | -A rho, + abs(log rho) at tokens of the largest covariance | Cui et al. 2025, arXiv:2505.22617 |

    clip(rho) cuts to [1 - cliprange, 1 + cliprange_high]. `vanilla` and `geo_mean` are verl's names of `clip` and
    `gmpo`. The exponent of every exponential of a log-ratio is at most 60, in KLs and importance weights too, since
    e^60 is finite in float32. `clip_cov` and `kl_cov` choose among the real tokens of this call, `clip_cov` at random.

    A KL term used as a loss needs a choice of estimator: with "k1", the default, its gradient is zero on average (see
    `kl_estimate`); put k1 into the reward (`rl.shape_rewards`), or use "k2", "k3", "k3+" or "exact" here. The exception
    is `penalty` without `ref_logps`: it estimates KL(pi_old, pi) from the old policy's own samples, where k1 and k3
    have the right gradient on average, and k2 to first order.

    Args:
        logps: [..., T] (usually [B, T]), log-probability of each token by the policy; float32 or float64 (half
            precision is converted to float32). The only differentiated input, with `kl` and `entropy`.
        old_logps: [..., T], by the policy before this batch of updates.
        advantages: [..., T], or [...] for one advantage per sequence.
        mask: [..., T], boolean, True = real. What it hides may hold anything, NaN too, and changes nothing.
        kind: the objective, a row of the table above.
        cliprange: epsilon; how far below 1 (and above, unless `cliprange_high` is given) the ratio may go.
        cliprange_high: upper epsilon, where it differs (clip-higher: Yu et al. 2025, eq. 10); of `cispo` from
            -cliprange on, so that its weight may stay below 1.
        dual_clip: c > 1, usually 3: the loss of a token with A < 0 is at most -c A (Ye et al. 2020).
        ref_logps: [..., T], by the reference policy, for the KL.
        kl: [..., T], exact KL of each token's distribution, `token_stats(..., kl=True).kl`; with kl_estimator="exact".
        kl_coef: beta >= 0, weight of the KL in the loss.
        kl_estimator: "k1", "k2", "k3", "k3+" (k3 with k2's gradient), "k3_clamped", "abs" (see `kl_estimate`) or
            "exact".
        entropy: [..., T], `token_stats(..., entropy=True).entropy`, in nats.
        entropy_coef: weight of the entropy bonus, which is subtracted from the loss.
        sampler_logps: [..., T], log-probabilities that the sampling engine reported: the policy term is weighted by
            `importance_weights(old_logps, sampler_logps, mask, level=importance_level, cap=importance_cap, ...)`.
        importance_level, importance_cap: see `importance_weights`.
        normalization: "token" (= "bnpo"), "grpo", "dapo" or "dr_grpo"; applies to all terms alike.
        num_items: count to divide by in place of this call's: real tokens, for "grpo" and "dr_grpo" sequences, over
            all microbatches and processes. "dapo" needs it.
        max_length: tokens that a completion may have; "dr_grpo" needs it.
        importance_weights: [..., T], made already, of a larger batch for instance, in place of those of sampler_logps.
        options: of every kind, by name: importance_mode, importance_floor, importance_normalize, see
            `importance_weights`; off_policy_mask_threshold, delta: no policy term of tokens with A < 0 in a sequence
            whose mean log(pi_sampler / pi) is above it, pi_old for a sampler that is not given (DeepSeek-AI 2025,
            arXiv:2512.02556, eq. 9); use_bias_correction_kl: the KL to the reference times pi / pi_old, at most e^20,
            which makes its gradient that of KL(pi, pi_ref) off the policy too (the same paper, with k3);
            top_entropy_quantile: the policy term is of that share of the real tokens of this call, those of the
            largest `entropy` (Wang et al. 2025, arXiv:2506.01939), averaged as if the others had a loss of 0.
            Of the kind: sapo_temperature_pos, sapo_temperature_neg; vespo_k_pos, vespo_lambda_pos,
            vespo_k_neg, vespo_lambda_neg; dppo_ratio_cap (rho is cut to it); dro_beta; clip_cov_ratio (share of the
            real tokens), clip_cov_lb, clip_cov_ub; kl_cov_ratio, kl_cov_coef. `policy_options` has the defaults.

    Returns:
        PolicyLossOutput. Where logps equal old_logps, ratio is 1 and approxkl and clipfrac are 0, exactly.

    Raises:
        TypeError: not a floating-point tensor, a mask that is not boolean, an argument that there is not.
        ValueError: shapes that differ, an unknown name, a number out of its range, a term without its input, an option
            of another kind.
    """
    config = policy_config(
        options,
        kind=kind,
        cliprange=cliprange,
        cliprange_high=cliprange_high,
        dual_clip=dual_clip,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        entropy_coef=entropy_coef,
        importance_level=importance_level,
        importance_cap=importance_cap,
        normalization=normalization,
        max_length=max_length,
    )
    stats = {"logps": logps, "kl": kl, "entropy": entropy}
    given = {"ref_logps": ref_logps, "sampler_logps": sampler_logps, "importance_weights": importance_weights}
    return configured_loss(config, stats, old_logps, advantages, mask, given, num_items)


def policy_config(options: Mapping[str, Any], **given: Any) -> dict[str, Any]:
    """Everything that a policy loss can be told, under our own names. Numbers are checked where it runs."""
    given["kind"] = resolve("kind", KINDS, KIND_ALIASES, given["kind"])
    given["kl_estimator"] = estimator_name("kl_estimator", given["kl_estimator"])
    lookup("normalization", NORMALIZATIONS, given["normalization"])
    own, general = named_options(given["kind"], options)
    return given | {"options": own, "general": general}


def configured_loss(
    config: dict[str, Any],
    stats: dict[str, Any],
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    given: dict[str, Tensor | None],
    num_items: Count | None,
    chosen: dict[str, Tensor] | None = None,
) -> PolicyLossOutput:
    """`policy_loss` of what `policy_config` made. stats: logps, kl and entropy; given: ref_logps, sampler_logps and
    importance_weights; chosen: what `chosen_tokens` found, if that was done already."""
    logps = stats["logps"]
    check_config(config)
    check_float("logps", logps)
    check_mask("mask", mask, logps.shape, "logps")
    check_float("old_logps", old_logps, logps.shape, "logps")
    check_normalization(logps, config["normalization"], num_items, config["max_length"])
    advantages = token_advantages(advantages, mask)
    of_tokens: dict[str, Tensor | None] = {"advantages": advantages, **given}
    check_given(config, mask, stats["kl"], stats["entropy"], of_tokens)
    if chosen is None:
        chosen = chosen_tokens(config, mask, logps, stats["entropy"], old_logps, advantages)
    of_tokens |= {"old_logps": old_logps, **chosen}
    inputs = [Input(name, x, TOKEN) for name, x in of_tokens.items() if x is not None]
    return policy_formula(Values(mask, stats, [*inputs, Input("num_items", num_items, BATCH)]), config)
