"""Statistics for the log beside those that losses are made of: constants, through which no gradient flows.

None needs a kernel of its own. The mean logit is a sum of the forward, which is told to return it. With p = softmax(x),
x the scaled, soft-capped logits over the temperature T,

    log sum_j p_j^2 = log sum_j exp(2 x_j) - 2 log sum_j exp(x_j)

so it takes the forward once more, at half the temperature.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection

import torch
from torch import Tensor

from .. import _backends
from .call import TokenCall
from .results import DIAGNOSTICS


def asked_for(diagnostics: Collection[str], extras: Collection[str] | None, stacklevel: int = 3) -> Collection[str]:
    """The names, checked; `extras`: the argument's name of before; `stacklevel`: of whoever gave it."""
    if extras is not None:
        warnings.warn("extras is now diagnostics", DeprecationWarning, stacklevel=stacklevel)
    names = diagnostics if extras is None else extras
    if isinstance(names, str) or any(name not in DIAGNOSTICS for name in names):
        raise ValueError(f"diagnostics must be a collection of names among {', '.join(DIAGNOSTICS)}; got {names!r}")
    return names


def lse_of(saved: Tensor, temperature: float) -> Tensor:
    """log sum_j exp(x_j) in float64, from what a forward at that temperature saved of it: m and r, m / T + r."""
    return saved[..., 0].double() / temperature + saved[..., 1].double()


def _log_sum_sq(twice: Tensor, saved: Tensor, temperature: float) -> Tensor:
    return twice - 2 * lse_of(saved, temperature)


class Diagnostics:
    """Those of M rows, collected over tiles of their logits: all columns of a row, from left to right."""

    def __init__(self, names: Collection[str], rows: int, device: torch.device) -> None:
        self.names = names
        self._twice = torch.full((rows,), -torch.inf, dtype=torch.float64, device=device)  # log sum exp(2 x)
        self._best = torch.full((rows,), -torch.inf, device=device)
        self._at = torch.zeros(rows, dtype=torch.int64, device=device)  # where it is first

    def add(self, rows: slice, columns: slice, call: TokenCall) -> None:
        """A tile, all of whose rows count."""
        logits = call.logits
        if "log_sum_sq_probs" in self.names:
            half = call._replace(reference=None, temperature=call.temperature / 2)
            saved = _backends.pick(logits).forward(half, False, False)[5]
            self._twice[rows] = torch.logaddexp(self._twice[rows], lse_of(saved, half.temperature))
        if "is_top1" in self.names:
            # Scale and soft-cap keep the order; of equal logits the first counts.
            best, at = logits.max(-1)
            better = best > self._best[rows]
            self._best[rows] = torch.where(better, best.to(self._best.dtype), self._best[rows])
            self._at[rows] = torch.where(better, at + columns.start, self._at[rows])

    def results(self, labels: Tensor, mean: Tensor | None, saved: Tensor, temperature: float) -> dict[str, Tensor]:
        """Name → [M]: float32 (float64 as `saved` is), `is_top1` boolean.

        Args:
            mean, saved: of the whole rows.
        """
        found = {
            "log_sum_sq_probs": _log_sum_sq(self._twice, saved, temperature).to(saved.dtype),
            "is_top1": self._at == labels,
        }
        if mean is not None:
            found["mean_logits"] = mean.detach()
        return {name: found[name] for name in self.names}


@torch.no_grad()
def of_logits(names: Collection[str], call: TokenCall, mean: Tensor | None) -> dict[str, Tensor]:
    """Name → [...] of whole logits, through the operator, which a compiled function can hold.

    Args:
        mean: of the forward, where it is asked for.
    """
    logits, labels, _, ignore_index, temperature, softcap = call
    logits, live = logits.detach(), labels.long() != ignore_index

    def saved(over: float) -> Tensor:
        plain = TokenCall(logits, labels, None, ignore_index, over, softcap)
        return torch.ops.fastalign.token_stats(*plain, False, False, False)[5]

    found = {}
    if "log_sum_sq_probs" in names:
        once = saved(temperature)
        log_sum_sq = _log_sum_sq(lse_of(saved(temperature / 2), temperature / 2), once, temperature)
        found["log_sum_sq_probs"] = torch.where(live, log_sum_sq, 0).to(once.dtype)
    if "mean_logits" in names and mean is not None:
        found["mean_logits"] = mean.detach()
    if "is_top1" in names:
        found["is_top1"] = (logits.argmax(-1) == labels) & live
    return found
