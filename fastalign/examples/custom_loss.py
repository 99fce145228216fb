"""Losses of your own: a formula of a token or of a pair, run with its derivatives in the call that reads the logits.

    python -m fastalign.examples.custom_loss

`TokenLoss` weighs log-probabilities by a ratio that is cut at 2, `PairLoss` wants a margin. Each is held to the same
formula in plain torch operations and float64, and says how it ran. Needs torch alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastalign.examples.tiny import run
from fastalign.losses import PairLoss, TokenLoss

ROWS, LENGTH, VOCAB = 8, 16, 1000


def cut_ratio(t: Any) -> Any:
    """Of a token: `t` has its statistics and what the call was given, by name."""
    return -t.advantages * torch.exp(t.logps - t.old_logps).clamp(max=2.0)


def with_margin(p: Any) -> Any:
    """Of a pair: sums of log-probabilities, and what the call was given."""
    return F.softplus(p.margin - 0.1 * (p.chosen_logps - p.rejected_logps))


def difference(loss: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], logits: Tensor) -> float:
    """How far the gradient of the loss is from that of plain operations in float64, over its norm."""
    grads = []
    for function, x in ((loss, logits), (plain, logits.double())):
        leaf = x.clone().requires_grad_()
        function(leaf).backward()
        grads.append(leaf.grad.double())  # type: ignore[union-attr]
    return float((grads[0] - grads[1]).norm() / grads[1].norm())


def main() -> str:
    torch.manual_seed(0)
    logits, labels = torch.randn(ROWS, LENGTH, VOCAB), torch.randint(VOCAB, (ROWS, LENGTH))
    given = {"advantages": torch.randn(ROWS), "old_logps": torch.full((ROWS, LENGTH), -7.0)}

    def logps(x: Tensor) -> Tensor:
        return x.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    tokens = TokenLoss(cut_ratio)
    token_error = difference(
        lambda x: tokens(x, labels, **given).loss,
        lambda x: (-given["advantages"][:, None] * (logps(x) - given["old_logps"]).exp().clamp(max=2.0)).mean(),
        logits,
    )
    pairs = PairLoss(with_margin)
    pair_error = difference(
        lambda x: pairs(x, labels, margin=1.0).loss,
        lambda x: F.softplus(1.0 - 0.1 * (logps(x).sum(-1)[: ROWS // 2] - logps(x).sum(-1)[ROWS // 2 :])).mean(),
        logits,
    )
    for name, loss in (("TokenLoss", tokens), ("PairLoss", pairs)):
        print(f"{name}: {loss.explain()}")
    return f"gradients off by {token_error:.1e} (TokenLoss) and {pair_error:.1e} (PairLoss) of those in float64"


if __name__ == "__main__":
    sys.exit(run(main, "train"))
