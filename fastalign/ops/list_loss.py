"""A loss of ranked lists with its metrics on the CPU, in one raw call each way (see `_known_slopes`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .known_slopes import direct_call


def list_loss(
    logits: Any, labels: Any, size: int, loss: tuple[bool, bool, bool, float], **options: Any
) -> tuple[Tensor, ...] | None:
    """(loss; ranking term, supervised term, accuracy, top-1 accuracy, margin, scalars; number of lists, int64).

    None where that is not known to be all right, and where a response has no label: the general road then does it or
    says what is wrong.

    Args:
        logits: [..., T, V], the responses of a list one after the other, best first.
        labels: [..., T].
        size: responses of a list.
        loss: whether it is InfoNCE and not Plackett-Luce, whether responses are scored by the mean over their tokens
            and not by the sum, the same of the supervised term, and its weight.
        options: ignore_index, temperature, softcap, inplace_backward, as in `token_stats`.

    Raises:
        ValueError: a label outside [0, V).
    """
    call = direct_call(logits, labels, **options)
    found = None
    if call is not None and size > 1:
        found = call.cpu.list_loss(logits, labels, size, loss, call.options, call.inplace)
    if call is None or found is None:
        return None
    results, slopes, kept = found
    loss_alone, *rest = results.unbind()
    lists = torch.full_like(loss_alone, len(slopes) // size, dtype=torch.int64)
    return call.attach(loss_alone.clone(), logits, labels, slopes, kept), *rest, lists
