"""One training command: what to load, where to continue from, train, evaluate, save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, set_seed

from ..data.encode import Encoder
from ..data.files import check_sources
from . import arguments
from .checkpoints import checkpoints, clear, start_point, write_json
from .config import COMMON, TrainingConfig

__all__ = ["checkpoints", "encoder", "make_room", "run", "start_point", "train"]


def encoder(tokenizer: PreTrainedTokenizerBase, args: TrainingConfig) -> Encoder:
    """Tokenisation as the configuration asks for it."""
    return Encoder(
        tokenizer,
        args.max_length,
        args.max_prompt_length,
        args.append_eos,
        args.chat_template_kwargs or {},
        truncation_mode=args.truncation_mode,
        skip_bad_rows=args.skip_bad_rows,
    )


# -------------------------------------------------------------------------------------------------------- a command
def run(command: str, config: type[TrainingConfig], trainer_class: Any, argv: list[str]) -> int:
    """Parses, trains, evaluates and saves: model, tokenizer, `log.jsonl` and `metrics.json` in `output_dir`."""
    needs = ("model", "dataset", "output_dir")
    args = arguments.parse(config, argv, command=command, needs=needs, common=COMMON)
    check_sources(args, ("dataset", "eval_dataset"))
    checkpoint = start_point(args)
    set_seed(args.seed)  # a fresh head is drawn while loading
    model, tokenizer = trainer_class.load(str(args.model), args)
    trainer = trainer_class(model, args, args.dataset, args.eval_dataset, tokenizer)
    make_room(trainer)
    train(trainer, checkpoint)
    if trainer.is_world_process_zero():
        print(f"saved to {args.output_dir}")
    return 0


def make_room(trainer: Any) -> None:
    """Removes an earlier run's checkpoints, if so configured, now that the trainer stands in every process."""
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        clear(trainer.args)
    trainer.accelerator.wait_for_everyone()


def train(trainer: Any, checkpoint: str | None = None) -> dict[str, float]:
    """Trains (from the checkpoint, if any), evaluates where there is evaluation data, saves. Returns all metrics."""
    metrics = dict(trainer.train(resume_from_checkpoint=checkpoint).metrics)
    if trainer.eval_dataset is not None:
        metrics.update(trainer.evaluate())
    # Training switches the cache off; a saved model is for generating.
    trainer.model.config.use_cache = True
    trainer.save_whole()
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / "metrics.json"
        write_json(path, {**metrics, **trainer.data_counts, "num_tokens": trainer.state.num_input_tokens_seen})
    return metrics
