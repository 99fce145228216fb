"""A loss of pairs on the CPU, metrics and all, in one raw call each way (see `_known_slopes`).

Losses that are weighted sums of -log sigmoid(z) and -log sigmoid(-z) have it; others go through the table.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .known_slopes import direct_call


def pair_loss(
    logits: Any, labels: Any, references: tuple[Any, Any], loss: tuple[float, float, float], **options: Any
) -> tuple[Tensor, ...] | None:
    """(mean loss; rewards of the chosen and the rejected, margins, accuracies, sums of the chosen and the rejected).

    None where that is not known to be all right: the general road then does it or says what is wrong.

    Args:
        logits: [2B, ..., V], the chosen ones first.
        labels: [2B, ...].
        references: [B] sums of the reference, float32 or float64, for both sides; or None for both.
        loss: (beta, a, b) of a -log sigmoid(z) + b -log sigmoid(-z) at z = beta ((w - ref_w) - (l - ref_l)).
        options: ignore_index, temperature, softcap, inplace_backward, as in `token_stats`.

    Raises:
        ValueError: a label outside [0, V).
    """
    call = direct_call(logits, labels, **options)
    if call is None or (references[0] is None) != (references[1] is None):
        return None
    given = () if references[0] is None else references
    found = call.cpu.pair_loss(logits, labels, given, loss, call.options, call.inplace)
    if found is None:
        return None
    mean, rows, slopes, kept = found
    return call.attach(mean, logits, labels, slopes, kept), *rows.unbind()
