"""Loss programs: operations as torch has them, value and derivative; levels, passes, threads; what does not trace."""

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastalign as fa
from fastalign.losses import DPOLoss, KTOLoss, PairLoss, PPOLoss, PROLoss, SFTLoss, TokenLoss
from fastalign.ops.operations import CODES, ELEMENTWISE

HEADER = Path(__file__).resolve().parents[2] / "kernels" / "loss_program.h"


def test_the_two_tables_are_one():
    (names,) = re.findall(r"enum class Op : uint8_t \{(.*?)\}", HEADER.read_text(encoding="utf-8"), re.DOTALL)
    ours = [re.sub(r"(?:^|_)(\w)", lambda m: m[1].upper(), name) for name in CODES]
    ours = ["Max" if name == "Amax" else name for name in ours]
    ours = ["LogSumExp" if name == "Logsumexp" else name for name in ours]
    assert [f"k{name}" for name in ours] == [name.strip() for name in names.split(",")]


# Operation → a formula of logps (below 0) and x (of either sign, with equal ones and zeros among them).
FORMULAS = {
    "add": lambda t: t.logps + t.x + 1.5,
    "sub": lambda t: (2.0 - t.logps) - t.x,
    "mul": lambda t: t.logps * t.x * t.logps,
    "div": lambda t: t.x / t.logps + t.logps / (t.x.square() + 1),
    "maximum": lambda t: torch.maximum(t.logps, t.y) * t.x,
    "minimum": lambda t: torch.minimum(t.y, t.logps) * t.x,
    "clamp_min": lambda t: t.logps.clamp(min=-3.0) * t.x,
    "clamp_max": lambda t: torch.clamp(t.logps, -4.0, -2.0) * t.x,
    "exp": lambda t: torch.exp(t.logps * t.x),
    "expm1": lambda t: torch.expm1(t.logps),
    "log": lambda t: torch.log(-t.logps),
    "log1p": lambda t: (-t.logps).log1p(),
    "sigmoid": lambda t: torch.sigmoid(t.logps * t.x),
    "log_sigmoid": lambda t: F.logsigmoid(t.logps * t.x) - F.softplus(t.logps),
    "tanh": lambda t: torch.tanh(t.logps * t.x),
    "relu": lambda t: F.relu(t.logps + 3) * t.x,
    "square": lambda t: t.logps.square() + t.logps**2 * t.x + t.logps**3,
    "sqrt": lambda t: torch.sqrt(-t.logps),
    "abs": lambda t: abs(t.logps + 3) * t.x,
    "lt": lambda t: torch.where(t.logps < -3, t.logps * t.x, t.logps),
    "le": lambda t: torch.where(t.logps <= t.y, t.logps * t.x, t.logps),
    "gt": lambda t: torch.where(t.logps > -3, t.logps * t.x, t.logps),
    "ge": lambda t: torch.where(t.logps >= t.y, t.logps * t.x, t.logps),
    "eq": lambda t: torch.where(t.x == 0, t.logps, 2 * t.logps),
    "ne": lambda t: torch.where(t.x != 0, t.logps, 2 * t.logps),
    "and": lambda t: torch.where((t.x > 0) & (t.logps > -3), t.logps, 0.0),
    "or": lambda t: torch.where((t.x > 0) | (t.logps > -3), t.logps, 0.0),
    "not": lambda t: torch.where(~(t.x > 0), t.logps, 0.0),
    "where": lambda t: torch.where(t.x > 0, torch.exp(t.logps), t.logps.masked_fill(t.x == 0, 7.0)),
    "detach": lambda t: t.logps.detach() * t.logps,
}


