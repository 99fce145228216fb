"""KTO: its baseline, first step, extremes, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign.losses import kto_loss

PAIR = torch.zeros(3)


def test_kto_baseline_is_clamped_and_carries_no_gradient():
    logps = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
    desirable = torch.tensor([True, False])
    kl_logps = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True)
    out = kto_loss(logps, desirable, beta=1.0, kl_logps=kl_logps, ref_kl_logps=torch.zeros(2))
    assert out.kl.item() == 2.0
    # 1 - sigmoid(1 - 2) and 1 - sigmoid(2 + 1), halved
    assert out.loss.item() == pytest.approx((1 / (1 + math.exp(-1)) + 1 / (1 + math.exp(3))) / 2, rel=1e-12)
    out.loss.backward()
    assert kl_logps.grad is None
    assert kto_loss(logps, desirable, kl=torch.tensor([-5.0, 1.0])).kl.item() == 0.0
    assert torch.equal(kto_loss(logps, desirable, kl=2.0, beta=1.0).loss, out.loss)


def test_kto_first_step_and_one_sided_batches():
    logps = torch.randn(5, requires_grad=True)
    for desirable in (torch.ones(5).bool(), torch.zeros(5).bool()):
        out = kto_loss(logps, desirable, logps.detach())
        assert out.loss.item() == 0.5
        assert out.margins.item() == 0.0
    weighted = kto_loss(logps, torch.ones(5).bool(), logps.detach(), desirable_weight=3.0, undesirable_weight=0.0)
    assert weighted.loss.item() == 1.5


def test_kto_is_finite_and_differentiable():
    logps = torch.tensor([1e4, -1e4, 1e4, -1e4], requires_grad=True)
    loss = kto_loss(logps, torch.tensor([True, True, False, False]), beta=1.0, kl=1e4).loss
    loss.backward()
    assert loss.isfinite()
    assert logps.grad.isfinite().all()
    leaf = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: kto_loss(x, torch.tensor([True, False, True, False]), kl=0.3).loss, leaf)
    assert kto_loss(leaf.bfloat16(), torch.ones(4).bool()).loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"desirable": PAIR}, TypeError, "desirable must be a boolean"),
        ({"kl_logps": PAIR}, ValueError, "must both be given"),
        ({"kl": 1.0, "kl_logps": PAIR, "ref_kl_logps": PAIR}, ValueError, "not both"),
        ({"ref_logps": PAIR[:2]}, ValueError, "ref_logps must have shape"),
        ({"logps": torch.zeros(3, 2)}, ValueError, r"logps must have shape \[B\]"),
        ({"beta": -1.0}, ValueError, "beta must be in"),
        ({"desirable_weight": -1.0}, ValueError, "desirable_weight must be in"),
    ],
)
def test_kto_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        kto_loss(**{"logps": PAIR, "desirable": PAIR.bool(), **arguments})
