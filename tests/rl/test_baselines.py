"""Baselines of advantages against their definitions in plain Python, and what must not be learnt from."""

import pytest
import torch

from fastalign import rl
from fastalign.reference import rl as oracle

DRAW = torch.Generator().manual_seed(0)
REWARDS = torch.randn(5, 4, generator=DRAW, dtype=torch.float64)
REWARDS[1] = 0.3  # all alike
REWARDS[2, :2] = 5.0  # two are the best
LENGTHS = torch.randint(1, 9, (5, 4), generator=DRAW)
GROUPS = REWARDS.tolist()


def close(got, want, **more):
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12, **more)


def ragged(x, mask):
    return [row[real].tolist() for row, real in zip(x.flatten(0, -2), mask.flatten(0, -2), strict=True)]


def test_opo():
    want = [oracle.opo(g, n) for g, n in zip(GROUPS, LENGTHS.tolist(), strict=True)]
    close(rl.opo_advantages(REWARDS, LENGTHS), want)
    close(rl.opo_advantages(REWARDS[0], LENGTHS[0]), want[0])


def test_opo_of_equal_lengths_is_dr_grpos():
    torch.testing.assert_close(
        rl.opo_advantages(REWARDS, torch.full((5, 4), 7)), rl.grpo_advantages(REWARDS, scale=False)
    )


TOKENS = torch.arange(8) < LENGTHS.unsqueeze(-1)
LOGPS = -torch.rand(TOKENS.shape, generator=DRAW, dtype=torch.float64)
ENERGIES = (2 * LOGPS).exp() + 0.1 * torch.rand(TOKENS.shape, generator=DRAW, dtype=torch.float64)


def test_otb():
    rewards = torch.where(TOKENS, torch.randn(TOKENS.shape, generator=DRAW, dtype=torch.float64), torch.nan)
    logps, energies = (torch.where(TOKENS, x, torch.nan) for x in (LOGPS, ENERGIES))
    got = rl.otb_advantages(rewards, TOKENS, logps, energies.log())
    assert (got[~TOKENS] == 0).all()
    for k in range(5):
        want = oracle.otb(*(ragged(x[k], TOKENS[k]) for x in (rewards, logps, energies)))
        for mine, theirs in zip(ragged(got[k], TOKENS[k]), want, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-9, abs=1e-12)
    alone = TOKENS & (TOKENS.sum(1, keepdim=True) == 1)
    assert alone.any()
    assert (got[alone] == 0).all()


def test_otb_of_equal_weights_is_the_groups_mean():
    """Tokens of one and the same distribution: every baseline is the mean over the responses that have the token."""
    whole = torch.ones(5, 4, 3, dtype=torch.bool)
    rewards = torch.zeros(5, 4, 3, dtype=torch.float64)
    rewards[..., -1] = REWARDS
    same = torch.full_like(rewards, -0.7)
    got = rl.otb_advantages(rewards, whole, same, torch.full_like(rewards, -1.0))
    torch.testing.assert_close(got, rl.grpo_advantages(REWARDS, scale=False)[..., None].expand(got.shape))


def test_otb_weighs_returns_by_the_gradients_norm_so_far():
    """The baseline of least variance: of all constants b at a place, the sum of W (G - b)^2 is least at this one."""
    rewards = torch.randn(TOKENS.shape, generator=DRAW, dtype=torch.float64) * TOKENS
    got = rl.otb_advantages(rewards, TOKENS, LOGPS, ENERGIES.log())
    weights = ((1 - 2 * LOGPS.exp() + ENERGIES) * TOKENS).cumsum(-1) * TOKENS
    for shift in (-0.1, 0.1):
        assert ((weights * (got + shift) ** 2).sum(1) + 1e-12 >= (weights * got**2).sum(1)).all()


def test_passk():
    want = [oracle.passk(g, 1e-6) for g in GROUPS]
    want[1] = want[2] = [0.0] * 4
    close(rl.passk_advantages(REWARDS), want)
    plain = rl.passk_advantages(REWARDS, scale=False)
    close(plain, [oracle.passk(g) for g in GROUPS])
    assert (plain > 0).sum() == 3


def test_gpg():
    """Four of five groups have a gradient: 5 / 4 times as much each."""
    close(rl.gpg_advantages(REWARDS), oracle.gpg(GROUPS))
    torch.testing.assert_close(rl.gpg_advantages(REWARDS), 1.25 * rl.grpo_advantages(REWARDS, scale=False))


def test_gdpo():
    several = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    several[:, :, 2] *= 100
    several[3, :, 1] = 0.7
    for weights in (None, [1.0, 0.5, 2.0]):
        close(rl.gdpo_advantages(several, weights), oracle.gdpo(several.tolist(), weights or [1.0] * 3, 1e-4))


def test_gdpo_hears_the_quiet_reward():
    """Two rewards of spreads 1 and 100 weigh alike; in their sum the second one would be all there is."""
    quiet = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    loud = torch.tensor([0.0, 0.0, 100.0, 100.0], dtype=torch.float64)
    a = rl.gdpo_advantages(torch.stack([quiet, loud], -1)[None])[0]
    assert a[1] - a[0] == pytest.approx(float(a[2] - a[0]), rel=1e-3)


