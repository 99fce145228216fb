"""Models that are a folder of adapters on a base model: merged where one is loaded, trained on, or built upon.

A folder with `adapter_config.json` and no `config.json` stands for the base model that it names with the adapters on.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

MODES = ("merge", "continue", "stack")
"""What becomes of adapters that the model to train brings: added to its weights; trained on; or kept under new ones,
with which they are saved as one."""

_KINDS = {"CAUSAL_LM": AutoModelForCausalLM, "SEQ_CLS": AutoModelForSequenceClassification}
_PLAIN = {"use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none", "modules_to_save": None}
"""What adapters must be that are to be joined with others."""


def holds_adapters(path: str) -> bool:
    """Whether the folder is one of adapters alone."""
    return os.path.exists(os.path.join(path, CONFIG)) and not os.path.exists(os.path.join(path, "config.json"))


def described(path: str) -> dict[str, Any]:
    """The folder's adapter configuration."""
    return json.loads(Path(path, CONFIG).read_text(encoding="utf-8"))


def load_adapted(kind: Any, path: str, mode: str = "merge", **options: Any) -> Any:
    """The base model that the folder's adapters name, with these on, as one of transformers' Auto classes.

    Args:
        kind: AutoModelForCausalLM, AutoModelForSequenceClassification or AutoModel. Adapters of a language model serve
            the two others, whose heads are then fresh or none.
        path: the folder of the adapters.
        mode: "continue": peft's model, its adapters to be trained. Else a plain model with them merged in.
        options: as `from_pretrained` takes them.

    Raises:
        ValueError: no peft, no base model where the adapters say, adapters that are of another kind of model or cannot
            be merged (or, to be stacked, joined with others).
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError("the folder holds adapters, which need the package peft: pip install peft")
    from peft import PeftModel

    config = described(path)
    own = _KINDS.get(str(config.get("task_type")), kind)
    if kind is AutoModelForCausalLM and own is not kind:
        raise ValueError(f"its adapters are those of a {config['task_type']} model, not of a language model")
    if mode == "continue" and own is not kind:
        raise ValueError("its adapters are those of a language model: adapters=merge makes a reward model of it")
    if mode == "stack" and (odd := {k: config.get(k) for k, v in _PLAIN.items() if (config.get(k) or v) != v}):
        raise ValueError(f"adapters=stack takes plain LoRA, to be joined with new ones; its adapters have {odd}")
    base = base_model(path, config)
    for_own = options if own is kind or own is not AutoModelForCausalLM else _without_labels(options)
    extra: dict[str, Any] = (
        {"num_labels": 1} if own is AutoModelForSequenceClassification and "num_labels" not in for_own else {}
    )
    chained = holds_adapters(base)  # a checkpoint of adapters that were trained on others
    inner = load_adapted(own, base, **for_own, **extra) if chained else own.from_pretrained(base, **for_own, **extra)
    _fit_vocabulary(inner, path)
    model = PeftModel.from_pretrained(inner, path, is_trainable=mode == "continue")
    if mode == "continue":
        return model
    if not hasattr(model, "merge_and_unload"):
        raise ValueError(f"its adapters ({config.get('peft_type')}) cannot be merged into weights")
    plain = model.merge_and_unload()
    plain.requires_grad_(True)
    plain.config._name_or_path = plain.name_or_path = os.path.abspath(path)
    return plain if own is kind else _as_kind(kind, plain, base, options)


def base_model(path: str, config: dict[str, Any]) -> str:
    """Folder or hub's name of the model that the adapters stand on. ValueError if it is a folder that is not there."""
    base = str(config.get("base_model_name_or_path") or "")
    beside = os.path.join(os.path.dirname(os.path.abspath(path)), os.path.basename(base.rstrip("/")))
    gone = os.path.isabs(base) or base.startswith(".") or base.count("/") > 1 or not base
    if gone and not os.path.isdir(base):
        if base and os.path.isdir(beside):  # both were moved together
            return beside
        raise ValueError(f"its adapters stand on the base model {base!r}, and there is no such folder")
    return base


