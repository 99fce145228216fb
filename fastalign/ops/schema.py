"""The operators of token statistics: schema, fakes and the way to the kernels; `ops.statistics` gives them autograd.

An operator's arguments are flat, as torch wants them. Each makes a `TokenCall` of them at once, which is what all else
here takes and what a kernel gets once it was checked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _backends
from .._backends import Forward
from .call import TokenCall, check_call, dense, shape_of

Grads = tuple[Tensor | None, ...]
"""Of logps, lse, entropy, kl and mean."""

library = torch.library.Library("fastalign", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_STATS = "Tensor saved, Tensor? entropy, Tensor? kl, "
_GRADS = "Tensor? g_logps, Tensor? g_lse, Tensor? g_entropy, Tensor? g_kl, Tensor? g_mean, "
library.define(
    "token_stats(Tensor logits, Tensor labels, Tensor? ref_logits, int ignore_index, float temperature, float softcap, "
    "bool entropy, bool mean, bool inplace_backward, bool diagnostics=False) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
library.define(
    f"token_stats_backward(Tensor logits, Tensor labels, Tensor? ref_logits, {_STATS}{_GRADS}"
    "int ignore_index, float temperature, float softcap) -> Tensor",
    tags=_TAGS,
)
library.define(
    f"token_stats_backward_(Tensor(a!) logits, Tensor labels, Tensor? ref_logits, {_STATS}{_GRADS}"
    "int ignore_index, float temperature, float softcap) -> ()",
    tags=_TAGS,
)


class _ForwardArguments(NamedTuple):
    """Of `token_stats`, in the schema's order."""

    logits: Tensor
    labels: Tensor
    ref_logits: Tensor | None
    ignore_index: int
    temperature: float
    softcap: float
    entropy: bool
    mean: bool
    inplace_backward: bool
    diagnostics: bool = False  # the dispatcher leaves out what is as by default

    @property
    def call(self) -> TokenCall:
        return TokenCall(*self[:6])


class _BackwardArguments(NamedTuple):
    """Of `token_stats_backward`, in the schema's order."""

    logits: Tensor
    labels: Tensor
    ref_logits: Tensor | None
    saved: Tensor
    entropy: Tensor | None
    kl: Tensor | None
    g_logps: Tensor | None
    g_lse: Tensor | None
    g_entropy: Tensor | None
    g_kl: Tensor | None
    g_mean: Tensor | None
    ignore_index: int
    temperature: float
    softcap: float

    @property
    def call(self) -> TokenCall:
        return TokenCall(*self[:3], *self[11:])


def kernel_forward(call: TokenCall, entropy: bool, mean: bool, diagnostics: bool = False) -> Forward:
    """The statistics of a call that was checked."""
    call = dense(call)
    return _backends.pick(call.logits).forward(call, entropy, mean, diagnostics)


def checked_forward(
    call: TokenCall, entropy: bool, mean: bool, inplace_backward: bool, diagnostics: bool = False
) -> Forward:
    check_call(call, inplace_backward)
    return kernel_forward(call, entropy, mean, diagnostics)


def _forward(*flat: Any) -> tuple[Tensor, ...]:
    """As an operator, which must return tensors: empty ones for what was not asked for."""
    args = _ForwardArguments(*flat)
    outputs = checked_forward(args.call, args.entropy, args.mean, args.inplace_backward, args.diagnostics)
    dtype, new = outputs[0].dtype, args.logits.new_empty
    more = outputs[6:] or (new(0, dtype=dtype), new(0, dtype=torch.int64))
    return *(new(0, dtype=dtype) if t is None else t for t in outputs[:6]), *more


def _forward_fake(*flat: Any) -> tuple[Tensor, ...]:
    args = _ForwardArguments(*flat)
    logits = args.logits
    check_call(args.call, args.inplace_backward)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = logits.shape[:-1]

    def out(wanted: bool, dtype: torch.dtype = dtype) -> Tensor:
        return logits.new_empty(rows if wanted else (0,), dtype=dtype)

    return (
        out(True),
        out(True),
        out(args.entropy),
        out(args.ref_logits is not None),
        out(args.mean),
        logits.new_empty((*rows, 4), dtype=dtype),
        out(args.diagnostics),
        out(args.diagnostics, torch.int64),
    )


def check_backward(call: TokenCall, saved: Tensor, entropy: Tensor | None, kl: Tensor | None, grads: Grads) -> None:
    """The forward's checks, and that every per-row tensor is what the kernel takes it for."""
    check_call(call)
    logits, labels, reference = call[:3]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    per_row = zip(_BackwardArguments._fields[4:11], (entropy, kl, *grads), strict=True)
    for name, t, shape in (("saved", saved, (*labels.shape, 4)), *((n, t, labels.shape) for n, t in per_row)):
        if t is not None and (t.shape != shape or t.dtype != dtype or t.device != logits.device):
            raise ValueError(
                f"{name} must be {dtype} {list(shape)} on {logits.device}; got {t.dtype} {shape_of(t)} on {t.device}"
            )
    _, _, g_entropy, g_kl, _ = grads
    if (g_entropy is not None and entropy is None) or (g_kl is not None and (kl is None or reference is None)):
        raise ValueError("g_entropy needs entropy, and g_kl needs kl and ref_logits, from the forward; got None")


def kernel_backward(
    out: Tensor, call: TokenCall, saved: Tensor, entropy: Tensor | None, kl: Tensor | None, grads: Grads
) -> None:
    call = dense(call)
    _backends.pick(call.logits).backward(call, saved, entropy, kl, grads, out)


def _as_it_lies(logits: Tensor) -> bool:
    """The vocabulary is dense in memory, and that is not the negative of what the tensor says."""
    return (logits.stride(-1) == 1 or logits.shape[-1] == 1) and not logits.is_neg()


def room_for_gradient(logits: Tensor, inplace: bool) -> Tensor:
    """Where the gradient goes: a new dense tensor, or the logits' own memory if it may and can."""
    if inplace and _as_it_lies(logits):
        return logits
    if logits.nbytes > _backends.LARGE:
        return _backends.empty(logits.shape, logits)
    if logits.is_contiguous():  # a keyword of torch's costs as much as this question twice
        return torch.empty_like(logits)
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def written(logits: Tensor, gradient: Tensor) -> Tensor:
    """The logits, holding the gradient, which lies in their memory already unless that is not dense."""
    if gradient is not logits:
        logits.copy_(gradient)
    if not logits.is_inference():
        torch.autograd.graph.increment_version(logits)  # the kernel wrote behind autograd's back
    return logits


def _run_backward(args: _BackwardArguments, inplace: bool) -> Tensor:
    call, rows = args.call, args[3:6]
    check_backward(call, *rows, args[6:11])
    out = room_for_gradient(args.logits, inplace)
    kernel_backward(out, call, *rows, args[6:11])
    return out


def _backward(*flat: Any) -> Tensor:
    return _run_backward(_BackwardArguments(*flat), inplace=False)


def _backward_fake(logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _backward_inplace(*flat: Any) -> None:
    args = _BackwardArguments(*flat)
    written(args.logits, _run_backward(args, inplace=True))


library.impl("token_stats", _forward, "CompositeExplicitAutograd")
library.impl("token_stats_backward", _backward, "CompositeExplicitAutograd")
library.impl("token_stats_backward_", _backward_inplace, "CompositeExplicitAutograd")
torch.library.register_fake("fastalign::token_stats", _forward_fake, lib=library)
torch.library.register_fake("fastalign::token_stats_backward", _backward_fake, lib=library)
torch.library.register_fake("fastalign::token_stats_backward_", lambda *flat: None, lib=library)
