"""One forward pass over a prompt for all of its completions.

The completions of a pair or a ranked list begin with the same tokens, which a causal model turns into the same hidden
states: here they are computed once. A group's common beginning and then, one after the other, what is left of each
completion make one row; a mask keeps the completions from seeing each other, positions go on from the beginning in each
of them, and the head picks every token's hidden state from where it lies (`rows` of `head_token_stats`).

What it saves is the beginning's part of the body, forward and backward, and of its activations. What it costs is
attention under a mask, whose empty blocks are computed too; where that would outweigh the gain, rows stay as they were.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..utils.modes import evaluating
from .lm_head import unwrapped

_WORTH = 0.95  # of the plain pass's estimated work: below it, sharing is used
_ATTENTION = ("sdpa", "eager")  # that take a mask of [B, 1, T, T]
_WINDOWS = ("sliding_window", "attention_chunk_size", "keep_window_size")
_FULL = ("full_attention", "global")
Batch = Mapping[str, Tensor]


class Shared(NamedTuple):
    """A padded batch of N sequences in G rows."""

    inputs: dict[str, Tensor]
    """input_ids and position_ids, [G, L], and attention_mask, [G, 1, L, L]: what the model runs on."""
    rows: Tensor
    """[N, T], int64: which of the G * L hidden states is that of each token of the padded batch."""


class PromptSharing:
    """Whether, and at which work, a model can run a prompt once for several completions.

    Raises:
        ValueError: it cannot, and why: no positions among its inputs, an attention that takes no such mask or sees a
            window only, or hidden states that differ from those of the plain pass (tried on two short sequences).
    """

    def __init__(self, model: Any, hidden_states: Any) -> None:
        """hidden_states: runs the model on a batch for what its head would be given, [B, T, H]."""
        inner = unwrapped(model)
        self.config = inner.config.get_text_config()
        self.kind = getattr(self.config, "_attn_implementation", None)
        if self.kind not in _ATTENTION:
            raise ValueError(f"attn_implementation must be one of {', '.join(_ATTENTION)}; got {self.kind}")
        if window := _window(self.config):
            raise ValueError(f"attention must see the whole sequence; the configuration has {window}")
        self._dtype = next((p.dtype for p in inner.parameters() if p.is_floating_point()), torch.float32)
        self._dropout = any(
            isinstance(value, float) and value > 0 and (name == "p" or "dropout" in name)
            for module in inner.modules()
            for name, value in vars(module).items()
        )
        # Of a model that keeps its causal mask as a table: a row may be no longer.
        tables = [b.shape[-1] for b in inner.buffers() if b.dtype == torch.bool and b.shape[-1:] == b.shape[-2:-1]]
        self._longest = min(tables, default=None)
        ends = (inner.get_input_embeddings(), inner.get_output_embeddings())
        embedded = {id(end.weight): end.weight.numel() for end in ends if end is not None}  # one where they are tied
        self._per_token = max(1, sum(p.numel() for p in inner.parameters()) - sum(embedded.values()))
        self._per_pair = 2 * _size(self.config, "num_hidden_layers") * _size(self.config, "hidden_size")
        self._try(inner, hidden_states)

    def __call__(self, model: nn.Module, batch: Batch, groups: Tensor) -> Shared | None:
        """The batch in fewer tokens; None where that would not pay or not fit, or where dropout is at work.

        Args:
            batch: right-padded input_ids, attention_mask and position_ids, [N, T].
            groups: [N], int64: the group of each sequence, 0 to G - 1, none empty.
        """
        if self._dropout and model.training:
            return None  # a row would share its dropout with the others of its group
        found = share(batch, groups)
        mask = batch["attention_mask"]
        count, length = mask.shape
        own, wide = found.inputs["input_ids"].shape
        if self._longest is not None and wide > self._longest:
            return None
        # Without padding attention skips what is above the diagonal.
        pairs = count * length * length * (1.0 if bool((mask == 0).any()) else 0.5)
        plain = count * length * self._per_token + pairs * self._per_pair
        if own * wide * self._per_token + own * wide * wide * self._per_pair > _WORTH * plain:
            return None
        return found._replace(inputs=self._masked(found.inputs))

    def _masked(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mask in the form that the attention takes: booleans, or what is added to the scores."""
        if self.kind == "sdpa":
            return inputs
        mask = inputs["attention_mask"]
        added = torch.zeros(mask.shape, dtype=self._dtype, device=mask.device)
        return {**inputs, "attention_mask": added.masked_fill(~mask, torch.finfo(self._dtype).min)}

    @torch.no_grad()
    def _try(self, model: Any, hidden_states: Any) -> None:
        """Runs two sequences with a common beginning both ways."""
        device = next(model.parameters()).device
        ids = (7 * torch.arange(9, device=device) + 3) % min(model.get_input_embeddings().weight.shape[0], 997)
        both = torch.stack([ids, torch.cat([ids[:4], ids.flip(0)[:5]])])
        mask = torch.ones_like(both)
        mask[1, 7:] = 0
        batch = {"input_ids": both, "attention_mask": mask, "position_ids": torch.arange(9, device=device).expand(2, 9)}
        found = share(batch, torch.zeros(2, dtype=torch.int64, device=device))
        with evaluating(model):
            with _Arithmetic() as arithmetic:
                plain = hidden_states(batch)
            try:
                shared = hidden_states(self._masked(found.inputs)).flatten(0, 1)[found.rows]
            except Exception as error:  # whatever a model raises that cannot work with such a mask
                raise ValueError(f"{type(model).__name__} takes no mask of [B, 1, T, T]: {error}") from error
        real = mask.bool()
        gap = (plain - shared)[real].abs().max() / plain[real].abs().max()
        limit = _rounding(plain.dtype, arithmetic.eps, plain.shape[-1], _size(self.config, "num_hidden_layers"))
        if not gap <= limit:
            raise ValueError(
                f"{type(model).__name__} gives other hidden states where a prompt is shared, by {gap:.1e}; rounding "
                f"explains {limit:.1e}"
            )


