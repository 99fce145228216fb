"""Pairwise and unpaired preference losses, straight from logits: log_softmax, gather, sum, and the papers' formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..losses.preference import DPOLoss
from ..losses.unpaired import KTOLoss
from ..ops.sequences import sequence_logps
from .case import Case, Sizes

_IGNORED = -100
_BETA = 0.3  # large enough that all terms of a loss matter
_EPSILON = 0.1


# ---------------------------------------------------------------------------------------------------- log-probabilities
def sums(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's labels, and how many there are."""
    mask = labels != _IGNORED
    logps = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (logps * mask).sum(-1), mask.sum(-1).to(logits.dtype)  # 0.2 * an integer tensor would be float32


class Quantities:
    """The letters of the papers: sums pw, pl under the policy, rw, rl under the reference, and lengths nw, nl."""

    def __init__(self, logits: Tensor, labels: Tensor, ref_logits: Tensor | None = None) -> None:
        half = labels.shape[0] // 2
        total, count = sums(logits, labels)
        ref = torch.zeros_like(total) if ref_logits is None else sums(ref_logits, labels)[0]
        self.pw, self.pl = total[:half], total[half:]
        self.rw, self.rl = ref[:half], ref[half:]
        self.nw, self.nl = count[:half], count[half:]

    @property
    def hw(self) -> Tensor:
        """log pi(y_w) / pi_ref(y_w)."""
        return self.pw - self.rw

    @property
    def hl(self) -> Tensor:
        """log pi(y_l) / pi_ref(y_l)."""
        return self.pl - self.rl


def log_sigmoid(x: Tensor) -> Tensor:
    """-log(1 + e^-x) by the definition; the inputs of the cases are of moderate size."""
    return -torch.log1p(torch.exp(-x))


def smoothed(z: Tensor, e: float = _EPSILON) -> Tensor:
    """Cross-entropy of sigmoid(z) against (1 - e, e)."""
    return -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z)


def mean(logps: Tensor, length: Tensor) -> Tensor:
    """Geometric mean of the token probabilities."""
    return torch.exp(logps / length)


def odds(logps: Tensor, length: Tensor) -> Tensor:
    """P / (1 - P) of that mean P."""
    p = mean(logps, length)
    return p / (1 - p)


# --------------------------------------------------------------------------------------- one formula per loss, per pair
def exo(q: Quantities) -> Tensor:
    """KL((s, 1 - s) || (1 - e, e)) with s = sigmoid(beta Delta): Ji et al. 2024, eq. 16."""
    s = torch.sigmoid(_BETA * (q.hw - q.hl))
    return s * torch.log(s / (1 - _EPSILON)) + (1 - s) * torch.log((1 - s) / _EPSILON)


def discopop(q: Quantities) -> Tensor:
    """Lu et al. 2024, eq. 5, tau = 0.5."""
    z = _BETA * (q.hw - q.hl)
    m = 1 / (1 + torch.exp(-z / 0.5))
    return -(1 - m) * log_sigmoid(z) + m * torch.exp(-z)


def dpop(q: Quantities) -> Tensor:
    """Pal et al. 2024, lambda = 5."""
    return -log_sigmoid(_BETA * (q.hw - q.hl - 5 * torch.maximum(torch.zeros_like(q.hw), q.rw - q.pw)))


def nca(q: Quantities) -> Tensor:
    """-log s(r_w) - 1/2 sum over both of log s(-r)."""
    won, lost = _BETA * q.hw, _BETA * q.hl
    return -log_sigmoid(won) - (log_sigmoid(-won) + log_sigmoid(-lost)) / 2


def robust(q: Quantities) -> Tensor:
    """The loss whose mean under label flips of probability e is the loss without flips."""
    z = _BETA * (q.hw - q.hl)
    return (-(1 - _EPSILON) * log_sigmoid(z) + _EPSILON * log_sigmoid(-z)) / (1 - 2 * _EPSILON)


def aot(q: Quantities) -> Tensor:
    """First-order stochastic dominance of the policy's margins over the reference's."""
    return -log_sigmoid(_BETA * (torch.sort(q.pw - q.pl)[0] - torch.sort(q.rw - q.rl)[0]))


def divergence(score: Callable[[Tensor], Tensor]) -> Callable[[Quantities], Tensor]:
    """DPO with scores f'(u), u = pi / pi_ref: Wang et al. 2024."""
    return lambda q: -log_sigmoid(_BETA * (score(torch.exp(q.hw)) - score(torch.exp(q.hl))))


