"""From the arguments of a head's statistics to the tokens that count: checked, gathered, masked ones dropped."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _backends
from ..ops.call import (
    as_softcap,
    autocast_dtype,
    check_ignore_index,
    check_labels,
    check_positive,
    check_smoothing,
    check_tensor,
)
from ..ops.results import TokenStats, smoothed
from .checks import check_head, check_places, check_reference, check_rows
from .products import logits_dtype as resolved_dtype
from .tiles import Problem, Projection

Weights = tuple[Tensor, Tensor, Tensor | None]


class HeadCall(NamedTuple):
    """The arguments of a head's statistics, checked once and passed whole; what `TokenCall` is for logits.

    Its logits are hidden @ weight.T + bias: their scale s is a part of temperature and soft-cap.
    """

    hidden: Tensor
    """[..., H]."""
    weight: Tensor
    """[V, H]."""
    bias: Tensor | None
    """[V]."""
    labels: Tensor
    """[...]."""
    reference: Weights | None
    """Hidden states, weight and bias of the exact KL's reference; constants."""
    rows: Tensor | None
    """[...], which hidden state predicts each label; None: its own."""
    ignore_index: int
    temperature: float
    softcap: float
    """0: none."""
    label_smoothing: float
    entropy: bool
    logits_dtype: torch.dtype

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        reference: Weights | None,
        rows: Tensor | None,
        *,
        ignore_index: int = -100,
        temperature: float = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        label_smoothing: float = 0.0,
        entropy: bool = False,
        logits_dtype: torch.dtype | None = None,
    ) -> HeadCall:
        """Of arguments as `fastalign.head_token_stats` takes them; its errors."""
        check_head("", hidden, weight, bias)
        shape = hidden.shape[:-1] if rows is None else check_rows(hidden, rows)
        check_tensor("labels", labels)
        check_labels(labels, "hidden without H, or of rows", shape, "hidden", hidden.device)
        check_ignore_index(ignore_index)
        check_positive("temperature", temperature)
        check_positive("logit_scale", logit_scale)
        check_smoothing(label_smoothing)
        cap = as_softcap(softcap)
        if reference is not None:
            with torch.no_grad():
                reference = plain_head(*reference)
            check_reference(hidden, weight, *reference)
        # s cap' tanh(u / cap') / T with cap' = cap / s: the scale is a temperature.
        scaled = (temperature / logit_scale, cap / logit_scale)
        dtype = resolved_dtype(logits_dtype, hidden.dtype, hidden.device)
        return cls(
            *(hidden, weight, bias, labels, reference, rows, ignore_index), *scaled, label_smoothing, entropy, dtype
        )


class ValidTokens(NamedTuple):
    """The tokens that count, and the way back to the shape of the labels."""

    problem: Problem
    tokens: Tensor
    """[M, H], hidden states, with their gradient's path."""
    places: Tensor | None
    """[M], places of the valid tokens among all labels; None: all of them."""
    shape: torch.Size
    """Of the labels."""
    label_smoothing: float

    def spread(
        self, logps: Tensor, lse: Tensor, entropy: Tensor | None, kl: Tensor | None, mean: Tensor | None
    ) -> TokenStats:
        """TokenStats of the labels' shape from those of valid tokens; 0 at the others."""
        if self.label_smoothing and mean is not None:
            logps = smoothed(logps, lse, mean, self.label_smoothing)
        return TokenStats(*map(self.place, (logps, lse, entropy, kl)))  # type: ignore[arg-type]

    def place(self, t: Tensor | None, ignored: int = 0) -> Tensor | None:
        """Of the labels' shape, from one number for each valid token; `ignored`: that of the others."""
        if t is None or self.places is None:
            return None if t is None else t.view(self.shape)
        return t.new_full((self.shape.numel(),), ignored).index_copy(0, self.places, t).view(self.shape)


def valid_problem(call: HeadCall) -> ValidTokens:
    """Drops what is ignored."""
    hidden, weight, bias, labels, reference, rows, ignore_index, temperature, softcap = call[:9]
    label_smoothing, entropy, dtype = call[9:]
    _backends.check_labels(labels, ignore_index, weight.shape[0])
    valid = (labels.long() != ignore_index).reshape(-1)
    # Without data nobody knows which tokens count: all of them do.
    found = None if labels.is_meta else valid.nonzero().squeeze(-1)
    index = None if found is None or found.shape[0] == valid.shape[0] else found
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
        temperature,
        softcap,
        entropy,
        label_smoothing != 0.0,
        dtype,
    )
    return ValidTokens(problem, tokens, index, labels.shape, label_smoothing)


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
