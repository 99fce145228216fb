"""PPO-clip from the policy's logits with its gradient: in two steps over the logits, and in one launch.

The limit that shares are given of is that of two visits (one read, then one read and write), which one launch can beat.
"""

from __future__ import annotations

import torch
from harness.case import Problem
from harness.interleave import replay
from harness.suite import LogitsSuite
from harness.variants import OURS_ONE_LAUNCH, Function, Variant, by_module, logits_variants
from torch import Tensor

import fastalign as fa

CLIP = 0.2


def inputs(problem: Problem) -> Tensor:
    """[2, B, T]: log-probabilities of the old policy, near the new one's as after an update or two, and advantages."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        logps = fa.token_logps(problem.logits, problem.labels)
    old = logps + 0.1 * torch.randn(logps.shape, generator=draw).to(logps.device)
    return torch.stack([old, torch.randn(logps.shape, generator=draw).to(logps.device)])


def _plain(logps: Tensor, given: Tensor) -> Tensor:
    """Schulman et al. 2017, eq. 7, as a loss, averaged over tokens."""
    old, advantages = given
    ratio = torch.exp(logps - old)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()


def _module(inplace: bool, fuse_backward: bool = False) -> Function:
    module = fa.losses.PPOLoss(cliprange=CLIP, inplace_backward=inplace, fuse_backward=fuse_backward)
    return lambda logits, labels, given: module(logits, labels, *given).loss


def _variants() -> dict[str, Variant]:
    one_launch = Variant(lambda: _module(True, True), ours=True, jobs=("both",))
    return {**logits_variants(by_module(_module), _plain), OURS_ONE_LAUNCH: one_launch}


SUITE = LogitsSuite("ppo", ("both",), _variants(), _plain, inputs=inputs)


def bench_ppo(case, variant, record_of, benchmark):
    replay(benchmark, record_of(case)["variants"][variant]["seconds"])
