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
from dataclasses import dataclass
from typing import Any

from .operations import BATCH, CODES, FLAT, SEQUENCE, TOKEN, TRUTHS
from .symbols import MASK, POSITION, STATISTICS, Instruction, NotTraced, Symbol, Tape, as_symbol, single

__all__ = [
    "MASK",
    "POSITION",
    "STATISTICS",
    "Given",
    "Instruction",
    "NotTraced",
    "Program",
    "Symbol",
    "Tape",
    "schedule",
    "single",
    "trace",
]


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
        """As `_C.loss_program` takes it."""
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
) -> tuple[Program, list[int]]:
    """The program of a formula, and of each of its results whether it is none (0), a number (1) or a count (2).

    Args:
        formula: from symbols, by the names of `inputs` and of `STATISTICS`, to (loss, *results); a result may be None.
            The loss is one number, or one for each sequence that depends on nothing else than that sequence.
        inputs: name → level of what is given beside the logits; `mask` and the statistics are there anyway.
        statistics: those that the formula may look at; the others are None.
        lists: groups are ranked lists and not pairs.

    Raises:
        NotTraced: the formula used something that a program cannot hold.
    """
    tape = Tape(lists)
    results = formula(Given(tape, inputs, statistics))
    values = [x for x in results if x is not None]
    if not isinstance(values[0], Symbol) or values[0].level not in (BATCH, SEQUENCE):
        raise NotTraced("the loss must be one number for the batch, reduced from what the formula is given")
    symbols = [as_symbol(tape, x, BATCH) if not isinstance(x, Symbol) else x for x in values]
    program = schedule(tape, [s._at for s in symbols])
    if values[0].level == SEQUENCE and any(
        moves and step.level not in (TOKEN, SEQUENCE)
        for step, moves in zip(program.steps, program.differentiable, strict=True)
    ):
        raise NotTraced("a loss for each sequence that depends on others")
    counts = iter([_is_count(program, at) for at in program.outputs])
    return program, [0 if x is None else 1 + next(counts) for x in results]


def _is_count(program: Program, at: int) -> bool:
    """Whether a result is a sum of what is true or not, an integer in torch."""
    step = program.steps[at]
    while step.op == "sum":
        step = program.steps[step.operands[0]]
        if step.op in TRUTHS or (step.op == "input" and program.inputs[int(step.value)] == MASK):
            return True
    return False


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
