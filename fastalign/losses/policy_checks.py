"""What the policy losses refuse, and with what words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import check_float, check_range, lookup
from .kl import KL_ESTIMATORS
from .policy_objectives import KINDS, WEIGHS_ITSELF
from .policy_options import check_general, check_options
from .reductions import NORMALIZATIONS, as_real, check_normalization


def check_config(config: dict[str, Any]) -> None:
    lookup("kind", KINDS, config["kind"])
    lookup("kl_estimator", {**KL_ESTIMATORS, "exact": None}, config["kl_estimator"])
    lookup("normalization", NORMALIZATIONS, config["normalization"])
    for name in ("cliprange", "kl_coef"):
        check_range(name, config[name], 0)
    if config["cliprange_high"] is not None:  # CISPO's cut is of a weight alone, and may be below 1
        check_range(
            "cliprange_high", config["cliprange_high"], -config["cliprange"] if config["kind"] == "cispo" else 0
        )
    if config["dual_clip"] is not None:
        check_range("dual_clip", config["dual_clip"], 1, open_low=True)
    check_options(config["options"])
    check_general(config)
    if config["kind"] in WEIGHS_ITSELF and config["importance_level"] != "token":
        raise ValueError(
            f"importance_level must be 'token' with kind={config['kind']!r}, which weighs whole sequences by the "
            f"product of their tokens' weights; got {config['importance_level']!r}"
        )


def is_sound(config: dict[str, Any]) -> bool:
    try:
        check_config(config)
        check_normalization(torch.zeros(1), config["normalization"], None, config["max_length"])
    except (TypeError, ValueError):
        return False
    return config["normalization"] != "dr_grpo" or config["max_length"] is not None


def check_given(config: dict[str, Any], mask: Tensor, kl: Any, entropy: Any, given: dict[str, Tensor | None]) -> None:
    """Raises unless the inputs are such as the configuration needs."""
    if (kl is not None) != (config["kl_estimator"] == "exact"):
        got = f"kl_estimator={config['kl_estimator']!r} {'with' if kl is not None else 'without'} kl"
        raise ValueError(f"kl, the exact KL of each token, goes with kl_estimator='exact' and with no other; got {got}")
    for name, x in ({"kl": kl, "entropy": entropy} | given).items():
        if x is not None:
            check_float(name, x, mask.shape, "logps")
    check_compared(config, given["ref_logps"] is not None)
    if config["entropy_coef"] != 0.0 and entropy is None:
        raise ValueError("entropy_coef other than 0 needs entropy, that of each token; got None")
    if config["general"].top_entropy_quantile < 1.0 and entropy is None:
        raise ValueError("top_entropy_quantile below 1 needs entropy, that of each token; got None")


def check_compared(config: dict[str, Any], has_reference: bool) -> None:
    """Raises where a KL is weighted and there is nothing to compare with."""
    compared = has_reference or config["kl_estimator"] == "exact" or config["kind"] == "penalty"
    if config["kl_coef"] != 0.0 and not compared:
        raise ValueError("kl_coef other than 0 needs ref_logps, or kl with kl_estimator='exact'; got neither")


def token_advantages(advantages: Tensor, mask: Tensor) -> Tensor:
    """[..., T], hidden and constant, from one advantage per token or per sequence."""
    check_float("advantages", advantages)
    if advantages.shape == mask.shape[:-1]:
        advantages = advantages.unsqueeze(-1).expand(mask.shape)
    return as_real(check_float("advantages", advantages, mask.shape, "logps"), mask).detach()
