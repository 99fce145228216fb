"""Losses of the user's own: a formula of a token or of a pair, as fast as ours, from logits, heads and models.

    loss = TokenLoss(lambda t: -t.advantages * torch.exp(t.logps - t.old_logps).clamp(max=2))
    out = loss(logits, labels, advantages=advantages, old_logps=old_logps)
    out.loss.backward()

The formula is ordinary torch on what it is given. Where it can be traced (`fastalign.ops.programs` says what it may
use; comparisons with `torch.where`, no Python branches on values) it runs inside the compiled call that reads the
logits, with its derivatives; anything else runs as the torch operations that it is. `explain()` tells which, and why.
It is traced once: numbers that it takes from around it stay what they were; give what changes as an argument.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..head.head import Head
from ..ops.fused_loss import BATCH, GROUP, SEQUENCE, TOKEN, FusedLoss, Grouping, Input, Values
from ..ops.programs import STATISTICS, NotTraced, trace
from ..ops.sequences import sum_tokens
from .base import Logits, LogitsLoss, check_logits, lookup, masked_mean, mean_of
from .chunks import Piece, by_parts, flat_head, known_objective
from .reductions import NORMALIZATIONS, Count, check_normalization, normalize_real

Formula = Callable[[Any], Any]


class CustomOutput(NamedTuple):
    """Result of a loss of the user's own."""

    loss: Tensor
    """Scalar."""
    metrics: dict[str, Tensor]
    """Name → mean over real tokens (scalar), or of a `PairLoss` one number for each pair, [B]; detached."""


class _Custom(LogitsLoss):
    """What both have in common."""

    def __init__(
        self,
        formula: Formula,
        metrics: Mapping[str, Formula] | None,
        ignore_index: int,
        temperature: float,
        softcap: float | None,
        inplace_backward: bool,
    ) -> None:
        super().__init__(ignore_index, temperature, softcap, inplace_backward)
        for name, function in {"formula": formula, **(metrics or {})}.items():
            if not callable(function):
                raise TypeError(f"{name} must be a function of what is given; got {type(function).__name__}")
        self.formula, self.metrics = formula, dict(metrics or {})
        self.fused: FusedLoss | None = None

    def explain(self) -> str:
        """How the calls so far were run: as a program, or as torch operations and why."""
        return "not called yet" if self.fused is None else self.fused.explain()

    def _mechanism(self, inputs: list[Input]) -> FusedLoss:
        """Made at the first call, which tells what the formula looks at."""
        if self.fused is None:
            levels = {x.name: x.level for x in inputs if x.value is not None}
            try:
                statistics = trace(self._formula, levels)[0].statistics
            except NotTraced:
                statistics = ("logps",)
            self.fused = FusedLoss(self._formula, statistics)
        return self.fused

    @abstractmethod
    def _formula(self, t: Any) -> tuple[Any, ...]:
        """The loss, and the metrics in their order, of what is given."""

    def _run(self, logits: Logits, labels: Tensor, inputs: list[Input], grouping: Grouping) -> list[Any]:
        """(loss, *metrics)."""
        fused = self._mechanism(inputs)
        if isinstance(logits, Tensor):
            found = fused.of_logits(self.call(logits, labels), inputs, grouping, self.inplace_backward)
            if found is not None:
                return found
        stats = self.stats(logits, labels, entropy="entropy" in fused.statistics)
        found = fused.of_statistics(stats, labels, inputs, grouping, self.ignore_index)
        if found is not None:
            return found
        there = {name: getattr(stats, name, None) for name in STATISTICS}
        return list(self._formula(Values(labels.long() != self.ignore_index, there, inputs)))

    def _levels(self, labels: Tensor, given: Mapping[str, Any], groups: int | None) -> list[Input]:
        """What the caller gave, by the level that its shape means; in the order of names, so that calls are alike."""
        shapes = {tuple(labels.shape): TOKEN, tuple(labels.shape[:-1]): SEQUENCE, (): BATCH}
        if groups is not None:
            shapes = {(groups,): GROUP, **shapes}
        inputs = []
        for name in sorted(given):
            value = given[name]
            if isinstance(value, Tensor):
                if tuple(value.shape) not in shapes:
                    known = ", ".join(str(list(shape)) for shape in shapes)
                    raise ValueError(f"{name} must have one of the shapes {known}; got {list(value.shape)}")
                value = value.float() if value.dtype not in (torch.float32, torch.float64) else value
                inputs.append(Input(name, value, shapes[tuple(value.shape)]))
            elif value is None or isinstance(value, (int, float)):
                inputs.append(Input(name, value, BATCH))
            else:
                raise TypeError(f"{name} must be a tensor or a number; got {type(value).__name__}")
        return inputs


