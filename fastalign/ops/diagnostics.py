"""Statistics for the log beside those that losses are made of: constants, through which no gradient flows.

None needs a kernel of its own. With p = softmax(x), x the scaled, soft-capped logits over the temperature T,

    log sum_j p_j^2 = log sum_j exp(2 x_j) - 2 log sum_j exp(x_j)

so it takes the forward once more, at half the temperature, whose mean logit is twice that of x.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from .. import _backends
from .call import TokenCall

NAMES = ("log_sum_sq_probs", "mean_logits", "is_top1")


def check_extras(extras: Collection[str]) -> None:
    unknown = [name for name in extras if name not in NAMES]
    if isinstance(extras, str) or unknown:
        raise ValueError(f"extras must be a collection of names among {', '.join(NAMES)}; got {extras!r}")


def lse_of(saved: Tensor, temperature: float) -> Tensor:
    """log sum_j exp(x_j) in float64, from what a forward at that temperature saved of it: m and r, m / T + r."""
    return saved[..., 0].double() / temperature + saved[..., 1].double()


def _log_sum_sq(twice: Tensor, saved: Tensor, temperature: float) -> Tensor:
    return twice - 2 * lse_of(saved, temperature)


class Extras:
    """The extras of M rows, collected over tiles of their logits: all columns of a row, from left to right."""

    def __init__(self, names: Collection[str], rows: int, vocab: int, device: torch.device) -> None:
        self.names, self.vocab = names, vocab
        self._twice = torch.full((rows,), -torch.inf, dtype=torch.float64, device=device)  # log sum exp(2 x)
        self._total = torch.zeros(rows, dtype=torch.float64, device=device)  # sum x
        self._best = torch.full((rows,), -torch.inf, device=device)
        self._at = torch.zeros(rows, dtype=torch.int64, device=device)  # where it is first

    def add(self, rows: slice, columns: slice, call: TokenCall) -> None:
        """A tile, all of whose rows count."""
        logits = call.logits
        if {"log_sum_sq_probs", "mean_logits"} & set(self.names):
            half = call._replace(reference=None, temperature=call.temperature / 2)
            _, _, _, _, mean, saved = _backends.pick(logits).forward(half, False, True)
            self._twice[rows] = torch.logaddexp(self._twice[rows], lse_of(saved, half.temperature))
            if mean is not None:
                self._total[rows] += mean.double() * ((columns.stop - columns.start) / 2)
        if "is_top1" in self.names:
            # Scale and soft-cap keep the order; of equal logits the first counts.
            best, at = logits.max(-1)
            better = best > self._best[rows]
            self._best[rows] = torch.where(better, best.to(self._best.dtype), self._best[rows])
            self._at[rows] = torch.where(better, at + columns.start, self._at[rows])

    def results(self, labels: Tensor, saved: Tensor, temperature: float) -> dict[str, Tensor]:
        """Name → [M]: float32 (float64 as `saved` is), `is_top1` boolean."""
        found = {
            "log_sum_sq_probs": _log_sum_sq(self._twice, saved, temperature).to(saved.dtype),
            "mean_logits": (self._total / self.vocab).to(saved.dtype),
            "is_top1": self._at == labels,
        }
        return {name: found[name] for name in self.names}


@torch.no_grad()
def of_logits(names: Collection[str], call: TokenCall) -> dict[str, Tensor]:
    """Name → [...] of whole logits, through the operator, which a compiled function can hold."""
    check_extras(names)
    logits, labels, _, ignore_index, temperature, softcap = call
    logits, live = logits.detach(), labels.long() != ignore_index

    def forward(over: float) -> tuple[Tensor, Tensor]:
        plain = TokenCall(logits, labels, None, ignore_index, over, softcap)
        *_, mean, saved = torch.ops.fastalign.token_stats(*plain, False, True, False)
        return mean, saved

    found = {}
    if "log_sum_sq_probs" in names:
        (mean, saved), (_, twice) = forward(temperature), forward(temperature / 2)
        log_sum_sq = _log_sum_sq(lse_of(twice, temperature / 2), saved, temperature)
        found["log_sum_sq_probs"] = torch.where(live, log_sum_sq, 0).to(mean.dtype)
        found["mean_logits"] = mean
    elif "mean_logits" in names:
        found["mean_logits"] = forward(temperature)[0]
    if "is_top1" in names:
        found["is_top1"] = (logits.argmax(-1) == labels) & live
    return {name: found[name] for name in names}
