"""What the head of a language model will take, before anything is run; `python -m fastalign.memory` prints it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .head import PLANS, HeadPlan, head_plan


class Estimate(NamedTuple):
    """Bytes that a way through the head takes at its peak, beyond inputs."""

    name: str
    peak: int
    gradients: int
    """Of these, the results of the backward: gradients of hidden, and of weight where it is trained."""
    gemms: int


def _eager_peak(logits: int, gradients: int, size: int) -> int:
    """Peak of `log_softmax(hidden @ weight.T)`, gather, and their backward, from the bytes of one [tokens, V] tensor.

    The gradient of log_softmax is formed from the kept log-probs and a [tokens, V] of zeros but for the labels; then,
    with the log-probs still there, it turns into the gradients of hidden and weight. In 16 bits the CPU takes one
    more tensor of that size on the way.
    """
    return max((3 if size > 2 else 4) * logits, 2 * logits + gradients)


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
    """Eager torch and every plan, for so many live tokens.

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
    found = [Estimate("eager", _eager_peak(logits, gradients, size), gradients, 2 if frozen else 3)]
    for name in PLANS:
        if name == "project" and (not frozen or kl):
            continue
        budget = 64 << 20 if chunk_bytes is None else chunk_bytes
        plan = head_plan(tokens, vocab, hidden, dtype, train_weight=not frozen, kl=kl, chunk_bytes=budget, plan=name)
        peak = _scratch(plan, tokens, hidden, size) + gradients
        sums = plan.scratch_bytes - plan.rows * plan.columns * size if name == "objective" and not kl else 0
        if sums:  # the gradients are made from them when the last part's logits are gone
            peak -= min(gradients, plan.rows * plan.columns * size)
        found.append(Estimate(name, peak, gradients, plan.gemms))
    return found


def _scratch(plan: HeadPlan, tokens: int, hidden: int, size: int) -> int:
    if plan.name in ("project", "objective"):
        return plan.scratch_bytes
    # Where the vocabulary comes in parts, a product [tokens, H] is added to the gradient of hidden for each of them.
    return plan.scratch_bytes + (tokens * hidden * size if plan.name == "recompute" and size == 2 else 0)
