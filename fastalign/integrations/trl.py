"""TRL: its trainers on our kernels, their losses untouched.

    from fastalign.integrations import trl as fused
    fused.patch()  # then use TRL's SFT, DPO, KTO, GRPO and RLOO trainers as before
    fused.unpatch()

TRL's trainers ask one function for log-probabilities and statistics from hidden states, and three for those of logits.
`patch` puts ours in their places, wherever TRL has imported them; no loss is copied. TRL 1.15 and 1.16 were tested; a
later one whose functions take the same arguments is served with a warning, and one that lacks a function (before 1.15
each trainer has its own) or whose functions take others is refused before anything is changed.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..head.head import head_token_stats
from ..ops import statistics as ops
from ..ops.results import DIAGNOSTICS

__all__ = [
    "ChunkedLogProbFunction",
    "entropy_from_logits",
    "patch",
    "patched",
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
    "unpatch",
]

VERSIONS = ("1.15", "1.16")
"""Versions of TRL under which all five trainers were tested; the arguments of its functions decide about others."""

_DIAGNOSTICS = DIAGNOSTICS[:3]  # those that TRL knows
_OUTPUTS = ("entropy", *_DIAGNOSTICS)
_TOKENS = 4096  # rows of TRL's own tile: with its chunk_size they bound the memory for logits


class ChunkedLogProbFunction:
    """`trl.kernels.ChunkedLogProbFunction` over `fastalign.head_token_stats`."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = _OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Log-probability of each target, and what `outputs` names of entropy, log sum p^2, mean logit, is it top-1.

        Args:
            hidden: [N, H].
            weight: [V, H], `bias` [V].
            targets: [N].
            temperature: divides the logits, after scale and soft-cap.
            chunk_size: 4096 times so many logits may be held at once.
            final_logit_softcapping, logit_scale: the model's own; scale first.
            outputs: "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"; "log_probs" is always there.

        Returns:
            Five [N], None for what was not asked for. Log-probabilities and entropy are differentiable, as in TRL.

        Raises:
            ValueError: an output of another name; a weight that DeepSpeed's ZeRO-3 will take away before the backward.
        """
        unknown = [name for name in outputs if name not in (*_OUTPUTS, "log_probs")]
        if unknown:
            raise ValueError(f"outputs must be among log_probs, {', '.join(_OUTPUTS)}; got {unknown[0]!r}")
        if hasattr(weight, "ds_id"):
            raise ValueError("DeepSpeed ZeRO-3 is not supported by the fused head: use unpatch(), ZeRO-2 or FSDP2")
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        size = (torch.get_autocast_dtype(device) if autocast else hidden.dtype).itemsize
        stats = head_token_stats(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            entropy="entropy" in outputs,
            diagnostics=[name for name in _DIAGNOSTICS if name in outputs],
            chunk_bytes=_TOKENS * chunk_size * size,
        )
        return stats.logps, stats.entropy, stats.log_sum_sq_probs, stats.mean_logits, stats.is_top1


def _labels(index: Tensor, row_mask: Tensor | None) -> Tensor:
    return index if row_mask is None else torch.where(row_mask == 0, -100, index)


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probabilities of chosen tokens, as `trl.trainer.utils.selective_log_softmax`.

    Args:
        logits: [..., V].
        index: [...], or [..., K] for K tokens of each row.
        temperature: divides the logits.
        row_mask: of the index's shape; rows of 0 are not read and give 0.

    Returns:
        Of the index's shape, float32 (float64 for float64) whatever the dtype of the logits.

    Raises:
        TypeError, ValueError: as `token_stats`.
    """
    if index.dim() < logits.dim():
        return ops.token_logps(logits, _labels(index, row_mask), temperature=temperature)
    # The K tokens of a row share its lse.
    rows = None if row_mask is None else row_mask.any(-1) if row_mask.dim() == index.dim() else row_mask
    lse = ops.token_stats(logits, _labels(index[..., 0], rows), temperature=temperature).lse
    chosen = logits.gather(-1, index).to(lse.dtype) / temperature - lse.unsqueeze(-1)
    if row_mask is None:
        return chosen
    return torch.where((row_mask if row_mask.dim() == index.dim() else row_mask.unsqueeze(-1)) == 0, 0, chosen)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy of each row in nats, as `trl.trainer.utils.entropy_from_logits`: [..., V] to [...]; in float32.

    `chunk_size` is there for its sake and unused: nothing of the size of the logits is made.
    """
    index = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return ops.token_stats(logits, index, entropy=True).entropy  # type: ignore[return-value]


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both of one read, as `trl.trainer.utils.selective_log_softmax_and_entropy`; index [...], results float32."""
    stats = ops.token_stats(logits, _labels(index, row_mask), temperature=temperature, entropy=True)
    entropy: Any = stats.entropy
    return stats.logps, entropy if entropy_requires_grad else entropy.detach()


