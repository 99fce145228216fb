"""Targets whose probability is near 1: log-probabilities that are never above 0, and what is left of the gradient."""

import pytest
import torch

SIMULATION = {"check_uninit": True, "check_races": True}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# The place of the target: at both ends, at both sides of the ends of vectors, of runs that a loop takes at once, and of
# pieces that are summed apart.
@each_dtype
@pytest.mark.parametrize(
    ("vocab", "places"),
    [
        (2, (0, 1)),
        (7, (0, 3, 6)),
        (37, (0, 31, 32, 36)),
        (1000, (0, 63, 64, 500, 999)),
        (2111, (5, 2047, 2048, 2110)),
        (5000, (0, 2500, 4999)),
        (20011, (0, 255, 16383, 16384, 20010)),
    ],
)
def test_a_target_that_leads(backend, extreme_rows, dtype, vocab, places):
    extreme_rows.certain_targets(dtype, vocab, places, everything=backend != "cuda" or vocab < 20000)


def test_rows_over_several_threads_and_blocks(backend, extreme_rows):
    """Few long rows, which the threads of a CPU and the blocks of a cluster share."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(64)
        extreme_rows.certain_targets(torch.float32, 40007, (39999,), everything=False)
    finally:
        torch.set_num_threads(threads)


@each_dtype
@pytest.mark.parametrize("vocab", [2, 45, 1000, 3001])
def test_never_above_zero(backend, extreme_rows, dtype, vocab):
    extreme_rows.never_above_zero(dtype, vocab)


@each_dtype
def test_a_vocabulary_of_one(backend, extreme_rows, dtype):
    extreme_rows.one_word(dtype)


@each_dtype
def test_losses(backend, extreme_rows, dtype):
    extreme_rows.certain_losses(dtype)


@each_dtype
@pytest.mark.parametrize("plan", ["keep", "recompute"])
def test_heads(backend, extreme_rows, dtype, plan):
    extreme_rows.certain_heads(dtype, plan)


def test_float64(extreme_rows):
    for vocab, places in ((2, (0, 1)), (1000, (0, 500))):
        extreme_rows.certain_targets(torch.float64, vocab, places)
    extreme_rows.never_above_zero(torch.float64, 45)
    extreme_rows.one_word(torch.float64)
    for plan in ("keep", "recompute"):
        extreme_rows.certain_heads(torch.float64, plan)
