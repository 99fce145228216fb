"""Tiles of logits: [rows x part of the vocabulary], formed by one GEMM, used by the kernels, and gone or kept.

A row's statistics merge over parts of its vocabulary exactly as over the shards of a tensor-parallel head, and its
gradient on a part needs nothing but the merged ones. So a tile may have any shape, and memory any bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _backends
from ..ops.call import TokenCall
from .products import add_product, product, quick

_NO_LABEL = -100  # rows of a tile are all valid; this value occurs nowhere among their labels

Grads = tuple[Tensor | None, ...]


def cut(t: Tensor, at: slice) -> Tensor:
    """t[at], and t itself where that is all of it: views are made in the time of a small kernel."""
    return t if at.start == 0 and at.stop == t.shape[0] else t[at]


@dataclass
class Projection:
    """Hidden states of the valid tokens and the head that turns them into logits: hidden @ weight.T + bias."""

    hidden: Tensor  # [M, H]
    weight: Tensor  # [V, H]; converted to the dtype of hidden tile by tile
    bias: Tensor | None  # [V]

    def part(self, columns: slice) -> Tensor:
        part = cut(self.weight, columns)
        return part if part.dtype == self.hidden.dtype else part.to(self.hidden.dtype)

    def logits(self, rows: slice, columns: slice, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """[rows, columns] in a dtype, into the flat buffer `out` if one is given."""
        hidden, weight = cut(self.hidden, rows), self.part(columns)
        shape = hidden.shape[0], weight.shape[0]
        out = _backends.empty(shape, hidden, dtype) if out is None else out[: shape[0] * shape[1]].view(shape)
        bias = None if self.bias is None else cut(self.bias, columns).to(dtype)
        if bias is not None and dtype == hidden.dtype and quick(dtype, hidden.device):
            return torch.addmm(bias, hidden, weight.t(), out=out)
        product(out, hidden, weight.t())
        return out if bias is None else out.add_(bias)


@dataclass
class RowStats:
    """Statistics of M rows: what `token_stats` returns, the vocabulary's mean logit, and what its backward needs."""

    logps: Tensor
    lse: Tensor
    entropy: Tensor | None
    kl: Tensor | None
    mean: Tensor | None
    saved: Tensor  # [M, 4]: see kernels/token_stats.h
    log_sum_sq: Tensor | None = None  # and the next: where diagnostics are asked for
    argmax: Tensor | None = None

    def rows(self, at: slice) -> RowStats:
        if at.start == 0 and at.stop == self.logps.shape[0]:
            return self
        entropy, kl, mean = (None if t is None else t[at] for t in (self.entropy, self.kl, self.mean))
        return RowStats(self.logps[at], self.lse[at], entropy, kl, mean, self.saved[at])


