"""Controllers of the KL coefficient. All have `value`, `update(kl, n)` and a state that checkpoints can carry."""

from __future__ import annotations

import math

from torch import Tensor

from ..losses.base import check_range


class FixedKL:
    """A constant coefficient.

    Args:
        kl_coef: beta >= 0.
    """

    def __init__(self, kl_coef: float = 0.05) -> None:
        self.value = float(check_range("kl_coef", kl_coef, 0))

    def update(self, kl: float | Tensor, n: int = 1) -> float:
        """Takes note of a measured KL; returns the coefficient for the next batch, `value`.

        Args:
            kl: mean KL of a batch, in the unit of the controller's target: nats per episode where it is summed over
                tokens.
            n: episodes in the batch.

        Raises:
            ValueError: a KL that is not finite, or n < 1.
        """
        kl = float(kl)
        if not math.isfinite(kl):
            raise ValueError(f"kl must be finite; got {kl}")
        check_range("n", n, 1)
        self.value = self._next(kl, n)
        return self.value

    def _next(self, kl: float, n: int) -> float:
        return self.value

    def state_dict(self) -> dict[str, float]:
        """What changes from batch to batch."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes up a state made by `state_dict`."""
        if set(state) != {"value"}:
            raise ValueError(f"state must have the key 'value' alone; got {sorted(state)}")
        self.value = float(check_range("value", state["value"], 0))


class AdaptiveKL(FixedKL):
    """Control (Ziegler et al. 2019, sec. 2.2): beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon).

    Args:
        init_kl_coef: beta at the start, > 0.
        target: KL per episode to hold, in nats, summed over tokens; > 0.
        horizon: episodes over which a steady error x multiplies beta by about exp(x); > 0. A batch must hold fewer
            than 5 * horizon of them, so that beta stays positive.
    """

    def __init__(self, init_kl_coef: float = 0.2, *, target: float = 6.0, horizon: float = 10_000) -> None:
        super().__init__(check_range("init_kl_coef", init_kl_coef, 0, open_low=True))
        self.target = check_range("target", target, 0, open_low=True)
        self.horizon = check_range("horizon", horizon, 0, open_low=True)

    def _next(self, kl: float, n: int) -> float:
        if n >= 5 * self.horizon:
            raise ValueError(f"n must be below 5 * horizon = {5 * self.horizon:g} episodes; got {n}")
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return self.value * (1 + error * n / self.horizon)


class SchulmanKL(FixedKL):
    """The rule of Schulman et al. 2017, sec. 4: beta / 2 where KL < target / 1.5, beta * 2 where KL > target * 1.5.

    Args:
        init_kl_coef: beta at the start, > 0.
        target: d_targ, the KL between policies before and after an update; > 0, per token where the KL is.
    """

    def __init__(self, init_kl_coef: float = 1.0, *, target: float = 0.01) -> None:
        super().__init__(check_range("init_kl_coef", init_kl_coef, 0, open_low=True))
        self.target = check_range("target", target, 0, open_low=True)

    def _next(self, kl: float, n: int) -> float:
        if kl < self.target / 1.5:
            return self.value / 2
        return self.value * 2 if kl > self.target * 1.5 else self.value
