"""The output head of a causal language model: softcap * tanh(scale * (hidden @ weight.T + bias) / softcap).

Models differ after the matrix product: some scale their logits, some soft-cap them, and the numbers lie in their
configuration under half a dozen names. Everything in this package that forms logits from hidden states asks here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..head.inputs import gathered


# ------------------------------------------------------------------------------------------- what a configuration says
def _times(value: float) -> float:
    return float(value)


def _over(value: float) -> float:
    return 1.0 / value


_SCALES: dict[str, Callable[[float], float]] = {
    "logit_scale": _times,  # Cohere
    "lm_head_multiplier": _times,  # Falcon-H1
    "output_multiplier": _times,  # Muse Glimmer
    "logits_scaling": _over,  # Granite, MiniCPM3 (of its hidden states)
    "logits_mup_width_multiplier": _over,  # Inkling (of its hidden states)
}
_SCALES_OF_MODEL: dict[tuple[str, str], Callable[[float], float]] = {
    ("hyperclovax", "logits_scaling"): _times,
    ("mpt", "logit_scale"): lambda value: 1.0,  # a key of its configuration that its code does not read
}
_OF_HIDDEN_STATES = {("minicpm3", "logits_scaling"), ("inkling_text", "logits_mup_width_multiplier")}
"""Scales that these models apply to the hidden states in front of their head: of the head's own input no more."""
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
# A key that speaks of the logits' scale or cap, by a name that is not known here, must not be passed over in silence.
_SPEAKS_OF_LOGITS = re.compile(r"(logit|lm_head|output_mult).*(scal|cap|mult)|(scal|cap|mult).*(logit|lm_head)")
_OF_OTHER_LOGITS = re.compile(r"attn|attention|router|gate|expert|init|moe|vision|audio")


def logit_transform(config: Any) -> tuple[float, float | None]:
    """(scale, soft-cap or None) that a model applies to what its head returns, from its configuration's text part.

    Raises:
        ValueError: a key that seems to change the logits and is not known, two scales, or one that is not above 0.
    """
    text = config.get_text_config()
    scales = {}
    for key, rule in _SCALES.items():
        if getattr(text, key, None) is not None:  # of MiniCPM3 a property
            scales[key] = _SCALES_OF_MODEL.get((text.model_type, key), rule)(_number(text, key))
    if len(scales) > 1:
        raise ValueError(f"the configuration of a {text.model_type} must have one scale of its logits; got {scales}")
    scale = next((v for key, v in scales.items() if (text.model_type, key) not in _OF_HIDDEN_STATES), 1.0)
    caps = {key: _number(text, key) for key in _SOFTCAPS if getattr(text, key, None) is not None}
    for key, value in text.to_dict().items():
        speaks = _SPEAKS_OF_LOGITS.search(key) and not _OF_OTHER_LOGITS.search(key)
        if speaks and key not in _SCALES and key not in caps and isinstance(value, int | float) and value not in (0, 1):
            raise ValueError(
                f"the head of a {text.model_type} is not known: its configuration has {key}={value}, which may change "
                "the logits"
            )
    kept = getattr(text, "unpadded_vocab_size", None)
    if kept is not None and kept < text.vocab_size:
        raise ValueError(f"the head of a {text.model_type} drops logits beyond unpadded_vocab_size={kept}")
    return scale, next(iter(caps.values()), None)


def _number(config: Any, key: str) -> float:
    value = getattr(config, key)
    if not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{key} of a {config.model_type}'s configuration must be a number above 0; got {value!r}")
    return float(value)


# ----------------------------------------------------------------------------------------------- what modules there are
def unwrapped(model: Any) -> Any:
    """The transformers model within DDP, FSDP, DeepSpeed, a compiled module or peft."""
    from accelerate.utils import extract_model_from_parallel

    while (inner := extract_model_from_parallel(model, keep_torch_compile=False)) is not model:
        model = inner
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_module(model: Any) -> nn.Module:
    """The layer of an unwrapped model that makes the logits, with whatever peft put around it.

    Raises:
        ValueError: no such layer, or more between the body and the logits than this one layer.
    """
    name = type(model).__name__
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    body = getattr(model, "base_model", model)
    if module is None or body is model:
        raise ValueError(f"model must be a causal language model with an output head; got {name}")
    inside = [child for child in (module, body) if any(child is one for one in model.children())]
    others = [
        key
        for key, child in model.named_children()
        if not any(child is one for one in inside) and next(child.parameters(), None) is not None
    ]
    if len(inside) < 2 or others:
        found = f"{type(module).__name__}{f' and {others}' if others else ' within another module'}"
        raise ValueError(f"the head of {name} is not known: it must be one linear layer on the body; got {found}")
    return module


def head_parameters(module: Any) -> tuple[Tensor, Tensor | None]:
    """(weight [V, H], bias [V] or None) of a head whose output is hidden @ weight.T + bias, active adapters included.

    With LoRA on the head the weight is the sum of its own and the update, through which gradients reach the adapter;
    shards (FSDP2) are gathered.

    Raises:
        ValueError: a head that is not one plain linear layer, an adapter on it that is no linear update of its weight
            (DoRA, active dropout, a quantized base).
    """
    if hasattr(module, "modules_to_save"):
        names = module.active_adapters
        if not module.disable_adapters and names and names[0] in module.modules_to_save:
            return head_parameters(module.modules_to_save[names[0]])
        return head_parameters(module.original_module)
    if hasattr(module, "base_layer"):
        return _with_lora(module)
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        raise ValueError(f"the head must be a torch.nn.Linear; got {type(module).__name__}")
    if not module.weight.is_floating_point():
        raise ValueError(f"the head's weight must be floating-point; got {module.weight.dtype}")
    return gathered(module.weight), gathered(module.bias)


def _with_lora(layer: Any) -> tuple[Tensor, Tensor | None]:
    """W + s * B @ A (Hu et al. 2021, eq. 3), summed over the active adapters."""
    if not hasattr(layer, "lora_A"):
        raise ValueError(f"the head's adapter must be LoRA; got {type(layer).__name__}")
    weight, bias = head_parameters(layer.get_base_layer())
    if layer.disable_adapters and layer.merged:
        raise ValueError("the head's adapters are merged and disabled: call unmerge_adapter() first")
    if layer.disable_adapters or layer.merged:
        return weight, bias
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        if name in getattr(layer, "lora_variant", {}):
            variant = type(layer.lora_variant[name]).__name__
            raise ValueError(f"the head's adapter {name!r} must be plain LoRA; got {variant}")
        if layer.training and getattr(layer.lora_dropout[name], "p", 0.0) > 0:
            raise ValueError(
                f"the head's adapter {name!r} must have lora_dropout=0: with dropout of the hidden states it is no "
                f"linear layer; got {layer.lora_dropout[name].p}"
            )
        scale, down, up = layer.scaling[name], layer.lora_A[name], layer.lora_B[name]
        weight = weight + scale * (gathered(up.weight) @ gathered(down.weight))
        if up.bias is not None:
            extra = scale * gathered(up.bias)
            bias = extra if bias is None else bias + extra
    return weight, bias
