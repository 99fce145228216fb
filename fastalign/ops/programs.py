"""A loss formula, written once in torch, traced into a short program that any backend can run with its derivatives.

The formula is called once with symbols in place of tensors. A symbol knows no numbers and no shape, only the level that
a value belongs to, which stands for its shape:

==============  ====================  ==================================================================
level           shape                 reduced along its last dimension gives
==============  ====================  ==================================================================
token           [..., T]              sequence
sequence        [S], in lists [B, K]  batch, in lists group
comparison      [B, K, K] at b, k, i  sequence: k over all i with dim -1, i over all k with dim 1
group           [B]                   batch
batch           []
==============  ====================  ==================================================================

A group is a pair (`x.chunk(2)` of the sequences, the first half against the second) or a ranked list. Reductions see
real tokens alone. What a formula may use is the table in `operations`; anything else raises `NotTraced`, whose message
says what and why, and such a loss runs as torch operations instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .operations import (
    BATCH,
    CODES,
    COMPARED,
    COMPARISON,
    ELEMENTWISE,
    FLAT,
    GROUP,
    LEVEL_NAMES,
    OTHER,
    OWNER,
    REDUCTIONS,
    SEQUENCE,
    TOKEN,
)

STATISTICS = ("logps", "lse", "entropy", "kl", "mean")
"""Inputs that the logits give, in the order of the kernels' results; a loss is differentiated in these alone."""

MASK, POSITION = "mask", "position"
"""The inputs that are 1 at real tokens, and the place of a sequence in its list."""


class NotTraced(TypeError):
    """A formula used what no program can hold; the message says what."""


@dataclass(frozen=True)
class Instruction:
    """One step. Operands are numbers of earlier steps; `how` is the way of a spread, or the side of a pick."""

    op: str
    level: int
    operands: tuple[int, ...] = ()
    value: float = 0.0
    how: int = 0


@dataclass
class Tape:
    """The steps so far. Equal steps are made once."""

    lists: bool = False
    """Whether groups are ranked lists and not pairs."""
    steps: list[Instruction] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    known: dict[Instruction, int] = field(default_factory=dict)

    def add(self, step: Instruction) -> Symbol:
        at = self.known.get(step)
        if at is None:
            at = self.known[step] = len(self.steps)
            self.steps.append(step)
        return Symbol(self, at)

    def input(self, name: str, level: int) -> Symbol:
        if name not in self.inputs:
            self.inputs.append(name)
        return self.add(Instruction("input", level, value=float(self.inputs.index(name))))

    def const(self, value: float, level: int) -> Symbol:
        return self.add(Instruction("const", level, value=value))


def _joined(a: int, b: int) -> int:
    """The level of an operation of values of two levels."""
    if a == b or b == BATCH:
        return a
    if a == BATCH:
        return b
    if COMPARISON in (a, b) and GROUP not in (a, b):
        raise NotTraced(
            f"a value of a {LEVEL_NAMES[a]} and one of a {LEVEL_NAMES[b]} do not meet: unsqueeze(1) or (2) says which "
            "of the two sequences of a comparison is meant"
        )
    return min(a, b)


class Symbol:
    """What a formula is given in place of a tensor."""

    dtype = torch.float64
    device = torch.device("cpu")
    requires_grad = True

    def __init__(self, tape: Tape, at: int) -> None:
        self._tape, self._at = tape, at

    @property
    def level(self) -> int:
        return self._tape.steps[self._at].level

    def __bool__(self) -> bool:
        raise NotTraced("a formula cannot branch in Python on a value that it is given: use torch.where")

    def __getattr__(self, name: str) -> Any:
        raise NotTraced(f"the method or attribute {name!r} of a tensor is not among what a formula may use")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", str(function))
        handler = _FUNCTIONS.get(name)
        if handler is None:
            raise NotTraced(f"torch's {name!r} is not among what a formula may use")
        return handler(*args, **(kwargs or {}))


