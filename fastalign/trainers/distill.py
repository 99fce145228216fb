"""Knowledge distillation: a student that is to match a teacher's distribution at every token of the completions.

    fastalign distill --model SMALL --teacher_model LARGE --dataset pairs.jsonl --output_dir runs/distill

or from Python:

    DistillTrainer(model, DistillConfig(output_dir="runs/distill"), "pairs.jsonl", tokenizer, teacher=teacher).train()

Rows are those of `fastalign sft`. With `lmbda` a share of the updates takes in place of the data's completions what the
student itself writes after their prompts (Agarwal et al. 2024, GKD, algorithm 1), with `seq_kd` the others what the
teacher writes. Both models must have one vocabulary; their sizes may differ. Neither model's logits are ever whole.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..losses.distillation import DistillationLoss
from ..losses.sft import NORMALIZATIONS
from ..models.loading import disable_dropout, load_model, pad_id
from ..models.logits import can_answer
from ..models.sampling import Sampling, continuations
from ..utils.batch import IGNORE, Batch
from ..utils.checks import check_choice, check_positive
from ..utils.modes import evaluating
from .common.arguments import key
from .common.base import AlignmentTrainer, Metrics
from .common.config import TrainingConfig
from .common.even import FILLER, ROWS
from .common.run import encoder, run
from .common.sharding import whole_weights
from .data.collate import SFTCollator, pad
from .data.files import Rows
from .data.tokenize import tokenize_sft
from .sft import counted_items

_DRAWS = 3  # of the seed's series: which updates are the student's own
_TOKENS = 4  # and which tokens it draws


@dataclass
class DistillConfig(TrainingConfig):
    """Distillation of a teacher on rows of `prompt` and `completion`, or of `messages`."""

    teacher_model: str | None = key(
        None, "Folder (or hub name) of the teacher, whose vocabulary is the student's", group="Teacher"
    )
    lmbda: float = key(
        0.5, "Share of the updates on what the student itself writes; 0: on the data alone", group="Teacher"
    )
    seq_kd: bool = key(False, "The other updates: on what the teacher writes, in place of the data", group="Teacher")
    max_new_tokens: int = key(128, "Tokens of what is written at most", group="Teacher")
    divergence: str = key(
        "jsd", "From the teacher: jsd, forward_kl, reverse_kl, skewed_kl or skewed_reverse_kl", group="Loss"
    )
    beta: float = key(0.5, "Of jsd: 0 is the forward and 1 the reverse KL", group="Loss")
    skew_alpha: float = key(0.1, "Of the skewed divergences", group="Loss")
    temperature: float = key(1.0, "Divides both models' logits, in the loss and where they write", group="Loss")
    nll_weight: float = key(0.0, "Weight of the completions' own negative log-likelihood", group="Loss")
    normalization: str = key("token", "The loss averages over: token (all alike) or sequence (all alike)", group="Loss")
    disable_dropout: bool = key(True, "Train without dropout", group="Loss")
    learning_rate: float = key(2e-5, "Peak learning rate", group="Training loop")

    def __post_init__(self) -> None:
        check_choice("normalization", self.normalization, tuple(NORMALIZATIONS))
        check_positive("max_new_tokens", self.max_new_tokens)
        if not 0 <= self.lmbda <= 1:
            raise ValueError(f"lmbda must be in [0, 1]; got {self.lmbda}")
        if self.seq_kd and self.lmbda == 1:
            raise ValueError("seq_kd must be false with lmbda=1, where all updates are on the student's own; got true")
        self.loss()
        super().__post_init__()

    def loss(self) -> DistillationLoss:
        """The loss that these keys describe; ValueError naming the key that is wrong."""
        return DistillationLoss(
            divergence=self.divergence,
            beta=self.beta,
            skew_alpha=self.skew_alpha,
            nll_weight=self.nll_weight,
            normalization=NORMALIZATIONS[self.normalization],
            temperature=self.temperature,
            inplace_backward=True,
        )


class DistillTrainer(AlignmentTrainer):
    """Minimises a divergence from a teacher.

    Logs `loss`, `divergence` and `nll` of the tokens that were trained on (nats a token, the NLL at the loss's
    temperature), `on_policy`, the share of updates on the student's own completions, and `num_tokens`. Evaluation is on
    the data.
    """

    args: DistillConfig

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: DistillConfig,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        teacher: PreTrainedModel | nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """As `AlignmentTrainer`; the rows are those of `SFTTrainer`.

        teacher: None takes `args.teacher_model`. It is not trained, and is moved to the run's device.
        """
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, **kwargs)
        if teacher is None and not args.teacher_model:
            raise ValueError("teacher_model must be a model's folder, or teacher a model; got neither")
        found: Any = load_model(str(args.teacher_model), args, "teacher_model") if teacher is None else teacher
        self._check_vocabulary(found)
        self.teacher = found.requires_grad_(False).eval().to(args.device)
        if args.fused_head:
            can_answer(self.teacher)
        self._own = False
        """Whether the update is on what the student wrote."""

    def _check_vocabulary(self, teacher: Any) -> None:
        ours, theirs = (m.get_output_embeddings().weight.shape[0] for m in (self.model, teacher))
        if ours != theirs:
            raise ValueError(
                f"teacher_model must have the student's vocabulary, of {ours} tokens, in which their distributions are "
                f"compared; got one of {theirs}"
            )

    @functools.cached_property
    def loss(self) -> DistillationLoss:
        """The loss of the configuration."""
        return self.args.loss()

    def check_model(self, model: nn.Module, args: DistillConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Switches dropout off, if so configured."""
        if args.disable_dropout:
            disable_dropout(model)

    def collator(self, args: DistillConfig, tokenizer: PreTrainedTokenizerBase) -> SFTCollator:
        return SFTCollator(pad_id(tokenizer), args.padding_side)

    def prepare(self, rows: Rows, args: DistillConfig, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        return tokenize_sft(rows, encoder(tokenizer, args))

    def items(self, batch: Batch) -> Tensor:
        return counted_items(batch, self.args.normalization)

    def batch_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        with torch.no_grad(), evaluating(self.teacher), self.compute_loss_context_manager():
            theirs = self.logits(self.teacher, batch)
            teacher: Any = theirs.head() if theirs.fused else theirs.logits()
        out = self.loss(self.logits(model, batch), batch["labels"], teacher, weights=batch.get("weights"))
        metrics = {"divergence": out.divergence, "nll": out.nll}
        if model.training:
            metrics["on_policy"] = torch.full_like(out.nll, float(self._own))
        return out.loss, metrics

    # ------------------------------------------------------------------------------------------- what is written
    def update_batches(self, batches: list[Batch]) -> list[Batch]:
        """The update's micro-batches: the data's, or with other completions after their prompts.

        What is decided, and every token drawn, depends on the seed, the update and the place in it alone, so a run
        that is resumed is the run that was not interrupted.
        """
        args, step = self.args, self.state.global_step
        self._own = bool(np.random.default_rng((args.seed, _DRAWS, step)).random() < args.lmbda)
        if not batches or not (self._own or args.seq_kd):
            return batches
        writer = self.accelerator.unwrap_model(self.model) if self._own else self.teacher
        with whole_weights(writer), evaluating(writer), self.compute_loss_context_manager():
            process = self.accelerator.process_index
            return [self._written(writer, batch, (step, process, i)) for i, batch in enumerate(batches)]

    @torch.no_grad()
    def _written(self, writer: Any, batch: Batch, place: tuple[int, ...]) -> Batch:
        """The batch with what a model writes after each prompt; rows that train nothing stay as they are."""
        rows = [r for r in range(len(batch["labels"])) if bool((batch["labels"][r] != IGNORE).any())]
        if FILLER in batch or not rows:
            return batch
        args: Any = self.args
        tokenizer: Any = self.processing_class
        prompts = [_prompt(batch, r) for r in rows]
        how = Sampling(args.max_new_tokens, len(rows), args.temperature)
        draws = np.random.default_rng((args.seed, _TOKENS, *place)).random((len(rows), how.max_new_tokens))
        padded = pad([(ids, []) for ids in prompts], pad_id(tokenizer), "left")
        tails = continuations(writer, tokenizer, padded, torch.from_numpy(draws), how)
        found = pad(list(zip(prompts, (t.ids for t in tails), strict=True)), pad_id(tokenizer), args.padding_side)
        device = batch["labels"].device
        return {name: x.to(device) for name, x in found.items()} | {k: batch[k] for k in (ROWS,) if k in batch}


def _prompt(batch: Batch, row: int) -> list[int]:
    """The real tokens before the first that is trained on."""
    first = int((batch["labels"][row] != IGNORE).int().argmax())
    real = batch["attention_mask"][row, : first + 1].bool()
    return batch["input_ids"][row, : first + 1][real].tolist()


def main(argv: list[str]) -> int:
    """The `fastalign distill` command."""
    return run("distill", DistillConfig, DistillTrainer, argv)
