"""Policy objectives token by token, as their papers print them: maximised objectives, negated at the very end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..losses import PPOLoss, ptx_loss, value_loss
from ..losses.base import stats_of
from .case import Case, Sizes


@dataclass(frozen=True)
class Setting:
    """The choices of one row: `low`, `high` are the clip's epsilons, `beta` weighs the KL, `cap` bounds ratios."""

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
    num_items: int = 40
    max_length: int = 9


@dataclass(frozen=True)
class Token:
    """One token: its log-probability, the ratio of its token and of its sequence to the old policy, its advantage."""

    logp: Tensor
    ratio: Tensor
    sequence_ratio: Tensor
    advantage: Tensor


# ------------------------------------------------------------------------------------------------------------- formulas
def _total(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()


def _clipped(ratio: Tensor, a: Tensor, s: Setting) -> Tensor:
    """min(rho A, clip(rho, 1 - low, 1 + high) A), and where A < 0 not below c A."""
    objective = torch.minimum(ratio * a, ratio.clip(1 - s.low, 1 + s.high) * a)
    return torch.maximum(objective, s.dual * a) if a < 0 and math.isfinite(s.dual) else objective


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
}
"""What a token adds to the objective that is maximised."""

ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda r: -torch.log(r),
    "k2": lambda r: torch.log(r) ** 2 / 2,
    "k3": lambda r: (r - 1) - torch.log(r),
}
"""Of KL(q, p) from samples of q, with r = p / q (Schulman 2020)."""

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
    for b in range(labels.shape[0]):
        real = [t for t in range(labels.shape[1]) if labels[b, t] != -100]
        if not real:
            continue
        logp = {t: torch.log_softmax(logits[b, t].double(), -1) for t in real}
        chosen = {t: logp[t][labels[b, t]] for t in real}
        old = {t: old_logps[b, t].double() for t in real}
        mean_log_ratio = _total(chosen[t] - old[t] for t in real) / len(real)
        terms = []
        for t in real:
            token = Token(chosen[t], (chosen[t] - old[t]).exp(), mean_log_ratio.exp(), advantages[b, t].double())
            term = OBJECTIVES[s.kind](token, s) * _weight(b, t, real, old, sampler_logps, s)
            term = term - s.beta * _kl(b, t, logp[t], chosen[t], old[t], ref_logps, ref_logits, s)
            terms.append(term + s.entropy * -(logp[t].exp() * logp[t]).sum())
        rows.append(terms)
    return -AVERAGES[s.average](rows, s)


def _weight(b: int, t: int, real: list[int], old: dict[int, Tensor], sampler: Tensor | None, s: Setting) -> Tensor:
    """min(pi_old / pi_sampler, cap), of the token or of its whole sequence."""
    if sampler is None:
        return torch.ones((), dtype=torch.float64)
    tokens = [t] if s.level == "token" else real
    ratio = math.prod(float((old[u] - sampler[b, u].double()).exp()) for u in tokens)
    return torch.tensor(min(ratio, s.cap), dtype=torch.float64)


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
    ones = torch.ones_like(advantages)
    likelihood = policy(logits, labels, old_logps, ones, setting=Setting(kind="reinforce"))
    return policy(logits, labels, old_logps, advantages, setting=Setting()) + 0.7 * likelihood


_GRPO = Setting(average="grpo", kl="k3", beta=0.04)
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
    *(_case(f"ppo_penalty_{kl}", Setting("penalty", beta=0.5, kl=kl)) for kl in ESTIMATORS),
    _case("ppo_penalty_reference", Setting("penalty", beta=0.5), "ref_logps"),
    _case("grpo", _GRPO, "ref_logps"),
    _case("dapo", Setting(high=0.28, average="dapo")),
    _case("dr_grpo", replace(_GRPO, average="dr_grpo"), "ref_logps"),
    _case("gspo", Setting("gspo", low=3e-2, high=4e-2, average="grpo")),
    _case("gspo_token", Setting("gspo_token", low=3e-2, high=4e-2, average="grpo")),
    _case("cispo", Setting("cispo", low=1.0, high=0.28, average="dapo")),
    _case("cispo_token", Setting("cispo")),
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
