"""A causal language model's own forward without the product of its head: what every fused loss here stands on.

The model's forward runs as it is written; only its head keeps what it is given instead of projecting it. What a model
does in front of its head or adds to its output stays its own, and what it does to its logits is verified once. Whatever
wraps the model (DDP, FSDP2, autocast, peft) sees one ordinary forward pass.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..head.head import Head
from .lm_head import head_module, head_parameters, logit_transform


class Headless:
    """The forward of a causal language model, in the place of its own until `remove()`.

    As an attribute of the instance it is copied and pickled with the model (a copy's forward belongs to the copy), and
    leaves the class, and so `isinstance` and what is saved, as they were. Subclasses define `__call__`.

    Raises:
        ValueError: a head that is not known (see `_lm_head`); then the model is unchanged.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.head = head_module(model)
        self.scale, self.softcap = logit_transform(model.config)
        self.hidden: Tensor | None = None  # what the head was given, from there until `take`
        self._sample = torch.empty(0)  # the logits of one position, until they are verified
        self._verified = False
        with torch.no_grad():
            head_parameters(self.head)
        self._forward, self._project = model.forward, self.head.forward
        self._own = [(module, module.__dict__.get("forward")) for module in (model, self.head)]
        self.__signature__ = inspect.signature(model.forward)
        # The head's is swapped for good, and not at each call, which a compiler could not follow.
        self._running, self._there = False, True
        model.forward = self
        self.head.forward = self._head  # type: ignore[method-assign, assignment]

    def remove(self) -> None:
        """Gives the model its own forward back; nothing happens the second time.

        Where something was put around this one since (accelerate does for mixed precision), it stays beneath that and
        is the model's own forward from now on.
        """
        self._there = False
        for (module, forward), ours in zip(self._own, (self, self._head), strict=True):
            if module.__dict__.get("forward") == ours:
                del module.forward
                if forward is not None:
                    module.forward = forward

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the model's own forward, whose logits mean nothing; `take` gives the head in their place."""
        self.hidden = None
        self._running = True
        try:
            return self._forward(*args, **kwargs)
        except BaseException:
            self.hidden = None
            raise
        finally:
            self._running = False

    def take(self, logits: Tensor, **options: Any) -> Head:
        """The head on what it was given, after the model made `logits` of it; options of `Head`. Soft-capping is not
        part of it: that is `softcap`, an option of the loss.

        Raises:
            ValueError: the model does something else to its logits than its configuration says.
        """
        if self.hidden is None:
            raise ValueError(f"{type(self.model).__name__} made its logits without its head")
        hidden, self.hidden = self.hidden, None
        if not self._verified:
            self._verify(logits)
        # Read anew each time: after an optimizer's step a LoRA head's merged weight is another tensor.
        weight, bias = head_parameters(self.head)
        return Head(hidden.to(weight.device), weight, bias, self.scale, **options)

    def _head(self, hidden: Tensor) -> Tensor:
        """The head's forward."""
        return self._keep(hidden) if self._running else self._project(hidden)

    def _keep(self, hidden: Tensor) -> Tensor:
        """In place of the head: keeps its input. Returns logits of the last position, or NaN once those are known."""
        self.hidden = hidden
        ones = (1,) * (hidden.dim() - 1)
        if self._verified:
            return hidden.new_full((*ones, self.model.get_output_embeddings().weight.shape[0]), torch.nan)
        with torch.no_grad():
            weight, bias = head_parameters(self.head)
            last = hidden.reshape(-1, hidden.shape[-1])[-1:].to(weight.device)
            bias = None if bias is None else bias.to(hidden.dtype)
            self._sample = F.linear(last, weight.to(hidden.dtype), bias).view(*ones, -1)
            return self._sample.clone()

    def _verify(self, logits: Tensor) -> None:
        """That the model did to its logits what its configuration says, at one position, once."""
        with torch.no_grad():
            x = self.scale * self._sample.to(torch.promote_types(self._sample.dtype, torch.float32))
            x = x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)
            # Rounding of the model's own steps: a few units in the last place of the largest logit.
            near = 16 * torch.finfo(self._sample.dtype).eps
            same = logits.shape == x.shape and bool((logits - x).abs().max() <= near * x.abs().max())
        if not same:
            raise ValueError(
                f"the head of {type(self.model).__name__} is not known: its logits are not {self.scale} times those of "
                f"its linear layer with soft-cap {self.softcap}"
            )
        logits.fill_(torch.nan)  # a model that uses its logits after this would show it
        self._verified = True
