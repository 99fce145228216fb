"""Advantages, rewards, whitening and KL controllers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign import rl
from fastalign.reference import rl as oracle


def make(batch, length, seed, dtype=torch.float64, keep=0.7):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn((2, batch, length), generator=generator, dtype=dtype)
    return rewards, values, torch.rand((batch, length), generator=generator) < keep


# ------------------------------------------------------------------------------------------------------------------ GAE
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 99), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_definition(batch, length, seed, keep, gamma, lam):
    rewards, values, mask = make(batch, length, seed, keep=keep)
    advantages, returns = rl.gae(rewards, values, mask, gamma=gamma, lam=lam)
    torch.testing.assert_close(advantages, oracle.gae(rewards, values, mask, gamma, lam), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, advantages + values * mask, rtol=1e-12, atol=1e-12)
    assert (advantages[~mask] == 0).all()


def test_gae_in_single_precision():
    rewards, values, mask = make(7, 50, 3, dtype=torch.float32)
    advantages, returns = rl.gae(rewards, values, mask, gamma=0.99, lam=0.95)
    assert advantages.dtype == returns.dtype == torch.float32
    expected = oracle.gae(rewards, values, mask, 0.99, 0.95).float()
    torch.testing.assert_close(advantages, expected, rtol=1e-5, atol=1e-5)
    assert rl.gae(rewards.bfloat16(), values, mask)[0].dtype == torch.float32


def test_gae_limits():
    """lam = 0 is the TD error; lam = 1 the Monte Carlo return minus the value; no value after the last token."""
    rewards, values, _ = make(2, 4, 0)
    mask = torch.ones(2, 4, dtype=torch.bool)
    advantages, _ = rl.gae(rewards, values, mask, gamma=0.9, lam=0.0)
    torch.testing.assert_close(advantages[:, -1], rewards[:, -1] - values[:, -1])
    torch.testing.assert_close(advantages[:, 0], rewards[:, 0] + 0.9 * values[:, 1] - values[:, 0])
    _, returns = rl.gae(rewards, values, mask, gamma=0.9, lam=1.0)
    torch.testing.assert_close(returns, rl.discounted_returns(rewards, mask, gamma=0.9))
    torch.testing.assert_close(returns[:, 2], rewards[:, 2] + 0.9 * rewards[:, 3])


def test_gae_steps_over_hidden_tokens():
    """Padding on either side and a gap inside, all NaN, leave the real tokens as if they stood alone."""
    rewards, values, _ = make(3, 4, 1)
    alone = rl.gae(rewards, values, torch.ones(3, 4, dtype=torch.bool), gamma=0.9, lam=0.8)
    places = torch.tensor([1, 2, 5, 6])
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[:, places] = True

    def spread(x):
        wide = torch.full((3, 9), float("nan"), dtype=x.dtype)
        wide[:, places] = x
        return wide

    for got, expected in zip(rl.gae(spread(rewards), spread(values), mask, gamma=0.9, lam=0.8), alone, strict=True):
        torch.testing.assert_close(got[:, places], expected, rtol=0, atol=0)
        assert (got[~mask] == 0).all()


def test_gae_is_constant_and_takes_any_batch_shape():
    rewards, values, mask = make(6, 5, 2)
    advantages, returns = rl.gae(rewards, values.requires_grad_(), mask)
    assert not advantages.requires_grad
    assert not returns.requires_grad
    shaped = rl.gae(*(t.detach().reshape(2, 3, 5) for t in (rewards, values, mask)))[0]
    torch.testing.assert_close(shaped.reshape(6, 5), advantages)
    assert rl.gae(rewards[:, :0], values[:, :0], mask[:, :0])[0].shape == (6, 0)


# ------------------------------------------------------------------------------------------------------------ baselines
def test_group_advantages_by_hand():
    """Rewards 1, 2, 6: means of the others 4, 3.5, 1.5; group mean 3, sample deviation sqrt((4 + 1 + 9) / 2)."""
    rewards = torch.tensor([[1.0, 2.0, 6.0]])
    torch.testing.assert_close(rl.rloo_advantages(rewards), torch.tensor([[-3.0, -1.5, 4.5]]))
    torch.testing.assert_close(rl.grpo_advantages(rewards, scale=False), torch.tensor([[-2.0, -1.0, 3.0]]))
    expected = torch.tensor([[-2.0, -1.0, 3.0]]) / (math.sqrt(7) + 1e-4)
    torch.testing.assert_close(rl.grpo_advantages(rewards), expected)


def test_group_without_spread_has_no_advantage():
    for rewards in (torch.full((2, 4), 0.5), torch.ones(3, 1)):
        assert (rl.grpo_advantages(rewards, eps=0.0) == 0).all()


NOT_DYADIC = [0.1 * i + 0.01 for i in range(40)] + [1 / 3, 1e-8 / 7, 1e6 / 3, -0.7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [2, 3, 5, 7, 11, 49])
def test_equal_rewards_are_no_advantage_at_all(size, dtype):
    """The rounded mean of equal numbers is another number: 7 x 0.3 gave 0.926 with eps = 0, and one sign for all."""
    rewards = torch.tensor(NOT_DYADIC, dtype=dtype)[:, None].expand(-1, size)
    for eps in (0.0, 1e-4):
        assert (rl.grpo_advantages(rewards, eps=eps) == 0).all()
    assert (rl.grpo_advantages(rewards, scale=False) == 0).all()
    assert (rl.rloo_advantages(rewards) == 0).all()
    for row in rewards:
        mask = torch.arange(size) != 1
        hidden = torch.where(mask, row, float("nan"))
        for unbiased in (False, True):
            assert (rl.masked_whiten(hidden, mask, unbiased=unbiased) == 0).all()
            kept = rl.masked_whiten(hidden, mask, unbiased=unbiased, shift_mean=False)
            assert torch.equal(kept[mask], row[mask].to(kept.dtype))


def test_one_reward_apart_keeps_its_advantage():
    """Equality is exact: the smallest difference that float32 holds is standardised like any other."""
    apart = torch.tensor([0.3] * 6 + [math.nextafter(0.3, 1)], dtype=torch.float64)
    advantages = rl.grpo_advantages(apart, eps=0.0)
    torch.testing.assert_close(advantages[-1].item(), 6 / math.sqrt(7), rtol=1e-12, atol=0)
    torch.testing.assert_close(advantages[:-1], torch.full((6,), -1 / math.sqrt(7), dtype=torch.float64))


# ------------------------------------------------------------------------------------------------------------ whitening
@pytest.mark.parametrize("unbiased", [False, True])
def test_whitening_of_the_real_entries(unbiased):
    x, _, mask = make(5, 8, 4)
    hidden = torch.where(mask, x * 3 + 2, float("nan"))
    got = rl.masked_whiten(hidden, mask, unbiased=unbiased)
    assert (got[~mask] == 0).all()
    assert got[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert got[mask].var(unbiased=unbiased).item() == pytest.approx(1, abs=1e-8)
    kept = rl.masked_whiten(hidden, mask, unbiased=unbiased, shift_mean=False)
    assert kept[mask].mean().item() == pytest.approx(hidden[mask].mean().item())


def test_whitening_by_hand():
    """Ziegler et al. 2019 whiten with moments over n: (1, 3, 8) has mean 4 and variance (9 + 1 + 16) / 3 = 26 / 3.

    Divided by sqrt(26 / 3) = 2.9439203: -1.0190493, -0.3396831, 1.3587324; with the mean kept, 4 more.
    """
    x, mask = torch.tensor([1.0, 3.0, 8.0], dtype=torch.float64), torch.ones(3, dtype=torch.bool)
    expected = torch.tensor([-1.0190493307, -0.3396831102, 1.3587324410], dtype=torch.float64)
    torch.testing.assert_close(rl.masked_whiten(x, mask), expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(rl.masked_whiten(x, mask, shift_mean=False), expected + 4, rtol=0, atol=1e-8)


def test_whitening_of_one_or_none():
    x = torch.tensor([2.0, float("nan")])
    for unbiased in (False, True):
        assert rl.masked_whiten(x, torch.tensor([True, False]), unbiased=unbiased).tolist() == [0, 0]
        assert rl.masked_whiten(x, torch.tensor([False, False]), unbiased=unbiased).tolist() == [0, 0]


# ---------------------------------------------------------------------------------------------------------- controllers
def test_ziegler_controller_by_hand():
    """target 6, horizon 10,000, 256 episodes: an error of 12/6 - 1 = 1 is cut to 0.2, so beta grows by
    1 + 0.2 * 256 / 10,000 = 1.00512; a KL of 5.7 has error -0.05: 1 - 0.05 * 0.0256 = 0.99872; 0 is cut to -0.2."""
    controller = rl.AdaptiveKL(0.2, target=6.0, horizon=10_000)
    assert controller.update(12.0, 256) == pytest.approx(0.2 * 1.00512, rel=1e-12)
    assert controller.update(torch.tensor(5.7, dtype=torch.float64), 256) == pytest.approx(0.2 * 1.00512 * 0.99872)
    assert controller.update(0.0, 256) == pytest.approx(0.2 * 1.00512 * 0.99872 * 0.99488)


def test_schulman_controller_by_hand():
    controller = rl.SchulmanKL(1.0, target=0.03)
    assert [controller.update(kl) for kl in (0.0199, 0.0201, 0.0449, 0.0451, 1.0)] == [0.5, 0.5, 0.5, 1.0, 2.0]


def test_fixed_controller_stays():
    assert rl.FixedKL(0.05).update(100.0, 8) == 0.05


@pytest.mark.parametrize("make_controller", [rl.FixedKL, rl.AdaptiveKL, rl.SchulmanKL])
def test_controllers_resume(make_controller):
    one, other = make_controller(0.3), make_controller(0.1)
    one.update(50.0, 64)
    other.load_state_dict(one.state_dict())
    assert other.value == one.value
    assert other.update(2.0, 64) == one.update(2.0, 64)
    with pytest.raises(ValueError, match="state must have the key 'value' alone; got \\['beta'\\]"):
        other.load_state_dict({"beta": 1.0})
    with pytest.raises(ValueError, match="kl must be finite; got nan"):
        other.update(float("nan"))


def test_controllers_hold_their_target():
    """Where the KL falls as beta rises, as it does in training, the controller finds the beta of its target."""
    controller = rl.AdaptiveKL(0.2, target=6.0, horizon=1_000)
    for _ in range(500):
        controller.update(1.2 / controller.value, 64)
    assert controller.value == pytest.approx(0.2, rel=1e-3)


# -------------------------------------------------------------------------------------------------------------- rewards
def test_rewards_by_hand():
    """The score falls on the last real token, the penalty of a missing EOS with it; KL -0.5 (1, 2, ...) elsewhere."""
    nan = float("nan")
    logps = torch.tensor([[1.0, 2.0, nan, nan], [nan, 1.0, 1.0, 3.0]])
    ref = torch.tensor([[0.0, 0.0, nan, nan], [nan, 0.0, 1.0, 0.0]])
    mask = torch.tensor([[True, True, False, False], [False, True, True, True]])
    shaped = rl.shape_rewards(
        torch.tensor([10.0, 20.0]),
        logps,
        ref,
        mask,
        kl_coef=0.5,
        missing_eos_penalty=1.0,
        ended=torch.tensor([True, False]),
    )
    torch.testing.assert_close(shaped.rewards, torch.tensor([[-0.5, 9.0, 0.0, 0.0], [0.0, -0.5, 0.0, 17.5]]))
    torch.testing.assert_close(shaped.kl, torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(shaped.scores, torch.tensor([10.0, 19.0]))
    torch.testing.assert_close(shaped.rewards.sum(-1), shaped.scores + shaped.non_score_rewards)


def test_rewards_with_exact_kl_and_an_empty_response():
    kl, mask = torch.full((2, 3), 0.25), torch.tensor([[True, True, True], [False, False, False]])
    shaped = rl.shape_rewards(torch.ones(2), torch.zeros(2, 3), None, mask, kl_coef=1.0, kl_estimator="exact", kl=kl)
    torch.testing.assert_close(shaped.rewards, torch.tensor([[-0.25, -0.25, 0.75], [0.0, 0.0, 0.0]]))
    assert not shaped.rewards.requires_grad


# ------------------------------------------------------------------------------------------------------------ bad input
X, MASK = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rl.gae(X, X[:1], MASK), ValueError, r"values must have shape \[2, 3\], that of rewards; got \[1, 3\]"),
        (lambda: rl.gae(X, X, MASK.float()), TypeError, "mask must be a boolean tensor"),
        (lambda: rl.gae(X.long(), X, MASK), TypeError, "rewards must be a floating-point tensor; got torch.int64"),
        (lambda: rl.gae(X[0, 0], X[0, 0], MASK[0, 0]), ValueError, r"rewards must be \[..., T\]"),
        (lambda: rl.gae(X, X.to("meta"), MASK), ValueError, "values must be on the device of rewards, cpu; got meta"),
        (lambda: rl.gae(X, X, MASK, gamma=1.1), ValueError, r"gamma must be in \[0, 1\]; got 1.1"),
        (lambda: rl.gae(X, X, MASK, lam=-0.1), ValueError, r"lam must be in \[0, 1\]; got -0.1"),
        (lambda: rl.masked_whiten(X, MASK[:1]), ValueError, "mask must have shape"),
        (lambda: rl.rloo_advantages(X[:, :1]), ValueError, r"rewards must be \[..., K\] with K of 2 or more"),
        (lambda: rl.grpo_advantages(X, eps=-1), ValueError, "eps must be in"),
        (lambda: rl.shape_rewards(X[0], X, X, MASK), ValueError, r"scores must have shape \[2\]"),
        (lambda: rl.shape_rewards(X[:, 0], X, None, MASK), ValueError, "ref_logps must be given"),
        (lambda: rl.shape_rewards(X[:, 0], X, X, MASK, missing_eos_penalty=1.0), ValueError, "needs ended"),
        (lambda: rl.shape_rewards(X[:, 0], X, X, MASK, kl_estimator="k4"), ValueError, "kl_estimator must be one of"),
        (lambda: rl.FixedKL(-1.0), ValueError, "kl_coef must be in"),
        (lambda: rl.AdaptiveKL(0.0), ValueError, r"init_kl_coef must be in \(0"),
        (lambda: rl.AdaptiveKL(horizon=10).update(1.0, 50), ValueError, "n must be below 5"),
        (lambda: rl.SchulmanKL(target=0.0), ValueError, r"target must be in \(0"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
