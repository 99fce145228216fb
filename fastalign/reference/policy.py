"""Policy objectives token by token, as their papers print them: maximised objectives, negated at the very end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..losses import PPOLoss, ptx_loss, value_loss
from ..losses.base import stats_of
from .case import Case, Sizes
from .off_policy import ESTIMATORS, covariances_of, left_out, of_little_entropy, weights


@dataclass(frozen=True)
class Setting:
    """The choices of one row: `low`, `high` are the clip's epsilons, `beta` weighs the KL; see `off_policy`."""

    kind: str = "clip"
    low: float = 0.2
    high: float = 0.2
    dual: float = math.inf
    kl: str = "k1"
    beta: float = 0.0
    entropy: float = 0.0
    average: str = "token"
    level: str = "token"
    cap: float = 2.0
    mode: str = "truncate"
    floor: float = 0.0
    normalize: bool = False
    delta: float = math.inf
    unbiased: bool = False
    top: float = 1.0
    num_items: int = 40
    max_length: int = 9
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Token:
    """One token: its log-probability, the ratio of its token and of its sequence to the old policy, its advantage."""

    logp: Tensor
    ratio: Tensor
    sequence_ratio: Tensor
    advantage: Tensor
    old: Tensor
    """The old policy's log-probability."""
    sequence: list[tuple[Tensor, Tensor, Tensor]]
    """Ratio, advantage and importance weight of every token of its sequence."""
    rank: int
    """Its place among the batch's tokens by their covariance of advantage and log-probability, from the largest."""
    covariance: float
    tokens: int
    """The batch's."""


