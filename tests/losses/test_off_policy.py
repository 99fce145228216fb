"""Samples of another policy: weights, rejection and metrics against verl's and TRL's formulas, and how losses use them.

verl is not installed by the tests: its formulas are derived anew. Its own bounds of log-ratios (20) are wider than
anything here.
"""

import math

import pytest
import torch

import fastalign as fa
from fastalign import losses, rl
from fastalign.losses import PPOLoss, importance_weights

B, T, V = 5, 7, 23
LENGTHS = torch.tensor([[7], [1], [4], [0], [3]])
MASK = torch.arange(T) < LENGTHS


def batch(dtype=torch.float64, seed=0):
    """logits, labels, and per token: old, sampler's and reference log-probabilities, advantages."""
    draw = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    x, labels = noise(B, T, V), torch.randint(V, (B, T), generator=draw)
    old = x.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1) + 0.2 * noise(B, T)
    more = [old, old + 0.4 * noise(B, T), old + 0.3 * noise(B, T), 0.3 + noise(B, T)]
    return x.to(dtype).requires_grad_(), labels.masked_fill(~MASK, -100), *(t.to(dtype) for t in more)


# -------------------------------------------------------------------------------------------------------------- weights
def _by_hand(old, sampler, level):
    ratios = (old - sampler).exp()
    rows = [row[keep] for row, keep in zip(ratios, MASK, strict=True)]
    of = {"token": lambda r: r, "sequence": lambda r: r.prod().expand_as(r)}
    of["geometric"] = lambda r: (r.prod() ** (1 / max(len(r), 1))).expand_as(r)
    return torch.cat([of[level](r) for r in rows])


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize(("floor", "cap"), [(None, None), (0.95, None), (None, 1.0), (0.95, 1.0)])
def test_levels_modes_and_bounds(level, floor, cap):
    _, _, old, sampler, _, _ = batch()
    ratios = _by_hand(old, sampler, level)
    low, high = 0.0 if floor is None else floor, math.inf if cap is None else cap
    outside = (ratios < low) | (ratios > high)
    assert outside.any() == ((floor, cap) != (None, None))
    for mode, expected in (("truncate", ratios.clamp(low, high)), ("mask", ratios.masked_fill(outside, 0.0))):
        found = importance_weights(old, sampler, MASK, level=level, mode=mode, floor=floor, cap=cap)
        torch.testing.assert_close(found[MASK], expected)
        assert not found.requires_grad


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("threshold", [1.3, (0.6, 1.3)])
@pytest.mark.parametrize("normalize", [False, True])
def test_matches_verls_weights(level, threshold, normalize):
    """A number truncates (TIS), two mask (IcePop); the mean is over tokens, or over sequences that hold one."""
    _, _, old, sampler, _, _ = batch()
    log_ratio = old - sampler
    if level == "sequence":
        log_ratio = (log_ratio * MASK).sum(-1, keepdim=True).expand_as(log_ratio)
    raw = log_ratio.exp() * MASK
    if isinstance(threshold, tuple):
        theirs = torch.where((raw >= threshold[0]) & (raw <= threshold[1]), raw, 0.0)
        how = {"mode": "mask", "floor": threshold[0], "cap": threshold[1]}
    else:
        theirs, how = raw.clamp(max=threshold), {"cap": threshold}
    if normalize:
        of_sequences = (theirs * MASK).sum(-1) / MASK.sum(-1).clamp(min=1)
        mean = theirs[MASK].mean() if level == "token" else of_sequences.sum() / MASK.any(-1).sum()
        theirs = theirs / mean
    found = importance_weights(old, sampler, MASK, level=level, normalize=normalize, **how)
    torch.testing.assert_close(found[MASK], theirs[MASK])


