"""Divergences between two models' distributions in plain PyTorch: any device, any floating dtype, float64 kept.

This is what the compiled kernels must return. p = softmax(x) is the student's distribution, q = softmax(z) the
teacher's, a constant, m = w q + (1 - w) p their mixture, and

    D = a KL(q || m) + b KL(p || m) = sum_j [a q_j (log q_j - log m_j) + b p_j (log p_j - log m_j) - c (q_j - p_j)]

with c = a - (a + b) w. The last term, whose sum is 0, makes every summand positive, and small where the distributions
are close: an error of a logsumexp, which is that of all the row's logarithms, is then lost in a product with their
difference. D's derivative in p_j, p being free, is, but for a constant,

    s_j = b (log p_j - log m_j) - c q_j / m_j        dD/dx_j = p_j s_j - p_j sum_k p_k s_k

All of it follows from t_j = log q_j - log p_j and L_j = log m_j - log p_j = log(1 - w + w e^t_j), which is exact where
q_j is far below p_j and all that is left of s_j is a difference of neighbours: log p_j - log m_j = -L_j,
log q_j - log m_j = t_j - L_j, q_j / m_j = e^(t_j - L_j). Of a t above _FAR, t - L is -log w to the last bit: it is cut.
c is 0 for the Jensen-Shannon divergence; for w = 0, m = p, the gradient is a (p_j - q_j), for w = 1, m = q, b times the
KL's own p_j (log p_j - log q_j - KL).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..divergence_call import DivergenceCall, Mixture, Side

_FAR = 80.0


def _weighted(p: Tensor, value: Tensor) -> Tensor:
    """p * value, with 0 * inf = 0."""
    return torch.where(p == 0, 0, p * value)


def terms(logp: Tensor, logq: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
    """(the summands of D, p_j s_j) from the logarithms of both distributions, elementwise."""
    a, b, w = mixture
    p, q = logp.exp(), logq.exp()
    c = mixture.difference
    if w == 0:
        return a * _weighted(q, logq - logp) - c * (q - p), a * (p - q)
    if w == 1:
        found = b * _weighted(p, logp - logq)
        return found - c * (q - p), found
    t = (logq - logp).clamp(max=_FAR)
    log_m = torch.logaddexp(t + math.log(w), torch.full_like(t, math.log1p(-w)))  # over p
    found = b * _weighted(p, -log_m)
    bend = c * _weighted(p, torch.exp(t - log_m)) if c else 0
    return a * _weighted(q, t - log_m) + found - c * (q - p), found - bend


def _log_probabilities(side: Side, valid: Tensor) -> tuple[Tensor, Tensor | None]:
    """(log softmax, derivative of the soft-capping if there is one) of every row; of rows that are not read those of
    zeros."""
    x = torch.where(valid, side.logits, 0)
    x = x if x.dtype == torch.float64 else x.float()
    slope = None
    if side.softcap:
        x = torch.tanh(x / side.softcap)
        slope = 1 - x * x
        x = side.softcap * x
    return torch.log_softmax(x * side.scale.unsqueeze(-1), -1), slope


def divergence(
    call: DivergenceCall, g_divergence: Tensor | None, g_logps: Tensor | None, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(D, log-probability of the label) of each row, [M]; with `out`, which may be the student's logits, the gradient
    of sum(g_divergence * D + g_logps * logps) is written there. Gradients that are None are 0."""
    student, teacher, labels, mixture = call
    valid = labels.ge(0).unsqueeze(-1)
    index = labels.clamp(min=0).unsqueeze(-1)
    logp, slope = _log_probabilities(student, valid)
    value, tilted = terms(logp, _log_probabilities(teacher, valid)[0], mixture)

    def masked(t: Tensor) -> Tensor:
        return torch.where(valid, t, 0).squeeze(-1)

    result = masked(value.sum(-1, keepdim=True)), masked(logp.gather(-1, index))
    if out is None:
        return result
    p, dx = logp.exp(), torch.zeros_like(logp)
    if g_divergence is not None:
        dx = g_divergence.unsqueeze(-1) * (tilted - p * tilted.sum(-1, keepdim=True))
    if g_logps is not None:
        g = g_logps.unsqueeze(-1)
        dx = (dx - g * p).scatter_add_(-1, index, g)
    dx = dx * student.scale.unsqueeze(-1)
    out.copy_(torch.where(valid, dx if slope is None else dx * slope, 0))
    return result
