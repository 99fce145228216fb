"""One launch for objectives that need no other token: statistics, slope and gradient while a row of logits is in cache.

`ops.token_stats` reads the logits once forward and once backward. Where a token's loss depends on that token alone
(SFT, PPO and its token-level relatives), both fit into one visit: one read of the logits, one write of their gradient.
The price is that the gradient is computed in the forward; backward only hands it on. Values and metrics come from the
same functions of `fastalign.losses` as ever, from the statistics that the launch returns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backends
from .._backends import Objective
from .call import as_softcap, check, check_types, unit_stride
from .fused_loss import attach_gradients
from .statistics import TokenStats

__all__ = ["Objective", "attach_gradient", "attach_gradients", "token_objective"]


def token_objective(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor,
    objective: Objective,
    *,
    old_logps: Tensor | None = None,
    advantages: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_logits: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    inplace: bool = False,
) -> tuple[TokenStats, Tensor]:
    """Statistics of every token and the gradient of sum_t weight_t loss_t in the logits, in one read and one write.

    loss_t = policy_t + kl_coef KL_t - entropy_coef H_t + z_loss lse_t^2, with policy_t the objective's kind: "sft"
    -log p, "reinforce" -A log p, "surrogate" -A rho, "clip" PPO's, "cispo" (see `losses.policy_loss` for the formulas).

    Args:
        logits: [..., V], float32, bfloat16 or float16, on the CPU or a GPU.
        labels: [...], int64 or int32; tokens equal to ignore_index have no gradient.
        weight: [...], float32: what the normalisation gives each token, for a token mean 1 / tokens.
        objective: `Objective(kind, low, high, dual_clip, kl, kl_coef, kl_reversed, entropy_coef, label_smoothing,
            z_loss)`: the ratio is cut to [1 - low, 1 + high]; kl is None, "k1", "k2", "k3" or "exact"; kl_reversed
            estimates KL(ref, pi) from the reference's samples.
        old_logps, advantages: [...], float32; needed by every kind but "sft".
        ref_logps: [...], float32, for an estimated KL; ref_logits: [..., V], for the exact one.
        ignore_index, temperature, softcap: as in `token_stats`.
        entropy: return the entropy (always so where entropy_coef is not 0).
        inplace: write the gradient over the logits and raise their version counter.

    Returns:
        (TokenStats without gradient, gradient of the logits' shape and dtype, dense or the logits' own memory).

    Raises:
        TypeError, ValueError: as `token_stats`; an input that the objective needs and did not get.
        RuntimeError: no compiled kernel serves these logits.
    """
    kl = objective.kl == "exact"
    check_types(logits, labels, ref_logits, kl, objective.label_smoothing)
    cap = as_softcap(softcap)
    check(logits.detach(), labels, ref_logits, temperature, cap, inplace)
    _check_inputs(labels, objective, weight, old_logps, advantages, ref_logps)
    if inplace and logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(f"inplace needs a dense vocabulary; got logits with strides {tuple(logits.stride())}")
    source = unit_stride(logits.detach())
    out = source if inplace else _backends.empty(logits.shape, source)
    logps, lse, ent, div, mean = _backends.pick(source).objective(
        source,
        labels,
        None if ref_logits is None else unit_stride(ref_logits),
        (weight, old_logps, advantages, ref_logps),
        objective,
        ignore_index,
        temperature,
        cap,
        entropy or objective.entropy_coef != 0.0,
        out,
    )
    if inplace and not logits.is_inference():
        torch.autograd.graph.increment_version(logits)  # the kernel wrote behind autograd's back
    if mean is not None:
        logps = (1 - objective.label_smoothing) * logps + objective.label_smoothing * (mean - lse)
    return TokenStats(logps, lse, ent, div), out


def _check_inputs(labels, objective: Objective, weight, old_logps, advantages, ref_logps) -> None:
    for argument, table, key in (("kind", _backends.KINDS, objective.kind), ("kl", _backends.KL_TERMS, objective.kl)):
        if key not in table:
            raise ValueError(f"{argument} must be one of {', '.join(map(str, table))}; got {key!r}")
    named = {"weight": weight, "old_logps": old_logps, "advantages": advantages, "ref_logps": ref_logps}
    needed = ["weight"]
    if objective.kind != "sft":
        needed += ["old_logps", "advantages"]
    if objective.kl in ("k1", "k2", "k3"):
        needed += ["ref_logps"]
    for name, t in named.items():
        if t is None and name in needed:
            raise ValueError(f"{name} is needed by kind={objective.kind!r}, kl={objective.kl!r}; got None")
        if t is not None and (t.shape != labels.shape or t.dtype != torch.float32 or t.device != labels.device):
            raise ValueError(
                f"{name} must be float32 {list(labels.shape)} on {labels.device}; "
                f"got {t.dtype} {list(t.shape)} on {t.device}"
            )


def attach_gradient(loss: Tensor, logits: Tensor, gradient: Tensor) -> Tensor:
    """The scalar loss as a function of the logits whose gradient is known already; it can be differentiated once."""
    return attach_gradients(loss, (logits,), (gradient,))
