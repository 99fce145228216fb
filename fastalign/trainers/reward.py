"""Reward models from human comparisons: Bradley-Terry on pairs, all pairs of a ranking (Ouyang et al. 2022, eq. 1).

    fastalign reward --model runs/sft --dataset pairs.jsonl --output_dir runs/reward

or from Python:

    args = RewardConfig(output_dir="runs/reward")
    model, tokenizer = load_reward_model("runs/sft", args)
    RewardTrainer(model, args, "pairs.jsonl", processing_class=tokenizer).train()

Rows are pairs (`prompt`, `chosen`, `rejected`, perhaps `margin`) or ranked lists (`prompt`, `completions`, `rewards` or
`ranks`), of one prompt each; every completion takes one forward pass. The score is transformers' own: the head's output
at the last token that is not padding, so that the saved model gives it to anyone who loads it with
`AutoModelForSequenceClassification`. For that to be the last real token, padding must be a token of its own.

A column `labeler` says who compared: accuracies are then also told per labeler, and `held_out_labelers` keeps some of
them out of training, as the 69.6 % against 72.4 % of Ouyang et al. 2022 (sec. 4.1) are.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from ..losses.listwise import comparable, comparisons, list_metrics, plackett_luce_loss
from ..losses.reward import best_of_k_loss, kwise_reward_loss, reward_loss
from ..models.loading import adapter_mode, load, load_tokenizer, model_options
from ..models.logits import model_logits
from ..utils.batch import Batch
from ..utils.checks import check_choice
from .common.arguments import key
from .common.base import AlignmentTrainer, Metrics, Weighted
from .common.config import TrainingConfig
from .common.given import check_config
from .common.run import encoder, run
from .data.collate import ListCollator, in_lists
from .data.files import Rows, read_rows
from .data.tokenize import tokenize_lists

PAD_TOKEN = "<|padding|>"


@dataclass
class RewardConfig(TrainingConfig):
    """Reward model on pairs (`prompt`, `chosen`, `rejected`) or ranked lists (`prompt`, `completions`, `rewards`)."""

    loss_type: str = key(
        "pairwise", "pairwise (Bradley-Terry, all pairs of a list), plackett_luce or best_of_k", group="Loss"
    )
    center_rewards_coefficient: float = key(
        0.0, "Weight of a term that keeps the scores near 0 (pairwise only)", group="Loss"
    )
    held_out_labelers: float = key(
        0.0, "Share of the labelers whose rows are evaluated instead of trained on", group="Model and data"
    )
    learning_rate: float = key(1e-5, "Peak learning rate", group="Training loop")

    def __post_init__(self) -> None:
        check_choice("loss_type", self.loss_type, tuple(_LOSSES))
        if not self.center_rewards_coefficient >= 0:
            raise ValueError(f"center_rewards_coefficient must be at least 0; got {self.center_rewards_coefficient}")
        if self.center_rewards_coefficient and self.loss_type != "pairwise":
            raise ValueError(f"center_rewards_coefficient is a term of loss_type pairwise; got {self.loss_type!r}")
        if not 0 <= self.held_out_labelers < 1:
            raise ValueError(f"held_out_labelers must be at least 0 and below 1; got {self.held_out_labelers}")
        super().__post_init__()


# ------------------------------------------------------------------------------------------------------------- losses
def _pairwise(scores: Tensor, ranks: Tensor, mask: Tensor, margin: Tensor | None, center: float) -> Tensor:
    if margin is None:
        return kwise_reward_loss(scores, ranks=ranks, mask=mask, center_coefficient=center).loss
    return reward_loss(scores[:, 0], scores[:, 1], margin=margin, center_coefficient=center).loss


def _plackett_luce(scores: Tensor, ranks: Tensor, mask: Tensor, margin: Tensor | None, center: float) -> Tensor:
    return plackett_luce_loss(scores, ranks=ranks, mask=mask).loss


def _best_of_k(scores: Tensor, ranks: Tensor, mask: Tensor, margin: Tensor | None, center: float) -> Tensor:
    best = ranks.masked_fill(~mask, torch.inf).argmin(-1)
    return best_of_k_loss(scores, best=best, mask=mask).loss


_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]] = {
    "pairwise": _pairwise,
    "plackett_luce": _plackett_luce,
    "best_of_k": _best_of_k,
}


# -------------------------------------------------------------------------------------------------------------- model
def load_reward_model(path: str, args: TrainingConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in that folder as a sequence-classification model with one score, and its tokenizer.

    A language model gets a fresh head, which is drawn from torch's generator: seed it for the same head again.
    """
    tokenizer = load_tokenizer(args.tokenizer, path)
    options = {"num_labels": 1, "adapters": adapter_mode(path, args), **model_options(args)}
    model = load("model", AutoModelForSequenceClassification, path, **options)
    return model, tokenizer


