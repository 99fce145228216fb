"""Checkpoints of sharded weights (FSDP) in the files that one process writes: whole, and in the same order.

Transformers writes FSDP's own files, which nothing but FSDP reads, and with sharded state dicts no model at all at the
end. Here the weights are gathered into `model.safetensors` and the optimiser's state into `optimizer.pt`, so that a run
may go on with another number of processes, sharded or not, and a saved model loads anywhere.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_OPTIMIZER, _SCHEDULER = "optimizer.pt", "scheduler.pt"
_ADAPTERS = "adapter_model.safetensors"


class WholeCheckpoints(Trainer):
    """Transformers' Trainer, but for what it saves and loads of sharded weights."""

    # Trainer declares them optional; where these methods run they are there.
    model: Any
    optimizer: Any
    lr_scheduler: Any

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Model and tokenizer; every process must call it."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        state = get_model_state_dict(self.model, options=_WHOLE)
        self._save(output_dir or self.args.output_dir, state_dict=state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = numbered(self.model, self.optimizer.optimizer)
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, _OPTIMIZER))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, _SCHEDULER))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_weights(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if not self.is_fsdp_enabled:
            super()._load_best_model()
            return
        load_weights(self.model, str(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        stored = torch.load(os.path.join(checkpoint, _OPTIMIZER), map_location="cpu", weights_only=True)
        load_numbered(self.model, self.optimizer.optimizer, stored)
        self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, _SCHEDULER), weights_only=True))


# ------------------------------------------------------------------------------------------------------------- weights
def load_weights(model: nn.Module, folder: str) -> None:
    """The weights (or the adapters) that `save_pretrained` wrote to the folder, into a sharded model.

    Raises ValueError if the folder's weights name none of the model's, or none are there.
    """
    adapters = os.path.join(folder, _ADAPTERS)
    state: dict[str, Any]
    if os.path.exists(adapters):
        state = {_with_adapter(name): value for name, value in load_file(adapters).items()}
    else:
        files = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
        state = {k: v for name in files for k, v in load_file(os.path.join(folder, name)).items()}
    result = set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=False))
    if not state or result.unexpected_keys:
        found = ", ".join(result.unexpected_keys[:3]) or "no weights"
        raise ValueError(f"{folder!r} must hold the weights of {type(model).__name__}; it holds {found}")


@contextlib.contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Sharded weights inside the module gathered for a while, so that no process waits for another to run it."""
    sharded = [m for m in module.modules() if isinstance(m, FSDPModule)]
    for part in sharded:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in sharded:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def _with_adapter(name: str) -> str:
    """Peft's files leave out the adapter's name, which stands before the last part of a parameter's name."""
    front, _, last = name.rpartition(".")
    return f"{front}.default.{last}"


# ----------------------------------------------------------------------------------------------------------- optimiser
def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The parameters' names in the optimiser's order, which is what its numbers stand for in a plain state dict."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return [known[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def numbered(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()` as one process would return it; every process must call it, the first one gets it."""
    whole: Any = get_optimizer_state_dict(model, optimizer, options=_WHOLE)
    numbers = {name: i for i, name in enumerate(_names(model, optimizer))}
    return {
        "state": {numbers[name]: state for name, state in whole.get("state", {}).items()},
        "param_groups": [
            {**group, "params": [numbers[name] for name in group["params"]]} for group in whole.get("param_groups", [])
        ],
    }


def load_numbered(model: nn.Module, optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Takes up what `numbered`, or a plain optimiser's `state_dict`, returned."""
    names = _names(model, optimizer)
    whole: Any = {
        "state": {names[i]: state for i, state in stored["state"].items()},
        "param_groups": [{**group, "params": [names[i] for i in group["params"]]} for group in stored["param_groups"]],
    }
    if whole["state"]:
        set_optimizer_state_dict(model, optimizer, whole, options=_WHOLE)
    else:  # torch's function finds the device from the state, of which plain SGD has none
        for group, saved in zip(optimizer.param_groups, stored["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
