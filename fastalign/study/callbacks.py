"""Looking at a policy while it trains: one point of gold reward against KL each time."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import TrainerCallback

from ..evaluation.perplexity import alignment_tax
from ..evaluation.policy import Measured, measure
from .setup import Setup


class Tracker:
    """Takes the figures of a policy on the held-out prompts, always with the same draws.

    Attributes:
        points: one for each look: `step`, the figures of `eval.policy.measure` with the scorers gold, proxy and
            independent, and `halves`: the mean gold reward on every second prompt and on the others, so that what is
            chosen by one half can be reported on the other; at the end also the alignment tax, `tax` (nats a token on
            held-out reviews).
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.points: list[dict[str, Any]] = []
        self.last: Measured | None = None

    def look(self, step: int, policy: Any, *, end: bool) -> None:
        """Adds the point of this step; `end` says that the run ends here."""
        setup, config = self.setup, self.setup.config
        found = measure(
            policy,
            setup.reference,
            setup.tokenizer,
            setup.eval_prompts,
            setup.scorers,
            per_prompt=config.eval_samples,
            how=setup.demo.how,
            seed=setup.seed + 1,
        )
        by_prompt = found.scores["gold"].mean(1)
        halves = [float(np.mean(by_prompt[i::2])) for i in (0, 1)]
        self.points.append({"step": step, **found.figures, "halves": halves})
        if end:
            tax = alignment_tax(setup.held_out_likelihood, setup.likelihood_of(policy))
            self.points[-1]["tax"] = tax._asdict()
        self.last = found


def marks(total: int, count: int) -> list[int]:
    """Steps to look at: `count` of them, evenly apart, the last among them."""
    return sorted({max(1, round(total * (i + 1) / count)) for i in range(count)})


class TrackerCallback(TrainerCallback):
    """Looks at the marked updates of a transformers Trainer."""

    def __init__(self, tracker: Tracker, steps: list[int]) -> None:
        self.tracker, self.steps = tracker, steps

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.tracker.look(state.global_step, model, end=state.global_step == self.steps[-1])
