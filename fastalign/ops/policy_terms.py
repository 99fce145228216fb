"""A policy objective with its metrics on the CPU, in one raw call each way (see `_known_slopes`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._backends import Objective
from .known_slopes import direct_call


def policy_terms(
    logits: Any, labels: Any, inputs: tuple[Any, Any, Any], objective: Objective, over: float = 0, **options: Any
) -> tuple[Tensor, ...] | None:
    """(loss; policy term, KL, approximate KL to the old policy, share of tokens that were cut, mean ratio), scalars.

    None where that is not known to be all right: the general road then does it or says what is wrong.

    Args:
        logits: [..., T, V].
        labels: [..., T].
        inputs: old_logps [..., T], advantages [..., T] or [...], and ref_logps [..., T] or None; float32 constants.
        objective: of independent tokens, without entropy, exact KL, label smoothing and z-loss; its KL is reported
            whatever its coefficient.
        over: what the losses are divided by; 0: the number of tokens that count.
        options: ignore_index, temperature, softcap, inplace_backward, as in `token_stats`.

    Raises:
        ValueError: a label outside [0, V).
    """
    call = direct_call(logits, labels, **options)
    found = None
    if call is not None:
        found = call.cpu.policy_loss(logits, labels, inputs, objective, over, call.options, call.inplace)
    if call is None or found is None:
        return None
    results, slopes, kept = found
    loss, *rest = results.unbind()
    return call.attach(loss.clone(), logits, labels, slopes, kept), *rest
