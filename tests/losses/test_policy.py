"""Policy losses: laws that hold whatever the numbers, and what happens to bad input. The formulas: test_cases.py."""

import inspect

import pytest
import torch

import fastalign as fa
from fastalign import losses
from fastalign.losses.policy_objectives import KINDS
from fastalign.reference import policy as oracle

EVERY_KIND = sorted(KINDS)
NORMALIZATIONS = ("token", "bnpo", "grpo", "dapo", "dr_grpo")
OPTIONS = {"dapo": {"num_items": 13}, "dr_grpo": {"max_length": 9}}
# Of kinds: every candidate is taken, so that nothing is drawn.
OF_KIND = {"clip_cov": {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1}, "kl_cov": {"kl_cov_ratio": 0.3}}
BY_SEQUENCE = {"gspo", "luspo", "gmpo"}  # one ratio for a sequence, which all of its tokens move


def make(batch=3, length=6, seed=0, dtype=torch.float64):
    """logps, old_logps, advantages, mask of ragged responses with a hidden token inside."""
    generator = torch.Generator().manual_seed(seed)
    logps = -2 + 0.4 * torch.randn(batch, length, generator=generator, dtype=dtype)
    old = logps + 0.3 * torch.randn(batch, length, generator=generator, dtype=dtype)
    advantages = torch.randn(batch, length, generator=generator, dtype=dtype)
    lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
    lengths[0] = length
    mask = torch.arange(length) < lengths
    mask[0, 1] = False
    return logps, old, advantages, mask


def gradient(logps, *args, **options):
    logps = logps.clone().requires_grad_()
    output = losses.policy_loss(logps, *args, **options)
    output.loss.backward()
    return output, logps.grad


# ----------------------------------------------------------------------------------------------------------- at ratio 1
@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_step_zero_metrics_are_exact(kind, dtype):
    logps, _, advantages, mask = make(5, 33, dtype=dtype)
    output = losses.policy_loss(logps, logps, advantages, mask, kind=kind)
    assert output.ratio == 1
    assert output.approxkl == 0
    if kind != "clip_cov":  # what it leaves out counts as cut
        assert output.clipfrac == 0


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("kind", sorted(set(EVERY_KIND) - BY_SEQUENCE - {"reinforce", "clip_cov"}))
def test_at_ratio_one_the_gradient_is_the_policy_gradient(kind, normalization):
    logps, _, advantages, mask = make()
    options = {"normalization": normalization, **OPTIONS.get(normalization, {})}
    _, expected = gradient(logps, logps, advantages, mask, kind="reinforce", **options)
    _, got = gradient(logps, logps, advantages, mask, kind=kind, **options)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", sorted(BY_SEQUENCE))
def test_at_ratio_one_a_sequences_ratio_is_the_policy_gradient_for_one_advantage(kind):
    """LUSPO's length undoes the division by it: the gradient of a mean over sequences is that of a sum over tokens."""
    logps, _, advantages, mask = make()
    options = {"normalization": "dr_grpo", "max_length": 1} if kind == "luspo" else {"normalization": "grpo"}
    _, expected = gradient(logps, logps, advantages[:, 0], mask, kind="reinforce", **options)
    _, got = gradient(logps, logps, advantages[:, 0], mask, kind=kind, normalization="grpo")
    torch.testing.assert_close(got, expected)


def test_grpo_of_one_group_is_reinforce_with_the_group_mean_as_baseline():
    from fastalign.rl import grpo_advantages

    logps, _, rewards, mask = make(batch=4)
    rewards = rewards[:, 0]
    _, got = gradient(logps, logps, grpo_advantages(rewards, scale=False), mask, kind="clip", normalization="grpo")
    _, expected = gradient(logps, logps, rewards - rewards.mean(), mask, kind="reinforce", normalization="grpo")
    torch.testing.assert_close(got, expected)


def test_old_policy_is_a_constant_even_if_it_requires_a_gradient():
    logps, _, advantages, mask = make()
    _, expected = gradient(logps, logps.clone(), advantages, mask)
    valid = logps.clone().requires_grad_()
    losses.policy_loss(valid, valid, advantages.requires_grad_(), mask).loss.backward()
    torch.testing.assert_close(valid.grad, expected)
    assert advantages.grad is None