def test_weights_that_are_all_0_stay_so():
    _, _, old, _, _, _ = batch()
    found = importance_weights(old, old + 1, MASK, mode="mask", floor=0.9, normalize=True)
    assert not found[MASK].any()
    none = importance_weights(old, old, torch.zeros_like(MASK), level="geometric", normalize=True)
    assert none.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "word"}, "importance_level must be one of geometric, sequence, token; got 'word'"),
        ({"mode": "cut"}, "importance_mode must be one of mask, truncate; got 'cut'"),
        ({"floor": -1.0}, r"importance_floor must be in \[0, inf\]; got -1.0"),
        ({"floor": 3.0}, "importance_floor must be at most importance_cap, 2.0; got 3.0"),
    ],
)
def test_bad_weightings_are_refused_by_function_and_loss(options, message):
    x, labels, old, sampler, _, advantages = batch()
    with pytest.raises(ValueError, match=message):
        importance_weights(old, sampler, MASK, **options)
    named = {f"importance_{name}": value for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        PPOLoss(**named)(x, labels, old, advantages, sampler_logps=sampler)


# --------------------------------------------------------------------------------------------------------------- losses
LOSSES = {
    "geometric": {"importance_level": "geometric", "importance_floor": 0.9, "importance_cap": 1.1},
    "icepop": {"importance_mode": "mask", "importance_floor": 0.7, "importance_cap": 1.5},
    "mis normalized": {"importance_level": "sequence", "importance_mode": "mask", "importance_normalize": True},
    "normalized": {"importance_normalize": True, "normalization": "grpo"},
    "off-policy mask": {"off_policy_mask_threshold": 0.02},
    "unbiased kl": {"use_bias_correction_kl": True, "kl_coef": 0.3, "kl_estimator": "k3"},
    "vespo": {"kind": "vespo", "importance_mode": "mask", "importance_floor": 0.7, "off_policy_mask_threshold": 0.02},
    "gspo": {"kind": "gspo", "importance_level": "geometric", "use_bias_correction_kl": True, "kl_coef": 0.1},
    "entropy": {"top_entropy_quantile": 0.4, "entropy_coef": 0.1},
}


def outcome(options, source, labels, old, sampler, ref, advantages, **more):
    loss = PPOLoss(**options)
    given = {"ref_logps": ref} if options.get("kl_coef") else {}
    out = loss(source, labels, old, advantages, sampler_logps=sampler, **given, **more)
    leaf = source.hidden if isinstance(source, fa.Head) else source
    return loss, [t for t in out if t is not None], torch.autograd.grad(out.loss, leaf)[0]


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_program_equals_torch_operations_in_float64(name, backend):
    if fa.backends()[backend] != "available":
        pytest.skip("needs the compiled module fastalign._C")
    options, (x, *rest) = LOSSES[name], batch()
    _, exact, wanted = outcome(options, x, *rest)
    narrow = [t.float() if t.is_floating_point() else t for t in rest]
    with fa.use_backend(backend):
        loss, found, gradient = outcome(options, x.detach().float().requires_grad_(), *narrow)
        torch.testing.assert_close([t.double() for t in found], exact, rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(gradient.double(), wanted, rtol=2e-4, atol=2e-6)
    if backend == "cpu":
        assert "program of" in loss.fused.explain()
        assert "torch operations" not in loss.fused.explain()


@pytest.mark.parametrize("name", LOSSES)
def test_heads_whole_and_by_parts(name):
    options, (x, *rest) = LOSSES[name], batch()
    _, exact, wanted = outcome(options, x, *rest)
    for plan in (None, "objective"):
        head = fa.Head(x.detach().clone().requires_grad_(), torch.eye(V, dtype=torch.float64), plan=plan)
        if plan == "objective" and name == "entropy":
            with pytest.raises(ValueError, match=r"part by part, and top_entropy_quantile=0.4 needs the whole batch"):
                outcome(options, head, *rest)
            continue
        _, found, gradient = outcome(options, head, *rest)
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["geometric", "icepop", "mis normalized", "normalized", "unbiased kl"])
def test_in_one_visit(name):
    given = batch(torch.float32)
    _, exact, wanted = outcome(LOSSES[name], *given)
    _, found, gradient = outcome({**LOSSES[name], "fuse_backward": True}, *given)
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"off_policy_mask_threshold": 0.1}, {"top_entropy_quantile": 0.5}])
def test_what_looks_at_other_tokens_is_not_of_one_visit(options):
    with pytest.raises(ValueError, match="fuse_backward is for losses of single tokens"):
        PPOLoss(fuse_backward=True, **options)


