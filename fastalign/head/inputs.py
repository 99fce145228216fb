"""From the arguments of a head's statistics to the tokens that count: checked, gathered, masked ones dropped."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.call import autocast_dtype
from ..ops.results import TokenStats, smoothed
from .checks import check_head, check_labels, check_options, check_places, check_reference, check_rows
from .tiles import Problem, Projection

Weights = tuple[Tensor, Tensor, Tensor | None]


class Live(NamedTuple):
    """The tokens that count, and the way back to the shape of the labels."""

    problem: Problem
    tokens: Tensor
    """[M, H], hidden states, with their gradient's path."""
    places: Tensor | None
    """[M], places of the live tokens among all labels; None: all of them."""
    shape: torch.Size
    """Of the labels."""
    label_smoothing: float

    def spread(
        self, logps: Tensor, lse: Tensor, entropy: Tensor | None, kl: Tensor | None, mean: Tensor | None
    ) -> TokenStats:
        """TokenStats of the labels' shape from those of live tokens; 0 at the others."""
        if self.label_smoothing and mean is not None:
            logps = smoothed(logps, lse, mean, self.label_smoothing)
        return TokenStats(*map(self.place, (logps, lse, entropy, kl)))  # type: ignore[arg-type]

    def place(self, t: Tensor | None) -> Tensor | None:
        """Of the labels' shape, from one number for each live token."""
        if t is None or self.places is None:
            return None if t is None else t.view(self.shape)
        return t.new_zeros(self.shape.numel()).index_copy(0, self.places, t).view(self.shape)


def live_problem(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    reference: tuple[Tensor, Tensor, Tensor | None] | None,
    rows: Tensor | None,
    *,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    label_smoothing: float,
    entropy: bool,
) -> Live:
    """Checks everything, then drops what is ignored. Arguments as in `fastalign.head_token_stats`."""
    check_head("", hidden, weight, bias)
    shape = hidden.shape[:-1] if rows is None else check_rows(hidden, rows)
    cap = check_options(hidden, shape, labels, ignore_index, temperature, softcap, logit_scale, label_smoothing)
    if reference is not None:
        with torch.no_grad():
            reference = plain_head(*reference)
        check_reference(hidden, weight, *reference)
    live = (labels.long() != ignore_index).reshape(-1)
    check_labels(labels, live, ignore_index, weight.shape[0])
    # Without data nobody knows which tokens count: all of them do.
    found = None if labels.is_meta else live.nonzero().squeeze(-1)
    index = None if found is None or found.shape[0] == live.shape[0] else found
    places = index
    if rows is not None:
        places = rows.reshape(-1) if index is None else rows.reshape(-1).index_select(0, index)
        check_places(places, hidden.shape[:-1].numel())

    def chosen(t: Tensor) -> Tensor:
        flat = t.reshape(-1, t.shape[-1])
        return flat if places is None else flat.index_select(0, places)

    tokens = chosen(hidden)
    projection = None
    if reference is not None:
        ref_hidden, ref_weight, ref_bias = reference
        projection = Projection(chosen(ref_hidden.detach()), ref_weight.detach(), _detached(ref_bias))
    problem = Problem(
        Projection(tokens.detach(), weight.detach(), _detached(bias)),
        projection,
        labels.reshape(-1) if index is None else labels.reshape(-1).index_select(0, index),
        # s * cap' * tanh(u / cap') / T with cap' = cap / s: the scale is a temperature.
        temperature / logit_scale,
        cap / logit_scale,
        entropy,
        label_smoothing != 0.0,
    )
    return Live(problem, tokens, index, labels.shape, label_smoothing)


def plain_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Weights:
    """Gathered from their shards, and as autocast would make a linear layer's arguments."""
    weight, bias = gathered(weight), gathered(bias)
    dtype = autocast_dtype(hidden.device) if isinstance(hidden, Tensor) else None
    if dtype is None or hidden.dtype == torch.float64:
        return hidden, weight, bias
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def gathered(t: Any) -> Any:
    """The whole of a sharded parameter (FSDP2's DTensor).

    Each process has tokens of its own, so what it finds is its part of the gradient: averaged over the processes and
    cut into their shards again, as FSDP does.
    """
    if not hasattr(t, "full_tensor"):
        return t
    from torch.distributed.tensor import Partial

    whole = t.full_tensor(grad_placements=[Partial()] * t.device_mesh.ndim)
    processes = t.device_mesh.size()
    if whole.requires_grad:  # not Partial("avg"), which gloo cannot reduce
        whole.register_hook(lambda gradient: gradient / processes)
    return whole


def _detached(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach()
