"""What a loss module hands to `fastalign.objective`, so that the launch that reads the logits yields their gradient.

Only slopes live in the kernel. The value and the metrics are the ordinary loss function's, on the launch's statistics.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..ops.objective import Objective
from .base import check_float
from .kl import importance_weights
from .reductions import Count, as_real, normalize

_POLICY_KINDS = {
    "reinforce": "reinforce",
    "trpo": "surrogate",
    "penalty": "surrogate",
    "clip": "clip",
    "cispo": "cispo",
}


def token_weights(
    mask: Tensor, normalization: str, num_items: Count | None = None, max_length: int | None = None
) -> Tensor:
    """What each token's loss counts for in the scalar: the derivative of the (linear) normalisation. float32."""
    with torch.enable_grad():
        x = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device, requires_grad=True)
        (weight,) = torch.autograd.grad(normalize(x, mask, normalization, num_items, max_length), x)
    return weight


def policy_objective(config: dict[str, Any], has_reference: bool) -> Objective:
    """The kernel's objective for a `PPOLoss` configuration; ValueError for kinds that need the whole sequence."""
    kind = config["kind"]
    if kind not in _POLICY_KINDS:
        raise ValueError(
            f"one_launch serves the kinds {', '.join(_POLICY_KINDS)}, whose tokens are independent; got {kind!r}"
        )
    to_old = kind == "penalty" and not has_reference and config["kl_estimator"] != "exact"
    high = config["cliprange"] if config["cliprange_high"] is None else config["cliprange_high"]
    return Objective(
        _POLICY_KINDS[kind],
        low=config["cliprange"],
        high=high,
        dual_clip=math.inf if config["dual_clip"] is None else config["dual_clip"],
        # The exact KL is reported even where it has no weight, as in two steps.
        kl=config["kl_estimator"] if config["kl_coef"] or config["kl_estimator"] == "exact" else None,
        kl_coef=config["kl_coef"],
        kl_reversed=to_old,
        entropy_coef=config["entropy_coef"],
    )


def plain_objective(config: dict[str, Any], reference: Tensor | None) -> Objective | None:
    """The objective of a `PPOLoss` configuration as `policy_terms` takes it; None where that does not serve it."""
    if config["kind"] not in _POLICY_KINDS or config["normalization"] not in ("token", "bnpo"):
        return None
    estimator, entropy, dual_clip = config["kl_estimator"], config["entropy_coef"], config["dual_clip"]
    if estimator == "exact" or entropy != 0.0 or (dual_clip is not None and not dual_clip > 1):
        return None
    found = policy_objective(config, reference is not None)
    compared = reference is not None or config["kind"] == "penalty"
    if not (found.low >= 0 and found.high >= 0 and found.kl_coef >= 0) or (found.kl_coef and not compared):
        return None  # the general road says what is wrong
    return found._replace(kl=estimator if compared else None)


def policy_inputs(
    config: dict[str, Any],
    mask: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    ref_logps: Tensor | None,
    sampler_logps: Tensor | None,
) -> dict[str, Tensor | None]:
    """old_logps, advantages (times the importance weights, in which every kind is homogeneous) and ref_logps."""
    check_float("old_logps", old_logps, mask.shape, "labels")
    if ref_logps is not None:
        check_float("ref_logps", ref_logps, mask.shape, "labels")
    old, scaled = as_real(old_logps, mask).detach(), advantages
    if sampler_logps is not None:
        level, cap = config["importance_level"], config["importance_cap"]
        scaled = scaled * importance_weights(old, sampler_logps, mask, level=level, cap=cap)
    reference = ref_logps
    if reference is None and config["kind"] == "penalty" and config["kl_estimator"] != "exact":
        reference = old
    if reference is not None:
        reference = as_real(reference, mask).detach().float()
    return {"old_logps": old.float(), "advantages": scaled.float(), "ref_logps": reference}
