"""Rewards for responses: a sequence-classification model's score, or any Python function of the texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from ...losses.reward import last_token_scores
from ...models.loading import load, load_tokenizer, pad_id
from ...models.logits import run_model
from ..data.collate import pad
from ..data.encode import Encoder
from .reward_functions import NamedReward, RewardError, RewardFunction, load_function
from .rollout import Episode

__all__ = ["FunctionReward", "ModelReward", "RewardError", "RewardFunction", "load_function", "load_reward", "scored"]


class FunctionReward:
    """The sum of one or more functions (see `reward_functions`) of responses and of their rows' columns.

    Args:
        functions: one or more.
        key: what gave them, for messages.
        weights: what each one's numbers are multiplied with; 1 by default.

    Raises:
        TypeError: what is no function, is asynchronous, or takes any number of positional arguments.
        ValueError: weights of another number than the functions.
    """

    def __init__(
        self, *functions: RewardFunction, key: str = "reward_fn", weights: Sequence[float] | None = None
    ) -> None:
        self.functions = [NamedReward(function, key) for function in functions]
        if weights is not None and len(weights) != len(functions):
            raise ValueError(f"reward_weights must be {len(functions)}, one for each function; got {len(weights)}")
        self.weights = [1.0] * len(functions) if weights is None else [float(w) for w in weights]

    @property
    def columns(self) -> list[str]:
        """Columns that the rows must have."""
        return list(dict.fromkeys(name for f in self.functions for name in f.needed))

    @property
    def optional(self) -> list[str] | None:
        """Columns that are passed on where the rows have them; None: all."""
        if any(f.takes_all for f in self.functions):
            return None
        return list(dict.fromkeys(name for f in self.functions for name in f.optional))

    def __call__(self, episodes: Sequence[Episode]) -> Tensor:
        """[E], float32; NaN for a response that no function applies to. RewardError if one fails or gives no number.

        Every episode is told its numbers, one of each function, without weights.
        """
        names = set.intersection(*(set(e.prompt.columns) for e in episodes))
        known: dict[str, list] = {name: [e.prompt.columns[name] for e in episodes] for name in sorted(names)}
        known |= {"prompts": [e.prompt.told for e in episodes], "completions": [e.text for e in episodes]}
        known |= {"completion_ids": [e.ids for e in episodes]}
        scores = torch.tensor([f(known, len(episodes)) for f in self.functions], dtype=torch.float64)
        for episode, parts in zip(episodes, scores.t().tolist(), strict=True):
            episode.parts = parts
        total = (scores * torch.tensor(self.weights, dtype=torch.float64)[:, None]).nansum(0)
        return torch.where(scores.isnan().all(0), torch.nan, total).float()


class ModelReward:
    """Score of a sequence-classification model with one output, read at the last real token.

    Prompt and response are tokenised by the reward model's own tokenizer, conversations through its own chat template
    (never the policy's), with its end of a turn, or end-of-sequence token, after responses that ended. Where the model
    has a linear `score` layer, the position is found from the attention mask, not from the padding token as
    transformers does, so that neither the batch nor the pad id matters.

    Args:
        path: folder or hub name of the model.
        device, dtype: where and how it runs.
        batch_size: responses scored at once.
        max_length: tokens of prompt and response; the prompt loses its beginning.
    """

    columns: Sequence[str] = ()
    optional: Sequence[str] = ()

    def __init__(
        self, path: str, *, device: torch.device, dtype: torch.dtype, batch_size: int = 64, max_length: int = 2**30
    ) -> None:
        self.model: Any = load("reward_model", AutoModelForSequenceClassification, path, dtype=dtype)
        outputs = self.model.config.num_labels
        if outputs != 1:
            raise ValueError(f"reward_model must have one output; {path!r} has {outputs}")
        self.model.requires_grad_(False).eval().to(device)
        self.tokenizer = load_tokenizer(None, path, "reward_model")
        self.device, self.batch_size, self.max_length = device, batch_size, max_length

    @torch.no_grad()
    def __call__(self, episodes: Sequence[Episode]) -> Tensor:
        """[E], float32, on the CPU. RewardError for a score that is not finite."""
        pairs = [self._encoded(e) for e in episodes]
        scores = torch.zeros(len(pairs))
        order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = pad([pairs[i] for i in chosen], pad_id(self.tokenizer))
            scores[chosen] = self._score({name: x.to(self.device) for name, x in batch.items()}).float().cpu()
        for i in torch.nonzero(~scores.isfinite()).flatten().tolist():
            raise RewardError(
                f"reward_model must give finite scores; number {i} of {len(pairs)} (from 0) is {float(scores[i])}, for "
                f"the prompt {episodes[i].prompt.text[-80:]!r} and the completion {episodes[i].text[:80]!r}"
            )
        return scores

    def _encoded(self, episode: Episode) -> tuple[list[int], list[int]]:
        """Token ids of prompt and response. ValueError for a conversation where the model has no chat template."""
        prompt = episode.prompt
        if prompt.messages is not None and self.tokenizer.chat_template is None:
            raise ValueError(
                "reward_model must have a chat template, since the prompts are conversations; its tokenizer has none"
            )
        options = {"tools": prompt.tools} if prompt.tools else {}
        encode = Encoder(self.tokenizer, self.max_length)
        ids, (tail,) = encode(prompt.told, [episode.text], options, ended=episode.ended)
        return ids, tail

    def _score(self, batch: dict[str, Tensor]) -> Tensor:
        if not hasattr(self.model, "score"):
            return self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1)
        backbone = self.model.base_model
        hidden = run_model(backbone, batch).last_hidden_state
        return last_token_scores(self.model.score(hidden).squeeze(-1), batch["attention_mask"].bool())


def scored(reward: FunctionReward | ModelReward, episodes: list[Episode]) -> list[Episode]:
    """This process's responses with their scores, and those of all others, in the order of the processes.

    Raises RewardError, in every process alike, if the reward failed in any of them.
    """
    failure = None
    try:
        scores = reward(episodes).tolist() if episodes else []
        for episode, score in zip(episodes, scores, strict=True):
            episode.score = score
    except Exception as error:
        failure = error
    told = gather_object([None if failure is None else str(failure)])
    said = next((text for text in told if text is not None), None)
    if said is not None:
        raise RewardError(said) from failure
    return gather_object(episodes)


def load_reward(args: Any, function: Any, device: torch.device) -> FunctionReward | ModelReward:
    """The reward: what was given from Python (a function, or a list of them, which are added up), `args.reward_fn` or
    `args.reward_model`; ValueError unless exactly one is there."""
    given = [x is not None for x in (function, args.reward_fn, args.reward_model)]
    if sum(given) != 1:
        raise ValueError(
            f"exactly one reward must be given: reward_model, reward_fn, or in Python reward; got {sum(given)} of them"
        )
    if args.reward_fn is not None:
        names = args.reward_fn.split(",") if isinstance(args.reward_fn, str) else args.reward_fn
        return FunctionReward(*(load_function(name.strip()) for name in names), weights=args.reward_weights)
    if function is not None and not isinstance(function, str):
        functions = function if isinstance(function, (list, tuple)) else [function]
        return FunctionReward(*functions, key="reward", weights=args.reward_weights)
    if args.reward_weights is not None:
        raise ValueError("reward_weights are of functions (reward_fn): a reward model gives one number alone")
    size, path = args.rollout_batch_size, str(args.reward_model or function)
    return ModelReward(path, device=device, dtype=getattr(torch, args.dtype), batch_size=size)