def batch(b=6, t=70, v=31, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits, labels = 2 * torch.randn(b, t, v, generator=g), torch.randint(0, v, (b, t), generator=g)
    labels[torch.rand(b, t, generator=g) < 0.2] = -100
    labels[1] = -100
    x = torch.randn(b, t, generator=g)
    x[:, ::7] = 0
    with torch.no_grad():
        y = torch.where(torch.rand(b, t, generator=g) < 0.3, fa.token_logps(logits, labels), x - 3)
    return logits, labels, {"x": x, "y": y}


def outcome(module, logits, labels, given):
    leaf = logits.clone().requires_grad_()
    out = module(leaf, labels, **given)
    return out, torch.autograd.grad(out.loss, leaf)[0]


def exactly(module, logits, labels, given):
    with fa.use_backend("eager"):
        return outcome(module, logits.double(), labels, {k: v.double() for k, v in given.items()})


@pytest.mark.parametrize("name", [name for name in ELEMENTWISE if name != "float32"])
def test_operations(name):
    """ "float32" is the rounding of sums in front of float32 references: tests/losses/test_pair_loss.py."""
    logits, labels, given = batch()
    # y holds float32 log-probabilities, equal to ours to the bit: ties, which float64 does not have.
    ties = name in ("maximum", "minimum", "le", "ge")
    if ties:
        given["y"] = given["x"] - 3
    module = TokenLoss(FORMULAS[name], metrics={"value": FORMULAS[name]})
    found, gradient = outcome(module, logits, labels, given)
    exact, exact_gradient = exactly(module, logits, labels, given)
    assert "program of" in module.explain()
    torch.testing.assert_close(found.loss.double(), exact.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.metrics["value"].double(), exact.metrics["value"], rtol=1e-5, atol=1e-5)
    scale = exact_gradient.abs().max()
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=float(2e-6 * scale))
    assert not gradient[labels == -100].any()


def test_ties_share_as_in_torch():
    logits, labels, given = batch()
    given["y"] = fa.token_logps(logits, labels)
    for formula in (
        lambda t: torch.maximum(t.logps, t.y),
        lambda t: t.logps.clamp(min=t.y),
        lambda t: F.relu(t.logps - t.y),
    ):
        module, leaf = TokenLoss(formula), given["y"].clone().requires_grad_()

        class T:
            logps, y = leaf, given["y"]

        (expected,) = torch.autograd.grad(formula(T).sum(), leaf)
        _, gradient = outcome(module, logits, labels, given)
        _, whole = outcome(TokenLoss(lambda t: t.logps), logits, labels, {})
        torch.testing.assert_close(gradient, expected.unsqueeze(-1) * whole, rtol=1e-6, atol=1e-8)


LEVELS = {
    "a mean of the sequence in its tokens": lambda t: (t.logps - (t.logps * t.mask).sum(-1, keepdim=True) / 9).square(),
    "two passes": lambda t: torch.exp(t.logps) * torch.tanh((torch.exp(t.logps) * t.mask).sum(-1, keepdim=True)),
    "all tokens in each": lambda t: t.logps * torch.sigmoid((t.logps * t.x * t.mask).sum() / 50),
}


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("sizes", [(6, 70), (3, 1), (1, 700), (40, 33)])
def test_sums_that_tokens_see(name, sizes):
    logits, labels, given = batch(*sizes)[:3] if sizes[0] > 1 else batch(2, sizes[1])
    module = TokenLoss(LEVELS[name])
    found, gradient = outcome(module, logits, labels, given)
    exact, exact_gradient = exactly(module, logits, labels, given)
    assert "torch operations" not in module.explain().splitlines()[0]
    torch.testing.assert_close(found.loss.double(), exact.loss, rtol=1e-5, atol=1e-6)
    scale = float(exact_gradient.abs().max())
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=2e-5, atol=3e-6 * scale)


