"""What Python hands a trainer: checked, loaded where it is a folder, and answered where other libraries take it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

from ...models.lora import is_adapted

_INSTEAD = {
    "tokenizer": "processing_class is its name",
    "compute_metrics": "logits are never held whole, so that there is nothing to compute it from; a callback's "
    "on_evaluate gets the metrics, and `fastalign eval` compares models",
    "preprocess_logits_for_metrics": "logits are never held whole",
    "data_collator": "rows are collated by the trainer, so that labels are aligned as its loss needs them",
    "formatting_func": "give rows in one of the forms that the documentation of `data.tokenize` lists",
    "reward_funcs": "reward takes a function, or a list of them",
    "reward_processing_classes": "a reward model's tokenizer is the one in its folder",
    "model_init": "give the model, or its folder",
    "callbacks": "log.jsonl and the trackers of report_to hold every line; call `step` in a loop of your own for more",
    "optimizers": "learning_rate, lr_scheduler_type and the adam_* keys of args describe the optimiser",
    "rollout_func": "responses are sampled by the trainer itself",
    "environment_factory": "responses are sampled by the trainer itself",
}


def refuse_others(trainer: Any, others: Mapping[str, Any]) -> None:
    """TypeError saying what to use instead of the first argument that is not None; None says nothing."""
    for name, value in others.items():
        if value is not None:
            what = _INSTEAD.get(name, "it has no such argument")
            raise TypeError(f"{type(trainer).__name__} does not take {name}: {what}")


def check_config(trainer: Any, args: Any) -> None:
    """TypeError unless args is the trainer's own configuration."""
    owner = next(c for c in type(trainer).__mro__ if "args" in inspect.get_annotations(c))
    named: Any = inspect.get_annotations(owner)["args"]
    wanted = getattr(sys.modules[owner.__module__], named) if isinstance(named, str) else named
    if not isinstance(args, wanted):
        got = "None" if args is None else type(args).__name__
        hint = "; reward functions are given by name, reward=..." if callable(args) or isinstance(args, list) else ""
        raise TypeError(
            f'args must be a {wanted.__name__}, such as {wanted.__name__}(output_dir="runs/x"); got {got}{hint}'
        )


def model_given(model: Any, args: Any) -> Any:
    """The model, or the folder that args names for None. ValueError if neither is there."""
    if model is None and args.model is None:
        raise ValueError("model must be a model or its folder, here or in args.model; got None")
    return args.model if model is None else model


def with_peft_config(model: Any, peft_config: Any, args: Any) -> Any:
    """The model with the adapters that a peft configuration describes, if there is one.

    ValueError if the model has adapters already, or args ask for some.
    """
    if peft_config is None:
        return model
    if args.lora_rank or is_adapted(model):
        other = f"lora_rank={args.lora_rank}" if args.lora_rank else "a model with adapters"
        raise ValueError(f"peft_config must be None where adapters come from {other}")
    from peft import get_peft_model

    return get_peft_model(model, peft_config)
