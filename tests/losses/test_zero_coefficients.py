"""A term whose coefficient is 0 is not formed (0 times an infinite one is NaN), and no exponent overflows: every loss
that has a coefficient, on every backend that runs here, from logits and from both ways through a head."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fastalign as fa
from fastalign.evaluation.perplexity import TextLikelihood
from fastalign.losses import (
    DPOLoss,
    PPOLoss,
    SFTLoss,
    dpo_loss,
    importance_weights,
    kl_estimate,
    policy_loss,
    ptx_loss,
)
from fastalign.losses.policy_objectives import KINDS
from fastalign.losses.policy_selection import SELECTIONS
from fastalign.rl import shape_rewards

WAYS = ("logits", "head", "objective")
B, T, V, H = 2, 3, 7, 4
each_backend = pytest.mark.parametrize("backend", ["cpu", "eager"])
each_launch = pytest.mark.parametrize(
    ("backend", "way"), [("cpu", "one_launch"), *((b, w) for b in ("cpu", "eager") for w in WAYS)]
)
REFUSED = {"one_launch": {"gspo", "gspo_token", "luspo", "vespo", "gmpo", *SELECTIONS}, "objective": set(SELECTIONS)}
each_way = pytest.mark.parametrize("way", WAYS)


class Batch:
    """The same logits as a tensor and as a head, and what a policy loss is given; token (0, 1) is the odd one."""

    def __init__(self, odd: float) -> None:
        g = torch.Generator().manual_seed(0)
        self.hidden, self.weight = (torch.randn(n, H, generator=g) for n in (B * T, V))
        self.hidden = self.hidden.view(B, T, H)
        self.labels = torch.randint(0, V, (B, T), generator=g)
        self.logps = fa.token_logps(self.hidden @ self.weight.T, self.labels)
        self.old, self.advantages = self.logps - 0.05, torch.tensor([0.5, -1.0])
        self.ref = self.logps.clone()
        self.ref[0, 1] += odd
        other = (int(self.labels[0, 1]) + 1) % V
        self.ref_bias = torch.zeros(V).index_fill(0, torch.tensor([other]), -abs(odd) * 3)

    def source(self, way):
        """What stands for the logits, and the tensors that are trained."""
        if way in ("logits", "one_launch"):
            x = (self.hidden @ self.weight.T).requires_grad_()
            return x, [x]
        leaves = [self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()]
        return fa.Head(*leaves, plan=None if way == "head" else "objective"), leaves

    def reference(self, estimator, way):
        if estimator != "exact":
            return {"ref_logps": self.ref}
        head = fa.Head(self.hidden, self.weight, self.ref_bias)
        return {"ref_logits": head if way in ("head", "objective") else self.hidden @ self.weight.T + self.ref_bias}

    def run(self, way, **config):
        """(loss, gradients, output) of a policy loss."""
        torch.manual_seed(0)  # clip_cov draws
        source, leaves = self.source(way)
        given = self.reference(config.get("kl_estimator", "k1"), way) if config.pop("reference", True) else {}
        out = PPOLoss(fuse_backward=way == "one_launch", **config)(
            source, self.labels, self.old, self.advantages, **given
        )
        return out.loss.detach(), torch.autograd.grad(out.loss, leaves), out


@each_launch
@pytest.mark.parametrize("odd", [-math.inf, -89.0, 89.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kl_of_weight_0_is_reported_alone(kind, odd, backend, way):
    """Loss and gradient are those of the policy term, whatever the divergence is."""
    if kind in REFUSED.get(way, ()):
        return  # its tokens are not independent, or are chosen in the whole batch
    batch = Batch(odd)
    with fa.use_backend(backend):
        for estimator in ("k1", "k2", "k3", "exact"):
            wanted, gradients, _ = batch.run(way, kind=kind, reference=False)
            loss, found, out = batch.run(way, kind=kind, kl_estimator=estimator, report_entropy=True)
            torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(found, gradients, rtol=1e-5, atol=1e-7)
            assert not out.kl.isnan()
            assert math.isfinite(out.kl) == (odd != -math.inf)


@each_launch
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3+"])
def test_a_log_ratio_of_89_stays_finite(estimator, kind, backend, way):
    """The bound of 60 acts: k3 of -89 is e^60 - 1 - 89 and has no slope but k1's there."""
    if kind in REFUSED.get(way, ()):
        return  # its tokens are not independent, or are chosen in the whole batch
    with fa.use_backend(backend):
        loss, gradients, out = Batch(89.0).run(way, kind=kind, kl_estimator=estimator, kl_coef=0.1)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients)
    if estimator.startswith("k3"):
        torch.testing.assert_close(out.kl.double(), torch.tensor((math.exp(60) - 90) / 6).double(), rtol=1e-5, atol=0)
        assert max(float(g.abs().max()) for g in gradients) < 10


@each_backend
@each_way
def test_importance_weights_without_a_cap_end_at_e_60(backend, way):
    batch = Batch(0.0)
    sampler = batch.old.clone()
    sampler[0, 1] -= 89
    weights = importance_weights(batch.old, sampler, torch.ones(B, T, dtype=torch.bool), cap=None)
    torch.testing.assert_close(weights[0, 1], torch.tensor(60.0).exp())
    source, leaves = batch.source(way)
    with fa.use_backend(backend):
        loss = PPOLoss(importance_cap=None)
        out = loss(source, batch.labels, batch.old, batch.advantages, sampler_logps=sampler).loss
        assert torch.isfinite(out)
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out, leaves))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "k3+"])
def test_estimates_of_a_log_ratio_of_89_are_finite_with_their_gradient(kind):
    logps = torch.tensor([-1.0, -90.0], requires_grad=True)
    found = kl_estimate(logps, torch.tensor([-90.0, -1.0]), kind=kind)
    (gradient,) = torch.autograd.grad(found.sum(), logps)
    assert torch.isfinite(found).all()
    assert torch.isfinite(gradient).all()


