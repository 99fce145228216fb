"""A judge of pairs as the reward: of each response the share of its prompt's other responses that it beats."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .reward_functions import RewardError
from .rollout import Episode

Judge = Callable[..., Any]
"""A function of the lists `prompts` (as the rows have them, text or messages), `first` and `second` (texts), which
returns for each pair 1 where the first is better, 0 where the second is, 0.5 (or None) where neither is. One with an
attribute `positional` that is true is asked in both orders, as are those of `fastalign.evaluation.judges`."""


class JudgeReward:
    """Scores responses by comparing all of one prompt; NaN for a response that nothing is compared with.

    Args:
        judge: see `Judge`.
        each: responses of one prompt that are compared with each other.
        key: what gave the judge, for messages.

    Raises:
        TypeError: a judge that cannot be called.
    """

    columns: Sequence[str] = ()
    optional: Sequence[str] = ()

    def __init__(self, judge: Judge, each: int, key: str = "judge") -> None:
        if not callable(judge):
            raise TypeError(f"{key} must be a function of prompts, first and second; got {type(judge).__name__}")
        self.judge, self.each, self.key = judge, each, key

    def __call__(self, episodes: Sequence[Episode]) -> Tensor:
        """[E], float32, in [0, 1]. RewardError where the judge fails or returns anything else than verdicts."""
        pairs = list(self._pairs(episodes))
        wins, games = torch.zeros(len(episodes), dtype=torch.float64), torch.zeros(len(episodes), dtype=torch.float64)
        for (i, j), verdict in zip(pairs, self._verdicts(episodes, pairs), strict=True):
            wins[i] += verdict
            wins[j] += 1 - verdict
            games[[i, j]] += 1
        return torch.where(games > 0, wins / games.clamp(min=1), torch.nan).float()

    def _pairs(self, episodes: Sequence[Episode]) -> Iterator[tuple[int, int]]:
        """Numbers of the responses that are compared: responses of one prompt stand side by side."""
        for _, alike in itertools.groupby(range(len(episodes)), key=lambda i: id(episodes[i].prompt)):
            numbers = list(alike)
            for start in range(0, len(numbers), self.each):
                yield from itertools.combinations(numbers[start : start + self.each], 2)

    def _verdicts(self, episodes: Sequence[Episode], pairs: Sequence[tuple[int, int]]) -> list[float]:
        if not pairs:
            return []
        found = self._ask(episodes, pairs)
        if getattr(self.judge, "positional", False):
            other = self._ask(episodes, [(j, i) for i, j in pairs])
            found = [(a + 1 - b) / 2 for a, b in zip(found, other, strict=True)]
        return found

    def _ask(self, episodes: Sequence[Episode], pairs: Sequence[tuple[int, int]]) -> list[float]:
        prompts = [episodes[i].prompt.told for i, _ in pairs]
        first, second = ([episodes[pair[side]].text for pair in pairs] for side in (0, 1))
        try:
            returned = self.judge(prompts, first, second)
        except Exception as error:
            raise RewardError(f"{self.key} failed: {type(error).__name__}: {error}") from error
        values = returned.tolist() if hasattr(returned, "tolist") else returned
        if not isinstance(values, (list, tuple)) or len(values) != len(pairs):
            raise RewardError(f"{self.key} must return {len(pairs)} verdicts, one for each pair; got {returned!r:.80}")
        out = [0.5 if value is None else value for value in values]
        for value in out:
            if not isinstance(value, (bool, int, float)) or not (math.isfinite(value) and 0 <= value <= 1):
                raise RewardError(f"{self.key} must return verdicts from 0 to 1, or None; got {value!r}")
        return [float(value) for value in out]
