"""Two models' logits side by side, some rows after the other: the divergence of each row and the student's gradient.

The logits of a head are formed for one tile of rows, used, and overwritten by those of the next: two products forward,
the student's and the teacher's, and two for the student's gradients, as all that is known of the loss before is what
each row counts for. Of a tensor the rows are read where they lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _backends
from .._backends import DivergenceCall, Mixture, Side, divergence_terms
from ..head.tiles import HeadGradient, Problem, Projection
from ..ops.call import TokenCall, unit_stride
from ..ops.sequences import wide_dtype

_TILE_BYTES = 64 << 20  # of each model's tile, where the caller sets no budget
# Of the bucket's probability: what float32 can tell from 1. At 0 a reverse KL would be infinite.
_LEAST = 2.0**-23


class TopK(NamedTuple):
    """A teacher's likeliest tokens, as they are kept on disk: in place of its logits in a loss.

    What of its probability is not on these tokens is one bucket, compared with what the student has left beside them.
    """

    ids: Tensor
    """[..., K], int64 or int32: the K tokens, each once."""
    logps: Tensor
    """[..., K], floating point: their log-probabilities, at the temperature of the loss."""


@dataclass
class Rows:
    """N rows of one model's logits [N, V]."""

    source: Tensor | Projection
    places: Tensor | None
    """[N], which of a tensor's rows (counted over all dimensions but the last); None: all of them."""
    scale: Tensor
    """[N], the model's own factor over the temperature."""
    softcap: float
    dtype: torch.dtype
    """Of the tiles."""
    buffer: Tensor | None = None

    def tile(self, at: slice) -> Tensor:
        """[rows, V], dense in the vocabulary; a tensor's own memory where it can be."""
        if isinstance(self.source, Projection):
            count, vocab = at.stop - at.start, self.source.weight.shape[0]
            if self.buffer is None:
                self.buffer = _backends.empty((count * vocab,), self.source.hidden, self.dtype)
            return self.source.logits(at, slice(0, vocab), self.dtype, self.buffer)
        flat = viewed(self.source)
        if flat is not None and self.places is None:
            return unit_stride(flat[at]).to(self.dtype)
        places = torch.arange(at.start, at.stop, device=self.source.device) if self.places is None else self.places[at]
        if flat is not None:
            return flat.index_select(0, places).to(self.dtype)
        return self.source[torch.unravel_index(places, self.source.shape[:-1])].contiguous().to(self.dtype)

    def side(self, at: slice, tile: Tensor) -> Side:
        return Side(tile, self.scale[at], self.softcap)


def viewed(t: Tensor) -> Tensor | None:
    """[N, V] in the memory of [..., V]; None where its rows do not lie evenly."""
    try:
        return t.view(-1, t.shape[-1])
    except RuntimeError:
        return None


class Known(NamedTuple):
    """What is known of the N rows before their logits are."""

    labels: Tensor
    """[N], int64; -1: the row does not count."""
    mixture: Mixture
    g_divergence: Tensor
    """[N], what each row's divergence counts for in the loss."""
    g_logps: Tensor | None
    """[N], what its label's log-probability counts for; None: nothing."""


# ------------------------------------------------------------------------------------------------------------ gradients
class OfTensor:
    """The gradient of logits that are a tensor: of its shape, or in its own memory."""

    def __init__(self, logits: Tensor, inplace: bool) -> None:
        flat = viewed(logits) if inplace and logits.stride(-1) == 1 else None
        self._whole = _backends.empty(tuple(logits.shape), logits) if flat is None else logits
        self._rows = self._whole.view(-1, logits.shape[-1]) if flat is None else flat

    def room(self, at: slice, tile: Tensor) -> Tensor:
        """Where the tile's gradient goes."""
        rows = self._rows[at]
        return rows if rows.dtype == tile.dtype else tile

    def add(self, at: slice, gradient: Tensor) -> None:
        if gradient.dtype != self._rows.dtype:
            self._rows[at] = gradient

    def results(self) -> tuple[Tensor]:
        return (self._whole,)


class OfHead:
    """The gradients of hidden states, weight and bias, summed over the tiles."""

    def __init__(self, problem: Problem, rows: int, needs: tuple[bool, bool, bool]) -> None:
        self._vocab = slice(0, problem.vocab)
        self._total = HeadGradient(problem, rows, problem.vocab, needs)

    def room(self, at: slice, tile: Tensor) -> Tensor:
        """Over the logits, which are nobody else's."""
        return tile

    def add(self, at: slice, gradient: Tensor) -> None:
        self._total.add(at, self._vocab, gradient)

    def results(self) -> tuple[Tensor | None, ...]:
        return self._total.results()


