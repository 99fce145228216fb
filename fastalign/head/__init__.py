"""The fused language-model head: token statistics and losses from hidden states, logits never held whole."""

from .head import Head, LogitsSource, as_head, head_token_stats
from .plan import PLANS, HeadPlan, head_plan

__all__ = ["PLANS", "Head", "HeadPlan", "LogitsSource", "as_head", "head_plan", "head_token_stats"]
