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

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..losses.preference import DPOLoss
from ..models.loading import disable_dropout, load_model, pad_id
from ..models.lora import adapters_off, starts_at_base
from ..utils.batch import IGNORE, Batch
from ..utils.checks import check_positive
from ..utils.modes import evaluating
from .common import ref_cache
from .common.arguments import key
from .common.base import AlignmentTrainer, Metrics, Weighted
from .common.config import GroupsConfig
from .common.preference_callback import PreferenceWatch
from .common.run import encoder, run
from .data.collate import PreferenceCollator
from .data.files import Rows
from .data.tokenize import REFERENCE_COLUMNS, tokenize_preferences

_LOSS_KEYS = (
    "beta",
    "loss_type",
    "label_smoothing",
    "length_alpha",
    "average",
    "f_divergence",
    "f_alpha",
    "simpo_gamma",
    "alphapo_alpha",
    "nll_weight",
    "nll_normalization",
    "dpop_lambda",
    "discopop_tau",
    "use_weighting",
    "ld_alpha",
)


@dataclass
class DPOConfig(GroupsConfig):
    """Direct preference optimisation on rows of `prompt`, `chosen` and `rejected`."""

    beta: float = key(0.1, "Strength of the pull towards the reference", group="Loss")
    loss_type: str | list[str] | dict[str, float] = key(  # noqa: RUF009 (it makes a dataclasses.field)
        "sigmoid",
        "Variant of the loss; a list of them, or variants with weights (an unknown name lists all)",
        group="Loss",
    )
    label_smoothing: float = key(0.0, "Assumed share of flipped labels (conservative and robust DPO)", group="Loss")
    length_alpha: float = key(0.0, "Penalty for length, in nats a token (DPO-R)", group="Loss")
    average: bool = key(False, "Use means per token instead of sums (length-normalised DPO)", group="Loss")
    f_divergence: str = key("reverse_kl", "Divergence that holds the policy to the reference", group="Loss")
    f_alpha: float = key(0.5, "Parameter of the alpha-divergence", group="Loss")
    simpo_gamma: float = key(0.5, "Target margin of SimPO and AlphaPO", group="Loss")
    alphapo_alpha: float = key(0.25, "AlphaPO's alpha; 0 is SimPO", group="Loss")
    nll_weight: float = key(1.0, "Weight of the chosen completions' NLL in the losses that have one", group="Loss")
    nll_normalization: str = key("token", "That NLL is averaged over: token, sequence or sum", group="Loss")
    dpop_lambda: float = key(50.0, "Weight of DPO-Positive's penalty", group="Loss")
    discopop_tau: float = key(0.05, "Temperature of DiscoPOP", group="Loss")
    use_weighting: bool = key(
        False, "Weigh each pair by how likely the policy would have written it itself (WPO)", group="Loss"
    )
    ld_alpha: float | None = key(
        None, "Weight of log-probabilities beyond the shorter length of a pair (LD-DPO); null: all alike", group="Loss"
    )
    disable_dropout: bool = key(True, "Train without dropout, so that policy and reference start equal", group="Loss")
    reference_free: bool = key(False, "Take the reference as uniform: no reference model at all", group="Reference")
    ref_model: str | None = key(None, "Folder of the reference model, if not the model itself", group="Reference")
    precompute_ref_log_probs: bool = key(
        True, "Compute the reference's log-probabilities once, before training", group="Reference"
    )
    cache_ref_log_probs: bool = key(
        True, "Keep them on disk, keyed by the reference's weights and the data, for runs to come", group="Reference"
    )
    precompute_ref_batch_size: int | None = key(
        None, "Pairs in a batch of that computation; the evaluation's batch size by default", group="Reference"
    )
    learning_rate: float = key(1e-6, "Peak learning rate", group="Training loop")

    def __post_init__(self) -> None:
        self.loss()
        if self.precompute_ref_batch_size is not None:
            check_positive("precompute_ref_batch_size", self.precompute_ref_batch_size)
        super().__post_init__()

    def loss(self) -> DPOLoss:
        """The loss that these keys describe; ValueError naming the key that is wrong."""
        return DPOLoss(inplace_backward=True, **{name: getattr(self, name) for name in _LOSS_KEYS})

    @property
    def uses_reference(self) -> bool:
        """False for the losses without a reference (SimPO, CPO, ORPO), and for any other with `reference_free`."""
        return not self.reference_free and self.loss().options.honours("reference")


_METRICS = {
    "rewards/chosen": "chosen_rewards",
    "rewards/rejected": "rejected_rewards",
    "rewards/margins": "margins",
    "rewards/accuracies": "accuracies",
    "logps/chosen": "chosen_logps",
    "logps/rejected": "rejected_logps",
}


