"""What a kernel of divergences between two models' distributions is called with."""

from typing import NamedTuple

from torch import Tensor


class Mixture(NamedTuple):
    """forward * KL(q || m) + reverse * KL(p || m), where m = share * q + (1 - share) * p: q the teacher's distribution,
    p the student's. A share of 0 makes m the student's (forward KL), of 1 the teacher's (reverse KL)."""

    forward: float
    reverse: float
    share: float

    @property
    def difference(self) -> float:
        """What keeps the summands positive, times q - p, whose sum is 0; 0 itself of a Jensen-Shannon divergence."""
        return self.forward - (self.forward + self.reverse) * self.share


class Side(NamedTuple):
    """One model's logits: x_j = scale * (softcap tanh(logit_j / softcap)), with a scale for each row."""

    logits: Tensor
    """[M, V], dense in the vocabulary."""
    scale: Tensor
    """[M], above 0: the model's own factor on its logits over the temperature. float32, or float64 for float64."""
    softcap: float
    """0: none."""


class DivergenceCall(NamedTuple):
    """One call: the divergence of M rows, and the log-probability that the student gives to their labels."""

    student: Side
    teacher: Side
    """Of the dtype and shape of the student's; constants."""
    labels: Tensor
    """[M], int64, in [0, V), or -1 where the row is not to be read: its results and its gradient are 0."""
    mixture: Mixture
