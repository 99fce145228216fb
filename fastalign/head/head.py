"""The fused head: token statistics from hidden states and the head's weight, the logits never held whole.

The GEMMs are the platform's (oneDNN, cuBLAS); around them run the kernels of `token_stats`, on tiles of logits. What is
kept between forward and backward is the plan's choice, with the number of GEMMs over [tokens, V] that it costs when
hidden and weight are both trained, and when the weight is frozen:

=============  ==========================================  ===========  ==========
plan           kept                                        GEMMs        frozen
=============  ==========================================  ===========  ==========
`keep`         the logits of valid tokens, [M, V]           3            2
`recompute`    nothing but a tile                          4            3
`project`      (p - onehot) @ weight, [M, H]               --           2
`objective`    nothing: the gradients are there already    3            2
=============  ==========================================  ===========  ==========

`project` serves a frozen head and losses of the log-probs alone: their coefficients are row scales, applied to a tensor
of the size of hidden in backward. Other gradients (entropy, KL, lse) fall back on recomputing there. `objective` is for
the loss modules (`losses/chunks.py`), which know what becomes of the statistics: they form loss and gradients of some
pairs, lists or sequences after the other, so that one part's logits are all there are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.diagnostics import asked_for, beyond_mean, named
from ..ops.statistics import TokenStats
from ..ops.transforms import batched, transformed
from ..ops.uncompiled import uncompiled
from .inputs import HeadCall, plain_head, valid_problem
from .plain import pulled, transformed_stats
from .plan import NARROWEST, HeadPlan, head_plan
from .products import product
from .tiles import HeadGradient, Problem, RowStats, cut, forward, joined


@runtime_checkable
class LogitsSource(Protocol):
    """Anything that stands in place of logits in a loss module: it has their shape and gives their statistics."""

    @property
    def shape(self) -> torch.Size:
        """[..., V]."""

    def stats(self, labels: Tensor, *, ref_logits: Any = None, **options: Any) -> TokenStats:
        """As `token_stats` of the logits."""


@runtime_checkable
class ObjectiveSource(LogitsSource, Protocol):
    """A source that a loss can be formed within, such as a model's own forward: there the loss sees a head."""

    def gives_head(self, reference: Any) -> bool:
        """Whether `loss` can be called, with these logits of a reference or None."""

    def loss(self, labels: Tensor, objective: Any, reference: Any) -> Any:
        """What `objective(head, the reference's head or None)` returns. `labels` as the statistics' would be."""


