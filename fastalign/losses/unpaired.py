"""KTO: preference learning from single responses marked desirable or undesirable."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..head.head import Head
from ..ops.fused_loss import BATCH, SEQUENCE, FusedLoss, Grouping, Input
from .base import (
    Logits,
    LogitsLoss,
    check_float,
    check_logits,
    check_mask,
    check_range,
    masked_mean,
    mean_of,
    sum_tokens,
)
from .chunks import Piece, by_parts, known_objective

_Baseline = tuple[Tensor | float | None, Tensor | None, Tensor | None]
"""What z_0 comes from: kl, kl_logps, ref_kl_logps."""

__all__ = ["KTOLoss", "KTOOutput", "kto_loss"]


class KTOOutput(NamedTuple):
    """Result of `kto_loss`. All but the loss are detached."""

    loss: Tensor
    """Scalar: mean over the responses."""
    rewards: Tensor
    """[B]: beta (log pi - log pi_ref)."""
    chosen_rewards: Tensor
    """Scalar: mean reward of the desirable responses, 0 if there is none."""
    rejected_rewards: Tensor
    """Scalar: mean reward of the undesirable ones, 0 if there is none."""
    margins: Tensor
    """Scalar: chosen_rewards - rejected_rewards."""
    kl: Tensor
    """Scalar: the baseline z_0 that was used, in nats."""
    logps: Tensor
    """[B]: log-probability under the policy, as given."""


def kto_loss(
    logps: Tensor,
    desirable: Tensor,
    ref_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    kl: Tensor | float | None = None,
    kl_logps: Tensor | None = None,
    ref_kl_logps: Tensor | None = None,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    lengths: Tensor | None = None,
    average: bool = False,
    clamp_kl: bool = True,
) -> KTOOutput:
    """KTO (Ethayarajh et al. 2024): mean of lambda_D (1 - sigmoid(beta (h - z_0))) over desirable responses and
    lambda_U (1 - sigmoid(beta (z_0 - h))) over undesirable ones, h = log pi(y|x) - log pi_ref(y|x).

    The baseline z_0 estimates KL(pi || pi_ref) and carries no gradient. It comes from one of

    - `kl_logps` and `ref_kl_logps`: sums of completions that belong to other prompts of the batch (the paper's
      mismatched pairs (x_i, y_j)); z_0 = max(0, their mean log-ratio), without clamp_kl that mean itself;
    - `kl`: a number already estimated, over several devices for instance; z_0 = max(0, its mean) likewise;
    - none: z_0 = 0, which is APO-zero on unpaired data (D'Oosterlinck et al. 2024, eq. 7).

    Args:
        logps: [B] summed log-probabilities under the policy. bfloat16 and float16 are computed in float32.
        desirable: [B] boolean: True where the response is desirable.
        ref_logps: [B] under the reference, a constant; None is reference-free.
        beta: above 0.
        kl: scalar or [M], in nats.
        kl_logps: [M] under the policy.
        ref_kl_logps: [M] under the reference.
        desirable_weight: lambda_D.
        undesirable_weight: lambda_U. The paper keeps lambda_D n_D / (lambda_U n_U) within [1, 3/2].
        lengths: [B] completion tokens |y|; needed by, and only by, `average`. An empty completion counts as one token.
        average: h is a mean over the response's tokens, (log pi - log pi_ref) / |y|; a baseline must be of such means
            (`sequence_logps(..., average=True)`).
        clamp_kl: z_0 is at least 0, as the divergence that it estimates.

    Returns:
        KTOOutput.

    Raises:
        TypeError: log-probabilities that are not floating-point, or `desirable` not boolean.
        ValueError: shapes that differ, a baseline given twice or by half, a number out of range.
    """
    shape = check_float("logps", logps).shape
    if len(shape) != 1:
        raise ValueError(f"logps must have shape [B], one number per response; got {list(shape)}")
    check_mask("desirable", desirable, shape, "logps")
    check_range("beta", beta, 0.0, open_low=True)
    check_range("desirable_weight", desirable_weight, 0.0)
    check_range("undesirable_weight", undesirable_weight, 0.0)
    logps = logps if logps.dtype == torch.float64 else logps.float()
    if ref_logps is not None:
        ref_logps = check_float("ref_logps", ref_logps, shape, "logps").detach()
    if average != (lengths is not None):
        raise ValueError(f"lengths go with average=True, and only there; got average={average}, lengths={lengths}")
    if lengths is not None and (not isinstance(lengths, Tensor) or lengths.shape != shape):
        raise ValueError(f"lengths must have shape {list(shape)}, that of logps; got {lengths}")
    baseline = _baseline(kl, kl_logps, ref_kl_logps, logps, clamp_kl)
    return kto_formula(logps, desirable, ref_logps, baseline, beta, desirable_weight, undesirable_weight, lengths)


def kto_formula(
    logps: Any,
    desirable: Any,
    ref_logps: Any,
    baseline: Any,
    beta: float,
    wanted: float,
    unwanted: float,
    lengths: Any = None,
) -> KTOOutput:
    """The loss and its metrics from responses' sums: tensors [B] or symbols. lengths: take means over these."""
    ratio = logps if ref_logps is None else logps - ref_logps
    ratio = ratio if lengths is None else ratio / lengths.clamp(min=1).to(ratio.dtype)
    signed = torch.where(desirable, ratio - baseline, baseline - ratio)
    weight = torch.where(desirable, torch.full_like(ratio, wanted), torch.full_like(ratio, unwanted))
    # 1 - sigmoid(z) = sigmoid(-z), which does not cancel for large z
    loss = mean_of(weight * torch.sigmoid(-beta * signed))
    rewards = beta * ratio.detach()
    won, lost = masked_mean(rewards, desirable), masked_mean(rewards, ~desirable)
    return KTOOutput(loss, rewards, won, lost, won - lost, baseline, logps.detach())


def _baseline(
    kl: Tensor | float | None, kl_logps: Tensor | None, ref_kl_logps: Tensor | None, like: Tensor, clamp: bool
) -> Tensor:
    """z_0 as a scalar without gradient, in the dtype of `like`."""
    if (kl_logps is None) != (ref_kl_logps is None):
        raise ValueError("kl_logps and ref_kl_logps must both be given or both be None; got one of them")
    if kl is not None and kl_logps is not None:
        raise ValueError("give kl, or kl_logps and ref_kl_logps, not both")
    if kl_logps is not None:
        check_float("kl_logps", kl_logps)
        kl = kl_logps.detach().to(like.dtype) - check_float("ref_kl_logps", ref_kl_logps, kl_logps.shape, "kl_logps")
    if kl is None:
        return like.new_zeros(())
    estimate = torch.as_tensor(kl, dtype=like.dtype, device=like.device).detach()
    mean = estimate.sum() / max(estimate.numel(), 1)
    return mean.clamp(min=0) if clamp else mean


class KTOLoss(LogitsLoss):
    """`kto_loss` from logits.

    Args:
        beta, desirable_weight, undesirable_weight, average, clamp_kl: as in `kto_loss`.
        ignore_index: labels with this value (prompt, padding) do not count.
        temperature: divides all logits.
        softcap: soft-capping of all logits (Gemma 2).
        inplace_backward: the backward writes the policy's gradient over `logits`.
    """

    def __init__(
        self,
        *,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        average: bool = False,
        clamp_kl: bool = True,
        ignore_index: int = -100,
        temperature: float = 1.0,
        softcap: float | None = None,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(ignore_index, temperature, softcap, inplace_backward)
        self.beta = check_range("beta", beta, 0.0, open_low=True)
        self.desirable_weight = check_range("desirable_weight", desirable_weight, 0.0)
        self.undesirable_weight = check_range("undesirable_weight", undesirable_weight, 0.0)
        self.average, self.clamp_kl = average, clamp_kl
        self.fused = FusedLoss(self._formula, settings=self._settings)

    def forward(
        self,
        logits: Logits,
        labels: Tensor,
        desirable: Tensor,
        *,
        ref_logits: Logits | None = None,
        ref_logps: Tensor | None = None,
        kl: Tensor | float | None = None,
        kl_logps: Tensor | None = None,
        ref_kl_logps: Tensor | None = None,
    ) -> KTOOutput:
        """The loss of B responses.

        Args:
            logits: [B, T, V], the policy's, or a `fastalign.Head` or tuple (hidden, weight) in their place.
            labels: [B, T], int64 or int32: `labels[i, t]` is the target of `logits[i, t]`.
            desirable: [B] boolean.
            ref_logits: [B, T, V] of the reference, a constant; or
            ref_logps: [B] precomputed sums; or neither, for a reference-free loss.
            kl, kl_logps, ref_kl_logps: the baseline, as in `kto_loss`; `sequence_logps` under `torch.no_grad` makes
                the sums.

        Raises:
            ValueError: logits that are not [B, T, V], a reference given twice, and as `token_stats` and `kto_loss`.
        """
        shape = check_logits("logits", logits).shape
        if len(shape) != 3:
            raise ValueError(f"logits must be [B, T, V]; got {list(shape)}")
        if ref_logits is not None:
            if ref_logps is not None:
                raise ValueError("give ref_logits or ref_logps, not both")
            ref_logps = self.reference_logps(ref_logits, labels)
        baseline = (kl, kl_logps, ref_kl_logps)
        head = known_objective(logits, labels, self.ignore_index)
        if head is not None:
            return self._by_parts(head, labels, desirable, ref_logps, baseline)
        return self._of(logits, labels, desirable, ref_logps, baseline)

    def _of(
        self, logits: Logits, labels: Tensor, desirable: Tensor, ref_logps: Tensor | None, baseline: _Baseline
    ) -> KTOOutput:
        """The loss of responses whose references are sums."""
        found = self._fused(logits, labels, desirable, ref_logps, baseline)
        if found is not None:
            return KTOOutput(*found)
        kl, kl_logps, ref_kl_logps = baseline
        return kto_loss(
            sum_tokens(self.stats(logits, labels).logps),
            desirable,
            ref_logps,
            kl=kl,
            kl_logps=kl_logps,
            ref_kl_logps=ref_kl_logps,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
            lengths=(labels.long() != self.ignore_index).sum(-1) if self.average else None,
            average=self.average,
            clamp_kl=self.clamp_kl,
        )

    def _by_parts(
        self, head: Head, labels: Tensor, desirable: Tensor, ref_logps: Tensor | None, baseline: _Baseline
    ) -> KTOOutput:
        """Some responses after the other: see `chunks`."""
        rows = check_mask("desirable", desirable, labels.shape[:1], "logps").shape[0]
        if ref_logps is not None:
            check_float("ref_logps", ref_logps, labels.shape[:1], "logps")
        dtype = torch.float64 if head.hidden.dtype == torch.float64 else torch.float32
        like = torch.zeros((), dtype=dtype, device=labels.device)
        known = (_baseline(*baseline, like, self.clamp_kl), None, None)

        def run(piece: Piece, which: Tensor, at: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
            out = self._of(piece, labels[at], desirable[at], None if ref_logps is None else ref_logps[at], known)
            return (out.rewards, out.logps, out.kl), out.loss * (len(which) / rows)

        numbers = torch.arange(rows, device=labels.device).unsqueeze(-1)
        loss, parts = by_parts(head, labels, self.ignore_index, numbers, run)
        rewards, logps = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        won, lost = masked_mean(rewards, desirable), masked_mean(rewards, ~desirable)
        return KTOOutput(loss, rewards, won, lost, won - lost, parts[0][2], logps)

    def _settings(self) -> tuple[Any, ...]:
        return "kto", self.beta, self.desirable_weight, self.undesirable_weight, self.average

    def _formula(self, t: Any) -> KTOOutput:
        of_both = (self.beta, self.desirable_weight, self.undesirable_weight)
        lengths = t.mask.sum(-1) if self.average else None
        return kto_formula(sum_tokens(t.logps), t.desirable > 0, t.ref_logps, t.baseline, *of_both, lengths)

    def _fused(
        self, logits: Logits, labels: Any, desirable: Any, ref_logps: Any, baseline: _Baseline
    ) -> list[Any] | None:
        """The results where one program serves; else None, and the general path does it or says what is wrong."""
        given = (desirable,) if ref_logps is None else (desirable, ref_logps)
        if not isinstance(labels, Tensor) or labels.dim() < 1:
            return None
        if (
            any(not isinstance(x, Tensor) or x.shape != labels.shape[:1] for x in given)
            or desirable.dtype != torch.bool
        ):
            return None
        zero = _baseline(*baseline, torch.zeros((), device=labels.device), self.clamp_kl)
        inputs = [
            Input("desirable", desirable.float(), SEQUENCE),
            Input("ref_logps", ref_logps, SEQUENCE),
            Input("baseline", zero, BATCH),
        ]
        grouping = Grouping(labels.shape[0])
        if isinstance(logits, Tensor):
            return self.fused.of_logits(self.call(logits, labels), inputs, grouping, self.inplace_backward)
        return self.fused.of_statistics(self.stats(logits, labels), labels, inputs, grouping, self.ignore_index)

    def extra_repr(self) -> str:
        weights = f"desirable_weight={self.desirable_weight}, undesirable_weight={self.undesirable_weight}"
        return f"beta={self.beta}, {weights}, average={self.average}, clamp_kl={self.clamp_kl}"
