"""A loss of pairs on the CPU, metrics and all, as one node of the graph and one raw call each way.

From sums of log-probabilities it is some forty tensor operations, each recorded: 200 us a step, whatever the size.
Losses that are weighted sums of -log sigmoid(z) and -log sigmoid(-z) have it; others go through the table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _backends, ops
from ._known_slopes import attach
from ._op_checks import as_softcap


def pair_loss(
    logits: Any,
    labels: Any,
    references: tuple[Any, Any],
    loss: tuple[float, float, float],
    *,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    inplace_backward: bool,
) -> tuple[Tensor, ...] | None:
    """(mean loss; rewards of the chosen and the rejected, margins, accuracies, sums of the chosen and the rejected).

    None where that is not known to be all right, as `mean_nll`: the general road then does it or says what is wrong.

    Args:
        logits: [2B, ..., V], the chosen ones first.
        labels: [2B, ...].
        references: [B] sums of the reference, float32 or float64, for both sides; or None for both.
        loss: (beta, a, b) of a -log sigmoid(z) + b -log sigmoid(-z) at z = beta ((w - ref_w) - (l - ref_l)).
        ignore_index, temperature, softcap, inplace_backward: as in `token_stats`.

    Raises:
        ValueError: a label outside [0, V).
    """
    if not ops.alone(logits, labels) or labels.dim() < 1:
        return None
    cpu = _backends.direct(logits)
    if cpu is None or (references[0] is None) != (references[1] is None):
        return None
    given = () if references[0] is None else references
    options = (ignore_index, temperature, 0.0 if softcap is None else as_softcap(softcap))
    wanted = logits.requires_grad and torch.is_grad_enabled()
    found = cpu.pair_loss(logits, labels, given, loss, options, wanted and inplace_backward)
    if found is None:
        return None
    mean, rows, slopes, kept = found
    if wanted:
        mean = attach(mean, logits, labels, slopes, kept, options, inplace_backward)
    return mean, *rows.unbind()
