"""Diagnostics among token statistics: log sum p^2, mean logit, top-1 hit; constants, from logits and from a head."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

import fastalign as fa
from fastalign._backends import cpu, eager

NAMES = ("log_sum_sq_probs", "mean_logits", "is_top1", "argmax")
V = 1301
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("vocab", "offset", "options"),
    [
        *((vocab, vocab % 7, {}) for vocab in (1, 2, 5, 700, 1024, 1025, 4099)),
        (2500, 1, {"temperature": 0.7, "softcap": 30.0}),
    ],
    ids=str,
)
def test_on_every_backend(backend, extreme_rows, dtype, vocab, offset, options):
    extreme_rows.diagnostics(dtype, vocab, offset, **options)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_long_rows_in_pieces_and_by_threads(extreme_rows, dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for vocab in (16384, 16385, 50001):
            extreme_rows.diagnostics(dtype, vocab, 3)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("vocab", [40, 5000, 40000])
def test_rows_keep_their_bits_whoever_sums_them(vocab):
    """Among others, shared by threads, and in any order, a row's diagnostics are the same bits."""
    x = 3 * torch.randn(33, vocab, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(33) % vocab
    many = fa.token_stats(x, labels, diagnostics=NAMES)
    for row in (0, 7, 32):
        one = fa.token_stats(x[row : row + 1], labels[row : row + 1], diagnostics=NAMES)
        for name in NAMES:
            assert torch.equal(getattr(one, name)[0], getattr(many, name)[row]), name


def expected(logits, labels, temperature=1.0, softcap=None):
    x = logits.double()
    x = (x if softcap is None else softcap * torch.tanh(x / softcap)) / temperature
    valid = labels != -100
    squares = x.log_softmax(-1).exp().square().sum(-1).log()
    return {
        "log_sum_sq_probs": torch.where(valid, squares, 0),
        "mean_logits": torch.where(valid, x.mean(-1), 0),
        "is_top1": (logits.argmax(-1) == labels) & valid,
        "argmax": torch.where(valid, logits.argmax(-1), -1),
    }


def check(stats, want, dtype):
    for name, exact in want.items():
        got = getattr(stats, name)
        assert not got.requires_grad
        if not exact.is_floating_point():
            assert torch.equal(got, exact), name
        else:
            assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            margin = 1e-12 if dtype == torch.float64 else 2e-6
            assert float((got.double() - exact).abs().max()) <= margin * max(1.0, float(exact.abs().max())), name


def problem(dtype):
    g = torch.Generator().manual_seed(5)
    logits = (3 * torch.randn(4, 5, V, generator=g)).to(dtype)
    labels = logits.argmax(-1)
    labels[:, 1] = 7
    labels[2, 3] = -100
    return logits, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 5.0}], ids=str)
def test_of_logits(dtype, options):
    logits, labels = problem(dtype)
    stats = fa.token_stats(logits.requires_grad_(), labels, diagnostics=NAMES, **options)
    check(stats, expected(logits.detach(), labels, **options), dtype)
    plain = fa.token_stats(logits, labels, **options)
    # Sums of the same read run in an order of their own; each is as close as this to the exact number.
    torch.testing.assert_close(stats.logps, plain.logps, rtol=2e-6, atol=2e-6)
    assert type(plain) is type(stats) is fa.TokenStats
    assert plain.log_sum_sq_probs is plain.mean_logits is plain.is_top1 is None