def test_an_entropy_of_weight_0_is_reported_alone():
    logps = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    mask, entropy = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[1.0, math.inf]])
    out = policy_loss(logps, logps.detach(), torch.ones(1), mask, entropy=entropy)
    assert out.loss == -1
    assert torch.isfinite(torch.autograd.grad(out.loss, logps)[0]).all()


def test_rewards_without_a_kl_penalty_are_the_scores():
    logps, ref = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-math.inf, -2.0]])
    shaped = shape_rewards(torch.tensor([0.7]), logps, ref, torch.ones(1, 2, dtype=torch.bool), kl_coef=0.0)
    assert torch.equal(shaped.rewards, torch.tensor([[0.0, 0.7]]))
    assert torch.equal(shaped.non_score_rewards, torch.zeros(1))
    assert shaped.kl.item() == math.inf


def test_a_pretraining_mix_of_weight_0_is_not_formed():
    mask = torch.ones(2, dtype=torch.bool)
    assert ptx_loss(torch.tensor(1.5), torch.tensor([-math.inf, -1.0]), mask, ptx_coef=0.0) == 1.5


# ---------------------------------------------------------------------------------------------------------- preferences
PAIRS = [
    ({"loss_type": "rpo", "nll_weight": 0.0, "nll_normalization": "sum"}, "sigmoid"),
    ({"loss_type": "cpo", "nll_weight": 0.0, "nll_normalization": "sum"}, None),
    ({"loss_type": "dpop", "dpop_lambda": 0.0}, "sigmoid"),
    ({"loss_type": {"sigmoid": 1.0, "ipo": 0.0}}, "sigmoid"),
    ({"loss_type": {"ipo": 0.0, "sigmoid": 1.0, "sppo": 0.0}}, "sigmoid"),
    ({"loss_type": "robust", "label_smoothing": 0.0}, "sigmoid"),
]


@pytest.mark.parametrize(("options", "same"), PAIRS)
def test_pairwise_terms_of_weight_0_are_not_formed(options, same):
    """A pair that the policy excludes on the chosen (an infinite loss), or on the rejected side (of loss 0)."""
    for chosen, rejected in ((-3.0, -math.inf), (-math.inf, -3.0)):
        logps = [torch.tensor([x, -2.0]) for x in (chosen, rejected)]
        ref = [torch.tensor([-3.0, -2.5])] * 2 if same else [None] * 2
        found = dpo_loss(*logps, *ref, **options).loss
        wanted = dpo_loss(*logps, *ref, loss_type="sigmoid").loss
        torch.testing.assert_close(found, wanted)


@each_way
@each_backend
@pytest.mark.parametrize("loss_type", [{"sigmoid": 1.0, "ipo": 0.0}, "robust", "dpop"])
def test_pairwise_terms_of_weight_0_are_not_formed_from_logits(loss_type, backend, way):
    batch = Batch(0.0)
    refs = {"ref_chosen_logps": batch.ref[:1].sum(-1), "ref_rejected_logps": torch.tensor([-math.inf])}
    source, leaves = batch.source(way)
    options = {"dpop_lambda": 0.0} if loss_type == "dpop" else {}
    with fa.use_backend(backend):
        loss = DPOLoss(loss_type=loss_type, **options)(source, batch.labels, **refs).loss
        wanted = DPOLoss()(source, batch.labels, **refs).loss
        assert loss == wanted
        torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, leaves))


def test_smoothing_of_1_leaves_the_label_out():
    lost, won = torch.tensor([-math.inf]), torch.tensor([-3.0])
    assert dpo_loss(won, lost, won, won, label_smoothing=1.0).loss == math.inf
    assert dpo_loss(lost, won, won, won, label_smoothing=1.0).loss == 0


@each_backend
@each_way
def test_a_z_loss_of_weight_0_is_reported_alone(backend, way):
    """And full smoothing, which leaves the label's own term out."""
    batch = Batch(0.0)
    source, leaves = batch.source(way)
    with fa.use_backend(backend):
        plain = SFTLoss()(source, batch.labels).loss
        found = SFTLoss(label_smoothing=1.0)(source, batch.labels).loss
        logps = torch.log_softmax(batch.hidden @ batch.weight.T, -1)
        torch.testing.assert_close(found.detach(), -logps.mean())
        assert all(torch.isfinite(g).all() for x in (plain, found) for g in torch.autograd.grad(x, leaves))


@each_backend
def test_full_smoothing_with_weights_of_classes_leaves_the_label_out(backend):
    x, target, weight = torch.tensor([[0.0, 1.0, 1e30]]), torch.tensor([0]), torch.tensor([0.0, 0.0, 1.0])
    with fa.use_backend(backend):
        found = fa.cross_entropy(x, target, weight, label_smoothing=1.0, reduction="sum")
    wanted = torch.nn.functional.cross_entropy(x, target, weight, label_smoothing=1.0, reduction="sum")
    torch.testing.assert_close(found, wanted)


def test_a_perplexity_beyond_all_numbers_is_infinite():
    assert TextLikelihood(np.array([8000.0]), np.array([10])).perplexity == math.inf
    assert TextLikelihood(np.array([10.0]), np.array([10])).perplexity == pytest.approx(math.e)
