"""The known-objective plan of a fused head: a loss and its gradients formed part by part, in the forward pass.

Where a batch's loss is a sum over groups of sequences (pairs, lists, single ones), a part's logits live only while its
own share of the loss and its gradients are formed: three GEMMs for a trained head, two for a frozen one, for any
statistics, and memory for one part's logits. In 16 bits a factor on the loss that is no power of two rounds the
gradients once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import _backends
from ..head.head import Head, as_head
from ..head.inputs import HeadCall, ValidTokens, plain_head, valid_problem
from ..head.plan import part_rows
from ..head.products import add_product, product
from ..head.tiles import RowStats
from ..ops.call import check_labels
from ..ops.fused_loss import attach_gradients
from ..ops.results import TokenStats
from ..ops.transforms import transformed
from .base import Logits

T = TypeVar("T")


class Piece:
    """Some sequences of a batch, in place of logits in a loss module; their gradient is formed at once."""

    def __init__(self, head: Head, rows: Tensor, totals: _Totals) -> None:
        self._head, self._totals = take(head, rows), totals
        self._valid: ValidTokens | None = None

    @property
    def shape(self) -> torch.Size:
        """That of their logits."""
        return self._head.shape

    def stats(
        self,
        labels: Tensor,
        *,
        ref_logits: Any = None,
        kl: bool = False,
        diagnostics: tuple[str, ...] = (),
        **options: Any,
    ) -> TokenStats:
        """As `Head.stats`, once; `finish` then takes what became of them. Of the diagnostics the mean logits alone."""
        head, reference = self._head, None
        if ref_logits is not None:
            other = as_head("ref_logits", ref_logits)
            reference = (other.hidden, other.weight, other.bias)
        given = (head.hidden, head.weight, head.bias, labels, reference, head.rows)
        valid = valid_problem(HeadCall.of(*given, **head.of_its_own(options)))
        self._valid, problem = valid, valid.problem
        problem.mean |= "mean_logits" in diagnostics
        self._all = slice(0, problem.labels.shape[0]), slice(0, problem.vocab)
        self._logits = problem.logits(*self._all)
        self._stats = problem.stats(*self._all, *self._logits)
        s = self._stats
        self._leaves = [
            t if t is None else t.detach().requires_grad_() for t in (s.logps, s.lse, s.entropy, s.kl, s.mean)
        ]
        found = valid.spread(*self._leaves)  # type: ignore[arg-type]
        if not diagnostics or s.mean is None:
            return found
        return found.with_diagnostics({"mean_logits": valid.place(s.mean)})

    def finish(self, share: Tensor) -> None:
        """Adds the gradients of the batch's loss, of which `share` is this piece's."""
        if self._valid is None or not share.requires_grad:
            return
        there = [t for t in self._leaves if t is not None]
        found = dict(zip(map(id, there), torch.autograd.grad(share, there, allow_unused=True), strict=True))
        grads = tuple(None if t is None else found[id(t)] for t in self._leaves)
        stats: RowStats = self._stats
        dlogits = self._valid.problem.gradient(*self._all, *self._logits, stats, grads)
        self._totals.add(self._valid, dlogits)
        self._valid = None
        del self._logits


class _Totals:
    """Sums of the gradients over parts: the weight's in float32, where there are several, and rounded once."""

    several = True

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self._needs = [t is not None and t.requires_grad for t in (hidden, weight, bias)]
        self.hidden = hidden.detach().requires_grad_(self._needs[0])
        self._dtypes = weight.dtype, None if bias is None else bias.dtype
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def add(self, valid: ValidTokens, dlogits: Tensor) -> None:
        policy = valid.problem.policy
        if self._needs[0]:
            valid.tokens.backward(product(torch.empty_like(valid.tokens), dlogits, policy.part(slice(None))))
        if self._needs[1]:
            self._add_weight(dlogits, policy.hidden)
        if self._needs[2]:
            total = dlogits.sum(0, dtype=torch.promote_types(dlogits.dtype, torch.float32))
            self.bias = total if self.bias is None else self.bias + total

    def _add_weight(self, dlogits: Tensor, hidden: Tensor) -> None:
        first = self.weight is None
        if self.weight is None:
            wide = torch.promote_types(hidden.dtype, torch.float32)
            size = (dlogits.shape[1], hidden.shape[1])
            self.weight = _backends.empty(size, hidden, wide if self.several else self._dtypes[0])
        if self.several:
            add_product(self.weight, dlogits.t(), hidden, first)
        else:
            product(self.weight, dlogits.t(), hidden)

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden, weight and bias; None for those that are not trained."""
        weight_dtype, bias_dtype = self._dtypes
        weight = None if self.weight is None else self.weight.to(weight_dtype)
        self.weight = None
        return self.hidden.grad, weight, None if self.bias is None else self.bias.to(bias_dtype)


def known_objective(logits: Logits, labels: Tensor, ignore_index: int) -> Head | None:
    """The head, if its loss is to be formed by parts: as asked for, or where its logits do not fit the budget."""
    if not isinstance(logits, tuple) or not torch.is_grad_enabled() or labels.numel() == 0 or labels.is_meta:
        return None
    head = as_head("logits", logits)
    if transformed(head.hidden, head.weight, head.bias):
        return None
    trained = [t is not None and t.requires_grad for t in (head.hidden, head.weight, head.bias)]
    if not any(trained) or head.plan not in (None, "objective"):
        return None
    if not part_rows(head, labels.numel(), any(trained[1:])):
        return None  # nor for the real ones among them
    check_labels(labels, "hidden without H, or of rows", head.shape[:-1], "hidden", head.hidden.device)
    return head if part_rows(head, int((labels.long() != ignore_index).sum()), any(trained[1:])) else None


def take(head: Any, rows: Tensor) -> Head:
    """The head of some sequences: `rows` of the first dimension of its labels."""
    head = as_head("ref_logits", head)
    if head.rows is not None:
        return head._replace(rows=head.rows[rows])
    return head._replace(hidden=head.hidden.index_select(0, rows))


def flat_head(head: Head) -> Head:
    """[R, T, V] from [..., T, V]."""
    if head.rows is not None:
        return head._replace(rows=head.rows.reshape(-1, head.rows.shape[-1]))
    return head._replace(hidden=head.hidden.reshape(-1, *head.hidden.shape[-2:]))


def by_parts(
    head: Head,
    labels: Tensor,
    ignore_index: int,
    groups: Tensor,
    run: Callable[[Piece, Tensor, Tensor], tuple[T, Tensor]],
    *,
    by_place: bool = False,
) -> tuple[Tensor, list[T]]:
    """The loss, differentiable once, and what `run` returned for each part.

    Args:
        head: [R, T, V], with its gradient's path.
        labels: [R, T].
        groups: [G, r], int64: numbers of the sequences of each of G groups, which belong together.
        run: (piece, groups of the part [g], numbers of its sequences [g * r]) to (anything, the part's share of the
            batch's loss).
        by_place: a part's sequences come place by place, the first ones of all its groups first.
    """
    plain = plain_head(head.hidden, head.weight, head.bias)
    totals = _Totals(*plain)
    detached = head._replace(
        hidden=totals.hidden, weight=plain[1].detach(), bias=None if plain[2] is None else plain[2].detach()
    )
    tokens = (labels.long() != ignore_index).flatten(1).sum(-1)[groups].sum(-1)
    limit = part_rows(head, int(tokens.sum()), plain[1].requires_grad) or 1
    outputs, shares = [], []
    splits = list(_split(tokens.tolist(), limit))
    totals.several = len(splits) > 1
    for part in splits:
        which = torch.arange(part.start, part.stop, device=labels.device)
        rows = (groups[which].t() if by_place else groups[which]).reshape(-1)
        piece = Piece(detached, rows, totals)
        output, share = run(piece, which, rows)
        piece.finish(share)
        outputs.append(output)
        shares.append(share.detach())
    return attach_gradients(torch.stack(shares).sum(), plain, totals.results()), outputs


def _split(tokens: list[int], limit: int) -> Iterator[slice]:
    """Runs of groups of at most `limit` tokens together, or of one group."""
    start, held = 0, 0
    for at, count in enumerate(tokens):
        if at > start and held + count > limit:
            yield slice(start, at)
            start, held = at, 0
        held += count
    if tokens:
        yield slice(start, len(tokens))