@pytest.mark.parametrize("plan", [("keep", None), ("recompute", 30_000), ("recompute", 9_000), ("project", 30_000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_a_head(dtype, plan):
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(3, 7, 16, generator=g).to(dtype)
    weight = torch.randn(V, 16, generator=g).to(dtype).requires_grad_(plan[0] != "project")
    # From the very logits: in 16 bits a GEMM of another shape rounds some of them to another neighbour.
    logits = F.linear(hidden, weight).detach()
    labels = logits.argmax(-1)
    labels[:, 2], labels[1, 4] = 1200, -100
    stats = fa.head_token_stats(
        hidden.requires_grad_(), weight, labels, logit_scale=0.8, temperature=1.3, diagnostics=NAMES,
        plan=plan[0], chunk_bytes=plan[1],
    )  # fmt: skip
    check(stats, expected(logits.double() * 0.8, labels, 1.3), torch.float32)
    stats.logps.sum().backward()


def test_of_equal_logits_the_first_is_top():
    weight, hidden = torch.ones(2050, 2), torch.ones(3, 2)
    labels = torch.tensor([0, 1, 2049])
    for chunk_bytes in (None, 9_000):
        stats = fa.head_token_stats(
            hidden, weight, labels, diagnostics=("is_top1",), plan="recompute", chunk_bytes=chunk_bytes
        )
        assert stats.is_top1.tolist() == [True, False, False]
        assert stats.mean_logits is None
    assert fa.token_stats(torch.ones(3, 5), torch.arange(3), diagnostics=["is_top1"]).is_top1.tolist() == [
        True,
        False,
        False,
    ]


def test_nothing_live_and_unknown_names():
    labels = torch.full((3,), -100)
    stats = fa.head_token_stats(torch.ones(3, 2), torch.ones(5, 2), labels, diagnostics=NAMES)
    assert stats.is_top1.tolist() == [False] * 3
    assert stats.argmax.tolist() == [-1] * 3
    assert stats.log_sum_sq_probs.tolist() == [0.0] * 3
    for function, arguments in ((fa.token_stats, ()), (fa.head_token_stats, (torch.ones(5, 2),))):
        for bad in (("top1",), "is_top1"):
            with pytest.raises(ValueError, match="diagnostics must be a collection of names among log_sum_sq_probs"):
                function(torch.ones(3, 2), *arguments, labels, diagnostics=bad)


def test_compiled():
    logits, labels = problem(torch.float32)

    def function(x):
        logps, _, entropy, _ = fa.token_stats(x, labels, entropy=True)
        stats = fa.token_stats(x, labels, diagnostics=NAMES)
        return stats, stats.is_top1, logps, entropy

    got, want = torch.compile(function, fullgraph=True, backend="eager")(logits), function(logits)
    for ours, exact in zip((*got[0], *got[1:]), (*want[0], *want[1:]), strict=True):
        assert ours is exact is None or torch.equal(ours, exact)
    assert type(got[0]) is fa.TokenStats


def reads(monkeypatch, function):
    """How often the logits, or tiles of them, are read forward."""
    counts = []
    for backend in (cpu, eager):
        forward = backend.forward
        monkeypatch.setattr(backend, "forward", lambda *args, forward=forward: [counts.append(1), forward(*args)][1])
    function()
    monkeypatch.undo()
    return len(counts)


def test_they_take_no_read_of_their_own(monkeypatch):
    logits, labels = problem(torch.float32)
    hidden, weight = torch.randn(4, 5, 16), torch.randn(V, 16, requires_grad=True)

    def of_logits(*diagnostics):
        return reads(monkeypatch, lambda: fa.token_stats(logits, labels, entropy=True, diagnostics=diagnostics))

    def of_a_head(*diagnostics):
        given = {"entropy": True, "diagnostics": diagnostics, "plan": "recompute", "chunk_bytes": 9_000}
        return reads(monkeypatch, lambda: fa.head_token_stats(hidden, weight, labels, **given))

    assert of_logits() == of_logits(*NAMES) == 1
    assert of_a_head() == of_a_head(*NAMES) > 1


def test_a_mean_logit_carries_no_gradient_and_leaves_that_of_the_others_alone():
    logits, labels = problem(torch.float32)
    grads = []
    for diagnostics in ((), NAMES):
        x = logits.clone().requires_grad_()
        stats = fa.token_stats(x, labels, entropy=True, label_smoothing=0.1, diagnostics=diagnostics)
        grads.append(torch.autograd.grad((stats.logps + stats.entropy).sum(), x)[0])
    torch.testing.assert_close(*grads)


def test_a_tuple_of_four_that_keeps_what_was_asked_for():
    logits, labels = problem(torch.float32)
    logps, lse, entropy, kl = fa.token_stats(logits, labels)
    assert entropy is kl is None
    stats = fa.token_stats(logits, labels, diagnostics=["is_top1"])
    torch.testing.assert_close(stats[0], logps, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(stats.lse, lse)
    assert [t is None for t in stats] == [False, False, True, True, True, True, False, True]
    twice = stats._replace(lse=2 * lse)
    assert torch.equal(twice.lse, 2 * lse)
    assert twice.is_top1 is stats.is_top1
    with pytest.raises(ValueError, match="TokenStats has logps, lse, entropy, kl here; got is_top1"):
        fa.TokenStats(*stats[:4])._replace(is_top1=labels)


def test_what_takes_tuples_apart_keeps_them_whole():
    """A model's forward is wrapped by much that does."""
    logits, labels = problem(torch.float32)
    stats = fa.token_stats(logits, labels, diagnostics=["is_top1"])
    tree = torch.utils._pytree.tree_map(lambda t: t, stats)
    for other in (copy.copy(stats), copy.deepcopy(stats), pickle.loads(pickle.dumps(stats)), tree, type(stats)(*stats)):
        assert type(other) is fa.TokenStats
        assert torch.equal(other.is_top1, stats.is_top1)
        assert other.mean_logits is None
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate (the extra `train`)")
    half = fa.TokenStats(*[t if t is None or t.dtype == torch.bool else t.half() for t in stats])
    wide = accelerate.utils.convert_outputs_to_fp32(lambda: half)()
    assert wide.logps.dtype == torch.float32
    assert torch.equal(wide.is_top1, stats.is_top1)


def test_the_old_names_still_do():
    logits, labels = problem(torch.float32)
    with pytest.warns(DeprecationWarning, match="fastalign.TokenStatsAndExtras is now fastalign.TokenStats"):
        assert fa.TokenStatsAndExtras is fa.TokenStats
    for function, arguments in (
        (fa.token_stats, (logits,)),
        (fa.head_token_stats, (torch.ones(4, 5, 2), torch.ones(V, 2))),
    ):
        with pytest.warns(DeprecationWarning, match="extras is now diagnostics") as seen:
            stats = function(*arguments, labels, extras=["is_top1"])
        assert seen[0].filename == __file__
        assert stats.is_top1 is not None
        with (
            pytest.warns(DeprecationWarning, match="extras"),
            pytest.raises(ValueError, match="diagnostics must be a collection"),
        ):
            function(*arguments, labels, extras="is_top1")
