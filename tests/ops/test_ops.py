"""token_stats: numbers against float64, every backend and instruction set; layouts, hidden rows, extreme values."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import fastalign as fa
from fastalign import _backends

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = [("eager", None), *(("cpu", isa) for isa in _backends.cpu_isas())]
STATS = ("logps", "lse", "entropy", "kl")
# Stated margin over eager PyTorch's own error: relative for a number above 1, absolute (in nats) below.
MARGIN = 1e-6


@pytest.fixture(params=BACKENDS, ids=lambda b: b[1] or b[0])
def backend(request):
    name, isa = request.param
    with fa.use_backend(name, isa=isa):
        yield name


def problem(rows=6, vocab=50, dtype=torch.float32, scale=1.0, seed=0, ref=True):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, vocab, generator=g) * scale).to(dtype)
    z = (x.float() + 0.3 * torch.randn(rows, vocab, generator=g)).to(dtype) if ref else None
    labels = torch.randint(0, vocab, (rows,), generator=g)
    weights = torch.randn(4, rows, generator=g)
    return x, z, labels, weights


def run(x, z, labels, weights, **options):
    """Statistics and the gradient of a random combination of them, as float64 numbers."""
    x = x.detach().clone().requires_grad_()
    stats = fa.token_stats(x, labels, ref_logits=z, kl=z is not None, entropy=True, **options)
    present = [s for s in stats if s is not None]
    loss = sum((s.double() * w.double()).sum() for s, w in zip(present, weights, strict=False))
    (grad,) = torch.autograd.grad(loss, x)
    return [s.detach().double() for s in present] + [grad.double()]


def check_against_float64(x, z, labels, weights, **options):
    with fa.use_backend("eager"):
        exact = run(x.double(), None if z is None else z.double(), labels, weights, **options)
        plain = run(x, z, labels, weights, **options)
    ours = run(x, z, labels, weights, **options)
    names = [name for name in STATS if name != "kl" or z is not None]
    for name, e, p, o in zip((*names, "gradient"), exact, plain, ours, strict=True):
        assert torch.equal(torch.isfinite(o), torch.isfinite(e)), name
        e, p, o = (t.nan_to_num(0, 0, 0) for t in (e, p, o))
        allowed = (p - e).abs().max() + MARGIN * max(1.0, e.abs().max())
        assert (o - e).abs().max() <= allowed, (name, float((o - e).abs().max()), float(allowed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 7, 31, 32, 33, 64, 1000, 8192, 8193, 20011])
def test_every_vocabulary_size(backend, dtype, vocab):
    x, z, labels, weights = problem(5, vocab, dtype)
    labels[1] = -100
    check_against_float64(x, z, labels, weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"softcap": 5.0},
        {"softcap": 30.0, "temperature": 1.3},
        {"label_smoothing": 0.1},
        {"label_smoothing": 0.1, "temperature": 0.9, "softcap": 2.0},
    ],
    ids=str,
)
def test_options(backend, dtype, options):
    check_against_float64(*problem(6, 77, dtype, scale=3.0), **options)


@pytest.mark.parametrize("scale", [30.0, 1e3, 1e4])
def test_large_logits_keep_their_probabilities(backend, scale):
    x, z, labels, weights = problem(8, 20011, torch.float32, scale)
    labels[::2] = x[::2].argmax(-1)  # where the probability is not just 0
    check_against_float64(x, z, labels, weights)


def test_a_late_maximum_far_above_the_rest(backend):
    """The kernel's shift comes from the row's first elements: a far larger logit elsewhere must not overflow."""
    x, _, labels, weights = problem(6, 30000, torch.float32)
    for row, height in enumerate((50.0, 88.0, 100.0, 300.0, 1e4, 1e30)):
        x[row, 29000 - 4000 * row] = height
    labels[:3] = torch.tensor([29000, 25000, 21000])
    check_against_float64(x, None, labels, weights)


def test_minus_infinity_is_probability_zero(backend):
    x, z, labels, weights = problem(4, 600, torch.float32)
    x[0, :300] = -torch.inf  # the whole sample that the shift is taken from
    x[1, 5:] = -torch.inf
    x[2, 1::2] = z[2, 1::2] = -torch.inf
    labels[:] = torch.tensor([400, 3, 0, 7])
    check_against_float64(x, z, labels, weights)
    ours = run(x, z, labels, weights)
    assert torch.isfinite(ours[-1]).all()


def test_kl_is_infinite_where_the_reference_excludes_what_the_policy_does_not(backend):
    x, z, labels, _ = problem(2, 40)
    z[0, 3] = -torch.inf
    kl = fa.token_stats(x, labels, ref_logits=z, kl=True).kl
    assert kl[0] == torch.inf
    assert torch.isfinite(kl[1])


def test_nan_infinity_and_empty_support_propagate(backend):
    x, _, labels, _ = problem(4, 700, ref=False)
    x[0, 650], x[1, 650], x[2] = torch.nan, torch.inf, -torch.inf
    x[3, :] = -torch.inf
    x[3, 500] = torch.nan
    stats = fa.token_stats(x, labels)
    assert stats.logps.isnan().all()
    assert stats.lse[[0, 1, 3]].isnan().all()
    assert stats.lse[2] == -torch.inf


def test_ignored_rows_may_hold_anything(backend):
    x, z, labels, weights = problem(6, 90)
    clean = run(x, z, labels.index_fill(0, torch.tensor([1, 4]), -100), weights)
    x[1], x[4], z[1], z[4] = torch.nan, torch.inf, torch.nan, -torch.inf
    labels[[1, 4]] = -100
    dirty = run(x, z, labels, weights)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    assert all((t[[1, 4]] == 0).all() for t in dirty)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), ()])
def test_zero_rows_and_scalars(backend, shape):
    x = torch.randn(*shape, 9, requires_grad=True)
    stats = fa.token_stats(x, torch.zeros(shape, dtype=torch.long), entropy=True)
    assert stats.logps.shape == stats.entropy.shape == shape
    (grad,) = torch.autograd.grad(stats.logps.sum(), x)
    assert grad.shape == x.shape


def test_all_rows_ignored(backend):
    x = torch.full((3, 8), torch.nan, requires_grad=True)
    stats = fa.token_stats(x, torch.full((3,), 7), ignore_index=7)
    (grad,) = torch.autograd.grad(stats.logps.sum() + stats.lse.sum(), x)
    assert (stats.logps == 0).all()
    assert (stats.lse == 0).all()
    assert (grad == 0).all()


def layouts(x):
    """The same [4, 3, V] values with other strides."""
    v = x.shape[-1]
    yield "transposed", x.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.full((4, 5, v + 3), torch.nan, dtype=x.dtype)
    wide[:, 1:4, 2:-1] = x
    yield "slice of a larger one", wide[:, 1:4, 2:-1]
    yield "vocabulary not dense", x.transpose(1, 2).contiguous().transpose(1, 2)
    yield "every other element", torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_strides_change_nothing(backend, dtype, inplace):
    x, _, labels, _ = problem(12, 45, dtype)
    x, labels = x.view(4, 3, 45), labels.view(4, 3)
    labels[2, 1] = -100

    def both(x):
        leaf = x.detach().requires_grad_()
        logps = fa.token_logps(leaf, labels, inplace_backward=inplace)
        return logps, torch.autograd.grad(logps, leaf, torch.ones_like(logps))[0].clone()

    expected = both(x.clone())
    for name, view in layouts(x):
        assert torch.equal(view, x), name
        for a, b in zip(expected, both(view), strict=True):
            assert torch.equal(a, b), name


def test_labels_of_either_width_and_any_stride(backend):
    x, _, labels, _ = problem(6, 20)
    expected = fa.token_logps(x, labels)
    assert torch.equal(fa.token_logps(x, labels.int()), expected)
    assert torch.equal(fa.token_logps(x, torch.stack([labels, -labels], -1)[:, 0]), expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_offsets_beyond_32_bits(backend, inplace):
    """Two rows 2^31 + 7 elements apart. Only the pages of the rows themselves are ever touched."""
    gap, vocab = 2**31 + 7, 1001
    rows = torch.empty(gap + vocab, dtype=torch.bfloat16).as_strided((2, vocab), (gap, 1))
    x, _, labels, _ = problem(2, vocab, torch.bfloat16)
    rows.copy_(x)
    results = []
    for logits in (x.clone().requires_grad_(), rows.requires_grad_()):
        logps = fa.token_logps(logits, labels, inplace_backward=inplace)
        # Straight from the operator: a dense copy of a strided gradient would be 4 GiB.
        saved = torch.ops.fastalign.token_stats(logits.detach(), labels, None, -100, 1.0, 0.0, False, False, False)[5]
        args = (labels, None, saved, None, None, torch.ones(2), None, None, None, None, -100, 1.0, 0.0)
        if inplace:
            torch.ops.fastalign.token_stats_backward_(logits.detach(), *args)
            grad = logits.detach()
        else:
            grad = torch.ops.fastalign.token_stats_backward(logits.detach(), *args)
        results.append((logps.detach(), grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_threads_and_neighbours_change_no_bit(backend):
    x, z, labels, weights = problem(5, 40000, torch.bfloat16)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(run(x, z, labels, weights))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    for row in range(5):
        alone = run(x[row : row + 1], z[row : row + 1], labels[row : row + 1], weights[:, row : row + 1])
        if backend == "cpu":  # eager PyTorch's own reductions do not promise this
            assert all(torch.equal(a[row : row + 1], b) for a, b in zip(results[0], alone, strict=True))


def test_uniform_logits_are_exact(backend):
    stats = fa.token_stats(
        torch.zeros(2, 1024), torch.tensor([0, 1023]), ref_logits=torch.zeros(2, 1024), kl=True, entropy=True
    )
    assert stats.logps.tolist() == pytest.approx([-math.log(1024)] * 2, rel=1e-7)
    assert stats.entropy.tolist() == pytest.approx([math.log(1024)] * 2, rel=1e-7)
    assert stats.kl.tolist() == [0.0, 0.0]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 3), min_size=0, max_size=3),
    vocab=st.integers(1, 130),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.0, 1.0, 20.0]),
    seed=st.integers(0, 2**16),
    isa=st.sampled_from(_backends.cpu_isas() or [None]),
)
def test_any_shape(shape, vocab, dtype, scale, seed, isa):
    rows = math.prod(shape)
    x, z, labels, weights = problem(rows, vocab, dtype, scale, seed)
    labels[::3] = -100
    if rows == 0:
        assert fa.token_logps(x.view(*shape, vocab), labels.view(shape)).shape == torch.Size(shape)
        return
    with fa.use_backend("cpu" if isa else "eager", isa=isa):
        check_against_float64(x.view(*shape, vocab), z.view(*shape, vocab), labels.view(shape), weights.view(4, *shape))


def test_double_precision_gradients():
    x, z, labels, _ = problem(4, 13, torch.float64)
    labels[2] = -100

    def f(x):
        stats = fa.token_stats(
            x, labels, ref_logits=z, kl=True, entropy=True, temperature=0.7, softcap=3.0, label_smoothing=0.1
        )
        return tuple(stats)

    assert torch.autograd.gradcheck(f, (x.requires_grad_(),))


def test_sequence_logps_sum_and_average():
    x, _, labels, _ = problem(6, 11)
    x, labels = x.view(2, 3, 11), labels.view(2, 3)
    labels[0, :2] = -100
    labels[1, :] = -100
    per_token = fa.token_logps(x, labels)
    assert torch.equal(fa.sequence_logps(x, labels), per_token.sum(-1))
    assert torch.equal(fa.sequence_logps(x, labels, average=True), torch.stack([per_token[0, 2], torch.tensor(0.0)]))


def test_sequence_logps_round_once():
    """A float32 result is the exact sum, rounded; a float64 one is not rounded at all."""
    x = torch.randn(3, 700, 50, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 50, (3, 700), generator=torch.Generator().manual_seed(1))
    exact = fa.token_logps(x, labels).double().sum(-1)
    assert torch.equal(fa.sequence_logps(x, labels, dtype=torch.float64), exact)
    assert torch.equal(fa.sequence_logps(x, labels), exact.float())
    with pytest.raises(TypeError, match=r"dtype must be None, torch\.float32 or torch\.float64; got torch\.int64"):
        fa.sequence_logps(x, labels, dtype=torch.int64)
