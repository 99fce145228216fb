"""A loss of ranked lists with its metrics on the CPU, as one node of the graph and one raw call each way.

From log-probabilities it is some eighty tensor operations, each recorded: a millisecond a step, whatever the size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _backends, ops
from ._known_slopes import attach
from ._op_checks import as_softcap


def list_loss(
    logits: Any,
    labels: Any,
    size: int,
    *,
    first_alone: bool,
    average: bool,
    sft_average: bool,
    sft_weight: float,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    inplace_backward: bool,
) -> tuple[Tensor, ...] | None:
    """(loss; ranking term, supervised term, accuracy, top-1 accuracy, margin, scalars; number of lists, int64).

    None where that is not known to be all right, as `mean_nll`, and where a response has no label: the general road
    then does it or says what is wrong.

    Args:
        logits: [..., T, V], the responses of a list one after the other, best first.
        labels: [..., T].
        size: responses of a list.
        first_alone: InfoNCE, else Plackett-Luce.
        average: score responses by the mean over their tokens, else by the sum.
        sft_average: the same of the supervised term.
        sft_weight: its weight.
        ignore_index, temperature, softcap, inplace_backward: as in `token_stats`.

    Raises:
        ValueError: a label outside [0, V).
    """
    if not ops.alone(logits, labels) or labels.dim() < 1 or size < 2:
        return None
    cpu = _backends.direct(logits)
    if cpu is None:
        return None
    options = (ignore_index, temperature, 0.0 if softcap is None else as_softcap(softcap))
    wanted = logits.requires_grad and torch.is_grad_enabled()
    kinds = (first_alone, average, sft_average, sft_weight)
    found = cpu.list_loss(logits, labels, size, kinds, options, wanted and inplace_backward)
    if found is None:
        return None
    results, slopes, kept = found
    loss, *rest = results.unbind()
    if wanted:
        loss = attach(loss.clone(), logits, labels, slopes, kept, options, inplace_backward)
    return loss, *rest, torch.full_like(results[0], len(slopes) // size, dtype=torch.int64)