@dataclass
class Problem:
    policy: Projection
    reference: Projection | None  # of the exact KL; a constant
    labels: Tensor  # [M], all of them in [0, V)
    temperature: float
    softcap: float
    entropy: bool
    mean: bool
    dtype: torch.dtype
    """Of the logits."""
    diagnostics: bool = False

    @property
    def vocab(self) -> int:
        return self.policy.weight.shape[0]

    @property
    def projections(self) -> int:
        """How many logits a token has: the policy's, and the reference's for the KL."""
        return 1 if self.reference is None else 2

    def tiles(self, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
        """The grid of tiles, all rows of one part of the vocabulary after the other."""
        total = self.labels.shape[0]
        for c in range(0, self.vocab, columns):
            for r in range(0, total, rows):
                yield slice(r, min(r + rows, total)), slice(c, min(c + columns, self.vocab))

    def buffers(self, rows: int, columns: int) -> list[Tensor]:
        size = min(rows, self.labels.shape[0]) * min(columns, self.vocab)
        return [_backends.empty((size,), self.policy.hidden, self.dtype) for _ in range(self.projections)]

    def logits(self, rows: slice, columns: slice, buffers: list[Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
        first, second = (None, None) if buffers is None else (buffers[0], buffers[-1])
        reference = None if self.reference is None else self.reference.logits(rows, columns, self.dtype, second)
        return self.policy.logits(rows, columns, self.dtype, first), reference

    def local(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor | None]:
        """(label within the tile or 0, is it within) of each row; None: all of them are."""
        labels = cut(self.labels, rows)
        if columns.start == 0 and columns.stop == self.vocab:
            return labels, None
        inside = (labels >= columns.start) & (labels < columns.stop)
        return torch.where(inside, labels - columns.start, 0), inside

    def call(self, logits: Tensor, labels: Tensor, reference: Tensor | None) -> TokenCall:
        """The call of the kernels for a tile."""
        return TokenCall(logits, labels, reference, _NO_LABEL, self.temperature, self.softcap)

    def stats(self, rows: slice, columns: slice, logits: Tensor, reference: Tensor | None) -> RowStats:
        """Statistics of a tile as if its part of the vocabulary were all of it."""
        local, _ = self.local(rows, columns)
        call = self.call(logits, local, reference)
        return RowStats(*_backends.pick(logits).forward(call, self.entropy, self.mean, self.diagnostics))

    def gradient(
        self, rows: slice, columns: slice, logits: Tensor, reference: Tensor | None, stats: RowStats, grads: Grads
    ) -> Tensor:
        """Overwrites a tile's logits with their gradient. `stats` and `grads` are those of its rows."""
        local, inside = self.local(rows, columns)
        g_logps, g_lse, g_entropy, g_kl, g_mean = grads
        if g_logps is not None and inside is not None:
            # d logps/dx = onehot - p. Where the target is elsewhere, -p alone is left, which is -d lse/dx.
            outside = torch.where(inside, 0, g_logps)
            g_lse = -outside if g_lse is None else g_lse - outside
            g_logps = g_logps - outside
        if g_mean is not None:
            g_mean = g_mean * ((columns.stop - columns.start) / self.vocab)
        moved = (g_logps, g_lse, g_entropy, g_kl, g_mean)
        entropy, kl = None if g_entropy is None else stats.entropy, None if g_kl is None else stats.kl
        call = self.call(logits, local, reference)
        _backends.pick(logits).backward(call, stats.saved, entropy, kl, moved, logits)
        return logits


class _MergedDiagnostics:
    """Of parts of the vocabulary from left to right, whose sums of squares add, and whose largest logits compete."""

    def __init__(self) -> None:
        self._log_sq: Tensor | None = None  # log sum exp(2 x), float64
        self._largest = self._at = torch.empty(0)
        self._dtype = torch.float32

    def add(self, lse: Tensor, log_sum_sq: Tensor, argmax: Tensor, start: int, logits: Tensor) -> None:
        self._dtype = log_sum_sq.dtype
        log_sq = torch.where(lse == -torch.inf, lse, log_sum_sq + 2 * lse)
        here = logits.gather(-1, argmax.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        here = torch.where(argmax >= 0, here, -torch.inf)
        at = torch.where(argmax >= 0, argmax + start, -1)
        if self._log_sq is None:
            self._log_sq, self._largest, self._at = log_sq, here, at
            return
        self._log_sq = torch.logaddexp(self._log_sq, log_sq)
        self._at = torch.where(here > self._largest, at, self._at)
        self._largest = torch.maximum(self._largest, here)

    def merged(self, lse: Tensor) -> tuple[Tensor | None, Tensor]:
        """`lse`: of the whole rows, float64. A part that had no softmax leaves none to its row."""
        found = None if self._log_sq is None else (self._log_sq - 2 * lse).to(self._dtype)
        return found, torch.where(lse.isfinite(), self._at, -1)


class _Merger:
    """Collects the statistics of parts of the vocabulary. In float64: entropy and KL are differences of merged sums.

    Where the target's part is sure of it (see `token_stats.h`), it is merged with the logarithm of the others' sum, so
    that a probability near 1 loses nothing.
    """

    def __init__(self, problem: Problem):
        self._problem = problem
        self._parts: list[tuple[Tensor, ...]] = []
        self._diagnostics = _MergedDiagnostics()

    def add(self, rows: slice, columns: slice, part: RowStats, logits: Tensor) -> None:
        m, r, ref_m, ref_r = part.saved.double().unbind(-1)
        lse, ref_lse = m / self._problem.temperature + r, ref_m / self._problem.temperature + ref_r
        inside = self._problem.local(rows, columns)[1]
        zero = torch.zeros_like(lse)
        # A part of nothing but -inf has no softmax: its target is -inf too.
        target = torch.where(lse == -torch.inf, lse, part.logps + lse)
        sure = part.logps == -part.saved[..., 1]
        if inside is not None:
            target, sure = torch.where(inside, target, 0), sure & inside
        others = torch.where(sure, lse + torch.log(-torch.expm1(part.logps.double())), lse)
        label = torch.where(sure, m, 0)
        # E[x] and E[x - z] under the part's own softmax
        mean_x = zero if part.entropy is None else lse - part.entropy
        mean_gap = zero if part.kl is None else part.kl + lse - ref_lse
        if part.kl is not None:
            # The part has no reference, of which the whole has one: infinite, if the part weighs anything.
            mean_gap = torch.where(ref_lse == -torch.inf, torch.inf, mean_gap)
        total = zero if part.mean is None else part.mean * float(columns.stop - columns.start)
        self._parts.append((lse, ref_lse, target, others, sure, label, mean_x, mean_gap, total))
        if part.log_sum_sq is not None and part.argmax is not None:
            self._diagnostics.add(lse, part.log_sum_sq, part.argmax, columns.start, logits)

    def merged(self, dtype: torch.dtype) -> RowStats:
        problem = self._problem
        all_lse, all_ref, target, others, sure, label, mean_x, mean_gap, total = map(
            torch.stack, zip(*self._parts, strict=True)
        )
        lse, ref_lse, target = all_lse.logsumexp(0), all_ref.logsumexp(0), target.sum(0)
        odds = others.logsumexp(0) - target  # against the target, in logarithms
        sure = sure.any(0) & (odds < 0)
        rest = torch.log1p(torch.exp(odds))
        logps = torch.where(sure, 0 - rest, target - lse)
        weight = torch.exp(all_lse - lse)

        def weighted(x: Tensor) -> Tensor:
            return torch.where(weight == 0, 0, weight * x).sum(0)

        entropy = lse - weighted(mean_x) if problem.entropy else None
        has_kl = problem.reference is not None
        kl = weighted(mean_gap) - lse + ref_lse if has_kl else None
        mean = total.sum(0) / problem.vocab if problem.mean else None

        def split(x: Tensor) -> tuple[Tensor, Tensor]:
            high = (x * problem.temperature).to(dtype)
            return high, torch.where(high == -torch.inf, 0, x - high.double() / problem.temperature).to(dtype)

        m, r = split(lse)
        m, r = torch.where(sure, label.sum(0).to(dtype), m), torch.where(sure, rest.to(dtype), r)
        none = torch.zeros_like(m)
        saved = torch.stack([m, r, *(split(ref_lse) if has_kl else (none, none))], -1)
        entropy, kl, mean = (None if t is None else t.to(dtype) for t in (entropy, kl, mean))
        more = self._diagnostics.merged(lse) if problem.diagnostics else (None, None)
        return RowStats(logps.to(dtype), lse.to(dtype), entropy, kl, mean, saved, *more)


def forward(problem: Problem, rows: int, columns: int, buffers: list[Tensor]) -> RowStats:
    """Statistics of all rows, tile by tile, in the given buffers."""
    total = problem.labels.shape[0]
    dtype = torch.float64 if problem.policy.hidden.dtype == torch.float64 else torch.float32
    blocks: list[RowStats] = []
    for start in range(0, max(total, 1), rows):
        at = slice(start, min(start + rows, total))
        merger = _Merger(problem)
        for c in range(0, problem.vocab, columns):
            part = slice(c, min(c + columns, problem.vocab))
            logits, reference = problem.logits(at, part, buffers)
            stats = problem.stats(at, part, logits, reference)
            if columns >= problem.vocab:
                break
            merger.add(at, part, stats, logits)
        else:
            stats = merger.merged(dtype)
        blocks.append(stats)
    return joined(blocks)


def joined(blocks: list[RowStats]) -> RowStats:
    if len(blocks) == 1:
        return blocks[0]

    def optional(parts: list[Tensor | None]) -> Tensor | None:
        return torch.cat([t for t in parts if t is not None]) if parts and parts[0] is not None else None

    return RowStats(
        torch.cat([b.logps for b in blocks]),
        torch.cat([b.lse for b in blocks]),
        optional([b.entropy for b in blocks]),
        optional([b.kl for b in blocks]),
        optional([b.mean for b in blocks]),
        torch.cat([b.saved for b in blocks]),
        optional([b.log_sum_sq for b in blocks]),
        optional([b.argmax for b in blocks]),
    )


class HeadGradient:
    """Sums of the gradients of hidden, weight and bias over tiles, each rounded to its own dtype once."""

    def __init__(self, problem: Problem, rows: int, columns: int, needs: tuple[bool, bool, bool]):
        policy = problem.policy
        self._policy, self._rows = policy, problem.labels.shape[0]
        need_hidden, need_weight, need_bias = needs
        self._one_part, self._one_block = columns >= problem.vocab, rows >= self._rows
        wide = torch.float64 if policy.hidden.dtype == torch.float64 else torch.float32
        hidden_dtype = policy.hidden.dtype if self._one_part else wide
        self.hidden = torch.empty_like(policy.hidden, dtype=hidden_dtype) if need_hidden else None
        self.weight = _backends.empty(policy.weight.shape, policy.weight) if need_weight else None
        if self.weight is not None and not self._rows:
            self.weight.zero_()  # nothing but ignored tokens: no tile will ever write it
        self.bias = None
        if need_bias and policy.bias is not None:
            self.bias = torch.zeros_like(policy.bias, dtype=wide)
        self._block: Tensor | None = None  # of the weight's gradient, not rounded yet, while its rows come in blocks

    def add(self, rows: slice, columns: slice, dlogits: Tensor) -> None:
        if self.hidden is not None:
            self._add_hidden(cut(self.hidden, rows), columns, dlogits)
        if self.weight is not None:
            self._add_weight(cut(self.weight, columns), rows, dlogits)
        if self.bias is not None:
            self.bias[columns] += dlogits.sum(0, dtype=self.bias.dtype)

    def _add_hidden(self, to: Tensor, columns: slice, dlogits: Tensor) -> None:
        part = self._policy.part(columns)
        if self._one_part:
            product(to, dlogits, part)
        else:
            add_product(to, dlogits, part, columns.start == 0)

    def _add_weight(self, to: Tensor, rows: slice, dlogits: Tensor) -> None:
        hidden = cut(self._policy.hidden, rows)
        if self._one_block:
            product(to, dlogits.t(), hidden)
            return
        if rows.start == 0:
            wide = torch.promote_types(dlogits.dtype, torch.float32)
            self._block = to if to.dtype == wide else _backends.empty(to.shape, to, wide)
        if self._block is not None:
            add_product(self._block, dlogits.t(), hidden, rows.start == 0)
        if rows.stop == self._rows:
            if self._block is not None and self._block is not to:
                to.copy_(self._block)
            self._block = None

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        hidden = None if self.hidden is None else self.hidden.to(self._policy.hidden.dtype)
        bias = None if self.bias is None or self._policy.bias is None else self.bias.to(self._policy.bias.dtype)
        return hidden, self.weight, bias
