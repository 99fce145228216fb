"""Supervised fine-tuning: the mean negative log-likelihood of completions given their prompts.

    fastalign sft --model MODEL --dataset pairs.jsonl --output_dir runs/sft --learning_rate 2e-5

or from Python:

    SFTTrainer(model, SFTConfig(output_dir="runs/sft"), "pairs.jsonl", processing_class=tokenizer).train()

Rows have a `prompt` (may be empty) and a `completion`, or `messages` (a conversation), or `text`; only the completion's
tokens (a conversation's replies), the end-of-sequence token among them, are trained on. With `packing`, short sequences
share a row: no padding, the same loss.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..losses.sft import NORMALIZATIONS, SFTLoss
from ..models.loading import pad_id
from ..utils.batch import IGNORE, Batch
from ..utils.checks import check_choice
from .common.arguments import key
from .common.base import AlignmentTrainer
from .common.config import TrainingConfig
from .common.run import encoder, run
from .data.collate import PackedCollator, SFTCollator
from .data.files import Rows
from .data.pack import pack
from .data.tokenize import WEIGHTS, tokenize_sft


def counted_items(batch: Batch, normalization: str) -> Tensor:
    """What a loss averages over, by normalization: real tokens by their weights, or sequences that have one."""
    real = batch["weights"] if "weights" in batch else batch["labels"] != IGNORE
    return real.sum() if normalization == "token" else real.gt(0).any(-1).sum()


@dataclass
class SFTConfig(TrainingConfig):
    """Supervised fine-tuning on rows of `prompt` and `completion`, or of `messages`; the loss counts the replies."""

    normalization: str = key("token", "The loss averages over: token (all alike) or sequence (all alike)", group="Loss")
    loss_type: str = key(
        "nll", "nll, or dft: each token's loss times its probability (dynamic fine-tuning)", group="Loss"
    )
    label_smoothing: float = key(0.0, "Share of the target spread over the whole vocabulary", group="Loss")
    z_loss: float = key(0.0, "Weight of the squared log-partition function", group="Loss")
    packing: bool = key(
        False,
        "Put several sequences into one row of up to max_length tokens: no padding",
        group="Model and data",
    )
    learning_rate: float = key(2e-5, "Peak learning rate", group="Training loop")

    def __post_init__(self) -> None:
        if self.packing and self.normalization != "token":
            raise ValueError(f"packing needs normalization token; got {self.normalization!r}")
        check_choice("normalization", self.normalization, tuple(NORMALIZATIONS))
        self.loss()
        super().__post_init__()

    def loss(self) -> SFTLoss:
        """The loss that these keys describe; ValueError naming the key that is wrong."""
        return SFTLoss(
            normalization=self.normalization,
            loss_type=self.loss_type,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            inplace_backward=True,
        )


class SFTTrainer(AlignmentTrainer):
    """Minimises the masked negative log-likelihood. Logs `loss`, in nats a token, and `num_tokens`."""

    args: SFTConfig

    @functools.cached_property
    def loss(self) -> SFTLoss:
        """The loss of the configuration."""
        return self.args.loss()

    def collator(self, args: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> PackedCollator | SFTCollator:
        fill = pad_id(tokenizer)
        return PackedCollator(fill) if args.packing else SFTCollator(fill, args.padding_side)

    def prepare(self, rows: Rows, args: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        tokenised = tokenize_sft(rows, encoder(tokenizer, args))
        if args.packing and WEIGHTS in tokenised.column_names:
            raise ValueError("packing must be false for rows whose messages have weights other than 0 and 1; got true")
        return pack(tokenised, args.max_length) if args.packing else tokenised

    def items(self, batch: Batch) -> Tensor:
        return counted_items(batch, self.args.normalization)

    def batch_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(self.logits(model, batch), batch["labels"], weights=batch.get("weights")).loss, {}


def main(argv: list[str]) -> int:
    """The `fastalign sft` command."""
    return run("sft", SFTConfig, SFTTrainer, argv)
