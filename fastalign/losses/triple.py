"""TPO: triple preference optimisation, a loss of pairs and the likelihood of a third, gold response to each prompt."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.sequences import cut
from .base import Logits, LogitsLoss, check_float, check_logits, check_range, lookup, narrow
from .pairwise import PairwiseOptions
from .preference_on_sums import Two, pairwise_loss

__all__ = ["TPOLoss", "TPOOutput", "tpo_loss"]

TRIPLES = {"sigmoid": "sigmoid", "hinge": "hinge", "ipo": "ipo_avg", "tpo-l": "simpo"}
"""Loss type → the loss of pairs without a reference that it takes: TRL's names, whose `ipo` is of averages."""


class TPOOutput(NamedTuple):
    """Result of `tpo_loss`. All but the loss are detached."""

    loss: Tensor
    """Scalar: mean over the pairs, plus tpo_alpha times `nll`."""
    nll: Tensor
    """Scalar: mean over the gold responses' tokens."""
    chosen_rewards: Tensor
    """[B]: beta log pi; for tpo-l of the mean log-probability of a token."""
    rejected_rewards: Tensor
    """The same of the rejected responses."""
    margins: Tensor
    """chosen_rewards - rejected_rewards."""
    accuracies: Tensor
    """1 where the chosen reward is above the rejected one, else 0."""
    chosen_logps: Tensor
    """[B]: log-probability under the policy, as given."""
    rejected_logps: Tensor
    """The same of the rejected responses."""


def tpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    gold_logps: Tensor,
    gold_lengths: Tensor,
    *,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    loss_type: str = "sigmoid",
    beta: float = 0.01,
    label_smoothing: float = 0.0,
    tpo_alpha: float = 1.0,
    tpo_l_gamma: float = 0.5,
) -> TPOOutput:
    """TPO (Saeidi et al. 2024, arXiv:2405.16681), as TRL's TPOTrainer has it: no reference model.

    -log sigmoid(beta (log pi(y_w) - log pi(y_l))) + tpo_alpha NLL(y_gold), the NLL a mean over all gold tokens. TPO-L
    takes mean log-probabilities and the margin: -log sigmoid(beta (mean_w - mean_l) - tpo_l_gamma).

    Args:
        chosen_logps: [B] summed log-probabilities of the chosen responses. 16-bit ones are computed in float32.
        rejected_logps: [B], of the rejected ones.
        gold_logps: [B], of the gold ones.
        gold_lengths: [B], their tokens.
        chosen_lengths: [B] tokens of the chosen responses; needed by ipo and tpo-l.
        rejected_lengths: [B].
        loss_type: sigmoid, hinge, ipo (on means per token) or tpo-l.
        beta: above 0.
        label_smoothing: in [0, 1], of sigmoid and tpo-l.
        tpo_alpha: weight of the NLL, at least 0.
        tpo_l_gamma: margin of tpo-l.

    Raises:
        TypeError: log-probabilities that are not floating-point tensors.
        ValueError: shapes that differ, lengths missing, a number out of range, an unknown name, an option that the
            loss type does not use.
    """
    options = tpo_options(loss_type, beta, label_smoothing, tpo_alpha, tpo_l_gamma)
    return _of_sums(
        options, tpo_alpha, (chosen_logps, rejected_logps), (chosen_lengths, rejected_lengths), gold_logps, gold_lengths
    )


@functools.lru_cache(maxsize=64)
def tpo_options(loss_type: str, beta: float, smoothing: float, alpha: float, gamma: float) -> PairwiseOptions:
    """The loss of pairs; ValueError for what `tpo_loss` refuses of its options."""
    lookup("loss_type", TRIPLES, loss_type)
    check_range("tpo_alpha", alpha, 0.0)
    check_range("tpo_l_gamma", gamma, -float("inf"))
    return PairwiseOptions(loss_type=TRIPLES[loss_type], beta=beta, label_smoothing=smoothing, simpo_gamma=gamma)


def _of_sums(
    options: PairwiseOptions, alpha: float, logps: tuple[Tensor, Tensor], lengths: Two, gold: Tensor, tokens: Tensor
) -> TPOOutput:
    pairs = pairwise_loss(options, logps, (None, None), lengths)
    gold = check_float("gold_logps", gold, logps[0].shape, "chosen_logps").to(pairs.loss.dtype)
    if tokens.shape != gold.shape:
        raise ValueError(f"gold_lengths must have shape {list(gold.shape)}; got {list(tokens.shape)}")
    nll = -gold.sum() / tokens.sum().clamp(min=1)
    loss = pairs.loss + alpha * nll if alpha else pairs.loss  # of weight 0 it is not formed: 0 * inf is NaN
    return TPOOutput(loss, nll.detach(), *pairs[1:7])


class TPOLoss(LogitsLoss):
    """`tpo_loss` from logits.

    Args:
        loss_type, beta, label_smoothing, tpo_alpha, tpo_l_gamma: as in `tpo_loss`.
        ignore_index: labels with this value (prompt, padding) do not count.
        temperature: divides the logits.
        softcap: soft-capping of the logits (Gemma 2).
        inplace_backward: the backward writes the policy's gradient over `logits`.
    """

    def __init__(
        self,
        *,
        loss_type: str = "sigmoid",
        beta: float = 0.01,
        label_smoothing: float = 0.0,
        tpo_alpha: float = 1.0,
        tpo_l_gamma: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        softcap: float | None = None,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(ignore_index, temperature, softcap, inplace_backward)
        self.options = tpo_options(loss_type, beta, label_smoothing, tpo_alpha, tpo_l_gamma)
        self.loss_type, self.tpo_alpha = loss_type, tpo_alpha

    def forward(self, logits: Logits, labels: Tensor) -> TPOOutput:
        """The loss of B triples given as 3B rows.

        Args:
            logits: [3B, T, V]: the B chosen rows, the B rejected rows, then the B gold rows, in one order; or a
                `fastalign.Head` or tuple (hidden [3B, T, H], weight [V, H]), from which they are formed by tiles.
            labels: [3B, T], int64 or int32: `labels[i, t]` is the target of `logits[i, t]`.

        Raises:
            ValueError: rows whose number three does not divide, and as `token_stats` and `tpo_loss`.
        """
        shape = check_logits("logits", logits).shape
        if len(shape) != 3 or shape[0] % 3:
            raise ValueError(f"logits must be [3B, T, V], the chosen, rejected and gold rows; got {list(shape)}")
        (chosen, rejected, gold), dtype = self.sums(logits, labels, 3, torch.float64)
        *lengths, tokens = cut((labels.long() != self.ignore_index).sum(-1), 3)
        pair, both = (chosen, rejected), (lengths[0], lengths[1])
        return narrow(_of_sums(self.options, self.tpo_alpha, pair, both, gold, tokens), dtype)

    def extra_repr(self) -> str:
        return f"loss_type={self.loss_type!r}, beta={self.options.beta}, tpo_alpha={self.tpo_alpha}"
