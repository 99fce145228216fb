"""Direct preference optimisation (Rafailov et al. 2023) and its relatives on pairs of completions.

    fastalign dpo --model runs/sft --dataset pairs.jsonl --output_dir runs/dpo --beta 0.1

or from Python:

    DPOTrainer(model, DPOConfig(output_dir="runs/dpo"), "pairs.jsonl", processing_class=tokenizer).train()

Rows have `prompt`, `chosen` and `rejected`. The reference is the model as it was before training (or `ref_model`).
By default its log-probabilities are computed once, before the first step, kept on disk for later runs on the same model
and data, and no second model is held in memory; rows that bring `ref_chosen_logps` and `ref_rejected_logps` are used as
they are. With fresh LoRA the reference is the model with its adapters off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.loading import disable_dropout, pad_id
from ..utils.batch import IGNORE, Batch
from .common.arguments import key
from .common.base import Metrics, Weighted
from .common.config import GroupsConfig
from .common.pair_keys import PAIR_METRICS, PairLossKeys
from .common.preference_callback import PreferenceWatch
from .common.reference import ReferenceKeys, ReferenceTrainer
from .common.run import encoder, run
from .data.collate import PreferenceCollator
from .data.files import Rows
from .data.tokenize import REFERENCE_COLUMNS, tokenize_preferences


@dataclass
class DPOConfig(GroupsConfig, PairLossKeys, ReferenceKeys):
    """Direct preference optimisation on rows of `prompt`, `chosen` and `rejected`."""

    disable_dropout: bool = key(True, "Train without dropout, so that policy and reference start equal", group="Loss")
    reference_free: bool = key(False, "Take the reference as uniform: no reference model at all", group="Reference")
    learning_rate: float = key(1e-6, "Peak learning rate", group="Training loop")

    def __post_init__(self) -> None:
        self.check_reference(self.uses_reference)
        super().__post_init__()

    @property
    def uses_reference(self) -> bool:
        """False for the losses without a reference (SimPO, CPO, ORPO), and for any other with `reference_free`."""
        return not self.reference_free and self.loss().options.uses_reference


class DPOTrainer(ReferenceTrainer):
    """Minimises a pairwise preference loss.

    Logs `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `rewards/accuracies` (strictly greater),
    `logps/chosen`, `logps/rejected` (nats a sequence), `lengths/*` and `num_tokens`. The chosen reward may fall while
    the margin rises (the loss only looks at the difference), and longer outputs may win: `PreferenceWatch` says so.
    """

    args: DPOConfig
    reference_columns = REFERENCE_COLUMNS
    reference_ids = (("chosen_ids", "chosen_own"), ("rejected_ids", "rejected_own"))

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: DPOConfig,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        ref_model: PreTrainedModel | nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """As `AlignmentTrainer`; the rows have `prompt`, `chosen`, `rejected`.

        ref_model: the reference policy; None takes `args.ref_model`, or the model as it is now.
        """
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, **kwargs)
        self.add_callback(PreferenceWatch())
        self.loss = args.loss()
        if args.uses_reference:
            self.set_reference(ref_model)
        elif ref_model is not None:
            raise ValueError(f"ref_model must be None: loss_type {args.loss_type!r} here uses no reference")

    def check_model(self, model: nn.Module, args: DPOConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Switches dropout off, if so configured."""
        if args.disable_dropout:
            disable_dropout(model)

    def collator(self, args: DPOConfig, tokenizer: PreTrainedTokenizerBase) -> PreferenceCollator:
        return PreferenceCollator(pad_id(tokenizer), args.padding_side)

    def prepare(self, rows: Rows, args: DPOConfig, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        return tokenize_preferences(rows, encoder(tokenizer, args))

    def items(self, batch: Batch) -> Tensor:
        """Pairs."""
        # Filled there: a number that is copied there would wait for all that a GPU has yet to do.
        return torch.full((), len(batch["labels"]) // 2, device=batch["labels"].device)

    def groups(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Pairs."""
        count = len(batch["labels"])
        return torch.arange(count, device=batch["labels"].device) % max(count // 2, 1)

    def batch_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        chosen, rejected = self.sums_of_reference(model, batch) if self.args.uses_reference else (None, None)
        out = self.loss(
            self.logits(model, batch), batch["labels"], ref_chosen_logps=chosen, ref_rejected_logps=rejected
        )
        metrics = {name: getattr(out, field).mean() for name, field in PAIR_METRICS.items()}
        return out.loss, {**metrics, **_lengths(batch["labels"], out.margins)}

    # ------------------------------------------------------------------------------------------------- reference
    def reference_sums(self, model: nn.Module, batch: Batch) -> Sequence[Tensor]:
        """Of the chosen completions, and of the rejected ones."""
        return self.loss.reference_logps(self.logits(model, batch), batch["labels"]).chunk(2)

    def reference_settings(self) -> dict[str, Any]:
        weighted = {} if self.args.ld_alpha is None else {"ld_alpha": self.args.ld_alpha}
        return {**super().reference_settings(), **weighted}


def _lengths(labels: Tensor, margins: Tensor) -> dict[str, Tensor | Weighted]:
    """Tokens of both sides, and over pairs of different length: whether the data, and the rewards, chose the longer."""
    chosen, rejected = (labels != IGNORE).sum(-1).float().chunk(2)
    longer = (chosen - rejected).sign()
    different = (longer != 0).sum()
    share = different.clamp(min=1)
    return {
        "lengths/chosen": chosen.mean(),
        "lengths/rejected": rejected.mean(),
        "lengths/longer_chosen": Weighted((longer > 0).sum() / share, different),
        "rewards/longer_preferred": Weighted((longer * margins > 0).sum() / share, different),
    }


def main(argv: list[str]) -> int:
    """The `fastalign dpo` command."""
    return run("dpo", DPOConfig, DPOTrainer, argv)
