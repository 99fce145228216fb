"""Results and gradients of a case in float64, block by block, and the errors of others against them."""

from __future__ import annotations

import torch
from harness.case import Problem
from harness.variants import Objective, eager_logps
from torch import Tensor


class Oracle:
    """The plain formula in float64 on the values that the variants are given (bfloat16 logits are exact in float64)."""

    def __init__(self, problem: Problem, objective: Objective, *, gradient: bool):
        self._problem = problem
        self._rows = problem.logits.flatten(0, -2)
        labels = problem.labels.flatten()
        logps = torch.cat([eager_logps(self._rows[at].double(), labels[at]) for at in problem.blocks()])
        logps = logps.view(problem.labels.shape).requires_grad_()
        self.output = objective(logps, problem.ref_logps.double())
        weights = torch.autograd.grad(self.output, logps, problem.weights_for(self.output))[0].flatten()
        self.scale = float(self.output.abs().max())
        self.gradient: Tensor | None = None
        if gradient:
            self.gradient = torch.empty(self._rows.shape, dtype=torch.float64, device=self._rows.device)
            for at in problem.blocks():
                x = self._rows[at].double().requires_grad_()
                self.gradient[at] = torch.autograd.grad(eager_logps(x, labels[at]), x, weights[at])[0]
        self.output = self.output.detach()

    def errors(self, result: tuple[Tensor, Tensor | None]) -> dict[str, float]:
        """The errors of a variant's result and gradient.

        `output`: largest absolute error. `output_scale`: the largest absolute value, to make it relative to.
        `gradient`: Euclidean norm of the error relative to that of the gradient (only where there is one).
        """
        output, gradient = result
        errors = {
            "output": float((output.detach().double() - self.output).abs().max()),
            "output_scale": self.scale,
        }
        if gradient is not None and self.gradient is not None:
            gradient = gradient.flatten(0, -2)
            squares = [(gradient[at].double() - self.gradient[at]).square().sum() for at in self._problem.blocks()]
            errors["gradient"] = float(torch.stack(squares).sum().sqrt() / self.gradient.norm())
        return errors
