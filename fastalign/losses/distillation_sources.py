"""From what a distillation is given, logits or heads or a teacher's likeliest tokens, to the rows that are compared."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _backends
from ..head.head import Head, as_head
from ..head.inputs import HeadCall, ValidTokens, plain_head, valid_problem
from ..ops.call import as_softcap, check_call, check_positive, token_call
from .base import Logits, check_float, check_logits
from .distillation_rows import OfHead, OfTensor, Rows, TopK

Teacher = Logits | TopK
_ALL = -100  # no label of a batch of which every token counts


class Options(NamedTuple):
    """What both models' logits are told."""

    ignore_index: int
    temperature: float | Tensor
    """A number, or one for each label."""
    softcap: float | None


class Student(NamedTuple):
    """The student's rows, and the way back to the labels' shape and to the gradients."""

    rows: Rows
    labels: Tensor
    """[N], int64; -1: the row is not read."""
    places: Tensor | None
    """[N], places of the rows among all labels; None: all of them."""
    leaves: tuple[Tensor | None, ...]
    """What gradients are for: logits; or hidden states, weight and bias."""
    valid: ValidTokens | None
    """Of a head."""
    chunk_bytes: int | None

    def of_rows(self, t: Tensor, more: int = 0) -> Tensor:
        """[N, ...] from [labels' shape, ...], which has `more` dimensions more than the labels."""
        flat = t.reshape(-1, *t.shape[t.dim() - more :])
        return (flat if self.places is None else flat.index_select(0, self.places)).contiguous()

    def place(self, t: Tensor, shape: torch.Size) -> Tensor:
        """Of the labels' shape from one number for each row; 0 at the others."""
        if self.places is None:
            return t.view(shape)
        return t.new_zeros(shape.numel()).index_copy(0, self.places, t).view(shape)

    def gradient(self, rows: int, inplace: bool) -> OfTensor | OfHead | None:
        """Where the gradients are summed, if any is wanted, `rows` rows at once."""
        needs = [t is not None and t.requires_grad for t in self.leaves]
        if not torch.is_grad_enabled() or not any(needs):
            return None
        if self.valid is not None:
            return OfHead(self.valid.problem, rows, (needs[0], needs[1], needs[2]))
        logits: Any = self.leaves[0]
        return OfTensor(logits.detach(), inplace)


def formed(logits: Any) -> Any:
    """A tensor or a `Head`: of a model's logits that are formed whole, the tensor."""
    found = check_logits("logits", logits)
    return found.formed() if hasattr(found, "formed") else found


def student_of(logits: Tensor | Head, labels: Tensor, options: Options) -> Student:
    """The student's rows: of a head without the ignored tokens, which are dropped before the first product."""
    if isinstance(logits, Tensor):
        check_call(token_call(logits, labels, None, options.ignore_index, 1.0, options.softcap))
        _backends.check_labels(labels, options.ignore_index, logits.shape[-1])
        flat = torch.where(labels.long() == options.ignore_index, -1, labels.long()).reshape(-1)
        rows = _rows_of_tensor(logits, None, labels, options)
        return Student(rows, flat, None, (logits,), None, None)
    valid, leaves = _valid(logits, labels, options)
    rows = _rows_of_head(valid, labels, options)
    found = valid.problem.labels.long()
    return Student(rows, found, valid.places, (valid.tokens, *leaves[1:]), valid, logits.chunk_bytes)


def teacher_of(teacher: Teacher, labels: Tensor, student: Student, vocab: int, options: Options) -> Rows | TopK:
    """The teacher's rows, a constant, in the order of the student's.

    Raises:
        TypeError: none of logits, a head, a tuple (hidden, weight[, bias]) and `TopK`.
        ValueError: another vocabulary than the student's, shapes that differ, logits that require a gradient.
    """
    if isinstance(teacher, TopK):
        return _few(teacher, labels, student, vocab, options)
    if not isinstance(teacher, (Tensor, tuple)):
        source: Any = check_logits("teacher", teacher)
        teacher = source.head() if source.fused else source.logits()
    if isinstance(teacher, Tensor):
        check_float("teacher", teacher, (*labels.shape, vocab), "the student's logits")
        if teacher.requires_grad:
            raise ValueError("teacher must not require a gradient (it is a constant); pass teacher.detach()")
        return _rows_of_tensor(teacher, student.places, labels, options)
    head = as_head("teacher", teacher)
    if head.shape != (*labels.shape, vocab):
        raise ValueError(
            f"teacher must have the vocabulary and the tokens of the student, {[*labels.shape, vocab]}; "
            f"got {list(head.shape)}"
        )
    with torch.no_grad():
        if student.valid is None:  # its rows are all there
            labels, options = torch.zeros_like(labels), options._replace(ignore_index=_ALL)
        return _rows_of_head(_valid(head, labels, options)[0], labels, options)


