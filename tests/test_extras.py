"""Extras of the token statistics: log sum p^2, mean logit, top-1 hit; constants, from logits and from a head."""

import pytest
import torch
from torch.nn import functional as F

import fastalign as fa

NAMES = ("log_sum_sq_probs", "mean_logits", "is_top1")
V = 1301


def expected(logits, labels, temperature=1.0, softcap=None):
    x = logits.double()
    x = (x if softcap is None else softcap * torch.tanh(x / softcap)) / temperature
    live = labels != -100
    squares = x.log_softmax(-1).exp().square().sum(-1).log()
    return {
        "log_sum_sq_probs": torch.where(live, squares, 0),
        "mean_logits": torch.where(live, x.mean(-1), 0),
        "is_top1": (logits.argmax(-1) == labels) & live,
    }


def check(stats, want, dtype):
    for name, exact in want.items():
        got = getattr(stats, name)
        assert not got.requires_grad
        if exact.dtype == torch.bool:
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
    stats = fa.token_stats(logits.requires_grad_(), labels, extras=NAMES, **options)
    check(stats, expected(logits.detach(), labels, **options), dtype)
    plain = fa.token_stats(logits, labels, **options)
    assert torch.equal(stats.logps, plain.logps)
    assert type(plain) is fa.TokenStats
    assert type(stats) is fa.TokenStatsAndExtras


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
        hidden.requires_grad_(), weight, labels, logit_scale=0.8, temperature=1.3, extras=NAMES,
        plan=plan[0], chunk_bytes=plan[1],
    )  # fmt: skip
    check(stats, expected(logits.double() * 0.8, labels, 1.3), torch.float32)
    stats.logps.sum().backward()


def test_of_equal_logits_the_first_is_top():
    weight, hidden = torch.ones(2050, 2), torch.ones(3, 2)
    labels = torch.tensor([0, 1, 2049])
    for chunk_bytes in (None, 9_000):
        stats = fa.head_token_stats(
            hidden, weight, labels, extras=("is_top1",), plan="recompute", chunk_bytes=chunk_bytes
        )
        assert stats.is_top1.tolist() == [True, False, False]
        assert stats.mean_logits is None
    assert fa.token_stats(torch.ones(3, 5), torch.arange(3), extras=["is_top1"]).is_top1.tolist() == [
        True,
        False,
        False,
    ]


def test_nothing_live_and_unknown_names():
    labels = torch.full((3,), -100)
    stats = fa.head_token_stats(torch.ones(3, 2), torch.ones(5, 2), labels, extras=NAMES)
    assert stats.is_top1.tolist() == [False] * 3
    assert stats.log_sum_sq_probs.tolist() == [0.0] * 3
    for function, arguments in ((fa.token_stats, ()), (fa.head_token_stats, (torch.ones(5, 2),))):
        for bad in (("top1",), "is_top1"):
            with pytest.raises(ValueError, match="extras must be a collection of names among log_sum_sq_probs"):
                function(torch.ones(3, 2), *arguments, labels, extras=bad)


def test_compiled():
    logits, labels = problem(torch.float32)
    function = torch.compile(lambda x: fa.token_stats(x, labels, extras=NAMES)[4:], fullgraph=True, backend="eager")
    for got, want in zip(function(logits), fa.token_stats(logits, labels, extras=NAMES)[4:], strict=True):
        assert torch.equal(got, want)