def separate_padding(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives tokenizer and model a padding token that ends no text, if they have none.

    Where padding and end-of-sequence are one token, transformers reads the score one token too early, and a text that
    was cut before its end is read elsewhere than one that was not.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id


class RewardTrainer(AlignmentTrainer):
    """Trains a sequence-classification model with one label to score completions.

    Logs `accuracy` (the better one scored strictly higher) and `margin` over pairs, `mean_reward` over completions, and
    `num_tokens`. Evaluation on rows with a `labeler` adds `accuracy/known_labelers` and `accuracy/new_labelers` (no row
    of theirs was trained on) and writes `labelers.json`: labeler → accuracy and number of pairs.
    """

    args: RewardConfig
    task = "SEQ_CLS"

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: RewardConfig,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        """As `AlignmentTrainer`. The tokenizer may gain a padding token, as may the model."""
        check_config(self, args)
        self._labelers: dict[Any, int] = {}
        self._known = 0
        self._right: dict[int, list[float]] = {}
        if args.held_out_labelers and train_dataset is not None:
            train_dataset, held_out = split_labelers(
                read_rows(train_dataset, args.reading), args.held_out_labelers, args.seed
            )
            if isinstance(eval_dataset, Mapping):
                eval_dataset = {**eval_dataset, "held_out_labelers": held_out}
            else:
                parts = [held_out] if eval_dataset is None else [read_rows(eval_dataset, args.reading), held_out]
                eval_dataset = concatenate_datasets(parts)
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, **kwargs)

    def check_model(self, model: Any, args: RewardConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """One label, and a padding token that ends no text."""
        if getattr(getattr(model, "config", None), "num_labels", None) != 1 or not hasattr(model, "score"):
            raise ValueError(
                "model must be a decoder's sequence-classification model with one label, as load_reward_model returns; "
                f"got {type(model).__name__}"
            )
        separate_padding(model, tokenizer)

    def collator(self, args: RewardConfig, tokenizer: PreTrainedTokenizerBase) -> ListCollator:
        return ListCollator(int(tokenizer.pad_token_id), args.padding_side)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str, args: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_reward_model(path, args)

    def prepare(self, rows: Rows, args: RewardConfig, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Training rows come first: the labelers that they name are the known ones."""
        tokenised = tokenize_lists(rows, encoder(tokenizer, args))
        if max(map(len, tokenised["completions_ids"])) < 2:
            raise ValueError("dataset must hold pairs or lists of two completions or more; every list has one")
        for i, completions in enumerate(tokenised["completions_ids"]):
            if any(ids[-1] == tokenizer.pad_token_id for ids in completions):
                raise ValueError(
                    f"no completion may end with the padding token {tokenizer.pad_token!r}, since its score is read at "
                    f"the last token before the padding; row {i} (from 0) does"
                )
        if "margin" in tokenised.column_names and args.loss_type != "pairwise":
            raise ValueError(f"the column margin needs loss_type pairwise; got {args.loss_type!r}")
        if "labeler" in tokenised.column_names:
            codes = [self._labelers.setdefault(name, len(self._labelers)) for name in tokenised["labeler"]]
            tokenised = tokenised.remove_columns("labeler").add_column("labeler", codes)
            self._known = self._known or len(self._labelers)
        return tokenised

    def items(self, batch: Batch) -> Tensor:
        """Lists that hold a comparison."""
        return comparable(comparisons(batch["places"] >= 0, batch["ranks"])).sum()

    def scores(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """([B, K] scores in float32, which of them are real)."""
        return in_lists(model_logits(model, batch)[:, 0].float(), batch["places"])

    def batch_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        scores, mask = self.scores(model, batch)
        ranks, args = batch["ranks"], self.args
        loss = _LOSSES[args.loss_type](scores, ranks, mask, batch.get("margin"), args.center_rewards_coefficient)
        above = comparisons(mask, ranks)
        accuracy, _, margin, _ = list_metrics(scores, mask, above)
        pairs, real = above.sum(), mask.sum()
        metrics: dict[str, Tensor | Weighted] = {
            "accuracy": Weighted(accuracy, pairs),
            "margin": Weighted(margin, pairs),
            "mean_reward": Weighted(scores.detach()[mask].mean(), real),
        }
        if not model.training and "labeler" in batch:
            metrics.update(self._by_labeler(scores, above, batch["labeler"]))
        return loss, metrics

    # --------------------------------------------------------------------------------------------------- labelers
    @property
    def known_labelers(self) -> list[Any]:
        """Labelers of the training rows."""
        return [name for name, code in self._labelers.items() if code < self._known]

    def _by_labeler(self, scores: Tensor, above: Tensor, labelers: Tensor) -> dict[str, Weighted]:
        """Counts right and all pairs of each labeler; the accuracies of known labelers and of new ones."""
        right = ((scores.unsqueeze(2) > scores.unsqueeze(1)) & above).sum((1, 2)).float()
        pairs = above.sum((1, 2)).float()
        for code, r, n in zip(labelers.tolist(), right.tolist(), pairs.tolist(), strict=True):
            counts = self._right.setdefault(code, [0.0, 0.0])
            counts[0] += r
            counts[1] += n
        out = {}
        for name, chosen in (("known", labelers < self._known), ("new", labelers >= self._known)):
            weight = pairs[chosen].sum()
            out[f"accuracy/{name}_labelers"] = Weighted(right[chosen].sum() / weight.clamp(min=1), weight)
        return out

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._right = {}
        output = super().evaluation_loop(*args, **kwargs)
        if self._right and self.is_world_process_zero():
            names = {code: name for name, code in self._labelers.items()}
            table = {
                str(names[code]): {"accuracy": right / pairs, "pairs": int(pairs), "known": code < self._known}
                for code, (right, pairs) in sorted(self._right.items())
                if pairs
            }
            os.makedirs(str(self.args.output_dir), exist_ok=True)
            with open(os.path.join(str(self.args.output_dir), "labelers.json"), "w", encoding="utf-8") as file:
                json.dump(table, file, indent=1)
        return output


def split_labelers(rows: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """(rows of the labelers that are kept, rows of those held out). ValueError if either would be empty."""
    if "labeler" not in rows.column_names:
        raise ValueError(f"held_out_labelers needs the column labeler; dataset has {', '.join(rows.column_names)}")
    names = sorted(set(map(str, rows["labeler"])))
    count = round(share * len(names))
    if not 0 < count < len(names):
        raise ValueError(f"held_out_labelers={share} of {len(names)} labelers leaves nobody on one side")
    held_out = set(random.Random(seed).sample(names, count))
    sides = [[i for i, name in enumerate(rows["labeler"]) if (str(name) in held_out) is out] for out in (False, True)]
    return rows.select(sides[0]), rows.select(sides[1])


def main(argv: list[str]) -> int:
    """The `fastalign reward` command."""
    return run("reward", RewardConfig, RewardTrainer, argv)
