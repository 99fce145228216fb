"""Token statistics in plain PyTorch: any device, any floating dtype, float64 kept as float64.

This is the slow and obvious backend. It defines what the compiled ones must return, and it serves the devices and
dtypes (float64) for which there is no compiled kernel. c and c' are the soft-capped logits and those of the reference,
m and m' numbers close to their maxima, T the temperature, x = (c - m) / T, z = (c' - m') / T, p = softmax(x),
q = softmax(z). The forward gives per token

    r = log sum_j exp(x_j)      lse = m / T + r         logps = x_label - r      mean = m / T + (1/V) sum_j x_j
    entropy = r - E_p[x]        kl = E_p[x - z] - r + r'

and the backward is the canonical form shared by every backend (`coefficients`):

    dx_j = p_j (alpha + beta x_j - gamma z_j) + delta [j = label] + kappa,    p_j = exp(x_j - r)

Everything is taken relative to m: a float32 lse of 10,000 is known to 1e-3 only, but r and x stay exact, so
probabilities are as good at logits of 1e4 as at logits of 1. `saved` carries (m, r, m', r') from forward to backward.
A target's probability near 1 is known by what is left beside it: where that is less than the target itself, m is the
target's logit, r = log(1 + sum_{j != label} exp(x_j)) and logps = -r; and where m is the target's logit, the gradient
of its own takes 1 - p_label from r.
A row of nothing but -inf has an lse of -inf; its other statistics, and its gradient where it has one, are NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..token_call import TokenCall


def _prepare(logits: Tensor, valid: Tensor, softcap: float) -> Tensor:
    """Logits in the accumulation dtype, soft-capped (Gemma 2: cap * tanh(x / cap)).

    Ignored rows may hold anything, NaN too: they are replaced before any arithmetic sees them.
    """
    x = torch.where(valid, logits, 0)
    x = x if logits.dtype == torch.float64 else x.float()
    return softcap * torch.tanh(x / softcap) if softcap else x


def _weighted(p: Tensor, value: Tensor) -> Tensor:
    """p * value with 0 * inf = 0: a token of probability zero adds nothing to an expectation, nor does a statistic
    without a gradient to that of the logits."""
    return torch.where(p == 0, 0, p * value)


def _valid(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(mask of valid tokens, labels with the ignored ones replaced by a safe index), both with a trailing axis."""
    valid = labels.long() != ignore_index  # which may be beyond what int32 holds
    return valid.unsqueeze(-1), torch.where(valid, labels, 0).long().unsqueeze(-1)


