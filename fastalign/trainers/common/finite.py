"""Runs that diverge stop where they do: no step is taken on a gradient that is not finite, no model of NaN is saved.

Everything up to the last good update is kept in a checkpoint, and the error names the rows of the update that failed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from ...utils.batch import Batch
from .even import ROWS
from .sharding import WholeCheckpoints

_NAMED = 16


def name_rows(rows: Iterable[int], key: str = "dataset") -> str:
    """Which rows, for a message: each once, in their order, the first few by number."""
    numbers = sorted(set(rows))
    if not numbers:
        return f"rows of {key} that are not known by number"
    more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    return f"row{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:_NAMED]))}{more} (from 0) of {key}"


def bad_weights(model: nn.Module) -> list[str]:
    """Names of the parameters that hold NaN or +inf; of sharded ones this process sees its own part.

    -inf is let pass: some models mask the padding of their vocabulary with it.
    """
    local = ((name, getattr(p.detach(), "_local_tensor", p.detach())) for name, p in model.named_parameters())
    return [name for name, p in local if p.is_floating_point() and bool((p.isnan() | p.isposinf()).any())]


def refuse_bad_weights(model: nn.Module, accelerator: Any, what: str) -> None:
    """FloatingPointError, in every process alike, if the weights hold NaN or +inf: they must not be saved as `what`."""
    bad = bad_weights(model)
    if accelerator.num_processes > 1:
        bad = gather_object(bad)
    if bad:
        raise FloatingPointError(
            f"{what} was not written, and what was there stays: the model has diverged, {bad[0]} holds NaN or inf. "
            "Start again, or from an earlier checkpoint, with a lower learning_rate"
        )


class CheckedUpdates(WholeCheckpoints):
    """Transformers' Trainer, but that it stops before an update that would ruin the model, and saves no ruined one."""

    _rows: Sequence[Sequence[int]] = ()
    """Numbers of the training rows in each micro-batch of the update."""
    _losses: Sequence[Tensor] = ()
    """Their losses so far."""
    _tokens_before = 0

    def note_update(self, batches: Sequence[Batch]) -> None:
        """Takes the rows' numbers out of the micro-batches of an update that begins."""
        self._rows = [batch.pop(ROWS).tolist() if ROWS in batch else [] for batch in batches]
        self._losses = []
        self._tokens_before = int(self.state.num_input_tokens_seen)

    def note_loss(self, loss: Tensor) -> None:
        """Remembers the loss of one micro-batch."""
        self._losses = [*self._losses, loss.detach()]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm, before the optimiser's step; one that is not finite ends the run here.

        With float16 the scaler skips such steps and lowers its scale; there a loss that is not finite ends the run.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaled = getattr(self.accelerator, "scaler", None) is not None
        seen = torch.stack([x.float() for x in self._losses]).sum() if scaled and self._losses else norm
        value = float(seen.full_tensor() if hasattr(seen, "full_tensor") else seen)
        if not math.isfinite(value):
            self._stop(model, f"the loss is {value}" if scaled else f"the gradient's norm is {value}")
        return norm

    def _stop(self, model: Any, why: str) -> None:
        """Keeps what was reached and raises FloatingPointError; every process comes here alike."""
        step = self.state.global_step
        model.zero_grad()
        self.state.num_input_tokens_seen = self._tokens_before
        bad = [rows for rows, loss in zip(self._rows, self._losses, strict=False) if not math.isfinite(float(loss))]
        found = gather_object([([i for rows in bad for i in rows], [i for rows in self._rows for i in rows])])
        culprits = [i for rows, _ in found for i in rows]
        whole = [i for _, rows in found for i in rows]
        where = f"the loss is not finite among {name_rows(culprits)}" if culprits else f"it is of {name_rows(whole)}"
        raise FloatingPointError(f"update {step + 1} was not made: {why}; {where}. {self._kept(model)}")

    def _kept(self, model: Any) -> str:
        """Saves a checkpoint of the updates so far, if that is any use; says what there is."""
        step, folder = self.state.global_step, f"checkpoint-{self.state.global_step}"
        if step == 0:
            return "It is the first one: nothing has changed"
        try:
            refuse_bad_weights(self.model, self.accelerator, folder)
        except FloatingPointError as error:
            return str(error)
        if not os.path.isdir(os.path.join(str(self.args.output_dir), folder)):
            self._save_checkpoint(model, trial=None)
        return f"{folder} holds the run up to there: --resume_from_checkpoint auto goes on from it"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Model and tokenizer; every process must call it. FloatingPointError if the model holds NaN or +inf."""
        refuse_bad_weights(self.model, self.accelerator, f"the model in {output_dir or self.args.output_dir}")
        super().save_model(output_dir, _internal_call)
