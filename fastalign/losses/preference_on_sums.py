"""The direct preference losses on log-probabilities of whole sequences.

The formulas are rows of the table in `pairwise`; this file gathers what they need and reports the metrics.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base import check_float, mean_of
from .pairs import F_DIVERGENCES, Pairs, Side, nll_of
from .pairwise import PairwiseOptions


class PreferenceOutput(NamedTuple):
    """Result of a pairwise loss. All but the loss are [B] and detached; means over the batch are the usual metrics."""

    loss: Tensor
    """Scalar: the weighted sum of the selected losses, each a mean over the pairs."""
    chosen_rewards: Tensor
    """Implicit reward of the chosen responses: beta s (beta times the log-ratio; without the length term of DPO-R)."""
    rejected_rewards: Tensor
    """The same of the rejected responses."""
    margins: Tensor
    """chosen_rewards - rejected_rewards."""
    accuracies: Tensor
    """1 where the chosen reward is above the rejected one (strictly: 0 at the first step), else 0."""
    chosen_logps: Tensor
    """Log-probability of the chosen responses under the policy, as given."""
    rejected_logps: Tensor
    """The same of the rejected responses."""
    nll: Tensor | None = None
    """Terms of the chosen responses' NLL, unweighted: their mean is what nll_weight weighs. None in losses without."""
    chosen_logits: Tensor | None = None
    """Mean of the logits over the vocabulary and the chosen response's tokens; None where not asked for."""
    rejected_logits: Tensor | None = None
    """The same of the rejected responses."""


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str | Sequence[str] | Mapping[str, float] = "sigmoid",
    label_smoothing: float = 0.0,
    length_alpha: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    average: bool = False,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    simpo_gamma: float = 0.5,
    alphapo_alpha: float = 0.25,
    nll_weight: float = 1.0,
    nll_normalization: str = "token",
    dpop_lambda: float = 50.0,
    discopop_tau: float = 0.05,
) -> PreferenceOutput:
    """Direct preference loss on pairs, by default DPO (Rafailov et al. 2023, eq. 7).

    That is -log sigmoid(beta (h_w - h_l)) with h = log pi(y|x) - log pi_ref(y|x), w chosen and l rejected.

    `loss_type` selects rows of `PAIRWISE`, where each function names its paper and equation: sigmoid, robust, hinge,
    ipo, ipo_avg, sigmoid_norm, exo_pair, discopop, rpo, dpop, sppo, nca_pair, bco_pair, apo_zero, apo_down, aot,
    aot_unpaired; and without a reference simpo, alphapo, cpo, orpo, sft.

    Length regularisation (DPO-R). Maximise E[r(x, y) - alpha |y|] - beta KL(pi || pi_ref): the optimum is
    `pi*(y) = pi_ref(y) exp((r - alpha |y|) / beta) / Z`, hence `r = beta log(pi* / pi_ref) + alpha |y| + beta log Z`.
    In the Bradley-Terry likelihood sigmoid(r_w - r_l) that gives

        -log sigmoid(beta (h_w - h_l) + alpha (|y_w| - |y_l|)),

    in which alpha > 0 penalises length: a longer chosen response needs less log-ratio to explain that it was chosen.
    Park et al. 2024, eq. 9, print this sign; the opposite one is in circulation too, and rewards length.

    f-divergences (Wang et al. 2024) replace h by f'(exp h); `f_alpha` is the paper's alpha: 0 is the reverse and 1 the
    forward KL (TRL's coefficient is 1 - alpha).

    Args:
        chosen_logps: [B] summed log-probabilities of the chosen responses under the policy. bfloat16 and float16 are
            computed in float32.
        rejected_logps: [B], of the rejected ones.
        ref_chosen_logps: [B] under the reference, a constant; None (both or neither) is reference-free: h = log pi.
        ref_rejected_logps: [B].
        beta: above 0: how strongly the reference holds. IPO's tau, ORPO's lambda.
        loss_type: a name; a sequence of names, summed; or a mapping of names to weights.
        label_smoothing: e in [0, 1]: probability that a label is flipped. In sigmoid it gives conservative DPO.
        length_alpha: alpha of DPO-R, in nats per token; acts on losses of the pairwise logit.
        chosen_lengths: [B] completion tokens |y_w|; needed by `length_alpha`, `average`, ipo_avg, simpo, orpo and by
            NLL terms unless they are summed. An empty completion counts as one token.
        rejected_lengths: [B] |y_l|.
        average: use per-token means of the log-probabilities, the policy's and the reference's (length-normalised DPO).
        f_divergence: "reverse_kl", "forward_kl", "js_divergence" or "alpha_divergence".
        f_alpha: in [0, 1], of "alpha_divergence".
        simpo_gamma: target margin of SimPO and AlphaPO.
        alphapo_alpha: AlphaPO's alpha, which shapes its reward; 0 is SimPO.
        nll_weight: weight of the NLL of the chosen responses in rpo, cpo, orpo and sft.
        nll_normalization: "token" (mean over the batch's tokens), "sequence" (mean of per-token means) or "sum".
        dpop_lambda: weight of DPOP's penalty.
        discopop_tau: temperature of DiscoPOP, in (0, 1].

    Returns:
        PreferenceOutput, its rewards those of the first loss named (per-token means for simpo, alphapo and orpo).

    Raises:
        TypeError: log-probabilities that are not floating-point tensors.
        ValueError: shapes that differ, one reference without the other, lengths missing, a reference or an option that
            no selected loss uses, a number out of range, an unknown name.
    """
    options = _options(
        loss_type=loss_type,
        beta=beta,
        label_smoothing=label_smoothing,
        length_alpha=length_alpha,
        average=average,
        f_divergence=f_divergence,
        f_alpha=f_alpha,
        simpo_gamma=simpo_gamma,
        alphapo_alpha=alphapo_alpha,
        nll_weight=nll_weight,
        nll_normalization=nll_normalization,
        dpop_lambda=dpop_lambda,
        discopop_tau=discopop_tau,
    )
    references = (ref_chosen_logps, ref_rejected_logps)
    return pairwise_loss(options, (chosen_logps, rejected_logps), references, (chosen_lengths, rejected_lengths))