def _shifted(c: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(x, m) with m the row's maximum (0 for a row of nothing but -inf, whose differences would be NaN)."""
    m = c.amax(-1, keepdim=True)
    m = torch.where(m == -torch.inf, 0, m)
    return _tempered(c - m, temperature), m


def _tempered(x: Tensor, temperature: float) -> Tensor:
    return x if temperature == 1.0 else x / temperature


def _target(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """(r, logps) of rows relative to their maxima."""
    target = x.gather(-1, index)
    exps = x.exp()
    own = exps.gather(-1, index)
    others = exps.scatter_(-1, index, 0).sum(-1, keepdim=True)
    leads = own > others
    r = torch.where(leads, torch.log1p(others), (own + others).log())
    return r, torch.where(leads, 0 - r, target - r)


def forward(
    call: TokenCall, want_entropy: bool, want_mean: bool, want_diagnostics: bool = False
) -> tuple[Tensor | None, ...]:
    """(logps, lse, entropy, kl, mean [...] each, saved [..., 4]); None where not asked for; 0 at ignored tokens.

    `want_diagnostics`: log_sum_sq and argmax [...] follow: log sum_j p_j^2 = log sum_j exp(2 x_j) - 2 r, and the first
    element that is as large as any, int64, -1 at ignored tokens and in rows without a softmax.
    """
    logits, labels, ref_logits, ignore_index, temperature, softcap = call
    valid, index = _valid(labels, ignore_index)
    x, m = _shifted(_prepare(logits, valid, softcap), temperature)
    r, logps = _target(x, index)
    saved = [m, r]

    def masked(t: Tensor) -> Tensor:
        return torch.where(valid, t, 0).squeeze(-1)

    entropy = kl = mean = None
    p = torch.exp(x - r)
    if want_entropy:
        entropy = masked(r - _weighted(p, x).sum(-1, keepdim=True))
    if want_mean:
        mean = masked(_tempered(m, temperature) + x.mean(-1, keepdim=True))
    if ref_logits is not None:
        z, ref_m = _shifted(_prepare(ref_logits, valid, softcap), temperature)
        ref_r = z.exp().sum(-1, keepdim=True).log()
        kl = masked(_weighted(p, x - z).sum(-1, keepdim=True) - r + ref_r)
        saved += [ref_m, ref_r]
    else:
        saved += [torch.zeros_like(m), torch.zeros_like(r)]
    lse = masked(_tempered(m, temperature) + r)
    results = (masked(logps), lse, entropy, kl, mean, torch.cat(saved, -1))
    if not want_diagnostics:
        return results
    log_sum_sq = masked((2 * x).exp().sum(-1, keepdim=True).log() - 2 * r)
    best = torch.where(valid.squeeze(-1) & lse.isfinite(), logits.argmax(-1), -1)
    return *results, log_sum_sq, best


def coefficients(
    saved: Tensor, entropy: Tensor | None, kl: Tensor | None, grads: tuple[Tensor | None, ...], vocab: int
) -> tuple[Tensor, ...]:
    """alpha, beta, gamma, delta, kappa of each row, from the gradients of (logps, lse, entropy, kl, mean); then what
    of alpha is not the log-probability's.

    d logps/dx_j = [j = label] - p_j      d lse/dx_j = p_j      d mean/dx_j = 1/V
    d entropy/dx_j = p_j (E_p[x] - x_j)   d kl/dx_j = p_j (x_j - z_j - r + r' - kl)
    """
    r, ref_r = saved[..., 1], saved[..., 3]
    zero = torch.zeros_like(r)
    g_logps, g_lse, g_entropy, g_kl, g_mean = (zero if g is None else g.to(r.dtype) for g in grads)
    alpha, beta = g_lse, zero
    if entropy is not None:
        alpha, beta = alpha + _weighted(g_entropy, r - entropy), beta - g_entropy
    if kl is not None:
        alpha, beta = alpha + _weighted(g_kl, ref_r - r - kl), beta + g_kl
    return alpha - g_logps, beta, g_kl, g_logps, g_mean / vocab, alpha


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
    valid, index = _valid(labels, ignore_index)
    m, r, ref_m, _ = saved.split(1, -1)
    x = _prepare(logits, valid, softcap)
    squash = 1 - (x / softcap) ** 2 if softcap else None  # d(cap tanh(u / cap))/du = 1 - tanh^2
    found = coefficients(saved, entropy, kl, grads, logits.shape[-1])
    moves = torch.stack(found).ne(0).any(0).unsqueeze(-1)
    alpha, beta, gamma, delta, kappa, own = (c.unsqueeze(-1) for c in found)
    x = _tempered(x - m, temperature)
    p = torch.exp(x - r)
    bend = torch.zeros_like(alpha)
    if entropy is not None or kl is not None:
        bend = bend + beta * x
    if ref_logits is not None:
        bend = bend - _weighted(gamma, _tempered(_prepare(ref_logits, valid, softcap) - ref_m, temperature))
    bend = bend.expand_as(p)
    dx = _weighted(p, alpha + bend) + kappa
    target, p, bend = x.gather(-1, index), p.gather(-1, index), bend.gather(-1, index)
    rest = torch.where(target == 0, -torch.expm1(0 - r), 1 - p)
    dx.scatter_(-1, index, _weighted(p, own + bend) + _weighted(delta, rest) + kappa)
    if squash is not None:
        dx = dx * squash
    out.copy_(torch.where(valid & moves, dx / temperature, 0))
