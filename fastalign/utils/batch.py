"""What a batch is, wherever one is made or read."""

from __future__ import annotations

from torch import Tensor

IGNORE = -100
"""Label of positions that no loss counts."""

Batch = dict[str, Tensor]
"""input_ids, attention_mask, position_ids and labels, [B, T] each, and what a trainer adds."""
