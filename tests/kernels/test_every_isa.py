"""Every instruction set that this processor has: numbers against float64, and no bit that depends on batch, threads or
position. The default one is held to more by the other files; here the others are run at all."""

import functools
import itertools

import pytest
import torch

import fastalign as fa
from fastalign import _backends
from fastalign.reference import CASES, Sizes, cast

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABS = (1, 5, 17, 67, 1003, 8209)  # none but 1 is a whole number of vectors, of 4 to 32 elements
# The project's rule: eager PyTorch's own error and a margin, relative for a number above 1 and absolute (nats) below.
MARGIN = 1e-6
LOSSES = [case for case in CASES if "logits" in case.leaves]
BATCHES = ((Sizes(), 0), (Sizes(batch=5, length=4, vocab=131, list_length=4), 1))


@pytest.fixture(params=_backends.cpu_isas(), autouse=True)
def isa(request):
    with fa.use_backend("cpu", isa=request.param):
        assert _backends.cpu_isa() == request.param
        yield request.param


def problem(rows, vocab, dtype, hidden=True):
    """Logits, reference, labels and upstream weights; of the hidden rows, one in three, the logits are NaN."""
    g = torch.Generator().manual_seed(vocab)
    x = (3 * torch.randn(rows, vocab, generator=g)).to(dtype)
    z = (x.float() + 0.3 * torch.randn(rows, vocab, generator=g)).to(dtype)
    labels = torch.randint(0, vocab, (rows,), generator=g)
    if hidden:
        labels[1::3] = -100
        x[1::3] = z[1::3] = torch.nan
    return x, z, labels, torch.randn(4, rows, generator=g)


def statistics(x, z, labels, weights, **options):
    """Log-probability, lse, entropy and KL, and the gradient of a random combination of them, in float64."""
    x = x.detach().clone().requires_grad_()
    found = fa.token_stats(x, labels, ref_logits=z, kl=True, entropy=True, **options)
    stats = (found.logps, found.lse, found.entropy, found.kl)
    loss = sum((s.double() * w.double()).sum() for s, w in zip(stats, weights, strict=True))
    return [t.detach().double() for t in (*stats, *torch.autograd.grad(loss, x))]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 20.0, "label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_and_gradients(dtype, vocab, options):
    given = problem(7, vocab, dtype)
    ours = statistics(*given, **options)
    with fa.use_backend("eager"):
        x, z, *rest = given
        exact = statistics(x.double(), z.double(), *rest, **options)
        eager = statistics(*given, **options)
    for name, o, e, p in zip(("logps", "lse", "entropy", "kl", "gradient"), ours, exact, eager, strict=True):
        assert torch.isfinite(o).all(), name
        assert not o[1::3].any(), f"{name} of hidden rows"
        allowed = (p - e).abs().max() + MARGIN * max(1.0, e.abs().max())
        assert (o - e).abs().max() <= allowed, (name, float((o - e).abs().max()), float(allowed))


# ------------------------------------------------------------------------------------------------------------- losses
def loss_and_gradients(function, inputs, leaves):
    inputs = {name: t.detach().clone().requires_grad_(name in leaves) for name, t in inputs.items()}
    loss = function(**inputs)
    return [t.detach().double() for t in (loss, *torch.autograd.grad(loss, [inputs[n] for n in leaves]))]


@functools.cache
def by_the_formula(case, dtype, batch):
    """A case's inputs, exact results and those of plain torch in this dtype: the same for every instruction set."""
    sizes, seed = batch
    inputs = cast(case.inputs(sizes, torch.Generator().manual_seed(seed)), dtype)
    wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    return inputs, *(loss_and_gradients(case.reference, given, case.leaves) for given in (wide, inputs))


def error(got, want):
    return torch.tensor([float((g - w).norm() / w.norm().clamp(min=1e-3)) for g, w in zip(got, want, strict=True)])


@pytest.mark.parametrize("case", LOSSES, ids=lambda case: case.name)
def test_losses_and_gradients(case):
    """Both over the batches of all dtypes: in a single one rounding may happen to favour either."""
    for dtype in DTYPES:
        ours, eager = torch.zeros(1 + len(case.leaves)), torch.zeros(1 + len(case.leaves))
        for batch in BATCHES:
            inputs, exact, plain = by_the_formula(case, dtype, batch)
            ours += error(loss_and_gradients(case.fused, inputs, case.leaves), exact).square()
            eager += error(plain, exact).square()
        ours, eager = ((sums / len(BATCHES)).sqrt() for sums in (ours, eager))
        assert (ours <= eager + MARGIN).all(), f"{dtype}: {ours.tolist()} of loss and gradients, eager {eager.tolist()}"


# --------------------------------------------------------------------------------------------------------- invariance
def same_bits(results, expected):
    return all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize(("rows", "vocab"), [(5, 40_009), (40, 131)], ids=["few long rows", "many short rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_no_bit(dtype, rows, vocab):
    given, before, results = problem(rows, vocab, dtype, hidden=False), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(statistics(*given))
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(other, results[0]) for other in results[1:])


@pytest.mark.parametrize("vocab", [67, 8209])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbours_and_position_change_no_bit(dtype, vocab):
    """A row alone, first, last and in the middle: also with another alignment, since no row is a whole vector."""
    x, z, labels, weights = problem(6, vocab, dtype, hidden=False)
    together = statistics(x, z, labels, weights)
    for order in ([5, 4, 3, 2, 1, 0], [2, 0, 4], [3]):
        moved = statistics(x[order], z[order], labels[order], weights[:, order])
        assert same_bits(moved, [t[order] for t in together]), order


@pytest.mark.parametrize("job", ["cross_entropy", "token_logps"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_short_ways_give_the_same_bits(dtype, job):
    """Calls that look at the tensors themselves run the same kernels as the operators do."""
    x, _, labels, _ = problem(9, 1003, dtype)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    logps = fa.token_stats(leaves[0], labels).logps
    if job == "token_logps":
        results = [logps, fa.token_logps(leaves[1], labels)]
        assert torch.equal(*results)
        gradients = [torch.autograd.grad(r.sum(), leaf)[0] for r, leaf in zip(results, leaves, strict=True)]
    else:
        count = int((labels != -100).sum())
        loss = fa.cross_entropy(leaves[1], labels)
        torch.testing.assert_close(loss, (-logps.double().sum() / count).to(loss.dtype), rtol=2e-7, atol=0)
        gradients = [torch.autograd.grad(logps, leaves[0], torch.full_like(logps, -1 / count))[0]]
        gradients.append(torch.autograd.grad(loss, leaves[1])[0])
    assert torch.equal(*gradients)


def test_a_choice_is_the_threads_own(isa):
    """Another thread of the same moment runs what it chose itself, in its kernels as in what it is told."""
    from concurrent.futures import ThreadPoolExecutor

    x, _, labels, _ = problem(4, 8209, torch.float32, hidden=False)
    expected = {}
    for other in _backends.cpu_isas():
        with fa.use_backend("cpu", isa=other):
            expected[other] = fa.token_logps(x, labels)

    def work(other):
        with fa.use_backend("cpu", isa=other):
            return all(
                _backends.cpu_isa() == other and torch.equal(fa.token_logps(x, labels), expected[other])
                for _ in range(50)
            )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, itertools.islice(itertools.cycle(expected), 8)))
        assert pool.submit(_backends.cpu_isa).result() != isa or isa == _backends.cpu_isas()[0]
    assert _backends.cpu_isa() == isa
