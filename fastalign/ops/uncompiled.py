"""What a compiler steps around: one break of the graph in place of a compiled copy of every frame below."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CodeType
from typing import Any, TypeVar

from ..utils.private import eval_frame

F = TypeVar("F", bound=Callable[..., Any])


def _skip(code: CodeType) -> None:
    """Keeps the compiler from trying the frame of this code itself. Tried with torch 2.13; 2.6 has `skip_code`."""
    if hasattr(eval_frame, "skip_code"):
        eval_frame.skip_code(code)
    elif hasattr(eval_frame, "set_code_exec_strategy"):
        action = eval_frame._FrameAction
        eval_frame.set_code_exec_strategy(code, eval_frame._FrameExecStrategy(action.SKIP, action.DEFAULT))


def uncompiled(function: F) -> F:
    """The function, which runs as it is written in a compiled one too, with all that it calls.

    As `torch.compiler.disable` does it, which would load the compiler, and Triton with it, at import.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = eval_frame.set_eval_frame(None)
        try:
            return function(*args, **kwargs)
        finally:
            eval_frame.set_eval_frame(before)

    run._torchdynamo_disable = True  # type: ignore[attr-defined]
    _skip(run.__code__)  # type: ignore[attr-defined]
    return run  # type: ignore[return-value]