class _Arithmetic(TorchDispatchMode):
    """Watches a pass for the coarsest floating-point type that any operation gives.

    Not that of the result: attention in float64 may compute its softmax in float32, autocast may compute in bfloat16.
    """

    eps = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, Tensor) and result.is_floating_point():
                self.eps = max(self.eps, torch.finfo(result.dtype).eps)
        return results


def _rounding(dtype: torch.dtype, coarsest: float, hidden: int, layers: int) -> float:
    """How far rounding alone can take hidden states of two orders of the same sums apart, relative to the largest.

    In every layer two kinds of results depend on the order: entries of the softmax and whatever else is stored, rounded
    once in the coarsest type; and sums over up to `hidden` products, whose errors of eps each walk at random,
    sqrt(hidden) of them far, in the type that accumulates them (float32 for 16 bits). The layers' errors are
    independent and add up as sqrt(layers). Of all that, four standard deviations. Beyond half the digits nothing could
    be told from another mask.

    Args:
        dtype: of the hidden states.
        coarsest: eps of the coarsest type that the pass used.
        hidden, layers: the model's sizes.
    """
    accumulated = min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    walk = 4 * math.sqrt(layers) * (coarsest + math.sqrt(hidden) * accumulated)
    return min(walk, 0.5 * math.sqrt(coarsest))


def _window(config: Any) -> str | None:
    """What in a configuration says that some layer does not see the whole sequence."""
    # The second is GPT-Neo's name; its window_size is of its local layers.
    kinds = {kind for name in ("layer_types", "attention_layers") for kind in getattr(config, name, None) or ()}
    if kinds := kinds.difference(_FULL):
        return f"layers of {', '.join(sorted(kinds))}"
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return next((f"{name}={getattr(config, name)}" for name in _WINDOWS if getattr(config, name, None)), None)


def _size(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int):
        raise ValueError(f"the configuration must say {name}; got {value}")
    return value


def share(batch: Batch, groups: Tensor) -> Shared:
    """Each group in one row: its longest common beginning, then the rest of each of its sequences.

    Args:
        batch: right-padded input_ids, attention_mask and position_ids, [N, T].
        groups: [N], int64: the group of each sequence, 0 to G - 1, none empty.

    Returns:
        The rows, their mask as booleans (True: is seen), and where each token went; padding may lie anywhere.
    """
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    count, length = ids.shape
    number = int(groups.max()) + 1
    lengths, at = real.sum(-1), torch.arange(length, device=ids.device)
    numbered = torch.arange(count, device=ids.device)
    first = torch.full((number,), count, device=ids.device).scatter_reduce(0, groups, numbered, "amin")[groups]
    same = (ids == ids[first]) & real & real[first]
    own = same.long().cumprod(-1).sum(-1)  # tokens in common with the group's first sequence
    common = torch.full((number,), length, device=ids.device).scatter_reduce(0, groups, own, "amin")[groups]
    # Members of a group come one after the other, in the batch's order.
    earlier = (groups[:, None] == groups) & (numbered[:, None] > numbered)
    rest = lengths - common
    start = common + (earlier * rest).sum(-1)
    used = torch.zeros(number, dtype=torch.int64, device=ids.device).index_add(0, groups, rest)
    wide = int((used.index_add(0, groups, common * ~earlier.any(-1))).max())
    place = torch.where(at < common[:, None], at, at + (start - common)[:, None])
    rows = torch.where(real, place + wide * groups[:, None], 0)

    def laid(values: Tensor, empty: int) -> Tensor:
        out = torch.full((number * wide,), empty, dtype=values.dtype, device=ids.device)
        out[rows[real]] = values[real]  # tokens in common are written several times, with one value
        return out.view(number, wide)

    segment = torch.where(at < common[:, None], -1, numbered[:, None])
    segments = laid(segment.expand(count, length), -2)
    along = torch.arange(wide, device=ids.device)
    sees = (segments[:, None, :] == -1) | (segments[:, None, :] == segments[:, :, None])
    mask = sees & (along <= along[:, None])  # padding sees itself: a row that sees nothing would be NaN
    inputs = {
        "input_ids": laid(ids, 0),
        "position_ids": laid(batch["position_ids"], 0),
        "attention_mask": mask[:, None],
    }
    return Shared(inputs, rows)
