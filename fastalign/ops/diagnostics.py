"""Statistics for the log beside those that losses are made of: constants, through which no gradient flows.

The forward makes them in its one read, where it is told to: log sum_j p_j^2 from sum_j exp(2 x_j), the mean logit, and
the row's first largest element.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection

from torch import Tensor

from .results import DIAGNOSTICS


def asked_for(diagnostics: Collection[str], extras: Collection[str] | None, stacklevel: int = 3) -> Collection[str]:
    """The names, checked; `extras`: the argument's name of before; `stacklevel`: of whoever gave it."""
    if extras is not None:
        warnings.warn("extras is now diagnostics", DeprecationWarning, stacklevel=stacklevel)
    names = diagnostics if extras is None else extras
    if isinstance(names, str) or any(name not in DIAGNOSTICS for name in names):
        raise ValueError(f"diagnostics must be a collection of names among {', '.join(DIAGNOSTICS)}; got {names!r}")
    return names


def beyond_mean(names: Collection[str]) -> bool:
    """Whether a forward must be asked for diagnostics: for the mean, which is a statistic of its own, it need not."""
    return any(name != "mean_logits" for name in names)


def named(
    names: Collection[str],
    labels: Tensor,
    mean: Tensor | None,
    log_sum_sq: Tensor | None = None,
    argmax: Tensor | None = None,
) -> dict[str, Tensor]:
    """Name -> [...] of what a forward returned for labels of that shape; `argmax` is -1 where a token is ignored."""
    found = {}
    for name in names:
        if name == "mean_logits" and mean is not None:
            found[name] = mean.detach()
        elif name == "log_sum_sq_probs" and log_sum_sq is not None:
            found[name] = log_sum_sq
        elif name == "is_top1" and argmax is not None:
            found[name] = (argmax == labels) & (argmax >= 0)
        elif name == "argmax" and argmax is not None:
            found[name] = argmax
    return found
