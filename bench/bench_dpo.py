"""DPO from the policy's logits, the reference's sequence log-probs given: the loss, and the loss with its gradient."""

from __future__ import annotations

import torch
from harness.case import Problem
from harness.interleave import replay
from harness.suite import LogitsSuite
from harness.variants import Function, by_module, logits_variants
from torch import Tensor
from torch.nn import functional as F

import fastalign as fa

BETA = 0.1


def _plain(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Rafailov et al. 2023, eq. 7. The first half of the batch is chosen over the second."""
    chosen, rejected = logps.sum(-1).chunk(2)
    ref_chosen, ref_rejected = ref_logps.chunk(2)
    return -F.logsigmoid(BETA * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean()


def _module(inplace: bool) -> Function:
    module = fa.losses.DPOLoss(beta=BETA, inplace_backward=inplace)

    def loss(logits: Tensor, labels: Tensor, ref_logps: Tensor) -> Tensor:
        chosen, rejected = ref_logps.double().chunk(2)  # as the trainers keep them: the policy's sums are not rounded
        return module(logits, labels, ref_chosen_logps=chosen, ref_rejected_logps=rejected).loss

    return loss


def _step_zero(problem: Problem) -> dict[str, float]:
    """Loss and largest reward where the policy is the reference: ln 2 and 0."""
    with torch.no_grad():
        pairs = fa.sequence_logps(problem.logits, problem.labels).chunk(2)
        result = fa.losses.dpo_loss(*pairs, *pairs, beta=BETA)
    rewards = torch.cat([result.chosen_rewards, result.rejected_rewards])
    return {"step_zero_loss": float(result.loss), "step_zero_reward": float(rewards.abs().max())}


SUITE = LogitsSuite("dpo", ("forward", "both"), logits_variants(by_module(_module), _plain), _plain, _step_zero)


def bench_dpo(case, variant, record_of, benchmark):
    replay(benchmark, record_of(case)["variants"][variant]["seconds"])
