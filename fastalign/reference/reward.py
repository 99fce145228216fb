"""Reward models, pair by pair: Bradley-Terry, all pairs of a ranking, best of K."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses.reward import best_of_k_loss, kwise_reward_loss, reward_loss
from .case import Case, Sizes
from .listwise import list_scores, ranked_scores

_CENTER = 0.01


def pair(better: Tensor, worse: Tensor) -> Tensor:
    """-log(1 / (1 + e^{worse - better})), in float64."""
    return torch.log1p(torch.exp(worse.double() - better.double()))


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, center: float = 0.0) -> Tensor:
    """Mean of -log sigmoid(r_w - r_l - margin) + center (r_w + r_l)^2."""
    terms = []
    for i in range(chosen.shape[0]):
        offset = 0.0 if margin is None else margin[i].double()
        terms.append(pair(chosen[i].double() - offset, rejected[i]) + center * (chosen[i].double() + rejected[i]) ** 2)
    return torch.stack(terms).mean()


def kwise(scores: Tensor, mask: Tensor, ranks: Tensor | None = None, center: float = 0.0) -> Tensor:
    """Ouyang et al. 2022, eq. 1: per prompt the mean over its pairs, then the mean over prompts with a pair.

    With `center`, each pair's term has + center (r_w + r_l)^2.
    """
    prompts = []
    for row in range(scores.shape[0]):
        place = range(scores.shape[1]) if ranks is None else ranks[row].tolist()
        entries = [k for k in range(scores.shape[1]) if mask[row, k]]
        r = scores[row].double()
        pairs = [
            pair(r[w], r[x]) + center * (r[w] + r[x]) ** 2 for w in entries for x in entries if place[w] < place[x]
        ]
        if pairs:
            prompts.append(torch.stack(pairs).mean())
    return torch.stack(prompts).mean() if prompts else torch.zeros((), dtype=torch.float64)


def best_of_k(scores: Tensor, mask: Tensor, best: Tensor) -> Tensor:
    """-log softmax of the best completion's score among its list's, over lists of two or more."""
    lists = []
    for row in range(scores.shape[0]):
        entries = [k for k in range(scores.shape[1]) if mask[row, k]]
        if len(entries) > 1:
            total = torch.stack([torch.exp(scores[row, k].double()) for k in entries]).sum()
            lists.append(torch.log(total) - scores[row, best[row]].double())
    return torch.stack(lists).mean() if lists else torch.zeros((), dtype=torch.float64)


# --------------------------------------------------------------------------------------------------------------- inputs
def _pair_scores(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    chosen, rejected = torch.randn((2, sizes.batch), generator=generator, dtype=torch.float64)
    return {"chosen": chosen, "rejected": rejected}


def _margin_scores(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    inputs = _pair_scores(sizes, generator)
    return {**inputs, "margin": torch.rand(sizes.batch, generator=generator, dtype=torch.float64)}


def _best_scores(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    inputs = list_scores(sizes, generator)
    best = torch.randint(0, sizes.list_length, (sizes.batch,), generator=generator)
    return {**inputs, "best": best % inputs["mask"].sum(-1)}


CASES = [
    Case("reward", lambda **t: reward_loss(**t).loss, bradley_terry, _pair_scores, ("chosen", "rejected")),
    Case(
        "reward_margin_centered",
        lambda **t: reward_loss(**t, center_coefficient=_CENTER).loss,
        lambda **t: bradley_terry(**t, center=_CENTER),
        _margin_scores,
        ("chosen", "rejected"),
    ),
    Case("kwise_reward", lambda **t: kwise_reward_loss(**t).loss, kwise, ranked_scores, ("scores",)),
    Case(
        "kwise_reward_centered",
        lambda **t: kwise_reward_loss(**t, center_coefficient=_CENTER).loss,
        lambda **t: kwise(**t, center=_CENTER),
        ranked_scores,
        ("scores",),
    ),
    Case("best_of_k", lambda **t: best_of_k_loss(**t).loss, best_of_k, _best_scores, ("scores",)),
]
