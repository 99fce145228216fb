"""The gate: the one place where logits enter. Autograd of the operators in `schema`, and the public functions.

Nothing below this file checks again and nothing above it touches logits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from .. import _backends
from .._backends import Forward
from ..utils import private
from ..utils.private import below_autograd, dual_levels
from . import transforms
from .call import TokenCall, as_saved, check_kl, check_smoothing, token_call
from .diagnostics import asked_for, beyond_mean, named
from .results import TokenStats, smoothed
from .schema import Grads, check_backward, checked_forward, kernel_backward, library, room_for_gradient, written

_Made = tuple[Tensor, Tensor, bytes]


# ----------------------------------------------------------------------------------------------------------- autograd
# Plain autograd.Functions, one on the Autograd key and one for calls that nobody watches:
# `torch.library.register_autograd` does the same for 40 us a call more.
def _save(ctx: Any, call: TokenCall, want_entropy: bool, inplace: bool, outputs: Forward) -> None:
    _, _, entropy, kl, _, saved = outputs[:6]
    logits, labels, reference = call[:3]
    entropy, kl = entropy if want_entropy else None, kl if reference is not None else None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, reference, saved, entropy, kl)
    ctx.options, ctx.inplace = call.options, inplace


def _gradient(ctx: Any, *grads: Tensor | None) -> Tensor:
    logits, labels, reference, saved, entropy, kl = ctx.saved_tensors
    g_logps, g_lse, g_entropy, g_kl, g_mean = grads + (None,) * (5 - len(grads))
    grads = (g_logps, g_lse, None if entropy is None else g_entropy, None if kl is None else g_kl, g_mean)
    return gradient(TokenCall(logits, labels, reference, *ctx.options), saved, entropy, kl, grads, ctx.inplace)


def gradient(
    call: TokenCall, saved: Tensor, entropy: Tensor | None, kl: Tensor | None, grads: Grads, inplace: bool
) -> Tensor:
    """The logits' gradient, given that of each statistic that a forward returned; `saved` and the rest are its own."""
    if transforms.batched(*grads):  # a kernel cannot see them

        def again(x: Tensor) -> tuple[Tensor | None, ...]:
            return transforms.statistics(call._replace(logits=x))[0]

        return transforms.pull(again, (call.logits,), grads)[0]
    watched = not unwatched(call.logits, call.labels)
    if inplace:
        call = call._replace(logits=call.logits.detach())
    if torch.is_grad_enabled() or watched or not all(type(g) in (Tensor, NoneType) for g in grads):
        flat = (*call[:3], saved, entropy, kl, *grads, *call.options)
        if not inplace:
            return torch.ops.fastalign.token_stats_backward(*flat)
        torch.ops.fastalign.token_stats_backward_(*flat)
        return call.logits
    grads = tuple([None if g is None else g.resolve_neg() for g in grads])
    # What the forward made needs no second check, and two rounds of the dispatcher cost as much as a small gradient.
    if not as_saved(call, saved, entropy, kl):
        check_backward(call, saved, entropy, kl, grads)
    out = room_for_gradient(call.logits, inplace)
    kernel_backward(out, call, saved, entropy, kl, grads)
    return written(call.logits, out) if inplace else out


class _TokenStats(torch.autograd.Function):
    """The operator's, whose arguments are flat."""

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> Any:
        outputs = _redispatch(*flat)
        ctx.mark_non_differentiable(*outputs[5:])
        entropy, _, inplace = flat[6:9]
        _save(ctx, TokenCall(*flat[:6]), entropy, inplace, outputs)
        ctx.constants = len(flat) - 1
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return _gradient(ctx, *grads[:5]), *[None] * ctx.constants


