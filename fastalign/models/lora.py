"""LoRA through peft: adapters on at training, off for the reference, merged into plain weights at the end."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from typing import Any

from transformers import set_seed

from ..utils import environment


def is_adapted(model: Any) -> bool:
    """Whether the model is a peft model. peft is only imported where it could have made one."""
    if importlib.util.find_spec("peft") is None:
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def with_lora(model: Any, args: Any, task: str) -> Any:
    """The model with fresh adapters (drawn from the seed), if the configuration asks for them and it has none yet.

    Args:
        model: a transformers model.
        args: `lora_rank` (0: no adapters), `lora_alpha`, `lora_dropout`, `lora_target_modules`, `seed`.
        task: peft's name of the task: CAUSAL_LM, or SEQ_CLS, whose score head is trained whole.

    Raises:
        ValueError: adapters are asked for and peft is not installed, or there is no such module, or they would have to
            be merged at the end into weights that are sharded (FSDP).
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "model holds adapters that transformers has put beside its weights, which can be neither trained nor saved "
            "here: give the folder itself, or load it with peft's AutoPeftModelForCausalLM"
        )
    if not args.lora_rank and not is_adapted(model):
        return model
    if importlib.util.find_spec("peft") is None:
        raise ValueError("lora_rank needs the package peft: pip install peft")
    if args.lora_merge and (getattr(args, "fsdp", None) or environment.launched_with_fsdp()):
        raise ValueError("lora_merge must be false with FSDP, whose shards cannot be merged into; got true")
    if is_adapted(model):
        return model
    from peft import LoraConfig, get_peft_model

    set_seed(args.seed)
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules or "all-linear",
        task_type=task,
    )
    return get_peft_model(model, config)


def starts_at_base(model: Any) -> bool:
    """Whether a model with adapters is, as it is now, the model without: LoRA's second matrices are all 0.

    Then the model without is the reference of a run that begins here; of adapters that have been trained it is not.
    """
    if not is_adapted(model):
        return False
    second = [p for name, p in model.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
    return bool(second) and not any(p.detach().any() for p in second)


def adapters_off(model: Any) -> contextlib.AbstractContextManager:
    """The model as it was before its adapters; nothing to do for a model without."""
    while hasattr(model, "module"):
        model = model.module
    return model.disable_adapter() if is_adapted(model) else contextlib.nullcontext()


def merged(model: Any) -> Any:
    """A copy of the model with its adapters added to the weights: a plain transformers model."""
    whole = copy.deepcopy(model)
    return whole.merge_and_unload()
