"""The one-launch objective: the same loss, metrics and gradient as two steps, for every kind that it serves."""

import functools

import pytest
import torch

import fastalign as fa
from fastalign import _backends
from fastalign.losses import PPOLoss, SFTLoss
from fastalign.ops.objective import fused_gradient
from fastalign.ops.operations import ELEMENTWISE
from fastalign.ops.programs import NotTraced
from fastalign.ops.token_programs import trace_token

ISAS = _backends.cpu_isas()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [(3, 5, 40), (1, 1, 20011), (2, 2, 9001), (0, 4, 8)]  # few long rows are shared among threads

POLICY = {
    "clip": {},
    "clip-high": {"cliprange": 0.1, "cliprange_high": 0.3},
    "dual-clip": {"dual_clip": 1.5},
    "reinforce": {"kind": "reinforce"},
    "trpo": {"kind": "trpo"},
    "cispo": {"kind": "cispo"},
    "sapo": {"kind": "sapo"},
    "dppo_tv": {"kind": "dppo_tv", "cliprange": 0.01},
    "dppo_kl": {"kind": "dppo_kl", "cliprange": 0.001},
    "dro": {"kind": "dro"},
    "k3+": {"kl_coef": 0.2, "kl_estimator": "k3+", "reference": True},
    "penalty-k1": {"kind": "penalty", "kl_coef": 0.3},
    "penalty-k3": {"kind": "penalty", "kl_coef": 0.3, "kl_estimator": "k3"},
    "penalty-k2-reference": {"kind": "penalty", "kl_coef": 0.3, "kl_estimator": "k2", "reference": True},
    "k1": {"kl_coef": 0.2, "reference": True},
    "k2": {"kl_coef": 0.2, "kl_estimator": "k2", "reference": True},
    "k3": {"kl_coef": 0.2, "kl_estimator": "k3", "reference": True},
    "exact": {"kl_coef": 0.2, "kl_estimator": "exact", "reference": True},
    "exact, reported": {"kl_estimator": "exact", "reference": True},
    "entropy": {"entropy_coef": 0.1},
    "entropy, reported": {"report_entropy": True},
    "everything": {
        "kl_coef": 0.2,
        "kl_estimator": "exact",
        "entropy_coef": 0.05,
        "dual_clip": 2.0,
        "temperature": 0.8,
        "softcap": 4.0,
        "reference": True,
        "sampler": True,
    },
    "grpo": {"normalization": "grpo", "kl_coef": 0.1, "kl_estimator": "k3", "reference": True},
    "dr_grpo": {"normalization": "dr_grpo", "max_length": 9},
}
SFT = {
    "plain": {},
    "sequence": {"normalization": "sequence"},
    "smoothed": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.01},
    "all": {"label_smoothing": 0.2, "z_loss": 0.01, "temperature": 1.3, "softcap": 3.0, "normalization": "sequence"},
}


