"""The entry point: the one place where logits enter, and what is computed from their statistics."""

from .results import TokenStats, TokenStatsAndExtras
from .statistics import token_logps, token_stats

__all__ = ["TokenStats", "TokenStatsAndExtras", "token_logps", "token_stats"]