def test_weights_that_are_given_are_used():
    x, labels, old, sampler, _, advantages = batch()
    weights = importance_weights(old, sampler, MASK, level="sequence", normalize=True)
    options = {"importance_level": "sequence", "importance_normalize": True}
    made = PPOLoss(**options)(x, labels, old, advantages, sampler_logps=sampler)
    given = PPOLoss()(x, labels, old, advantages, importance_weights=weights)
    torch.testing.assert_close(given.loss, made.loss)
    assert given.loss != PPOLoss()(x, labels, old, advantages).loss
    with pytest.raises(ValueError, match=r"importance_weights must have shape \[5, 7\]"):
        PPOLoss()(x, labels, old, advantages, importance_weights=weights[:4])


def test_the_unbiased_kl_has_the_gradient_of_the_kl_off_the_policy():
    """Exactly, summed over a vocabulary in the sampler's probabilities: k3 pi / pi_old has grad KL(pi, ref), k3 not."""
    draw = torch.Generator().manual_seed(0)
    x, old, ref = (torch.randn(V, generator=draw, dtype=torch.float64) for _ in range(3))
    x.requires_grad_()
    p = x.log_softmax(-1)
    (wanted,) = torch.autograd.grad((p.exp() * (p - ref.log_softmax(-1))).sum(), x)
    found = {}
    for corrected in (True, False):
        out = [
            losses.policy_loss(
                x.log_softmax(-1)[token].view(1, 1),
                old.log_softmax(-1)[token].view(1, 1),
                torch.zeros(1, dtype=torch.float64),
                torch.ones(1, 1, dtype=torch.bool),
                ref_logps=ref.log_softmax(-1)[token].view(1, 1),
                kl_coef=1.0,
                kl_estimator="k3",
                use_bias_correction_kl=corrected,
            ).loss
            * old.softmax(-1)[token]
            for token in range(V)
        ]
        (found[corrected],) = torch.autograd.grad(torch.stack(out).sum(), x)
    torch.testing.assert_close(found[True], wanted)
    assert (found[False] - wanted).norm() > 0.1 * wanted.norm()


@pytest.mark.parametrize("far", [89.0, 1e4, -89.0, -1e4])
def test_one_odd_token_leaves_them_finite(far):
    """Of the reference and of the old policy at once, in float32: k3 is e^60 there, and the factor e^20 at most."""
    x, labels, old, sampler, ref, advantages = batch(torch.float32)
    for shift in (far, -far):
        there = [t.clone() for t in (old, ref)]
        there[0][0, 0] += far
        there[1][0, 0] += shift
        options = {"use_bias_correction_kl": True, "kl_coef": 0.1, "kl_estimator": "k3"}
        _, found, gradient = outcome(options, x, labels, there[0], sampler, there[1], advantages)
        assert all(t.isfinite() for t in found)
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"off_policy_mask_threshold": -0.1}, r"off_policy_mask_threshold must be in \[0, inf\]"),
        ({"top_entropy_quantile": 1.1}, r"top_entropy_quantile must be in \[0, 1\]"),
        ({"use_bias_correction_kl": True, "kl_estimator": "exact"}, "use_bias_correction_kl is of KLs estimated"),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile below 1 needs entropy"),
    ],
)
def test_bad_options_are_named(options, message):
    _, _, old, _, _, advantages = batch()
    more = {"kl": old.abs()} if options.get("kl_estimator") == "exact" else {}
    with pytest.raises(ValueError, match=message):
        losses.policy_loss(old, old, advantages, MASK, **options, **more)
    with pytest.raises(TypeError, match=r"there is no argument 'top_entropy_share'; .* of all kinds importance_mode"):
        PPOLoss(top_entropy_share=0.5)


# ------------------------------------------------------------------------------------------------------------ rejection
def _verl_keeps(rule, bound, log_ratio):
    low, high = bound if isinstance(bound, tuple) else (1 / bound, bound)
    stat = {"1": -log_ratio, "2": 0.5 * log_ratio**2, "3": log_ratio.exp() - 1 - log_ratio}[rule[-1]]
    rows = [row[keep] for row, keep in zip(stat, MASK, strict=True)]
    level = rule[:-3]
    if level != "token":
        of = {"seq_sum": lambda r: r.sum(), "seq_mean": lambda r: r.mean(), "seq_max": lambda r: r.max()}[level]
        rows = [of(r).expand_as(r) if len(r) else r for r in rows]
    stat = torch.cat(rows)
    if rule.endswith("k1"):
        return (stat >= math.log(low)) & (stat <= math.log(high))
    return stat <= bound


