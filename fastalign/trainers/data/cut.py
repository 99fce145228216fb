"""What becomes of prompts and completions that are longer than there is room for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .rowwise import Dropped

MODES = ("left", "right", "drop", "raise")
"""Values of truncation_mode."""

_TRL = {"keep_end": "left", "keep_start": "right"}


def mode_of(name: str, allowed: Sequence[str] = MODES) -> str:
    """The mode of that name, ours or TRL's. ValueError if there is none, or it is not among those allowed."""
    mode = _TRL.get(name, name)
    if mode not in allowed:
        raise ValueError(f"truncation_mode must be one of {', '.join(allowed)}; got {name!r}")
    return mode


@dataclass
class Cuts:
    """What the last row lost."""

    prompt: bool = False
    reply: bool = False


@dataclass(frozen=True)
class Room:
    """Cuts a prompt and the completions behind it to length; all completions keep one prompt.

    Attributes:
        max_length: tokens of prompt and completion together.
        max_prompt_length: tokens of the prompt, which beyond them loses its beginning; None leaves it to max_length.
        mode: for what is longer.
            left: the prompt loses its beginning, down to a quarter of max_length; then completions lose their end.
            right: completions lose their end; a row whose prompt leaves no room for one token of them is dropped.
            drop: the row is left out. raise: it is an error.
    """

    max_length: int
    max_prompt_length: int | None = None
    mode: str = "left"

    def fit(
        self, head: list[int], body: list[int], tails: Sequence[list[int]], cuts: Cuts
    ) -> tuple[list[int], list[list[int]]]:
        """(prompt, completions) that fit.

        Args:
            head: what the prompt begins with in any case: the beginning-of-sequence token, or nothing.
            body: the rest of the prompt.
            tails: the completions; a cut one has no end-of-sequence token, since that was its last.
            cuts: is told what was cut.

        Raises:
            ValueError: mode raise and a row that is too long. Dropped: a row that is left out.
        """
        whole, longest = len(head) + len(body), max(map(len, tails), default=0)
        limit = whole if self.max_prompt_length is None else self.max_prompt_length
        if self.mode in ("drop", "raise"):
            self._check(whole, longest, limit)
        if self.mode == "left":
            least = max(self.max_length // 4, 1)
            limit = min(limit, max(self.max_length - longest, least))
        keep = max(limit - len(head), 0 if head else 1)
        prompt = [*head, *(body[-keep:] if keep else [])]
        room = self.max_length - len(prompt)
        if room < 1 and longest:
            raise Dropped(f"the prompt's {whole} tokens leave no room for a reply in max_length {self.max_length}")
        cuts.prompt |= len(prompt) < whole
        cuts.reply |= longest > room
        return prompt, [ids[:room] for ids in tails]

    def _check(self, whole: int, longest: int, limit: int) -> None:
        if whole + longest <= self.max_length and whole <= limit:
            return
        if self.mode == "drop":
            raise Dropped("the row is too long")
        name, most, got = ("max_length", self.max_length, whole + longest)
        if got <= most:
            name, most, got = ("max_prompt_length", limit, whole)
        raise ValueError(
            f"{got} tokens are more than {name} {most}: raise it, or set truncation_mode to left, right or drop"
        )
