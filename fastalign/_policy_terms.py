"""A policy objective with its metrics on the CPU, as one node of the graph and one raw call each way.

From log-probabilities it is some ninety tensor operations, each recorded: 300 us a step, whatever the size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _backends, ops
from ._backends import Objective
from ._known_slopes import attach
from ._op_checks import as_softcap


def policy_terms(
    logits: Any,
    labels: Any,
    inputs: tuple[Any, Any, Any],
    objective: Objective,
    over: float = 0,
    *,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    inplace_backward: bool,
) -> tuple[Tensor, ...] | None:
    """(loss; policy term, KL, approximate KL to the old policy, share of tokens that were cut, mean ratio), scalars.

    None where that is not known to be all right, as `mean_nll`: the general road then does it or says what is wrong.

    Args:
        logits: [..., T, V].
        labels: [..., T].
        inputs: old_logps [..., T], advantages [..., T] or [...], and ref_logps [..., T] or None; float32 constants.
        objective: of independent tokens, without entropy, exact KL, label smoothing and z-loss; its KL is reported
            whatever its coefficient.
        over: what the losses are divided by; 0: the number of tokens that count.
        ignore_index, temperature, softcap, inplace_backward: as in `token_stats`.

    Raises:
        ValueError: a label outside [0, V).
    """
    if not ops.alone(logits, labels) or labels.dim() < 1:
        return None
    cpu = _backends.direct(logits)
    if cpu is None:
        return None
    options = (ignore_index, temperature, 0.0 if softcap is None else as_softcap(softcap))
    wanted = logits.requires_grad and torch.is_grad_enabled()
    found = cpu.policy_loss(logits, labels, inputs, objective, over, options, wanted and inplace_backward)
    if found is None:
        return None
    results, slopes, kept = found
    loss, *rest = results.unbind()
    if wanted:
        loss = attach(loss.clone(), logits, labels, slopes, kept, options, inplace_backward)
    return loss, *rest
