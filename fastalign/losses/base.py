"""What every module of the losses shares: masked means, input checks, and the one path from logits to statistics."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..head.head import LogitsSource, ObjectiveSource, as_head
from ..ops import statistics as ops
from ..ops.call import TokenCall, as_softcap, check_ignore_index
from ..ops.programs import Symbol
from ..ops.sequences import cut, sequence_sums, sum_tokens, wide_dtype
from ..ops.transforms import transformed
from ..ops.uncompiled import uncompiled

__all__ = [
    "Logits",
    "LogitsLoss",
    "check_float",
    "check_logits",
    "check_mask",
    "check_range",
    "count_of",
    "hide",
    "lookup",
    "masked_mean",
    "mean_of",
    "mean_over",
    "narrow",
    "real_tokens",
    "renamed",
    "resolve",
    "stats_of",
    "sum_tokens",
    "total",
    "trains",
]

T = TypeVar("T")
Output = TypeVar("Output", bound=tuple[Any, ...])


Logits = Tensor | tuple[Any, ...] | LogitsSource
"""What a loss module takes: logits, or a `Head` or tuple (hidden, weight[, bias]) from which they would come."""


def check_logits(name: str, logits: Any) -> Tensor | LogitsSource:
    """The argument as a tensor or what stands for one, with the logits' shape; TypeError for anything else."""
    if isinstance(logits, tuple):  # a Head is one; asked first, since a compiler cannot look into the protocol
        return as_head(name, logits)
    return logits if not isinstance(logits, Tensor) and isinstance(logits, LogitsSource) else check_float(name, logits)


def trains(logits: Tensor) -> bool:
    """Whether a gradient may be formed with the loss: one is wanted, as a kernel gives it."""
    return torch.is_grad_enabled() and logits.requires_grad and not transformed(logits)


def stats_of(logits: Logits, labels: Tensor, *, inplace_backward: bool = False, **options: Any) -> ops.TokenStats:
    """Token statistics of what a loss module was given. Modules reach logits through here and nowhere else.

    A head's own logits are nobody else's: their gradient is always written in place.
    """
    source = check_logits("logits", logits) if not isinstance(logits, Tensor) else logits
    if not isinstance(source, Tensor):
        return source.stats(labels, **options)
    return ops.token_stats(source, labels, inplace_backward=inplace_backward, **options)


def _stepping_out(forward: Callable[..., Any]) -> Callable[..., Any]:
    outside = uncompiled(forward)
    names = tuple(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)
    def run(self: LogitsLoss, *args: Any, **kwargs: Any) -> Any:
        logits = args[0] if args else kwargs.get("logits")
        if isinstance(logits, Tensor) and not self.fuse_backward:
            return forward(self, *args, **kwargs)
        # A compiler cannot look into a protocol, nor has it to: a tensor is none.
        if not isinstance(logits, (Tensor, tuple)) and isinstance(logits, ObjectiveSource):
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            if "labels" in given and logits.gives_head(given.get("ref_logits")):
                return _within(outside, self, logits, given)
        return outside(self, *args, **kwargs)

    return run


def _within(forward: Callable[..., Any], module: LogitsLoss, source: ObjectiveSource, given: dict[str, Any]) -> Any:
    """A module's forward on the head that a source gives."""

    def objective(head: Any, reference: Any) -> Any:
        heads = {"logits": head} if reference is None else {"logits": head, "ref_logits": reference}
        return forward(module, **{**given, **heads})

    return source.loss(given["labels"], objective, given.get("ref_logits"))


