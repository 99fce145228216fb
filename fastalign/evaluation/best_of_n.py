"""Best-of-n sampling: the yardstick without training (Stiennon et al. 2020; Nakano et al. 2021; Gao et al. 2023)."""

from __future__ import annotations

import math

import numpy as np


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1)/n: an upper bound on the KL between best-of-n and the model sampled from, in nats.

    Exact where no two samples score alike and none repeats; else the KL is smaller (Beirami et al. 2024, theorem 1).
    """
    _check(n, None)
    return math.log(n) - (n - 1) / n


def best_of_n(proxy: np.ndarray, gold: np.ndarray, n: int) -> np.ndarray:
    """Expected gold score of the sample that the proxy likes best among n, for each prompt.

    The unbiased estimator of Nakano et al. 2021 (appendix I): the mean over all subsets of n of a prompt's N samples,
    which the sample of proxy rank i (ascending, from 1) wins in C(i-1, n-1) of C(N, n) cases. Ties in the proxy go to
    the later sample.

    Args:
        proxy, gold: [prompts, N] scores of the same samples; the same array for best-of-n under the gold score itself.
        n: from 1 to N.

    Returns:
        [prompts].

    Raises:
        ValueError: n is not in that range, or the shapes differ.
    """
    proxy, gold = np.asarray(proxy, dtype=np.float64), np.asarray(gold, dtype=np.float64)
    if proxy.shape != gold.shape or proxy.ndim != 2:
        raise ValueError(f"proxy and gold must be [prompts, samples] alike; got {proxy.shape} and {gold.shape}")
    total = proxy.shape[1]
    _check(n, total)
    wins = np.array([math.comb(i, n - 1) / math.comb(total, n) for i in range(total)])
    order = np.argsort(proxy, axis=1, kind="stable")
    return np.take_along_axis(gold, order, axis=1) @ wins


def _check(n: int, total: int | None) -> None:
    if n < 1 or (total is not None and n > total):
        raise ValueError(f"n must be at least 1{'' if total is None else f' and at most {total}'}; got {n}")
