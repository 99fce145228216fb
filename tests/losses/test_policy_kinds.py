"""The newer kinds of policy losses: their names, how they run, what they choose, and bounds on every exponential."""

import inspect
import math

import pytest
import torch

import fastalign as fa
from fastalign import losses
from fastalign.losses import PPOLoss
from fastalign.losses.kl import KL_ALIASES, KL_ESTIMATORS
from fastalign.losses.policy_objectives import KINDS
from fastalign.losses.policy_options import KIND_ALIASES, KIND_OPTIONS, KindOptions
from fastalign.losses.policy_selection import SELECTIONS

WHOLE = {"clip_cov": {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1}, "kl_cov": {"kl_cov_ratio": 0.3}}
SEES_OTHERS = {"gspo", "gspo_token", "luspo", "vespo", "gmpo", *SELECTIONS}


def batch(rows=4, length=6, vocab=31, seed=0, dtype=torch.float32):
    """logits, labels, old log-probabilities, advantages of ragged responses."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, length, vocab, generator=draw, dtype=torch.float64)
    y = torch.randint(vocab, (rows, length), generator=draw)
    old = x.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
    old = old + 0.3 * torch.randn(old.shape, generator=draw, dtype=torch.float64)
    y[torch.arange(length) >= torch.randint(1, length + 1, (rows, 1), generator=draw)] = -100
    advantages = torch.randn(rows, generator=draw, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), y, old.to(dtype), advantages.to(dtype)


def outcome(loss, x, y, old, advantages, **more):
    out = loss(x, y, old, advantages, **more)
    leaf = x.hidden if isinstance(x, fa.Head) else x
    return out, torch.autograd.grad(out.loss, leaf)[0]


# -------------------------------------------------------------------------------------------------------------- running
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_is_a_program(kind):
    if fa.backends()["cpu"] != "available":
        pytest.skip("needs the compiled module fastalign._C")
    loss = PPOLoss(kind=kind)
    outcome(loss, *batch())
    assert "program of" in loss.fused.explain()
    assert "torch operations" not in loss.fused.explain()


@pytest.mark.parametrize("kind", sorted(SELECTIONS))
def test_what_is_chosen_is_chosen_in_the_same_way_everywhere(kind, programs):
    """Program, torch operations, float64, a head: one loss, one gradient."""
    given, loss = batch(), PPOLoss(kind=kind, **WHOLE[kind])
    found, gradient = outcome(loss, *given)
    with programs.off():
        plain, expected = outcome(loss, *given)
    exact, wide = outcome(loss, *batch(dtype=torch.float64))
    for a, b, c in zip(found, plain, exact, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(a.double(), c, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wide, rtol=1e-4, atol=1e-6)
    x, *rest = given
    head = fa.Head(x.detach().requires_grad_(), torch.eye(x.shape[-1]))
    torch.testing.assert_close(outcome(loss, head, *rest)[1], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", sorted(SELECTIONS))
def test_a_head_by_parts_is_refused(kind):
    x, *rest = batch()
    head = fa.Head(x.detach().requires_grad_(), torch.eye(x.shape[-1]), plan="objective")
    with pytest.raises(ValueError, match=f"plan 'objective' forms a loss part by part, and kind='{kind}' needs"):
        PPOLoss(kind=kind)(head, *rest)


@pytest.mark.parametrize("kind", sorted(SEES_OTHERS))
def test_kinds_that_see_other_tokens_are_not_of_one_launch(kind):
    with pytest.raises(ValueError, match=f"fuse_backward is for losses of single tokens; got kind='{kind}'"):
        PPOLoss(kind=kind, fuse_backward=True)


# ------------------------------------------------------------------------------------------------------------- choosing
def _logps(x, y):
    return x.double().log_softmax(-1).gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def test_clip_cov_leaves_out_as_many_as_it_is_told_at_random():
    """Of the candidates a share of the real tokens is left out, at least one: which ones, the generator says."""
    logps = torch.linspace(-4, 0, 40, dtype=torch.float64).view(4, 10).requires_grad_()
    advantages = torch.linspace(-2, 2, 40, dtype=torch.float64).view(4, 10)
    mask = torch.ones(4, 10, dtype=torch.bool)

    def left_out(seed, ratio):
        torch.manual_seed(seed)
        options = {"kind": "clip_cov", "clip_cov_lb": 0.5, "clip_cov_ub": 3.0, "clip_cov_ratio": ratio}
        out = losses.policy_loss(logps, logps.detach(), advantages, mask, **options)
        (slope,) = torch.autograd.grad(out.loss, logps)
        assert out.clipfrac.item() == pytest.approx((slope == 0).double().mean().item())
        return slope == 0

    covariance = (advantages - advantages.mean()) * (logps - logps.mean()).detach()
    candidates = (covariance > 0.5) & (covariance < 3.0)
    assert 8 < candidates.sum() < 40
    for ratio, expected in ((1e-6, 1), (0.1, 4), (0.2, 8), (1.0, int(candidates.sum()))):
        found = left_out(0, ratio)
        assert found.sum() == expected
        assert not (found & ~candidates).any()
        assert torch.equal(found, left_out(0, ratio))
    assert not torch.equal(left_out(0, 0.1), left_out(1, 0.1))


def test_kl_cov_holds_the_largest_and_no_others():
    logps = torch.linspace(-4, 0, 40, dtype=torch.float64).view(4, 10)
    advantages = torch.linspace(-2, 2, 40, dtype=torch.float64).view(4, 10)
    old, mask = logps - 0.1, torch.ones(4, 10, dtype=torch.bool)
    covariance = (advantages - advantages.mean()) * (logps - logps.mean())

    def derivatives(**options):
        leaf = logps.clone().requires_grad_()
        return torch.autograd.grad(losses.policy_loss(leaf, old, advantages, mask, **options).loss, leaf)[0]

    more = derivatives(kind="kl_cov", kl_cov_ratio=0.1, kl_cov_coef=0.5) - derivatives(kind="trpo")
    held = more.abs() > 1e-9
    assert held.sum() == 4
    assert covariance[held].min() > covariance[~held].max()
    torch.testing.assert_close(more[held], torch.full((4,), 0.5 / 40, dtype=torch.float64))


def test_dppo_stops_what_goes_too_far_in_the_direction_of_its_advantage_alone():
    """Probabilities 0.5 and 0.1, both from 0.3: up and down by 0.2, the bound being 0.1, under either sign of A."""
    logps = torch.tensor([[0.5, 0.1, 0.5, 0.1]], dtype=torch.float64).log().requires_grad_()
    old = torch.full((1, 4), 0.3, dtype=torch.float64).log()
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
    for kind, bound in (("dppo_tv", 0.1), ("dppo_kl", 0.05)):
        out = losses.policy_loss(logps, old, advantages, torch.ones(1, 4, dtype=torch.bool), kind=kind, cliprange=bound)
        (slope,) = torch.autograd.grad(out.loss, logps)
        assert (slope == 0).tolist() == [[True, False, False, True]]
        assert out.clipfrac == 0.5


# ---------------------------------------------------------------------------------------------------------------- names
@pytest.mark.parametrize(("theirs", "ours"), KIND_ALIASES.items())
def test_verls_names_of_kinds(theirs, ours):
    given = batch()
    assert torch.equal(outcome(PPOLoss(kind=theirs), *given)[1], outcome(PPOLoss(kind=ours), *given)[1])


@pytest.mark.parametrize(("theirs", "ours"), [(a, b) for a, b in KL_ALIASES.items() if b != "exact"])
def test_verls_names_of_estimators(theirs, ours):
    x, y = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    assert torch.equal(losses.kl_estimate(x, y, kind=theirs), losses.kl_estimate(x, y, kind=ours))
    assert PPOLoss(kl_estimator=theirs).config["kl_estimator"] == ours


def test_an_unknown_name_is_said_as_it_was_given():
    with pytest.raises(ValueError, match=r"kl_estimator must be one of abs, exact, k1, .*, k3_clamped; got 'k4'"):
        PPOLoss(kl_estimator="k4")
    with pytest.raises(ValueError, match="kind must be one of abs, k1, k2, k3, k3\\+, k3_clamped; got 'full'"):
        losses.kl_estimate(torch.zeros(1), torch.zeros(1), kind="full")


def test_every_option_is_some_kinds_and_is_documented():
    assert {name for names in KIND_OPTIONS.values() for name in names} == set(KindOptions._fields)
    assert set(KIND_OPTIONS) <= set(KINDS)
    text = inspect.getdoc(losses.policy_loss)
    assert all(name in text for name in (*KINDS, *KindOptions._fields, *KIND_ALIASES))


@pytest.mark.parametrize("kind", sorted(KIND_OPTIONS))
def test_every_option_changes_the_loss(kind):
    x, y, old, _ = batch(rows=6, length=12)
    advantages = torch.linspace(-2, 2, 6)
    bounds = {"clip_cov_lb": 0.4, "clip_cov_ub": 2.0, "clip_cov_ratio": 1.0, "kl_cov_ratio": 0.3, "dppo_ratio_cap": 1.2}
    base = {name: bounds.get(name, getattr(KindOptions(), name)) for name in KIND_OPTIONS[kind]}
    plain = PPOLoss(kind=kind, **base)(x, y, old, advantages).loss
    for name, value in base.items():
        changed = base | {name: value / (20 if name == "clip_cov_ratio" else 4)}
        assert PPOLoss(kind=kind, **changed)(x, y, old, advantages).loss != plain, name


# --------------------------------------------------------------------------------------------------------------- bounds
FAR = (89.0, 200.0, 1e4, -89.0, -200.0, -1e4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_one_odd_token_leaves_loss_and_gradients_finite(kind, far, dtype):
    """Its log-ratio to the old policy and to the reference is far beyond float32's exponents."""
    x, y, old, advantages = batch(dtype=dtype)
    old[0, 0] += far
    reference = old.clone()
    for estimator in KL_ESTIMATORS:
        loss = PPOLoss(kind=kind, kl_coef=0.1, kl_estimator=estimator)
        out, gradient = outcome(loss, x, y, old, advantages, ref_logps=reference)
        assert out.loss.isfinite(), estimator
        assert gradient.isfinite().all(), estimator


