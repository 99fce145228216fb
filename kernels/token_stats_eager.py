"""Token statistics in plain PyTorch: any device, any floating dtype, float64 kept as float64.

This is the slow and obvious backend. It defines what the compiled ones must return, and it serves the devices and
dtypes (float64) for which there is no compiled kernel. x are the soft-capped, tempered logits, z those of the
reference, m and m' numbers close to their maxima, p = softmax(x), q = softmax(z). The forward gives per token

    r = log sum_j exp(x_j - m)      lse = m + r         logps = (x_label - m) - r      mean = (1/V) sum_j x_j
    entropy = r - E_p[x - m]        kl = E_p[(x - m) - (z - m')] - r + r'

and the backward is the canonical form shared by every backend (`coefficients`):

    dx_j = p_j (alpha + beta (x_j - m) - gamma (z_j - m')) + delta [j = label] + kappa,    p_j = exp((x_j - m) - r)

Everything is taken relative to m: a float32 lse of 10,000 is known to 1e-3 only, but r and x - m stay exact, so
probabilities are as good at logits of 1e4 as at logits of 1. `saved` carries (m, r, m', r') from forward to backward.
A row of nothing but -inf has an lse of -inf; its other statistics, and its gradient where it has one, are NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .token_call import TokenCall


def _prepare(logits: Tensor, live: Tensor, temperature: float, softcap: float) -> Tensor:
    """Logits in the accumulation dtype, soft-capped (Gemma 2: cap * tanh(x / cap)), then divided by the temperature.

    Ignored rows may hold anything, NaN too: they are replaced before any arithmetic sees them.
    """
    x = torch.where(live, logits, 0)
    x = x if logits.dtype == torch.float64 else x.float()
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    return x if temperature == 1.0 else x / temperature


def _weighted(p: Tensor, value: Tensor) -> Tensor:
    """p * value with 0 * inf = 0: a token of probability zero adds nothing to an expectation, nor does a statistic
    without a gradient to that of the logits."""
    return torch.where(p == 0, 0, p * value)


def _live(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(mask of live tokens, labels with the ignored ones replaced by a safe index), both with a trailing axis."""
    live = labels.long() != ignore_index  # which may be beyond what int32 holds
    return live.unsqueeze(-1), torch.where(live, labels, 0).long().unsqueeze(-1)


def _shifted(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x - m, m, r) with m the row's maximum (0 for a row of nothing but -inf, whose differences would be NaN)."""
    m = x.amax(-1, keepdim=True)
    m = torch.where(m == -torch.inf, 0, m)
    x = x - m
    return x, m, x.exp().sum(-1, keepdim=True).log()


def forward(
    call: TokenCall, want_entropy: bool, want_mean: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """(logps, lse, entropy, kl, mean [...] each, saved [..., 4]); None where not asked for; 0 at ignored tokens."""
    logits, labels, ref_logits, ignore_index, temperature, softcap = call
    live, index = _live(labels, ignore_index)
    x, m, r = _shifted(_prepare(logits, live, temperature, softcap))
    saved = [m, r]

    def masked(t: Tensor) -> Tensor:
        return torch.where(live, t, 0).squeeze(-1)

    entropy = kl = mean = None
    p = torch.exp(x - r)
    if want_entropy:
        entropy = masked(r - _weighted(p, x).sum(-1, keepdim=True))
    if want_mean:
        mean = masked(m + x.mean(-1, keepdim=True))
    if ref_logits is not None:
        z, ref_m, ref_r = _shifted(_prepare(ref_logits, live, temperature, softcap))
        kl = masked(_weighted(p, x - z).sum(-1, keepdim=True) - r + ref_r)
        saved += [ref_m, ref_r]
    else:
        saved += [torch.zeros_like(m), torch.zeros_like(r)]
    return masked(x.gather(-1, index) - r), masked(m + r), entropy, kl, mean, torch.cat(saved, -1)


def coefficients(
    saved: Tensor, entropy: Tensor | None, kl: Tensor | None, grads: tuple[Tensor | None, ...], vocab: int
) -> tuple[Tensor, ...]:
    """alpha, beta, gamma, delta, kappa of each row, from the gradients of (logps, lse, entropy, kl, mean).

    d logps/dx_j = [j = label] - p_j          d lse/dx_j = p_j          d mean/dx_j = 1/V
    d entropy/dx_j = p_j (E_p[x - m] - (x_j - m))   d kl/dx_j = p_j ((x_j - m) - (z_j - m') - r + r' - kl)
    """
    r, ref_r = saved[..., 1], saved[..., 3]
    zero = torch.zeros_like(r)
    g_logps, g_lse, g_entropy, g_kl, g_mean = (zero if g is None else g.to(r.dtype) for g in grads)
    alpha, beta = g_lse - g_logps, zero
    if entropy is not None:
        alpha, beta = alpha + _weighted(g_entropy, r - entropy), beta - g_entropy
    if kl is not None:
        alpha, beta = alpha + _weighted(g_kl, ref_r - r - kl), beta + g_kl
    return alpha, beta, g_kl, g_logps, g_mean / vocab


def backward(
    call: TokenCall,
    saved: Tensor,
    entropy: Tensor | None,
    kl: Tensor | None,
    grads: tuple[Tensor | None, ...],
    out: Tensor,
) -> None:
    """Writes the gradient of the logits into `out`, which may be `call.logits` itself."""
    logits, labels, ref_logits, ignore_index, temperature, softcap = call
    live, index = _live(labels, ignore_index)
    x = _prepare(logits, live, temperature, softcap)
    squash = 1 - (x * (temperature / softcap)) ** 2 if softcap else None  # d(cap tanh(u / cap))/du = 1 - tanh^2
    five = coefficients(saved, entropy, kl, grads, logits.shape[-1])
    moves = torch.stack(five).ne(0).any(0).unsqueeze(-1)
    alpha, beta, gamma, delta, kappa = (c.unsqueeze(-1) for c in five)
    x = x - saved[..., 0:1]
    p = torch.exp(x - saved[..., 1:2])
    slope = alpha
    if entropy is not None or kl is not None:
        slope = slope + beta * x
    if ref_logits is not None:
        slope = slope - _weighted(gamma, _prepare(ref_logits, live, temperature, softcap) - saved[..., 2:3])
    dx = _weighted(p, slope.expand_as(p)) + kappa
    dx.scatter_add_(-1, index, delta)
    if squash is not None:
        dx = dx * squash
    out.copy_(torch.where(live & moves, dx / temperature, 0))
