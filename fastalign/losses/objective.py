"""A token-level objective as a value, and the statistics and the gradient of the logits under it in one launch."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

from torch import Tensor

from ..ops.objective import attach_gradient, attach_gradients, fused_gradient
from ..ops.results import TokenStats, smoothed
from ..ops.token_programs import TokenProgram, trace_token
from .kl import KL_ESTIMATORS
from .policy_objectives import KINDS, Terms, with_penalties
from .sft import with_z_loss

__all__ = ["Objective", "attach_gradient", "attach_gradients", "token_objective"]

_POLICIES = {"reinforce": "reinforce", "surrogate": "trpo", "clip": "clip", "cispo": "cispo"}
"""Kind → its name among the policy objectives."""
_NAMES = {"kind": ("sft", *_POLICIES), "kl": (None, *KL_ESTIMATORS, "exact")}


class Objective(NamedTuple):
    """The loss of a token; see `token_objective` for the fields."""

    kind: str
    low: float = 0.0
    high: float = 0.0
    dual_clip: float = math.inf
    kl: str | None = None
    kl_coef: float = 0.0
    kl_reversed: bool = False
    entropy_coef: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0


def token_objective(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor,
    objective: Objective,
    *,
    old_logps: Tensor | None = None,
    advantages: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_logits: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    inplace: bool = False,
) -> tuple[TokenStats, Tensor]:
    """Statistics of every token and the gradient of sum_t weight_t loss_t in the logits, in one read and one write.

    loss_t = policy_t + kl_coef KL_t - entropy_coef H_t + z_loss lse_t^2, with policy_t the objective's kind: "sft"
    -log p, "reinforce" -A log p, "surrogate" -A rho, "clip" PPO's, "cispo" (see `losses.policy_loss` for the formulas).
    Under label smoothing all but the entropy, lse and exact KL are of the smoothed log p, which is returned.

    Args:
        logits: [..., V], float32, bfloat16 or float16, on the CPU or a GPU.
        labels: [...], int64 or int32; tokens equal to ignore_index have no gradient.
        weight: [...], float32: what the normalisation gives each token, for a token mean 1 / tokens.
        objective: `Objective(kind, low, high, dual_clip, kl, kl_coef, kl_reversed, entropy_coef, label_smoothing,
            z_loss)`: the ratio is cut to [1 - low, 1 + high]; kl is None, "k1", "k2", "k3" or "exact"; kl_reversed
            estimates KL(ref, pi) from the reference's samples.
        old_logps, advantages: [...], float32; needed by every kind but "sft".
        ref_logps: [...], float32, for an estimated KL; ref_logits: [..., V], for the exact one.
        ignore_index, temperature, softcap: as in `token_stats`.
        entropy: return the entropy (always so where entropy_coef is not 0).
        inplace: write the gradient over the logits and raise their version counter.

    Returns:
        (TokenStats without gradient, gradient of the logits' shape and dtype, dense or the logits' own memory).

    Raises:
        TypeError, ValueError: as `token_stats`; an input that the objective needs and did not get.
        RuntimeError: no compiled kernel serves these logits.
    """
    inputs = _checked(objective, {"old_logps": old_logps, "advantages": advantages, "ref_logps": ref_logps})
    if (objective.kl == "exact") != (ref_logits is not None):
        got = "None" if ref_logits is None else "ref_logits"
        raise ValueError(f"ref_logits go with kl='exact', and with no other; got {got} with kl={objective.kl!r}")
    stats, mean, gradient = fused_gradient(
        logits,
        labels,
        weight,
        _program(objective),
        inputs,
        ref_logits=ref_logits,
        ignore_index=ignore_index,
        temperature=temperature,
        softcap=softcap,
        entropy=entropy or objective.entropy_coef != 0.0,
        inplace=inplace,
    )
    return stats._replace(logps=smoothed(stats.logps, stats.lse, mean, objective.label_smoothing)), gradient


@functools.lru_cache(maxsize=128)
def _program(objective: Objective) -> TokenProgram:
    return trace_token(functools.partial(_loss, objective), ("old_logps", "advantages", "ref_logps"))


def _loss(o: Objective, t: Any) -> Any:
    """The loss of a token."""
    logps = smoothed(t.logps, t.lse, t.mean, o.label_smoothing)
    if o.kind == "sft":
        policy = -logps
    else:
        bound = None if o.dual_clip == math.inf else o.dual_clip
        terms = Terms(logps, logps - t.old_logps, t.advantages, t.mask, o.low, o.high, bound)
        policy = KINDS[_POLICIES[o.kind]](terms).loss
    kl = t.kl
    if o.kl not in (None, "exact"):
        log_ratio = t.ref_logps - logps if o.kl_reversed else logps - t.ref_logps
        kl = KL_ESTIMATORS[o.kl](log_ratio)  # type: ignore[index]
    penalised = with_penalties(policy, kl, 0.0 if o.kl is None else o.kl_coef, t.entropy, o.entropy_coef)
    return with_z_loss(penalised, t.lse, o.z_loss)


def _checked(objective: Objective, named: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """What was given; ValueError for a name that there is not, or for what the objective needs and did not get."""
    for argument, names in _NAMES.items():
        if (got := getattr(objective, argument)) not in names:
            raise ValueError(f"{argument} must be one of {', '.join(map(str, names))}; got {got!r}")
    if not 0.0 <= objective.label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1]; got {objective.label_smoothing}")
    needed = ["old_logps", "advantages"] if objective.kind != "sft" else []
    if objective.kl in KL_ESTIMATORS:
        needed += ["ref_logps"]
    for name in needed:
        if named[name] is None:
            raise ValueError(f"{name} is needed by kind={objective.kind!r}, kl={objective.kl!r}; got None")
    return {name: t for name, t in named.items() if t is not None}
