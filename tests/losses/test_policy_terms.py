"""PPO and its like on the CPU in one call: the numbers of the general path, from float64 formulas; else that path."""

import math

import pytest
import torch

from fastalign import token_logps
from fastalign.losses import PPOLoss

OPTIONS = [
    {},
    {"cliprange": 0.1, "cliprange_high": 0.4, "dual_clip": 3.0},
    {"kind": "reinforce"},
    {"kind": "trpo", "kl_coef": 0.1, "kl_estimator": "k3"},
    {"kind": "penalty", "kl_coef": 0.2, "kl_estimator": "k2"},
    {"kind": "penalty", "kl_coef": 0.2, "kl_estimator": "k1"},
    {"kind": "cispo", "cliprange": 1.0, "cliprange_high": 0.3},
    {"kl_coef": 0.3, "kl_estimator": "k3", "normalization": "bnpo"},
    {"kl_coef": 0, "kl_estimator": "k2"},
    {"kl_coef": 0.3, "kl_estimator": "k3+"},
    *({"kind": kind, "normalization": "grpo"} for kind in ("sapo", "luspo", "vespo", "gmpo", "dro", "gpg")),
    {"kind": "dppo_tv", "cliprange": 0.02},
    {"kind": "dppo_kl", "cliprange": 0.001},
]


NEWER = ("sapo", "luspo", "vespo", "gmpo", "dppo_tv", "dppo_kl", "dro", "kl_cov")


def problem(batch=5, length=6, vocab=29, dtype=torch.float32, scale=2.0, per_token=True):
    draw = torch.Generator().manual_seed(batch * length * vocab)
    x = torch.randn(batch, length, vocab, generator=draw).mul(scale).to(dtype)
    y = torch.randint(vocab, (batch, length), generator=draw)
    y[torch.rand(batch, length, generator=draw) < 0.3] = -100
    logps = x.double().log_softmax(-1).gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    old = (logps + 0.3 * torch.randn(y.shape, generator=draw)).float()
    reference = (logps + 0.5 * torch.randn(y.shape, generator=draw)).float()
    advantages = torch.randn(y.shape if per_token else y.shape[:1], generator=draw)
    for hidden in (old, reference, *([advantages] if per_token else [])):
        hidden[y == -100] = math.nan  # may be anything
    return x.requires_grad_(), y, old, advantages, reference


def outcome(options, x, y, old, advantages, reference, scale=1.0, **more):
    needs = options.get("kl_coef") is not None and options.get("kind") != "penalty"
    out = PPOLoss(**options)(x, y, old, advantages, ref_logps=reference if needs else None, **more)
    return [None if t is None else t.detach() for t in out], torch.autograd.grad(scale * out.loss, x)[0]


def general(programs, *args, **more):
    """As torch operations."""
    with programs.off():
        return outcome(*args, **more)


def wide(x, *rest):
    return x.detach().double().requires_grad_(), *(t.double() if t.is_floating_point() else t for t in rest)


CONDITION = {"vespo": 10.0}
"""Beyond 1: W is a product of T ratios, and a rounding u of each log pi moves phi by |k - lambda W| T |log pi| u, here
up to 3 * 6 * 4 * 6e-8 = 4e-6 of itself; the general path's own roundings may happen to undo it."""


def no_further(found, theirs, exact, condition=1.0):
    for got, other, want in zip(found, theirs, exact, strict=True):
        if want is None:
            assert got is other is None
            continue
        assert got.dtype == other.dtype
        assert got.shape == other.shape
        off, allowed = ((t.double() - want).abs().max() for t in (got, other))
        assert off <= allowed + condition * 1e-6 * want.abs().max().clamp(min=0.1)


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_further_from_float64_than_the_general_road(programs, options, dtype, per_token):
    given = problem(dtype=dtype, per_token=per_token)
    found, gradient = outcome(options, *given)
    assert programs.ran[0] is not None
    theirs, theirs_gradient = general(programs, options, *given)
    exact, exact_gradient = general(programs, options, *wide(*given))
    condition = CONDITION.get(options.get("kind"), 1.0)
    no_further(found, theirs, exact, condition)
    no_further([gradient], [theirs_gradient], [exact_gradient], condition)


@pytest.mark.parametrize("num_items", [0, 7, 12.5])
def test_a_count_of_items(programs, num_items):
    given = problem()
    found, gradient = outcome({}, *given, num_items=num_items)
    theirs, theirs_gradient = general(programs, {}, *given, num_items=num_items)
    for got, want in zip([*found, gradient], [*theirs, theirs_gradient], strict=True):
        if want is not None:
            torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-7)


def test_the_first_step_is_on_policy():
    x, y, *_ = problem()
    old = token_logps(x.detach(), y)
    out = PPOLoss()(x, y, old, torch.ones(y.shape))
    assert (out.ratio, out.approxkl, out.clipfrac) == (1, 0, 0)
    assert out.loss.item() == -1.0


