"""KTO (Ethayarajh et al. 2024): learning from single completions that are marked desirable or undesirable.

    fastalign kto --model runs/sft --dataset labelled.jsonl --output_dir runs/kto --beta 0.1

or from Python:

    KTOTrainer(model, KTOConfig(output_dir="runs/kto"), "labelled.jsonl", processing_class=tokenizer).train()

Rows have `prompt`, `completion` and `label` (true: desirable); of pairs (`prompt`, `chosen`, `rejected`) both sides
become such rows. The baseline is the mean log-ratio of policy and reference on mismatched rows, a prompt with another
row's completion, and never below 0. As TRL has it, the other row is the one before it among the rows of a micro-batch
in the order of the data (the first takes the last's); where that one has the same prompt, as in rows made of pairs, the
nearest before it that has another. The mean is over a micro-batch. Both count a micro-batch of all processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..losses.base import masked_mean
from ..losses.unpaired import KTOLoss
from ..models.loading import disable_dropout, pad_id
from ..utils.batch import IGNORE, Batch
from ..utils.checks import check_choice
from .common.arguments import key
from .common.base import Metrics, Weighted
from .common.config import TrainingConfig
from .common.even import FILLER
from .common.reference import ReferenceKeys, ReferenceTrainer
from .common.run import encoder, run
from .data.collate import UnpairedCollator
from .data.files import Rows
from .data.tokenize import tokenize_unpaired

LOSS_TYPES = ("kto", "apo_zero_unpaired")


@dataclass
class KTOConfig(TrainingConfig, ReferenceKeys):
    """KTO on rows of `prompt`, `completion` and `label`, or on pairs, whose sides become such rows."""

    beta: float = key(0.1, "Strength of the pull towards the reference", group="Loss")
    loss_type: str = key(
        "kto", "kto, or apo_zero_unpaired: the same with a baseline of 0, without its forward passes", group="Loss"
    )
    desirable_weight: float = key(1.0, "Weight of the desirable completions' losses", group="Loss")
    undesirable_weight: float = key(1.0, "Weight of the undesirable completions' losses", group="Loss")
    disable_dropout: bool = key(True, "Train without dropout, so that policy and reference start equal", group="Loss")
    learning_rate: float = key(1e-6, "Peak learning rate", group="Training loop")

    def __post_init__(self) -> None:
        check_choice("loss_type", self.loss_type, LOSS_TYPES)
        self.loss()
        self.check_reference()
        super().__post_init__()
        if self.estimates_kl and self.micro_batch < 2:
            raise ValueError(
                "per_device_train_batch_size must be at least 2 in one process with loss_type kto, whose baseline "
                f"pairs prompts with other rows' completions; got {self.per_device_train_batch_size}"
            )

    def loss(self) -> KTOLoss:
        """The loss that these keys describe; ValueError naming the key that is wrong."""
        weights = {name: getattr(self, name) for name in ("desirable_weight", "undesirable_weight")}
        return KTOLoss(beta=self.beta, inplace_backward=True, **weights)

    @property
    def micro_batch(self) -> int:
        """Rows of a forward pass, of all processes together."""
        return self.per_device_train_batch_size * self.world_size

    @property
    def estimates_kl(self) -> bool:
        """Whether the loss has a baseline."""
        return self.loss_type == "kto"


class KTOTrainer(ReferenceTrainer):
    """Minimises KTO's loss.

    Logs `rewards/chosen` and `logps/chosen` (means over desirable completions), `rewards/rejected`, `logps/rejected`
    (over undesirable ones), `rewards/margins` (their difference), `rewards/accuracies` (the share of completions whose
    log-ratio is on its label's side of the baseline), `kl` (the baseline, in nats), `lengths/*`, `desirable` (the share
    that is) and `num_tokens`.
    """

    args: KTOConfig

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: KTOConfig,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        ref_model: PreTrainedModel | nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """As `AlignmentTrainer`; the rows have `prompt`, `completion`, `label`, or are pairs.

        ref_model: the reference policy; None takes `args.ref_model`, or the model as it is now.
        """
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, **kwargs)
        self.loss = args.loss()
        own = (("completion_ids", "own"),)
        self.reference_columns = ("ref_logps", "ref_kl_logps") if args.estimates_kl else ("ref_logps",)
        self.reference_ids = (*own, ("kl_ids", "kl_own")) if args.estimates_kl else own
        self.set_reference(ref_model)

    def check_model(self, model: nn.Module, args: KTOConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Switches dropout off, if so configured."""
        if args.disable_dropout:
            disable_dropout(model)

    def collator(self, args: KTOConfig, tokenizer: PreTrainedTokenizerBase) -> UnpairedCollator:
        return UnpairedCollator(pad_id(tokenizer), args.padding_side)

    def prepare(self, rows: Rows, args: KTOConfig, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        tokenised = tokenize_unpaired(rows, encoder(tokenizer, args))
        if not args.estimates_kl:
            return tokenised
        return with_mismatched(tokenised, args.micro_batch, args.max_length)

    def items(self, batch: Batch) -> Tensor:
        """Completions."""
        return torch.full((), len(batch["labels"]), device=batch["labels"].device)

    def batch_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        ref_logps, *ref_kl = self.sums_of_reference(model, batch)
        baseline = self._baseline(model, batch, ref_kl[0]) if self.args.estimates_kl else None
        desirable = batch["desirable"]
        out = self.loss(self.logits(model, batch), batch["labels"], desirable, ref_logps=ref_logps, kl=baseline)
        return out.loss, self._metrics(out, batch)

    def _metrics(self, out: Any, batch: Batch) -> Metrics:
        good = batch["desirable"]
        lengths = (batch["labels"] != IGNORE).sum(-1).float()
        found: dict[str, Tensor | Weighted] = {"kl": out.kl, "desirable": good.float().mean()}
        for side, which in (("chosen", good), ("rejected", ~good)):
            for name, values in (("rewards", out.rewards), ("logps", out.logps), ("lengths", lengths)):
                found[f"{name}/{side}"] = Weighted(masked_mean(values, which), which.sum())
        right = (out.rewards > self.args.beta * out.kl) == good
        return {**found, "rewards/accuracies": right.float().mean()}

    def complete(self, means: dict[str, float]) -> dict[str, float]:
        """With the margin, whose sides are means over different completions."""
        if "rewards/chosen" in means:
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return means

    # -------------------------------------------------------------------------------------- reference and baseline
    def reference_sums(self, model: nn.Module, batch: Batch) -> Sequence[Tensor]:
        """Of the rows' completions and, where there is a baseline, of the mismatched ones."""
        own = self.sequence_logps(model, batch)
        return [own, self.sequence_logps(model, mismatched(batch))] if self.args.estimates_kl else [own]

    def _baseline(self, model: nn.Module, batch: Batch, ref_kl: Tensor) -> Tensor:
        """The mean log-ratio of the micro-batch's mismatched rows, of all processes; the loss takes 0 where it is
        below."""
        with torch.no_grad():
            ratios = self.sequence_logps(model, mismatched(batch)) - ref_kl
        counts = ratios.new_full((), 0.0 if FILLER in batch else 1.0)
        total, rows = self.accelerator.reduce(torch.stack([ratios.sum() * counts, len(ratios) * counts]), "sum")
        return total / rows.clamp(min=1)


def mismatched(batch: Batch) -> Batch:
    """The batch's prompts with other rows' completions, as a batch of its own."""
    return {name.removeprefix("kl_"): value for name, value in batch.items() if name.startswith("kl_")}


def with_mismatched(rows: Dataset, block: int, max_length: int) -> Dataset:
    """Tokenised rows with `kl_ids` and `kl_own`: the completion of another row of the same `block` rows, cut to fit;
    and `longest`, the tokens of the longer of both sequences.

    Raises:
        ValueError: a single row.
    """
    count = len(rows)
    if count < 2:
        raise ValueError(f"dataset must have two rows or more, to pair prompts with other completions; it has {count}")
    prompts, ids, own = (rows[name] for name in ("prompt_ids", "completion_ids", "own"))
    others = [_partner(prompts, i, block) for i in range(count)]
    room = [max_length - len(prompt) for prompt in prompts]
    found = [ids[other][: room[i]] for i, other in enumerate(others)]
    longest = [len(p) + max(len(a), len(b)) for p, a, b in zip(prompts, ids, found, strict=True)]
    rows = rows.add_column("kl_ids", found).add_column("longest", longest)
    return rows.add_column("kl_own", [own[other][: room[i]] for i, other in enumerate(others)])


def _partner(prompts: Sequence[Sequence[int]], index: int, block: int) -> int:
    """The row whose completion goes with this one's prompt: see the module's docstring."""
    start = index // block * block
    size = min(block, len(prompts) - start)
    if size == 1:  # a last block of one row
        return index - 1
    before = [start + (index - start - k) % size for k in range(1, size)]
    return next((i for i in before if prompts[i] != prompts[index]), before[0])


def main(argv: list[str]) -> int:
    """The `fastalign kto` command."""
    return run("kto", KTOConfig, KTOTrainer, argv)
