"""The papers' formulas in plain float64 PyTorch, and CASES: the oracle of the tests and the benchmarks.

One file per room of `fastalign.losses`. Nothing here is fast and nothing here shares code with what it checks.
"""

from . import classes, distillation, listwise, policy, preference, reward, sft, triple
from .case import Case, Sizes, cast

CASES: list[Case] = [
    *sft.CASES,
    *classes.CASES,
    *distillation.CASES,
    *preference.CASES,
    *triple.CASES,
    *listwise.CASES,
    *reward.CASES,
    *policy.CASES,
]
"""Every objective of the package, one row each: (name, fused, reference, inputs)."""

__all__ = ["CASES", "Case", "Sizes", "cast"]
