"""transformers: the training loss of its causal language models without their logits.

    from fastalign.integrations.transformers import apply_fused_loss
    fused = apply_fused_loss(model)  # then train as before: Trainer, accelerate, an own loop
    fused.remove()

The model's own forward runs as it is written: its head keeps its input instead of projecting it, and its loss function
computes the loss from that, tile by tile (`fastalign.head_token_stats`). What a model adds to its loss, as the load
balancing of a mixture of experts, stays its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..losses import SFTLoss, sft_loss
from ..losses.base import Logits, check_logits, stats_of
from ..losses.reductions import Count
from ..models.headless import Headless
from ..models.lm_head import head_module, unwrapped
from ..ops.call import check_ignore_index
from ..ops.uncompiled import uncompiled

__all__ = ["FusedLoss", "apply_fused_loss", "fused_lm_loss"]


def fused_lm_loss(
    logits: Logits,
    labels: Tensor,
    vocab_size: int | None = None,
    num_items_in_batch: Count | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    *,
    softcap: float | None = None,
    **others: Any,
) -> Tensor:
    """The loss of transformers' causal language models, with its signature: `model.loss_function = fused_lm_loss`.

    Equals `transformers.loss.loss_utils.ForCausalLMLoss`, but for a batch without a label, whose loss is 0 here and NaN
    there.

    Args:
        logits: [..., T, V], or a `fastalign.Head` or tuple (hidden, weight[, bias]) in their place.
        labels: [..., T]; position t is scored against label t + 1, and the last one not at all.
        vocab_size: V, checked.
        num_items_in_batch: divides the summed loss; None: the number of labels that are scored.
        ignore_index: a label that is not scored.
        shift_labels: [..., T], used instead of labels and not shifted.
        softcap: soft-capping that was not yet applied to the logits.
        others: ignored, as there.

    Returns:
        A scalar, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: as `token_stats` or `head_token_stats`; a vocab_size that is not that of the logits.
    """
    shape = check_logits("logits", logits).shape
    check_ignore_index(ignore_index)
    if vocab_size is not None and shape[-1] != vocab_size:
        raise ValueError(f"vocab_size must be that of the logits, {shape[-1]}; got {vocab_size}")
    if shift_labels is None:
        last = torch.full_like(labels[..., :1], ignore_index, dtype=torch.int64)
        shift_labels = torch.cat([labels[..., 1:].long(), last], -1)
    device = getattr(logits[0] if isinstance(logits, tuple) else logits, "device", labels.device)
    shift_labels = shift_labels.to(device)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(device)
    if getattr(logits, "plan", None) == "objective":  # which needs to know what becomes of the statistics
        loss = SFTLoss(ignore_index=ignore_index, softcap=softcap)
        return loss(logits, shift_labels, num_items=num_items_in_batch).loss
    stats = stats_of(logits, shift_labels, ignore_index=ignore_index, softcap=softcap)
    return sft_loss(stats.logps, shift_labels.long() != ignore_index, num_items=num_items_in_batch).loss


class FusedLoss(Headless):
    """What `apply_fused_loss` put into a model: its forward, until `remove()` or the end of a `with` block."""

    def __init__(self, model: Any, *, return_logits: bool | None, chunk_bytes: int | None, plan: str | None) -> None:
        super().__init__(model)
        self.return_logits = return_logits
        self.options = {"chunk_bytes": chunk_bytes, "plan": plan}
        model.loss_function = self._loss

    def remove(self) -> None:
        """Gives the model its own forward and loss function back; nothing happens the second time."""
        if self._there:
            del self.model._loss_function
        super().remove()

    def __enter__(self) -> FusedLoss:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __call__(self, *args: Any, return_logits: bool | None = None, **kwargs: Any) -> Any:
        """The model's forward."""
        labels = self.__signature__.bind_partial(*args, **kwargs).arguments.get("labels", kwargs.get("labels"))
        wanted = self.return_logits if return_logits is None else return_logits
        if not self._there or labels is None or (not torch.is_grad_enabled() if wanted is None else wanted):
            return self._forward(*args, **kwargs)
        output = self.run(*args, **kwargs)
        if self.hidden is not None:
            self.hidden = None
            raise ValueError(f"{type(self.model).__name__} computes its loss without its loss_function")
        return _without_logits(output)

    @uncompiled
    def _loss(self, logits: Tensor, labels: Tensor, vocab_size: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """The model's loss function: of what its head kept; of logits where they were asked for."""
        if self.hidden is None:
            return fused_lm_loss(logits, labels, vocab_size, *args, **kwargs)
        head = self.take(logits, **self.options)
        return fused_lm_loss(head, labels, vocab_size, *args, softcap=self.softcap, **kwargs)


def _without_logits(output: Any) -> Any:
    if isinstance(output, tuple):
        return (output[0], *output[2:])
    return type(output)(**{key: value for key, value in output.items() if key != "logits"})


def apply_fused_loss(
    model: nn.Module, *, return_logits: bool | None = None, chunk_bytes: int | None = None, plan: str | None = None
) -> FusedLoss:
    """Makes a causal language model of transformers compute its loss from hidden states, without its logits.

    Called with labels and with gradients on, the model returns its usual output without `logits`: same loss, same
    gradients, `num_items_in_batch`, `shift_labels` and further terms of its own included. Called without labels, under
    `torch.no_grad()` (evaluation), or with the keyword `return_logits=True`, it returns logits as before.

    Args:
        model: bare, or within DDP, FSDP2, `torch.compile` or peft (LoRA on the head: the merged weight is formed at
            each call, [V, H] more memory).
        return_logits: True or False for calls that do not say; None: as above.
        chunk_bytes, plan: of the fused head, as in `head_token_stats`.

    Returns:
        FusedLoss: `.remove()` undoes it, and so does the end of a `with` block.

    Raises:
        ValueError: a head that is not known (see `_lm_head`), a loss that is not that of causal language
            models, a model that has it already; at the first call, logits that the model changes in another way than
            its configuration says.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss

    inner = unwrapped(model)
    head_module(inner)
    name = type(inner).__name__
    if isinstance(inner.__dict__.get("forward"), FusedLoss):
        raise ValueError(f"{name} has a fused loss already: remove() that one first")
    if inner.loss_function is not ForCausalLMLoss:
        raise ValueError(f"the loss of {name} must be ForCausalLMLoss; got {inner.loss_function}")
    if (getattr(inner.config, "z_loss_coefficient", None) or 0) > 0:
        raise ValueError(f"{name} adds a loss of its logits: z_loss_coefficient={inner.config.z_loss_coefficient}")
    return FusedLoss(inner, return_logits=return_logits, chunk_bytes=chunk_bytes, plan=plan)
