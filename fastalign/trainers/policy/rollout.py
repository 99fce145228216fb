"""Rollouts: prompts in; sampled responses out, with the log-probabilities, values and scores that an update needs.

Two rules keep sampler and trainer in step. The sampler's options are those declared here and no others (a model's own
generation settings, repetition penalties among them, are set aside), and every log-probability of the policy is
computed by the trainer's forward pass under the sampling temperature; what the sampler says of its draws is for
`correction`.

A response depends on the seed, the step and its own number, not on the batch or the process that it was sampled in:
each token is drawn by inverting the distribution at a uniform number that belongs to that response and position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ...models.loading import pad_id
from ...models.logits import GROUPS, ModelLogits
from ...models.sampling import Drawn, Sampling, continuations
from ...rl.rewards import ShapedRewards
from ...utils.batch import IGNORE, Batch
from ..data.cells import cell
from ..data.chat import Messages, is_chat, template_options
from ..data.collate import pad
from ..data.encode import Encoder
from ..data.files import Rows, load_rows, named, read_rows
from ..data.problems import Problems, Reading, Tally, report, tally
from ..data.rowwise import Dropped
from ..data.targets import as_prompts
from ..data.tokenize import TEMPLATE_COLUMNS


class Prompt(NamedTuple):
    """What a response is sampled for: token ids, text, the columns of its row that the reward asks for, its number."""

    ids: list[int]
    text: str
    """As the policy sees it."""
    columns: Mapping[str, Any]
    row: int = 0
    messages: Messages | None = None
    """Of a conversation: what other models than the policy are to see, each by its own chat template."""
    tools: Sequence[Any] = ()

    @property
    def told(self) -> str | Messages:
        """What rewards are told: the prompt in the form that its row has, without what was cut for the policy."""
        return self.text if self.messages is None else self.messages


@dataclass
class Episode:
    """One response. Tensors are float32 on the CPU, one number per token of the response; None where not asked for."""

    prompt: Prompt
    ids: list[int]
    """Token ids, with the token that ended it, if one did."""
    text: str
    ended: bool
    score: float = 0.0
    """NaN where the reward does not apply: nothing is learnt from such a response."""
    parts: list[float] = field(default_factory=list)
    """The numbers of several reward functions, NaN where one does not apply; none of a reward model."""
    logps: Tensor = field(default_factory=lambda: torch.zeros(0))
    """By the policy that sampled, at the sampling temperature."""
    sampler_logps: Tensor | None = None
    """As the sampler drew: in its precision, and among what top_k and top_p leave."""
    importance_weights: Tensor | None = None
    kept: Tensor | None = None
    """Boolean: the tokens that are near enough to their sampler to be in a loss."""
    entropy: Tensor = field(default_factory=lambda: torch.zeros(0))
    log_sum_sq_probs: Tensor | None = None
    """Logarithm of the sum of the squared probabilities of each token's distribution."""
    ref_logps: Tensor | None = None
    kl: Tensor | None = None
    """Exact KL to the reference of each token's distribution."""
    values: Tensor | None = None
    advantages: Tensor = field(default_factory=lambda: torch.zeros(0))
    returns: Tensor | None = None
    counts: bool = True
    """False: it is in no loss, and in no count that a loss is divided by."""

    @property
    def counted(self) -> int:
        """Tokens that are in the loss."""
        return 0 if not self.counts else len(self.ids) if self.kept is None else int(self.kept.sum())


