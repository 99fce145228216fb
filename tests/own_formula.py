"""A formula of one's own for the one-launch kernels, and what is right."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch


def _every_operation(t):
    """The loss of a token with every operation that a program knows, on every statistic."""
    p, q = torch.exp(t.logps), torch.sigmoid(t.lse)
    curves = torch.expm1(t.logps) + torch.log(t.entropy + 1.5) + torch.log1p(p) + torch.nn.functional.logsigmoid(t.lse)
    curves = curves + torch.tanh(t.mean) + torch.relu(t.x - 0.5 - t.mean) + t.lse.square() + (p + 0.5).sqrt()
    kinks = (t.mean - 0.25).abs() + torch.maximum(t.logps, -3 * t.y) - torch.minimum(t.lse, 4 * t.y)
    kinks = kinks + t.logps.clamp(-5, -2) / (1 + t.x)
    chosen = ((t.logps < -4) & (t.lse > 4)) | ~(t.mean >= 0) | (t.x <= 0.1) | (t.y == 0.5)
    weight = (t.logps * t.x).detach() + (t.y != 0.5)
    return curves + kinks + torch.where(chosen, weight * p, q * t.kl) + t.entropy * t.kl


class FormulaOfOnesOwn(NamedTuple):
    formula: Callable[..., Any]
    inputs: tuple[str, ...]

    def exact(self, logits, ref, labels, weight, given):
        """(statistics by name, gradient of the weighted sum over real tokens) by autograd in float64."""
        leaf = logits.double().requires_grad_()
        logp, ref_logp, real = leaf.log_softmax(-1), ref.double().log_softmax(-1), labels != -100
        stats = {
            "logps": logp.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1),
            "lse": leaf.logsumexp(-1),
            "entropy": -(logp.exp() * logp).sum(-1),
            "kl": (logp.exp() * (logp - ref_logp)).sum(-1),
            "mean": leaf.mean(-1),
        }
        loss = self.formula(SimpleNamespace(**stats, **{name: x.double() for name, x in given.items()}))
        (gradient,) = torch.autograd.grad((loss * weight)[real].sum(), leaf)
        return {name: x.detach() for name, x in stats.items()}, gradient


OWN_FORMULA = FormulaOfOnesOwn(_every_operation, ("x", "y"))