def batch(sizes, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    b, t, v = sizes
    logits = (2 * torch.randn(b, t, v, generator=g)).to(dtype)
    ref = (logits.float() + 0.5 * torch.randn(b, t, v, generator=g)).to(dtype)
    labels = torch.randint(0, v, (b, t), generator=g)
    labels[1:, : t // 2] = -100
    return logits, ref, labels, g


def policy(sizes, dtype, config):
    """(make a loss module, its arguments) with log-ratios on both sides of every clip."""
    logits, ref, labels, g = batch(sizes, dtype)
    config = dict(config)
    with_reference, with_sampler = config.pop("reference", False), config.pop("sampler", False)
    options = {k: config[k] for k in ("temperature", "softcap") if k in config}
    logps = fa.token_logps(logits, labels, **options)

    def near():
        return torch.where(labels == -100, torch.nan, logps + 0.5 * torch.randn(logps.shape, generator=g))

    advantages = torch.where(labels == -100, torch.nan, torch.randn(logps.shape, generator=g))
    extra = {}
    if with_reference:
        exact = config.get("kl_estimator") == "exact"
        extra = {"ref_logits": ref} if exact else {"ref_logps": near()}
    if with_sampler:
        extra["sampler_logps"] = near()
    return logits, lambda **more: PPOLoss(**config, **more), (labels, near(), advantages), extra


def sft(sizes, dtype, config):
    logits, _, labels, _ = batch(sizes, dtype)
    return logits, lambda **more: SFTLoss(**config, **more), (labels,), {}


CONFIGS = [(policy, name, c) for name, c in POLICY.items()] + [(sft, name, c) for name, c in SFT.items()]
each_config = pytest.mark.parametrize(
    ("make", "config"), [(m, c) for m, _, c in CONFIGS], ids=[f"{m.__name__}:{n}" for m, n, _ in CONFIGS]
)


def step(logits, module, args, extra, upstream=1.0):
    leaf = logits.detach().clone().requires_grad_()
    output = module(leaf * 1, *args, **extra)
    return output, torch.autograd.grad(output.loss * upstream, leaf)[0]


@each_config
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_two_steps(make, config, sizes, dtype):
    logits, module, args, extra = make(sizes, dtype, config)
    for isa in ISAS:
        with fa.use_backend("cpu", isa=isa):
            two, two_grad = step(logits, module(), args, extra)
            for inplace in (False, True):
                one, one_grad = step(logits, module(fuse_backward=True, inplace_backward=inplace), args, extra)
                # The statistics come from the same code, equal to the bit. What two steps compute of them in float64,
                # one launch does by torch in float32: a few roundings of numbers up to e^3, then a sum in float64.
                torch.testing.assert_close(tuple(one), tuple(two), rtol=4e-7, atol=4e-7, equal_nan=True)
                # Slopes are computed in float32 here and by autograd there; the logits' dtype rounds once more.
                unit = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
                scale = two_grad.abs().max() if two_grad.numel() else 0.0
                torch.testing.assert_close(
                    one_grad, two_grad, rtol=unit, atol=float(1e-6 * scale) + 1e-7 * (dtype != torch.float32)
                )


@each_config
def test_gradient_against_float64(make, config):
    """Not only against our own two steps: against the formulas in float64 on the eager backend."""
    logits, module, args, extra = make((4, 6, 50), torch.float32, config)
    wide = {k: v.double() for k, v in extra.items()}
    with fa.use_backend("eager"):
        exact, exact_grad = step(
            logits.double(), module(), [a if a.dtype == torch.long else a.double() for a in args], wide
        )
    one, one_grad = step(logits, module(fuse_backward=True), args, extra)
    torch.testing.assert_close(one.loss.double(), exact.loss, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(one_grad.double(), exact_grad, rtol=1e-5, atol=float(2e-6 * exact_grad.abs().max()))


@pytest.mark.parametrize("make", [policy, sft])
def test_torchs_default_dtype_does_not_reach_the_kernel(make):
    logits, module, args, extra = make((3, 5, 40), torch.float32, {})
    _, want = step(logits, module(fuse_backward=True), args, extra)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        _, found = step(logits, module(fuse_backward=True), args, extra)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found, want)


def test_upstream_gradient_scales():
    logits, module, args, extra = policy((3, 5, 40), torch.float32, {})
    _, once = step(logits, module(fuse_backward=True), args, extra)
    _, thrice = step(logits, module(fuse_backward=True), args, extra, upstream=3.0)
    torch.testing.assert_close(thrice, 3 * once)


def test_the_gradient_can_be_used_once():
    logits, module, args, extra = policy((3, 5, 40), torch.float32, {})
    output = module(fuse_backward=True)(logits.requires_grad_(), *args, **extra)
    output.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used once"):
        output.loss.backward()


def test_in_place_is_said_and_default_is_not():
    logits, module, args, extra = sft((3, 5, 40), torch.float32, {})
    x = logits.clone().requires_grad_()
    version, before = x._version, x.detach().clone()
    module(fuse_backward=True)(x, *args, **extra)
    assert x._version == version
    assert torch.equal(x.detach(), before)
    y = x * 1
    version = y._version
    loss = module(fuse_backward=True, inplace_backward=True)(y, *args).loss
    assert y._version > version
    (grad,) = torch.autograd.grad(loss, y)
    assert grad.data_ptr() == y.data_ptr()


def test_no_gradient_asked_for_computes_none():
    logits, module, args, _ = sft((3, 5, 40), torch.float32, {})
    with torch.no_grad():
        before = logits.clone()
        output = module(fuse_backward=True, inplace_backward=True)(logits.requires_grad_(), *args)
    assert not output.loss.requires_grad
    assert torch.equal(logits, before)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_no_bit(threads):
    logits, module, args, extra = policy((1, 3, 20011), torch.bfloat16, POLICY["everything"])
    before = torch.get_num_threads()
    expected = step(logits, module(fuse_backward=True), args, extra)[1]
    try:
        torch.set_num_threads(threads)
        assert torch.equal(step(logits, module(fuse_backward=True), args, extra)[1], expected)
    finally:
        torch.set_num_threads(before)


def test_strided_logits():
    logits, module, args, extra = sft((3, 5, 40), torch.float32, {})
    wide = torch.full((3, 7, 41), torch.nan)
    wide[:, 1:6, :40] = logits
    expected = step(logits, module(fuse_backward=True), args, extra)[1]
    view = wide.requires_grad_()[:, 1:6, :40]
    (grad,) = torch.autograd.grad(module(fuse_backward=True)(view, *args).loss, view)
    assert torch.equal(grad, expected)


# ------------------------------------------------------------------------------------------------- bad input
def test_kinds_that_need_the_sequence_are_refused():
    with pytest.raises(
        ValueError, match=r"fuse_backward is for losses of single tokens; got kind='gspo'.*whole sequence"
    ):
        PPOLoss(kind="gspo", fuse_backward=True)


@pytest.mark.parametrize("module", [SFTLoss, PPOLoss])
def test_the_old_name_warns(module):
    with pytest.warns(DeprecationWarning, match="one_launch is called fuse_backward now"):
        assert module(one_launch=True).fuse_backward
    assert not module().fuse_backward


def test_other_backends_are_refused_with_the_way_out():
    logits, module, args, _ = sft((3, 5, 40), torch.float64, {})
    with pytest.raises(RuntimeError, match=r"one-launch objective needs the backend 'cpu'.*fuse_backward=False"):
        module(fuse_backward=True)(logits.requires_grad_(), *args)


# ------------------------------------------------------------------------------------------ a formula of one's own
def test_statistics_are_those_of_two_steps():
    logits, ref, labels, _ = batch((3, 5, 40), torch.bfloat16)
    objective = fa.Objective("sft", kl="exact", kl_coef=0.1, entropy_coef=0.1, label_smoothing=0.1)
    found, _ = fa.token_objective(logits, labels, torch.ones(3, 5), objective, ref_logits=ref)
    # The CPU's two-step forward smooths in float32, as here.
    want = fa.token_stats(logits, labels, ref_logits=ref, kl=True, entropy=True, label_smoothing=0.1)
    for one, two in zip(found, want, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_formula_of_ones_own_in_one_launch(own_formula, isa, dtype):
    logits, ref, labels, g = batch((6, 8, 50), dtype)
    weight, x, y = (torch.rand(6, 8, generator=g) for _ in range(3))
    program = trace_token(own_formula.formula, own_formula.inputs)
    assert {op for op, *_ in program.steps} == set(ELEMENTWISE) - {"float32"}  # all is float32 here
    with fa.use_backend("cpu", isa=isa):
        stats, mean, gradient = fused_gradient(logits, labels, weight, program, {"x": x, "y": y}, ref_logits=ref)
    exact, want = own_formula.exact(logits, ref, labels, weight, {"x": x, "y": y})
    real = labels != -100
    for name, found in {**stats._asdict(), "mean": mean}.items():
        torch.testing.assert_close(found[real].double(), exact[name][real], rtol=2e-6, atol=2e-6)
    # float32's roundings of the derivatives, and one to the logits' dtype.
    unit = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(gradient.double(), want, rtol=unit, atol=float(4e-6 * want.abs().max()))


def of_one_token(formula, *inputs):
    return lambda: trace_token(formula, inputs)


REFUSED = {
    "a sum": (of_one_token(lambda t: t.logps.sum(-1)), "'sum' is of a whole sequence"),
    "a mean": (of_one_token(lambda t: t.logps - t.logps.mean()), "'sum' is of a whole batch"),
    "a method": (of_one_token(lambda t: t.logps.sort()), "'sort' of a tensor is not among"),
    "a branch": (of_one_token(lambda t: t.logps if t.lse > 0 else t.lse), "torch.where"),
    "a number": (of_one_token(lambda t: 1.0), "must be computed from what the formula is given"),
    "inputs": (
        of_one_token(lambda t: sum((getattr(t, f"x{i}") for i in range(9)), t.logps), *(f"x{i}" for i in range(9))),
        "at most 8 inputs; got 9",
    ),
    "constants": (of_one_token(lambda t: sum((i + 0.5) * t.logps for i in range(20))), "at most 16 constants"),
    "steps": (of_one_token(lambda t: functools.reduce(lambda x, _: x.exp(), range(65), t.logps)), "at most 64 steps"),
    "a large constant": (of_one_token(lambda t: 1e39 * t.logps), "computed in float32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_trace_is_named(name):
    trace, message = REFUSED[name]
    with pytest.raises(NotTraced, match=message):
        trace()


def test_a_formula_without_operations_and_one_that_does_not_move():
    logits, _, labels, _ = batch((3, 5, 40), torch.float32)
    weight = torch.rand(3, 5)
    leaf = logits.clone().requires_grad_()
    (want,) = torch.autograd.grad((weight * fa.token_stats(leaf, labels).lse).sum(), leaf)
    _, _, found = fused_gradient(logits, labels, weight, trace_token(lambda t: t.lse), {})
    torch.testing.assert_close(found, want)
    _, _, found = fused_gradient(logits, labels, weight, trace_token(lambda t: t.logps.detach() * 2), {})
    assert not found.any()


def test_inputs_of_a_program_are_checked():
    program = trace_token(lambda t: t.logps * t.scale, ["scale"])
    with pytest.raises(ValueError, match=r"scale is needed by the loss: float32 \[3\]; got NoneType"):
        fused_gradient(LOGITS, LABELS, ROW, program, {})
    with pytest.raises(ValueError, match=r"scale must be float32 \[3\] on cpu; got torch.float64"):
        fused_gradient(LOGITS, LABELS, ROW, program, {"scale": ROW.double()})
    with pytest.raises(ValueError, match="kl=True needs ref_logits"):
        fused_gradient(LOGITS, LABELS, ROW, trace_token(lambda t: t.kl), {})


LOGITS, LABELS, ROW = torch.randn(3, 8), torch.tensor([1, 2, 3]), torch.ones(3)
BAD = {
    "kind": (fa.Objective("ppo"), {}, ValueError, "kind must be one of sft, reinforce"),
    "kl": (fa.Objective("sft", kl="k9"), {}, ValueError, "kl must be one of"),
    "old_logps": (fa.Objective("clip"), {"advantages": ROW}, ValueError, "old_logps is needed by kind='clip'"),
    "advantages": (fa.Objective("clip"), {"old_logps": ROW}, ValueError, "advantages is needed"),
    "ref_logps": (fa.Objective("sft", kl="k3"), {}, ValueError, "ref_logps is needed by kind='sft', kl='k3'"),
    "ref_logits": (fa.Objective("sft", kl="exact"), {}, ValueError, "ref_logits"),
    "shape": (
        fa.Objective("reinforce"),
        {"advantages": ROW[:2], "old_logps": ROW},
        ValueError,
        r"float32 \[3\].*got.*\[2\]",
    ),
    "dtype": (fa.Objective("sft"), {"weight": ROW.double()}, ValueError, "weight must be float32"),
    "label": (fa.Objective("sft"), {"labels": LABELS + 6}, ValueError, r"labels must be in \[0, 8\)"),
    "dense": (fa.Objective("sft"), {"logits": torch.randn(8, 3).t(), "inplace": True}, ValueError, "dense vocabulary"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    objective, options, error, message = BAD[name]
    options = {"logits": LOGITS, "labels": LABELS, "weight": ROW, **options}
    with pytest.raises(error, match=message):
        fa.token_objective(objective=objective, **options)