def _valid(head: Head, labels: Tensor, options: Options) -> tuple[ValidTokens, tuple[Tensor, Tensor, Tensor | None]]:
    if head.plan not in (None, "objective"):
        raise ValueError(f"plan must be None or 'objective' in a distillation, which has no other; got {head.plan!r}")
    plain = plain_head(head.hidden, head.weight, head.bias)
    own = head.of_its_own({"ignore_index": options.ignore_index, "softcap": options.softcap})
    return valid_problem(HeadCall.of(*plain, labels, None, head.rows, **own)), plain


def _rows_of_head(valid: ValidTokens, labels: Tensor, options: Options) -> Rows:
    problem = valid.problem
    scale = _scale(1 / problem.temperature, valid.places, labels, options)
    return Rows(problem.policy, None, scale, problem.softcap, problem.dtype)


def _rows_of_tensor(logits: Tensor, index: Tensor | None, labels: Tensor, options: Options) -> Rows:
    scale = _scale(1.0, index, labels, options)
    return Rows(logits.detach(), index, scale, as_softcap(options.softcap), logits.dtype)


def _scale(own: float, index: Tensor | None, labels: Tensor, options: Options) -> Tensor:
    """[N], a model's own factor over the temperature, in float64 where there is such."""
    wide = torch.float32 if labels.device.type == "mps" else torch.float64
    if not isinstance(options.temperature, Tensor):
        count = labels.numel() if index is None else len(index)
        return torch.full((count,), own / options.temperature, dtype=wide, device=labels.device)
    found = options.temperature.detach().to(wide).reshape(-1)
    return own / (found if index is None else found.index_select(0, index))


def check_temperature(temperature: float | Tensor, labels: Tensor, ignore_index: int) -> float | Tensor:
    """A number, or one for each label from one for each label or sequence; where it does not count it is 1."""
    if not isinstance(temperature, Tensor):
        check_positive("temperature", temperature)
        return temperature
    check_float("temperature", temperature)
    if temperature.shape not in (labels.shape, labels.shape[:-1]):
        raise ValueError(
            f"temperature must be a number, or have the shape of labels, {list(labels.shape)}, or of sequences, "
            f"{list(labels.shape[:-1])}; got {list(temperature.shape)}"
        )
    each = temperature if temperature.shape == labels.shape else temperature.unsqueeze(-1).expand(labels.shape)
    each = torch.where(labels.long() == ignore_index, 1.0, each)
    if each.device.type == "cpu" and not bool(((each > 0) & each.isfinite()).all()):
        raise ValueError(f"temperature must be finite and above 0 at every token; got {float(each.min())}")
    return each


def _few(teacher: TopK, labels: Tensor, student: Student, vocab: int, options: Options) -> TopK:
    """The rows of a teacher's likeliest tokens."""
    ids, logps = teacher
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"teacher's ids must be int64 or int32; got {getattr(ids, 'dtype', type(ids).__name__)}")
    check_float("teacher's logps", logps, ids.shape, "its ids")
    if ids.shape[:-1] != labels.shape or not 1 <= ids.shape[-1] <= vocab:
        raise ValueError(f"teacher's ids must be {[*labels.shape, 'K']} with K in [1, {vocab}]; got {list(ids.shape)}")
    real = labels.long() != options.ignore_index
    if ids.device.type == "cpu" and bool(real.any()):
        those = ids[real].long().sort(-1).values
        if not 0 <= int(those.min()) <= int(those.max()) < vocab:
            raise ValueError(f"teacher's ids must be in [0, {vocab}); got {int(those.min())} to {int(those.max())}")
        if bool((those[:, 1:] == those[:, :-1]).any()):
            raise ValueError("teacher's ids must name each token once; got one twice for a label")
    return TopK(student.of_rows(ids.detach(), 1), student.of_rows(logps.detach(), 1))
