"""Statistics as plain torch operations, for whoever differentiates in another way than the kernels can: in forward mode
(`torch.func.jvp`, dual tensors), by `torch.func.grad`, `vmap` and their compositions, with batched gradients.

A kernel sees memory, of which a tangent or a batch of a transform is no part: it would be left out without a word.
These operations are differentiable any number of times, and keep numbers of the logits' size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from .. import _backends
from ..utils import private
from ..utils.private import dual_levels
from .call import TokenCall, check_call

# Bound here: looking them up takes longer than they do.
active = private.transforms_active
_keys, _BATCHED = private.dispatch_keys, private.BATCHED


def has_tangent(*tensors: Any) -> bool:
    """Whether one of the tensors is dual: it carries a tangent of forward-mode differentiation."""
    if dual_levels._current_level < 0:
        return False
    return any(isinstance(t, Tensor) and dual_levels.unpack_dual(t).tangent is not None for t in tensors)


def transformed(*tensors: Any) -> bool:
    """Whether a transform of functions is at work or a tensor carries a tangent. Compilers bring their own ways."""
    return not torch.compiler.is_compiling() and (active() or has_tangent(*tensors))


def _without_levels(t: Tensor) -> Tensor | None:
    """What a transform made a tensor of, before; None for a batch, of which nobody can ask a number."""
    while private.is_of_transform(t):
        if private.is_batch_of_transform(t):
            return None
        t = private.without_transform(t)
    return t


def statistics(
    call: TokenCall, diagnostics: Collection[str] = ()
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor], dict[str, Tensor]]:
    """(logps, lse, entropy, kl, mean), [...] each, and the diagnostics that are asked for; 0 where ignored."""
    check_call(call)
    logits, labels, reference, ignore_index, temperature, softcap = call
    plain = _without_levels(labels)
    if plain is not None:
        _backends.check_labels(plain, ignore_index, logits.shape[-1])
    valid = labels.long() != ignore_index
    target = torch.where(valid, labels.long(), 0).unsqueeze(-1)

    def scaled(x: Tensor) -> Tensor:
        x = torch.where(valid.unsqueeze(-1), x.to(torch.promote_types(x.dtype, torch.float32)), 0)
        return (softcap * torch.tanh(x / softcap) if softcap else x) / temperature

    x = scaled(logits)
    lse = x.logsumexp(-1)
    logp = x - lse.unsqueeze(-1)
    p = logp.exp()
    finite = torch.where(p == 0, 0, logp)  # 0 log 0 = 0
    kl = None
    if reference is not None:
        logq = torch.log_softmax(scaled(reference).detach(), -1)
        kl = (p * torch.where(p == 0, 0, finite - logq)).sum(-1)
    found = (logp.gather(-1, target).squeeze(-1), lse, -(p * finite).sum(-1), kl, x.mean(-1))

    def best() -> Tensor:
        return torch.where(valid & lse.isfinite(), logits.argmax(-1), -1)

    more = {
        "log_sum_sq_probs": lambda: (2 * logp).logsumexp(-1),
        "mean_logits": lambda: x.mean(-1),
        "is_top1": lambda: (best() == target.squeeze(-1)) & valid,
        "argmax": best,
    }

    def shown(t: Any) -> Any:
        return None if t is None else torch.where(valid, t, torch.zeros((), dtype=t.dtype, device=t.device))

    constants = {name: more[name]().detach() for name in diagnostics}
    shown_too = {name: t if name == "argmax" else shown(t) for name, t in constants.items()}
    return tuple(map(shown, found)), shown_too  # type: ignore[return-value]


def batched(*grads: Tensor | None) -> bool:
    """Whether gradients are a batch of them (`is_grads_batched`, `vmap` of a backward)."""
    return active() or any(g is not None and _keys(g).has(_BATCHED) for g in grads)


def pull(
    function: Callable[..., Any], tensors: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]
) -> tuple[Any, ...]:
    """The gradients of some tensors, given batches of those of some results of a function of them.

    Args:
        function: to a tuple of tensors, of which those are looked at that have a gradient.
    """
    there = [k for k, g in enumerate(grads) if g is not None]
    given = tuple(grads[k] for k in there)

    def chosen(*x: Tensor) -> tuple[Tensor, ...]:
        found = function(*x)
        return tuple(found[k] for k in there)

    if active():
        return torch.func.vjp(chosen, *tensors)[1](given)
    with torch.enable_grad():  # the batches of autograd's own kind, unknown to torch.func
        leaves = [t.detach().requires_grad_() for t in tensors]
        return torch.autograd.grad(chosen(*leaves), leaves, given, allow_unused=True)
