"""Checkpoints of a run that resume it to the bit: written beside the others and renamed when they are whole.

A checkpoint is a folder in which transformers finds the policy, with the value function, the optimiser's and the
schedule's state, the controllers, the counters and every process's random generators around it. Weights and optimiser
state are stored whole and by name, so that a run may go on with another number of processes, sharded or not.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from ...models.lora import is_adapted, merged
from ..common.checkpoints import PARTIAL, publish, seal, write_json, writing
from ..common.finite import refuse_bad_weights

_OPTIMIZER, _STATE = "optimizer.pt", "trainer_state.json"
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass
class RunState:
    """What the run has done so far."""

    global_step: int = 0
    episodes: int = 0
    num_tokens: int = 0
    updates: int = 0
    best_score: float | None = None
    best_step: int | None = None
    is_world_process_zero: bool = True


def rng_state() -> dict[str, Any]:
    """The state of every random generator that anything here, or a reward function, may draw from."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Takes up what `rng_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])  # of a machine that had more of them


def save_policy(trainer: Any, folder: str, *, merge: bool = False) -> None:
    """Policy, value function and tokenizer, all in one folder. Every process must call it; the first one writes.

    merge: add adapters to the weights, so that what is saved is a plain model.

    FloatingPointError if the weights hold NaN or +inf.
    """
    refuse_bad_weights(trainer.model, trainer.accelerator, f"the model in {folder}")
    state = get_model_state_dict(trainer.model, options=_WHOLE)
    if trainer.accelerator.is_main_process:
        os.makedirs(folder, exist_ok=True)
        trainer.inner.save(folder, state)
        if merge and is_adapted(trainer.inner.policy):
            for name in ("adapter_model.safetensors", "adapter_config.json"):
                os.remove(os.path.join(folder, name))
            merged(trainer.inner.policy).save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()


def save_whole(trainer: Any, folder: str, *, resumable: bool = True) -> None:
    """Writes the folder beside its place and renames it when all of it is there."""
    accelerator = trainer.accelerator
    parent, name = os.path.split(folder)
    partial = os.path.join(parent, PARTIAL, name)
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        os.makedirs(partial)
    accelerator.wait_for_everyone()
    with writing(folder, partial):
        save_policy(trainer, partial)
        if resumable:
            torch.save(rng_state(), os.path.join(partial, _rng(accelerator.process_index)))
            optimizer = get_optimizer_state_dict(trainer.model, trainer.optimizer.optimizer, options=_WHOLE)
            if accelerator.is_main_process:
                state = {"optimizer": optimizer, "scheduler": trainer.scheduler.state_dict()}
                torch.save(state, os.path.join(partial, _OPTIMIZER))
        if accelerator.is_main_process:
            write_json(Path(partial) / _STATE, trainer.state_dict())
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            seal(partial)
            _sync(partial)
            publish(partial, folder)
    accelerator.wait_for_everyone()


def _sync(folder: str) -> None:
    """Asks the system to put the files on the disk before the rename says that they are there."""
    for place, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(place, name), "rb") as file:
                os.fsync(file.fileno())


def _rng(process: int) -> str:
    return f"rng-{process}.pt"


def load_training_state(trainer: Any, folder: str) -> None:
    """Optimiser, schedule, controllers, counters and random generators; the weights are loaded before they are wrapped.

    A process that the checkpoint knows no generators of (it was written by fewer) keeps its own.
    """
    stored = torch.load(os.path.join(folder, _OPTIMIZER), map_location="cpu", weights_only=True)
    set_optimizer_state_dict(trainer.model, trainer.optimizer.optimizer, stored["optimizer"], options=_WHOLE)
    trainer.scheduler.load_state_dict(stored["scheduler"])
    with open(os.path.join(folder, _STATE), encoding="utf-8") as file:
        trainer.load_state_dict(json.load(file))
    own = os.path.join(folder, _rng(trainer.accelerator.process_index))
    if os.path.exists(own):
        set_rng_state(torch.load(own, map_location="cpu", weights_only=False))
