"""What every backend module offers, and what its callers and the backends share."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..kernels.divergence_call import DivergenceCall
from ..kernels.token_call import TokenCall

DTYPES = {
    "tokens": (torch.float32, torch.bfloat16, torch.float16),
    # float64 too, unlike the token statistics: here it costs nothing.
    "gae": (torch.float32, torch.float64),
    "divergence": (torch.float32, torch.bfloat16, torch.float16),
}
"""Job → dtypes that the compiled backends know; `eager` knows every floating dtype."""

Statistics = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
"""logps, lse, entropy, kl, mean: None where not asked for."""

Forward = tuple[Any, ...]
"""These, and `saved`: what the backward needs; see `kernels.token_stats_eager` for their meaning. Where diagnostics are
asked for, `log_sum_sq` (of the others' dtype) and `argmax` (int64) follow."""


class TokenProgram(NamedTuple):
    """The loss of one token (`ops.token_programs` makes it), on numbers in slots: the five statistics, what the token
    is given, constants, and the results of the steps."""

    inputs: tuple[str, ...]
    """Names of what a token is given beside its logits."""
    constants: tuple[float, ...]
    steps: tuple[tuple[str, int, int, int], ...]
    """An operation of the table in `ops.operations`, and the slots of its operands."""
    loss: int
    """Slot of the loss."""
    uses: tuple[bool, ...]
    """Of each statistic: whether the loss looks at it."""
    moves: tuple[bool, ...]
    """Of each statistic: whether the loss has a derivative in it."""
    encoded: bytes
    """All of this as the compiled modules take it."""


class Backend(Protocol):
    """The functions of a backend module. Calls were checked by `ops`; a vocabulary's stride is 1."""

    def unavailable(self) -> str:
        """Why the backend cannot run here; "" where it can. Cheap: nothing heavy is imported for the answer."""

    def serves(self, tensor: Tensor, job: str) -> str:
        """Why the backend cannot do the job (a key of DTYPES) on such a tensor, as the end of a sentence; or ""."""

    def forward(self, call: TokenCall, want_entropy: bool, want_mean: bool, want_diagnostics: bool = False) -> Forward:
        """The statistics, and what the backward needs.

        Raises ValueError, before any logit is read, for a label that is neither in [0, V) nor `ignore_index`, where
        labels are on the CPU.
        """

    def backward(
        self,
        call: TokenCall,
        saved: Tensor,
        entropy: Tensor | None,
        kl: Tensor | None,
        grads: tuple[Tensor | None, ...],
        out: Tensor,
    ) -> None:
        """Writes the gradient of the logits into `out`, which may be `call.logits` itself."""

    def objective(
        self,
        call: TokenCall,
        program: TokenProgram,
        weight: Tensor,
        inputs: tuple[Tensor, ...],
        want_entropy: bool,
        out: Tensor,
    ) -> Statistics:
        """The statistics; the gradient of the losses of tokens, times their weights, goes into `out`, which may be
        `call.logits` itself.

        `inputs` are what the program is given, in its order; they and `weight` are float32 of the labels' shape.
        RuntimeError where the backend has no such kernel.
        """

    def divergence(
        self, call: DivergenceCall, g_divergence: Tensor | None, g_logps: Tensor | None, out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(divergence, log-probability of the label) of each row, [M]; with `out`, which may be the student's logits,
        their gradient goes there, given those of the two results. Numbers of rows are of the scales' dtype, dense."""

    def scale(self, gradient: Tensor, by: Tensor) -> None:
        """Multiplies a dense tensor by a scalar tensor of its device in place; by 1, the usual case, writes nothing."""

    def gae(self, rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
        """(advantages, returns) of checked rewards and values (one dtype, float32 or float64) and a boolean mask."""


def bad_label(labels: Tensor, at: int, ignore_index: int, vocab: int) -> ValueError:
    return ValueError(
        f"labels must be in [0, {vocab}) or equal to ignore_index={ignore_index}; "
        f"got {int(labels.flatten()[at])} at flat position {at}"
    )


def check_labels(labels: Tensor, ignore_index: int, vocab: int) -> None:
    """Reads the labels of a call, never its logits. Off the CPU it would stop the host, and kernels guard instead."""
    if labels.device.type == "cpu":
        bad = ((labels < 0) | (labels >= vocab)) & (labels.long() != ignore_index)
        if bad.any():
            raise bad_label(labels, int(bad.flatten().nonzero()[0]), ignore_index, vocab)