# ------------------------------------------------------------------------------------------------------------- formulas
def _total(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()


def _clipped(ratio: Tensor, a: Tensor, s: Setting) -> Tensor:
    """min(rho A, clip(rho, 1 - low, 1 + high) A), and where A < 0 not below c A."""
    objective = torch.minimum(ratio * a, ratio.clip(1 - s.low, 1 + s.high) * a)
    return torch.maximum(objective, s.dual * a) if a < 0 and math.isfinite(s.dual) else objective


def _gate(t: Token, s: Setting) -> Tensor:
    """4 / tau sigmoid(tau (r - 1)), tau by the advantage's sign (Gao et al. 2025, SAPO)."""
    tau = s.options["sapo_temperature_pos" if t.advantage > 0 else "sapo_temperature_neg"]
    return 4 / tau / (1 + torch.exp(-tau * (t.ratio - 1)))


def _gamma(t: Token, s: Setting) -> Tensor:
    """e^lambda W^k e^(-lambda W) of the sequence's weight W, a constant (Shen et al. 2026, VESPO)."""
    side = "pos" if t.advantage >= 0 else "neg"
    k, decay = s.options[f"vespo_k_{side}"], s.options[f"vespo_lambda_{side}"]
    w = torch.stack([ratio * importance for ratio, _, importance in t.sequence]).prod().detach()
    return math.exp(decay) * w**k * torch.exp(-decay * w)


def _geometric(t: Token, s: Setting) -> Tensor:
    """(prod_t min(r^sgn A, clip(r, e^-low, e^high)^sgn A)^sgn A)^(1 / |y|) (Zhao et al. 2025, GMPO)."""
    factors = []
    for ratio, advantage, _ in t.sequence:
        sign = 1 if advantage > 0 else -1
        cut = ratio.clip(math.exp(-s.low), math.exp(s.high))
        factors.append(torch.minimum(ratio**sign, cut**sign) ** sign)
    return torch.stack(factors).prod() ** (1 / len(factors))


def _divergence(t: Token, s: Setting) -> float:
    """Of taking the token or not, from the old policy to the new: total variation or KL (Qi et al. 2026, DPPO)."""
    p, q = float(t.logp.detach().exp()), float(t.old.exp())
    if s.kind == "dppo_tv":
        return abs(p - q)
    return q * math.log(q / p) + (1 - q) * math.log((1 - q + 1e-8) / (1 - p + 1e-8))


def _trusted(t: Token, s: Setting) -> Tensor:
    """min(r, cap), a constant, or 0 where the advantage pushes a token that has gone too far already."""
    p, q = float(t.logp.detach().exp()), float(t.old.exp())
    bound, away = (s.high, p > q) if t.advantage > 0 else (s.low, p < q)
    too_far = away and _divergence(t, s) > bound
    return t.ratio.detach().clip(max=s.options["dppo_ratio_cap"]) * (0.0 if too_far else 1.0)


def _left_out(t: Token, s: Setting) -> bool:
    """Clip-Cov's choice (Cui et al. 2025) where it takes every candidate, so that nothing is drawn."""
    share = s.options["clip_cov_ratio"]
    if share != 1.0:
        raise ValueError(f"clip_cov_ratio must be 1: others draw from the candidates; got {share}")
    cut = bool(t.ratio.clip(1 - s.low, 1 + s.high) * t.advantage < t.ratio * t.advantage)
    return not cut and s.options["clip_cov_lb"] < t.covariance < s.options["clip_cov_ub"]


def _held(t: Token, s: Setting) -> bool:
    """KL-Cov's choice (Cui et al. 2025)."""
    return t.rank < max(1, int(t.tokens * s.options["kl_cov_ratio"]))


OBJECTIVES: dict[str, Callable[[Token, Setting], Tensor]] = {
    "reinforce": lambda t, s: t.advantage * t.logp,
    "trpo": lambda t, s: t.ratio * t.advantage,
    "penalty": lambda t, s: t.ratio * t.advantage,
    "clip": lambda t, s: _clipped(t.ratio, t.advantage, s),
    "gspo": lambda t, s: _clipped(t.sequence_ratio, t.advantage, s),
    "gspo_token": lambda t, s: _clipped(
        t.sequence_ratio.detach() * t.logp.exp() / t.logp.exp().detach(), t.advantage, s
    ),
    "cispo": lambda t, s: t.ratio.detach().clip(1 - s.low, 1 + s.high) * t.advantage * t.logp,
    "sapo": lambda t, s: _gate(t, s) * t.advantage,
    "luspo": lambda t, s: len(t.sequence) * _clipped(t.sequence_ratio, t.advantage, s),
    "vespo": lambda t, s: _gamma(t, s) * t.advantage * t.logp,
    "gmpo": lambda t, s: _geometric(t, s) * t.advantage,
    "dppo_tv": lambda t, s: _trusted(t, s) * t.advantage * t.logp,
    "dppo_kl": lambda t, s: _trusted(t, s) * t.advantage * t.logp,
    "dro": lambda t, s: t.advantage * t.logp - s.options["dro_beta"] / 2 * (t.logp - t.old) ** 2,
    "gpg": lambda t, s: t.logp * t.advantage,
    "clip_cov": lambda t, s: _clipped(t.ratio, t.advantage, s) * (0.0 if _left_out(t, s) else 1.0),
    "kl_cov": lambda t, s: (
        t.ratio * t.advantage - (s.options["kl_cov_coef"] * torch.log(t.ratio).abs() if _held(t, s) else 0.0)
    ),
}
"""What a token adds to the objective that is maximised."""

AVERAGES: dict[str, Callable[[list[list[Tensor]], Setting], Tensor]] = {
    "token": lambda rows, s: _total(map(_total, rows)) / sum(map(len, rows)),
    "bnpo": lambda rows, s: _total(map(_total, rows)) / sum(map(len, rows)),
    "grpo": lambda rows, s: _total(_total(row) / len(row) for row in rows) / len(rows),
    "dapo": lambda rows, s: _total(map(_total, rows)) / s.num_items,
    "dr_grpo": lambda rows, s: _total(map(_total, rows)) / (len(rows) * s.max_length),
}
"""Of the terms of every sequence's tokens."""


def policy(
    logits: Tensor,
    labels: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    ref_logps: Tensor | None = None,
    ref_logits: Tensor | None = None,
    sampler_logps: Tensor | None = None,
    *,
    setting: Setting,
) -> Tensor:
    """The loss of a batch of responses, [B, T, V] and [B, T]; labels of -100 are not part of a response."""
    s, rows = setting, []
    logps = torch.log_softmax(logits.double(), -1)
    real = [[t for t in range(labels.shape[1]) if labels[b, t] != -100] for b in range(labels.shape[0])]
    places = [(b, t) for b, row in enumerate(real) for t in row]
    chosen = {(b, t): logps[b, t, labels[b, t]] for b, t in places}
    covariances = covariances_of({at: float(advantages[at]) for at in places}, chosen)
    ranks = {at: n for n, at in enumerate(sorted(places, key=lambda at: -covariances[at]))}
    importance = weights(real, old_logps, sampler_logps, s)
    entropies = {(b, t): -(logps[b, t].exp() * logps[b, t]).sum() for b, t in places}
    behaviour = old_logps if sampler_logps is None else sampler_logps
    dropped = left_out(real, chosen, behaviour, advantages, s) | of_little_entropy(entropies, s)
    for b, row in enumerate(real):
        if not row:
            continue
        old = {t: old_logps[b, t].double() for t in row}
        advantage = {t: advantages[b, t].double() for t in row}
        ratio = {t: (chosen[b, t] - old[t]).exp() for t in row}
        sequence = [(ratio[t], advantage[t], importance[b, t]) for t in row]
        geometric_mean = (_total(chosen[b, t] - old[t] for t in row) / len(row)).exp()
        terms = []
        for t in row:
            place = (ranks[b, t], covariances[b, t], len(places))
            token = Token(chosen[b, t], ratio[t], geometric_mean, advantage[t], old[t], sequence, *place)
            term = OBJECTIVES[s.kind](token, s)
            term = term if s.kind == "vespo" else term * importance[b, t]  # VESPO's are within its own
            term = torch.zeros_like(term) if (b, t) in dropped else term
            kl = _kl(b, t, logps[b, t], chosen[b, t], old[t], ref_logps, ref_logits, s)
            term = term - s.beta * (ratio[t] * kl if s.unbiased else kl)  # DeepSeek-V3.2
            terms.append(term + s.entropy * entropies[b, t])
        rows.append(terms)
    return -AVERAGES[s.average](rows, s)


def _kl(
    b: int,
    t: int,
    logp: Tensor,
    chosen: Tensor,
    old: Tensor,
    ref_logps: Tensor | None,
    ref_logits: Tensor | None,
    s: Setting,
) -> Tensor:
    """KL(pi, pi_ref) of a token, exact or estimated; for the penalty without a reference KL(pi_old, pi)."""
    if ref_logits is not None:
        return (logp.exp() * (logp - torch.log_softmax(ref_logits[b, t].double(), -1))).sum()
    if ref_logps is not None:
        return ESTIMATORS[s.kl]((ref_logps[b, t].double() - chosen).exp())
    return ESTIMATORS[s.kl]((chosen - old).exp()) if s.kind == "penalty" else torch.zeros((), dtype=torch.float64)


def value(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, cliprange: float = math.inf) -> Tensor:
    """Half the mean of the larger of two squared errors: of the value, and of the value kept near the old one."""
    errors = []
    for index in mask.nonzero().tolist():
        v, old, target = (x[tuple(index)].double() for x in (values, old_values, returns))
        near = old + (v - old).clip(-cliprange, cliprange)
        errors.append(torch.maximum((v - target) ** 2, (near - target) ** 2))
    return _total(errors) / (2 * len(errors))


# --------------------------------------------------------------------------------------------------------------- inputs
def _logps(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def _responses(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    """Ragged responses with a hidden token inside, by a policy some way from the old one."""
    shape = (sizes.batch, sizes.length)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    labels = torch.randint(0, sizes.vocab, shape, generator=generator)
    logits = noise(*shape, sizes.vocab)
    old = _logps(logits + 0.3 * noise(*shape, sizes.vocab), labels)
    ref_logits = logits + 0.5 * noise(*shape, sizes.vocab)
    more = {
        "ref_logits": ref_logits,
        "ref_logps": _logps(ref_logits, labels),
        "sampler_logps": old + 0.5 * noise(*shape),
    }
    ends = torch.randint(1, sizes.length + 1, (sizes.batch, 1), generator=generator)
    ends[0] = sizes.length
    labels[torch.arange(sizes.length) >= ends] = -100
    labels[0, sizes.length // 2] = -100
    # Both signs, but not centred: a loss near 0 would have no relative error worth measuring.
    return {"logits": logits, "labels": labels, "old_logps": old, "advantages": 0.7 + noise(*shape), **more}


def _values(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    shape = (sizes.batch, sizes.length)
    values, change, returns = torch.randn((3, *shape), generator=generator, dtype=torch.float64)
    mask = torch.rand(shape, generator=generator) < 0.7
    mask[0, 0] = True
    return {"values": values, "old_values": values + 0.3 * change, "returns": returns, "mask": mask}


# ---------------------------------------------------------------------------------------------------------------- cases
def _case(name: str, setting: Setting, *extra: str) -> Case:
    """A row; `extra` names the inputs beyond logits, labels, old log-probabilities and advantages."""
    names = ("logits", "labels", "old_logps", "advantages", *extra)
    module = PPOLoss(
        kind=setting.kind,
        cliprange=setting.low,
        cliprange_high=None if setting.high == setting.low else setting.high,
        dual_clip=None if math.isinf(setting.dual) else setting.dual,
        kl_coef=setting.beta,
        kl_estimator=setting.kl,
        entropy_coef=setting.entropy,
        importance_level=setting.level,
        importance_cap=setting.cap,
        normalization=setting.average,
        max_length=setting.max_length if setting.average == "dr_grpo" else None,
        importance_mode=setting.mode,
        importance_floor=setting.floor,
        importance_normalize=setting.normalize,
        off_policy_mask_threshold=None if math.isinf(setting.delta) else setting.delta,
        use_bias_correction_kl=setting.unbiased,
        top_entropy_quantile=setting.top,
        **setting.options,
    )
    options: dict[str, Any] = {"num_items": setting.num_items} if setting.average == "dapo" else {}

    def inputs(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
        made = _responses(sizes, generator)
        return {key: made[key] for key in names}

    def reference(**tensors: Tensor) -> Tensor:
        return policy(**tensors, setting=setting)

    return Case(name, lambda **tensors: module(**tensors, **options).loss, reference, inputs)


def _value_case(name: str, cliprange: float) -> Case:
    option = None if math.isinf(cliprange) else cliprange
    return Case(
        name,
        lambda **tensors: value_loss(**tensors, cliprange_value=option).loss,
        lambda **tensors: value(**tensors, cliprange=cliprange),
        _values,
        ("values",),
    )


def _ptx_fused(logits: Tensor, labels: Tensor, old_logps: Tensor, advantages: Tensor) -> Tensor:
    loss = PPOLoss()(logits, labels, old_logps, advantages).loss
    return ptx_loss(loss, stats_of(logits, labels).logps, labels != -100, ptx_coef=0.7)


def _ptx_reference(logits: Tensor, labels: Tensor, old_logps: Tensor, advantages: Tensor) -> Tensor:
    """Ouyang et al. 2022, eq. 2, with the batch itself as the pretraining text."""
    likelihood = policy(logits, labels, old_logps, torch.ones_like(advantages), setting=Setting(kind="reinforce"))
    return policy(logits, labels, old_logps, advantages, setting=Setting()) + 0.7 * likelihood


_GRPO = Setting(average="grpo", kl="k3", beta=0.04)
_MIS = Setting(level="sequence", mode="mask", floor=0.1, cap=3.0)
_DPPO = {"dppo_ratio_cap": 1.5}
_NEWER = {
    "sapo": Setting("sapo", average="grpo", options={"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}),
    "luspo": Setting("luspo", low=3e-2, high=4e-2, average="grpo"),
    "vespo": Setting(
        "vespo",
        average="dapo",
        options={"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0},
    ),
    "gmpo": Setting("gmpo", low=0.2, high=0.4, average="grpo"),
    "dppo_tv": Setting("dppo_tv", low=0.01, high=0.02, average="dr_grpo", options=_DPPO),
    "dppo_kl": Setting("dppo_kl", low=5e-4, high=1e-3, average="dr_grpo", options=_DPPO),
    "dro": Setting("dro", options={"dro_beta": 0.3}),
    "gpg": Setting("gpg"),
    "clip_cov": Setting("clip_cov", options={"clip_cov_ratio": 1.0, "clip_cov_lb": 0.05, "clip_cov_ub": 0.5}),
    "kl_cov": Setting("kl_cov", options={"kl_cov_ratio": 0.3, "kl_cov_coef": 0.7}),
}
CASES = [
    _case("reinforce", Setting("reinforce")),
    _case("trpo", Setting("trpo")),
    _case("ppo_clip", Setting()),
    _case("ppo_clip_bnpo", Setting(average="bnpo")),
    _case("ppo_clip_dual", Setting(low=0.1, high=0.3, dual=1.2)),
    _case("ppo_clip_entropy", Setting(entropy=0.01)),
    _case("ppo_clip_kl_k1", Setting(beta=0.1), "ref_logps"),
    _case("ppo_clip_kl_k2", Setting(beta=0.1, kl="k2"), "ref_logps"),
    _case("ppo_clip_kl_exact_entropy", Setting(beta=0.1, kl="exact", entropy=0.01), "ref_logits"),
    _case("ppo_clip_token_weights", Setting(), "sampler_logps"),
    _case("ppo_clip_sequence_weights", Setting(level="sequence", cap=3.0), "sampler_logps"),
    _case("ppo_clip_geometric_weights", Setting(level="geometric", floor=0.9, cap=1.2), "sampler_logps"),
    _case("ppo_clip_icepop", Setting(mode="mask", floor=0.7, cap=1.5), "sampler_logps"),
    _case("ppo_clip_mis_normalized", replace(_MIS, normalize=True), "sampler_logps"),
    _case("ppo_clip_high_entropy", Setting(top=0.4)),
    _case("grpo_off_policy", replace(_GRPO, delta=0.05, unbiased=True), "ref_logps", "sampler_logps"),
    *(_case(f"ppo_penalty_{kl.replace('+', '_plus')}", Setting("penalty", beta=0.5, kl=kl)) for kl in ESTIMATORS),
    _case("ppo_penalty_reference", Setting("penalty", beta=0.5), "ref_logps"),
    _case("grpo", _GRPO, "ref_logps"),
    _case("dapo", Setting(high=0.28, average="dapo")),
    _case("dr_grpo", replace(_GRPO, average="dr_grpo"), "ref_logps"),
    _case("gspo", Setting("gspo", low=3e-2, high=4e-2, average="grpo")),
    _case("gspo_token", Setting("gspo_token", low=3e-2, high=4e-2, average="grpo")),
    _case("cispo", Setting("cispo", low=1.0, high=0.28, average="dapo")),
    _case("cispo_below_1", Setting("cispo", low=1.0, high=-0.2)),
    _case("cispo_token", Setting("cispo")),
    *(_case(name, setting) for name, setting in _NEWER.items()),
    _case("vespo_sampler", replace(_NEWER["vespo"], cap=1.2), "sampler_logps"),
    _case("ppo_clip_kl_k3_plus", Setting(beta=0.1, kl="k3+"), "ref_logps"),
    Case(
        "ppo_ptx",
        _ptx_fused,
        _ptx_reference,
        lambda sizes, generator: {
            key: tensor
            for key, tensor in _responses(sizes, generator).items()
            if key in ("logits", "labels", "old_logps", "advantages")
        },
    ),
    _value_case("value", math.inf),
    _value_case("value_clip", 0.2),
]
