"""Preference Ranking Optimization (Song et al. 2023) on ranked lists of any length.

    fastalign pro --model runs/sft --dataset lists.jsonl --output_dir runs/pro --sft_weight 0.05

or from Python:

    PROTrainer(model, PROConfig(output_dir="runs/pro"), "lists.jsonl", processing_class=tokenizer).train()

Rows have `prompt`, `completions`, and `rewards` (high is good), `ranks` (0 is best) or the best completion first; pairs
(`prompt`, `chosen`, `rejected`) are lists of two. Lists of different lengths share a batch, and nothing is computed for
the entries that the shorter ones lack. There is no reference model: the supervised term on the best completion is what
holds the policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..losses.listwise import PROLoss, comparable, comparisons, pro_loss
from ..models.loading import pad_id
from ..utils.batch import IGNORE, Batch
from .common.arguments import key
from .common.base import AlignmentTrainer, Metrics, Weighted
from .common.config import GroupsConfig
from .common.run import encoder, run
from .data.collate import ListCollator, in_lists
from .data.files import Rows
from .data.tokenize import tokenize_lists


@dataclass
class PROConfig(GroupsConfig):
    """Preference Ranking Optimization on rows of `prompt`, `completions` and `rewards` or `ranks`."""

    sft_weight: float = key(
        0.05, "Weight of the best completion's NLL, which is scaled by the list's (n - 1) squared", group="Loss"
    )
    form: str = key("plackett_luce", "plackett_luce (all stages) or infonce (the best against the rest)", group="Loss")
    average: bool = key(True, "Score a completion by its mean log-probability per token, not by the sum", group="Loss")
    sft_average: bool = key(
        False, "Average that NLL over the completion's tokens; false: sum it, as the authors do", group="Loss"
    )
    reward_temperatures: bool = key(
        True, "Where rows have rewards: weigh comparisons by their gaps, as the authors do", group="Loss"
    )
    learning_rate: float = key(1e-6, "Peak learning rate", group="Training loop")

    def __post_init__(self) -> None:
        PROLoss(sft_weight=self.sft_weight, form=self.form)
        super().__post_init__()


class PROTrainer(AlignmentTrainer):
    """Minimises the PRO loss of ranked lists or pairs.

    Logs `loss/list` and `loss/sft` (the supervised term before its weight), `accuracy` (over pairs: the better one has
    strictly the higher score), `margin` in nats a token (a completion with `average` false), `top1_accuracy`,
    `logps/best` (nats a token) and `num_tokens`.
    """

    args: PROConfig

    def collator(self, args: PROConfig, tokenizer: PreTrainedTokenizerBase) -> ListCollator:
        return ListCollator(pad_id(tokenizer), args.padding_side)

    def prepare(self, rows: Rows, args: PROConfig, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        tokenised = tokenize_lists(rows, encoder(tokenizer, args))
        unused = {"margin", "labeler"} & set(tokenised.column_names)
        return tokenised.remove_columns(sorted(unused))

    def items(self, batch: Batch) -> Tensor:
        """Lists that hold a comparison."""
        return comparable(self._above(batch)).sum()

    def groups(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Lists."""
        lists = torch.arange(len(batch["places"]), device=batch["places"].device)
        return lists.repeat_interleave((batch["places"] >= 0).sum(-1))

    def _above(self, batch: Batch) -> Tensor:
        return comparisons(batch["places"] >= 0, batch["ranks"])

    def batch_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        labels, args = batch["labels"], self.args
        sums = self.sequence_logps(model, batch)
        totals, mask = in_lists(sums, batch["places"])
        lengths, _ = in_lists((labels != IGNORE).sum(-1).to(sums.dtype), batch["places"])
        means = totals / lengths.clamp(min=1)
        rewards = batch.get("rewards") if args.reward_temperatures else None
        out = pro_loss(
            means if args.average else totals,
            rewards=rewards,
            ranks=batch["ranks"] if rewards is None else None,
            mask=mask,
            sft_weight=args.sft_weight,
            sft_logps=means if args.sft_average else totals,
            form=args.form,
        )
        above = self._above(batch)
        pairs, lists = above.sum(), comparable(above).sum()
        best = mask & ~above.any(1)
        metrics = {
            "loss/list": Weighted(out.list_loss, lists),
            "loss/sft": Weighted(out.sft_loss, lists),
            "accuracy": Weighted(out.accuracy, pairs),
            "margin": Weighted(out.margin, pairs),
            "top1_accuracy": Weighted(out.top1_accuracy, lists),
            "logps/best": Weighted(means.detach()[best].mean(), best.sum()),
        }
        return out.loss, metrics


def main(argv: list[str]) -> int:
    """The `fastalign pro` command."""
    return run("pro", PROConfig, PROTrainer, argv)