# ------------------------------------------------------------------------------------------------------------ prompts
def load_prompts(
    source: Rows | None,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int,
    columns: Sequence[str] = (),
    key: str = "dataset",
    optional: Sequence[str] | None = (),
    *,
    truncation_mode: str = "left",
    reading: Reading | None = None,
    counts: dict[str, int] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> list[Prompt]:
    """Rows with a `prompt` (text, or a list of chat messages) and further columns, which `key` gave; none for None.

    Args:
        optional: columns that are kept where there are such; None: all.
        truncation_mode: for longer prompts: left (policy and reward see what is left of them), drop or raise.
        reading: how the source is read.
        counts: is told what was cut, dropped and left out.
        template_options: for the chat template, beside the columns `tools` and `chat_template_kwargs`.

    Raises:
        ValueError: a prompt without any token, or too long in mode raise; naming the row. No row that is left.
    """
    if source is None:
        return []
    reading = reading or Reading()
    with named(key), tally(key) as told:
        rows = as_prompts(read_rows(source, reading), reading.skip_bad_rows)
        more = rows.column_names if optional is None else [name for name in optional if name in rows.column_names]
        columns = list(dict.fromkeys(name for name in (*columns, *more) if name != "prompt"))
        for_template = [name for name in TEMPLATE_COLUMNS if name in rows.column_names and name not in columns]
        rows = load_rows(rows, required=("prompt", *columns), optional=for_template)
        options = template_options or {}
        encode = Encoder(tokenizer, 2**30, max_prompt_length, False, options, truncation_mode=truncation_mode)
        found = list(_prompts(rows, encode, columns, reading.skip_bad_rows))
    if counts is not None:
        counts.update({f"data/{key}/{name}": value for name, value in told.counts().items()})
    return found


def _prompts(rows: Dataset, encode: Encoder, columns: Sequence[str], skip_bad_rows: bool) -> Iterator[Prompt]:
    problems, told = Problems(skip_bad_rows), Tally()
    for index, row in enumerate(rows):
        given: Any = row
        try:
            prompt, options = cell(given, "prompt", index, may_be_empty=True), template_options(given)
            ids, text, prompt = encode.policy_prompt(prompt, options)
            if not ids:
                raise ValueError(f"column 'prompt' must have at least one token; row {index} (from 0) has none")
        except Dropped:
            told.dropped += 1
            continue
        except ValueError as error:
            said = str(error)
            problems.add(said if f"row {index} " in said else f"row {index} (from 0): {said}")
            continue
        told.rows += 1
        told.prompts_cut += encode.cuts.prompt
        messages = prompt if is_chat(prompt) else None
        found = {name: given[name] for name in columns}
        yield Prompt(ids, text, found, index, messages, options.get("tools", ()))
    problems.close(told.rows)
    report(told)
    if not told.rows:
        raise ValueError(f"dataset must have a prompt within max_prompt_length; all {told.dropped} are longer")


def all_prompts(
    train: Rows, evaluation: Rows | Mapping[str, Rows] | None, tokenizer: Any, args: Any, reward: Any, counts: Any
) -> tuple[list[Prompt], list[Prompt], dict[str, list[Prompt]]]:
    """(prompts to train on, all to evaluate on, those of each evaluation set by name): see `load_prompts`."""

    def load(source: Rows | None, key: str) -> list[Prompt]:
        return load_prompts(
            source,
            tokenizer,
            args.max_prompt_length,
            reward.columns,
            key,
            reward.optional,
            truncation_mode=args.truncation_mode,
            reading=args.reading,
            counts=counts,
            template_options=args.chat_template_kwargs,
        )

    prompts = load(train, "dataset")
    if not isinstance(evaluation, Mapping):
        return prompts, load(evaluation, "eval_dataset"), {}
    sets = {name: load(rows, f"eval_dataset_{name}") for name, rows in evaluation.items()}
    return prompts, [prompt for each in sets.values() for prompt in each], sets


def by_set(
    sets: Mapping[str, Sequence[Prompt]], episodes: Mapping[int, Episode]
) -> Iterator[tuple[str, list[Episode]]]:
    """Each set's name and episodes; those of all sets come with the number of their prompt among all."""
    start = 0
    for name, prompts in sets.items():
        yield name, [episodes[i] for i in range(start, start + len(prompts))]
        start += len(prompts)


def prompt_order(count: int, start: int, number: int, seed: int, series: int = 0) -> list[int]:
    """Indices of `number` prompts from position `start` of an endless series of shuffles of all of them."""
    wanted = range(start, start + number)
    other = (series,) if series else ()
    shuffles = {
        epoch: np.random.default_rng((seed, 1, epoch, *other)).permutation(count)
        for epoch in range(start // count, (start + number - 1) // count + 1)
    }
    return [int(shuffles[i // count][i % count]) for i in wanted]


# ----------------------------------------------------------------------------------------------------------- sampling
@torch.no_grad()
def generate(
    policy: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    keys: Sequence[tuple[int, ...]],
    sampling: Sampling,
    seed: int = 0,
) -> list[Episode]:
    """One response per prompt, in the prompts' order.

    `keys[i]` (whole numbers) says which response of all it is, which with the seed decides its draws.
    """
    fill = pad_id(tokenizer)
    episodes: dict[int, Episode] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    for start in range(0, len(order), sampling.batch_size):
        chosen = order[start : start + sampling.batch_size]
        draws = [np.random.default_rng((seed, 2, *keys[i])).random(sampling.max_new_tokens) for i in chosen]
        batch = pad([(prompts[i].ids, []) for i in chosen], fill, "left")
        tails = continuations(policy, tokenizer, batch, torch.from_numpy(np.stack(draws)), sampling)
        for i, tail in zip(chosen, tails, strict=True):
            episodes[i] = _episode(prompts[i], tail, tokenizer)
    return [episodes[i] for i in range(len(prompts))]


def _episode(prompt: Prompt, tail: Drawn, tokenizer: PreTrainedTokenizerBase) -> Episode:
    text = str(tokenizer.decode(tail.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return Episode(prompt, tail.ids, text, tail.finished, sampler_logps=tail.logps)


# ------------------------------------------------------------------------------------------------------------ scoring
def collate(episodes: Sequence[Episode], fill: int, *, grouped: bool = False) -> Batch:
    """Prompt and response of each, padded on the right: see `data.collate.pad`. Labels are the response's tokens.

    grouped: say which of them have a prompt in common.
    """
    batch = pad([(e.prompt.ids, e.ids) for e in episodes], fill)
    return {**batch, GROUPS: torch.tensor(group_numbers(episodes))} if grouped else batch


def group_numbers(episodes: Sequence[Episode]) -> list[int]:
    """The number of each one's prompt, in the order in which they come."""
    numbers: dict[tuple[int, ...], int] = {}
    return [numbers.setdefault(tuple(e.prompt.ids), len(numbers)) for e in episodes]


def spread(rows: Sequence[Tensor], labels: Tensor) -> Tensor:
    """[B, T] from one number per response token of each row, placed where the labels are; 0 elsewhere."""
    out = torch.zeros(labels.shape, device=labels.device)
    out[labels != IGNORE] = torch.cat(list(rows)).to(labels.device)
    return out


def _rows(x: Tensor, labels: Tensor) -> list[Tensor]:
    """The inverse of `spread`, on the CPU."""
    mask = labels != IGNORE
    return list(x[mask].float().cpu().split(mask.sum(-1).tolist()))


@torch.no_grad()
def fill_in(
    episodes: Sequence[Episode],
    policy: Callable[[Batch], ModelLogits],
    reference: Callable[[Batch], ModelLogits] | None,
    *,
    fill: int,
    device: torch.device,
    temperature: float = 1.0,
    exact_kl: bool = False,
    energy: bool = False,
    batch_size: int = 64,
    grouped: bool = False,
) -> None:
    """Sets each episode's log-probabilities, entropies, values and, with a reference, its log-probabilities or KL.

    policy, reference: a padded batch to what stands for logits [B, T, V]; after its statistics the policy's `answer`
        holds the values. With exact_kl both distributions are compared whole.
    energy: also the sum of the squared probabilities, in the same read of the logits.
    grouped: run a prompt once for all of its responses in a batch.
    """
    order = sorted(range(len(episodes)), key=lambda i: len(episodes[i].prompt.ids) + len(episodes[i].ids))
    for start in range(0, len(order), batch_size):
        chosen = [episodes[i] for i in order[start : start + batch_size]]
        batch = {name: value.to(device) for name, value in collate(chosen, fill, grouped=grouped).items()}
        labels = batch["labels"]
        logits = policy(batch)
        ref_logits = None if reference is None else reference(batch)
        options: dict[str, Any] = {"temperature": temperature, "entropy": True}
        if ref_logits is not None and exact_kl:
            options |= {"kl": True, "ref_logits": ref_logits}
        if energy:
            options["diagnostics"] = ("log_sum_sq_probs",)
        stats = logits.stats(labels, **options)
        found: dict[str, Tensor | None] = {"logps": stats.logps, "entropy": stats.entropy, "kl": stats.kl}
        found["values"] = logits.answer.values
        found["log_sum_sq_probs"] = stats.log_sum_sq_probs if energy else None
        if ref_logits is not None and not exact_kl:
            found["ref_logps"] = ref_logits.stats(labels, temperature=temperature).logps
        for name, x in found.items():
            if x is not None:
                for episode, row in zip(chosen, _rows(x, labels), strict=True):
                    setattr(episode, name, row)


def stacked(episodes: Sequence[Episode], name: str) -> Tensor:
    """[E, R]: one of the episodes' tensors, a column for each token of the longest response."""
    return pad_sequence([getattr(e, name) for e in episodes], batch_first=True)


def response_mask(episodes: Sequence[Episode]) -> Tensor:
    """[E, R], True = a token of the response."""
    lengths = torch.tensor([len(e.ids) for e in episodes])
    return torch.arange(int(lengths.max())) < lengths[:, None]


def unstack(x: Tensor, episodes: Sequence[Episode], name: str) -> None:
    """The inverse of `stacked`: gives each episode its row."""
    for episode, row in zip(episodes, x, strict=True):
        setattr(episode, name, row[: len(episode.ids)].clone())


def applicable(episodes: Sequence[Episode]) -> Tensor:
    """[E], True = the reward applies."""
    return torch.tensor([not math.isnan(e.score) for e in episodes], dtype=torch.bool)


def describe(episodes: Sequence[Episode], shaped: ShapedRewards) -> dict[str, float]:
    """What users follow: sums over a response's tokens, means over responses (of rewards, over those that have one)."""
    non_score = shaped.non_score_rewards
    applies = applicable(episodes)
    known = {
        "objective/rlhf_reward": (shaped.scores + non_score)[applies],
        "objective/scores": torch.tensor([e.score for e in episodes], dtype=torch.float64)[applies],
    }
    found = {name: float(x.mean()) for name, x in known.items() if len(x)}
    if len(known["objective/scores"]):
        found["objective/scores_std"] = float(known["objective/scores"].std(correction=0))
    if not applies.all():
        found["objective/reward_applies"] = float(applies.double().mean())
    ended = [e.ended for e in episodes]
    return {
        "objective/kl": float(shaped.kl.mean()),
        "objective/entropy": float(np.mean([float(e.entropy.sum()) for e in episodes])),
        "objective/non_score_reward": float(non_score.mean()),
        **found,
        "length": float(np.mean([len(e.ids) for e in episodes])),
        "eos_rate": float(np.mean(ended)),
        "val/num_eos_tokens": float(np.sum(ended)),
    }


def describe_briefly(episodes: Sequence[Episode], shaped: ShapedRewards, prefix: str) -> dict[str, float]:
    """What an evaluation tells: score, KL, entropy, length, share that ended, as `prefix/score` and so on."""
    found = describe(episodes, shaped)
    names = {"objective/scores": "score", "objective/kl": "kl", "objective/entropy": "entropy"}
    names |= {"length": "length", "eos_rate": "eos_rate"}
    return {f"{prefix}/{short}": found[name] for name, short in names.items() if name in found}