def test_threads_change_no_bit():
    logits, labels, given = batch(40, 120, 17)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([outcome(TokenLoss(f), logits, labels, given) for f in LEVELS.values()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for (out, gradient), (first, first_gradient) in zip(other, results[0], strict=True):
            assert torch.equal(out.loss, first.loss)
            assert torch.equal(gradient, first_gradient)


UNTRACED = {
    "sort": (lambda t: t.logps * t.logps.detach().sort(-1).values, "'sort'"),
    "a branch in Python": (lambda t: t.logps if (t.x > 0).any() else -t.logps, "branch in Python"),
    "a tensor of its own": (lambda t: t.logps * torch.arange(70.0), "a tensor of shape"),
    "an unknown function": (lambda t: torch.special.erf(t.logps), "erf"),
    "a maximum of tokens": (lambda t: t.logps - t.logps.detach().amax(-1, keepdim=True), "over tokens"),
}


@pytest.mark.parametrize("name", UNTRACED)
def test_what_does_not_trace_runs_all_the_same(name):
    formula, reason = UNTRACED[name]
    logits, labels, given = batch()
    module = TokenLoss(formula)
    found, gradient = outcome(module, logits, labels, given)
    assert reason in module.explain()
    exact, exact_gradient = exactly(module, logits, labels, given)
    torch.testing.assert_close(found.loss.double(), exact.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-4, atol=1e-7)


def test_a_gradient_that_is_not_there_is_not_formed():
    """0 times infinity is NaN: what has no weight, or is not chosen, does not reach the gradient."""
    logits, labels, _ = batch()
    far = torch.full(labels.shape, 1e4)
    loss = TokenLoss(lambda t: torch.where(t.far > 0, -t.logps, torch.exp(t.far * t.far) * t.logps))
    out, gradient = outcome(loss, logits, labels, {"far": far})
    plain, plain_gradient = outcome(TokenLoss(lambda t: -t.logps), logits, labels, {})
    assert torch.equal(out.loss, plain.loss)
    assert torch.equal(gradient, plain_gradient)


def test_pairs_need_two_halves_and_nothing_else():
    logits, labels, _ = batch()
    module = PairLoss(lambda p: -F.logsigmoid(p.chosen_logps - p.rejected_logps))
    out, _ = outcome(module, logits, labels, {})
    assert out.loss.shape == ()
    with pytest.raises(ValueError, match="logits must be"):
        module(logits[:3], labels[:3])


SETTINGS = {
    "sft": (lambda: SFTLoss(z_loss=0.1), {"z_loss": 0.2}),
    "kto": (lambda: KTOLoss(), {"desirable_weight": 0.5}),
    "pro": (lambda: PROLoss(), {"form": "infonce"}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_changes_is_seen(name):
    make, change = SETTINGS[name]
    logits, labels, _ = batch()
    labels[1] = labels[0]
    given = {"kto": {"desirable": torch.arange(6) % 2 == 0}, "pro": {"list_size": 3}}.get(name, {})
    module = make()
    before = module(logits, labels, **given).loss
    for setting, value in change.items():
        setattr(module, setting, value)
    after = module(logits, labels, **given).loss
    with fa.use_backend("eager"):
        exact = module(logits.double(), labels, **given).loss
    assert not torch.equal(before, after)
    torch.testing.assert_close(after.double(), exact, rtol=1e-6, atol=1e-6)


def test_the_coefficient_of_a_policy_loss_may_change():
    logits, labels, given = batch()
    module, ref = PPOLoss(kl_coef=0.1, kl_estimator="k2"), given["x"] - 3
    found = []
    for coefficient in (0.1, 0.5, 0.1):
        module.config["kl_coef"] = coefficient
        found.append(module(logits, labels, given["x"] - 3, given["x"], ref_logps=ref).loss)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_loss_modules_are_copied_and_pickled_after_use():
    logits, labels, _ = batch()
    for module in (DPOLoss(), SFTLoss(), PROLoss()):
        given = {"list_size": 3} if isinstance(module, PROLoss) else {}
        wanted = module(logits, labels, **given).loss
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(other(logits, labels, **given).loss, wanted)