# ---------------------------------------------------------------------------------------------------- into TRL's place
_REPLACED: dict[str, Callable[..., Any] | type] = {
    "ChunkedLogProbFunction": ChunkedLogProbFunction,
    "selective_log_softmax": selective_log_softmax,
    "entropy_from_logits": entropy_from_logits,
    "selective_log_softmax_and_entropy": selective_log_softmax_and_entropy,
}
_originals: dict[str, Any] = {}  # name → TRL's own, while ours stand in their places


def _found() -> dict[str, Any]:
    """TRL's own functions; ValueError naming what is not as it was when this was written."""
    import trl
    import trl.trainer.utils as utils

    try:
        import trl.kernels.chunked_logprob as kernels
    except ImportError as error:
        raise ValueError(
            f"TRL {trl.__version__} has no trl.kernels.chunked_logprob ({error}); 1.15 and later have it, 1.15 where "
            "the package triton is installed"
        ) from error

    found = {name: getattr(kernels if name in vars(kernels) else utils, name, None) for name in _REPLACED}
    for name, theirs in found.items():
        if theirs is None:
            raise ValueError(f"TRL {trl.__version__} has no {name}")
        ours = _arguments(_REPLACED[name])
        if _arguments(theirs) != ours:
            raise ValueError(f"TRL {trl.__version__}: {name} must take {ours}; it takes {_arguments(theirs)}")
    if utils._ChunkedLogProbFunction is not found["ChunkedLogProbFunction"]:
        raise ValueError(f"TRL {trl.__version__}: its fused head has been replaced by other code already")
    if ".".join(trl.__version__.split(".")[:2]) not in VERSIONS:
        warnings.warn(
            f"TRL {trl.__version__} was not tested; its functions take what those of {' and '.join(VERSIONS)} take",
            stacklevel=3,
        )
    return found


def _arguments(target: Any) -> list[str]:
    function = target.apply if target is ChunkedLogProbFunction else getattr(target, "forward", target)
    return [name for name in inspect.signature(function).parameters if name != "ctx"]


def _swap(old: Any, new: Any) -> None:
    """In every module of TRL that has been imported; those to come import from these."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "trl" and module is not None:
            for key in [key for key, value in vars(module).items() if value is old]:
                setattr(module, key, new)


def patch() -> None:
    """Puts our functions where TRL's stand; a second call changes nothing.

    Trainers that exist already use them too, from their next step on.

    Raises:
        ValueError: a function of TRL that is not there or takes other arguments; then nothing was changed.
        ModuleNotFoundError: TRL is not installed.
    """
    if _originals:
        return
    _originals.update(_found())
    for name, theirs in _originals.items():
        _swap(theirs, _REPLACED[name])


def unpatch() -> None:
    """Gives TRL its own functions back; without `patch` before, nothing happens."""
    for name, theirs in _originals.items():
        _swap(_REPLACED[name], theirs)
    _originals.clear()


@contextmanager
def patched() -> Iterator[None]:
    """`patch` for a `with` block."""
    patch()
    try:
        yield
    finally:
        unpatch()