def _symbol(tape: Tape, value: Any, level: int) -> Symbol:
    """A value as a symbol of the level."""
    if isinstance(value, Symbol):
        return value if value.level == level else _spread(value, level, OWNER)
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise NotTraced(f"a tensor of shape {list(value.shape)} inside a formula: give it as an input")
        value = value.item()
    return tape.const(float(value), level)


def _spread(x: Symbol, level: int, how: int) -> Symbol:
    return x._tape.add(Instruction("spread", level, (x._at,), how=how))


def _apply(op: str, *operands: Any) -> Symbol:
    symbols = [x for x in operands if isinstance(x, Symbol)]
    tape, level = symbols[0]._tape, symbols[0].level
    for x in symbols[1:]:
        level = _joined(level, x.level)
    return tape.add(Instruction(op, level, tuple(_symbol(tape, x, level)._at for x in operands)))


def _scaled(op: str) -> Callable[..., Symbol]:
    """torch.add and torch.sub, which take a factor for their second operand."""

    def run(a: Any, b: Any, *, alpha: float = 1) -> Symbol:
        return _apply(op, a, b if alpha == 1 else _apply("mul", b, alpha))

    return run


def _clamp(x: Any, min: Any = None, max: Any = None) -> Symbol:
    if min is not None:
        x = _apply("clamp_min", x, min)
    return x if max is None else _apply("clamp_max", x, max)


def _same(x: Symbol, *_: Any, **__: Any) -> Symbol:
    """What changes no number: a dtype (all is computed in float64), a shape that broadcasting gives anyway."""
    return x


def single(x: Any) -> Any:
    """A tensor or symbol rounded to float32."""
    return _apply("float32", x) if isinstance(x, Symbol) else x.float()


def _below(x: Symbol, dim: Any) -> int:
    """The level that a reduction leads to."""
    lists = x._tape.lists
    if dim is None or x.level == BATCH:
        return BATCH
    if x.level == TOKEN and dim == -1:
        return SEQUENCE
    if x.level == SEQUENCE and (dim == -1 or (lists and dim == 1)):
        return GROUP if lists else BATCH
    if x.level == COMPARISON and dim in (-1, 2, 1):
        return SEQUENCE
    if x.level == GROUP and dim in (-1, 0):
        return BATCH
    raise NotTraced(f"a reduction of a value of a {LEVEL_NAMES[x.level]} along dimension {dim}")


