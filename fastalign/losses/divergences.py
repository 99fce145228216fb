"""Divergences between a student's distribution p and a teacher's q: which mixture of KLs each of them is."""

from __future__ import annotations

from collections.abc import Callable

from .._backends import Mixture
from .base import check_range, lookup, resolve


def _forward_kl(beta: float, alpha: float) -> Mixture:
    """KL(q || p): where the teacher has mass the student must have some (Hinton et al. 2015, sec. 2)."""
    return Mixture(1.0, 0.0, 0.0)


def _reverse_kl(beta: float, alpha: float) -> Mixture:
    """KL(p || q): the student may choose among the teacher's modes (Gu et al. 2024, eq. 1)."""
    return Mixture(0.0, 1.0, 1.0)


def _jsd(beta: float, alpha: float) -> Mixture:
    """beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p, the generalised JSD (Agarwal et al. 2024,
    sec. 2). As in GKD's trainers, beta = 0 is the forward KL and beta = 1 the reverse KL, to which the JSD over beta
    and over 1 - beta tend there; it is 0 itself."""
    if beta in (0.0, 1.0):
        return (_reverse_kl if beta else _forward_kl)(beta, alpha)
    return Mixture(beta, 1 - beta, beta)


def _skewed_kl(beta: float, alpha: float) -> Mixture:
    """KL(q || alpha q + (1 - alpha) p), DistiLLM's: bounded by -log alpha (Ko et al. 2024, sec. 3.1)."""
    return Mixture(1.0, 0.0, alpha)


def _skewed_reverse_kl(beta: float, alpha: float) -> Mixture:
    """KL(p || alpha p + (1 - alpha) q), DistiLLM's: bounded by -log alpha (Ko et al. 2024, sec. 3.1)."""
    return Mixture(0.0, 1.0, 1 - alpha)


DIVERGENCES: dict[str, Callable[[float, float], Mixture]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skewed_kl": _skewed_kl,
    "skewed_reverse_kl": _skewed_reverse_kl,
}
DIVERGENCE_ALIASES = {
    "gkd": "jsd",
    "fkl": "forward_kl",
    "rkl": "reverse_kl",
    "sfkl": "skewed_kl",
    "srkl": "skewed_reverse_kl",
}
"""Names that GKD's and DistiLLM's code have → ours."""


def mixture_of(divergence: str, beta: float, skew_alpha: float) -> Mixture:
    """The mixture that a divergence is; ValueError for an unknown one or a number out of range."""
    check_range("beta", beta, 0.0, 1.0)
    check_range("skew_alpha", skew_alpha, 0.0, 1.0)
    name = resolve("divergence", DIVERGENCES, DIVERGENCE_ALIASES, divergence)
    if name.startswith("skewed") and skew_alpha == 1.0:
        raise ValueError(f"skew_alpha must be below 1, where the divergence {name!r} is 0; got {skew_alpha}")
    return lookup("divergence", DIVERGENCES, name)(beta, skew_alpha)