class TokenLoss(_Custom):
    """A loss of tokens by a formula of the user's own.

    Args:
        formula: from `t` to the loss of each token. `t` has `logps`, `lse`, `entropy` ([..., T]: see `token_stats`),
            `mask`, and every argument of the call by its name. At hidden tokens it may give anything.
        metrics: name → such a formula; reported as means over real tokens, detached.
        normalization: how tokens' losses become one number, as in `policy_loss`.
        max_length: of "dr_grpo".
        ignore_index, temperature, softcap, inplace_backward: as in `fastalign.token_stats`.

    Raises:
        TypeError: a formula that is not a function.
        ValueError: an unknown normalization.
    """

    def __init__(
        self,
        formula: Formula,
        *,
        metrics: Mapping[str, Formula] | None = None,
        normalization: str = "token",
        max_length: int | None = None,
        ignore_index: int = -100,
        temperature: float = 1.0,
        softcap: float | None = None,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(formula, metrics, ignore_index, temperature, softcap, inplace_backward)
        lookup("normalization", NORMALIZATIONS, normalization)
        self.normalization, self.max_length = normalization, max_length

    def _formula(self, t: Any) -> tuple[Any, ...]:
        loss = normalize_real(self.formula(t), t.mask, self.normalization, t.num_items, self.max_length)
        return loss, *(masked_mean(metric(t).detach(), t.mask) for metric in self.metrics.values())

    def forward(
        self, logits: Logits, labels: Tensor, *, num_items: Count | None = None, **given: Tensor | float | None
    ) -> CustomOutput:
        """The loss of a batch.

        Args:
            logits: [..., T, V], or a `fastalign.Head` or tuple (hidden, weight) in their place.
            labels: [..., T], int64 or int32: `labels[i, t]` is the target of `logits[i, t]`.
            num_items: as in `policy_loss`.
            given: what the formula asks for by name: [..., T], [...] (one for each sequence) or a number. Constants.

        Raises:
            TypeError, ValueError: as `token_stats`; something given that is of none of these shapes.
        """
        check_logits("logits", logits)
        check_normalization(labels, self.normalization, num_items, self.max_length)
        head = known_objective(logits, labels, self.ignore_index)
        if head is not None and labels.dim():
            return self._by_parts(head, labels, num_items, given)
        inputs = [*self._levels(labels, given, None), Input("num_items", num_items, BATCH)]
        grouping = Grouping(labels.numel() // max(labels.shape[-1], 1))
        loss, *metrics = self._run(logits, labels, inputs, grouping)
        return CustomOutput(loss, dict(zip(self.metrics, metrics, strict=True)))

    def _by_parts(self, head: Head, labels: Tensor, num_items: Count | None, given: Mapping[str, Any]) -> CustomOutput:
        """Some sequences after the other: see `chunks`."""
        rows_of = {name: isinstance(x, Tensor) and x.dim() > 0 for name, x in given.items()}
        leading = labels.dim() - 1
        flat = {name: x.reshape(-1, *x.shape[leading:]) if rows_of[name] else x for name, x in given.items()}
        labels = labels.reshape(-1, labels.shape[-1])  # [T] is one sequence
        mask = labels.long() != self.ignore_index
        by_sequence = self.normalization in ("grpo", "dr_grpo")
        total = num_items if num_items is not None else (mask.any(-1) if by_sequence else mask).sum()
        tokens = mask.sum().clamp(min=1)

        def run(piece: Piece, which: Tensor, rows: Tensor) -> tuple[list[Tensor], Tensor]:
            some = {name: x[rows] if rows_of[name] else x for name, x in flat.items()}
            out = self(piece, labels[rows], num_items=total, **some)
            share = (mask[rows].sum().double() / tokens).to(out.loss.dtype)
            return [x * share for x in out.metrics.values()], out.loss

        numbers = torch.arange(len(labels), device=labels.device).unsqueeze(-1)
        loss, parts = by_parts(flat_head(head), labels, self.ignore_index, numbers, run)
        return CustomOutput(
            loss, {name: sum(x) for name, x in zip(self.metrics, zip(*parts, strict=True), strict=False)}
        )


class PairLoss(_Custom):
    """A loss of pairs of responses by a formula of the user's own, averaged over the pairs.

    Args:
        formula: from `p` to the loss of each pair. `p` has `chosen_logps`, `rejected_logps` ([B], summed
            log-probabilities), `chosen_lengths`, `rejected_lengths` ([B], tokens), and every argument of the call by
            its name: the reference's sums, margins, ...
        metrics: name → such a formula; reported for each pair, detached.
        ignore_index, temperature, softcap, inplace_backward: as in `fastalign.token_stats`.

    Raises:
        TypeError: a formula that is not a function.
    """

    def __init__(
        self,
        formula: Formula,
        *,
        metrics: Mapping[str, Formula] | None = None,
        ignore_index: int = -100,
        temperature: float = 1.0,
        softcap: float | None = None,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(formula, metrics, ignore_index, temperature, softcap, inplace_backward)

    def _formula(self, t: Any) -> tuple[Any, ...]:
        pairs = _Pairs(t)
        loss = mean_of(self.formula(pairs))
        return loss, *(metric(pairs).detach() for metric in self.metrics.values())

    def forward(self, logits: Logits, labels: Tensor, **given: Tensor | float | None) -> CustomOutput:
        """The loss of B pairs given as 2B rows.

        Args:
            logits: [2B, T, V]: the B chosen rows, then the B rejected rows in the same order; or a `fastalign.Head` or
                tuple (hidden, weight) in their place.
            labels: [2B, T], int64 or int32: `labels[i, t]` is the target of `logits[i, t]`.
            given: what the formula asks for by name: [B] or a number. Constants.

        Raises:
            TypeError, ValueError: as `token_stats`; an odd number of rows; something given that is of another shape.
        """
        shape = check_logits("logits", logits).shape
        if len(shape) != 3 or shape[0] % 2:
            raise ValueError(f"logits must be [2B, T, V], the chosen rows, then the rejected rows; got {list(shape)}")
        pairs = shape[0] // 2
        inputs = self._levels(labels, given, pairs)
        head = known_objective(logits, labels, self.ignore_index)
        if head is not None:
            return self._by_parts(head, labels, inputs, pairs)
        loss, *metrics = self._run(logits, labels, inputs, Grouping(2 * pairs))
        return CustomOutput(loss, dict(zip(self.metrics, metrics, strict=True)))

    def _by_parts(self, head: Head, labels: Tensor, inputs: list[Input], count: int) -> CustomOutput:
        """Some pairs after the other: see `chunks`."""

        def run(piece: Piece, pairs: Tensor, rows: Tensor) -> tuple[list[Tensor], Tensor]:
            some = {x.name: x.value[pairs] if x.level == GROUP else x.value for x in inputs}
            out = self(piece, labels[rows], **some)
            return list(out.metrics.values()), out.loss * (len(pairs) / count)

        numbers = torch.arange(2 * count, device=labels.device).view(2, count).t()
        loss, parts = by_parts(head, labels, self.ignore_index, numbers, run, by_place=True)
        found = zip(self.metrics, zip(*parts, strict=True), strict=False)
        return CustomOutput(loss, {name: torch.cat(x) for name, x in found})


class _Pairs:
    """Both sides of every pair, and what the call was given."""

    def __init__(self, t: Any) -> None:
        self._t = t
        self.chosen_logps, self.rejected_logps = sum_tokens(t.logps).chunk(2)

    @property
    def chosen_lengths(self) -> Any:
        return self._t.mask.sum(-1).chunk(2)[0]

    @property
    def rejected_lengths(self) -> Any:
        return self._t.mask.sum(-1).chunk(2)[1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._t, name)
