"""Options that other projects' own tests use: against their formulas, valid where they are installed."""

from __future__ import annotations

import math

import pytest
import torch

import fastalign as fa
from fastalign import losses
from fastalign.losses import KTOLoss, PPOLoss, kto_loss
from fastalign.trainers.grpo import GRPOConfig

MASK = torch.arange(6) < torch.tensor([[6], [1], [4], [3]])


def tokens(seed=0):
    """Log-probabilities of two policies, and advantages of sequences."""
    draw = torch.Generator().manual_seed(seed)
    logps, other = -2 + torch.randn(2, 4, 6, generator=draw, dtype=torch.float64)
    return logps.requires_grad_(), other, torch.randn(4, generator=draw, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------- CISPO
def test_a_weight_of_cispo_may_stay_below_1():
    """TRL's epsilon_high is the bound itself: 0.7 here."""
    logps, old, advantages = tokens()
    ratio = (logps - old).exp().detach()
    expected = (-ratio.clamp(max=0.7) * advantages[:, None] * logps)[MASK].mean()
    options = {"kind": "cispo", "cliprange": 1.0, "cliprange_high": -0.3}
    out = losses.policy_loss(logps, old, advantages, MASK, **options)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, logps)[0] for x in (out.loss, expected)))
    assert 0 < out.clipfrac < 1


def test_no_other_ratio_may(tmp_path):
    for kind, high, low in (("clip", -0.1, 0), ("cispo", -0.3, -0.2)):
        with pytest.raises(ValueError, match=rf"cliprange_high must be in \[{low}, inf\]; got {high}"):
            losses.policy_loss(*tokens(), MASK, kind=kind, cliprange_high=high)
    with pytest.raises(ValueError, match="cliprange_high must be in"):
        GRPOConfig(output_dir=str(tmp_path), cliprange_high=-0.1)
    with pytest.raises(ValueError, match="cliprange_high must be in"):
        GRPOConfig(output_dir=str(tmp_path), loss_type="cispo", cliprange_high=-1.1)
    assert GRPOConfig(output_dir=str(tmp_path), loss_type="cispo", cliprange_high=-0.3).variant.cliprange_high == -0.3


# ----------------------------------------------------------------------------------------------------------- estimators
def test_bounded_estimators_are_verls():
    """Of log-ratios so large that both bounds act."""
    logps = torch.tensor([-30.0, -9.0, -3.0, -1.0, -0.5, -0.1, -2.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.0, -1.0, -2.5, -1.0, -3.0, -31.0, -2.0], dtype=torch.float64)
    away = (ref - logps).clamp(-20, 20)
    verls = {"k3_clamped": (away.exp() - away - 1).clamp(-10, 10), "abs": (logps - ref).abs()}
    for kind, expected in verls.items():
        found = losses.kl_estimate(logps, ref, kind=kind)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(x.sum(), logps)[0] for x in (found, expected)))
    assert (losses.kl_estimate(logps, ref, kind="k3_clamped") == 10).sum() == 3


@pytest.mark.parametrize("estimator", ["k3_clamped", "abs"])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_bounded_estimators_in_a_loss(estimator, backend):
    if fa.backends()[backend] != "available":
        pytest.skip("needs the compiled module fastalign._C")
    draw = torch.Generator().manual_seed(0)
    x, labels = torch.randn(4, 6, 19, generator=draw, dtype=torch.float64), torch.randint(19, (4, 6), generator=draw)
    labels = labels.masked_fill(~MASK, -100)
    _, old, advantages = tokens()
    given = {"ref_logps": old + 4 * torch.randn(4, 6, generator=draw, dtype=torch.float64)}
    loss, config = PPOLoss(kl_coef=0.5, kl_estimator=estimator), {"kl_coef": 0.5, "kl_estimator": estimator}

    def outcome(module, dtype):
        leaf = x.to(dtype).requires_grad_()
        ref = {name: t.to(dtype) for name, t in given.items()}
        out = module(leaf, labels, old.to(dtype), advantages.to(dtype), **ref)
        return [out.loss.double(), out.kl.double(), torch.autograd.grad(out.loss, leaf)[0].double()]

    found = [outcome(PPOLoss(**config), torch.float64)]
    with fa.use_backend(backend):
        found.append(outcome(loss, torch.float32))
        if backend != "eager":
            found.append(outcome(PPOLoss(fuse_backward=True, **config), torch.float32))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)
    assert "torch operations" not in loss.fused.explain()


