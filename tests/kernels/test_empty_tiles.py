"""Rows and tiles of nothing but -inf, of the policy and of the reference, on every backend."""

import pytest
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [5, 700, 9001])
def test_rows_of_nothing(backend, extreme_rows, dtype, vocab):
    extreme_rows.rows_of_nothing(dtype, vocab)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [5, 700, 9001])
def test_references_that_exclude(backend, extreme_rows, dtype, vocab):
    extreme_rows.references_that_exclude(dtype, vocab)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocab", "real"), [(8192, 5000), (2048, 1024), (2100, 7)])
def test_tiles_of_nothing(backend, extreme_rows, dtype, vocab, real):
    """The first: half of a vocabulary; the second: a whole tile, no more; the third: one tile has all there is."""
    extreme_rows.empty_tiles(dtype, vocab, real)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_that_the_reference_excludes(backend, extreme_rows, dtype):
    extreme_rows.tiles_that_the_reference_excludes(dtype)


def test_float64(extreme_rows):
    for vocab in (5, 700):
        extreme_rows.rows_of_nothing(torch.float64, vocab)
        extreme_rows.references_that_exclude(torch.float64, vocab)
    extreme_rows.empty_tiles(torch.float64, 2100, 7)
    extreme_rows.tiles_that_the_reference_excludes(torch.float64)
