"""The reference that a loss compares the policy with: precomputed and kept on disk, frozen, or moving (TR-DPO).

A moving reference follows the policy every `ref_model_sync_steps` updates, `ref = a policy + (1 - a) ref` with
a = `ref_model_mixup_alpha`: TR-DPO (Gorbatovski et al. 2024, arXiv:2404.09656), soft below 1 and hard at 1. It is part
of a checkpoint, so that a run that goes on has the reference that it had.
"""

from __future__ import annotations

import contextlib
import copy
import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ...losses.base import check_range
from ...models.loading import load_model
from ...models.lora import adapters_off, is_adapted, starts_at_base
from ...utils.batch import Batch
from ...utils.checks import check_positive
from ...utils.modes import evaluating
from . import ref_cache
from .arguments import Keys, key
from .base import AlignmentTrainer

_FILE = "reference.safetensors"


@dataclass
class ReferenceKeys(Keys):
    """Where the reference comes from, and whether it moves."""

    ref_model: str | None = key(None, "Folder of the reference model, if not the model itself", group="Reference")
    precompute_ref_log_probs: bool | None = key(
        None,
        "Compute the reference's log-probabilities once, before training; by default unless sync_ref_model",
        group="Reference",
    )
    cache_ref_log_probs: bool = key(
        True, "Keep them on disk, keyed by the reference's weights and the data, for runs to come", group="Reference"
    )
    precompute_ref_batch_size: int | None = key(
        None, "Rows in a batch of that computation; the evaluation's batch size by default", group="Reference"
    )
    sync_ref_model: bool = key(False, "Let the reference follow the model (TR-DPO)", group="Reference")
    ref_model_mixup_alpha: float = key(
        0.6, "Share of the model in the reference that follows it; 1 replaces it", group="Reference"
    )
    ref_model_sync_steps: int = key(512, "Updates from one such step to the next", group="Reference")

    @property
    def precomputes(self) -> bool:
        """Whether the reference's log-probabilities are computed before training."""
        return not self.sync_ref_model if self.precompute_ref_log_probs is None else self.precompute_ref_log_probs

    def check_reference(self, uses_reference: bool = True) -> None:
        """ValueError for keys that do not go together or are out of range."""
        if self.precompute_ref_batch_size is not None:
            check_positive("precompute_ref_batch_size", self.precompute_ref_batch_size)
        check_range("ref_model_mixup_alpha", self.ref_model_mixup_alpha, 0.0, 1.0, open_low=True)
        check_positive("ref_model_sync_steps", self.ref_model_sync_steps)
        if not self.sync_ref_model:
            return
        if not uses_reference:
            raise ValueError("sync_ref_model moves a reference, and this loss uses none; leave it out")
        if self.precompute_ref_log_probs:
            raise ValueError(
                "precompute_ref_log_probs must be false with sync_ref_model: a reference that moves has other "
                "log-probabilities after each step"
            )
        if getattr(self, "lora_rank", 0):
            raise ValueError("lora_rank must be 0 with sync_ref_model, which mixes whole weights; adapters have none")


