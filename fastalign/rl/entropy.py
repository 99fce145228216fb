"""A coefficient of the entropy bonus that follows the entropy."""

from __future__ import annotations

import math

from torch import Tensor

from ..losses.base import check_range


class AdaptiveEntropy:
    """Control of the entropy (He et al. 2025, arXiv:2505.22312): the coefficient grows by delta after a batch
    whose entropy is at most the target, else falls by it, within [low, high]; above the target no bonus is given.

    Args:
        entropy_coef: the coefficient at the start.
        target: mean entropy of a token below which the bonus acts, in nats.
        delta: step of the coefficient, > 0.
        low, high: its bounds.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        entropy_coef: float = 0.0,
        *,
        target: float = 0.2,
        delta: float = 0.005,
        low: float = 0.0,
        high: float = 1.0,
    ) -> None:
        self.target = check_range("target", target, 0)
        self.delta = check_range("delta", delta, 0, open_low=True)
        self.low = check_range("low", low, 0)
        self.high = check_range("high", high, low)
        self.coefficient = float(check_range("entropy_coef", entropy_coef, low, high))
        self.acts = False  # nothing has been measured

    @property
    def value(self) -> float:
        """The weight of the bonus for the next batch: 0 while the entropy is above the target, and before the first."""
        return self.coefficient if self.acts else 0.0

    def update(self, entropy: float | Tensor) -> float:
        """Takes note of a batch's mean entropy, in nats a token; returns `value`.

        Raises:
            ValueError: an entropy that is not finite.
        """
        entropy = float(entropy)
        if not math.isfinite(entropy):
            raise ValueError(f"entropy must be finite; got {entropy}")
        self.acts = entropy <= self.target
        moved = self.coefficient + (self.delta if self.acts else -self.delta)
        self.coefficient = min(max(moved, self.low), self.high)
        return self.value

    def state_dict(self) -> dict[str, float]:
        """What changes from batch to batch."""
        return {"coefficient": self.coefficient, "acts": float(self.acts)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes up a state made by `state_dict`."""
        if set(state) != {"coefficient", "acts"}:
            raise ValueError(f"state must have the keys 'coefficient' and 'acts' alone; got {sorted(state)}")
        self.coefficient = float(check_range("coefficient", state["coefficient"], self.low, self.high))
        self.acts = bool(state["acts"])
