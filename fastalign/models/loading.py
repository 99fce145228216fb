"""Models and tokenizers from folders or hub names, with errors that name the key that gave them."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..head.products import advice
from ..utils.text import first_line
from .adapters import holds_adapters, load_adapted

CONFIGS = {"config.json", "adapter_config.json"}
"""Files of which a folder with a model, or with adapters of one, holds one."""


def model_options(args: Any) -> dict[str, Any]:
    """What from_pretrained is told of dtype and attention."""
    said = advice(getattr(torch, args.dtype))
    if said is not None:
        warnings.warn(f"dtype={args.dtype}: {said}", stacklevel=3)
    attention = {} if args.attn_implementation is None else {"attn_implementation": args.attn_implementation}
    return {"dtype": getattr(torch, args.dtype), **attention}


def load(key: str, kind: Any, path: str, *, adapters: str = "merge", **options: Any) -> Any:
    """What one of transformers' Auto classes loads from the folder, or hub's name, that a key gave.

    A folder of adapters stands for the model that they are on: see `adapters`, where `adapters` says what becomes of
    them; other modes than "merge" need some.

    Raises:
        ValueError: nothing there, or nothing of this kind; naming the key.
    """
    path = os.path.expanduser(path)
    local = path.startswith((".", "/", "~")) or path.count("/") > 1 or os.path.exists(path)
    if local and not os.path.isdir(path):
        raise ValueError(f"{key} must be a model's folder or a hub's name; there is no folder {path!r}")
    adapted = kind is not AutoTokenizer and holds_adapters(path)
    if adapters != "merge" and not adapted:
        raise ValueError(f"adapters={adapters} needs a {key} that is a folder of adapters; {path!r} is none")
    try:
        return load_adapted(kind, path, adapters, **options) if adapted else kind.from_pretrained(path, **options)
    except ImportError:  # a package that an option needs: the command names it
        raise
    except Exception as error:  # each kind of damaged file raises its own
        if os.path.isdir(path):
            empty = kind is not AutoTokenizer and not any(os.path.exists(os.path.join(path, n)) for n in CONFIGS)
            said = "the folder has no config.json" if empty else first_line(error)
            raise ValueError(f"{key} {path!r} could not be loaded: {said}") from error
        raise ValueError(
            f"{key} must be a model's folder or a hub's name; there is no folder {path!r}, and no hub gave it: "
            f"{first_line(error)}"
        ) from error


def placed(model: Any) -> Any:
    """The model on the accelerator, if there is one: for what runs models without a trainer, which places its own."""
    return model.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else model


def load_model(path: str, args: Any, key: str = "model") -> PreTrainedModel:
    """The causal language model in that folder, with the dtype and attention that the configuration asks for.

    Adapters in it are merged into the weights, or for the model to train what the configuration's `adapters` says.
    """
    mode = adapter_mode(path, args) if key == "model" else "merge"
    return load(key, AutoModelForCausalLM, path, adapters=mode, **model_options(args))


def adapter_mode(path: str, args: Any) -> str:
    """`args.adapters`; ValueError where what would be saved at the end could not be loaded."""
    if args.adapters == "merge" and args.lora_rank and not args.lora_merge and holds_adapters(os.path.expanduser(path)):
        raise ValueError(
            f"lora_merge must be true where new adapters are trained on {path!r}, whose own are merged into weights "
            "that nothing would save; got false: adapters=stack saves both as one, adapters=continue trains its own"
        )
    return args.adapters


def load_tokenizer(path: str | None, model: str, key: str = "model") -> PreTrainedTokenizerBase:
    """The tokenizer in that folder, or beside the model, which `key` gave."""
    key, path = (key, model) if path is None else ("tokenizer", path)
    tokenizer = load(key, AutoTokenizer, path)
    if not tokenizer("a", verbose=False)["input_ids"]:  # what transformers makes of a folder without its files
        raise ValueError(f"{key} {path!r} must hold a tokenizer's files; the one there turns text into no tokens")
    return tokenizer


def disable_dropout(model: torch.nn.Module) -> None:
    """Sets every dropout rate to 0: log-probabilities that are compared must be those of one and the same policy."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and "dropout" in name:
                setattr(module, name, 0.0)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id to fill with: the padding token, else the end-of-sequence token, else 0; masks never depend on it."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0
