"""What the head of a language model will take, before anything is run; `python -m fastalign.memory` prints it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .gemm_copies import Copies, gemm_copies
from .plan import PLANS, HeadPlan, head_plan
from .products import logits_dtype, quick


class Estimate(NamedTuple):
    """Bytes that a way through the head takes at its peak, beyond inputs."""

    name: str
    peak: int
    gradients: int
    """Of these, the results of the backward: gradients of hidden, and of weight where it is trained."""
    gemms: int


def _eager_peak(logits: int, gradients: int, size: int, copies: int) -> int:
    """Peak of `log_softmax(hidden @ weight.T)`, gather, and their backward, from the bytes of one [tokens, V] tensor.

    The gradient of log_softmax is formed from the kept log-probs and a [tokens, V] of zeros but for the labels; then,
    with the log-probs gone, it turns into the gradients of hidden and weight, `copies` being the larger float32 copy
    that the products make. In 16 bits the CPU takes one more tensor of that size on the way.
    """
    return max((3 if size > 2 else 4) * logits, logits + gradients + copies)


def estimates(
    tokens: int,
    vocab: int,
    hidden: int,
    dtype: torch.dtype,
    *,
    frozen: bool = False,
    kl: bool = False,
    chunk_bytes: int | None = None,
) -> list[Estimate]:
    """Eager torch and every plan, for so many valid tokens, on this machine's CPU: see `gemm_copies`.

    Args:
        tokens, vocab, hidden: M, V and H.
        dtype: of hidden states and logits.
        frozen: no gradient for the weight.
        kl: an exact KL against a reference head.
        chunk_bytes: budget of the plans that take one; None: 64 MiB.
    """
    size = torch.empty(0, dtype=dtype).element_size()
    gradients = tokens * hidden * size + (0 if frozen else vocab * hidden * size)
    # An eager KL holds the reference's log-probs and the products under the sum as well.
    logits = tokens * vocab * size * (2 if kl else 1)
    copies = gemm_copies(dtype)
    backward = _backward_copies(copies, tokens, vocab, hidden, frozen)
    found = [Estimate("eager", _eager_peak(logits, gradients, size, backward), gradients, 2 if frozen else 3)]
    for name in PLANS:
        if name == "project" and (not frozen or kl):
            continue
        budget = 64 << 20 if chunk_bytes is None else chunk_bytes
        plan = head_plan(tokens, vocab, hidden, dtype, train_weight=not frozen, kl=kl, chunk_bytes=budget, plan=name)
        peak = _peak(plan, dtype, tokens, vocab, hidden, gradients, frozen, kl)
        found.append(Estimate(name, peak, gradients, plan.gemms))
    return found


def _own_copies(plan: HeadPlan, dtype: torch.dtype, tokens: int, vocab: int) -> Copies:
    """What the products of a plan take: sums over tiles have no copy, and products that are not torch's one of what is
    to be rounded."""
    whole = gemm_copies(dtype) if quick(dtype, torch.device("cpu")) else Copies(0, 4, 4)
    return Copies(
        whole.logits,
        whole.hidden if plan.columns >= vocab else 0,
        whole.weight if plan.rows >= tokens else 0,
    )


def _backward_copies(copies: Copies, rows: int, columns: int, hidden: int, frozen: bool) -> int:
    """Bytes of the larger copy that the two products of a tile's backward make, one after the other."""
    return max(copies.hidden * rows * hidden, 0 if frozen else copies.weight * columns * hidden)


def _peak(
    plan: HeadPlan,
    dtype: torch.dtype,
    tokens: int,
    vocab: int,
    hidden: int,
    gradients: int,
    frozen: bool,
    kl: bool,
) -> int:
    """Peak of a plan beyond inputs, the gradients included."""
    size, copies = dtype.itemsize, _own_copies(plan, dtype, tokens, vocab)
    tile, logits = plan.rows * plan.columns, logits_dtype(None, dtype, torch.device("cpu")).itemsize
    forward = copies.logits * tile
    backward = _backward_copies(copies, plan.rows, plan.columns, hidden, frozen)
    peak = plan.scratch_bytes + gradients
    if plan.name == "keep":  # the gradients are not there yet when the logits are formed
        return max(plan.scratch_bytes + forward, peak + backward)
    if plan.name == "recompute" and not frozen:
        # Memory is taken when it is written: the weight's gradient for the last, narrower tile not before that tile.
        rest = vocab % plan.columns
        last = _backward_copies(copies, plan.rows, rest, hidden, frozen)
        return peak + max(forward - rest * hidden * size, backward - rest * hidden * size, last)
    sums = plan.scratch_bytes - tile * logits if plan.name == "objective" and not kl else 0
    if sums:  # the gradients are made from them when the last part's logits are gone
        return plan.scratch_bytes + max(backward, forward, gradients - min(gradients, tile * logits))
    return peak + max(forward, backward)
