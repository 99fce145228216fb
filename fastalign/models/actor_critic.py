"""Policy and value function as one module: one forward for both, one thing for accelerate to wrap, one to save.

The value of position t is that of the state before the token which `logits[:, t]` predicts, so values and token
log-probabilities share their labels. The head is a linear layer in float32 that starts at zero, on a backbone of its
own or on the policy's last hidden states.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from ..utils.batch import Batch
from .loading import load
from .logits import GROUPS, Answer, ModelLogits, Request, ask, run_model
from .lora import is_adapted, merged

VALUE_FOLDER, VALUE_HEAD = "value_model", "value_head.safetensors"
_POLICY, _CRITIC, _HEAD = "policy.", "critic.", "value_head."


class ActorCritic(nn.Module):
    """A causal language model with, or without, a value function.

    Args:
        policy: the language model (or its peft wrapper).
        critic: a backbone (transformers' AutoModel) for the values; None with `shared` or without values.
        shared: take the values from the policy's own last hidden states.
    """

    def __init__(self, policy: Any, critic: Any = None, *, shared: bool = False) -> None:
        super().__init__()
        self.policy, self.critic, self.shared = policy, critic, shared
        backbone = policy if shared else critic
        self.value_head: nn.Linear | None = None
        if backbone is not None:
            self.value_head = nn.Linear(backbone.config.get_text_config().hidden_size, 1)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        self._no_split_modules = sorted({*_blocks(policy), *_blocks(critic)})  # where FSDP cuts

    @property
    def has_values(self) -> bool:
        """Whether `forward` returns values."""
        return self.value_head is not None

    def forward(self, batch: Mapping[str, Tensor], *, values: bool = True, request: Request | None = None) -> Answer:
        """Logits, or what is requested in their place, and values.

        Args:
            batch: a padded batch; `groups` in it, [B], says which sequences have a prompt in common.
            values: ask for values, if there is a value function.
            request: of a policy that `can_answer`; None: `logits` is set.
        """
        values = values and self.has_values
        shared = values and self.shared
        if request is not None:
            request = request._replace(hidden=request.hidden or shared)
            answer = ask(self.policy, batch, request, batch.get(GROUPS))
        else:
            out = run_model(self.policy, batch, output_hidden_states=shared)
            answer = Answer(logits=out.logits, hidden=out.hidden_states[-1] if shared else None)
        if not values:
            return answer
        return answer._replace(values=self._value(answer.hidden) if shared else self.values(batch))

    def values(self, batch: Mapping[str, Tensor]) -> Tensor:
        """[B, T], of a value function with a backbone of its own."""
        return self._value(run_model(self.critic, batch).last_hidden_state)

    def _value(self, hidden: Tensor | None) -> Tensor:
        if self.value_head is None or hidden is None:
            raise RuntimeError("this model has no value function, or gave no hidden states for it")
        return self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(-1).float()

    # ------------------------------------------------------------------------------------------------ on the disk
    def save(self, folder: str, state: Mapping[str, Tensor] | None = None) -> None:
        """Writes the policy as transformers does, a critic into `value_model/`, the head as `value_head.safetensors`.

        state: the module's full state dict, where its own tensors are shards.
        """
        full = dict(self.state_dict() if state is None else state)
        self.policy.save_pretrained(folder, state_dict=_part(full, _POLICY))
        if self.critic is not None:
            self.critic.save_pretrained(os.path.join(folder, VALUE_FOLDER), state_dict=_part(full, _CRITIC))
        if self.has_values:
            head = {name: tensor.detach().cpu().contiguous() for name, tensor in _part(full, _HEAD).items()}
            save_file(head, os.path.join(folder, VALUE_HEAD))

    def load(self, folder: str) -> None:
        """Takes up what `save` wrote, in place. OSError if it is not there, RuntimeError if it does not fit."""
        if is_adapted(self.policy):
            from peft import load_peft_weights, set_peft_model_state_dict

            set_peft_model_state_dict(self.policy, load_peft_weights(folder, device="cpu"))
        else:
            stored = AutoModelForCausalLM.from_pretrained(folder, dtype=self.policy.dtype)
            self.policy.load_state_dict(stored.state_dict())
        if self.critic is not None:
            stored = AutoModel.from_pretrained(os.path.join(folder, VALUE_FOLDER), dtype=self.critic.dtype)
            self.critic.load_state_dict(stored.state_dict())
        self.load_head(folder)

    def load_head(self, folder: str) -> None:
        """Takes up the value head alone."""
        if self.value_head is not None:
            self.value_head.load_state_dict(load_file(os.path.join(folder, VALUE_HEAD)))


def policy_logits(model: Any, batch: Batch, values: bool, args: Any) -> ModelLogits:
    """What stands for the logits of an `ActorCritic`'s policy in a loss; after it, `answer` holds the values.

    Args:
        model: the `ActorCritic`, wrapped or not.
        values: ask for values too.
        args: `fused_head` and `chunk_bytes`.
    """
    policy = getattr(model, "module", model).policy
    call = functools.partial(_ask, model, batch, values)
    shape = batch["input_ids"].shape
    return ModelLogits(call, policy, shape, fused=args.fused_head, chunk_bytes=args.chunk_bytes)


def _ask(model: Any, batch: Batch, values: bool, request: Request | None) -> Answer:
    return model(batch, values=values, request=request)


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def _blocks(model: Any) -> set[str]:
    """Class names of a model's layers, those of which the model has any: accelerate looks each of them up."""
    there = {type(module).__name__ for module in model.modules()} if model is not None else set()
    return there & set(getattr(model, "_no_split_modules", None) or ())


def with_values(policy: Any, source: str, dtype: torch.dtype) -> ActorCritic:
    """The policy with a value function.

    source: "separate" for a copy of the policy's backbone, "shared" for a head on the policy's own, or a folder (or hub
        name) of a model whose backbone to start from, such as the reward model. A head that was saved there by `save`
        is taken up with it.
    """
    if source == "shared":
        return ActorCritic(policy, shared=True)
    if source == "separate":
        backbone = merged(policy).base_model if is_adapted(policy) else copy.deepcopy(policy.base_model)
        return ActorCritic(policy, backbone.requires_grad_(True))
    inner = os.path.join(source, VALUE_FOLDER)
    own = os.path.isdir(inner)
    model = ActorCritic(policy, load("value_model", AutoModel, inner if own else source, dtype=dtype))
    if own:
        model.load_head(source)
    return model