def token_nll(q: Quantities) -> Tensor:
    """NLL of the chosen responses over all their tokens."""
    return -q.pw.sum() / q.nw.sum()


def mpo(q: Quantities) -> Tensor:
    """Weighted sum of sigmoid, bco_pair and the NLL: Wang et al. 2024, arXiv 2411.10442."""
    bco = -log_sigmoid(_BETA * q.hw) - log_sigmoid(-_BETA * q.hl)
    return -0.8 * log_sigmoid(_BETA * (q.hw - q.hl)) + 0.2 * bco + token_nll(q)


def dpo(q: Quantities) -> Tensor:
    """Rafailov et al. 2023, eq. 7."""
    return -log_sigmoid(_BETA * (q.hw - q.hl))


Formula = Callable[[Quantities], Tensor]

# loss type, for variants with what is special about them → (options of DPOLoss, the paper's formula per pair)
PAIRS: dict[str, tuple[dict[str, Any], Formula]] = {
    "sigmoid": ({}, dpo),
    "sigmoid:reference_free": ({}, dpo),
    "sigmoid:smoothed": ({"label_smoothing": _EPSILON}, lambda q: smoothed(_BETA * (q.hw - q.hl))),
    "sigmoid:length": ({"length_alpha": 0.2}, lambda q: -log_sigmoid(_BETA * (q.hw - q.hl) + 0.2 * (q.nw - q.nl))),
    "sigmoid:average": ({"average": True}, lambda q: -log_sigmoid(_BETA * (q.hw / q.nw - q.hl / q.nl))),
    "sigmoid:forward_kl": ({"f_divergence": "forward_kl"}, divergence(lambda u: 1 - 1 / u)),
    "sigmoid:reverse_kl": ({"f_divergence": "reverse_kl"}, divergence(lambda u: torch.log(u) + 1)),
    "sigmoid:js_divergence": ({"f_divergence": "js_divergence"}, divergence(lambda u: torch.log(2 * u / (1 + u)))),
    "sigmoid:alpha_divergence": (
        {"f_divergence": "alpha_divergence", "f_alpha": 0.3},
        divergence(lambda u: (1 - u**-0.3) / 0.3),
    ),
    "sigmoid:mpo": ({"loss_type": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}}, mpo),
    "robust": ({"label_smoothing": _EPSILON}, robust),
    "hinge": ({}, lambda q: torch.clamp(1 - _BETA * (q.hw - q.hl), min=0)),
    "ipo": ({}, lambda q: (q.hw - q.hl - 1 / (2 * _BETA)) ** 2),
    "ipo_avg": ({}, lambda q: (q.hw / q.nw - q.hl / q.nl - 1 / (2 * _BETA)) ** 2),
    "exo_pair": ({"label_smoothing": _EPSILON}, exo),
    "discopop": ({"discopop_tau": 0.5}, discopop),
    "rpo": ({"nll_weight": 0.5}, lambda q: dpo(q) + 0.5 * token_nll(q)),
    "rpo:sequence": ({"nll_normalization": "sequence"}, lambda q: dpo(q) - q.pw / q.nw),
    "dpop": ({"dpop_lambda": 5.0}, dpop),
    "sppo": ({}, lambda q: (q.hw - 1 / (2 * _BETA)) ** 2 + (q.hl + 1 / (2 * _BETA)) ** 2),
    "nca_pair": ({}, nca),
    "bco_pair": ({}, lambda q: -log_sigmoid(_BETA * q.hw) - log_sigmoid(-_BETA * q.hl)),
    "apo_zero": ({}, lambda q: 1 - torch.sigmoid(_BETA * q.hw) + torch.sigmoid(_BETA * q.hl)),
    "apo_down": ({}, lambda q: torch.sigmoid(_BETA * q.hw) + 1 - torch.sigmoid(_BETA * (q.hw - q.hl))),
    "aot": ({}, aot),
    "aot_unpaired": ({}, lambda q: -log_sigmoid(_BETA * (torch.sort(q.hw)[0] - torch.sort(q.hl)[0]))),
    "sigmoid_norm": ({}, lambda q: -log_sigmoid(_BETA * (q.hw / q.nw - q.hl / q.nl))),
    "alphapo": (
        {"simpo_gamma": 0.7, "alphapo_alpha": 0.4},
        lambda q: -log_sigmoid(_BETA * ((1 - mean(q.pw, q.nw) ** -0.4) - (1 - mean(q.pl, q.nl) ** -0.4)) / 0.4 - 0.7),
    ),
    "simpo": ({"simpo_gamma": 0.7}, lambda q: -log_sigmoid(_BETA * (q.pw / q.nw - q.pl / q.nl) - 0.7)),
    "cpo": ({"nll_normalization": "sum"}, lambda q: -log_sigmoid(_BETA * (q.pw - q.pl)) - q.pw),
    "orpo": (
        {"nll_weight": 0.5},
        lambda q: 0.5 * token_nll(q) - _BETA * log_sigmoid(torch.log(odds(q.pw, q.nw) / odds(q.pl, q.nl))),
    ),
    "sft": ({"nll_normalization": "sequence"}, lambda q: -q.pw / q.nw),
}
_REFERENCE_FREE = ("simpo", "alphapo", "cpo", "orpo", "sft")


