"""The mechanism that every loss takes: statistics of the logits → the formula → loss, metrics and its gradient for the
statistics → one node of the graph → the kernels' backward.

A formula is written once, in torch, on what it is given (see `programs`). On the CPU it runs as a program, in the call
that makes the statistics where the logits are a plain tensor; elsewhere, and where it does not trace, as the torch
operations that it is.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _backends
from . import statistics
from .call import TokenCall
from .loss_node import attach_gradients, node, to_kept_logits, to_logits, to_statistics
from .operations import BATCH, GROUP, LEVEL_NAMES, SEQUENCE, TOKEN
from .programs import STATISTICS, NotTraced, Program, trace
from .results import TokenStats

__all__ = ["BATCH", "GROUP", "SEQUENCE", "TOKEN", "FusedLoss", "Grouping", "Input", "Values", "attach_gradients"]


class Input(NamedTuple):
    """What a loss is given beside the logits."""

    name: str
    value: Any
    """A tensor of the level's shape, a number, or None where it is not given."""
    level: int


class Grouping(NamedTuple):
    """How tokens make sequences, and sequences groups."""

    sequences: int
    list_size: int = 1


# ------------------------------------------------------------------------------------------------- what a formula sees
class Values:
    """What a formula is given where it runs as torch operations: statistics and inputs, 0 at tokens that are hidden.

    Args:
        mask: [..., T] boolean, True = real.
        stats: the statistics that there are, by name.
        inputs: as in `FusedLoss`.
    """

    def __init__(self, mask: Tensor, stats: dict[str, Tensor | None], inputs: Sequence[Input]) -> None:
        self.mask = mask
        self._found = {name: None if t is None else self._real(t) for name, t in stats.items()}
        for name, value, level in inputs:
            if isinstance(value, Tensor):
                value = value.detach()
                value = self._real(value) if level == TOKEN else value.unsqueeze(-1) if level == SEQUENCE else value
            self._found[name] = value

    def _real(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return torch.where(self.mask, wide, torch.zeros((), dtype=wide.dtype, device=wide.device))

    def __getattr__(self, name: str) -> Any:
        return self._found.get(name)


# ----------------------------------------------------------------------------------------------------------- a program
class _Compiled(NamedTuple):
    program: Program
    found: list[int]
    """Of each of the formula's results, whether it is none (0), a number (1) or a count (2)."""
    handle: Any
    """The program as the CPU's module takes it."""
    names: tuple[str, ...]
    """Inputs that the program takes, in order."""
    which: int
    """Bits of the statistics that the loss moves with."""
    handles: dict[str, Any]
    """As other backends take it, by their names; None where they do not."""

    def handle_of(self, backend: Any) -> Any:
        if backend.__name__ not in self.handles:
            self.handles[backend.__name__] = backend.loss_program(*self.program.encoded(), self.found)
        return self.handles[backend.__name__]


def _compile(formula: Callable[..., Any], levels: dict[str, int], statistics: Sequence[str], lists: bool) -> _Compiled:
    program, found = trace(formula, levels, statistics=statistics, lists=lists)
    if any(program.steps[i].level == TOKEN for i in program.outputs):
        raise NotTraced("a result for each token: reduce it")
    which = 0
    for step, moved in zip(program.steps, _wanted(program), strict=True):
        name = program.inputs[int(step.value)] if step.op == "input" else ""
        if moved and name in STATISTICS:
            which |= 1 << STATISTICS.index(name)
    handle = _backends.loss_program(*program.encoded(), found)
    return _Compiled(program, found, handle, tuple(n for n in program.inputs if n in levels), which, {})


def _wanted(program: Program) -> list[bool]:
    """Of each step, whether the loss's gradient goes through it."""
    wanted = [False] * len(program.steps)
    wanted[program.loss] = program.differentiable[program.loss]
    for i in range(len(program.steps) - 1, -1, -1):
        for o in program.steps[i].operands if wanted[i] else ():
            wanted[o] = wanted[o] or program.differentiable[o]
    return wanted


_Levels = tuple[tuple[str, int], ...]
_MOST_SHARED = 256
_SHARED: dict[Hashable, _Compiled | str] = {}
"""Programs of losses that say what they depend on."""


class FusedLoss:
    """A formula, and the programs that it was traced into, one for each set of inputs that it was called with.

    Args:
        formula: from `Given` (symbols) or `Values` (tensors) to (loss, *results), a result may be None.
        statistics: those of `STATISTICS` that it may look at.
        lists: groups are ranked lists and not pairs.
        settings: gives the name of the loss and all that the formula depends on beside its inputs, hashable; asked at
            every call, as programs are traced for these. Losses of equal settings share them. None: nothing changes.
    """

    def __init__(
        self,
        formula: Callable[[Any], Sequence[Any]],
        statistics: Sequence[str] = ("logps",),
        *,
        lists: bool = False,
        settings: Callable[[], Hashable] | None = None,
    ) -> None:
        self.formula, self.statistics, self.lists, self.settings = formula, tuple(statistics), lists, settings
        self._programs: dict[Hashable, tuple[_Levels, _Compiled | str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the programs, which are no more to be copied than compiled code is."""
        return {**self.__dict__, "_programs": {}}

    def compiled(self, levels: _Levels) -> _Compiled | str:
        """The program for inputs of these levels, or why there is none."""
        key: Hashable = levels if self.settings is None else (self.settings(), levels)
        found = self._programs.get(key)
        if found is None:
            found = self._programs[key] = (levels, self._traced(key, levels))
        return found[1]

    def _traced(self, key: Hashable, levels: _Levels) -> _Compiled | str:
        shared = (key, self.statistics, self.lists)
        found = None if self.settings is None else _SHARED.get(shared)
        if found is None:
            try:
                found = _compile(self.formula, dict(levels), self.statistics, self.lists)
            except NotTraced as reason:
                found = str(reason)
            if self.settings is not None:
                if len(_SHARED) >= _MOST_SHARED:  # a coefficient that is another one at each step, say
                    _SHARED.clear()
                _SHARED[shared] = found
        return found

    def explain(self) -> str:
        """How the calls so far were run: as programs of how many steps, or why as torch operations."""
        lines = []
        for levels, found in self._programs.values():
            given = ", ".join(f"{name} by {LEVEL_NAMES[level]}" for name, level in levels) or "nothing but logits"
            how = (
                f"torch operations: {found}"
                if isinstance(found, str)
                else f"program of {len(found.program.steps)} steps"
            )
            lines.append(f"given {given}: {how}")
        return "\n".join(lines) or "not called yet"

    # ------------------------------------------------------------------------------------------------------- running
    def _given(self, inputs: Sequence[Input]) -> tuple[_Compiled | str, tuple[Any, ...]]:
        """The program for inputs, and what it takes of them, in its order."""
        there = [x for x in inputs if x.value is not None]
        found = self.compiled(tuple([(name, level) for name, _, level in there]))
        if isinstance(found, str):
            return found, ()
        by_name = {name: value for name, value, _ in there}
        return found, tuple([by_name[name] for name in found.names])

    def of_logits(
        self,
        call: TokenCall,
        inputs: Sequence[Input],
        grouping: Grouping,
        inplace_backward: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> list[Any] | None:
        """(loss, *results) of plain logits: on the CPU in one call each way, on a backend that runs programs in a
        launch between the forward's and the backward's.

        None where it is not known to be all right: for other tensors, for what does not trace, and where somebody
        watches. The general path then does it or says what is wrong.
        """
        logits, labels, reference, ignore_index, temperature, softcap = call
        if not statistics.alone(logits, labels) or labels.dim() < 1:
            return None
        cpu = _backends.direct(logits)
        if cpu is None:
            return self._of_device(call, inputs, grouping, inplace_backward, dtype)
        found, given = self._given(inputs) if inputs else (self.compiled(()), ())
        if isinstance(found, str):
            return None
        wanted = logits.requires_grad and torch.is_grad_enabled()
        inplace, options = wanted and inplace_backward, (ignore_index, temperature, softcap)
        made = cpu.loss(logits, labels, options, reference, inplace, found.handle, given, grouping, wanted, dtype)
        if made is None:
            return None
        results, kept = made
        if wanted:
            made = (results[0], to_logits, (found.which, kept, options, inplace), True)
            more = () if reference is None else (reference,)
            results[0] = node(made, logits, labels, *more)
        return results

    def _of_device(
        self, call: TokenCall, inputs: Sequence[Input], grouping: Grouping, inplace_backward: bool, dtype: torch.dtype
    ) -> list[Any] | None:
        """The same by a forward, a launch of the program, and a backward."""
        backend = _backends.runs_programs(call.logits, call.labels.numel())
        found, given = (None, ()) if backend is None else self._given(inputs)
        if found is None or isinstance(found, str) or found.handle_of(backend) is None:
            return None
        used = found.program.statistics
        if ("kl" in used) != (call.reference is not None):
            return None
        wanted = call.logits.requires_grad and torch.is_grad_enabled()
        inplace = wanted and inplace_backward
        *stats, saved = statistics.checked_forward(call, "entropy" in used, "mean" in used, inplace)
        rest = (found.handle_of(backend), given, grouping, wanted, found.found, dtype)
        made = backend.loss_terms(tuple(stats), call.labels, call.ignore_index, *rest)
        if made is None:
            return None
        results, derivatives = made
        if wanted:
            known = (results[0], to_kept_logits, (found.which, call.options, inplace), True)
            results[0] = node(known, *call[:3], saved, stats[2], stats[3], derivatives)
        return results

    def of_statistics(
        self, stats: TokenStats, labels: Tensor, inputs: Sequence[Input], grouping: Grouping, ignore_index: int
    ) -> list[Any] | None:
        """The same of statistics that a head or a model gave, [..., T] each, float32 on the CPU; else None."""
        there = {name: getattr(stats, name, None) for name in STATISTICS}
        wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in there.values())
        made = self._run(there, labels, inputs, grouping, ignore_index, wanted)
        if made is None:
            return None
        results, derivatives, moved = made
        if wanted and any(t.requires_grad for t in moved):
            results[0] = node((results[0], to_statistics, derivatives.unbind(), True), *moved)
        return results

    def derivatives(
        self, labels: Tensor, inputs: Sequence[Input], grouping: Grouping, ignore_index: int, **stats: Tensor
    ) -> tuple[Tensor, ...] | None:
        """The loss's derivative in each of these statistics that it moves with, of the labels' shape."""
        there = {name: stats.get(name) for name in STATISTICS}
        made = self._run(there, labels, inputs, grouping, ignore_index, True)
        return None if made is None else tuple([slope.view(labels.shape) for slope in made[1].unbind()])

    def _run(
        self,
        stats: dict[str, Tensor | None],
        labels: Tensor,
        inputs: Sequence[Input],
        grouping: Grouping,
        ignore_index: int,
        wanted: bool,
    ) -> tuple[list[Any], Tensor, list[Tensor]] | None:
        """(results, derivatives [k, tokens] if wanted, the k statistics that the loss moves with)."""
        logps = stats["logps"]
        if type(logps) is not Tensor or logps.dtype != torch.float32 or not statistics.alone(logps, labels):
            return None
        cpu = _backends.direct(logps)
        backend = _backends.runs_programs(logps, labels.numel()) if cpu is None else None
        if cpu is None and backend is None:
            return None
        found, given = self._given(inputs)
        if isinstance(found, str) or any(stats[name] is None for name in found.program.statistics):
            return None
        dense = tuple([None if t is None else t.detach().contiguous() for t in stats.values()])
        if backend is not None:
            handle = found.handle_of(backend)
            rest = (handle, given, grouping, wanted, found.found, torch.float32)
            made = None if handle is None else backend.loss_terms(dense, labels, ignore_index, *rest)
        else:
            made = cpu.loss_terms(dense, labels, ignore_index, found.handle, given, grouping, wanted)
        if made is None:
            return None
        return *made, [stats[name] for k, name in enumerate(STATISTICS) if found.which >> k & 1]  # type: ignore[return-value]
