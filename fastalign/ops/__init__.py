"""The entry point: the one place where logits enter, and what is computed from their statistics."""

from ..utils import moved as _moved
from .results import TokenStats
from .statistics import token_logps, token_stats

__all__ = ["TokenStats", "token_logps", "token_stats"]

__getattr__ = _moved.renamed(__name__, globals())
