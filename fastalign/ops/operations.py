"""The operations that a traced loss may use, by the names that torch gives them. One table for every interpreter.

The numbers are those of `kernels/loss_program.h`; a test holds the two together.
"""

from __future__ import annotations

INPUT, CONST, SPREAD, PICK = "input", "const", "spread", "pick"
REDUCTIONS = ("sum", "amax", "logsumexp")
ELEMENTWISE = {
    "add": 2,
    "sub": 2,
    "mul": 2,
    "div": 2,
    "maximum": 2,
    "minimum": 2,
    "clamp_min": 2,
    "clamp_max": 2,
    "exp": 1,
    "expm1": 1,
    "log": 1,
    "log1p": 1,
    "sigmoid": 1,
    "log_sigmoid": 1,
    "tanh": 1,
    "relu": 1,
    "square": 1,
    "sqrt": 1,
    "abs": 1,
    "lt": 2,
    "le": 2,
    "gt": 2,
    "ge": 2,
    "eq": 2,
    "ne": 2,
    "and": 2,
    "or": 2,
    "not": 1,
    "where": 3,
    "detach": 1,
    "float32": 1,
}
"""Name → number of operands. "and", "or", "not" and comparisons give 0 or 1; "float32" rounds to it."""

CODES = {name: code for code, name in enumerate((INPUT, CONST, SPREAD, PICK, *REDUCTIONS, *ELEMENTWISE))}
"""Name → number in a program."""

TRUTHS = {"lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not"}
"""Operations that give what is true or not."""

FLAT = TRUTHS | {"detach"}
"""Operations whose derivative is 0."""

# Levels: what a value belongs to. They stand for shapes; see `programs.Level`.
TOKEN, SEQUENCE, COMPARISON, GROUP, BATCH = range(5)
LEVEL_NAMES = ("token", "sequence", "comparison", "group", "batch")

# Ways to spread a value over another level: every element of the new level takes the one that it belongs to, or, for
# the comparison (k, i) of two sequences of a list, that of the one that is compared (k) or of the other (i).
OWNER, COMPARED, OTHER = range(3)