class ReferenceTrainer(AlignmentTrainer):
    """Base of the trainers with a reference. Subclasses say what sums they need of it, by `reference_sums`."""

    reference_columns: tuple[str, ...]
    """Columns of precomputed log-probabilities; a batch has them under these names."""
    reference_ids: tuple[tuple[str, str], ...]
    """Columns of token ids that the sums depend on, and of which of their tokens are trained on (`x_ids`, `x_own`)."""

    ref_model: nn.Module | None = None

    @abstractmethod
    def reference_sums(self, model: nn.Module, batch: Batch) -> Sequence[Tensor]:
        """[B] by this model, one for each of `reference_columns`."""

    def reference_settings(self) -> dict[str, Any]:
        """What else the sums depend on."""
        return {name: getattr(self.args, name) for name in ("bf16", "fp16", "attn_implementation")}

    def set_reference(self, ref_model: nn.Module | None) -> None:
        """Attaches the reference's log-probabilities to the data, or keeps a frozen reference model for each step."""
        args: Any = self.args
        given: Any = [rows for rows in self.all_rows().values() if rows is not None]
        if args.sync_ref_model:
            self._check_moving()
        elif all(self.reference_columns[0] in rows.column_names for rows in given):
            return
        if ref_model is None and args.ref_model:
            ref_model = load_model(args.ref_model, args, "ref_model")
        if args.precomputes:
            reference: Any = self.model if ref_model is None else ref_model
            self.train_dataset = self._with_reference(reference, self.train_dataset)
            sets: Any = self.eval_dataset
            if isinstance(sets, dict):
                self.eval_dataset = {name: self._with_reference(reference, rows) for name, rows in sets.items()}
            else:
                self.eval_dataset = self._with_reference(reference, sets)
        elif ref_model is not None or not starts_at_base(self.model):
            own: Any = copy.deepcopy(self.model) if ref_model is None else ref_model
            self.ref_model = own.requires_grad_(False).eval().to(args.device)
        if args.sync_ref_model:
            self._check_alike()
            self.add_callback(_Follower(self))

    def sums_of_reference(self, model: nn.Module, batch: Batch) -> Sequence[Tensor]:
        """The reference's sums: those that the batch brings, else by the model that is held, or without adapters."""
        if self.reference_columns[0] in batch:
            return [batch[name] for name in self.reference_columns]
        with torch.no_grad(), contextlib.ExitStack() as stack:
            reference = self.ref_model
            if reference is None:
                stack.enter_context(adapters_off(model))
                reference = model
            return self.reference_sums(reference, batch)

    # ------------------------------------------------------------------------------------------------ precomputed
    def _with_reference(self, reference: nn.Module, rows: Any) -> Any:
        """The rows with the reference's sums, computed now or by an earlier run."""
        if rows is None or self.reference_columns[0] in rows.column_names:
            return rows
        if self.args.cache_ref_log_probs:  # type: ignore[attr-defined]
            ids = ["prompt_ids", *(name for name, _ in self.reference_ids)]
            own = [name for _, name in self.reference_ids]
            if any(not all(mask) for name in own for mask in rows[name]):
                ids += own  # of which it depends as well what a sum is over
            key = ref_cache.key_of(reference, rows, ids, self.reference_settings())
            names = [name.removeprefix("ref_").removesuffix("_logps") for name in self.reference_columns]
            columns = ref_cache.cached(key, lambda: self._compute_reference(reference, rows), names)
        else:
            columns = self._compute_reference(reference, rows)
        for name, column in zip(self.reference_columns, columns, strict=True):
            rows = rows.add_column(name, column)
        return rows

    @torch.no_grad()
    def _compute_reference(self, reference: nn.Module, rows: Any) -> ref_cache.Columns:
        """Log-probabilities of every row by the reference in evaluation mode."""
        args: Any = self.args
        size = args.precompute_ref_batch_size or args.per_device_eval_batch_size
        columns: ref_cache.Columns = [[] for _ in self.reference_columns]
        loader = DataLoader(rows, batch_size=size, collate_fn=self.data_collator)  # type: ignore[arg-type]
        with _placed_for_now(reference, args.device):
            for batch in tqdm(loader, desc="reference log-probs", disable=args.disable_tqdm):
                batch = self._prepare_inputs(batch)
                off = adapters_off(reference) if starts_at_base(reference) else contextlib.nullcontext()
                with evaluating(reference), self.accelerator.autocast(), off:
                    sums = self.reference_sums(reference, batch)
                for column, found in zip(columns, sums, strict=True):
                    column += found.tolist()
        return columns

    # ----------------------------------------------------------------------------------------------------- moving
    def _check_moving(self) -> None:
        if is_adapted(self.model):
            raise ValueError("sync_ref_model mixes whole weights; the model has adapters, which the reference has not")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("sync_ref_model needs the model's weights whole in every process; here they are sharded")
        for name, rows in self.all_rows().items():
            if rows is not None and self.reference_columns[0] in rows.column_names:
                raise ValueError(
                    f"{name} must not have the column {self.reference_columns[0]} with sync_ref_model: a reference "
                    "that moves has other log-probabilities after each step"
                )

    def _check_alike(self) -> None:
        ours, theirs = ({n: p.shape for n, p in m.named_parameters()} for m in (self.model, self.held_reference))
        if ours != theirs:
            names = sorted(name for name, _ in set(ours.items()) ^ set(theirs.items()))
            raise ValueError(f"ref_model must have the model's weights with sync_ref_model; they differ in {names[0]}")

    @property
    def held_reference(self) -> nn.Module:
        """The reference model that is held in memory. ValueError where there is none."""
        if self.ref_model is None:
            raise ValueError("there is no reference model in memory")
        return self.ref_model

    @torch.no_grad()
    def move_reference(self) -> None:
        """One step of the reference towards the model."""
        share = self.args.ref_model_mixup_alpha  # type: ignore[attr-defined]
        model = self.accelerator.unwrap_model(self.model)
        for moved, own in zip(self.held_reference.parameters(), model.parameters(), strict=True):
            if share == 1:
                moved.copy_(own)
            else:
                moved.mul_(1 - share).add_(own, alpha=share)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.sync_ref_model and self.args.should_save:  # type: ignore[attr-defined]
            # Tied weights are one parameter: each is written once.
            weights = {name: p.detach().cpu().contiguous() for name, p in self.held_reference.named_parameters()}
            save_file(weights, os.path.join(output_dir, _FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self.args.sync_ref_model:  # type: ignore[attr-defined]
            return
        path = os.path.join(checkpoint, _FILE)
        if not os.path.exists(path):
            raise ValueError(f"{checkpoint} must hold {_FILE} to go on with sync_ref_model; it is of a run without")
        weights = load_file(path)
        with torch.no_grad():
            for name, moved in self.held_reference.named_parameters():
                moved.copy_(weights[name])


class _Follower(TrainerCallback):
    """Moves the reference every so many updates."""

    def __init__(self, trainer: ReferenceTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.ref_model_sync_steps == 0:
            self.trainer.move_reference()


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