def _without_labels(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "num_labels"}


def _as_kind(kind: Any, plain: Any, base: str, options: dict[str, Any]) -> Any:
    """A model of another kind with the merged model's backbone."""
    if kind is AutoModel:
        return plain.base_model
    other = kind.from_pretrained(base, **options)
    rows = plain.get_input_embeddings().num_embeddings
    if rows != other.get_input_embeddings().num_embeddings:
        other.resize_token_embeddings(rows, mean_resizing=False)
    other.base_model.load_state_dict(plain.base_model.state_dict())
    other.config._name_or_path = other.name_or_path = plain.name_or_path
    return other


def _fit_vocabulary(model: Any, path: str) -> None:
    """Rows of embeddings for the tokens that training added (a padding token), and that token's number in the config.

    Adapters of a resized model carry its embeddings; the base model has as many as ever.
    """
    rows = _saved_rows(model, path)
    if any(os.path.exists(os.path.join(path, name)) for name in ("tokenizer_config.json", "tokenizer.json")):
        tokenizer = AutoTokenizer.from_pretrained(path)
        rows = max(rows, len(tokenizer))
        if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
            model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if rows > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(rows, mean_resizing=False)


def _saved_rows(model: Any, path: str) -> int:
    """Rows of the embeddings among the adapters' weights; 0 if there are none."""
    weights = os.path.join(path, WEIGHTS)
    if not os.path.exists(weights):
        return 0
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    with safe_open(weights, framework="pt") as file:
        found = [key for key in file.keys() if key.endswith(f"{name}.weight")]  # noqa: SIM118 (it is no mapping)
        return max((file.get_slice(key).get_shape()[0] for key in found), default=0)


# --------------------------------------------------------------------------------------------------------- stacking
def join_with_base(folder: str) -> None:
    """Adapters in the folder that stand on a folder of adapters: rewritten as one, of both ranks, on the base of those.

    delta W = s1 B1 A1 + s2 B2 A2 = [B1 B2] [s1 A1; s2 A2]: exact, up to the rounding of the products with s. Nothing to
    do for adapters that stand on a whole model.
    """
    config = described(folder)
    below = str(config.get("base_model_name_or_path") or "")
    if not holds_adapters(below):
        return
    under = described(below)
    rank = int(under["r"]) + int(config["r"])
    first, second = (_scaled(place, about) for place, about in ((below, under), (folder, config)))
    joined: dict[str, Tensor] = {}
    for name in sorted({*first, *second}):
        like = first.get(name, second.get(name))
        parts = [part[name] if name in part else _nothing(like, name, int(about["r"]))
                 for part, about in ((first, under), (second, config))]  # fmt: skip
        joined[name] = torch.cat(parts, _rank_axis(name)).contiguous()
    modules = sorted({name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in joined})
    changed = {"base_model_name_or_path": under["base_model_name_or_path"], "r": rank, "lora_alpha": rank}
    changed |= {"use_rslora": False, "target_modules": modules}
    save_file(joined, os.path.join(folder, WEIGHTS), metadata={"format": "pt"})
    Path(folder, CONFIG).write_text(json.dumps({**config, **changed}, indent=2), encoding="utf-8")


def _rank_axis(name: str) -> int:
    return 0 if name.rpartition("lora_")[2].startswith(("A", "embedding_A")) else 1


def _scaled(path: str, config: dict[str, Any]) -> dict[str, Tensor]:
    """The folder's LoRA weights with the scale in the first matrices, in float32 at least."""
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    found = {name: value for name, value in load_file(os.path.join(path, WEIGHTS)).items() if ".lora_" in name}
    return {name: value * scale if _rank_axis(name) == 0 else value for name, value in found.items()}


def _nothing(like: Tensor | None, name: str, rank: int) -> Tensor:
    """What a module without an adapter has: matrices of 0."""
    if like is None:
        raise RuntimeError(f"neither part has {name}")
    shape = list(like.shape)
    shape[_rank_axis(name)] = rank
    return like.new_zeros(shape)