def kto(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    kl_labels: Tensor,
    desirable: Tensor,
    *,
    average: bool = False,
    clamp_kl: bool = True,
) -> Tensor:
    """Ethayarajh et al. 2024, with weights 1.5 and 0.5; the baseline from mismatched completions."""

    def ratio(y: Tensor) -> Tensor:
        (own, lengths), (theirs, _) = sums(logits, y), sums(ref_logits, y)
        return (own - theirs) / (lengths if average else 1)

    h, z0 = ratio(labels), ratio(kl_labels).mean().detach()
    z0 = torch.clamp(z0, min=0) if clamp_kl else z0
    won, lost = 1.5 * (1 - torch.sigmoid(_BETA * (h - z0))), 0.5 * (1 - torch.sigmoid(_BETA * (z0 - h)))
    return torch.where(desirable, won, lost).mean()


# --------------------------------------------------------------------------------------------------------------- inputs
def ragged_labels(rows: int, sizes: Sizes, generator: torch.Generator) -> Tensor:
    """[rows, T] labels: a hidden prompt of one token (if there is room), then completions of 1 to T tokens, padded."""
    labels = torch.randint(0, sizes.vocab, (rows, sizes.length), generator=generator)
    place = torch.arange(sizes.length)
    first = min(1, sizes.length - 1)
    end = torch.randint(first + 1, sizes.length + 1, (rows, 1), generator=generator)
    return labels.masked_fill((place < first) | (place >= end), _IGNORED)


