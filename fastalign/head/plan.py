"""How a head's call will run: which plan, in tiles of what size, and what it takes."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, NamedTuple

import torch

from .products import logits_dtype as resolved_dtype

if TYPE_CHECKING:
    from .head import Head

PLANS = ("keep", "recompute", "project", "objective")
_TILE_BYTES = 64 << 20  # of a tile where the caller sets no budget: GEMMs of this size run at full speed
_WORTH = 256  # tokens of a part below which adding to the weight's gradient costs more than a GEMM done again
NARROWEST = 1024  # columns below which a GEMM over a part of the vocabulary loses speed


class HeadPlan(NamedTuple):
    """How a call of `head_token_stats` will run."""

    name: str
    """One of `PLANS`."""
    rows: int
    """Rows (valid tokens) of a tile of logits."""
    columns: int
    """Part of the vocabulary in a tile."""
    scratch_bytes: int
    """Memory beyond inputs and outputs: what is kept between forward and backward, and one tile."""
    gemms: int
    """Products of [tokens, H] with [H, V], forward and backward, of the policy."""


@functools.cache
def _memory_bytes(device: torch.device) -> int:
    """The device's memory, whoever uses it now: a plan that followed what is free would differ between two runs."""
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # no such call on this system
        return 16 << 30


def head_plan(
    tokens: int,
    vocab: int,
    hidden_size: int,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    train_hidden: bool = True,
    train_weight: bool = True,
    entropy: bool = False,
    kl: bool = False,
    chunk_bytes: int | None = None,
    plan: str | None = None,
    logits_dtype: torch.dtype | None = None,
) -> HeadPlan:
    """The plan that `head_token_stats` takes for so many valid tokens.

    Args:
        tokens, vocab, hidden_size: M, V and H.
        dtype: of the hidden states.
        logits_dtype: as in `head_token_stats`.
        train_hidden, train_weight: which gradients will be asked for; neither: nothing is kept.
        chunk_bytes: budget for logits, in bytes; None: an eighth of the device's memory.
        plan: forces one; ValueError for a name that is not in `PLANS`, or "project" with a trained head.
    """
    if plan is not None and plan not in PLANS:
        raise ValueError(f"plan must be None or one of {', '.join(PLANS)}; got {plan!r}")
    if plan == "project" and train_weight:
        raise ValueError("plan 'project' needs a frozen head; got a weight or bias that requires a gradient")
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be None or a number of bytes above 0; got {chunk_bytes}")
    size = dtype.itemsize
    logits = resolved_dtype(logits_dtype, dtype, torch.device(device))
    per_logit = logits.itemsize * (2 if kl else 1)
    whole = tokens * vocab * per_logit
    budget = _memory_bytes(torch.device(device)) // 8 if chunk_bytes is None else chunk_bytes
    tile = min(budget, _TILE_BYTES) if chunk_bytes is None else budget
    training = train_hidden or train_weight
    gemms = train_hidden + train_weight + 1
    if plan is None:
        frozen = training and not train_weight and not entropy and not kl
        plan = "keep" if whole <= budget else "project" if frozen else "recompute"
    if plan == "keep" and training:
        return HeadPlan("keep", max(tokens, 1), vocab, whole, gemms)
    if plan == "objective" and training:
        # Beside a part's logits: of several parts the weight's gradient is summed in float32.
        rows = max(1, min(tokens, (_TILE_BYTES if chunk_bytes is None else chunk_bytes) // (vocab * per_logit)))
        sums = 4 * vocab * hidden_size if train_weight and size == 2 and rows < tokens else 0
        return HeadPlan("objective", rows, vocab, rows * vocab * per_logit + sums, gemms)
    if plan == "project" and training:
        rows = max(1, min(tokens, tile // (vocab * per_logit)))
        return HeadPlan("project", rows, vocab, rows * vocab * per_logit + tokens * hidden_size * size, 2)
    columns = min(vocab, max(min(NARROWEST, vocab), tile // (max(tokens, 1) * per_logit) // 64 * 64))
    rows = max(1, min(tokens, tile // (columns * per_logit)))
    wide = 4 * tokens * hidden_size if train_hidden and columns < vocab and size == 2 else 0
    return HeadPlan("recompute", rows, columns, rows * columns * per_logit + wide, gemms + (1 if training else 0))


def part_rows(head: Head, tokens: int, trained: bool) -> int:
    """Tokens of a part where a loss module forms loss and gradients part by part; 0 where another plan serves.

    Args:
        tokens: valid ones of the batch.
        trained: weight or bias are.
    """
    vocab, size = head.weight.shape
    hidden = head.hidden
    per_token = vocab * resolved_dtype(head.logits_dtype, hidden.dtype, hidden.device).itemsize
    if head.plan == "objective":
        return max(1, (_TILE_BYTES if head.chunk_bytes is None else head.chunk_bytes) // per_token)
    plan = head_plan(
        *(tokens, vocab, size, hidden.dtype),
        device=hidden.device,
        train_weight=trained,
        chunk_bytes=head.chunk_bytes,
        logits_dtype=head.logits_dtype,
    )
    budget = _memory_bytes(hidden.device) // 8 if head.chunk_bytes is None else head.chunk_bytes
    rows = budget // per_token
    return rows if trained and plan.name == "recompute" and rows >= _WORTH else 0
