"""The CUDA kernels, run by a PTX simulator through the real launch code: numbers against float64, and nothing read or
written that should not be. Every access outside a tensor stops the simulator."""

import itertools
import math

import pytest
import torch

import fastalign as fa
from fastalign import Objective, token_objective
from fastalign._backends import cuda
from fastalign.ops.objective import fused_gradient
from fastalign.ops.token_programs import trace_token

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABS = (1, 7, 1000, 32000, 50257, 128256, 151936, 256000)
# Stated margin over eager PyTorch's own error: relative for a number above 1, absolute (in nats) below.
MARGIN = 1e-6
CHECKS = ("uninitialised_shared_reads", "shared_races", "shfl_from_inactive")


def at_element(x, elements):
    """A copy of a tensor whose data begins `elements` elements after a multiple of 64 bytes."""
    flat = torch.empty(x.numel() + elements, dtype=x.dtype)
    copy = flat[elements:].view(x.shape)
    return copy.copy_(x)


def problem(rows, vocab, dtype, ref=False, seed=0, misaligned=0):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, vocab, generator=g) * 3).to(dtype)
    z = at_element((x.float() + 0.3 * torch.randn(rows, vocab, generator=g)).to(dtype), 3 * misaligned) if ref else None
    labels = torch.randint(0, vocab, (rows,), generator=g)
    labels[rows // 2] = -100
    return at_element(x, misaligned), z, labels, torch.randn(4, rows, generator=g)


def two_steps(x, z, labels, weights, **options):
    """Statistics and the gradient of a random combination of them, as float64 numbers."""
    x = x.detach().requires_grad_()
    stats = fa.token_stats(x, labels, ref_logits=z, kl=z is not None, **options)
    present = [s for s in stats if s is not None]
    loss = sum((s.double() * w.double()).sum() for s, w in zip(present, weights, strict=False))
    (gradient,) = torch.autograd.grad(loss, x)
    return [s.detach().double() for s in present] + [gradient.double()]


def one_step(x, z, labels, weights, *, smoothing=0.0, entropy=False, **options):
    """Statistics and gradient of an objective that uses all of them."""
    kl = "exact" if z is not None else "k3"
    objective = Objective("clip", 0.2, 0.3, 3.0, kl, 0.05, False, 0.01 if entropy else 0.0, smoothing, 1e-3)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, old, advantage, ref = (weights[0].abs(), weights[1] * 0.1 - 5, weights[2], weights[3] * 0.1 - 5)
    if dtype == torch.float64:  # no kernel for it: the same objective by autograd
        return by_autograd(x, z, labels, objective, weight, old, advantage, ref, entropy=entropy, **options)
    stats, gradient = token_objective(
        x, labels, weight, objective, old_logps=old, advantages=advantage, ref_logps=None if z is not None else ref,
        ref_logits=z, entropy=entropy, **options,
    )  # fmt: skip
    return [s.double() for s in stats if s is not None] + [gradient.double()]


def by_autograd(x, z, labels, o, weight, old, advantage, ref, *, entropy, **options):
    x = x.detach().requires_grad_()
    stats = fa.token_stats(
        x, labels, ref_logits=z, kl=z is not None, label_smoothing=o.label_smoothing, entropy=entropy, **options
    )
    ratio = (stats.logps - old).exp()
    clipped = ratio.clamp(1 - o.low, 1 + o.high)
    policy = torch.maximum(-advantage * ratio, -advantage * clipped)
    policy = torch.where(advantage < 0, torch.minimum(policy, -o.dual_clip * advantage), policy)
    d = stats.logps - ref
    loss = policy + o.kl_coef * (stats.kl if z is not None else torch.expm1(-d) + d) + o.z_loss * stats.lse**2
    if entropy:
        loss = loss - o.entropy_coef * stats.entropy
    (gradient,) = torch.autograd.grad(torch.where(labels == -100, 0.0, loss * weight).sum(), x)
    return [s.detach() for s in stats if s is not None] + [gradient]


def check(simulator, job, x, z, labels, weights, **options):
    """Within eager PyTorch's error, plus the margin; returns the launches, in which nothing was amiss."""
    exact_z = None if z is None else z.double()
    with fa.use_backend("eager"):
        exact = job(x.double(), exact_z, labels, weights, **options)
        plain = two_steps(x, z, labels, weights, **options) if job is two_steps else None
    if plain is None:  # the objective's gradient by a compiled kernel of the same dtype
        with fa.use_backend("cpu"):
            plain = job(x, z, labels, weights, **options)
    with simulator(check_uninit=True, check_races=True) as launches, simulator.raising():
        ours = job(x, z, labels, weights, **options)
    for e, p, o in zip(exact, plain, ours, strict=True):
        assert torch.equal(torch.isfinite(o), torch.isfinite(e))
        e, p, o = (t.nan_to_num(0, 0, 0) for t in (e, p, o))
        allowed = (p - e).abs().max() + MARGIN * max(1.0, e.abs().max())
        assert (o - e).abs().max() <= allowed, (float((o - e).abs().max()), float(allowed))
    for launch in launches:
        assert not any(launch.stats.raw[name] for name in CHECKS), launch.stats.reports
        assert launch.stats.bank_conflicts <= 0.05 * launch.stats.raw["shared_wavefronts"]
    return launches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocab", "misaligned"), [*itertools.product(VOCABS, (0,)), (7, 1), (1000, 3), (50257, 5)])
def test_every_vocabulary(cuda_simulator, dtype, vocab, misaligned):
    inputs = problem(3, vocab, dtype, misaligned=misaligned)
    check(cuda_simulator, two_steps, *inputs)
    check(cuda_simulator, one_step, *inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"entropy": True},
        {"softcap": 5.0, "temperature": 0.7},
        {"softcap": 20.0, "entropy": True},
        {"softcap": 100.0},
        {"temperature": 1.3, "entropy": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("ref", [False, True], ids=["alone", "reference"])
def test_options(cuda_simulator, dtype, options, ref):
    for vocab, misaligned in ((77, 1), (9001, 2)):
        inputs = problem(4, vocab, dtype, ref, misaligned=misaligned)
        check(cuda_simulator, two_steps, *inputs, **options)
        check(cuda_simulator, one_step, *inputs, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_label_smoothing(cuda_simulator, dtype):
    check(cuda_simulator, two_steps, *problem(4, 5003, dtype), label_smoothing=0.1)
    check(cuda_simulator, two_steps, *problem(4, 501, dtype), label_smoothing=0.2, softcap=3.0)


@pytest.mark.parametrize("ref", [False, True], ids=["alone", "reference"])
def test_a_row_over_a_cluster(cuda_simulator, ref):
    """Long enough for several blocks, whose sums meet in distributed shared memory."""
    inputs = problem(2, 40007, torch.float32, ref, misaligned=1)
    launches = check(cuda_simulator, one_step, *inputs, entropy=True)
    assert [launch.cluster for launch in launches] == [8 if ref else 4]


@pytest.mark.parametrize("large", [1e4, -1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_lose_nothing(cuda_simulator, dtype, large):
    x, z, labels, weights = problem(4, 1003, dtype, ref=True)
    x, z = ((t.float() + large).to(dtype) for t in (x, z))
    check(cuda_simulator, two_steps, x, z, labels, weights, entropy=True)
    check(cuda_simulator, one_step, x, None, labels, weights)


@pytest.mark.parametrize("vocab", [700, 9000])
def test_logits_of_any_size(cuda_simulator, vocab):
    """Rows of nothing but 1e9 to 1e38 and their negatives, all alike or not."""
    rows = torch.tensor([s * m for m in (1e9, 1e12, 1e20, 1e30, 3e38) for s in (1, -1)]).view(-1, 1)
    draw = torch.Generator().manual_seed(0)
    x = torch.cat([rows.expand(-1, vocab), rows * torch.rand(len(rows), vocab, generator=draw)])
    labels = torch.randint(vocab, (len(x),), generator=draw)
    with fa.use_backend("eager"):
        expected = fa.token_stats(x.double(), labels).logps
    with cuda_simulator():
        found = fa.token_stats(x, labels).logps
    torch.testing.assert_close(found.double(), expected, rtol=2e-7, atol=2e-6)


def test_peaks_and_holes(cuda_simulator):
    """Logits far above what a thread saw first; -inf and the lowest number, up to whole rows of them."""
    x, z, labels, weights = problem(8, 9000, torch.float32, ref=True)
    labels[:] = 17
    x[0, 8000] = 900.0
    x[1, 100:] = -math.inf
    z[1, 100:] = -math.inf
    x[2, 100:] = torch.finfo(torch.float32).min
    x[3, :9000:2] = -math.inf
    x[5, 8999] = 60.0
    x[6] = torch.finfo(torch.float32).min
    check(cuda_simulator, two_steps, x, None, labels, weights)
    check(cuda_simulator, two_steps, x[:2], z[:2], labels[:2], weights[:, :2], entropy=True)
    x[7] = -math.inf
    with fa.use_backend("eager"):
        expected = fa.token_stats(x[7:], labels[7:])
    with cuda_simulator():
        ours = fa.token_stats(x[7:], labels[7:])
    torch.testing.assert_close(ours, expected, equal_nan=True)


def test_hidden_rows_are_not_read(cuda_simulator):
    for dtype, vocab in ((torch.bfloat16, 4001), (torch.float32, 20000)):
        x, _, labels, weights = problem(6, vocab, dtype)
        labels[:] = -100
        labels[2] = 5
        x[:2], x[3:] = math.nan, math.nan
        x.requires_grad_()
        with cuda_simulator() as launches, cuda_simulator.raising():
            loss = fa.token_logps(x, labels).sum()
            (gradient,) = torch.autograd.grad(loss, x)
            stats, direct = token_objective(x.detach(), labels, weights[0].abs(), Objective("sft"))
        for launch in launches:
            logits = max(launch.stats.raw["buffers"], key=lambda b: b["read_bytes"])
            assert logits["read_bytes"] <= 1.01 * vocab * x.element_size() + 64
        for t in (gradient, direct):
            assert t[2].abs().sum() > 0
            assert t[:2].abs().sum() == 0 == t[3:].abs().sum()
        assert stats.logps[3:].abs().sum() == 0


def test_a_bad_label_is_nan_and_reads_nothing(cuda_simulator):
    x, _, labels, weights = problem(3, 1000, torch.float32)
    labels[:] = torch.tensor([4, 1000, -7])
    x.requires_grad_()
    with cuda_simulator(), cuda_simulator.raising():
        logps = fa.token_logps(x, labels)
        (gradient,) = torch.autograd.grad(logps.sum(), x)
        _, direct = token_objective(x.detach(), labels, weights[0].abs(), Objective("sft"))
    assert torch.isnan(logps).tolist() == [False, True, True]
    for t in (gradient, direct):
        assert torch.isnan(t).all(-1).tolist() == [False, True, True]


@pytest.mark.parametrize("vocab", [1000, 50257])
def test_a_row_does_not_depend_on_where_it_lies(cuda_simulator, vocab):
    """Bit for bit, whatever its alignment, its neighbours and the number of rows."""
    row = (torch.randn(1, vocab, generator=torch.Generator().manual_seed(1)) * 4).bfloat16()
    rows = at_element(row.repeat(9, 1), 1)
    labels = torch.full((9,), 3)
    with cuda_simulator():
        one = fa.token_stats(row, labels[:1], entropy=True)
        many = fa.token_stats(rows, labels, entropy=True)
        plain, single = fa.token_stats(rows, labels), fa.token_stats(row, labels[:1])
        objective = token_objective(rows, labels, torch.ones(9), Objective("sft"))
        alone = token_objective(row, labels[:1], torch.ones(1), Objective("sft"))
        both = [
            [
                *fa.token_stats(x, y, softcap=12.0)[:2],
                *token_objective(x, y, torch.ones(len(x)), Objective("sft"), softcap=12.0),
            ]
            for x, y in ((rows, labels), (row, labels[:1]))
        ]
    for a, b in ((many.logps, one.logps), (many.entropy, one.entropy), (plain.lse, single.lse)):
        assert torch.equal(a, b.expand(9))
    assert torch.equal(objective[0].logps, alone[0].logps.expand(9))
    assert torch.equal(objective[1], alone[1].expand(9, -1))
    for some, same in zip(*([lps, lse, stats.logps, gradient] for lps, lse, stats, gradient in both), strict=True):
        assert torch.equal(some, same.expand_as(some))


@pytest.mark.parametrize("vocab", [40, 1000, 1001, 3003])
def test_a_short_row_does_not_depend_on_its_block(cuda_simulator, vocab):
    """Bit for bit, with one, two or eight rows to a block, among others that are hidden or refused."""
    rows = 2100
    row = (torch.randn(1, vocab, generator=torch.Generator().manual_seed(1)) * 4).bfloat16()
    labels = torch.full((rows,), 3)
    labels[5::7], labels[6::11] = -100, vocab
    valid = labels == 3
    results = []
    for count in (1, 600, rows):
        x, here, chosen = row.repeat(count, 1), labels[:count], valid[:count]
        x[~chosen] = math.nan
        leaf = x.clone().requires_grad_()
        with cuda_simulator() as launches, cuda_simulator.raising():
            stats = fa.token_stats(leaf, here)
            (gradient,) = torch.autograd.grad(stats.logps.sum(), leaf)
            found, direct = token_objective(x, here, torch.ones(count), Objective("sft"))
        assert {launch.block for launch in launches} == {32 * {1: 1, 600: 4, rows: 8}[count]}
        results.append([t.detach()[chosen] for t in (stats.logps, stats.lse, gradient, found.logps, direct)])
        for t in (gradient, direct):
            assert not t[here == -100].any()
            assert torch.isnan(t[here == vocab]).all()
    for some in results[1:]:
        for one, many in zip(results[0], some, strict=True):
            assert torch.equal(one.expand_as(many), many)


def test_in_place_is_the_same(cuda_simulator):
    for vocab in (1000, 1003, 4003, 20011):
        x, _, labels, weights = problem(4, vocab, torch.bfloat16)
        with cuda_simulator(), cuda_simulator.raising():
            gradients = []
            for inplace in (False, True):
                leaf = x.clone().requires_grad_()
                logps = fa.token_logps(leaf * 1, labels, inplace_backward=inplace)
                gradients.append(torch.autograd.grad(logps.sum(), leaf)[0])
            copy = x.clone()
            _, direct = token_objective(x, labels, weights[0].abs(), Objective("sft"))
            _, over = token_objective(copy, labels, weights[0].abs(), Objective("sft"), inplace=True)
        assert torch.equal(*gradients)
        assert torch.equal(direct, over)
        assert over.data_ptr() == copy.data_ptr()


def test_layouts(cuda_simulator):
    """Rows of a slice, whose gradient is dense and so lies at other alignments; transposed rows; int32 labels."""
    full = (torch.randn(3, 5, 1001, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()
    labels = torch.randint(0, 1001, (3, 4))
    weights = torch.randn(4, 3, 4)
    check(cuda_simulator, two_steps, full[:, :-1], None, labels, weights)
    check(cuda_simulator, two_steps, full.transpose(0, 1)[1:], None, labels.T, weights.transpose(1, 2))
    check(cuda_simulator, two_steps, full[:, 1:], full[:, :-1], labels.int(), weights, entropy=True)
    check(cuda_simulator, one_step, full[:, :-1], full[:, 1:], labels.int(), weights)


def test_more_rows_than_blocks(cuda_simulator):
    """Blocks and clusters that take one row after another, as for more rows than a grid has room for."""
    for rows, vocab in ((7, 300), (300, 301), (300, 1300), (7, 70000)):
        x, _, labels, weights = problem(rows, vocab, torch.bfloat16)
        with cuda_simulator(check_races=True, check_uninit=True, most_blocks=4) as launches, cuda_simulator.raising():
            few = [*two_steps(x, None, labels, weights), *one_step(x, None, labels, weights)]
        with cuda_simulator():
            many = [*two_steps(x, None, labels, weights), *one_step(x, None, labels, weights)]
        assert all(launch.grid <= 4 and not any(launch.stats.raw[n] for n in CHECKS) for launch in launches)
        for a, b in zip(few, many, strict=True):
            assert torch.equal(a, b)


def test_scale(cuda_simulator):
    for dtype, elements in itertools.product(DTYPES, (1, 7, 5003)):
        x = at_element(torch.randn(elements).to(dtype), 1)
        scaled, same = x.clone(), x.clone()
        with cuda_simulator() as launches, cuda_simulator.raising():
            cuda.scale(scaled, torch.tensor(0.3))
            cuda.scale(same, torch.tensor(1.0, dtype=dtype))
        torch.testing.assert_close(scaled, (x.float() * 0.3).to(dtype), rtol=1e-7, atol=0)
        assert torch.equal(same, x)
        assert all(b["read_bytes"] <= 4 * 32 * 8 * 5 for b in launches[1].stats.raw["buffers"] if b["size"] != 4)
        assert sum(b["write_bytes"] for b in launches[1].stats.raw["buffers"]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
def test_gae(cuda_simulator, dtype, length):
    g = torch.Generator().manual_seed(length)
    rewards, values = (torch.randn(6, length, generator=g, dtype=dtype) for _ in range(2))
    mask = torch.rand(6, length, generator=g) > 0.3
    mask[0], mask[1] = False, True
    rewards[~mask] = math.nan
    with fa.use_backend("eager"):
        expected = fa.rl.gae(rewards.double(), values.double(), mask, gamma=0.99, lam=0.95)
    with cuda_simulator(), cuda_simulator.raising():
        ours = fa.rl.gae(rewards, values, mask, gamma=0.99, lam=0.95)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.double(), b, **tolerance)


def test_failures_carry_the_kernels_name(cuda_simulator):
    x, _, labels, weights = problem(3, 100, torch.float32)
    with cuda_simulator():
        for name, call in {
            "token_stats forward": lambda: fa.token_logps(x, labels),
            "token_objective": lambda: token_objective(x, labels, weights[0].abs(), Objective("sft")),
            "scale": lambda: cuda.scale(x, torch.tensor(2.0)),
        }.items():
            cuda_simulator.recorder.recorder_fail_next(719)
            with pytest.raises(RuntimeError, match=f"fastalign {name} on cuda:0: cudaErrorLaunchFailure"):
                call()


def test_a_device_that_is_not_there(cuda_simulator, monkeypatch):
    x, _, labels, _ = problem(3, 100, torch.float32)
    with cuda_simulator() as launches:
        monkeypatch.setattr(cuda, "_place", lambda tensor: (5, 0))
        with pytest.raises(RuntimeError, match="fastalign token_stats forward on cuda:5: cudaErrorInvalidDevice"):
            fa.token_logps(x, labels)
        monkeypatch.undo()
    assert not launches


def test_a_formula_of_ones_own_in_one_launch(cuda_simulator, own_formula):
    """With every operation of a program: short and long rows, and a row that is shared by a cluster."""
    program = trace_token(own_formula.formula, own_formula.inputs)
    for vocab in (50, 40007):
        x, z, labels, numbers = problem(6, vocab, torch.float32, ref=True)
        weight, given = numbers[0].abs(), {"x": numbers[1].abs(), "y": numbers[2].abs()}
        with cuda_simulator(check_uninit=True, check_races=True) as launches, cuda_simulator.raising():
            _, _, gradient = fused_gradient(x, labels, weight, program, given, ref_logits=z)
        _, want = own_formula.exact(x, z, labels, weight, given)
        # float32's roundings of the derivatives and of the gradient.
        torch.testing.assert_close(gradient.double(), want, rtol=1e-5, atol=float(4e-6 * want.abs().max()))
        assert not any(launch.stats.raw[name] for launch in launches for name in CHECKS)
