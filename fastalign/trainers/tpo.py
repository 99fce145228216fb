"""TPO (Saeidi et al. 2024): pairs and a gold completion of each prompt in one step, without a reference model.

    fastalign tpo --model runs/sft --dataset triples.jsonl --output_dir runs/tpo --tpo_alpha 1

or from Python:

    TPOTrainer(model, TPOConfig(output_dir="runs/tpo"), "triples.jsonl", processing_class=tokenizer).train()

Rows have `prompt`, `chosen`, `rejected` and `reference`, the gold completion, whose likelihood holds the policy. The
names of keys, columns and losses are TRL's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..losses.triple import TRIPLES, TPOLoss
from ..models.loading import disable_dropout, pad_id
from ..utils.batch import IGNORE, Batch
from .common.arguments import key
from .common.base import AlignmentTrainer, Metrics, Weighted
from .common.config import GroupsConfig
from .common.pair_keys import PAIR_METRICS
from .common.run import encoder, run
from .data.collate import TripleCollator
from .data.files import Rows
from .data.tokenize import tokenize_triples


@dataclass
class TPOConfig(GroupsConfig):
    """Triple preference optimisation on rows of `prompt`, `chosen`, `rejected` and `reference` (gold)."""

    loss_type: str = key("sigmoid", f"Loss of the pair: {', '.join(TRIPLES)}", group="Loss")
    beta: float = key(0.01, "Strength of that loss; of ipo its tau", group="Loss")
    label_smoothing: float = key(0.0, "Assumed share of flipped labels (sigmoid and tpo-l)", group="Loss")
    tpo_alpha: float = key(1.0, "Weight of the gold completions' NLL; 0 leaves it out", group="Loss")
    tpo_l_gamma: float = key(0.5, "Target margin of tpo-l", group="Loss")
    disable_dropout: bool = key(True, "Train without dropout", group="Loss")
    learning_rate: float = key(5e-7, "Peak learning rate", group="Training loop")

    def __post_init__(self) -> None:
        self.loss()
        super().__post_init__()

    def loss(self) -> TPOLoss:
        """The loss that these keys describe; ValueError naming the key that is wrong."""
        names = ("loss_type", "beta", "label_smoothing", "tpo_alpha", "tpo_l_gamma")
        return TPOLoss(inplace_backward=True, **{name: getattr(self, name) for name in names})


class TPOTrainer(AlignmentTrainer):
    """Minimises TPO's loss.

    Logs `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `rewards/accuracies`, `logps/chosen`,
    `logps/rejected`, `loss/nll` (of the gold completions, a mean over their tokens) and `num_tokens`.
    """

    args: TPOConfig

    def __init__(self, model: PreTrainedModel | nn.Module, args: TPOConfig, *given: Rows, **kwargs: object) -> None:
        """As `AlignmentTrainer`; the rows have `prompt`, `chosen`, `rejected`, `reference`."""
        super().__init__(model, args, *given, **kwargs)  # type: ignore[arg-type]
        self.loss = args.loss()

    def check_model(self, model: nn.Module, args: TPOConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Switches dropout off, if so configured."""
        if args.disable_dropout:
            disable_dropout(model)

    def collator(self, args: TPOConfig, tokenizer: PreTrainedTokenizerBase) -> TripleCollator:
        return TripleCollator(pad_id(tokenizer), args.padding_side)

    def prepare(self, rows: Rows, args: TPOConfig, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        return tokenize_triples(rows, encoder(tokenizer, args))

    def items(self, batch: Batch) -> Tensor:
        """Triples."""
        return torch.full((), len(batch["labels"]) // 3, device=batch["labels"].device)

    def groups(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Triples."""
        count = len(batch["labels"])
        return torch.arange(count, device=batch["labels"].device) % max(count // 3, 1)

    def batch_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        out = self.loss(self.logits(model, batch), batch["labels"])
        metrics: dict[str, Tensor | Weighted] = {n: getattr(out, field).mean() for n, field in PAIR_METRICS.items()}
        gold = (batch["labels"].chunk(3)[2] != IGNORE).sum()
        return out.loss, {**metrics, "loss/nll": Weighted(out.nll, gold)}


def main(argv: list[str]) -> int:
    """The `fastalign tpo` command."""
    return run("tpo", TPOConfig, TPOTrainer, argv)
