"""The loss of one token as a program (see `ops/token_programs.py`), run in Triton for a row's values and derivatives.

A program's steps are known to the compiler, which unrolls them; numbers lie in slots as in `loss_program.h`: the five
statistics, what the token is given, constants, and the results of the steps. Derivatives go forward, beside the values.
"""

from typing import Any

import triton
import triton.language as tl

from .token_layout_triton import nothing

_FLAT = ("lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not", "detach")  # whose derivative is 0


def depends(program: Any) -> tuple[tuple[bool, ...], ...]:
    """Of each statistic: of each slot, whether it has a derivative in it."""
    first = 5 + len(program.inputs) + len(program.constants)
    found = []
    for statistic in range(5):
        moved = [slot == statistic for slot in range(first)]
        for op, a, b, c in program.steps:
            moved.append(op not in _FLAT and (moved[b] or moved[c] or (op != "where" and moved[a])))
        found.append(tuple(moved))
    return tuple(found)


# ------------------------------------------------------------------------------------------------------- special values
@triton.jit
def _expm1(y):
    """e^y - 1 without cancellation: a polynomial near 0, of relative error 2^-24."""
    near = 1.0 + y / 2 * (1.0 + y / 3 * (1.0 + y / 4 * (1.0 + y / 5 * (1.0 + y / 6 * (1.0 + y / 7 * (1.0 + y / 8))))))
    return tl.where(tl.abs(y) < 0.4, y * near, tl.exp(y) - 1.0)


@triton.jit
def _log1p(x):
    """log(1 + x) without cancellation: what 1 + x was rounded by is made good (Goldberg 1991, theorem 4)."""
    up = 1.0 + x
    plain = (up == 1.0) | (tl.abs(up) == float("inf"))
    return tl.where(plain, tl.where(up == 1.0, x, up), tl.log(up) * (x / tl.where(plain, 1.0, up - 1.0)))


@triton.jit
def _sigmoid(x):
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0, small, 1.0) / (1.0 + small)


@triton.jit
def _tanh(x):
    small = _expm1(-2.0 * tl.abs(x))
    return tl.where(x < 0, small, -small) / (2.0 + small)


@triton.jit
def _flag(x):
    return tl.where(x, 1.0, 0.0)


# ----------------------------------------------------------------------------------------------------------- operations
@triton.jit
def _value(OP: tl.constexpr, a, b, c):
    """An operation of the table in `ops/operations.py`."""
    y = a
    if OP == "add":
        y = a + b
    elif OP == "sub":
        y = a - b
    elif OP == "mul":
        y = a * b
    elif OP == "div":
        y = a / b
    elif OP == "maximum":
        y = tl.where((a != a) | (a > b), a, b)
    elif OP == "minimum":
        y = tl.where((a != a) | (a < b), a, b)
    elif OP == "clamp_min":
        y = tl.where(a < b, b, a)
    elif OP == "clamp_max":
        y = tl.where(a > b, b, a)
    elif OP == "exp":
        y = tl.exp(a)
    elif OP == "expm1":
        y = _expm1(a)
    elif OP == "log":
        y = tl.log(a)
    elif OP == "log1p":
        y = _log1p(a)
    elif OP == "sigmoid":
        y = _sigmoid(a)
    elif OP == "log_sigmoid":
        y = tl.where(a < 0, a, 0.0) - _log1p(tl.exp(-tl.abs(a)))
    elif OP == "tanh":
        y = _tanh(a)
    elif OP == "relu":
        y = tl.where(a < 0, 0.0, a)
    elif OP == "square":
        y = a * a
    elif OP == "sqrt":
        y = tl.sqrt(a)
    elif OP == "abs":
        y = tl.abs(a)
    elif OP == "lt":
        y = _flag(a < b)
    elif OP == "le":
        y = _flag(a <= b)
    elif OP == "gt":
        y = _flag(a > b)
    elif OP == "ge":
        y = _flag(a >= b)
    elif OP == "eq":
        y = _flag(a == b)
    elif OP == "ne":
        y = _flag(a != b)
    elif OP == "and":
        y = _flag((a != 0) & (b != 0))
    elif OP == "or":
        y = _flag((a != 0) | (b != 0))
    elif OP == "not":
        y = _flag(a == 0)
    elif OP == "where":
        y = tl.where(a != 0, b, c)
    else:
        tl.static_assert(OP == "detach" or OP == "float32", "an unknown operation")  # all is float32
    return y


