"""Ranked lists, entry by entry: Plackett-Luce / ListMLE and PRO as their papers print them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..losses.listwise import PROLoss, plackett_luce_loss
from .case import Case, Sizes


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean() if values else torch.zeros((), dtype=torch.float64)


def plackett_luce(scores: Tensor, mask: Tensor, ranks: Tensor | None = None) -> Tensor:
    """-sum_k log(e^{s_k} / (e^{s_k} + sum over entries of a worse rank)), averaged over lists with a comparison."""
    lists = []
    for row in range(scores.shape[0]):
        entries = [k for k in range(scores.shape[1]) if mask[row, k]]
        place = {k: float(ranks[row, k]) if ranks is not None else float(k) for k in entries}
        terms = []
        for k in entries:
            worse = [i for i in entries if place[i] > place[k]]
            if worse:
                candidates = torch.stack([scores[row, i].double() for i in [k, *worse]])
                terms.append(-torch.log_softmax(candidates, 0)[0])
        if terms:
            lists.append(torch.stack(terms).sum())
    return _mean(lists)


def completion_logps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of the log-probabilities, number of tokens) over the labels that are not -100 of one response, [T, V]."""
    tokens = [t for t in range(labels.shape[0]) if labels[t] != -100]
    logps = [torch.log_softmax(logits[t].double(), -1)[labels[t]] for t in tokens]
    return torch.stack(logps).sum(), torch.tensor(len(tokens), dtype=torch.float64)


def pro(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor,
    rewards: Tensor | None = None,
    *,
    one_vs_rest: bool = False,
    sft_weight: float = 0.0,
) -> Tensor:
    """Song et al. 2023 for lists best first and without ties: mean log-probabilities, reward-gap temperatures, and the
    authors' supervised term, sft_weight (n - 1)^2 times minus the best response's summed log-probability."""
    lists = []
    for row in range(labels.shape[0]):
        entries = [k for k in range(labels.shape[1]) if mask[row, k]]
        if len(entries) < 2:
            continue
        sums, counts = zip(*(completion_logps(logits[row, k], labels[row, k]) for k in entries), strict=True)
        s = [total / count for total, count in zip(sums, counts, strict=True)]
        r = None if rewards is None else [rewards[row, k].double() for k in entries]
        stages = []
        for k in range(len(entries) - 1):
            others = range(k + 1, len(entries))
            temperature = [torch.ones((), dtype=torch.float64) if r is None else r[k] - r[i] for i in others]
            own = s[k] * torch.stack(temperature).max()
            against = [s[i] * t for i, t in zip(others, temperature, strict=True)]
            stages.append(torch.logsumexp(torch.stack([own, *against]), 0) - own)
        ranking = stages[0] if one_vs_rest else torch.stack(stages).sum()
        lists.append(ranking + sft_weight * (len(entries) - 1) ** 2 * -sums[0])
    return _mean(lists)


# --------------------------------------------------------------------------------------------------------------- inputs
def ragged_mask(sizes: Sizes, generator: torch.Generator) -> Tensor:
    """[B, K] bool: the first list whole, the others of any length from 1 to K."""
    lengths = torch.randint(1, sizes.list_length + 1, (sizes.batch, 1), generator=generator)
    lengths[0] = sizes.list_length
    return torch.arange(sizes.list_length) < lengths


def list_scores(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    """Scores of ragged lists, [B, K]."""
    shape = (sizes.batch, sizes.list_length)
    return {
        "scores": torch.randn(shape, generator=generator, dtype=torch.float64),
        "mask": ragged_mask(sizes, generator),
    }


def ranked_scores(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    """Scores of ragged lists with ranks in any order, ties among them."""
    inputs = list_scores(sizes, generator)
    return {**inputs, "ranks": torch.randint(0, sizes.list_length, inputs["scores"].shape, generator=generator)}


def _list_logits(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    shape = (sizes.batch, sizes.list_length, sizes.length)
    labels = torch.randint(0, sizes.vocab, shape, generator=generator)
    begin = torch.randint(0, sizes.length, (*shape[:2], 1), generator=generator)
    labels[torch.arange(sizes.length) < begin] = -100
    return {
        "logits": torch.randn((*shape, sizes.vocab), generator=generator, dtype=torch.float64),
        "labels": labels,
        "mask": ragged_mask(sizes, generator),
    }


def _rewarded_logits(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    inputs = _list_logits(sizes, generator)
    gaps = 0.1 + torch.rand(inputs["mask"].shape, generator=generator, dtype=torch.float64)
    return {**inputs, "rewards": 1 - gaps.cumsum(-1)}


def _pro_case(name: str, inputs: Callable[[Sizes, torch.Generator], dict[str, Tensor]], form: str, sft: float) -> Case:
    module = PROLoss(form=form, sft_weight=sft)

    def reference(**tensors: Tensor) -> Tensor:
        return pro(**tensors, one_vs_rest=form == "infonce", sft_weight=sft)

    return Case(name, lambda **tensors: module(**tensors).loss, reference, inputs)


CASES = [
    _pro_case("pro", _list_logits, "plackett_luce", 0.0),
    _pro_case("pro_infonce", _list_logits, "infonce", 0.0),
    _pro_case("pro_rewards", _rewarded_logits, "plackett_luce", 0.0),
    _pro_case("pro_rewards_sft", _rewarded_logits, "plackett_luce", 0.05),
    Case("plackett_luce", lambda **t: plackett_luce_loss(**t).loss, plackett_luce, list_scores, ("scores",)),
    Case("listmle", lambda **t: plackett_luce_loss(**t).loss, plackett_luce, ranked_scores, ("scores",)),
]
