"""TRPO's updates (Schulman et al. 2015) of a language model: a trust-region step per mini-batch, then the values' fit.

The KL is differentiated twice, so the policy's attention runs in plain operations, and a mini-batch is one forward pass
whose graph is held whole: keep mini-batches small.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ... import rl
from ...losses.policy import PolicyLossOutput, PPOLoss
from ...models.actor_critic import policy_logits
from ...utils.batch import IGNORE, Batch
from .rollout import Episode


def trust_region_updates(trainer: Any, episodes: Sequence[Episode]) -> dict[str, float]:
    """One step of the policy per mini-batch, and `num_ppo_epochs` passes over the responses for the value function.

    Raises ValueError with more than one process: the step is not distributed.
    """
    updater, args = trainer._ready(), trainer.args
    if trainer.accelerator.num_processes > 1:
        raise ValueError(f"objective=trpo runs on one process; got {trainer.accelerator.num_processes}")
    policy, options = trainer.inner.policy, trainer.value_options()
    region = rl.TrustRegion(
        policy.parameters(), delta=args.trpo_delta, damping=args.trpo_damping, cg_iterations=args.trpo_cg_iterations
    )
    measure = PPOLoss(kind="trpo", temperature=args.temperature, entropy_coef=args.entropy_coef, report_entropy=True)
    steps, found = [], []
    trainer.inner.eval()
    for chosen in updater.mini_batches(episodes, trainer.state.global_step, 0):
        batch = updater.batch(chosen)
        with sdpa_kernel(SDPBackend.MATH):
            surrogate = functools.partial(_surrogate_loss, trainer, measure, batch)
            steps.append(region.step(surrogate, _kl_to_now(trainer, batch)))
        with torch.no_grad():
            found.append(_surrogate(trainer, measure, batch))
    for epoch in range(args.num_ppo_epochs):
        for chosen in updater.mini_batches(episodes, trainer.state.global_step, epoch):
            _fit_values(trainer, updater, chosen, options)
    mean = lambda values: sum(map(float, values)) / len(steps)  # noqa: E731
    return {
        "policy/accepted": mean(s.accepted for s in steps),
        "policy/step_kl": mean(s.kl for s in steps),
        "policy/backtracks": mean(s.backtracks for s in steps),
        "loss/policy_avg": mean(out.policy_loss for out in found),
        "policy/approxkl_avg": mean(out.approxkl for out in found),
        "policy/entropy_avg": mean(out.entropy for out in found),  # type: ignore[arg-type]
        "val/ratio": mean(out.ratio for out in found),
        **updater.means.pop(lambda x: x),
        "lr": trainer.scheduler.get_last_lr()[0],
    }


def _surrogate(trainer: Any, measure: PPOLoss, batch: Batch) -> PolicyLossOutput:
    logits = policy_logits(trainer.inner, batch, values=False, args=trainer.args)
    weights = batch.get("rollout_importance_weights")
    given = (batch["labels"], batch["rollout_logps"], batch["rollout_advantages"])
    return measure(logits, *given, importance_weights=weights)


def _surrogate_loss(trainer: Any, measure: PPOLoss, batch: Batch) -> Tensor:
    return _surrogate(trainer, measure, batch).loss


def _kl_to_now(trainer: Any, batch: Batch) -> Any:
    """KL(policy as it is now, policy), a function without arguments."""
    mask, temperature = batch["labels"] != IGNORE, trainer.args.temperature
    with torch.no_grad():
        old = trainer.inner(batch, values=False).logits / temperature
    return lambda: rl.exact_kl(trainer.inner(batch, values=False).logits / temperature, old, mask)


def _fit_values(trainer: Any, updater: Any, chosen: Sequence[Episode], options: Any) -> None:
    """One optimiser step of the value function alone: no loss reaches the policy, which has no gradient then."""
    tokens, size = sum(e.counted for e in chosen), trainer.args.per_device_train_batch_size
    for start in range(0, len(chosen), size):
        batch = updater.batch(chosen[start : start + size])
        share, metrics = updater.value_share(trainer.inner.values(batch), batch, options, tokens)
        updater.backward(share)
        updater.means.add(metrics, (batch["labels"] != IGNORE).sum())
    updater.optimizer_step(chosen)
