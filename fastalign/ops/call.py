"""What the token operators may be called with. Whatever passes is safe for a kernel as a raw pointer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INDICES = (torch.int64, torch.int32)


def shape_of(t: Tensor) -> str:
    return str(list(t.shape))


def check(
    logits: Tensor, labels: Tensor, ref_logits: Tensor | None, temperature: float, softcap: float, inplace: bool
) -> None:
    """Everything that can be known without reading memory. Raises ValueError or TypeError."""
    if logits.dtype not in _FLOATS:
        raise TypeError(f"logits must be float32, bfloat16, float16 or float64; got {logits.dtype}")
    if labels.dtype not in _INDICES:
        raise TypeError(f"labels must be int64 or int32; got {labels.dtype}")
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits must have a non-empty vocabulary as their last dimension; got shape {shape_of(logits)}"
        )
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must have the shape of logits without the vocabulary, {list(logits.shape[:-1])}; "
            f"got {shape_of(labels)}"
        )
    if labels.device != logits.device:
        raise ValueError(f"labels must be on the device of logits, {logits.device}; got {labels.device}")
    if ref_logits is not None:
        if ref_logits.dtype != logits.dtype:
            raise TypeError(f"ref_logits must have the dtype of logits, {logits.dtype}; got {ref_logits.dtype}")
        if ref_logits.shape != logits.shape:
            raise ValueError(
                f"ref_logits must have the shape of logits, {shape_of(logits)}; got {shape_of(ref_logits)}"
            )
        if ref_logits.device != logits.device:
            raise ValueError(f"ref_logits must be on the device of logits, {logits.device}; got {ref_logits.device}")
        if ref_logits.requires_grad:
            raise ValueError(
                "ref_logits must not require a gradient (the reference is a constant); pass ref_logits.detach()"
            )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a finite number above 0; got {temperature}")
    if not (math.isfinite(softcap) and softcap >= 0):
        raise ValueError(f"softcap must be None or a finite number above 0; got {softcap}")
    if inplace and any(n > 1 and s == 0 for n, s in zip(logits.shape, logits.stride(), strict=True)):
        raise ValueError(
            "inplace_backward needs logits whose elements do not share memory; got an expanded tensor with strides "
            f"{tuple(logits.stride())}"
        )


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype is other.dtype and one.device == other.device


def as_saved(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    saved: Tensor,
    entropy: Tensor | None,
    kl: Tensor | None,
) -> bool:
    """Whether tensors that come back from autograd are such as a forward saved: hooks on saved tensors may change them.

    What a kernel needs to stay within their memory, in a third of the time of the checks that name what is wrong.
    """
    number, dtype, device = labels.numel(), saved.dtype, logits.device
    return (
        dtype is (torch.float64 if logits.dtype is torch.float64 else torch.float32)
        and saved.numel() == 4 * number
        and logits.shape[:-1] == labels.shape
        and labels.dtype in _INDICES
        and labels.device == saved.device == device
        and (ref_logits is None or _alike(ref_logits, logits))
        and all(t is None or (t.dtype is dtype and t.numel() == number) for t in (entropy, kl))
    )


def unit_stride(t: Tensor) -> Tensor:
    """The tensor itself where the vocabulary is dense in memory, else one copy of it; also a copy where a bit says that
    the tensor is the negative of what lies there."""
    t = t.resolve_neg()
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def check_ignore_index(value: Any) -> int:
    """Raises unless it is an integer that int64 holds."""
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        raise TypeError(f"ignore_index must be an int; got {type(value).__name__} {value!r}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"ignore_index must fit into int64; got {value}")
    return value


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes matrix products of the device in; None where it is off, or not known there (`meta`)."""
    name = device.type
    if not torch.amp.is_autocast_available(name) or not torch.is_autocast_enabled(name):
        return None
    return torch.get_autocast_dtype(name)


def check_types(logits, labels, ref_logits, kl: bool, label_smoothing: float, ignore_index: int = -100) -> None:
    for name, value in (("logits", logits), ("labels", labels), ("ref_logits", ref_logits)):
        if not isinstance(value, Tensor) and not (name == "ref_logits" and value is None):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")
    check_ignore_index(ignore_index)
    if kl and ref_logits is None:
        raise ValueError("kl=True needs ref_logits, the reference policy's logits; got None")
    if ref_logits is not None and not kl:
        raise ValueError("ref_logits is used by kl=True alone; got ref_logits with kl=False")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1]; got {label_smoothing}")


def as_softcap(softcap: float | None) -> float:
    if softcap is None:
        return 0.0
    if not softcap > 0:
        raise ValueError(f"softcap must be None or a finite number above 0; got {softcap}")
    return softcap
