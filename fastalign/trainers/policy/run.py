"""The commands `ppo` and `grpo`: parse, train, save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..common import arguments
from ..common.checkpoints import write_json
from ..common.run import make_room, start_point
from ..data.files import check_sources
from .config import PolicyConfig


def run_policy(command: str, config: type[PolicyConfig], trainer_class: Any, argv: list[str]) -> int:
    """Parses, trains and saves: model, tokenizer, value function, `log.jsonl` and `metrics.json` in `output_dir`."""
    args: Any = arguments.parse(config, argv, command=command, needs=("model", "dataset", "output_dir"))
    check_sources(args, ("dataset", "eval_dataset", "ptx_dataset"))
    checkpoint = start_point(args)
    trainer = trainer_class(None, args, args.dataset, args.eval_dataset)
    make_room(trainer)
    metrics = trainer.train(checkpoint)
    trainer.save_model()
    if trainer.accelerator.is_main_process:
        write_json(Path(args.output_dir) / "metrics.json", {**metrics, **trainer.data_counts})
        print(f"saved to {args.output_dir}")
    return 0