def _pair_inputs(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    logits = torch.randn((2 * sizes.batch, sizes.length, sizes.vocab), generator=generator, dtype=torch.float64)
    ref_logits = logits + 0.5 * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    labels = ragged_labels(2 * sizes.batch, sizes, generator)
    return {"logits": logits, "ref_logits": ref_logits, "labels": labels}


def _free_inputs(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    return {name: t for name, t in _pair_inputs(sizes, generator).items() if name != "ref_logits"}


def _kto_inputs(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    rows = {name: t[: sizes.batch] for name, t in _pair_inputs(sizes, generator).items()}
    desirable = torch.arange(sizes.batch) % 3 != 1
    return {**rows, "kl_labels": ragged_labels(sizes.batch, sizes, generator), "desirable": desirable}


# ---------------------------------------------------------------------------------------------------------------- cases
def _pair_case(name: str, options: dict[str, Any], formula: Formula) -> Case:
    kind, _, what = name.partition(":")
    module = DPOLoss(**{"loss_type": kind, "beta": _BETA, **options})
    inputs = _free_inputs if kind in _REFERENCE_FREE or what == "reference_free" else _pair_inputs
    return Case(
        f"dpo:{name}",
        lambda logits, labels, **ref: module(logits, labels, **ref).loss,
        lambda logits, labels, ref_logits=None: formula(Quantities(logits, labels, ref_logits)).mean(),
        inputs,
    )


def _fused_kto(
    module: KTOLoss, logits: Tensor, ref_logits: Tensor, labels: Tensor, kl_labels: Tensor, desirable: Tensor
) -> Tensor:
    with torch.no_grad():
        baseline = {
            "kl_logps": sequence_logps(logits, kl_labels, average=module.average),
            "ref_kl_logps": sequence_logps(ref_logits, kl_labels, average=module.average),
        }
    return module(logits, labels, desirable, ref_logits=ref_logits, **baseline).loss


def _kto_case(name: str, **options: Any) -> Case:
    module = KTOLoss(beta=_BETA, desirable_weight=1.5, undesirable_weight=0.5, **options)
    return Case(name, lambda **given: _fused_kto(module, **given), lambda **given: kto(**given, **options), _kto_inputs)


def _each(logits: Tensor, labels: Tensor) -> list[list[Tensor]]:
    """Log-probabilities of the whole vocabulary at the real tokens of each row, the label's own first."""
    rows = []
    for x, y in zip(torch.log_softmax(logits.double(), -1), labels, strict=True):
        rows.append([torch.cat([p[label, None], p]) for p, label in zip(x, y, strict=True) if label != _IGNORED])
    return rows


def wpo(logits: Tensor, labels: Tensor, ref_logits: Tensor) -> Tensor:
    """Zhou et al. 2024, eq. 2: DPO's losses times w(y_w) w(y_l), the aligned probabilities' geometric means."""
    half = labels.shape[0] // 2
    weights = []
    for row in _each(logits, labels):
        aligned = [p[0] - torch.log((p[1:].exp() ** 2).sum()) for p in row]
        weights.append(torch.exp(torch.stack(aligned).mean()).detach() if row else torch.ones((), dtype=torch.float64))
    pairs = torch.stack(weights[:half]) * torch.stack(weights[half:])
    return (dpo(Quantities(logits.double(), labels, ref_logits.double())) * pairs).mean()


def ld(logits: Tensor, labels: Tensor, ref_logits: Tensor) -> Tensor:
    """Liu et al. 2024 (LD-DPO), alpha = 0.4: beyond the shorter length of a pair a log-probability counts 0.4."""
    half, ours, theirs = labels.shape[0] // 2, _each(logits, labels), _each(ref_logits, labels)
    losses = []
    for w in range(half):
        shared, h = min(len(ours[w]), len(ours[w + half])), []
        for row in (w, w + half):
            terms = [(1 if t < shared else 0.4) * (p[0] - q[0]) for t, (p, q) in enumerate(zip(ours[row], theirs[row]))]  # noqa: B905
            h.append(torch.stack(terms).sum())
        losses.append(-log_sigmoid(_BETA * (h[0] - h[1])))
    return torch.stack(losses).mean()


def prompt_nll(logits: Tensor, labels: Tensor, nll_labels: Tensor) -> Tensor:
    """Hong et al. 2024, eq. 7, with the likelihood of whole texts, prompt and chosen response (lambda = beta)."""
    q = Quantities(logits, labels)
    total, count = sums(logits[: len(nll_labels)], nll_labels)
    odds_ratio = torch.log(odds(q.pw, q.nw) / odds(q.pl, q.nl))
    return 0.5 * -total.sum() / count.sum() - _BETA * log_sigmoid(odds_ratio).mean()


def _prompt_nll_inputs(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    """Targets where the chosen rows have none, but for some."""
    made = _free_inputs(sizes, generator)
    chosen = made["labels"][: sizes.batch]
    others = torch.randint(0, sizes.vocab, chosen.shape, generator=generator)
    others = others.masked_fill(torch.rand(chosen.shape, generator=generator) < 0.3, _IGNORED)
    return made | {"nll_labels": torch.where(chosen == _IGNORED, others, chosen)}


def _own_case(name: str, options: dict[str, Any], formula: Callable[..., Tensor]) -> Case:
    module = DPOLoss(beta=_BETA, **options)
    return Case(f"dpo:sigmoid:{name}", lambda **given: module(**given).loss, formula, _pair_inputs)


CASES = [_pair_case(name, options, formula) for name, (options, formula) in PAIRS.items()]
CASES += [_own_case("wpo", {"use_weighting": True}, wpo), _own_case("ld", {"ld_alpha": 0.4}, ld)]
_ORPO = DPOLoss(loss_type="orpo", beta=_BETA, nll_weight=0.5)
CASES.append(Case("dpo:orpo:prompt_nll", lambda **given: _ORPO(**given).loss, prompt_nll, _prompt_nll_inputs))
CASES += [_kto_case("kto"), _kto_case("kto:average", average=True), _kto_case("kto:unclamped", clamp_kl=False)]