# ------------------------------------------------------------------------------------------------- what must not matter
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_padding_changes_nothing(kind, normalization):
    """NaN under the mask, more of it on either side, rows of nothing else: same loss, same gradient, same metrics."""
    logps, old, advantages, mask = make()
    ref, entropy = old.flip(1), logps.abs()
    options = {"kind": kind, "normalization": normalization, "kl_coef": 0.1, "kl_estimator": "k3", "entropy_coef": 0.01}
    options |= OPTIONS.get(normalization, {}) | OF_KIND.get(kind, {})
    plain, expected = gradient(
        logps, old, advantages, mask, ref_logps=ref, entropy=entropy, sampler_logps=old + 0.1, **options
    )

    def padded(x, fill=float("nan")):
        x = torch.where(mask, x, fill) if x.dtype != torch.bool else x
        wide = x.new_full((x.shape[0] + 2, x.shape[1] + 5), fill)
        wide[1:-1, 2:-3] = x
        return wide

    tensors = [padded(x) for x in (logps, old, advantages)]
    more = {"ref_logps": padded(ref), "entropy": padded(entropy), "sampler_logps": padded(old + 0.1)}
    output, got = gradient(*tensors, padded(mask, False), **more, **options)
    for a, b in zip(output, plain, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(got[1:-1, 2:-3], expected)
    assert got.isfinite().all()


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_order_of_the_batch_changes_nothing(kind):
    tensors = make(batch=5)
    order = torch.tensor([3, 0, 4, 1, 2])
    options = {"kind": kind, "normalization": "grpo", **OF_KIND.get(kind, {})}
    plain, expected = gradient(*tensors, **options)
    output, got = gradient(*(t[order] for t in tensors), **options)
    torch.testing.assert_close(output.loss, plain.loss)
    torch.testing.assert_close(got, expected[order])


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_microbatches_add_up(normalization):
    """With the whole batch's count, losses and gradients of unequal parts sum to those of the whole."""
    logps, old, advantages, mask = make(batch=5)
    options = {"normalization": normalization, **OPTIONS.get(normalization, {})}
    options |= {"kl_coef": 0.3, "kl_estimator": "k2", "entropy_coef": 0.2}
    options["num_items"] = len(mask) if normalization in ("grpo", "dr_grpo") else int(mask.sum())

    def run(rows):
        args = (t[rows] for t in (logps, old, advantages, mask))
        return gradient(*args, ref_logps=old[rows] - 0.1, entropy=old[rows].abs(), **options)

    whole, expected = run(slice(0, 5))
    parts = [run(slice(0, 1)), run(slice(1, 5))]
    torch.testing.assert_close(sum(output.loss for output, _ in parts), whole.loss)
    torch.testing.assert_close(torch.cat([g for _, g in parts]), expected)


def test_nothing_real_is_a_loss_of_zero():
    logps, old, advantages, mask = make()
    for normalization in NORMALIZATIONS:
        options = {"normalization": normalization, **OPTIONS.get(normalization, {})}
        output, got = gradient(logps * float("nan"), old, advantages, mask & False, **options)
        assert output.loss == 0
        assert (got == 0).all()


def test_a_ratio_beyond_float_range_does_not_poison_its_neighbours():
    logps, old, advantages, mask = make(dtype=torch.float32)
    old[0, 0], advantages[0, 0] = -1e4, 1.0
    output, got = gradient(logps, old, advantages, mask)
    assert output.loss.isfinite()
    assert got.isfinite().all()
    assert got[0, 0] == 0


# ------------------------------------------------------------------------------------------------------------ the terms
def test_dual_clip_bounds_the_loss_of_bad_actions():
    logps = torch.zeros(1, 2, dtype=torch.float64)
    old = torch.tensor([[-3.0, 0.0]], dtype=torch.float64)  # ratios e^3 and 1
    advantages = torch.tensor([[-2.0, -2.0]], dtype=torch.float64)
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert losses.policy_loss(logps, old, advantages, mask, dual_clip=3.0).loss.item() == pytest.approx((6 + 2) / 2)
    assert losses.policy_loss(logps, old, advantages, mask, dual_clip=3.0).clipfrac == 0.5


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "k3+"])
def test_kl_estimators_against_exact_kl(kind):
    """Over a small vocabulary the expectation is a sum. k1, k3 and k3+ equal KL(p, q), k2 to third order; and the
    gradients of the losses that they make are those that `kl_estimate` warns of."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(11, generator=generator, dtype=torch.float64).requires_grad_()
    logq = torch.log_softmax(x.detach() + 0.05 * torch.randn(11, generator=generator, dtype=torch.float64), -1)
    logp = torch.log_softmax(x, -1)
    estimate = losses.kl_estimate(logp, logq, kind=kind)
    exact, reverse = (logp.exp() * (logp - logq)).sum(), (logq.exp() * (logq - logp)).sum()
    value = (logp.exp() * estimate).sum()
    torch.testing.assert_close(value, exact, rtol=0.1 if kind == "k2" else 1e-9, atol=0)
    (as_loss,) = torch.autograd.grad((logp.exp().detach() * estimate).sum(), x, retain_graph=True)
    (true,) = torch.autograd.grad(exact, x, retain_graph=True)
    expected = {"k1": torch.zeros_like(x), "k2": true, "k3": torch.autograd.grad(reverse, x)[0], "k3+": true}[kind]
    torch.testing.assert_close(as_loss, expected, rtol=1e-9, atol=1e-14)


def test_exact_kl_and_entropy_of_the_module():
    generator = torch.Generator().manual_seed(2)
    logits, ref = torch.randn((2, 2, 5, 9), generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 9, (2, 5), generator=generator)
    labels[1, 3:] = -100
    valid = labels != -100
    old = fa.token_logps(logits, labels)
    module = losses.PPOLoss(kl_estimator="exact", kl_coef=0.5, entropy_coef=0.25)
    output = module(logits, labels, old, torch.zeros(2, 5, dtype=torch.float64), ref_logits=ref)
    logp, logq = torch.log_softmax(logits, -1), torch.log_softmax(ref, -1)
    kl = (logp.exp() * (logp - logq)).sum(-1)[valid].mean()
    entropy = -(logp.exp() * logp).sum(-1)[valid].mean()
    torch.testing.assert_close(output.kl, kl)
    torch.testing.assert_close(output.entropy, entropy)
    torch.testing.assert_close(output.loss, 0.5 * kl - 0.25 * entropy)


def test_importance_weights_are_ratios_until_the_cap():
    old = torch.log(torch.tensor([[0.5, 0.2, 0.9]]))
    sampler = torch.log(torch.tensor([[0.25, 0.4, 0.1]]))
    mask = torch.tensor([[True, True, False]])
    weights = losses.importance_weights(old, sampler, mask, cap=1.8)
    torch.testing.assert_close(weights, torch.tensor([[1.8, 0.5, 1.0]]))
    sequence = losses.importance_weights(old, sampler, mask, level="sequence", cap=None)
    torch.testing.assert_close(sequence, torch.ones(1, 3))


@pytest.mark.parametrize("kind", sorted(set(EVERY_KIND) - {"cispo", "gspo_token", "vespo", "dppo_tv", "dppo_kl"}))
def test_gradcheck(kind):
    """The others detach ratios by definition, so that their gradient is not that of their value."""
    logps, old, advantages, mask = make()
    kl, entropy = logps.abs(), old.abs()

    def loss(logps, kl, entropy):
        options = {"kl_estimator": "exact", "kl_coef": 0.3, "entropy_coef": 0.2, "normalization": "grpo"}
        options |= OF_KIND.get(kind, {})
        return losses.policy_loss(logps, old, advantages, mask, kind=kind, kl=kl, entropy=entropy, **options).loss

    assert torch.autograd.gradcheck(loss, [t.requires_grad_() for t in (logps, kl, entropy)])


def test_value_loss_by_hand():
    """v = 1, v_old = 0, R = 3: clipped to 0.2 the error is 2.8^2, above 2^2. v = 0.1, R = 0: nothing cut, 0.1^2."""
    values, old = torch.tensor([[1.0, 0.1, float("nan")]]), torch.zeros(1, 3)
    returns, mask = torch.tensor([[3.0, 0.0, float("inf")]]), torch.tensor([[True, True, False]])
    output = losses.value_loss(values.requires_grad_(), old, returns, mask)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(0.5 * (2.8**2 + 0.1**2) / 2)
    assert output.clipfrac == 0.5
    torch.testing.assert_close(values.grad, torch.tensor([[0.0, 0.05, 0.0]]))
    free = losses.value_loss(values, old, returns, mask, cliprange_value=None)
    assert free.loss.item() == pytest.approx(0.5 * (2**2 + 0.1**2) / 2)


def test_every_kind_and_normalization_has_an_oracle():
    assert set(oracle.OBJECTIVES) == set(KINDS)
    assert set(oracle.AVERAGES) == set(losses.policy.NORMALIZATIONS)


def test_the_module_offers_every_option_of_the_function():
    tensors = {"ref_logps", "kl", "entropy", "sampler_logps", "num_items", "importance_weights"}
    options = {p.name for p in inspect.signature(losses.policy_loss).parameters.values() if p.kind == p.KEYWORD_ONLY}
    assert options - tensors <= set(inspect.signature(losses.PPOLoss).parameters)


# ------------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "ppo"}, ValueError, "kind must be one of cispo, clip"),
        ({"kind": "dro", "dro_beta": -1.0}, ValueError, "dro_beta must be in"),
        ({"kind": "sapo", "sapo_temperature_pos": 0.0}, ValueError, r"sapo_temperature_pos must be in \(0"),
        ({"kind": "kl_cov", "kl_cov_ratio": 1.5}, ValueError, r"kl_cov_ratio must be in \(0, 1"),
        ({"kind": "clip_cov", "clip_cov_lb": 6.0}, ValueError, r"clip_cov_ub must be above clip_cov_lb, 6.0; got 5.0"),
        ({"kind": "dro", "kl_cov_coef": 1.0}, ValueError, "kl_cov_coef must be left out but for kind kl_cov; got it"),
        ({"beta": 1.0}, TypeError, "there is no argument 'beta'; options of kinds are sapo_temperature_pos"),
        ({"kind": "vespo", "importance_level": "sequence"}, ValueError, "importance_level must be 'token' with kind="),
        ({"normalization": "mean"}, ValueError, "normalization must be one of bnpo"),
        ({"kl_estimator": "k4"}, ValueError, "kl_estimator must be one of abs, exact, k1"),
        ({"importance_level": "all", "sampler_logps": torch.zeros(3, 6)}, ValueError, "importance_level must be one"),
        ({"normalization": "dapo"}, ValueError, "dapo' needs num_items"),
        ({"normalization": "dr_grpo"}, ValueError, "dr_grpo' needs max_length"),
        ({"num_items": -1}, ValueError, r"num_items must be in \[0"),
        ({"num_items": torch.ones(2)}, ValueError, r"num_items must be one number; got a tensor of shape \[2\]"),
        ({"cliprange": -0.1}, ValueError, "cliprange must be in"),
        ({"cliprange_high": float("nan")}, ValueError, "cliprange_high must be in"),
        ({"dual_clip": 1.0}, ValueError, r"dual_clip must be in \(1"),
        ({"kl_coef": 0.1}, ValueError, "kl_coef other than 0 needs ref_logps"),
        ({"entropy_coef": 0.1}, ValueError, "entropy_coef other than 0 needs entropy"),
        ({"kl": torch.zeros(3, 6)}, ValueError, "kl, the exact KL of each token, goes with kl_estimator='exact'"),
        ({"kl_estimator": "exact"}, ValueError, "kl, the exact KL of each token, goes with kl_estimator='exact'"),
        ({"old_logps": torch.zeros(3, 5)}, ValueError, r"old_logps must have shape \[3, 6\], that of logps; got \["),
        ({"advantages": torch.zeros(6)}, ValueError, r"advantages must have shape \[3, 6\]"),
        ({"ref_logps": torch.zeros(3, 1)}, ValueError, "ref_logps must have shape"),
        ({"mask": torch.ones(3, 6)}, TypeError, "mask must be a boolean tensor, True = real; got torch.float32"),
        ({"logps": torch.zeros(3, 6, dtype=torch.long)}, TypeError, "logps must be a floating-point tensor"),
        ({"entropy": [0.0]}, TypeError, "entropy must be a torch.Tensor; got list"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    logps, old, advantages, mask = make(dtype=torch.float32)
    arguments = {"logps": logps, "old_logps": old, "advantages": advantages, "mask": mask, **change}
    with pytest.raises(error, match=message):
        losses.policy_loss(**arguments)


def test_bad_input_elsewhere():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="kind must be one of abs, k1, k2, k3, k3\\+, k3_clamped; got 'k0'"):
        losses.kl_estimate(x, x, kind="k0")
    with pytest.raises(ValueError, match="returns must have shape"):
        losses.value_loss(x, x, x[:1], mask)
    with pytest.raises(ValueError, match="cliprange_value must be in"):
        losses.value_loss(x, x, x, mask, cliprange_value=-1.0)
    with pytest.raises(ValueError, match="ptx_coef must be in"):
        losses.ptx_loss(x.sum(), x, mask, ptx_coef=-1.0)
    with pytest.raises(ValueError, match="ref_logits go with kl_estimator='exact'"):
        losses.PPOLoss()(torch.zeros(2, 3, 5), mask.long(), x, x, ref_logits=torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match="kind must be one of"):
        losses.PPOLoss(kind="a3c")