_remembered = functools.lru_cache(maxsize=64)(PairwiseOptions)


def _options(**given: Any) -> PairwiseOptions:
    """Checked options: checking them takes longer than the loss of a few pairs, so those of earlier calls are kept."""
    if torch.compiler.is_compiling():
        return PairwiseOptions(**given)
    try:
        return _remembered(**given)
    except TypeError:  # several loss types, which cannot be remembered; or a wrong type, which is named once more
        return PairwiseOptions(**given)


Two = tuple[Tensor | None, Tensor | None]


def pairwise_loss(
    options: PairwiseOptions,
    logps: tuple[Tensor, Tensor],
    ref_logps: Two,
    lengths: Two,
    pair_weights: Tensor | None = None,
) -> PreferenceOutput:
    check_inputs(options, logps, ref_logps, lengths)
    return pairwise_formula(options, logps, ref_logps, lengths, pair_weights)


def pairwise_formula(
    options: PairwiseOptions, logps: Any, ref_logps: Any, lengths: Any, pair_weights: Any = None, nll: Any = None
) -> PreferenceOutput:
    """The loss and its metrics from both sides' sums, the reference's, lengths and weights: tensors or symbols.

    nll: (sums, lengths) of what the NLL is of, if that is not the chosen sums.
    """
    chosen, rejected = (_side(options, *of_side) for of_side in zip(logps, ref_logps, lengths, strict=True))
    pairs = Pairs(chosen, rejected, options, None if nll is None else _side(options, nll[0], None, nll[1]))
    # A loss of weight 0 is not formed: 0 times an infinite one would be NaN.
    formed = [(variant, weight) for variant, weight in options.variants if weight] or options.variants[:1]
    losses = [(variant.losses(pairs), weight) for variant, weight in formed]
    if pair_weights is not None:
        losses = [(loss * pair_weights, weight) for loss, weight in losses]
    terms = [_weighted(mean_of(loss), weight) for loss, weight in losses]
    loss = functools.reduce(operator.add, terms)
    per_token = options.variants[0][0].rewards_per_token
    won, lost = (options.beta * (side.mean if per_token else side.score).detach() for side in (chosen, rejected))
    own = nll_of(pairs).detach() if any(variant.nll for variant, _ in options.variants) else None
    more = chosen.total.detach(), rejected.total.detach(), own
    return PreferenceOutput(loss, won, lost, won - lost, (won > lost).to(won.dtype), *more)


def check_inputs(options: PairwiseOptions, logps: tuple[Tensor, Tensor], ref_logps: Two, lengths: Two) -> None:
    shape = check_float("chosen_logps", logps[0]).shape
    if len(shape) != 1:
        raise ValueError(f"chosen_logps must have shape [B], one number per pair; got {list(shape)}")
    check_float("rejected_logps", logps[1], shape, "chosen_logps")
    _check_two("ref_{}_logps", ref_logps, shape)
    _check_two("{}_lengths", lengths, shape, floats=False)
    if ref_logps[0] is not None and not options.uses_reference:
        raise ValueError(f"ref_chosen_logps must be None: loss_type {options.loss_type!r} uses no reference")
    if lengths[0] is None and options.needs_lengths:
        raise ValueError(
            f"chosen_lengths and rejected_lengths are needed by loss_type {options.loss_type!r} with "
            f"length_alpha={options.length_alpha}, average={options.average} and "
            f"nll_normalization={options.nll_normalization!r}; got None"
        )


def _check_two(names: str, two: Two, shape: torch.Size, *, floats: bool = True) -> None:
    """Both or neither; of the log-probabilities' shape."""
    if (two[0] is None) != (two[1] is None):
        first, second = (names.format(side) for side in ("chosen", "rejected"))
        raise ValueError(f"{first} and {second} must both be given or both be None; got one of them")
    for side, value in zip(("chosen", "rejected"), two, strict=True):
        if value is None or (isinstance(value, Tensor) and value.shape == shape and value.is_floating_point()):
            continue
        name = names.format(side)
        if floats:
            check_float(name, value, shape, "chosen_logps")
        elif not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")
        elif value.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, that of chosen_logps; got {list(value.shape)}")


def _side(options: PairwiseOptions, total: Tensor, ref: Tensor | None, lengths: Tensor | None) -> Side:
    """One side of the pairs in the dtype that it is computed in: float64 for float64, else float32."""
    total = total if total.dtype == torch.float64 else total.float()
    if ref is None:
        ref = torch.zeros_like(total)
    else:  # asked first: an operation that does nothing takes as long as many another
        ref = ref.detach() if ref.requires_grad else ref
        ref = ref if ref.dtype == total.dtype else ref.to(total.dtype)
    lengths = None if lengths is None else lengths.to(total.dtype).clamp(min=1)
    logps = total
    if options.average and lengths is not None:
        logps, ref = total / lengths, ref / lengths
    score = F_DIVERGENCES[options.f_divergence](logps - ref, options.f_alpha)
    return Side(total, logps, ref, lengths, score, options.average)


def _weighted(term: Tensor, weight: float) -> Tensor:
    return term if weight == 1.0 else weight * term
