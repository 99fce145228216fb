"""Python functions as rewards: found by name, called with what their parameters name, and held to what they return.

A function gets lists, an entry for each response: `prompts` (each in the form that its row has, a text or a list of
messages; in training without what was cut for the policy), `completions` (texts), `completion_ids`, and columns of the
dataset by their names. A parameter without a default needs its column; one with a default gets it where there is
one; `**kwargs` gets all columns. A function that names neither prompts nor completions and takes two things gets these
two in this order. It returns a number for each response, or None where it does not apply.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

RewardFunction = Callable[..., Any]

GIVEN = ("prompts", "completions", "completion_ids")
"""Names that are not columns."""

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class RewardError(ValueError):
    """A reward that failed, or gave what is none."""


class NamedReward:
    """A function, and which of the known lists it takes.

    Args:
        function: as above.
        key: what gave it, for messages.

    Raises:
        TypeError: not a function; one that takes any number of positional arguments, or is asynchronous.
    """

    def __init__(self, function: RewardFunction, key: str = "reward_fn") -> None:
        if not callable(function):
            raise TypeError(f"{key} must be a function; got {type(function).__name__}")
        if inspect.iscoroutinefunction(function):
            raise TypeError(f"{key} must be a plain function; {_called(function)} is asynchronous (async def)")
        parameters = list(inspect.signature(function).parameters.values())
        if any(p.kind is p.VAR_POSITIONAL for p in parameters):
            raise TypeError(f"{key} must name its parameters, or take **kwargs; {_called(function)} takes *args")
        self.function, self.key = function, key
        plain = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
        due = [p.name for p in plain if p.default is p.empty]
        nameless = not {p.name for p in plain} & set(GIVEN)
        self.in_order = nameless and len(due) == 2 and all(p.kind in _POSITIONAL for p in plain)
        self.needed = [] if self.in_order else [name for name in due if name not in GIVEN]
        """Columns that must be there."""
        self.optional = [p.name for p in plain if p.name not in (*due, *GIVEN)]
        """Columns that are passed where they are there."""
        self.takes_all = len(plain) < len(parameters)
        """Whether every column is."""
        self.given = [p.name for p in plain if p.name in GIVEN] if not self.takes_all else list(GIVEN)

    def __call__(self, known: Mapping[str, Sequence[Any]], count: int) -> list[float]:
        """A number for each of `count` responses; NaN where the function says None.

        known: lists by name, those of `GIVEN` and the columns that are there.

        Raises RewardError if the function raises (with the place in its file), or returns anything else.
        """
        lists = {name: list(values) for name, values in known.items()}
        columns = [name for name in lists if name not in GIVEN]
        wanted = [*self.given, *self.needed, *(columns if self.takes_all else self.optional)]
        try:
            if self.in_order:
                more = {name: lists[name] for name in self.optional if name in lists}
                returned = self.function(lists["prompts"], lists["completions"], **more)
            else:
                returned = self.function(**{name: lists[name] for name in dict.fromkeys(wanted) if name in lists})
        except Exception as error:
            raise RewardError(f"{self.key} {_called(self.function)} failed{_place(error, self.function)}") from error
        return self._numbers(returned, known, count)

    def _numbers(self, returned: Any, known: Mapping[str, Sequence[Any]], count: int) -> list[float]:
        """What was returned, as numbers; RewardError naming the first that is none."""
        called = f"{self.key} {_called(self.function)}"
        values = returned.tolist() if hasattr(returned, "tolist") else returned
        if not isinstance(values, (list, tuple)):
            raise RewardError(f"{called} must return {count} numbers; got {_short(returned)}")
        if len(values) != count:
            raise RewardError(f"{called} must return {count} numbers; got {len(values)}")
        out = []
        for i, value in enumerate(values):
            number = math.nan if value is None else _number(value)
            if number is None or (value is not None and not math.isfinite(number)):
                raise RewardError(
                    f"{called} must return finite numbers, or None where it does not apply; number {i} of {count} "
                    f"(from 0) is {_short(value)}, for the prompt {_short(known['prompts'][i])} and the completion "
                    f"{_short(known['completions'][i])}"
                )
            out.append(number)
        return out


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _called(function: Any) -> str:
    return getattr(function, "__qualname__", None) or type(function).__name__


def _place(error: Exception, function: Any) -> str:
    """Where in the function's own file it failed, and with what."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    own = getattr(getattr(function, "__code__", None), "co_filename", None)
    frame = next((f for f in reversed(frames) if f.filename == own), frames[-1] if frames else None)
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if frame is None:
        return f": {what}"
    line = f" ({frame.line})" if frame.line else ""
    return f" in {frame.filename}, line {frame.lineno}{line}: {what}"


def load_function(spec: str, key: str = "reward_fn") -> RewardFunction:
    """The function called `module:function` or `path/to/file.py:function`.

    Raises ValueError, naming the key, if there is no such module, file or function, or if importing it fails.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise ValueError(f"{key} must be module:function or file.py:function; got {spec!r}")
    try:
        module = _load_file(place) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # a file may raise anything while it is imported
        raise ValueError(f"{key} names {place!r}, which cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{key} must name a function; {place!r} has no function {name!r}")
    return function


def _load_file(path: str) -> Any:
    path = os.path.abspath(os.path.expanduser(path))
    name = f"_fastalign_reward_{os.path.splitext(os.path.basename(path))[0]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not os.path.isfile(path):
        raise FileNotFoundError(f"there is no Python file {path!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