@pytest.mark.parametrize("distance", [70.0, -70.0, 1e4, -1e4])
@pytest.mark.parametrize("kind", ["clip", "trpo", "cispo", "reinforce", *NEWER])
def test_far_off_policies(programs, kind, distance):
    x, y, old, advantages, reference = problem()
    given = (x, y, old + distance, advantages, reference)
    found, gradient = outcome({"kind": kind}, *given)
    exact, exact_gradient = general(programs, {"kind": kind}, *wide(*given))
    for got, want in zip([*found, gradient], [*exact, exact_gradient], strict=True):
        if want is not None:
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)


def test_scaled_and_in_place_and_without_gradients():
    given = problem()
    found, gradient = outcome({}, *given)
    assert torch.equal(outcome({}, *given, scale=4.0)[1], 4 * gradient)
    x, y, old, advantages, _ = given
    z = x * 1
    out = PPOLoss(inplace_backward=True)(z, y, old, advantages)
    assert torch.equal(torch.autograd.grad(out.loss, x)[0], gradient)
    assert torch.equal(z.detach(), gradient)
    with torch.no_grad():
        out = PPOLoss()(x, y, old, advantages)
    assert not out.loss.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(out, found, strict=True) if b is not None)


def test_losses_may_be_changed_in_place():
    x, y, old, advantages, _ = problem()
    want = torch.autograd.grad(PPOLoss()(x, y, old, advantages).loss, x)[0]
    out = PPOLoss()(x, y, old, advantages)
    loss = out.loss
    loss /= 2
    out.ratio.add_(1)
    assert torch.equal(torch.autograd.grad(loss, x)[0], want / 2)


def test_a_second_derivative_is_refused():
    x, y, old, advantages, _ = problem()
    (first,) = torch.autograd.grad(PPOLoss()(x, y, old, advantages).loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(first.sum(), x)


def test_no_tokens(programs):
    x, y, old, advantages, _ = problem()
    hidden = torch.full_like(y, -100)
    found, gradient = outcome({}, x, hidden, old, advantages, None)
    theirs, _ = general(programs, {}, x, hidden, old, advantages, None)
    for got, want in zip(found, theirs, strict=True):
        assert got == want or got is want is None
    assert not gradient.any()
    empty = PPOLoss()(torch.zeros(2, 0, 5), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0), torch.zeros(2))
    assert empty.loss == 0


OTHERS = {
    "entropy": ({"report_entropy": True}, {}),
    "entropy bonus": ({"entropy_coef": 0.1}, {}),
    "normalization": ({"normalization": "grpo"}, {}),
    "gspo": ({"kind": "gspo"}, {}),
    "gspo_token": ({"kind": "gspo_token"}, {}),
    "sampler": ({"importance_level": "sequence"}, {"sampler_logps": torch.full((5, 6), -2.0)}),
    "float64": ({}, {"double": True}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_no_cliff_between_options(programs, name):
    options, more = OTHERS[name]
    x, y, old, advantages, _ = problem()
    more = dict(more)
    if more.pop("double", False):
        old = old.double()
    found = outcome(options, x, y, old, advantages, None, **more)
    assert programs.ran[-1] is not None
    wider = {k: v.double() for k, v in more.items()}
    exact = general(programs, options, *wide(x, y, old, advantages), None, **wider)
    for got, want in zip([*found[0], found[1]], [*exact[0], exact[1]], strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got.double(), want.double(), rtol=3e-6, atol=3e-6)


BAD = {
    "cliprange": ({"cliprange": -0.1}, {}, "cliprange must be in"),
    "cliprange_high": ({"cliprange_high": -0.1}, {}, "cliprange_high must be in"),
    "dual_clip": ({"dual_clip": 1.0}, {}, "dual_clip must be in"),
    "kl_coef": ({"kl_coef": -1.0}, {"ref_logps": torch.zeros(5, 6)}, "kl_coef must be in"),
    "no reference": ({"kl_coef": 1.0}, {}, "needs ref_logps"),
    "reference": ({}, {"ref_logps": torch.zeros(5, 7)}, "ref_logps must have shape"),
    "num_items": ({}, {"num_items": -1}, "num_items must be in"),
    "old": ({}, {"old_logps": torch.zeros(5, 7)}, "old_logps must have shape"),
    "advantages": ({}, {"advantages": torch.zeros(6)}, "advantages must have shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named_as_ever(name):
    options, more, message = BAD[name]
    x, y, old, advantages, _ = problem()
    given = {"old_logps": old, "advantages": advantages} | more
    with pytest.raises(ValueError, match=message):
        PPOLoss(**options)(x, y, **given)


def test_bad_labels_are_named():
    x, y, old, advantages, _ = problem()
    y[1, 2] = 29
    with pytest.raises(ValueError, match=r"labels must be in \[0, 29\) .*got 29 at flat position 8"):
        PPOLoss()(x, y, old, advantages)