def tile_rows(count: int, vocab: int, dtype: torch.dtype, models: int, chunk_bytes: int | None) -> int:
    """Rows of a tile: as many as a budget of the caller's has for all models' logits, or 64 MiB for each."""
    budget = _TILE_BYTES if chunk_bytes is None else chunk_bytes // models
    return max(1, min(count, budget // (vocab * dtype.itemsize)))


# ------------------------------------------------------------------------------------------------------------- the walk
def compare(
    student: Rows, teacher: Rows | TopK, known: Known, rows: int, gradient: OfTensor | OfHead | None
) -> tuple[Tensor, Tensor]:
    """(divergence, log-probability of the label) of every row, [N], `rows` of them at once; their gradient, as `known`
    weighs it, goes into `gradient` if there is one."""
    count = known.labels.shape[0]
    parts: list[tuple[Tensor, Tensor]] = []
    for start in range(0, count, rows):
        at = slice(start, min(start + rows, count))
        own = student.tile(at)
        room = None if gradient is None else gradient.room(at, own)
        grads = known.g_divergence[at], None if known.g_logps is None else known.g_logps[at]
        if isinstance(teacher, TopK):
            found = _compare_few(student, own, teacher, known, at, grads, room)
        else:
            call = DivergenceCall(
                student.side(at, own), teacher.side(at, teacher.tile(at)), known.labels[at], known.mixture
            )
            found = _backends.pick(own, "divergence").divergence(call, *grads, room)
        parts.append(found)
        if gradient is not None and room is not None:
            gradient.add(at, room)
    empty = known.g_divergence.new_zeros(0)
    return tuple(torch.cat(column) for column in zip(*parts, strict=True)) if parts else (empty, empty)  # type: ignore[return-value]


def _compare_few(
    student: Rows,
    own: Tensor,
    teacher: TopK,
    known: Known,
    at: slice,
    grads: tuple[Tensor, Tensor | None],
    room: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same with a teacher's few tokens and the bucket of all others.

    The student's share in that bucket is a logsumexp over what is left when its logits of the few are taken out:
    nothing is lost where it is small. With it the kernels of the statistics give the gradient of all others at once.
    """
    labels = known.labels[at]
    valid = labels.ge(0).unsqueeze(-1)
    ids, logq = teacher.ids[at].long(), teacher.logps[at]
    ids = torch.where(valid, ids, torch.arange(ids.shape[-1], device=ids.device))
    x = own.clone() if room is None else room if room is own else room.copy_(own)  # that may be overwritten
    x, slope = _prepared(student, x, at, valid)
    label = labels.clamp(min=0).unsqueeze(-1)
    wide = wide_dtype(x)  # of the buckets, which are few
    logq = logq.to(wide)
    few, target = x.gather(-1, ids).to(wide), x.gather(-1, label).to(wide)
    x.scatter_(-1, ids, -torch.inf)
    call = TokenCall(x, label.squeeze(-1), None, -100, 1.0, 0.0)
    backend = _backends.pick(x)
    *_, saved = backend.forward(call, False, False)
    rest = saved[:, :2].to(wide).sum(-1, keepdim=True)  # its lse, which float32 would round
    logp = torch.cat([few, rest], -1)
    lse = logp.logsumexp(-1, keepdim=True)
    logp = logp - lse
    left = torch.full_like(lse, -torch.inf)
    if ids.shape[-1] < x.shape[-1]:
        left = torch.log1p(-logq.exp().sum(-1, keepdim=True).clamp(max=1 - _LEAST))
    value, tilted = divergence_terms(logp, torch.cat([logq, left], -1), known.mixture)

    def masked(t: Tensor) -> Tensor:
        return torch.where(valid, t, 0).squeeze(-1)

    of_rows = grads[0].dtype
    result = masked(value.sum(-1, keepdim=True)).to(of_rows), masked(target - lse).to(of_rows)
    if room is None:
        return result
    d = torch.where(valid, grads[0].unsqueeze(-1), 0)
    n = torch.zeros_like(d) if grads[1] is None else torch.where(valid, grads[1].unsqueeze(-1), 0)
    p = logp.exp()
    dx = d * (tilted - p * tilted.sum(-1, keepdim=True)) - n * p
    backend.backward(call, saved, None, None, (None, dx[:, -1].to(saved.dtype).contiguous(), None, None, None), x)
    x.scatter_(-1, ids, dx[:, :-1].to(x.dtype))
    x.scatter_add_(-1, label, n.to(x.dtype))
    factor: Any = student.scale[at].unsqueeze(-1).to(x.dtype)
    x.mul_(factor if slope is None else slope.mul_(factor))
    x.masked_fill_(~valid, 0)
    if x is not room:
        room.copy_(x)
    return result


def _prepared(student: Rows, x: Tensor, at: slice, valid: Tensor) -> tuple[Tensor, Tensor | None]:
    """(soft-capped and tempered logits, in place where they can be; the derivative of the soft-capping)."""
    slope = None
    x.masked_fill_(~valid, 0)
    if student.softcap:
        x.div_(student.softcap).tanh_()
        slope = 1 - x * x
        x.mul_(student.softcap)
    scale = student.scale[at]
    return x.mul_(scale.unsqueeze(-1).to(x.dtype)), slope
