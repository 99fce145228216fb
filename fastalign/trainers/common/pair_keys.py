"""Keys of the commands that minimise a loss of pairs, and the loss that they describe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...losses.preference import DPOLoss
from .arguments import Keys, key

_OPTIONS = (
    "beta",
    "label_smoothing",
    "length_alpha",
    "average",
    "f_divergence",
    "f_alpha",
    "simpo_gamma",
    "alphapo_alpha",
    "nll_weight",
    "nll_normalization",
    "dpop_lambda",
    "discopop_tau",
    "use_weighting",
    "ld_alpha",
)


@dataclass
class PairLossKeys(Keys):
    """Which loss of pairs, and with what options."""

    beta: float = key(0.1, "Strength of the pull towards the reference", group="Loss")
    loss_type: str | list[str] | dict[str, float] = key(  # noqa: RUF009 (it makes a dataclasses.field)
        "sigmoid",
        "Variant of the loss; several with commas between, or with weights (an unknown name lists all)",
        group="Loss",
    )
    loss_weights: list[float] | None = key(  # noqa: RUF009
        None, "Weights of several variants, in the order of loss_type; 1 each by default", group="Loss"
    )
    label_smoothing: float = key(0.0, "Assumed share of flipped labels (conservative and robust DPO)", group="Loss")
    length_alpha: float = key(0.0, "Penalty for length, in nats a token (DPO-R)", group="Loss")
    average: bool = key(False, "Use means per token instead of sums (length-normalised DPO)", group="Loss")
    f_divergence: str = key("reverse_kl", "Divergence that holds the policy to the reference", group="Loss")
    f_alpha: float = key(0.5, "Parameter of the alpha-divergence", group="Loss")
    simpo_gamma: float = key(0.5, "Target margin of SimPO and AlphaPO", group="Loss")
    alphapo_alpha: float = key(0.25, "AlphaPO's alpha; 0 is SimPO", group="Loss")
    nll_weight: float = key(1.0, "Weight of the chosen completions' NLL in the losses that have one", group="Loss")
    nll_normalization: str = key("token", "That NLL is averaged over: token, sequence or sum", group="Loss")
    dpop_lambda: float = key(50.0, "Weight of DPO-Positive's penalty", group="Loss")
    discopop_tau: float = key(0.05, "Temperature of DiscoPOP", group="Loss")
    use_weighting: bool = key(
        False, "Weigh each pair by how likely the policy would have written it itself (WPO)", group="Loss"
    )
    ld_alpha: float | None = key(
        None, "Weight of log-probabilities beyond the shorter length of a pair (LD-DPO); null: all alike", group="Loss"
    )

    def loss(self, temperature: float = 1.0) -> DPOLoss:
        """The loss that these keys describe; ValueError naming the key that is wrong."""
        options = {name: getattr(self, name) for name in _OPTIONS}
        return DPOLoss(inplace_backward=True, temperature=temperature, loss_type=self.weighted_types(), **options)

    def weighted_types(self) -> str | list[str] | dict[str, float]:
        """The variants, of which a text may name several with commas between, with `loss_weights` where given."""
        kinds, weights = self.loss_type, self.loss_weights
        if isinstance(kinds, str) and "," in kinds:
            kinds = [name.strip() for name in kinds.split(",")]
        if weights is None:
            return kinds
        if isinstance(kinds, Mapping):
            raise ValueError("loss_weights must be left out where loss_type has the weights; got both")
        names = [kinds] if isinstance(kinds, str) else list(kinds)
        try:
            numbers = [float(weight) for weight in weights]
        except ValueError:
            numbers = []
        if len(numbers) != len(names) or len(set(names)) != len(names):
            raise ValueError(
                f"loss_weights must be a number for each variant of loss_type, named once; got {weights} for {names}"
            )
        return dict(zip(names, numbers, strict=True))


PAIR_METRICS = {
    "rewards/chosen": "chosen_rewards",
    "rewards/rejected": "rejected_rewards",
    "rewards/margins": "margins",
    "rewards/accuracies": "accuracies",
    "logps/chosen": "chosen_logps",
    "logps/rejected": "rejected_logps",
}
"""Log name → field of `PreferenceOutput`, [B], whose mean it is."""
