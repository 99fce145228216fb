"""The fused language-model head: token statistics and losses from hidden states, logits never held whole."""

from .head import PLANS, Head, HeadPlan, LogitsSource, as_head, head_plan, head_token_stats

__all__ = ["PLANS", "Head", "HeadPlan", "LogitsSource", "as_head", "head_plan", "head_token_stats"]