@triton.jit
def _slope(OP: tl.constexpr, y, a, b, c, da, db, dc):
    """The derivative of an operation's result y from those of its operands."""
    d = da
    if OP == "add":
        d = da + db
    elif OP == "sub":
        d = da - db
    elif OP == "mul":
        d = _times(da, b) + _times(db, a)
    elif OP == "div":
        d = _over(da, b) - _over(_times(db, y), b)
    elif OP == "maximum":  # equals share
        d = tl.where(a > b, da, tl.where(a < b, db, (da + db) / 2))
    elif OP == "minimum":
        d = tl.where(a < b, da, tl.where(a > b, db, (da + db) / 2))
    elif OP == "clamp_min":
        d = tl.where(a < b, db, da)
    elif OP == "clamp_max":
        d = tl.where(a > b, db, da)
    elif OP == "exp":
        d = _times(da, y)
    elif OP == "expm1":
        d = _times(da, y + 1.0)
    elif OP == "log":
        d = _over(da, a)
    elif OP == "log1p":
        d = _over(da, 1.0 + a)
    elif OP == "sigmoid":
        d = _times(da, y * _sigmoid(-a))
    elif OP == "log_sigmoid":
        d = _times(da, _sigmoid(-a))
    elif OP == "tanh":
        d = _times(da, 1.0 - y * y)
    elif OP == "relu":
        d = tl.where(a > 0, da, 0.0)
    elif OP == "square":
        d = _times(da, 2.0 * a)
    elif OP == "sqrt":
        d = _over(da, 2.0 * y)
    elif OP == "abs":
        d = tl.where(a > 0, da, tl.where(a < 0, -da, 0.0))
    elif OP == "where":
        d = tl.where(a != 0, db, dc)
    else:
        tl.static_assert(OP == "float32", "an unknown operation")
    return d


@triton.jit
def _times(d, by):
    """A derivative of 0 stays one, whatever it is multiplied by: 0 times infinity is NaN."""
    return tl.where(d == 0.0, 0.0, d * by)


@triton.jit
def _over(d, by):
    return tl.where(d == 0.0, 0.0, d / by)


# ------------------------------------------------------------------------------------------------------------- programs
@triton.jit
def _with(numbers, x):
    return numbers + (x,)  # noqa: RUF005 (Triton cannot unpack)


@triton.jit
def values(
    statistics,
    inputs,
    constants,
    INPUTS: tl.constexpr,
    CONSTANTS: tl.constexpr,
    STEPS: tl.constexpr,
    COUNT: tl.constexpr,
):
    """All numbers of a program, by slot."""
    y = statistics
    for i in tl.static_range(INPUTS):
        y = _with(y, inputs[i])
    for i in tl.static_range(CONSTANTS):
        y = _with(y, nothing() + constants[i])
    for i in tl.static_range(COUNT):
        y = _with(y, _value(STEPS[i][0], y[STEPS[i][1]], y[STEPS[i][2]], y[STEPS[i][3]]))
    return y


@triton.jit
def _slope_of_step(y, d, at: tl.constexpr, OP: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    return _slope(OP, y[at], y[A], y[B], y[C], d[A], d[B], d[C])


@triton.jit
def slope(
    y,
    STATISTIC: tl.constexpr,
    FIRST: tl.constexpr,
    STEPS: tl.constexpr,
    COUNT: tl.constexpr,
    LOSS: tl.constexpr,
    DEPENDS: tl.constexpr,
):
    """The derivative of the loss in a statistic, from the program's numbers."""
    d = ()
    for i in tl.static_range(FIRST):
        d = _with(d, nothing() + (1.0 if i == STATISTIC else 0.0))
    for i in tl.static_range(COUNT):
        if DEPENDS[STATISTIC][FIRST + i]:
            d = _with(d, _slope_of_step(y, d, FIRST + i, STEPS[i][0], STEPS[i][1], STEPS[i][2], STEPS[i][3]))
        else:
            d = _with(d, nothing())
    return d[LOSS]