# ------------------------------------------------------------------------------------------------------------------ KTO
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("kl", [None, 0.7, -0.4])
def test_kto_matches_liger(average, kl):
    """Averaged log-probabilities, and a baseline that is taken as it is, below 0 too."""
    name = "liger_kernel.chunked_loss"
    module = pytest.importorskip(name, reason="liger-kernel is not installed").LigerFusedLinearKTOLoss
    draw = torch.Generator().manual_seed(0)
    hidden, ref = torch.randn(2, 5, 6, 8, generator=draw)
    weight = torch.randn(17, 8, generator=draw)
    labels = torch.randint(17, (5, 6), generator=draw)
    labels[torch.arange(6) >= torch.tensor([[6], [2], [4], [3], [5]])] = -100
    desirable = torch.tensor([True, False, True, True, False])
    mine, theirs = (hidden.clone().requires_grad_() for _ in range(2))
    loss = module(beta=0.3, compiled=False, use_ref_model=True, average_log_prob=average)
    more = {"preference_labels": desirable, "ref_input": ref, "ref_weight": weight}
    expected, *_ = loss(theirs, weight, labels, kl=None if kl is None else torch.tensor(kl), **more)
    out = KTOLoss(beta=0.3, average=average, clamp_kl=False)(
        mine @ weight.T, labels, desirable, ref_logits=ref @ weight.T, kl=kl
    )
    expected.backward()
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    assert out.kl.item() == pytest.approx(kl or 0.0)


@pytest.mark.parametrize("plan", [None, "objective"])
def test_averaged_kto_of_heads(plan):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 6, 8, generator=draw, dtype=torch.float64)
    weight = torch.randn(17, 8, generator=draw, dtype=torch.float64)
    labels = torch.randint(17, (5, 6), generator=draw)
    labels[torch.arange(6) >= torch.tensor([[6], [2], [4], [3], [5]])] = -100
    desirable = torch.tensor([True, False, True, True, False])
    module = KTOLoss(beta=0.3, average=True, clamp_kl=False)
    logits = (hidden @ weight.T).requires_grad_()
    given = {"ref_logps": torch.linspace(-40, -10, 5, dtype=torch.float64), "kl": -0.3}
    whole = module(logits, labels, desirable, **given)
    leaf = hidden.clone().requires_grad_()
    found = module(fa.Head(leaf, weight, plan=plan), labels, desirable, **given)
    torch.testing.assert_close(list(found), list(whole))
    (slope,) = torch.autograd.grad(whole.loss, logits)
    torch.testing.assert_close(torch.autograd.grad(found.loss, leaf)[0], slope @ weight)
    of_sums = kto_loss(
        fa.sequence_logps(logits, labels), desirable, given["ref_logps"], beta=0.3, kl=-0.3, clamp_kl=False,
        average=True, lengths=(labels != -100).sum(-1),
    )  # fmt: skip
    torch.testing.assert_close(list(of_sums), list(whole))


def test_what_averages_of_kto_need():
    logps, desirable = torch.zeros(3), torch.ones(3).bool()
    with pytest.raises(ValueError, match="lengths go with average=True, and only there; got average=True, len"):
        kto_loss(logps, desirable, average=True)
    with pytest.raises(ValueError, match="lengths go with average=True, and only there"):
        kto_loss(logps, desirable, lengths=torch.ones(3))
    with pytest.raises(ValueError, match=r"lengths must have shape \[3\], that of logps"):
        kto_loss(logps, desirable, average=True, lengths=torch.ones(2))
    assert math.isclose(kto_loss(logps, desirable, kl=-2.0).kl, 0.0)
    assert math.isclose(kto_loss(logps, desirable, kl=-2.0, clamp_kl=False).kl, -2.0)