def test_remax():
    greedy = torch.tensor([1.0, 0.3, 5.0, -1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(rl.remax_advantages(REWARDS, greedy), REWARDS - greedy[:, None])


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_pp(gamma):
    mask = torch.arange(8) < LENGTHS.unsqueeze(-1)
    rewards = torch.where(mask, torch.randn(mask.shape, generator=DRAW, dtype=torch.float64), torch.nan)
    got = rl.reinforce_pp_advantages(rewards, mask, gamma=gamma)
    assert (got[~mask] == 0).all()
    for mine, want in zip(ragged(got, mask), oracle.reinforce_pp(ragged(rewards, mask), gamma), strict=True):
        assert mine == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_reinforce_pp_baseline():
    mask = torch.arange(8) < LENGTHS.unsqueeze(-1)
    got = rl.reinforce_pp_baseline_advantages(REWARDS, mask)
    assert (got[~mask] == 0).all()
    for mine, want in zip(ragged(got, mask), oracle.reinforce_pp_baseline(GROUPS, LENGTHS.tolist()), strict=True):
        assert mine == pytest.approx(want, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("size", [2, 3, 7, 11])
def test_equal_rewards_are_no_advantage_at_all(size):
    """Rounded means and weighted means of equal numbers are other numbers: exactly 0 all the same."""
    rewards = torch.tensor([0.1 * i + 0.01 for i in range(20)] + [1 / 3, 1e6 / 3])[:, None].expand(-1, size)
    lengths = torch.randint(1, 999, rewards.shape, generator=DRAW)
    mask = torch.ones(*rewards.shape, 3, dtype=torch.bool)
    assert (rl.opo_advantages(rewards, lengths) == 0).all()
    assert (rl.passk_advantages(rewards, eps=0.0) == 0).all()
    assert (rl.gpg_advantages(rewards) == 0).all()
    assert (rl.gdpo_advantages(torch.stack([rewards, 2 * rewards], -1), eps=0.0) == 0).all()
    assert (rl.reinforce_pp_baseline_advantages(rewards, mask) == 0).all()
    at_end = torch.zeros(mask.shape)
    at_end[..., -1] = rewards
    logps = -torch.rand(mask.shape, generator=DRAW)
    assert (rl.otb_advantages(at_end, mask, logps, logps) == 0).all()


def test_overlong_penalty():
    lengths = torch.arange(1, 15)
    want = [oracle.overlong(n, 12, 5) for n in range(1, 15)]
    got = rl.overlong_penalty(lengths, max_length=12, buffer=5)
    assert got.tolist() == pytest.approx(want)
    assert (got[6].item(), got[7].item(), got[11].item(), got[13].item()) == (0, pytest.approx(-0.2), -1, -1)


def test_all_are_constants():
    rewards = REWARDS.clone().requires_grad_()
    mask = torch.ones(5, 4, 3, dtype=torch.bool)
    for found in (
        rl.opo_advantages(rewards, LENGTHS),
        rl.otb_advantages(rewards[..., None] * TOKENS, TOKENS, LOGPS, ENERGIES.log()),
        rl.passk_advantages(rewards),
        rl.gpg_advantages(rewards),
        rl.gdpo_advantages(rewards[..., None]),
        rl.remax_advantages(rewards, rewards[:, 0]),
        rl.reinforce_pp_baseline_advantages(rewards, mask),
    ):
        assert not found.requires_grad
        assert found.isfinite().all()
        assert found.abs().max() > 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rl.opo_advantages(REWARDS, LENGTHS[:2]), ValueError, r"lengths must have shape \[5, 4\], that of rew"),
        (lambda: rl.otb_advantages(LOGPS, TOKENS[:2], LOGPS, LOGPS), ValueError, "mask must have shape"),
        (lambda: rl.otb_advantages(LOGPS, TOKENS, LOGPS[:2], LOGPS), ValueError, "logps must have shape"),
        (lambda: rl.passk_advantages(REWARDS[:, :1]), ValueError, r"rewards must be \[..., K\] with K of 2 or more"),
        (lambda: rl.passk_advantages(REWARDS, eps=-1.0), ValueError, r"eps must be in \[0"),
        (lambda: rl.gpg_advantages(LENGTHS), TypeError, "rewards must be a floating-point tensor; got torch.int64"),
        (lambda: rl.gdpo_advantages(REWARDS), ValueError, r"rewards must be \[P, K, N\]; got shape \[5, 4\]"),
        (lambda: rl.gdpo_advantages(REWARDS[..., None], [1.0, 2.0]), ValueError, "weights must be 1 numbers"),
        (lambda: rl.remax_advantages(REWARDS, REWARDS), ValueError, r"greedy_rewards must have shape \[5\]"),
        (lambda: rl.reinforce_pp_baseline_advantages(REWARDS, LENGTHS > 0), ValueError, "mask must have shape"),
        (lambda: rl.overlong_penalty(LENGTHS, max_length=8, buffer=9), ValueError, r"buffer must be in \[1, 8\]"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
