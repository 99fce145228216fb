"""What `token_stats` returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor

DIAGNOSTICS = ("log_sum_sq_probs", "mean_logits", "is_top1", "argmax")
"""Statistics for the log, in the order in which they follow the others; constants, through which no gradient flows."""


class TokenStats(tuple[Tensor, Tensor, Tensor | None, Tensor | None]):
    """Per-token statistics of the labels' shape; float32, or float64 for float64 logits; None where not asked for.

    All are 0 where the label is `ignore_index`, but for the argmax, which is -1 there.

    A tuple of four: `logps, lse, entropy, kl = token_stats(...)`. Only where diagnostics were asked for do they follow,
    as items five to eight; as attributes, None where not asked for, they are always there. They are items, and not mere
    attributes of a tuple of four, because much that stands around a model's forward (torch's pytrees and with them its
    transforms, FSDP, accelerate's mixed precision) takes tuples apart and makes them anew of their items: attributes
    would be gone without a word.
    """

    __slots__ = ()
    # What torch and others know named tuples by.
    _fields: ClassVar[tuple[str, ...]] = ("logps", "lse", "entropy", "kl")
    _field_defaults: ClassVar[dict[str, Any]] = {}

    def __new__(
        cls, logps: Tensor, lse: Tensor, entropy: Tensor | None, kl: Tensor | None, *diagnostics: Tensor | None
    ) -> TokenStats:
        """`diagnostics`: none, or all of `DIAGNOSTICS` in their order."""
        return tuple.__new__(cls, (logps, lse, entropy, kl, *diagnostics))

    @classmethod
    def _make(cls, items: Iterable[Any]) -> TokenStats:
        return cls(*items)

    @property
    def logps(self) -> Tensor:
        """log softmax(x)[label]; under label smoothing e, (1 - e) of it plus e times the vocabulary's mean of log p."""
        return self[0]

    @property
    def lse(self) -> Tensor:
        """log sum_j exp x_j; differentiable, so a z-loss is `stats.lse.square()`."""
        return self[1]

    @property
    def entropy(self) -> Tensor | None:
        """-sum_j p_j log p_j, in nats."""
        return self[2]

    @property
    def kl(self) -> Tensor | None:
        """KL(p || q) = sum_j p_j (log p_j - log q_j) against the reference, over the whole vocabulary, in nats."""
        return self[3]

    @property
    def log_sum_sq_probs(self) -> Tensor | None:
        """log sum_j p_j^2; a constant, as are the next three."""
        return _item(self, 4)

    @property
    def mean_logits(self) -> Tensor | None:
        """Mean of x over the vocabulary."""
        return _item(self, 5)

    @property
    def is_top1(self) -> Tensor | None:
        """Boolean: the label is the most likely token (of equally likely ones the first); False where ignored."""
        return _item(self, 6)

    @property
    def argmax(self) -> Tensor | None:
        """int64: the most likely token, of equally likely ones the first; -1 where ignored, and where NaN, inf or
        nothing but -inf among the logits leaves no softmax."""
        return _item(self, 7)

    def with_diagnostics(self, found: Mapping[str, Tensor | None]) -> TokenStats:
        """With further statistics, by their names in `DIAGNOSTICS`; none: as they are."""
        return TokenStats(*self[:4], *[found.get(name) for name in DIAGNOSTICS]) if found else self

    def _asdict(self) -> dict[str, Tensor | None]:
        return dict(zip((*self._fields, *DIAGNOSTICS), self, strict=False))

    def _replace(self, **changed: Tensor | None) -> TokenStats:
        named = {**self._asdict(), **changed}
        if len(named) > len(self):
            raise ValueError(f"TokenStats has {', '.join(self._asdict())} here; got {', '.join(changed)}")
        return TokenStats(*named.values())  # type: ignore[arg-type]

    def __getnewargs__(self) -> tuple[Any, ...]:
        """Of what copies and pickles are made."""
        return tuple(self)

    def __repr__(self) -> str:
        return f"TokenStats({', '.join(f'{name}={value!r}' for name, value in self._asdict().items())})"


def _item(items: tuple[Any, ...], place: int) -> Any:
    return items[place] if len(items) > place else None


def smoothed(logps: Any, lse: Any, mean: Any, smoothing: float) -> Any:
    """(1 - e) log p[label] + e times the vocabulary's mean log-probability. A term of weight 0 is not formed: 0 * inf
    is NaN."""
    if smoothing == 0.0:
        return logps
    whole = mean - lse
    return whole if smoothing == 1.0 else (1 - smoothing) * logps + smoothing * whole
