"""What the token operators may be called with. Whatever passes is safe for a kernel as a raw pointer.

`token_call` takes the arguments as a user gives them, and makes a `TokenCall` of those that are of the right types: the
one object that is passed from then on. `check_call` looks at its tensors. It comes second, and is left out where the
CPU's module looks at them itself, in a fraction of the time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._backends import TokenCall

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INDICES = (torch.int64, torch.int32)


def shape_of(t: Tensor) -> str:
    return str(list(t.shape))


# ----------------------------------------------------------------------------------------------------- from the outside
def token_call(
    logits: Any,
    labels: Any,
    ref_logits: Any = None,
    ignore_index: Any = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> TokenCall:
    """The call, of arguments whose types are right. Raises TypeError, and ValueError for a number out of range."""
    if not (isinstance(logits, Tensor) and isinstance(labels, Tensor)):
        check_tensor("logits", logits)
        check_tensor("labels", labels)
    if ref_logits is not None:
        check_tensor("ref_logits", ref_logits)
    check_ignore_index(ignore_index)
    cap = 0.0 if softcap is None else as_softcap(softcap)
    return TokenCall(logits, labels, ref_logits, ignore_index, temperature, cap)


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")


def check_ignore_index(value: Any) -> int:
    """Raises unless it is an integer that int64 holds."""
    if type(value) is not int and (isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__")):
        raise TypeError(f"ignore_index must be an int; got {type(value).__name__} {value!r}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"ignore_index must fit into int64; got {value}")
    return value


def as_softcap(softcap: float | None) -> float:
    """As a number, 0 for none."""
    if softcap is None:
        return 0.0
    if not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be None or a finite number above 0; got {softcap}")
    return softcap


def check_kl(kl: bool, ref_logits: Tensor | None) -> None:
    if kl and ref_logits is None:
        raise ValueError("kl=True needs ref_logits, the reference policy's logits; got None")
    if ref_logits is not None and not kl:
        raise ValueError("ref_logits is used by kl=True alone; got ref_logits with kl=False")


def check_smoothing(label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1]; got {label_smoothing}")


# ------------------------------------------------------------------------------------------------------- of its tensors
def check_call(call: TokenCall, inplace: bool = False) -> None:
    """Everything that can be known without reading memory. Raises ValueError or TypeError.

    Args:
        inplace: the gradient is to be written over the logits.
    """
    logits, labels, reference, _, temperature, softcap = call
    check_dtype("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits must have a non-empty vocabulary as their last dimension; got shape {shape_of(logits)}"
        )
    check_labels(labels, "logits without the vocabulary", logits.shape[:-1], "logits", logits.device)
    if reference is not None:
        _check_reference(reference, logits)
    check_positive("temperature", temperature)
    if not 0 <= softcap < math.inf:  # of the operator: 0 is none
        raise ValueError(f"softcap must be None or a finite number above 0; got {softcap}")
    if inplace and any(n > 1 and s == 0 for n, s in zip(logits.shape, logits.stride(), strict=True)):
        raise ValueError(
            "inplace_backward needs logits whose elements do not share memory; got an expanded tensor with strides "
            f"{tuple(logits.stride())}"
        )


def check_dtype(name: str, t: Tensor) -> None:
    if t.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64; got {t.dtype}")


def check_labels(labels: Tensor, of: str, shape: torch.Size, beside: str, device: torch.device) -> None:
    """Raises unless they have the shape of something and lie beside a tensor. Whether they are in range is seen where
    they are read."""
    if labels.dtype not in _INDICES:
        raise TypeError(f"labels must be int64 or int32; got {labels.dtype}")
    if labels.shape != shape:
        raise ValueError(f"labels must have the shape of {of}, {list(shape)}; got {shape_of(labels)}")
    if labels.device != device:
        raise ValueError(f"labels must be on the device of {beside}, {device}; got {labels.device}")


def check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0; got {value}")


def _check_reference(reference: Tensor, logits: Tensor) -> None:
    if reference.dtype != logits.dtype:
        raise TypeError(f"ref_logits must have the dtype of logits, {logits.dtype}; got {reference.dtype}")
    if reference.shape != logits.shape:
        raise ValueError(f"ref_logits must have the shape of logits, {shape_of(logits)}; got {shape_of(reference)}")
    if reference.device != logits.device:
        raise ValueError(f"ref_logits must be on the device of logits, {logits.device}; got {reference.device}")
    if reference.requires_grad:
        raise ValueError(
            "ref_logits must not require a gradient (the reference is a constant); pass ref_logits.detach()"
        )


def as_saved(call: TokenCall, saved: Tensor, entropy: Tensor | None, kl: Tensor | None) -> bool:
    """Whether tensors that come back from autograd are such as a forward saved: hooks on saved tensors may change them.

    What a kernel needs to stay within their memory, in a third of the time of the checks that name what is wrong.
    """
    logits, labels, reference = call[:3]
    number, dtype, device = labels.numel(), saved.dtype, logits.device
    return (
        dtype is (torch.float64 if logits.dtype is torch.float64 else torch.float32)
        and saved.numel() == 4 * number
        and logits.shape[:-1] == labels.shape
        and labels.dtype in _INDICES
        and labels.device == saved.device == device
        and (reference is None or _alike(reference, logits))
        and all(t is None or (t.dtype is dtype and t.numel() == number) for t in (entropy, kl))
    )


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype is other.dtype and one.device == other.device


# ---------------------------------------------------------------------------------------------------- for the kernels
def unit_stride(t: Tensor) -> Tensor:
    """The tensor itself where the vocabulary is dense in memory, else one copy of it; also a copy where a bit says that
    the tensor is the negative of what lies there."""
    t = t.resolve_neg()
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def dense(call: TokenCall) -> TokenCall:
    """The call with a vocabulary that is dense in memory, as kernels take it."""
    reference = None if call.reference is None else unit_stride(call.reference)
    return TokenCall(unit_stride(call.logits), call.labels, reference, *call[3:])


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes matrix products of the device in; None where it is off, or not known there (`meta`)."""
    name = device.type
    if not torch.amp.is_autocast_available(name) or not torch.is_autocast_enabled(name):
        return None
    return torch.get_autocast_dtype(name)
