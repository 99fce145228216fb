"""What goes wrong quietly in preference training: said once, in plain words, on the console and in the log."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from transformers import TrainerCallback
from transformers.utils import logging

from .callbacks import LOG_NAME

logger = logging.get_logger(__name__)

LINES = 5
"""Log lines that a sign must show in one after the other."""
_LONGER = 0.65


class Sign(NamedTuple):
    """A condition on a log line, and what it means."""

    needs: tuple[str, ...]
    shows: Callable[[Mapping[str, float]], bool]
    meaning: str


SIGNS: dict[str, Sign] = {
    "chosen_reward_falls": Sign(
        ("rewards/chosen", "rewards/margins"),
        lambda line: line["rewards/chosen"] < 0 < line["rewards/margins"],
        "the chosen completions have become less likely than under the reference, while the margin is positive: the "
        "loss looks at the difference alone and lowers both sides. Where outputs degrade, try a lower learning_rate, a "
        "higher beta, or a loss that holds the chosen ones up (loss_type rpo or dpop)",
    ),
    "length_grows": Sign(
        ("rewards/longer_preferred", "lengths/longer_chosen"),
        lambda line: line["rewards/longer_preferred"] > _LONGER,
        f"in more than {_LONGER:.0%} of the pairs the longer completion has the higher implicit reward, so outputs "
        "will probably grow. Compare lengths/longer_chosen, the share in which the data chose the longer one, and see "
        "length_alpha, which penalises length, or loss_type simpo",
    ),
}


class PreferenceWatch(TrainerCallback):
    """Warns when a sign has shown in `LINES` log lines in a row; each sign once a run. The line goes to the log too."""

    def __init__(self) -> None:
        self._seen = {name: deque[bool](maxlen=LINES) for name in SIGNS}
        self.warned: set[str] = set()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for name, sign in SIGNS.items():
            if not logs or any(key not in logs for key in sign.needs):
                continue
            seen = self._seen[name]
            seen.append(sign.shows(logs))
            if name in self.warned or len(seen) < LINES or not all(seen):
                continue
            self.warned.add(name)
            if state.is_world_process_zero:
                logger.warning("step %d: %s", state.global_step, sign.meaning)
                with open(os.path.join(args.output_dir, LOG_NAME), "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": state.global_step, "warning": name, "text": sign.meaning}) + "\n")