@pytest.mark.parametrize(("kind", "level"), [("clip", "token"), ("clip", "sequence"), ("vespo", "token")])
def test_one_odd_token_of_the_sampler_leaves_them_finite(kind, level):
    """(vespo takes weights of tokens alone.)"""
    x, y, old, advantages = batch()
    for far in FAR:
        sampler = old.clone()
        sampler[0, 0] += far
        loss = PPOLoss(kind=kind, importance_cap=None, importance_level=level)
        out, gradient = outcome(loss, x, y, old, advantages, sampler_logps=sampler)
        assert out.loss.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("far", [61.0, 89.0, 1e4])
def test_the_bound_is_sixty(far):
    """k3 of a token that the reference finds e^far times likelier, its weights and its ratio: of e^60, not more."""
    here, there = torch.full((1, 1), -far - 1), torch.full((1, 1), -1.0)
    top = math.exp(60)
    k3 = losses.kl_estimate(here.double(), there.double(), kind="k3").item()
    assert k3 == pytest.approx(math.expm1(60) - far, rel=1e-12)
    assert losses.kl_estimate(here, there, kind="k3").item() == pytest.approx(top, rel=1e-6)
    mask = torch.ones(1, 1, dtype=torch.bool)
    for level in ("token", "sequence"):
        weight = losses.importance_weights(there, here, mask, level=level, cap=None)
        assert weight.item() == pytest.approx(top, rel=1e-6)
    out = losses.policy_loss(there.double(), here.double(), torch.ones(1, 1).double(), mask, kind="trpo")
    assert out.ratio.item() == pytest.approx(top, rel=1e-12)
    assert out.loss.item() == pytest.approx(-top, rel=1e-12)


def test_k3_plus_is_k3_in_value_and_k2_in_gradient():
    x, y, old, advantages = batch()
    made = {
        name: outcome(PPOLoss(kl_coef=0.5, kl_estimator=name), x, y, old, advantages, ref_logps=old + 0.2)
        for name in ("k2", "k3", "k3+")
    }
    torch.testing.assert_close(made["k3+"][0].loss, made["k3"][0].loss)
    torch.testing.assert_close(made["k3+"][0].kl, made["k3"][0].kl)
    torch.testing.assert_close(made["k3+"][1], made["k2"][1])
    assert (made["k3+"][1] - made["k3"][1]).abs().max() > 1e-4
