"""One launch of a plain objective keeps the forward's powers: rows on which that could go wrong."""

import math

import pytest
import torch

import fastalign as fa
from fastalign import _backends

ISAS = _backends.cpu_isas()
VOCAB = 20011  # a whole piece of 16384, one that is not, and a tail
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rows(dtype):
    """Rows of noise, most of them with logits far above everything that came before them."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(12, VOCAB, generator=draw)
    high = 6e4 if dtype == torch.float16 else 1e30
    for row, (at, value) in enumerate(
        [(300, 150.0), (16383, 1e4), (16384, 1e4), (VOCAB - 1, 1e4), (VOCAB - 40, 200.0), (5, 1e4), (9000, high)]
    ):
        x[row, at] = value
    x[7, 1000:1200] = torch.linspace(50, 1000, 200)  # rises again and again
    x[8, :16384] = -math.inf
    x[9, 16384:] = -math.inf
    x[10] *= 0
    return x.to(dtype)


def exact(x, labels, weight):
    """Gradient of -sum_t weight_t log p_t in float64."""
    p = torch.softmax(x.double(), -1)
    p[torch.arange(len(labels)), labels] -= 1
    return p * weight.double().unsqueeze(-1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_gradient_of_uneven_rows(isa, dtype, inplace, threads):
    x, labels = rows(dtype), torch.tensor([300, 7, 16384, 2, 5, 5, 9000, 1100, 16400, 3, 0, -100])
    weight = torch.linspace(0.5, 1.5, 12)
    want = exact(x, labels.clamp(min=0), weight)
    want[-1] = 0
    logps = torch.log_softmax(x.double(), -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    before, used = torch.get_num_threads(), x.clone()
    try:
        torch.set_num_threads(threads)
        with fa.use_backend("cpu", isa=isa):
            stats, gradient = fa.token_objective(used, labels, weight, fa.Objective("sft"), inplace=inplace)
            two_steps = fa.token_stats(x, labels)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(stats.logps[:-1].double(), logps[:-1], rtol=2e-7, atol=2e-6)
    torch.testing.assert_close(stats.logps, two_steps.logps, rtol=1.2e-7, atol=1e-6)
    # float32: a difference of 20 between logits is known to 1e-6, and so is its exponential.
    half_ulp = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    smallest = 1e-7 if dtype == torch.float16 else 1e-12  # float16 has nothing finer
    at_label = (torch.arange(11), labels[:-1])
    # p - 1 cancels where p is nearly 1: its error is float32's eps.
    torch.testing.assert_close(gradient[at_label].double(), want[at_label], rtol=half_ulp, atol=3e-7)
    gradient[at_label], want[at_label] = 0, 0
    torch.testing.assert_close(gradient.double(), want, rtol=half_ulp, atol=smallest)
    assert (gradient.data_ptr() == used.data_ptr()) == inplace


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("isa", ISAS)
def test_a_bad_logit_spoils_its_own_row_alone(isa, bad):
    clean = rows(torch.float32)
    labels = torch.zeros(12, dtype=torch.int64)
    spoilt = clean.clone()
    spoilt[10, 17000] = bad
    with fa.use_backend("cpu", isa=isa):
        want = fa.token_objective(clean, labels, torch.ones(12), fa.Objective("sft"), inplace=True)[1]
        got = fa.token_objective(spoilt, labels, torch.ones(12), fa.Objective("sft"), inplace=True)[1]
    assert got[10].isnan().any()
    others = [row for row in range(12) if row != 10]
    assert torch.equal(got[others], want[others])


def test_memory_behind_a_row_is_left_alone():
    """Rows lie apart in a wider buffer; what is between them stays."""
    buffer = torch.full((8, VOCAB + 13), 7.0)
    x = buffer[:, :VOCAB]
    x.copy_(torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(1)))
    want = exact(x, torch.zeros(8, dtype=torch.int64), torch.ones(8))
    fa.token_objective(x, torch.zeros(8, dtype=torch.int64), torch.ones(8), fa.Objective("sft"), inplace=True)
    assert (buffer[:, VOCAB:] == 7.0).all()
    torch.testing.assert_close(x.double(), want, rtol=6e-7, atol=1e-12)
