"""fastalign: fused, compiled losses for aligning language models with human preferences."""

from . import losses
from ._backends import backends, use_backend
from .ops import TokenStats, sequence_logps, token_logps, token_stats

__version__ = "0.1.0"
__all__ = ["TokenStats", "backends", "losses", "sequence_logps", "token_logps", "token_stats", "use_backend"]
