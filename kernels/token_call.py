"""What every kernel of token statistics is called with: whose statistics, and under which options."""

from typing import NamedTuple

from torch import Tensor


class TokenCall(NamedTuple):
    """One call, passed whole from the entry point (`ops.call.token_call` makes and checks it) down to the kernels."""

    logits: Tensor
    """[..., V]. Kernels want a vocabulary that is dense in memory, and rows as they like."""
    labels: Tensor
    """[...], int64 or int32."""
    reference: Tensor | None
    """[..., V], the logits of the exact KL's reference; a constant."""
    ignore_index: int
    """Tokens with this label are not read: their statistics and gradients are 0."""
    temperature: float
    """Divides the logits, after soft-capping."""
    softcap: float
    """Logits become softcap tanh(logits / softcap); 0: they stay."""

    @property
    def options(self) -> tuple[int, float, float]:
        """(ignore_index, temperature, softcap): what is left without the tensors."""
        return self[3:]
