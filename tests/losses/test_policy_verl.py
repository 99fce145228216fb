"""Policy losses against verl 0.9's formulas, derived anew: the tests do not install verl.

Its own bounds of log-ratios (20) and of k3 (10) are wider than anything here.
"""

import pytest
import torch

from fastalign import losses


def _verl(kind, logps, old, a, mask, chosen, low=0.01, high=0.02):
    ratio, p, q = (logps - old).exp(), logps.exp().detach(), old.exp()
    if kind == "dppo_tv":
        valid = torch.where(a > 0, p - q <= high, p - q >= -low)
        return -a * ratio.clamp(max=1.2).detach() * logps * valid
    if kind == "dppo_kl":
        kl = q * (old - logps.detach()) + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
        valid = torch.where(a > 0, (kl <= high) | (p <= q), (kl <= low) | (p >= q))
        return -a * ratio.clamp(max=1.2).detach() * logps * valid
    if kind == "dro":
        return -(logps * a - 0.5 * 0.3 * (logps - old) ** 2)
    if kind == "gpg":
        return -logps * a
    if kind == "clip_cov":
        return torch.maximum(-a * ratio, -a * ratio.clamp(1 - low, 1 + high)) * ~chosen
    return -a * ratio + 0.7 * (logps - old).abs() * chosen


VERL = {
    "dppo_tv": {"dppo_ratio_cap": 1.2},
    "dppo_kl": {"dppo_ratio_cap": 1.2},
    "dro": {"dro_beta": 0.3},
    "gpg": {},
    "clip_cov": {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.02, "clip_cov_ub": 0.3},
    "kl_cov": {"kl_cov_ratio": 0.4, "kl_cov_coef": 0.7},
}


def _verl_choice(kind, logps, old, a, mask, low, high):
    """By covariance: all between the bounds that are not cut, or the 0.4 of the largest."""
    logps = logps.detach()
    covariance = (a - a[mask].mean()) * (logps - logps[mask].mean())
    if kind == "clip_cov":
        ratio = (logps - old).exp()
        cut = -a * ratio.clamp(1 - low, 1 + high) > -a * ratio
        return (covariance > 0.02) & (covariance < 0.3) & ~cut & mask
    chosen = torch.zeros_like(mask)
    chosen.view(-1)[covariance.masked_fill(~mask, -torch.inf).view(-1).topk(int(0.4 * int(mask.sum()))).indices] = True
    return chosen


@pytest.mark.parametrize("kind", VERL)
def test_matches_verls_formula(kind):
    generator = torch.Generator().manual_seed(0)
    logps = -2 + 0.5 * torch.randn(4, 6, generator=generator, dtype=torch.float64)
    old = logps + 0.4 * torch.randn(4, 6, generator=generator, dtype=torch.float64)
    advantages = torch.randn(4, generator=generator, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([[6], [1], [4], [3]])
    low, high = (0.2, 0.3) if kind == "clip_cov" else (0.01, 0.02)
    mine, theirs = (logps.clone().requires_grad_() for _ in range(2))
    a = advantages[:, None].expand_as(old)
    chosen = _verl_choice(kind, theirs, old, a, mask, low, high)
    if kind.endswith("cov"):
        assert 0 < chosen.sum() < mask.sum()
    expected = (_verl(kind, theirs, old, a, mask, chosen, low, high) * mask).sum() / mask.sum()
    options = {"kind": kind, "cliprange": low, "cliprange_high": high, **VERL[kind]}
    output = losses.policy_loss(mine, old, advantages, mask, **options)
    expected.backward()
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    if kind.startswith("dppo"):
        assert 0 < output.clipfrac < 1