class _PlainStats(torch.autograd.Function):
    """The same without what autograd charges for: arguments one by one, results that nobody asked for.

    `call`: that of the logits; `want`: entropy, mean, gradient in place, diagnostics; `made`: logps, lse and what was
    kept of them (`cpu.logps`), where they are there already.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: TokenCall, want: tuple[bool, ...], made: _Made | None) -> Any:
        if made is not None:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(logits, call.labels)
            ctx.kept, ctx.options, ctx.inplace = made[2], call.options, want[2]
            return made[:2]
        ctx.kept = None
        outputs = checked_forward(call, *want)
        _save(ctx, call, want[0], want[2], outputs)
        if want[3]:
            ctx.mark_non_differentiable(*outputs[6:])
            return *outputs[:5], *outputs[6:]
        if outputs[2] is outputs[3] is outputs[4] is None:
            return outputs[:2]
        return outputs[:5]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        found = _gradient(ctx, *grads[:5]) if ctx.kept is None else _kept_gradient(ctx, *grads)
        return found, None, None, None


def direct_gradient(
    logits: Tensor,
    labels: Tensor,
    options: tuple[int, float, float],
    reference: Tensor | None,
    kept: bytes,
    upstream: Tensor,
    which: int,
) -> Tensor | None:
    """The logits' gradient in one compiled call (`cpu.loss_backward`), where that sees all that there is and no further
    derivative is wanted."""
    if _graph_of_graph() or not (type(logits) is Tensor is type(labels)) or _modes():
        return None
    cpu = _backends.direct(logits)
    if cpu is None or not (cpu.SEES_BATCHES or not transforms.batched(upstream)):
        return None
    out = room_for_gradient(logits, False)
    return out if cpu.loss_backward(logits, labels, options, reference, kept, (upstream,), which, out) else None


def _kept_gradient(ctx: Any, g_logps: Tensor | None, g_lse: Tensor | None) -> Tensor:
    """The logits' gradient after a direct forward."""
    logits, labels = ctx.saved_tensors
    if g_logps is not None and g_lse is None and not ctx.inplace:
        found = direct_gradient(logits, labels, ctx.options, None, ctx.kept, g_logps, 0)
        if found is not None:
            return found
    rows, _ = _backends.kept_rows(ctx.kept, labels)
    call = TokenCall(logits, labels, None, *ctx.options)
    return gradient(call, *rows, (g_logps, g_lse, None, None, None), ctx.inplace)


class _Once(torch.autograd.Function):
    """The backward operator as a node of the graph, so that a second derivative is refused and not silently zero."""

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> Tensor:
        with below_autograd():
            return torch.ops.fastalign.token_stats_backward(*flat)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "fastalign: token_stats can be differentiated once only (its backward is a kernel). For second "
            "derivatives, as in a Fisher-vector product, use plain torch operations (torch.log_softmax) on that batch."
        )


# Bound here: looking them up takes longer than most of them do.
_graph_of_graph = torch.is_grad_enabled
_modes, _transforms = private.count_of_modes, transforms.active
_of_transform = private.is_of_transform


def unwatched(logits: Any, labels: Any) -> bool:
    """Nobody watches: no tensor subclass, no dispatch mode. The dispatcher's two rounds (20 us) would add nothing."""
    return type(logits) is Tensor and type(labels) is Tensor and not _modes()


def alone(logits: Any, labels: Any) -> bool:
    """Neither a mode, a subclass, a compiler nor a transform of functions: there is nothing but autograd, and memory
    that says what the logits are (a bit may say that they are its negative)."""
    return (
        not torch.compiler.is_dynamo_compiling()  # other compilers bring tensors and modes of their own
        and type(logits) is Tensor
        and type(labels) is Tensor
        and not _modes()
        and not _transforms()
        and not _of_transform(logits)
        and (dual_levels._current_level < 0 or not transforms.has_tangent(logits))
        and not logits.is_neg()
    )


def node_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Its `apply` for calls that are `alone`: without torch's looking for transforms, 2 us a call."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def _redispatch(*flat: Any) -> Any:
    with below_autograd():
        return torch.ops.fastalign.token_stats(*flat)


_plain_node = node_of(_PlainStats)


def _call_plain(call: TokenCall, entropy: bool, mean: bool, inplace: bool, diagnostics: bool) -> Any:
    """The operator's work for a call that nobody watches; None in place of what was not asked for."""
    logits, made = call.logits, None
    cpu = _backends.direct(logits)
    if cpu is not None and call.reference is None and not (entropy or mean or diagnostics):
        made = cpu.logps(logits, call.labels, call[3:], inplace)
    if logits.requires_grad and torch.is_grad_enabled():
        outputs = _plain_node(logits, call, (entropy, mean, inplace, diagnostics), made)
        return outputs if len(outputs) > 2 else (*outputs, None, None, None)
    if made is not None:
        return (*made[:2], None, None, None)
    return checked_forward(call, entropy, mean, inplace, diagnostics)