@pytest.mark.parametrize("rule", sorted(rl.off_policy.REJECTIONS))
def test_matches_verls_rejection(rule):
    _, _, old, sampler, _, _ = batch()
    bounds = (1.05, 1.2, (0.95, 1.03), (0.8, 1.5)) if rule.endswith("k1") else (0.01, 0.04, 0.1, 0.2)
    shares = set()
    for bound in bounds:
        kept = rl.rejection_mask(old, sampler, MASK, rules={rule: bound})
        expected = _verl_keeps(rule, bound, old - sampler)
        assert torch.equal(kept[MASK], expected)
        assert not kept[~MASK].any()
        shares.add(float(kept.sum() / MASK.sum()))
    assert any(0 < share < 1 for share in shares)


def test_rules_hold_together():
    _, _, old, sampler, _, _ = batch()
    rules = {"token_k1": (0.6, 1.5), "seq_mean_k3": 0.1}
    one, other = (rl.rejection_mask(old, sampler, MASK, rules={name: bound}) for name, bound in rules.items())
    assert torch.equal(rl.rejection_mask(old, sampler, MASK, rules=rules), one & other)
    assert torch.equal(rl.rejection_mask(old, sampler, MASK, rules={}), MASK)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"token_k4": 1.0}, "rejection rule must be one of seq_max_k2, .*; got 'token_k4'"),
        ({"seq_max_k1": 1.0}, "rejection rule must be one of"),
        ({"token_k2": (0.1, 0.2)}, r"the bound of token_k2 must be one number; got \(0.1, 0.2\)"),
        ({"token_k1": (0.1,)}, r"the bound of token_k1 must be one number, or two; got \(0.1,\)"),
        ({"token_k1": 0.5}, r"the lower bound of token_k1 must be in \(0, 0.5\]; got 2.0"),
        ({"token_k3": 0.0}, r"the bound of token_k3 must be in \(0, inf\]; got 0.0"),
    ],
)
def test_bad_rules_are_named(rules, message):
    _, _, old, sampler, _, _ = batch()
    with pytest.raises(ValueError, match=message):
        rl.rejection_mask(old, sampler, MASK, rules=rules)


# -------------------------------------------------------------------------------------------------------------- metrics
def test_metrics_are_verls():
    _, _, old, sampler, _, _ = batch()
    log_ratio = (old - sampler)[MASK]
    found = rl.off_policy_metrics(old.masked_fill(~MASK, math.nan), sampler, MASK)
    ratio = log_ratio.exp()
    assert found.kl.item() == pytest.approx(-log_ratio.mean().item())
    assert found.k3.item() == pytest.approx((ratio - log_ratio - 1).mean().item())
    assert found.difference.item() == pytest.approx(log_ratio.abs().mean().item())
    assert found.least_ratio.item() == pytest.approx(ratio.min().item())
    assert found.largest_ratio.item() == pytest.approx(ratio.max().item())
    whole = torch.stack([(old - sampler)[b][MASK[b]].sum().exp() for b in range(B) if MASK[b].any()])
    extremes = (found.least_sequence_ratio.item(), found.largest_sequence_ratio.item())
    assert extremes == pytest.approx((whole.min().item(), whole.max().item()))
    for weights in (ratio, ratio.clamp(max=1.1)):
        wide = torch.zeros(B, T, dtype=torch.float64)
        wide[MASK] = weights
        ess = rl.off_policy_metrics(old, sampler, MASK, weights=wide).effective_sample_size
        assert ess.item() == pytest.approx(1 / (weights / weights.mean()).square().mean().item())
        assert 0 < ess < 1


def test_metrics_of_a_sampler_that_is_the_trainer_and_of_none():
    _, _, old, _, _, _ = batch(torch.float32)
    for mask in (MASK, torch.zeros_like(MASK)):
        found = rl.off_policy_metrics(old, old, mask)
        assert (found.kl, found.k3, found.difference) == (0, 0, 0)
        assert found[4:] == (1, 1, 1, 1)
        assert found.effective_sample_size == float(mask.any())
    none = rl.off_policy_metrics(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool))
    assert none[4:] == (1, 1, 1, 1)
