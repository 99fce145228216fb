"""Trust-region policy optimisation (Schulman et al. 2015): the natural gradient, and a line search that keeps its word.

    minimise L(theta) = -E[rho A]   subject to   KL(pi_old, pi_theta) <= delta

The step solves F s = -grad L by conjugate gradients, where F, the Hessian of the KL at theta_old, is only ever applied
to a vector, by differentiating the KL twice. The KL must therefore be plain PyTorch (`exact_kl`, `sampled_kl`): the
fused token statistics can be differentiated once only, which is enough for the surrogate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..losses.base import check_float, check_mask, check_range, hide, masked_mean
from ..losses.kl import kl_estimate
from ..losses.reductions import as_real


class TrustRegionStep(NamedTuple):
    """What a step did. Where it was not accepted, kl and improvement are 0 and no parameter has changed."""

    accepted: bool
    loss: float
    """The surrogate loss at the parameters as they are now."""
    kl: float
    """KL(pi_old, pi) at the parameters as they are now, in nats."""
    improvement: float
    """By how much the surrogate loss fell."""
    expected_improvement: float
    """By how much it would have, at this length of step, were it linear."""
    backtracks: int
    """How many longer steps the line search refused."""


def exact_kl(logits: Tensor, old_logits: Tensor, mask: Tensor) -> Tensor:
    """Mean over real tokens of the full-vocabulary KL(pi_old, pi), differentiable in `logits` any number of times.

    Args:
        logits: [..., V], floating point.
        old_logits: [..., V], the old policy's, a constant.
        mask: [...], boolean, True = real; logits of hidden tokens change nothing.

    Raises:
        TypeError: not a floating-point tensor, or a mask that is not boolean. ValueError: shapes that differ.
    """
    check_float("logits", logits)
    check_float("old_logits", old_logits, logits.shape, "logits")
    check_mask("mask", mask, logits.shape[:-1], "logits without the vocabulary")
    logp = torch.log_softmax(as_real(logits, mask.unsqueeze(-1)), -1)
    old = torch.log_softmax(as_real(old_logits, mask.unsqueeze(-1)).detach(), -1)
    p = old.exp()
    return masked_mean(torch.where(p == 0, 0, p * (old - logp)).sum(-1), mask)


def sampled_kl(logps: Tensor, old_logps: Tensor, mask: Tensor) -> Tensor:
    """The same KL estimated from tokens that the old policy sampled: mean of rho - 1 - log rho over real tokens.

    Its Hessian at the old policy is E[grad log pi grad log pi^T], positive semi-definite on any sample.

    Args:
        logps: [..., T], by plain PyTorch (`log_softmax`, gather), so that it can be differentiated twice.
        old_logps: [..., T], a constant. mask: [..., T], boolean, True = real.

    Raises:
        TypeError: not a floating-point tensor, or a mask that is not boolean. ValueError: shapes that differ.
    """
    check_float("logps", logps)
    check_mask("mask", mask, logps.shape, "logps")
    check_float("old_logps", old_logps, logps.shape, "logps")
    return masked_mean(kl_estimate(hide(old_logps, mask).detach(), hide(logps, mask), kind="k3"), mask)


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], b: Tensor, *, iterations: int = 10, tolerance: float = 1e-10
) -> Tensor:
    """x with product(x) close to b, for a symmetric positive definite product (Hestenes and Stiefel 1952).

    Args:
        product: maps a vector [N] to the matrix times it.
        b: [N].
        iterations: at most so many products.
        tolerance: stop where the squared residual is below it times b's squared norm.
    """
    x, residual = torch.zeros_like(b), b.clone()
    direction, square = residual.clone(), residual.dot(residual)
    enough = tolerance * square
    for _ in range(iterations):
        if not square > enough:
            break
        image = product(direction)
        curvature = direction.dot(image)
        if not curvature > 0:  # rounding has used up the matrix's positive directions: x is as good as it gets
            break
        length = square / curvature
        x = x + length * direction
        residual = residual - length * image
        square, before = residual.dot(residual), square
        direction = residual + (square / before) * direction
    return x


class TrustRegion:
    """TRPO's update for any parameters.

    Args:
        params: tensors that require a gradient, such as `model.parameters()`.
        delta: bound on the KL of one step, in nats; the unit is that of `kl_fn`, per token for those above.
        cg_iterations: products with the Fisher matrix in a step.
        damping: added to the Fisher matrix's diagonal.
        backtrack: factor in (0, 1) by which a refused step is shortened.
        max_backtracks: steps that may be refused before the update is given up.
        accept_ratio: least share, in [0, 1), of the expected improvement that a step must bring.

    Raises:
        ValueError: no parameter that requires a gradient, or a number out of range. TypeError: not tensors.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        delta: float = 0.01,
        cg_iterations: int = 10,
        damping: float = 0.1,
        backtrack: float = 0.5,
        max_backtracks: int = 10,
        accept_ratio: float = 0.0,
    ) -> None:
        self.params = []
        for p in params:
            if not isinstance(p, Tensor):
                raise TypeError(f"params must be tensors; got {type(p).__name__}")
            if p.requires_grad:
                self.params.append(p)
        if not self.params:
            raise ValueError("params must hold at least one tensor that requires a gradient; got none")
        self.delta = check_range("delta", delta, 0, open_low=True)
        self.cg_iterations = int(check_range("cg_iterations", cg_iterations, 1))
        self.damping = check_range("damping", damping, 0)
        self.backtrack = check_range("backtrack", backtrack, 0, math.nextafter(1, 0), open_low=True)
        self.max_backtracks = int(check_range("max_backtracks", max_backtracks, 0))
        self.accept_ratio = check_range("accept_ratio", accept_ratio, 0, math.nextafter(1, 0))

    def step(self, surrogate_fn: Callable[[], Tensor], kl_fn: Callable[[], Tensor]) -> TrustRegionStep:
        """One update, or none: it is accepted only if KL <= delta and the surrogate loss fell.

        Args:
            surrogate_fn: the surrogate as a loss to minimise, a scalar: `policy_loss(..., kind="trpo").loss`.
            kl_fn: KL(pi_old, pi), a scalar, in operations that can be differentiated twice. The old policy is that of
                the parameters at the call, so that its value and gradient are 0 there.

        Both are called several times and must be deterministic (`model.eval()`: no dropout).

        Returns:
            TrustRegionStep. The parameters are changed in place, and stay as they were to the bit if not accepted.

        Raises:
            ValueError: either function returns something other than a scalar, or one that is not finite at the start.
        """
        loss = self._scalar("surrogate_fn", surrogate_fn())
        gradient = self._flat(torch.autograd.grad(loss, self.params, allow_unused=True))
        start = loss.item()
        step = self._natural_step(gradient, kl_fn)
        slope = -gradient.dot(step).item()
        if not (math.isfinite(slope) and slope > 0):
            return TrustRegionStep(False, start, 0.0, 0.0, 0.0, 0)
        before = [p.detach().clone() for p in self.params]
        for backtracks in range(self.max_backtracks + 1):
            fraction = self.backtrack**backtracks
            self._move(before, fraction * step)
            with torch.no_grad():
                now, kl = surrogate_fn().item(), kl_fn().item()
            gain = start - now
            if kl <= self.delta and gain > self.accept_ratio * fraction * slope:  # False where either is NaN
                return TrustRegionStep(True, now, kl, gain, fraction * slope, backtracks)
        with torch.no_grad():
            for p, old in zip(self.params, before, strict=True):
                p.copy_(old)
        return TrustRegionStep(False, start, 0.0, 0.0, fraction * slope, backtracks + 1)

    def _natural_step(self, gradient: Tensor, kl_fn: Callable[[], Tensor]) -> Tensor:
        """s = -c F^-1 grad, with c such that half s^T F s, the KL to second order, is delta; 0 for a zero gradient."""
        divergence = self._scalar("kl_fn", kl_fn())
        slope = self._flat(torch.autograd.grad(divergence, self.params, create_graph=True, allow_unused=True))

        def fisher(v: Tensor) -> Tensor:
            second = torch.autograd.grad(slope.dot(v), self.params, retain_graph=True, allow_unused=True)
            return self._flat(second) + self.damping * v

        direction = conjugate_gradient(fisher, -gradient, iterations=self.cg_iterations)
        curvature = direction.dot(fisher(direction))
        scale = torch.sqrt(2 * self.delta / curvature)
        return torch.where(curvature > 0, scale * direction, torch.zeros_like(direction))

    def _flat(self, gradients: tuple[Tensor | None, ...]) -> Tensor:
        pairs = zip(self.params, gradients, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in pairs])

    @torch.no_grad()
    def _move(self, start: list[Tensor], step: Tensor) -> None:
        parts = step.split([p.numel() for p in self.params])
        for p, old, part in zip(self.params, start, parts, strict=True):
            p.copy_(old + part.view_as(p))

    @staticmethod
    def _scalar(name: str, x: Tensor) -> Tensor:
        check_float(f"the result of {name}", x, (), "a scalar")
        if not torch.isfinite(x):
            raise ValueError(f"the result of {name} must be finite at the start of a step; got {x.item()}")
        return x