def _stats_autograd(logits: Tensor, *rest: Any) -> Any:
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return _redispatch(logits, *rest)
    return _TokenStats.apply(logits, *rest)


library.impl("token_stats", _stats_autograd, "Autograd")
library.impl("token_stats_backward", _Once.apply, "Autograd")


# --------------------------------------------------------------------------------------------------------- public API
def token_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    ref_logits: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    entropy: bool = False,
    kl: bool = False,
    diagnostics: Collection[str] = (),
    inplace_backward: bool = False,
    extras: Collection[str] | None = None,
) -> TokenStats:
    """Log-probability of each label and, on request, entropy and exact KL, in one read of the logits.

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64, any strides (a vocabulary stride other than 1 costs one
            copy). Accumulation is in float32, in float64 for float64.
        labels: [...], int64 or int32: `labels[i]` is the target of `logits[i]`; nothing is shifted inside.
        ref_logits: [..., V] of the same dtype: the reference policy's logits, a constant; needed by, and only by, `kl`.
        ignore_index: tokens with this label are not read; their statistics and gradients are 0.
        temperature: the logits are divided by it (after soft-capping). The reference's too.
        softcap: logits become `softcap * tanh(logits / softcap)` first (Gemma 2). The reference's too.
        label_smoothing: e in [0, 1]: `logps` becomes (1 - e) log p[label] + (e / V) sum_j log p_j (Szegedy et al. 2016,
            sec. 7), so that `-logps` is the smoothed cross-entropy.
        entropy: return the entropy of the distribution.
        kl: return KL(p || q) over the whole vocabulary.
        diagnostics: which of "log_sum_sq_probs", "mean_logits", "is_top1" and "argmax" to return too: constants, made
            in the same read (beside `kl`, all but the mean take a second one on cpu and cuda). As the entropy does,
            they may change the last bits of the other statistics.
        inplace_backward: the backward writes the gradient over `logits`, saving one buffer of their size. Their version
            counter rises, so that a later use of the old values by autograd raises. Ignored under `torch.compile`.
        extras: the former name of diagnostics.

    Returns:
        TokenStats: logps, lse, entropy, kl, float32 [...] each (float64 for float64), differentiable in `logits` once.
        Under transforms of `torch.func` and with forward-mode tangents, plain torch operations take the kernels' place.
        Diagnostics are attributes by their names, None where not asked for, and with one of them items five to eight.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not match, an empty vocabulary, a label outside [0, V) (checked on CPU),
            a temperature or soft-cap that is not finite and positive, a reference that requires a gradient, an unknown
            diagnostic.
    """
    asked = token_call(logits, labels, ref_logits, ignore_index, temperature, softcap)
    check_kl(kl, ref_logits)
    if diagnostics or extras is not None:
        diagnostics = asked_for(diagnostics, extras)
    smooth = label_smoothing != 0.0
    want_mean = smooth or "mean_logits" in diagnostics
    if smooth:
        check_smoothing(label_smoothing)
    if transforms.transformed(logits):
        (logps, lse, ent, div, mean), found = transforms.statistics(asked, diagnostics)
        logps = smoothed(logps, lse, mean, label_smoothing)
        return TokenStats(logps, lse, ent if entropy else None, div).with_diagnostics(found)
    inplace = inplace_backward and not torch.compiler.is_compiling()
    more = bool(diagnostics) and beyond_mean(diagnostics)
    if alone(logits, labels):
        logps, lse, ent, div, mean, *rest = _call_plain(asked, entropy, want_mean, inplace, more)
    else:
        logps, lse, ent, div, mean, *rest = torch.ops.fastalign.token_stats(*asked, entropy, want_mean, inplace, more)
    if smooth:
        logps = smoothed(logps, lse, mean, label_smoothing)
    stats = TokenStats(logps, lse, ent if entropy else None, div if kl else None)
    return stats.with_diagnostics(named(diagnostics, labels, mean, *rest[-2:])) if diagnostics else stats


def token_logps(logits: Tensor, labels: Tensor, **options) -> Tensor:
    """Log-probability of each label: `token_stats(...).logps`, [...]; 0 where ignored. Options as in `token_stats`."""
    return token_stats(logits, labels, **options).logps
