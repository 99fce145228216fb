"""The loss of one token, traced into a program that the kernels run while they have a token's row of logits in hand.

Such a formula sees one token: the statistics of its logits and what it is given, no sum over other tokens. What it may
use otherwise is what any formula may (see `programs`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._backends import TokenProgram
from .operations import CODES, ELEMENTWISE, FLAT, LEVEL_NAMES, TOKEN
from .programs import MASK, POSITION, STATISTICS, Given, Instruction, NotTraced, Program, Symbol, Tape, schedule

MOST = {"inputs": 8, "constants": 16, "steps": 64}
"""What a program holds at most, by the kernels' own tables (`TokenProgram` in kernels/loss_program.h)."""


class _OneToken(Tape):
    """Steps that see one token."""

    def add(self, step: Instruction) -> Symbol:
        if step.level != TOKEN:
            raise NotTraced(
                f"{step.op!r} is of a whole {LEVEL_NAMES[step.level]}, and a loss of one token sees that token alone"
            )
        return super().add(step)


class _Token(Given):
    """What such a formula looks at: it runs on real tokens alone, and knows nothing of their place."""

    def __getattr__(self, name: str) -> Any:
        if name == MASK:
            return self._tape.const(1.0, TOKEN)
        return None if name == POSITION else super().__getattr__(name)


def trace_token(formula: Callable[[Any], Any], inputs: Sequence[str] = ()) -> TokenProgram:
    """The program of a formula of one token.

    Args:
        formula: from symbols, by the names of `inputs` and of `STATISTICS` (others are None), to the token's loss.
        inputs: names of what every token is given beside its logits.

    Raises:
        NotTraced: the formula used something that such a program cannot hold, or too much; the message says what.
    """
    tape = _OneToken()
    found = formula(_Token(tape, dict.fromkeys(inputs, TOKEN), STATISTICS))
    if not isinstance(found, Symbol):
        raise NotTraced("the loss of a token must be computed from what the formula is given")
    return _in_slots(schedule(tape, [found._at]))


def _in_slots(program: Program) -> TokenProgram:
    """The program with its numbers where the kernels have them: statistics, inputs, constants, results of steps."""
    given: list[str] = []
    constants: list[float] = []
    operations: list[int] = []
    for i, step in enumerate(program.steps):
        name = program.inputs[int(step.value)] if step.op == "input" else ""
        if step.op == "const":
            constants.append(step.value)
        elif step.op in ELEMENTWISE:
            operations.append(i)
        elif name not in STATISTICS:
            given.append(name)
    for what, items in (("inputs", given), ("constants", constants), ("steps", operations)):
        if len(items) > MOST[what]:
            raise NotTraced(f"a loss of one token has at most {MOST[what]} {what}; got {len(items)}")
    large = [x for x in constants if math.isfinite(x) and abs(x) > torch.finfo(torch.float32).max]
    if large:
        raise NotTraced(f"a constant of {large[0]}: a loss of one token is computed in float32")
    first = len(STATISTICS) + len(given)
    slots: list[int] = []
    for i, step in enumerate(program.steps):
        name = program.inputs[int(step.value)] if step.op == "input" else ""
        if step.op == "const":
            slots.append(first + constants.index(step.value))
        elif step.op in ELEMENTWISE:
            slots.append(first + len(constants) + operations.index(i))
        else:
            slots.append(STATISTICS.index(name) if name in STATISTICS else len(STATISTICS) + given.index(name))
    steps = [(program.steps[i].op, *_three([slots[o] for o in program.steps[i].operands])) for i in operations]
    return TokenProgram(
        tuple(given),
        tuple(constants),
        tuple(steps),
        slots[program.loss],
        tuple(k in slots for k in range(len(STATISTICS))),
        _moved(steps, slots[program.loss], first + len(constants)),
        _encoded(len(given), constants, steps, slots[program.loss]),
    )


def _three(operands: list[int]) -> tuple[int, int, int]:
    """Of operations with less than three operands the last one stands for those that there are not."""
    a, b, c = (operands * 3)[:3] if len(operands) == 1 else (operands + operands[-1:])[:3]
    return a, b, c


def _moved(steps: Sequence[tuple[str, int, int, int]], loss: int, first: int) -> tuple[bool, ...]:
    """Of each statistic, whether the loss has a derivative in it."""
    reached = {loss}
    for at in range(first + len(steps) - 1, first - 1, -1):
        op, *operands = steps[at - first]
        if at in reached and op not in FLAT:
            reached.update(operands[1:] if op == "where" else operands)
    return tuple(k in reached for k in range(len(STATISTICS)))


def _encoded(given: int, constants: Sequence[float], steps: Sequence[tuple[str, int, int, int]], loss: int) -> bytes:
    """As `token_program` of csrc/arguments.h reads it."""
    head = struct.pack(f"=4i{len(constants)}f", given, len(constants), len(steps), loss, *constants)
    return head + b"".join(struct.pack("=4B", CODES[op], *operands) for op, *operands in steps)