def _reduce(op: str) -> Callable[..., Symbol]:
    def run(x: Symbol, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Symbol:
        if isinstance(x, _Flat):  # all comparisons of a list
            return x.symbol._tape.add(Instruction(op, GROUP, (x.symbol._at,)))
        if isinstance(dim, (tuple, list)):
            (dim,) = dim if len(dim) == 1 else (None,)
        level = _below(x, dim)
        if x.level == TOKEN and op != "sum":
            raise NotTraced(f"{op} over tokens: sums of them are known, and means")
        how = OTHER if x.level == COMPARISON and dim == 1 else OWNER
        return x._tape.add(Instruction(op, level, (x._at,), how=how))

    return run


_sum = _reduce("sum")


def _mean(x: Symbol, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Symbol:
    ones = x._tape.const(1.0, x.level)
    return _apply("div", _sum(x, dim), _apply("clamp_min", _sum(ones, dim), 1.0))


def _any(x: Any, dim: Any = None, keepdim: bool = False) -> Symbol:
    return _apply("gt", _sum(x, dim), 0.0)


@dataclass(frozen=True)
class _Flat:
    """Comparisons with both of their dimensions as one."""

    symbol: Symbol

    def any(self, dim: int) -> Symbol:
        return _any(self, dim)

    def sum(self, dim: int) -> Symbol:
        return _sum(self, dim)


def _flatten(x: Symbol, start: int = 0, end: int = -1) -> Any:
    if x.level == COMPARISON and start == 1:
        return _Flat(x)
    return x


def _unsqueeze(x: Symbol, dim: int) -> Symbol:
    if x._tape.lists and x.level == SEQUENCE and dim in (1, 2, -1):
        return _spread(x, COMPARISON, OTHER if dim == 1 else COMPARED)
    return x  # broadcasting over a higher level goes by itself


def _chunk(x: Symbol, parts: int, dim: int = 0) -> tuple[Symbol, ...]:
    if x.level != SEQUENCE or parts != 2 or x._tape.lists:
        raise NotTraced("chunk halves the sequences of pairs, and nothing else")
    return tuple(x._tape.add(Instruction("pick", GROUP, (x._at,), how=side)) for side in (0, 1))


def _fill(value: float) -> Callable[..., Symbol]:
    return lambda x, **_: x._tape.const(value, x.level)


_FUNCTIONS: dict[str, Callable[..., Any]] = {name: (lambda *a, op=name: _apply(op, *a)) for name in ELEMENTWISE}
_FUNCTIONS |= {name: _reduce(name) for name in REDUCTIONS}
_FUNCTIONS |= {
    "add": _scaled("add"),
    "sub": _scaled("sub"),
    "subtract": _scaled("sub"),
    "rsub": lambda a, b, **_: _apply("sub", b, a),
    "multiply": lambda a, b: _apply("mul", a, b),
    "true_divide": lambda a, b: _apply("div", a, b),
    "neg": lambda x: _apply("mul", x, -1.0),
    "negative": lambda x: _apply("mul", x, -1.0),
    "max": lambda a, b=None: _apply("maximum", a, b) if isinstance(b, (Symbol, Tensor)) else _reduce("amax")(a, b),
    "relu": lambda x, inplace=False: _apply("relu", x),
    "logsigmoid": lambda x: _apply("log_sigmoid", x),
    "softplus": lambda x: _apply("mul", _apply("log_sigmoid", _apply("mul", x, -1.0)), -1.0),
    "logical_and": lambda a, b: _apply("and", a, b),
    "logical_or": lambda a, b: _apply("or", a, b),
    "logical_not": lambda a: _apply("not", a),
    "bitwise_not": lambda a: _apply("not", a),
    "clamp": _clamp,
    "clip": _clamp,
    "pow": lambda x, n: _power(x, n),
    "masked_fill": lambda x, mask, value: _apply("where", mask, value, x),
    "zeros_like": _fill(0.0),
    "ones_like": _fill(1.0),
    "full_like": lambda x, value, **_: x._tape.const(float(value), x.level),
    "mean": _mean,
    "any": _any,
    "flatten": _flatten,
    "unsqueeze": _unsqueeze,
    "chunk": _chunk,
    **dict.fromkeys(("to", "float", "double", "expand_as", "expand", "squeeze", "contiguous", "type_as"), _same),
}


def _power(x: Symbol, n: Any) -> Symbol:
    if n not in (1, 2, 3, 4):
        raise NotTraced(f"a power of {n}: 1 to 4 are known, or exp and log")
    found = x
    for _ in range(n - 1):
        found = _apply("mul", found, x)
    return found if n != 2 else _apply("square", x)


def _method(name: str) -> Callable[..., Any]:
    function = _FUNCTIONS[name]
    return lambda self, *args, **kwargs: function(self, *args, **kwargs)


for _name in _FUNCTIONS:
    setattr(Symbol, _name, _method(_name))
for _operator, _op in {"add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "and": "and", "or": "or"}.items():
    setattr(Symbol, f"__{_operator}__", lambda self, other, op=_op: _apply(op, self, other))
    setattr(Symbol, f"__r{_operator}__", lambda self, other, op=_op: _apply(op, other, self))
for _op in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Symbol, f"__{_op}__", lambda self, other, op=_op: _apply(op, self, other))
for _operator, _op in {"neg": "neg", "invert": "not", "pow": "pow", "abs": "abs"}.items():
    setattr(Symbol, f"__{_operator}__", _method(_op))
Symbol.__hash__ = object.__hash__  # type: ignore[method-assign]


# --------------------------------------------------------------------------------------------------------- scheduling
@dataclass(frozen=True)
class Program:
    """A traced formula, its steps in the order in which interpreters run them.

    Steps of tokens run in passes over the tokens, all other steps between these: pass s can use what passes before it
    have summed. `differentiable` steps depend on the logits.
    """

    steps: tuple[Instruction, ...]
    inputs: tuple[str, ...]
    loss: int
    outputs: tuple[int, ...]
    stages: tuple[int, ...]
    """Of each step: the pass that it belongs to, or before which it runs."""
    differentiable: tuple[bool, ...]
    lists: bool

    @property
    def statistics(self) -> tuple[str, ...]:
        """Those of the logits that the formula looks at."""
        return tuple(name for name in STATISTICS if name in self.inputs)

    def encoded(self) -> tuple[Any, ...]:
        """As `_C.LossProgram` takes it."""
        codes = [
            (CODES[s.op], s.level, stage, s.how, tuple(s.operands), s.value, active)
            for s, stage, active in zip(self.steps, self.stages, self.differentiable, strict=True)
        ]
        own = {MASK: -1, POSITION: -2, **{name: k for k, name in enumerate(STATISTICS)}}
        kinds = [own.get(name, -3) for name in self.inputs]
        return codes, kinds, self.loss, list(self.outputs), self.lists


def trace(
    formula: Callable[..., Sequence[Any]],
    inputs: dict[str, int],
    *,
    statistics: Sequence[str] = STATISTICS,
    lists: bool = False,
) -> tuple[Program, tuple[bool, ...]]:
    """The program of a formula, and which of its results there are.

    Args:
        formula: from symbols, by the names of `inputs` and of `STATISTICS`, to (loss, *results); a result may be None.
        inputs: name → level of what is given beside the logits; `mask` and the statistics are there anyway.
        statistics: those that the formula may look at; the others are None.
        lists: groups are ranked lists and not pairs.

    Raises:
        NotTraced: the formula used something that a program cannot hold.
    """
    tape = Tape(lists)
    found = formula(Given(tape, inputs, statistics))
    there = tuple(x is not None for x in found)
    values = [x for x in found if x is not None]
    if not isinstance(values[0], Symbol) or values[0].level != BATCH:
        raise NotTraced("the loss must be one number for the batch, reduced from what the formula is given")
    symbols = [_symbol(tape, x, BATCH) if not isinstance(x, Symbol) else x for x in values]
    return schedule(tape, [s._at for s in symbols]), there


class Given:
    """What a formula looks at: a symbol for every input and statistic, made when it is asked for."""

    def __init__(self, tape: Tape, inputs: dict[str, int], statistics: Sequence[str]) -> None:
        self._tape, self._inputs, self._statistics = tape, inputs, statistics

    def __getattr__(self, name: str) -> Any:
        if name in self._statistics or name == MASK:
            return self._tape.input(name, TOKEN)
        if name == POSITION:
            return self._tape.input(name, SEQUENCE)
        if name in self._inputs:
            return self._tape.input(name, self._inputs[name])
        return None


def schedule(tape: Tape, outputs: list[int]) -> Program:
    """The steps that the outputs need, numbered anew, with their passes."""
    needed = set(outputs)
    for at in range(len(tape.steps) - 1, -1, -1):
        if at in needed:
            needed.update(tape.steps[at].operands)
    number = {old: new for new, old in enumerate(sorted(needed))}
    steps: list[Instruction] = []
    stages: list[int] = []
    active: list[bool] = []
    for old in sorted(needed):
        step = tape.steps[old]
        operands = tuple(number[o] for o in step.operands)
        stage = max((stages[o] + (step.level != TOKEN and steps[o].level == TOKEN) for o in operands), default=0)
        moves = step.op == "input" and tape.inputs[int(step.value)] in STATISTICS
        steps.append(Instruction(step.op, step.level, operands, step.value, step.how))
        stages.append(stage)
        active.append(moves or (step.op not in FLAT and any(active[o] for o in operands)))
    new = [number[o] for o in outputs]
    return Program(tuple(steps), tuple(tape.inputs), new[0], tuple(new), tuple(stages), tuple(active), tape.lists)