class DPOTrainer(AlignmentTrainer):
    """Minimises a pairwise preference loss.

    Logs `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `rewards/accuracies` (strictly greater),
    `logps/chosen`, `logps/rejected` (nats a sequence), `lengths/*` and `num_tokens`. The chosen reward may fall while
    the margin rises (the loss only looks at the difference), and longer outputs may win: `PreferenceWatch` says so.
    """

    args: DPOConfig

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
        self.ref_model: nn.Module | None = None
        self.loss = args.loss()
        if args.uses_reference:
            self._set_reference(ref_model)
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
        chosen, rejected = self._reference_logps(model, batch)
        out = self.loss(
            self.logits(model, batch), batch["labels"], ref_chosen_logps=chosen, ref_rejected_logps=rejected
        )
        metrics = {name: getattr(out, field).mean() for name, field in _METRICS.items()}
        return out.loss, {**metrics, **_lengths(batch["labels"], out.margins)}

    # ------------------------------------------------------------------------------------------------- reference
    def _set_reference(self, ref_model: nn.Module | None) -> None:
        """Attaches the reference's log-probabilities to the data, or keeps a frozen reference model for each step."""
        given: Any = [rows for rows in self.all_rows().values() if rows is not None]
        if all(REFERENCE_COLUMNS[0] in rows.column_names for rows in given):
            return
        if ref_model is None and self.args.ref_model:
            ref_model = load_model(self.args.ref_model, self.args, "ref_model")
        if self.args.precompute_ref_log_probs:
            reference: Any = self.model if ref_model is None else ref_model
            self.train_dataset = self._with_reference(reference, self.train_dataset)
            sets: Any = self.eval_dataset
            if isinstance(sets, dict):
                self.eval_dataset = {name: self._with_reference(reference, rows) for name, rows in sets.items()}
            else:
                self.eval_dataset = self._with_reference(reference, sets)
        elif ref_model is not None or not starts_at_base(self.model):
            own: Any = copy.deepcopy(self.model) if ref_model is None else ref_model
            self.ref_model = own.requires_grad_(False).eval().to(self.args.device)

    def _with_reference(self, reference: nn.Module, rows: Any) -> Any:
        """The rows with `ref_chosen_logps` and `ref_rejected_logps`, computed now or by an earlier run."""
        if rows is None or REFERENCE_COLUMNS[0] in rows.column_names:
            return rows
        if self.args.cache_ref_log_probs:
            ids, own = ["prompt_ids", "chosen_ids", "rejected_ids"], ["chosen_own", "rejected_own"]
            if any(not all(mask) for name in own for mask in rows[name]):
                ids += own  # of which it depends as well what a sum is over
            precision = {name: getattr(self.args, name) for name in ("bf16", "fp16", "attn_implementation")}
            if self.args.ld_alpha is not None:
                precision["ld_alpha"] = self.args.ld_alpha
            key = ref_cache.key_of(reference, rows, ids, precision)
            columns = ref_cache.cached(key, lambda: self._compute_reference(reference, rows))
        else:
            columns = self._compute_reference(reference, rows)
        for name, column in zip(REFERENCE_COLUMNS, columns, strict=True):
            rows = rows.add_column(name, column)
        return rows

    @torch.no_grad()
    def _compute_reference(self, reference: nn.Module, rows: Any) -> ref_cache.Columns:
        """Log-probabilities of every completion by the reference in evaluation mode."""
        size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
        columns: ref_cache.Columns = ([], [])
        loader = DataLoader(rows, batch_size=size, collate_fn=self.data_collator)  # type: ignore[arg-type]
        with _placed_for_now(reference, self.args.device):
            for batch in tqdm(loader, desc="reference log-probs", disable=self.args.disable_tqdm):
                batch = self._prepare_inputs(batch)
                off = adapters_off(reference) if starts_at_base(reference) else contextlib.nullcontext()
                with evaluating(reference), self.accelerator.autocast(), off:
                    logps = self.loss.reference_logps(self.logits(reference, batch), batch["labels"])
                for column, half in zip(columns, logps.chunk(2), strict=True):
                    column += half.tolist()
        return columns

    def _reference_logps(self, model: nn.Module, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """[B] each; None each without a reference."""
        if not self.args.uses_reference:
            return None, None
        if REFERENCE_COLUMNS[0] in batch:
            return batch["ref_chosen_logps"], batch["ref_rejected_logps"]
        with torch.no_grad(), contextlib.ExitStack() as stack:
            reference = self.ref_model
            if reference is None:
                stack.enter_context(adapters_off(model))
                reference = model
            logps = self.loss.reference_logps(self.logits(reference, batch), batch["labels"])
            chosen, rejected = logps.chunk(2)
        return chosen, rejected


@contextlib.contextmanager
def _placed_for_now(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model on the device, and back. Transformers leaves one on the CPU until training starts that FSDP will shard,
    or that is only evaluated, in 16 bits."""
    before = next((p.device for p in model.parameters()), device)
    if before.type == device.type:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(before)


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
