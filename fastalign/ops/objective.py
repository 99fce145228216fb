"""One launch for losses whose tokens need no other token: statistics, derivatives and gradient while a row is in cache.

`ops.token_stats` reads the logits once forward and once backward. Where a token's loss depends on that token alone
(SFT, PPO and its token-level relatives), both fit into one visit: one read of the logits, one write of their gradient.
The price is that the gradient is computed in the forward; backward only hands it on. The kernels run the loss as a
program (see `token_programs`) for its derivatives; values and metrics come from the statistics that they return.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .. import _backends
from .._backends import TokenProgram
from .call import check_call, check_kl, dense, token_call
from .fused_loss import attach_gradients
from .results import TokenStats

__all__ = ["attach_gradient", "attach_gradients", "fused_gradient"]


def fused_gradient(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor,
    program: TokenProgram,
    inputs: Mapping[str, Tensor],
    *,
    ref_logits: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    inplace: bool = False,
) -> tuple[TokenStats, Tensor | None, Tensor]:
    """Statistics of every token and the gradient of sum_t weight_t loss_t in the logits, in one read and one write.

    Args:
        logits: [..., V], float32, bfloat16 or float16, on the CPU or a GPU.
        labels: [...], int64 or int32; tokens equal to ignore_index have no gradient.
        weight: [...], float32: what each token's loss counts for.
        program: the loss of a token, made by `trace_token`.
        inputs: what the program is given, by name: [...], float32; more may be there.
        ref_logits: [..., V], of a reference, for a program that looks at the KL, or for the KL alone.
        ignore_index, temperature, softcap: as in `token_stats`.
        entropy: return the entropy also where the program does not look at it.
        inplace: write the gradient over the logits and raise their version counter.

    Returns:
        (TokenStats without gradient, the mean of each row's logits where the program looks at it, gradient of the
        logits' shape and dtype, dense or the logits' own memory).

    Raises:
        TypeError, ValueError: as `token_stats`; an input that the program needs and did not get, or not as it must be.
        RuntimeError: no compiled kernel serves these logits.
    """
    call = token_call(logits, labels, ref_logits, ignore_index, temperature, softcap)
    check_kl(program.uses[3] or ref_logits is not None, ref_logits)
    check_call(call, inplace)
    given = _checked(labels, {"weight": weight, **dict.fromkeys(program.inputs), **inputs})
    if inplace and logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(f"inplace needs a dense vocabulary; got logits with strides {tuple(logits.stride())}")
    call = dense(call._replace(logits=logits.detach()))
    out = call.logits if inplace else _backends.empty(logits.shape, call.logits)
    ordered = tuple(given[name] for name in program.inputs)
    want_entropy = entropy or program.uses[2]
    stats = _backends.pick(call.logits).objective(call, program, given["weight"], ordered, want_entropy, out)
    if inplace and not logits.is_inference():
        torch.autograd.graph.increment_version(logits)  # the kernel wrote behind autograd's back
    return TokenStats(*stats[:4]), stats[4], out


def _checked(labels: Tensor, named: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    found = {}
    for name, t in named.items():
        if not isinstance(t, Tensor):
            raise ValueError(f"{name} is needed by the loss: float32 {list(labels.shape)}; got {type(t).__name__}")
        if t.shape != labels.shape or t.dtype != torch.float32 or t.device != labels.device:
            raise ValueError(
                f"{name} must be float32 {list(labels.shape)} on {labels.device}; "
                f"got {t.dtype} {list(t.shape)} on {t.device}"
            )
        found[name] = t.detach().resolve_neg()
    return found


def attach_gradient(loss: Tensor, logits: Tensor, gradient: Tensor) -> Tensor:
    """The scalar loss as a function of the logits whose gradient is known already; it can be differentiated once."""
    return attach_gradients(loss, (logits,), (gradient,))