class Head(NamedTuple):
    """What stands in place of logits in a loss module: `loss(Head(hidden, weight), labels, ...)`, or a plain tuple."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    chunk_bytes: int | None = None
    plan: str | None = None
    rows: Tensor | None = None
    logits_dtype: torch.dtype | None = None
    softcap: float | None = None

    @property
    def shape(self) -> torch.Size:
        """That of the logits."""
        leading = self.hidden.shape[:-1] if self.rows is None else self.rows.shape
        return torch.Size((*leading, self.weight.shape[0]))

    def stats(self, labels: Tensor, *, ref_logits: Any = None, **options: Any) -> TokenStats:
        """`head_token_stats` of this head, `ref_logits` being the reference's; options as there."""
        if ref_logits is not None:
            reference = ref_logits if isinstance(ref_logits, Head) else as_head("ref_logits", ref_logits)
            options |= {
                "ref_hidden": reference.hidden,
                "ref_weight": reference.weight,
                "ref_bias": reference.bias,
            }
        return head_token_stats(
            self.hidden,
            self.weight,
            labels,
            bias=self.bias,
            rows=self.rows,
            chunk_bytes=self.chunk_bytes,
            plan=None if self.plan == "objective" and not self._by_parts(labels) else self.plan,
            **self.of_its_own(options),
        )

    def of_its_own(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of the statistics, and what the head says itself of its logits.

        Raises:
            ValueError: two soft-caps.
        """
        asked = options.get("softcap")
        if self.softcap is not None and asked is not None and self.softcap != asked:
            raise ValueError(
                f"softcap must be None for a head that caps its logits itself, at {self.softcap}; got {asked}"
            )
        softcap = self.softcap if asked is None else asked
        return {**options, "softcap": softcap, "logit_scale": self.logit_scale, "logits_dtype": self.logits_dtype}

    def _by_parts(self, labels: Tensor) -> bool:
        """Whether there are gradients, of numbers that are there, to form part by part."""
        tensors = (self.hidden, self.weight, self.bias)
        trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        return trained and labels.numel() > 0 and not labels.is_meta and not transformed(*tensors)


def as_head(name: str, value: Any) -> Head:
    """A `Head` from one, or from a tuple (hidden, weight) or (hidden, weight, bias); TypeError for anything else."""
    if not isinstance(value, tuple) or not 2 <= len(value) <= len(Head._fields):
        raise TypeError(f"{name} must be a Head or a tuple (hidden, weight[, bias]); got {type(value).__name__}")
    for part, t in zip(("hidden", "weight"), value, strict=False):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}'s {part} must be a torch.Tensor; got {type(t).__name__}")
    return Head(*value)


# ------------------------------------------------------------------------------------------------------------ autograd
class _HeadStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem: Problem, plan: HeadPlan, hidden: Tensor, weight: Tensor, bias: Tensor | None):
        ctx.problem, ctx.plan = problem, plan
        ctx.set_materialize_grads(False)
        # A change of these in place before backward must raise, as it does for torch's own linear.
        ctx.save_for_backward(hidden, weight, bias)
        ctx.kept = ctx.projected = None
        needs = ctx.needs_input_grad[2:5]
        if plan.name == "keep" and any(needs):
            rows, columns = slice(0, problem.labels.shape[0]), slice(0, problem.vocab)
            ctx.kept = problem.logits(rows, columns)
            stats = problem.stats(rows, columns, *ctx.kept)
        elif plan.name == "project" and any(needs):
            stats, ctx.projected = _project(problem, plan.rows)
        else:
            stats = forward(problem, plan.rows, plan.columns, problem.buffers(plan.rows, plan.columns))
        ctx.stats, diagnostics = stats, (stats.log_sum_sq, stats.argmax)
        if problem.diagnostics:
            ctx.stats = replace(stats, log_sum_sq=None, argmax=None)
            ctx.mark_non_differentiable(*diagnostics)
        return stats.logps, stats.lse, stats.entropy, stats.kl, stats.mean, *diagnostics

    @staticmethod
    @once_differentiable
    @uncompiled
    def backward(ctx, *grads):
        tensors = ctx.saved_tensors  # raises where one was changed
        problem, plan, stats, grads = ctx.problem, ctx.plan, ctx.stats, grads[:5]
        if batched(*grads):  # a kernel cannot see them
            return None, None, *pulled(problem, tensors, grads)
        only_logps = all(g is None for g in grads[1:])
        if ctx.projected is not None and only_logps:
            g_logps = torch.zeros_like(stats.logps) if grads[0] is None else grads[0]
            return None, None, ctx.projected * -g_logps.unsqueeze(-1).to(ctx.projected.dtype), None, None
        rows, columns = (plan.rows, plan.columns) if ctx.kept is not None else _grid(problem, plan)
        total = HeadGradient(problem, rows, columns, ctx.needs_input_grad[2:5])
        buffers = None if ctx.kept is not None else problem.buffers(rows, columns)
        for at, part in problem.tiles(rows, columns):
            logits, reference = problem.logits(at, part, buffers) if ctx.kept is None else ctx.kept
            block = tuple(None if g is None else cut(g, at) for g in grads)
            total.add(at, part, problem.gradient(at, part, logits, reference, stats.rows(at), block))
        if ctx.kept is not None:
            ctx.kept = None  # overwritten by their gradient; where the graph is used again they are formed anew
        return None, None, *total.results()


def _grid(problem: Problem, plan: HeadPlan) -> tuple[int, int]:
    """Tile of a recomputing backward: the plan's, or for `project`, whose rows are whole, another of that size."""
    if plan.name != "project":
        return plan.rows, plan.columns
    columns = max(min(NARROWEST, problem.vocab), plan.rows * plan.columns // problem.labels.shape[0])
    return problem.labels.shape[0], min(columns, problem.vocab)


def _project(problem: Problem, rows: int) -> tuple[RowStats, Tensor]:
    """Statistics, and the projection (p - onehot) @ weight of every row."""
    total, columns = problem.labels.shape[0], slice(0, problem.vocab)
    hidden = problem.policy.hidden
    result, blocks = torch.empty_like(hidden), []
    buffers, weight = problem.buffers(rows, problem.vocab), problem.policy.part(columns)
    for start in range(0, max(total, 1), rows):
        at = slice(start, min(start + rows, total))
        logits, reference = problem.logits(at, columns, buffers)
        blocks.append(problem.stats(at, columns, logits, reference))
        minus_one = torch.full_like(blocks[-1].logps, -1.0)
        grads = (minus_one, None, None, None, None)
        product(result[at], problem.gradient(at, columns, logits, reference, blocks[-1], grads), weight)
    return joined(blocks), result


# ---------------------------------------------------------------------------------------------------------- public API
@uncompiled
def head_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    entropy: bool = False,
    kl: bool = False,
    diagnostics: Collection[str] = (),
    rows: Tensor | None = None,
    chunk_bytes: int | None = None,
    plan: str | None = None,
    logits_dtype: torch.dtype | None = None,
    extras: Collection[str] | None = None,
) -> TokenStats:
    """`token_stats` of the logits `logit_scale * (hidden @ weight.T + bias)`, which are never held for all tokens.

    Tokens with the label `ignore_index` are dropped before the first GEMM.

    Args:
        hidden: [..., H], float32, bfloat16, float16 or float64: the model's last hidden states.
        weight: [V, H], `lm_head.weight` (tied or not). A dtype other than that of hidden is converted tile by tile;
            its gradient has its own dtype. A DTensor is gathered.
        labels: [...], int64 or int32; nothing is shifted inside.
        bias: [V].
        ref_hidden, ref_weight, ref_bias: the reference's, [..., H'], [V, H'] and [V], constants; with and only with kl.
        ignore_index, temperature, softcap, label_smoothing, entropy, kl, diagnostics: as in `token_stats`.
        logit_scale: the model's own factor on its logits (Granite divides by `logits_scaling`, Cohere multiplies by
            `logit_scale`), before soft-capping; for the reference too.
        rows: [...] of labels' shape, int64: which of the hidden states (counted over all dimensions but the last)
            predicts each label. Labels then need not have the shape of hidden: sequences packed end to end
            (`packed_rows`), or completions of one prompt whose hidden states are there once. None: its own.
        chunk_bytes: budget for logits in bytes; None: an eighth of the device's memory.
        plan: "keep", "recompute" or "project" in place of the automatic choice; see `head_plan`.
        logits_dtype: torch.float32 keeps the logits of 16-bit hidden states in float32 within a tile, of which rounding
            to 16 bits would be seen as noise in the ratios of policy losses; None: that of hidden, but float32 on CPUs
            whose products of 16 bits are slower than those of float32.
        extras: the former name of diagnostics.

    Returns:
        TokenStats: logps, lse, entropy and kl, [...] each, float32 (float64 for float64), differentiable once; with
        diagnostics as `token_stats` gives them.

    Raises:
        TypeError: a dtype that is not supported, or not a tensor.
        ValueError: shapes or devices that do not match, a label outside [0, V) (checked on CPU), an empty weight (a
            ZeRO-3 shard that was not gathered), numbers out of range, a plan that cannot serve.
    """
    hidden, weight, bias = plain_head(hidden, weight, bias)
    if kl != (ref_hidden is not None and ref_weight is not None):
        raise ValueError("kl=True goes with ref_hidden and ref_weight, and they with it; got one without the other")
    if plan == "objective":
        raise ValueError("plan 'objective' is for loss modules, which know the objective: loss(Head(..., plan), ...)")
    reference = None if ref_hidden is None or ref_weight is None else (ref_hidden, ref_weight, ref_bias)
    diagnostics = asked_for(diagnostics, extras, stacklevel=4)  # beyond what `uncompiled` put around
    call = HeadCall.of(
        *(hidden, weight, bias, labels, reference, rows),
        ignore_index=ignore_index,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        label_smoothing=label_smoothing,
        entropy=entropy,
        logits_dtype=logits_dtype,
    )
    if transformed(hidden, weight, bias):
        return transformed_stats(call, diagnostics)
    valid = valid_problem(call)
    valid.problem.mean |= "mean_logits" in diagnostics
    valid.problem.diagnostics = beyond_mean(diagnostics)
    chosen = _plan_of(valid.problem, valid.tokens, weight, bias, chunk_bytes, plan)
    logps, lse, ent, div, mean, *constants = _HeadStats.apply(valid.problem, chosen, valid.tokens, weight, bias)
    stats = valid.spread(logps, lse, ent, div, mean)
    if not diagnostics:
        return stats
    more = named(diagnostics, valid.problem.labels, mean, *constants)
    return stats.with_diagnostics({name: valid.place(t, -1 if name == "argmax" else 0) for name, t in more.items()})


def _plan_of(
    problem: Problem, tokens: Tensor, weight: Tensor, bias: Tensor | None, chunk_bytes: int | None, plan: str | None
) -> HeadPlan:
    training = torch.is_grad_enabled()
    return head_plan(
        tokens.shape[0],
        problem.vocab,
        tokens.shape[1],
        tokens.dtype,
        device=tokens.device,
        train_hidden=training and tokens.requires_grad,
        train_weight=training and (weight.requires_grad or (bias is not None and bias.requires_grad)),
        entropy=problem.entropy,
        kl=problem.reference is not None,
        chunk_bytes=chunk_bytes,
        plan=plan,
        logits_dtype=problem.dtype,
    )
