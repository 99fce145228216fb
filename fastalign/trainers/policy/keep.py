"""What a run that fails leaves behind: a checkpoint of all that it had reached."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from transformers.utils import logging

from .checkpoint import rng_state, save_whole, set_rng_state
from .rewards import RewardError

logger = logging.get_logger(__name__)

_ALIKE = (FloatingPointError, RewardError)
"""What every process raises at the same place, so that they can still write a checkpoint together."""


@contextlib.contextmanager
def kept(trainer: Any) -> Iterator[None]:
    """What goes wrong inside a step (a reward that fails, an interrupt, a run that diverges) leaves those before it.

    With the random generators as they were, so that a step that failed before any update is made again to the bit.
    """
    before = rng_state()
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, OSError) or (trainer.accelerator.num_processes > 1 and not isinstance(error, _ALIKE)):
            raise  # what could not be written once will not be the second time
        set_rng_state(before)
        said = _keep(trainer)
        if isinstance(error, _ALIKE):
            raise type(error)(f"{str(error).rstrip('.')}. {said}") from error
        logger.warning(said)
        raise


def _keep(trainer: Any) -> str:
    """Saves a checkpoint, if there is anything to save; says what there is."""
    step = trainer.state.global_step
    name = f"checkpoint-{step}"
    folder = os.path.join(str(trainer.args.output_dir), name)
    if step == 0:
        return "It was the first step: nothing is lost"
    try:
        if not os.path.isdir(folder):
            save_whole(trainer, folder)
    except (OSError, RuntimeError, FloatingPointError) as error:
        return f"{name} could not be written: {error}"
    return f"{name} holds the run up to there: --resume_from_checkpoint auto goes on from it"
