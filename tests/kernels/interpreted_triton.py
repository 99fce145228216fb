"""The Triton backend in Triton's interpreter, on CPU tensors; `test_triton.py` runs this file with TRITON_INTERPRET=1.

Not named test_*: in a process of its own, since Triton decides at import whether it interprets.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

import fastalign as fa
from fastalign import _backends
from fastalign.losses import PPOLoss, SFTLoss
from fastalign.ops.objective import fused_gradient
from fastalign.ops.token_programs import trace_token
from fastalign.reference import CASES, Sizes, cast

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of -inf - -inf and overflow to inf
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MARGIN = 1e-6  # over torch's own error
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


# ------------------------------------------------------------------------------------------ a better interpreter
class _Nothing:
    def restore(self):
        pass


@pytest.fixture(autouse=True, scope="session")
def interpreter_like_a_gpu():
    """Conversions to bfloat16 round (the interpreter cuts off), multiply-adds round once, and a kernel's helpers are
    fast: the interpreter prepares the language anew for each call of each helper, which takes 2 ms."""
    patch_language, convert = interpreter._patch_lang, interpreter._convert_float
    done = set()

    def patch_once(function):
        key = "tl" in function.__globals__
        if key not in done:
            done.add(key)
            patch_language(function)
        return _Nothing()

    def round_to_bfloat16(data, source, target, mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.int16)
            return rounded.numpy().view(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.astype(np.uint32) << 16
        return convert(data, source, target, mode)

    def fused(self, x, y, z):
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        patch.setattr(interpreter, "_convert_float", round_to_bfloat16)
        patch.setattr(interpreter.InterpreterBuilder, "create_fma", fused)
        object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)
        yield


@pytest.fixture(autouse=True)
def on_triton():
    with fa.use_backend("triton"):
        yield


def test_the_backend_serves_cpu_tensors_when_interpreted():
    assert _backends.choose(torch.empty(1)) == "triton"
    assert fa.backends()["triton"] == "available"
    with pytest.raises(RuntimeError, match=r"backend 'triton' serves float32.*got torch\.float64"):
        fa.token_logps(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.long))


# ---------------------------------------------------------------------------------------------------- objectives
def losses(function, inputs, leaves, dtype=None):
    inputs = {
        name: (t.to(dtype) if dtype is not None and t.is_floating_point() else t).detach().clone()
        for name, t in inputs.items()
    }
    for name in leaves:
        inputs[name].requires_grad_()
    loss = function(**inputs)
    if loss.requires_grad:
        loss.backward()
    gradients = (torch.zeros_like(inputs[n]) if inputs[n].grad is None else inputs[n].grad for n in leaves)
    return [loss.detach().double(), *(gradient.double() for gradient in gradients)]


def relative(got, want):
    return [float((g - w).norm() / w.norm().clamp(min=1e-3)) for g, w in zip(got, want, strict=True)]


def rms(rows):
    return torch.tensor(rows, dtype=torch.float64).square().mean(0).sqrt().tolist()


SIZES = (
    Sizes(batch=2, length=3),
    Sizes(batch=1, length=2, vocab=3, list_length=2),
    Sizes(batch=2, length=2, vocab=1301, list_length=2),
)
# The other cases start from log-probs or scores, and meet no kernel.
WITH_LOGITS = [case for case in CASES if "logits" in case.leaves]


@each_dtype
@pytest.mark.parametrize("case", WITH_LOGITS, ids=lambda case: case.name)
def test_no_less_exact_than_eager(case, dtype):
    ours, eager = [], []
    for seed, sizes in enumerate(SIZES):
        inputs = cast(case.inputs(sizes, torch.Generator().manual_seed(seed)), dtype)
        exact = losses(case.reference, inputs, case.leaves, torch.float64)
        eager.append(relative(losses(case.reference, inputs, case.leaves), exact))
        ours.append(relative(losses(case.fused, inputs, case.leaves), exact))
    for what, error, plain in zip(("loss", *case.leaves), rms(ours), rms(eager), strict=True):
        assert error <= plain + MARGIN, f"{what}: relative error {error:.2e}, eager's {plain:.2e}"


# --------------------------------------------------------------------------------------------------------- statistics
OPTIONS = {
    "plain": {},
    "tempered": {"temperature": 0.7, "entropy": True},
    "capped": {"softcap": 5.0, "temperature": 1.3, "entropy": True, "kl": True},
    "smoothed": {"label_smoothing": 0.2, "kl": True},
}


def statistics(backend, logits, labels, ref, options, weights):
    """Every statistic asked for and the gradient of their weighted sum, in float64."""
    options = dict(options)
    if options.get("kl"):
        options["ref_logits"] = ref
    x = logits.detach().clone().requires_grad_()
    with fa.use_backend(backend):
        stats = fa.token_stats(x, labels, **options)
        total = sum((w.to(s.dtype) * s).sum() for w, s in zip(weights, stats, strict=True) if s is not None)
        (grad,) = torch.autograd.grad(total, x)
    return [s.detach().double() for s in stats if s is not None] + [grad.double()]


PLACES = [(vocab, 0.0, name) for vocab in (1, 2, 7, 1301, 10007) for name in OPTIONS]
PLACES += [(1301, offset, name) for offset in (1e4, -1e4) for name in OPTIONS if name != "capped"]


@each_dtype
@pytest.mark.parametrize(("vocab", "offset", "name"), PLACES)
def test_statistics_and_gradient(dtype, vocab, offset, name):
    """Odd sizes whose rows start anywhere, rows of one and of several tiles, logits far from 0."""
    options = OPTIONS[name]
    g = torch.Generator().manual_seed(vocab)
    offset = offset / 10 if dtype == torch.float16 else offset
    logits, ref = ((offset + 2 * torch.randn(2, vocab, generator=g)).to(dtype) for _ in range(2))
    labels = torch.randint(vocab, (2,), generator=g)
    weights = torch.randn(4, 2, generator=g)
    ours = statistics("triton", logits, labels, ref, options, weights)
    exact = statistics("eager", logits.double(), labels, ref.double(), options, weights)
    eager = statistics("eager", logits, labels, ref, options, weights)
    for a, b, c in zip(ours, exact, eager, strict=True):
        scale = b.abs().max().clamp(min=1)
        assert (a - b).abs().max() <= 1.5 * (c - b).abs().max() + 2e-6 * scale


def test_masked_rows_are_not_read_and_extremes_stay_where_they_are():
    x = torch.randn(4, 40)
    x[0] = torch.nan
    x[1, 3:9] = -torch.inf
    labels = torch.tensor([-100, 12, 5, 39])
    x.requires_grad_()
    stats = fa.token_stats(x, labels, entropy=True)
    (grad,) = torch.autograd.grad(stats.logps.sum() + stats.entropy.sum(), x)
    with fa.use_backend("eager"):
        want = fa.token_stats(x, labels, entropy=True)
        (want_grad,) = torch.autograd.grad(want.logps.sum() + want.entropy.sum(), x)
    for a, b in zip([*stats[:3], grad], [*want[:3], want_grad], strict=True):
        torch.testing.assert_close(a, b)
    assert not grad[0].any()


@each_dtype
def test_strides_and_in_place(dtype):
    """Views whose leading dimensions do not merge, and a gradient written over the logits."""
    wide = torch.randn(2, 3, 4, 41).to(dtype)
    views = {"sliced": wide[:, :, 1:, :39], "shifted": wide[:, 1:, ::2, 2:], "expanded": wide[:1].expand(2, 3, 4, 41)}
    for name, x in views.items():
        labels = torch.randint(x.shape[-1], x.shape[:-1])
        labels[0, 0, 0] = -100
        dense = x.contiguous().requires_grad_()
        (want,) = torch.autograd.grad(fa.token_logps(dense, labels).sum(), dense)
        leaf = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(fa.token_logps(leaf, labels).sum(), leaf)
        torch.testing.assert_close(grad, want, msg=name, rtol=2**-7, atol=1e-6)
        if name != "expanded":
            source = x.detach().requires_grad_() * 1
            assert source.stride() == x.stride() or source.is_contiguous()
            (over,) = torch.autograd.grad(fa.token_logps(source, labels, inplace_backward=True).sum(), source)
            assert over.data_ptr() == source.data_ptr()
            torch.testing.assert_close(over, want, msg=name, rtol=2**-7, atol=1e-6)


@each_dtype
@pytest.mark.parametrize("vocab", [5, 1001, 17003])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_row_knows_nothing_of_its_place(dtype, vocab, inplace):
    """Nine rows of an odd length start at every offset from a 16-byte boundary; what equals the first has its bits, in
    registers and in a walk, and so has the first alone."""
    g = torch.Generator().manual_seed(vocab)
    x, z = ((3 * torch.randn(2, vocab, generator=g)).to(dtype)[[0, 0, 0, 1, 0, 0, 0, 0, 0]] for _ in range(2))
    labels = torch.full((9,), vocab // 2)
    objective = fa.Objective("clip", 0.2, 0.3, 3.0, "exact", 0.05, False, 0.01, 0.1, 1e-3)

    def everything(x, labels, z):
        leaf = x.clone().requires_grad_()
        source = leaf * 1
        options = {"ref_logits": z, "entropy": True, "temperature": 0.9}
        stats = fa.token_stats(source, labels, kl=True, label_smoothing=0.1, inplace_backward=inplace, **options)
        (gradient,) = torch.autograd.grad(sum((i + 1) * s.sum() for i, s in enumerate(stats)), leaf)
        rows = [torch.full(labels.shape, number) for number in (0.5, -7.0, 2.0)]
        more = {"old_logps": rows[1], "advantages": rows[2], "inplace": inplace}
        one, one_gradient = fa.token_objective(x.clone(), labels, rows[0], objective, **options, **more)
        return [t.detach() for t in (*stats, gradient, *one, one_gradient, fa.token_logps(x, labels)) if t is not None]

    numbers = everything(x, labels, z)
    assert len(numbers) == 11
    for together, alone in zip(numbers, everything(x[:1], labels[:1], z[:1]), strict=True):
        for row in (0, 1, 2, 4, 5, 6, 7, 8):
            assert torch.equal(together[row : row + 1], alone), row


def test_a_pivot_that_is_missed():
    """Rows whose maximum is far above what the shift was taken from, or far below: read once more."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 9001, generator=g)
    z = torch.randn(4, 9001, generator=g)
    labels = torch.tensor([70, 71, 72, 73])
    x[0, 5000] = 90.0
    x[1, :100], x[1, 100:] = -torch.inf, x[1, 100:] + 3000
    x[2, :] = -torch.inf
    x[2, 8000:] = -5000.0
    z[3, 6000] = 80.0
    with fa.use_backend("eager"):
        want = fa.token_stats(x.double(), labels, ref_logits=z.double(), entropy=True, kl=True)
    got = fa.token_stats(x, labels, ref_logits=z, entropy=True, kl=True)
    for a, b in zip(got, want, strict=True):
        if a is not None:
            torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("vocab", [7, 700, 9001])
