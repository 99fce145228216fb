"""Policy optimisation: PPO and its relatives (REINFORCE, TRPO, GRPO, DAPO, Dr. GRPO, GSPO, CISPO) on log-probabilities.

They differ in three independent choices, and so do the arguments here: what a token contributes (`kind`), how tokens
are averaged (`normalization`) and what holds the policy close to another (`kl_coef`, `kl_estimator`). GRPO is
`kind="clip"` with group advantages (`fastalign.rl.grpo_advantages`) and `normalization="grpo"`; DAPO the same with
`cliprange_high` and `normalization="dapo"`; Dr. GRPO with unscaled advantages and `normalization="dr_grpo"`.
"""

from __future__ import annotations

from types import NoneType
from typing import Any

import torch
from torch import Tensor

from ..head.head import Head
from ..ops.fused_loss import BATCH, SEQUENCE, TOKEN, FusedLoss, Grouping, Input, Values
from ..ops.objective import attach_gradient, fused_gradient
from ..ops.programs import NotTraced
from ..ops.results import TokenStats
from .base import Logits, LogitsLoss, check_float, check_mask, lookup, renamed, trains
from .chunks import Piece, by_parts, known_objective, take
from .kl import KL_ESTIMATORS
from .policy_checks import check_compared, check_config, check_given, is_sound, token_advantages
from .policy_formula import PolicyLossOutput, policy_formula, token_inputs, token_program
from .policy_objectives import KINDS
from .reductions import NORMALIZATIONS, Count, check_normalization, token_weights


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

    clip(rho) cuts to [1 - cliprange, 1 + cliprange_high]. A KL term used as a loss needs a choice of estimator: with
    "k1", the default, its gradient is zero on average (see `kl_estimate`); put k1 into the reward (`rl.shape_rewards`),
    or use "k2", "k3" or "exact" here. The exception is `penalty` without `ref_logps`: it estimates KL(pi_old, pi) from
    the old policy's own samples, where k1 and k3 have the right gradient on average, and k2 to first order.

    Args:
        logps: [..., T] (usually [B, T]), log-probability of each token by the policy; float32 or float64 (half
            precision is converted to float32). The only differentiated input, with `kl` and `entropy`.
        old_logps: [..., T], by the policy before this batch of updates.
        advantages: [..., T], or [...] for one advantage per sequence.
        mask: [..., T], boolean, True = real. What it hides may hold anything, NaN too, and changes nothing.
        kind: the objective, a row of the table above.
        cliprange: epsilon; how far below 1 (and above, unless `cliprange_high` is given) the ratio may go.
        cliprange_high: upper epsilon, where it differs (clip-higher: Yu et al. 2025, eq. 10).
        dual_clip: c > 1, usually 3: the loss of a token with A < 0 is at most -c A (Ye et al. 2020).
        ref_logps: [..., T], by the reference policy, for the KL.
        kl: [..., T], exact KL of each token's distribution, `token_stats(..., kl=True).kl`; with kl_estimator="exact".
        kl_coef: beta >= 0, weight of the KL in the loss.
        kl_estimator: "k1", "k2", "k3" (see `kl_estimate`) or "exact".
        entropy: [..., T], `token_stats(..., entropy=True).entropy`, in nats.
        entropy_coef: weight of the entropy bonus, which is subtracted from the loss.
        sampler_logps: [..., T], log-probabilities that the sampling engine reported: the policy term is weighted by
            `importance_weights(old_logps, sampler_logps, mask, level=importance_level, cap=importance_cap)`.
        importance_level, importance_cap: see `importance_weights`.
        normalization: "token" (= "bnpo"), "grpo", "dapo" or "dr_grpo"; applies to all terms alike.
        num_items: count to divide by in place of this call's: real tokens, for "grpo" and "dr_grpo" sequences, over
            all microbatches and processes. "dapo" needs it.
        max_length: tokens that a completion may have; "dr_grpo" needs it.

    Returns:
        PolicyLossOutput. Where logps equal old_logps: ratio is 1, approxkl and clipfrac are 0, exactly.

    Raises:
        TypeError: not a floating-point tensor, or a mask that is not boolean.
        ValueError: shapes that differ, an unknown name, a number out of its range, a term without its input.
    """
    config = {
        "kind": kind,
        "cliprange": cliprange,
        "cliprange_high": cliprange_high,
        "dual_clip": dual_clip,
        "kl_coef": kl_coef,
        "kl_estimator": kl_estimator,
        "entropy_coef": entropy_coef,
        "importance_level": importance_level,
        "importance_cap": importance_cap,
        "normalization": normalization,
        "max_length": max_length,
    }
    check_config(config)
    check_float("logps", logps)
    check_mask("mask", mask, logps.shape, "logps")
    check_float("old_logps", old_logps, logps.shape, "logps")
    check_normalization(logps, normalization, num_items, max_length)
    given = {"advantages": token_advantages(advantages, mask), "ref_logps": ref_logps, "sampler_logps": sampler_logps}
    check_given(config, mask, kl, entropy, given)
    inputs = [Input(name, x, TOKEN) for name, x in ({"old_logps": old_logps} | given).items() if x is not None]
    stats = {"logps": logps, "kl": kl, "entropy": entropy}
    return policy_formula(Values(mask, stats, [*inputs, Input("num_items", num_items, BATCH)]), config)


def _grouping(labels: Tensor) -> Grouping:
    """Sequences along the last axis."""
    return Grouping(labels.numel() // max(labels.shape[-1], 1))


class PPOLoss(LogitsLoss):
    """`policy_loss` from logits: PPO by default, and every other kind of policy objective.

    The pretraining mix of PPO-ptx is `ptx_loss(output.loss, ...)`; the value function's loss is `value_loss`.

    Args:
        kind, cliprange, cliprange_high, dual_clip, kl_coef, kl_estimator, entropy_coef: as in `policy_loss`.
        importance_level, importance_cap, normalization, max_length: as there.
        report_entropy: compute the entropy as a metric even where entropy_coef is 0.
        ignore_index, temperature, softcap, inplace_backward: as in `fastalign.token_stats`. The temperature is the
            sampler's, and the old, reference and sampler log-probabilities must have been taken at the same one.
        fuse_backward: compute loss and gradient in one visit to the logits (`fastalign.token_objective`): one read and
            one write of them instead of two reads and a write. For kinds whose tokens are independent (not "gspo",
            "gspo_token"); the gradient can then be used once, and inplace_backward overwrites in the forward already.
        one_launch: deprecated name of fuse_backward.

    Raises:
        ValueError: an unknown kind, estimator or normalisation. Numbers out of range raise in `forward`.
    """

    def __init__(
        self,
        *,
        kind: str = "clip",
        cliprange: float = 0.2,
        cliprange_high: float | None = None,
        dual_clip: float | None = None,
        kl_coef: float = 0.0,
        kl_estimator: str = "k1",
        entropy_coef: float = 0.0,
        importance_level: str = "token",
        importance_cap: float | None = 2.0,
        normalization: str = "token",
        max_length: int | None = None,
        report_entropy: bool = False,
        ignore_index: int = -100,
        temperature: float = 1.0,
        softcap: float | None = None,
        inplace_backward: bool = False,
        fuse_backward: bool = False,
        one_launch: bool | None = None,
    ) -> None:
        super().__init__(ignore_index, temperature, softcap, inplace_backward)
        lookup("kind", KINDS, kind)
        lookup("kl_estimator", {**KL_ESTIMATORS, "exact": None}, kl_estimator)
        lookup("normalization", NORMALIZATIONS, normalization)
        self.config: dict[str, Any] = {
            "kind": kind,
            "cliprange": cliprange,
            "cliprange_high": cliprange_high,
            "dual_clip": dual_clip,
            "kl_coef": kl_coef,
            "kl_estimator": kl_estimator,
            "entropy_coef": entropy_coef,
            "importance_level": importance_level,
            "importance_cap": importance_cap,
            "normalization": normalization,
            "max_length": max_length,
        }
        self.want_entropy = report_entropy or entropy_coef != 0.0
        self.fuse_backward = renamed("fuse_backward", fuse_backward, "one_launch", one_launch)
        self._sound = is_sound(self.config)
        statistics = ["logps"] + self.want_entropy * ["entropy"] + (kl_estimator == "exact") * ["kl"]
        self.fused = FusedLoss(self._formula, statistics, settings=self._settings)
        if self.fuse_backward:
            try:
                token_program(tuple(self.config.items()), ("old_logps", "advantages", "ref_logps", "importance"))
            except NotTraced as reason:
                raise ValueError(f"fuse_backward is for losses of single tokens; got kind={kind!r}: {reason}") from None

    def _settings(self) -> tuple[Any, ...]:
        return "policy", *self.config.values()

    def _formula(self, t: Any) -> PolicyLossOutput:
        return policy_formula(t, self.config)

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={self.config[key]!r}" for key in ("kind", "normalization", "kl_coef", "kl_estimator"))

    def forward(
        self,
        logits: Logits,
        labels: Tensor,
        old_logps: Tensor,
        advantages: Tensor,
        *,
        ref_logps: Tensor | None = None,
        ref_logits: Logits | None = None,
        sampler_logps: Tensor | None = None,
        num_items: Count | None = None,
    ) -> PolicyLossOutput:
        """PolicyLossOutput of a batch of sampled responses.

        Args:
            logits: [B, T, V]; nothing is shifted inside: `logits[b, t]` predicts `labels[b, t]`. Or a `fastalign.Head`
                or tuple (hidden, weight) in their place (always in two steps).
            labels: [B, T], the sampled tokens, `ignore_index` at prompt and padding.
            old_logps: [B, T]; advantages: [B, T] or [B].
            ref_logps, sampler_logps: [B, T]; num_items: all as in `policy_loss`.
            ref_logits: [B, T, V] of logits' dtype (or a head), the reference's; with and only with
                kl_estimator="exact".

        Raises:
            TypeError, ValueError: as `policy_loss` and `fastalign.token_stats` do.
        """
        exact = self.config["kl_estimator"] == "exact"
        if exact != (ref_logits is not None):
            got = f"{'None' if ref_logits is None else 'ref_logits'} with kl_estimator={self.config['kl_estimator']!r}"
            raise ValueError(f"ref_logits go with kl_estimator='exact', and with no other; got {got}")
        given = {"ref_logps": ref_logps, "sampler_logps": sampler_logps}
        if isinstance(logits, Tensor) and isinstance(ref_logits, (Tensor, NoneType)) and not self.fuse_backward:
            inputs = self._inputs(labels, old_logps, advantages, given, num_items)
            call, found = self.call(logits, labels, ref_logits), None
            if inputs is not None:
                found = self.fused.of_logits(call, inputs, _grouping(labels), self.inplace_backward)
            if found is not None:
                return PolicyLossOutput(*found)
        head = known_objective(logits, labels, self.ignore_index)
        if head is not None:
            return self._by_parts(head, ref_logits, labels, old_logps, advantages, given, num_items)
        mask = labels.long() != self.ignore_index
        if self.fuse_backward and isinstance(logits, Tensor) and trains(logits):
            return self._fused_backward(logits, labels, mask, old_logps, advantages, given, num_items, ref_logits)
        stats = self.stats(logits, labels, kl=exact, ref_logits=ref_logits, entropy=self.want_entropy)
        return self._of_statistics(stats, labels, mask, old_logps, advantages, given, num_items)

    def _of_statistics(
        self,
        stats: TokenStats,
        labels: Tensor,
        mask: Tensor,
        old_logps: Tensor,
        advantages: Tensor,
        given: dict[str, Tensor | None],
        num_items: Count | None,
    ) -> PolicyLossOutput:
        inputs = self._inputs(labels, old_logps, advantages, given, num_items)
        if inputs is not None:
            found = self.fused.of_statistics(stats, labels, inputs, _grouping(labels), self.ignore_index)
            if found is not None:
                return PolicyLossOutput(*found)
        return policy_loss(
            stats.logps,
            old_logps,
            advantages,
            mask,
            kl=stats.kl,
            entropy=stats.entropy,
            num_items=num_items,
            **given,  # type: ignore[arg-type]
            **self.config,
        )

    def _inputs(
        self,
        labels: Tensor,
        old_logps: Tensor,
        advantages: Tensor,
        given: dict[str, Tensor | None],
        num_items: Count | None,
    ) -> list[Input] | None:
        """What a program is given; None where something is not as it should be: `policy_loss` says what."""
        config, of_tokens = self.config, {"old_logps": old_logps, **given}
        if not isinstance(labels, Tensor) or labels.dim() < 1 or not isinstance(advantages, Tensor):
            return None
        if any(x is not None and (not isinstance(x, Tensor) or x.shape != labels.shape) for x in of_tokens.values()):
            return None
        by_sequence = advantages.shape != labels.shape
        if by_sequence and advantages.shape != labels.shape[:-1]:
            return None
        if not self._sound or (config["normalization"] == "dapo" and num_items is None):
            return None
        if isinstance(num_items, Tensor) or (num_items is not None and not num_items >= 0):
            return None
        compared = config["kl_estimator"] == "exact" or config["kind"] == "penalty" or given["ref_logps"] is not None
        if config["kl_coef"] and not compared:
            return None
        inputs = [Input(name, x, TOKEN) for name, x in of_tokens.items()]
        return [
            *inputs,
            Input("advantages", advantages, SEQUENCE if by_sequence else TOKEN),
            Input("num_items", num_items, BATCH),
        ]

    def _fused_backward(
        self,
        logits: Tensor,
        labels: Tensor,
        mask: Tensor,
        old_logps: Tensor,
        advantages: Tensor,
        given: dict[str, Tensor | None],
        num_items: Count | None,
        ref_logits: Any,
    ) -> PolicyLossOutput:
        config = self.config
        check_config(config)
        check_compared(config, given["ref_logps"] is not None)
        weight = token_weights(labels, self.ignore_index, config["normalization"], num_items, config["max_length"])
        inputs = token_inputs(config, mask, old_logps, token_advantages(advantages, mask), **given)
        stats, _, gradient = fused_gradient(
            logits,
            labels,
            weight,
            token_program(tuple(config.items()), tuple(inputs)),
            inputs,
            inplace=self.inplace_backward,
            ref_logits=ref_logits,
            entropy=self.want_entropy,
            **self.stats_options,
        )
        output = self._of_statistics(stats, labels, mask, old_logps, advantages, given, num_items)
        return output._replace(loss=attach_gradient(output.loss, logits, gradient))

    def _by_parts(
        self,
        head: Head,
        reference: Logits | None,
        labels: Tensor,
        old_logps: Tensor,
        advantages: Tensor,
        given: dict[str, Tensor | None],
        num_items: Count | None,
    ) -> PolicyLossOutput:
        """Some responses after the other: see `_parts`."""
        mask = labels.long() != self.ignore_index
        per_sequence = self.config["normalization"] in ("grpo", "dr_grpo")
        total = num_items
        if total is None and self.config["normalization"] != "dapo":
            total = mask.any(-1).sum() if per_sequence else mask.sum()

        def run(piece: Piece, which: Tensor, rows: Tensor) -> tuple[list[Tensor | None], Tensor]:
            more: dict[str, Any] = {name: None if x is None else x[rows] for name, x in given.items()}
            more["ref_logits"] = None if reference is None else take(reference, rows)
            out = self(piece, labels[rows], old_logps[rows], advantages[rows], num_items=total, **more)
            share = (mask[rows].sum().double() / mask.sum().clamp(min=1)).to(out.loss.dtype)
            means = (None if x is None else x.detach() * share for x in out[2:])
            return [out.policy_loss, *means], out.loss

        numbers = torch.arange(len(labels), device=labels.device).unsqueeze(-1)
        loss, parts = by_parts(head, labels, self.ignore_index, numbers, run)
        sums = (None if x[0] is None else torch.stack(x).sum() for x in zip(*parts, strict=True))  # type: ignore[arg-type]
        return PolicyLossOutput(loss, *sums)  # type: ignore[arg-type]