class LogitsLoss(nn.Module):
    """Base of the modules that take logits: what each of them is told about these.

    Args:
        ignore_index, temperature, softcap, inplace_backward: as in `token_stats`.
    """

    fuse_backward = False

    def __init_subclass__(cls) -> None:
        """A compiler steps around a forward that works by tiles of a head, or whose kernel makes the gradient."""
        super().__init_subclass__()
        as_written = cls.__dict__.get("forward")
        if as_written is not None:
            cls.forward = _stepping_out(as_written)  # type: ignore[method-assign]

    def __init__(self, ignore_index: int, temperature: float, softcap: float | None, inplace_backward: bool) -> None:
        super().__init__()
        self.ignore_index, self.inplace_backward = check_ignore_index(ignore_index), inplace_backward
        self.stats_options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "temperature": temperature,
            "softcap": softcap,
        }

    def call(self, logits: Tensor, labels: Tensor, reference: Tensor | None = None) -> TokenCall:
        """The call on plain logits, as the mechanism takes it."""
        ignore_index, temperature, softcap = self.stats_options.values()
        return TokenCall(logits, labels, reference, ignore_index, temperature, as_softcap(softcap))

    def stats(self, logits: Logits, labels: Tensor, **more: Any) -> ops.TokenStats:
        """Token statistics of the policy's logits; `more` options as in `token_stats`."""
        return stats_of(logits, labels, inplace_backward=self.inplace_backward, **self.stats_options, **more)

    def sums(
        self, logits: Logits, labels: Tensor, parts: int, dtype: torch.dtype
    ) -> tuple[tuple[Tensor, ...], torch.dtype]:
        """Sums of the log-probabilities of each row's labels by the policy, in the given dtype and in equal parts of
        the rows; and the dtype that its statistics have."""
        if isinstance(logits, Tensor):
            options = self.stats_options
            found = sequence_sums(logits, labels, parts, dtype, inplace_backward=self.inplace_backward, **options)
            return found, torch.float64 if logits.dtype == torch.float64 else torch.float32
        logps = self.stats(logits, labels).logps
        return cut(sum_tokens(logps, dtype), parts), logps.dtype

    @torch.no_grad()
    def reference_logps(self, ref_logits: Logits, labels: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Sums of the log-probabilities of each row's labels by a reference: constants."""
        return sum_tokens(stats_of(ref_logits, labels, **self.stats_options).logps, dtype)


def renamed(name: str, value: T, old: str, given: T | None) -> T:
    """An argument under its name, unless it was given under its old one, which is deprecated."""
    if given is None:
        return value
    warnings.warn(f"{old} is called {name} now", DeprecationWarning, stacklevel=3)
    return given


def narrow(output: Output, dtype: torch.dtype) -> Output:
    """A loss's NamedTuple of tensors, all of one dtype, in the given one."""
    if output[0] is None or output[0].dtype == dtype:
        return output
    fields: list[Any] = [None if field is None else field.to(dtype) for field in output]
    return type(output)(*fields)


def hide(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask is True, else 0. Applied before any arithmetic, so hidden NaN and inf reach no gradient."""
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def total(x: Tensor) -> Tensor:
    """The sum of all, a scalar, added up in float64 where the device has it and rounded once."""
    return x.sum(dtype=wide_dtype(x)).to(x.dtype)


def mean_of(x: Any) -> Any:
    """Mean of all numbers, summed in float64 where the device has it: equal terms then have exactly that mean, so the
    first step of DPO reports ln 2 for any batch size. 0 for none."""
    if isinstance(x, Symbol):
        return x.mean()
    if x.numel() == 1:  # the same, in one operation of four
        return x.reshape(())
    return (x.sum(dtype=wide_dtype(x)) / max(x.numel(), 1)).to(x.dtype)


def count_of(x: Any) -> Any:
    """How many numbers there are."""
    return x.ones_like().sum() if isinstance(x, Symbol) else x.numel()


def masked_mean(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Mean of x over the True entries of the mask (along `dim`, or over all); 0 where there is none.

    The count is taken in x's dtype on x's device: no host synchronisation.
    """
    if dim is None:
        return mean_over(x, mask, real_tokens(mask, x.dtype))
    return hide(x, mask).sum(dim) / mask.sum(dim).clamp(min=1).to(x.dtype)


def real_tokens(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """How many entries of the mask are True, at least 1: what several means over it are divided by."""
    return mask.sum().clamp(min=1).to(dtype)


def mean_over(x: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """The sum of x over the True entries of the mask, over a count."""
    return total(hide(x, mask)) / count


def check_float(name: str, x: Any, shape: torch.Size | tuple[int, ...] | None = None, like: str = "") -> Tensor:
    """Raises unless x is a floating-point tensor, of the given shape if one is given (`like`: whose it is)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor; got {x.dtype}")
    return _check_shape(name, x, shape, like)


def check_mask(name: str, x: Any, shape: torch.Size | tuple[int, ...], like: str = "") -> Tensor:
    """Raises unless x is a boolean tensor of the given shape."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(x).__name__}")
    if x.dtype != torch.bool:
        raise TypeError(f"{name} must be a boolean tensor, True = real; got {x.dtype}")
    return _check_shape(name, x, shape, like)


def _check_shape(name: str, x: Tensor, shape: torch.Size | tuple[int, ...] | None, like: str) -> Tensor:
    if shape is not None and x.shape != tuple(shape):
        raise ValueError(
            f"{name} must have shape {list(shape)}{f', that of {like}' if like else ''}; got {list(x.shape)}"
        )
    return x


def lookup(argument: str, table: Mapping[str, T], key: str) -> T:
    """The entry of a table of variants, or a ValueError that lists the names there are."""
    if key not in table:
        raise ValueError(f"{argument} must be one of {', '.join(sorted(table))}; got {key!r}")
    return table[key]


def resolve(argument: str, table: Mapping[str, Any], aliases: Mapping[str, str], key: str) -> str:
    """The name that a table of variants has for what is also called otherwise; ValueError as `lookup`."""
    name = aliases.get(key, key)
    lookup(argument, table, name if name in table else key)
    return name


def check_range(name: str, value: float, low: float, high: float = float("inf"), *, open_low: bool = False) -> float:
    """Raises unless low <= value <= high (low < value with open_low); NaN never passes."""
    if not (low < value if open_low else low <= value) or not value <= high:
        bounds = f"{'(' if open_low else '['}{low}, {high}]"
        raise ValueError(f"{name} must be in {bounds}; got {value}")
    return value