def test_logits_of_any_size(vocab):
    """Rows of nothing but 1e9 to 1e38 and their negatives, all alike or not."""
    rows = torch.tensor([s * m for m in (1e9, 1e12, 1e20, 1e30, 3e38) for s in (1, -1)]).view(-1, 1)
    draw = torch.Generator().manual_seed(0)
    x = torch.cat([rows.expand(-1, vocab), rows * torch.rand(len(rows), vocab, generator=draw)])
    labels = torch.randint(vocab, (len(x),), generator=draw)
    with fa.use_backend("eager"):
        want = fa.token_stats(x.double(), labels).logps
    torch.testing.assert_close(fa.token_stats(x, labels).logps.double(), want, rtol=2e-7, atol=2e-6)


@each_dtype
@pytest.mark.parametrize("vocab", [3, 700, 1001])
def test_a_target_far_from_the_rest(dtype, vocab):
    """Short rows, whose plain sums are relative to their target: it is far below the maximum, far below by all but a
    little, -inf, NaN, or all there is."""
    x = torch.randn(7, vocab, generator=torch.Generator().manual_seed(vocab))
    labels = torch.tensor([1, 0, 2, 1, 0, 2, 1])
    x[0, 1], x[1, 0], x[2, 2] = -200.0, -22.0, -21.0
    x[3, 1], x[4, 0], x[5, :] = -torch.inf, torch.nan, -torch.inf
    x[6, [0, 2]], x[6, 1] = -torch.inf, 3.0
    x = x.to(dtype)
    with fa.use_backend("eager"):
        want = fa.token_stats(x.double(), labels)
    got = fa.token_stats(x, labels)
    torch.testing.assert_close(got.logps.double(), want.logps, rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(got.lse.double(), want.lse, rtol=1e-6, atol=2e-6, equal_nan=True)


@each_dtype
def test_rows_and_tiles_of_nothing_and_diagnostics(extreme_rows, dtype):
    for vocab in (5, 700, 9001):
        extreme_rows.rows_of_nothing(dtype, vocab)
        extreme_rows.references_that_exclude(dtype, vocab)
        extreme_rows.diagnostics(dtype, vocab, vocab % 4)
    extreme_rows.diagnostics(dtype, 17001, 3, temperature=0.7, softcap=30.0)
    extreme_rows.empty_tiles(dtype, 2100, 1024)
    extreme_rows.tiles_that_the_reference_excludes(dtype)


@each_dtype
def test_targets_that_lead(extreme_rows, dtype):
    """In registers and in a walk; at the row's ends and within."""
    for vocab, places in ((2, (0, 1)), (37, (32,)), (1301, (700,))):
        extreme_rows.certain_targets(dtype, vocab, places, leads=extreme_rows.LEADS[::3])
    extreme_rows.certain_targets(dtype, 1301, (0, 255, 256, 1300), leads=(25.0,), everything=False)
    extreme_rows.certain_targets(dtype, 40007, (20000, 40006), leads=(25.0,), everything=False)
    for vocab in (2, 45):
        extreme_rows.never_above_zero(dtype, vocab, steps=10)
    extreme_rows.one_word(dtype)
    extreme_rows.certain_heads(dtype, "recompute")


def test_bad_labels_are_named():
    with pytest.raises(ValueError, match=r"labels must be in \[0, 8\).*got 9 at flat position 1"):
        fa.token_logps(torch.zeros(2, 8), torch.tensor([1, 9]))


def test_nothing_to_do():
    assert fa.token_logps(torch.zeros(0, 8), torch.zeros(0, dtype=torch.long)).shape == (0,)


# --------------------------------------------------------------------------------------------------------- one launch
MODULES = {
    "sft": (SFTLoss, {}),
    "sft, all": (SFTLoss, {"label_smoothing": 0.2, "z_loss": 0.01, "temperature": 1.3, "softcap": 3.0}),
    "clip": (PPOLoss, {"dual_clip": 1.5}),
    "reinforce": (PPOLoss, {"kind": "reinforce"}),
    "trpo": (PPOLoss, {"kind": "trpo"}),
    "cispo": (PPOLoss, {"kind": "cispo"}),
    "sapo": (PPOLoss, {"kind": "sapo"}),
    "dppo_kl": (PPOLoss, {"kind": "dppo_kl", "cliprange": 1e-3}),
    "k3+": (PPOLoss, {"kl_coef": 0.2, "kl_estimator": "k3+"}),
    "penalty": (PPOLoss, {"kind": "penalty", "kl_coef": 0.3, "kl_estimator": "k3"}),
    "k1": (PPOLoss, {"kl_coef": 0.2}),
    "k2": (PPOLoss, {"kl_coef": 0.2, "kl_estimator": "k2"}),
    "k3": (PPOLoss, {"kl_coef": 0.2, "kl_estimator": "k3"}),
    "exact": (PPOLoss, {"kl_coef": 0.2, "kl_estimator": "exact", "entropy_coef": 0.05, "temperature": 0.8}),
}


@pytest.mark.parametrize(
    ("name", "vocab"),
    [*((name, vocab) for name in MODULES for vocab in (40, 1301)), ("sft, all", 40001), ("exact", 20001)],
)
def test_one_launch_equals_two_steps(name, vocab):
    """In registers and, in the last two cases, read twice; into a buffer of its own and over the logits."""
    make, config = MODULES[name]
    g = torch.Generator().manual_seed(vocab)
    logits = 2 * torch.randn(1, 3, vocab, generator=g)
    labels = torch.randint(vocab, (1, 3), generator=g)
    labels[0, 0] = -100
    args, extra = [labels], {}
    if make is PPOLoss:
        logps = fa.token_logps(logits, labels)
        args += [logps + 0.5 * torch.randn(1, 3, generator=g), torch.randn(1, 3, generator=g)]
        if config.get("kl_estimator") == "exact":
            extra["ref_logits"] = logits + torch.randn(logits.shape, generator=g)
        elif "kl_coef" in config:
            extra["ref_logps"] = logps + 0.5 * torch.randn(1, 3, generator=g)

    def step(**more):
        leaf = logits.clone().requires_grad_()
        output = make(**config, **more)(leaf * 1, *args, **extra)
        return output, torch.autograd.grad(3 * output.loss, leaf)[0]

    two, want = step()
    for inplace in (False, True):
        one, grad = step(fuse_backward=True, inplace_backward=inplace)
        for field, a, b in zip(one._fields, one, two, strict=True):
            if a is not None:
                torch.testing.assert_close(a, b, msg=field, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=float(2e-6 * want.abs().max()))


# --------------------------------------------------------------------------------------------------------- advantages
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("length", [1, 9, 600])
def test_gae(dtype, length):
    """Several blocks, hidden tokens anywhere with NaN behind them."""
    g = torch.Generator().manual_seed(length)
    rewards, values = torch.randn(2, 2, length, generator=g, dtype=dtype)
    mask = torch.rand(2, length, generator=g) < 0.7
    rewards[~mask] = torch.nan
    got = fa.rl.gae(rewards, values, mask, gamma=0.97, lam=0.9)
    with fa.use_backend("eager"):
        want = fa.rl.gae(rewards, values, mask, gamma=0.97, lam=0.9)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-5)


@each_dtype
def test_a_formula_of_ones_own_in_one_launch(own_formula, dtype):
    g = torch.Generator().manual_seed(0)
    logits, ref = ((2 * torch.randn(12, 50, generator=g)).to(dtype) for _ in range(2))
    labels = torch.randint(50, (12,), generator=g)
    labels[3] = -100
    weight, x, y = (torch.rand(12, generator=g) for _ in range(3))
    program = trace_token(own_formula.formula, own_formula.inputs)
    stats, mean, gradient = fused_gradient(logits, labels, weight, program, {"x": x, "y": y}, ref_logits=ref)
    exact, want = own_formula.exact(logits, ref, labels, weight, {"x": x, "y": y})
    for name, found in {**stats._asdict(), "mean": mean}.items():
        torch.testing.assert_close(found[labels >= 0].double(), exact[name][labels >= 0], rtol=2e-6, atol=2e-6)
    # float32's roundings of the derivatives, and one to the logits' dtype.
    unit = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(gradient.double(), want, rtol=unit, atol=float(4e-6 * want.abs().max()))
