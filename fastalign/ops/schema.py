"""The operators of token statistics: schema, validation, fakes and the way to the kernels; `ops` gives them autograd.

What passes the checks here is safe to hand to a kernel as a raw pointer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backends
from .call import check, shape_of, unit_stride

library = torch.library.Library("fastalign", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_STATS = "Tensor saved, Tensor? entropy, Tensor? kl, "
_GRADS = "Tensor? g_logps, Tensor? g_lse, Tensor? g_entropy, Tensor? g_kl, Tensor? g_mean, "
library.define(
    "token_stats(Tensor logits, Tensor labels, Tensor? ref_logits, int ignore_index, float temperature, float softcap, "
    "bool entropy, bool mean, bool inplace_backward) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
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


def kernel_forward(logits, labels, ref_logits, *options):
    """The statistics of arguments that were checked."""
    ref_logits = None if ref_logits is None else unit_stride(ref_logits)
    logits = unit_stride(logits)
    return _backends.pick(logits).forward(logits, labels, ref_logits, *options)


def checked_forward(logits, labels, ref_logits, ignore_index, temperature, softcap, entropy, mean, inplace_backward):
    check(logits, labels, ref_logits, temperature, softcap, inplace_backward)
    return kernel_forward(logits, labels, ref_logits, ignore_index, temperature, softcap, entropy, mean)


def _forward(logits, *args):
    """As an operator, which must return tensors: empty ones for what was not asked for."""
    outputs = checked_forward(logits, *args)
    return tuple(logits.new_empty(0, dtype=outputs[0].dtype) if t is None else t for t in outputs)


def _forward_fake(logits, labels, ref_logits, ignore_index, temperature, softcap, entropy, mean, inplace_backward):
    check(logits, labels, ref_logits, temperature, softcap, inplace_backward)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = logits.shape[:-1]

    def out(wanted: bool) -> Tensor:
        return logits.new_empty(rows if wanted else (0,), dtype=dtype)

    return (
        out(True),
        out(True),
        out(entropy),
        out(ref_logits is not None),
        out(mean),
        logits.new_empty((*rows, 4), dtype=dtype),
    )


_PER_ROW = ("entropy", "kl", "g_logps", "g_lse", "g_entropy", "g_kl", "g_mean")


def check_backward(logits, labels, ref_logits, saved, *rest) -> None:
    """The forward's checks, and that every per-row tensor is what the kernel takes it for."""
    *per_row, _, temperature, softcap = rest
    check(logits, labels, ref_logits, temperature, softcap, False)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    for name, t, shape in (
        ("saved", saved, (*labels.shape, 4)),
        *((n, t, labels.shape) for n, t in zip(_PER_ROW, per_row, strict=True)),
    ):
        if t is not None and (t.shape != shape or t.dtype != dtype or t.device != logits.device):
            raise ValueError(
                f"{name} must be {dtype} {list(shape)} on {logits.device}; got {t.dtype} {shape_of(t)} on {t.device}"
            )
    entropy, kl, _, _, g_entropy, g_kl, _ = per_row
    if (g_entropy is not None and entropy is None) or (g_kl is not None and (kl is None or ref_logits is None)):
        raise ValueError("g_entropy needs entropy, and g_kl needs kl and ref_logits, from the forward; got None")


def kernel_backward(out, logits, labels, ref_logits, saved, entropy, kl, *rest):
    *grads, ignore_index, temperature, softcap = rest
    ref_logits = None if ref_logits is None else unit_stride(ref_logits)
    logits = unit_stride(logits)
    backward = _backends.pick(logits).backward
    backward(logits, labels, ref_logits, saved, entropy, kl, tuple(grads), ignore_index, temperature, softcap, out)


def _as_it_lies(logits) -> bool:
    """The vocabulary is dense in memory, and that is not the negative of what the tensor says."""
    return (logits.stride(-1) == 1 or logits.shape[-1] == 1) and not logits.is_neg()


def room_for_gradient(logits, inplace: bool):
    """Where the gradient goes: a new dense tensor, or the logits' own memory if it may and can."""
    if inplace and _as_it_lies(logits):
        return logits
    if logits.nbytes > _backends.LARGE:
        return _backends.empty(logits.shape, logits)
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def written(logits, gradient):
    """The logits, holding the gradient, which lies in their memory already unless that is not dense."""
    if gradient is not logits:
        logits.copy_(gradient)
    if not logits.is_inference():
        torch.autograd.graph.increment_version(logits)  # the kernel wrote behind autograd's back
    return logits


def _backward(logits, *args):
    check_backward(logits, *args)
    out = room_for_gradient(logits, inplace=False)
    kernel_backward(out, logits, *args)
    return out


def _backward_fake(logits, *args):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _backward_inplace(logits, *args):
    check_backward(logits, *args)
    out = room_for_gradient(logits, inplace=True)
    kernel_backward(out, logits, *args)
    written(logits, out)


library.impl("token_stats", _forward, "CompositeExplicitAutograd")
library.impl("token_stats_backward", _backward, "CompositeExplicitAutograd")
library.impl("token_stats_backward_", _backward_inplace, "CompositeExplicitAutograd")
torch.library.register_fake("fastalign::token_stats", _forward_fake, lib=library)
torch.library.register_fake("fastalign::token_stats_backward", _backward_fake, lib=library)
torch.library.register_fake("fastalign::token_stats_backward_", lambda logits, *args: None, lib=library)
