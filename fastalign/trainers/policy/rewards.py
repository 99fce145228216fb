"""Rewards for responses: a sequence-classification model's score, or any Python function of the texts."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from ...losses.reward import last_token_scores
from ...models.loading import load, load_tokenizer, pad_id
from ...models.logits import run_model
from ..data.collate import pad
from ..data.encode import Encoder
from .rollout import Episode

RewardFunction = Callable[..., Any]


class FunctionReward:
    """Calls a function with the lists `prompts`, `completions` and the columns that it names, as far as it names them.

    Raises TypeError for parameters that take any name: which columns to read must be known.
    """

    def __init__(self, function: RewardFunction) -> None:
        parameters = inspect.signature(function).parameters.values()
        if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters):
            raise TypeError(f"reward_fn must name its parameters; {function} takes any")
        self.function = function
        self.names = [p.name for p in parameters if p.default is p.empty or p.name in ("prompts", "completions")]
        self.columns = [name for name in self.names if name not in ("prompts", "completions")]

    def __call__(self, episodes: Sequence[Episode]) -> Tensor:
        """[E], float32. ValueError if the function does not return one finite number per response."""
        known: dict[str, list] = {name: [e.prompt.columns[name] for e in episodes] for name in self.columns}
        known |= {"prompts": [e.prompt.text for e in episodes], "completions": [e.text for e in episodes]}
        scores = torch.as_tensor(self.function(**{name: known[name] for name in self.names}), dtype=torch.float32)
        if scores.shape != (len(episodes),):
            raise ValueError(f"reward_fn must return {len(episodes)} numbers; got shape {list(scores.shape)}")
        if not torch.isfinite(scores).all():
            raise ValueError("reward_fn must return finite numbers; got " + ", ".join(map(str, scores.tolist()[:8])))
        return scores


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
        """[E], float32, on the CPU."""
        pairs = [self._encoded(e) for e in episodes]
        scores = torch.zeros(len(pairs))
        order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = pad([pairs[i] for i in chosen], pad_id(self.tokenizer))
            scores[chosen] = self._score({name: x.to(self.device) for name, x in batch.items()}).float().cpu()
        return scores

    def _encoded(self, episode: Episode) -> tuple[list[int], list[int]]:
        """Token ids of prompt and response. ValueError for a conversation where the model has no chat template."""
        prompt = episode.prompt
        if prompt.messages is not None and self.tokenizer.chat_template is None:
            raise ValueError(
                "reward_model must have a chat template, since the prompts are conversations; its tokenizer has none"
            )
        seen = prompt.text if prompt.messages is None else prompt.messages
        options = {"tools": prompt.tools} if prompt.tools else {}
        encode = Encoder(self.tokenizer, self.max_length)
        ids, (tail,) = encode(seen, [episode.text], options, ended=episode.ended)
        return ids, tail

    def _score(self, batch: dict[str, Tensor]) -> Tensor:
        if not hasattr(self.model, "score"):
            return self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1)
        backbone = self.model.base_model
        hidden = run_model(backbone, batch).last_hidden_state
        return last_token_scores(self.model.score(hidden).squeeze(-1), batch["attention_mask"].bool())


def load_reward(args: Any, function: RewardFunction | None, device: torch.device) -> FunctionReward | ModelReward:
    """The one reward there is: the function, `args.reward_fn` or `args.reward_model`; ValueError unless exactly one."""
    given = [x is not None for x in (function, args.reward_fn, args.reward_model)]
    if sum(given) != 1:
        raise ValueError(
            f"exactly one reward must be given: reward_model, reward_fn, or in Python reward; got {sum(given)} of them"
        )
    if args.reward_model is None:
        return FunctionReward(load_function(args.reward_fn) if function is None else function)
    size = args.rollout_batch_size
    return ModelReward(args.reward_model, device=device, dtype=getattr(torch, args.dtype), batch_size=size)


def load_function(spec: str) -> RewardFunction:
    """The function called `module:function` or `path/to/file.py:function`.

    Raises ValueError if there is no such module, file or function.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise ValueError(f"reward_fn must be module:function or file.py:function; got {spec!r}")
    try:
        module = _load_file(place) if place.endswith(".py") else importlib.import_module(place)
    except (ModuleNotFoundError, FileNotFoundError, SyntaxError) as error:
        raise ValueError(f"reward_fn names {place!r}, which cannot be imported: {error}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward_fn must name a function; {place!r} has no function {name!r}")
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
