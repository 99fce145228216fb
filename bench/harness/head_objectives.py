"""What `bench/head.py` measures: inputs, and each objective from a head, from log-probabilities and over logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness.case import DTYPES
from torch import Tensor
from torch.nn import functional as F

import fastalign as fa

BETA, KL_COEF, CLIP = 0.1, 0.05, 0.2
IGNORED = -100
Gradients = tuple[Tensor, ...]
Logps = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    tokens: int = 512
    vocab: int = 128256
    hidden: int = 1024
    dtype: str = "bfloat16"
    pairs: int = 2
    objective: str = "dpo"


class Inputs:
    """Hidden states [2B, T, H] of both models, chosen first; heads [V, H]; labels, and the same with half a prompt."""

    def __init__(self, shape: Shape, seed: int = 0, device: str = "cpu"):
        self.shape = shape
        draw = torch.Generator(device).manual_seed(seed)
        dtype = DTYPES[shape.dtype]
        rows, length = 2 * shape.pairs, shape.tokens // (2 * shape.pairs)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=draw, device=device).to(dtype)

        self.hidden, self.ref_hidden = (normal(rows, length, shape.hidden) for _ in range(2))
        self.weight = normal(shape.vocab, shape.hidden).mul_(shape.hidden**-0.5)
        self.ref_weight = normal(shape.vocab, shape.hidden).mul_(shape.hidden**-0.5)
        self.labels = torch.randint(shape.vocab, (rows, length), generator=draw, device=device)
        self.half = self.labels.clone()
        self.half[:, : length // 2] = IGNORED
        self.advantages = torch.randn(rows, generator=draw, device=device)
        self.old_logps = torch.full((rows, length), -12.0, device=device)

    def leaves(self, frozen: bool) -> list[Tensor]:
        return [self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_(not frozen)]


@dataclass(frozen=True)
class Objective:
    """One loss, three ways."""

    fused: Callable[[Inputs, fa.Head, Tensor, fa.Head], Tensor]
    of_logps: Callable[[Inputs, Tensor, Tensor | None], Tensor] | None
    """From the labels' log-probabilities; None where it needs more than them."""
    reference: bool
    over_logits: Callable[[Inputs, Tensor, Tensor], Tensor] | None = None
    """From whole logits and the reference's, in plain torch."""

    @property
    def logps_alone(self) -> bool:
        return self.of_logps is not None

    def over(self, logps: Logps, x: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
        """With somebody's log-probabilities from a head; in plain torch where those are not enough."""
        if self.of_logps is None:
            with torch.no_grad():
                reference = F.linear(x.ref_hidden, x.ref_weight)
            return self.over_logits(x, F.linear(hidden, weight), reference)  # type: ignore[misc]
        ref = None
        if self.reference:
            with torch.no_grad():
                ref = logps(x.ref_hidden, x.ref_weight, x.labels)
        return self.of_logps(x, logps(hidden, weight, x.labels), ref)


def _dpo(x: Inputs, logps: Tensor, ref_logps: Tensor | None) -> Tensor:
    chosen, rejected = logps.sum(-1).chunk(2)
    ref_chosen, ref_rejected = ref_logps.sum(-1).chunk(2)  # type: ignore[union-attr]
    return -F.logsigmoid(BETA * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean()


def _pro(x: Inputs, logps: Tensor, ref_logps: Tensor | None) -> Tensor:
    scores = logps.mean(-1).view(-1, 4)
    tails = torch.stack([scores[:, k:].logsumexp(-1) for k in range(3)], -1)
    return (tails - scores[:, :3]).sum(-1).mean()


def _ppo(x: Inputs, logits: Tensor, reference: Tensor) -> Tensor:
    logps, ref = logits.log_softmax(-1), reference.log_softmax(-1)
    kl = (logps.exp() * (logps - ref)).sum(-1)
    ratio = (logps.gather(-1, x.labels.unsqueeze(-1)).squeeze(-1) - x.old_logps).exp()
    gain = x.advantages.unsqueeze(-1)
    clipped = torch.maximum(-gain * ratio, -gain * ratio.clamp(1 - CLIP, 1 + CLIP))
    return clipped.mean() + KL_COEF * kl.mean()


OBJECTIVES = {
    "dpo": Objective(
        lambda x, head, labels, ref: fa.losses.DPOLoss(beta=BETA)(head, labels, ref_logits=ref).loss, _dpo, True
    ),
    "sft": Objective(
        lambda x, head, labels, ref: fa.losses.SFTLoss()(head, labels).loss, lambda x, logps, ref: -logps.mean(), False
    ),
    "pro": Objective(
        lambda x, head, labels, ref: fa.losses.PROLoss()(head, labels, list_size=4).loss, _pro, False
    ),
    "ppo_kl": Objective(
        lambda x, head, labels, ref: fa.losses.PPOLoss(
            cliprange=CLIP, kl_estimator="exact", kl_coef=KL_COEF
        )(head, labels, x.old_logps, x.advantages, ref_logits=ref).loss,
        None,
        True,
        _ppo,
    ),
}  # fmt: skip
