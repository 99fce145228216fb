"""One training command: what to load, where to continue from, train, evaluate, save."""

from __future__ import annotations

import json
import os
import re
import shutil
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from . import arguments
from .config import COMMON, TrainingConfig
from .data.tokenize import Encoder

_STATE = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def load_model(path: str, args: TrainingConfig) -> PreTrainedModel:
    """The causal language model in that folder, with the dtype and attention that the configuration asks for."""
    options = {} if args.attn_implementation is None else {"attn_implementation": args.attn_implementation}
    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, args.dtype), **options)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id to fill with: the padding token, else the end-of-sequence token, else 0; masks never depend on it."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def encoder(tokenizer: PreTrainedTokenizerBase, args: TrainingConfig) -> Encoder:
    """Tokenisation as the configuration asks for it."""
    return Encoder(tokenizer, args.max_length, args.max_prompt_length, args.append_eos)


# ------------------------------------------------------------------------------------------------------ checkpoints
def checkpoints(output_dir: str) -> list[str]:
    """Whole checkpoints, oldest first. The trainer's state is written last, so where it can be read all is there."""
    found = []
    for name in os.listdir(output_dir) if os.path.isdir(output_dir) else ():
        match = _CHECKPOINT.fullmatch(name)
        if match and _is_whole(os.path.join(output_dir, name)):
            found.append((int(match[1]), os.path.join(output_dir, name)))
    return [path for _, path in sorted(found)]


def _is_whole(path: str) -> bool:
    try:
        with open(os.path.join(path, _STATE), encoding="utf-8") as file:
            json.load(file)
    except (OSError, json.JSONDecodeError):
        return False
    return True


def start_point(args: TrainingConfig) -> str | None:
    """The checkpoint to continue from, or None to start anew.

    Raises ValueError if the output folder holds checkpoints and the configuration says neither to continue nor to
    overwrite them, or if the checkpoint asked for is not whole.
    """
    output_dir = str(args.output_dir)
    present = checkpoints(output_dir)
    wanted = args.resume_from_checkpoint
    if wanted in (None, "false"):
        if present and not args.overwrite_output_dir:
            raise ValueError(
                f"output_dir {output_dir!r} holds {os.path.basename(present[-1])}: continue it with "
                "--resume_from_checkpoint auto, or start anew with --overwrite_output_dir true"
            )
        for path in present:
            shutil.rmtree(path)
        return None
    if wanted in ("auto", "true"):
        return present[-1] if present else None
    if not _is_whole(str(wanted)):
        raise ValueError(f"resume_from_checkpoint must be auto or a folder with a whole checkpoint; got {wanted!r}")
    return wanted


# -------------------------------------------------------------------------------------------------------- a command
def run(command: str, config: type[TrainingConfig], trainer_class: Any, argv: list[str]) -> int:
    """Parses, trains, evaluates and saves: model, tokenizer, `log.jsonl` and `metrics.json` in `output_dir`."""
    try:
        needs = ("model", "dataset", "output_dir")
        args = arguments.parse(config, argv, command=command, needs=needs, common=COMMON)
    except arguments.Helped as text:
        print(text)
        return 0
    checkpoint = start_point(args)
    path = str(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or path)
    trainer = trainer_class(load_model(path, args), args, args.dataset, args.eval_dataset, tokenizer)
    train(trainer, checkpoint)
    print(f"saved to {args.output_dir}")
    return 0


def train(trainer: Any, checkpoint: str | None = None) -> dict[str, float]:
    """Trains (from the checkpoint, if any), evaluates where there is evaluation data, saves. Returns all metrics."""
    metrics = dict(trainer.train(resume_from_checkpoint=checkpoint).metrics)
    if trainer.eval_dataset is not None:
        metrics.update(trainer.evaluate())
    # Training switches the cache off; a saved model is for generating.
    trainer.model.config.use_cache = True
    trainer.save_model()
    if trainer.is_world_process_zero():
        with open(os.path.join(trainer.args.output_dir, "metrics.json"), "w", encoding="utf-8") as file:
            json.dump({**metrics, "num_tokens": trainer.state.num_input_tokens_seen}, file, indent=1)
    return metrics
