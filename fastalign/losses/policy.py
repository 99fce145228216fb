"""Policy optimisation from logits: PPO and its relatives (REINFORCE, TRPO, GRPO, DAPO, Dr. GRPO, GSPO, CISPO, ...).

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
from ..ops.fused_loss import BATCH, SEQUENCE, TOKEN, FusedLoss, Grouping, Input
from ..ops.objective import attach_gradient, fused_gradient
from ..ops.programs import NotTraced
from ..ops.results import TokenStats
from .base import Logits, LogitsLoss, renamed, trains
from .chunks import Piece, by_parts, known_objective, take
from .policy_checks import check_compared, check_config, is_sound, token_advantages
from .policy_formula import (
    PolicyLossOutput,
    chooses,
    chosen_tokens,
    policy_formula,
    token_inputs,
    token_program,
    weighted_once,
)
from .policy_on_logps import configured_loss, policy_config, policy_loss
from .reductions import NORMALIZATIONS, Count, token_weights

_GIVEN = ("old_logps", "advantages", "ref_logps", "importance_weights")
"""What the program of a token may be given."""

__all__ = ["NORMALIZATIONS", "PPOLoss", "PolicyLossOutput", "policy_loss"]


def _grouping(labels: Tensor) -> Grouping:
    """Sequences along the last axis."""
    return Grouping(labels.numel() // max(labels.shape[-1], 1))


class PPOLoss(LogitsLoss):
    """`policy_loss` from logits: PPO by default, and every other kind of policy objective.

    The pretraining mix of PPO-ptx is `ptx_loss(output.loss, ...)`; the value function's loss is `value_loss`.

    Args:
        kind, cliprange, cliprange_high, dual_clip, kl_coef, kl_estimator, entropy_coef: as in `policy_loss`.
        importance_level, importance_cap, normalization, max_length, options: as there.
        report_entropy: compute the entropy as a metric even where entropy_coef is 0.
        ignore_index, temperature, softcap, inplace_backward: as in `fastalign.token_stats`. The temperature is the
            sampler's, and the old, reference and sampler log-probabilities must have been taken at the same one.
        fuse_backward: compute loss and gradient in one visit to the logits (`fastalign.token_objective`): one read and
            one write of them instead of two reads and a write. For kinds whose tokens are independent (not "gspo",
            "gspo_token", "luspo", "vespo", "gmpo", "clip_cov", "kl_cov") and without off_policy_mask_threshold and
            top_entropy_quantile; the gradient can then be used once, and inplace_backward overwrites in the forward
            already.
        one_launch: deprecated name of fuse_backward.

    Raises:
        ValueError: an unknown kind, estimator or normalisation, an option of another kind. Numbers out of range raise
            in `forward`.
        TypeError: an argument that there is not.
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
        **options: Any,
    ) -> None:
        super().__init__(ignore_index, temperature, softcap, inplace_backward)
        self.config = policy_config(
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
        # What is chosen among a batch's tokens is chosen by their statistics: these come first there.
        self._chooses = chooses(self.config)
        by_entropy = self.config["general"].top_entropy_quantile < 1.0
        self.want_entropy = report_entropy or entropy_coef != 0.0 or by_entropy
        self.fuse_backward = renamed("fuse_backward", fuse_backward, "one_launch", one_launch)
        self._sound = is_sound(self.config)
        self._one_call = not self.fuse_backward and self._chooses is None
        exact = self.config["kl_estimator"] == "exact"
        statistics = ["logps"] + self.want_entropy * ["entropy"] + exact * ["kl"]
        self.fused = FusedLoss(self._formula, statistics, settings=self._settings)
        if self.fuse_backward:
            try:
                token_program(tuple(self.config.items()), _GIVEN)
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
        importance_weights: Tensor | None = None,
    ) -> PolicyLossOutput:
        """PolicyLossOutput of a batch of sampled responses.

        Args:
            logits: [B, T, V]; nothing is shifted inside: `logits[b, t]` predicts `labels[b, t]`. Or a `fastalign.Head`
                or tuple (hidden, weight) in their place (always in two steps).
            labels: [B, T], the sampled tokens, `ignore_index` at prompt and padding.
            old_logps: [B, T]; advantages: [B, T] or [B].
            ref_logps, sampler_logps, importance_weights: [B, T]; num_items: all as in `policy_loss`.
            ref_logits: [B, T, V] of logits' dtype (or a head), the reference's; with and only with
                kl_estimator="exact".

        Raises:
            TypeError, ValueError: as `policy_loss` and `fastalign.token_stats` do.
        """
        exact = self.config["kl_estimator"] == "exact"
        if exact != (ref_logits is not None):
            got = f"{'None' if ref_logits is None else 'ref_logits'} with kl_estimator={self.config['kl_estimator']!r}"
            raise ValueError(f"ref_logits go with kl_estimator='exact', and with no other; got {got}")
        given = {"ref_logps": ref_logps, "sampler_logps": sampler_logps, "importance_weights": importance_weights}
        if isinstance(logits, Tensor) and isinstance(ref_logits, (Tensor, NoneType)) and self._one_call:
            inputs = self._inputs(labels, old_logps, advantages, given, num_items)
            call, found = self.call(logits, labels, ref_logits), None
            if inputs is not None:
                found = self.fused.of_logits(call, inputs, _grouping(labels), self.inplace_backward)
            if found is not None:
                return PolicyLossOutput(*found)
        head = known_objective(logits, labels, self.ignore_index)
        if head is not None and self._chooses is not None:
            if head.plan == "objective":
                why = f"{self._chooses} needs the whole batch"
                raise ValueError(f"plan 'objective' forms a loss part by part, and {why}")
            head = None
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
        inputs, chosen = self._inputs(labels, old_logps, advantages, given, num_items), None
        if inputs is not None:
            if self._chooses is not None:
                per_token = token_advantages(advantages, mask)
                chosen = chosen_tokens(self.config, mask, stats.logps, stats.entropy, old_logps, per_token)
                inputs += [Input(name, x, TOKEN) for name, x in chosen.items()]
            found = self.fused.of_statistics(stats, labels, inputs, _grouping(labels), self.ignore_index)
            if found is not None:
                return PolicyLossOutput(*found)
        of_tokens = {"logps": stats.logps, "kl": stats.kl, "entropy": stats.entropy}
        return configured_loss(self.config, of_tokens, old_logps, advantages, mask, given, num_items, chosen)

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
        inputs = token_inputs(config, mask, old_logps, token_advantages(advantages, mask), given)
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
        if self.config["general"].importance_normalize:  # by the mean over all of them
            given = weighted_once(self.config, mask, old_logps, given)

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
