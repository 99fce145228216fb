"""From a batch of scored responses to optimiser steps: epochs, mini-batches, micro-batches, and what they weigh.

Every process holds all episodes of a step and takes its share of each mini-batch, so the counts that losses divide by
are known without communication, and the update is the same on one process as on many: gradients are summed over
micro-batches and processes and divided once, by what the whole mini-batch holds.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, get_scheduler

from ...losses.policy import PolicyLossOutput, PPOLoss
from ...losses.value import ptx_loss, value_loss
from ...models.actor_critic import policy_logits
from ...models.loading import pad_id
from ...models.logits import ModelLogits
from ...utils.batch import IGNORE, Batch
from ..common.base import Means
from ..common.finite import name_rows
from ..data.collate import SFTCollator
from ..data.encode import Encoder
from ..data.files import named, read_rows
from ..data.problems import tally
from ..data.tokenize import tokenize_sft
from .config import PolicyConfig
from .rollout import Episode, collate, group_numbers, spread

_SEQUENCE_MEANS = ("grpo", "dr_grpo")
_POLICY_METRICS = {
    "loss/policy_avg": "policy_loss",
    "policy/approxkl_avg": "approxkl",
    "policy/clipfrac_avg": "clipfrac",
    "policy/entropy_avg": "entropy",
    "val/ratio": "ratio",
    "policy/kl_avg": "kl",
}
_PER_ITEM = ("loss/policy_avg",)
_OF_TOKENS = ("logps", "sampler_logps", "importance_weights", "advantages", "ref_logps", "values", "returns")
"""What episodes hold for each token, that updates look at."""


@dataclass
class ValueOptions:
    """What the value function's loss needs."""

    vf_coef: float
    cliprange_value: float | None


class PretrainingStream:
    """An endless, seeded series of batches of tokenised rows (`prompt_ids`, `completion_ids`)."""

    def __init__(self, rows: Any, batch_size: int, fill: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.collator = SFTCollator(fill)

    def batch(self, update: int) -> list[int]:
        """Row numbers for that update."""
        start = update * self.batch_size
        count = len(self.rows)
        shuffles: dict[int, np.ndarray] = {}
        for i in range(start, start + self.batch_size):
            if i // count not in shuffles:
                shuffles[i // count] = np.random.default_rng((self.seed, 4, i // count)).permutation(count)
        return [int(shuffles[i // count][i % count]) for i in range(start, start + self.batch_size)]


class Updater:
    """Runs the updates of a step.

    Args:
        args: a PolicyConfig.
        accelerator, model, optimizer: accelerate's; the model is an `ActorCritic`, wrapped or not.
        scheduler: stepped once per update.
        reference: a padded batch to what stands for the reference's logits; used where the loss holds an exact KL.
        fill: id to pad with.
        ptx: pretraining text to mix in, or None.
        grouped: run a prompt once for all of its responses in a forward pass.
    """

    def __init__(
        self,
        args: Any,
        accelerator: Any,
        model: Any,
        optimizer: Any,
        scheduler: Any,
        reference: Callable[[Batch], ModelLogits] | None,
        fill: int,
        ptx: PretrainingStream | None,
        grouped: bool = False,
    ) -> None:
        self.args, self.accelerator, self.model = args, accelerator, model
        self.optimizer, self.scheduler = optimizer, scheduler
        self.reference, self.fill, self.ptx, self.grouped = reference, fill, ptx, grouped
        self.means, self.ptx_means = Means(), Means()
        self.updates = 0

    # ------------------------------------------------------------------------------------------------ mini-batches
    def mini_batches(self, episodes: Sequence[Episode], step: int, epoch: int) -> Iterator[list[Episode]]:
        """The episodes of each update, of all processes, in an order that the seed, step and epoch decide."""
        order = np.random.default_rng((self.args.seed, 3, step, epoch)).permutation(len(episodes))
        for part in np.split(order, self.args.num_mini_batches):
            yield [episodes[i] for i in part]

    def mine(self, rows: Sequence[Any]) -> list[Any]:
        """This process's share of a mini-batch."""
        return list(rows[self.accelerator.process_index :: self.accelerator.num_processes])

    def run(self, episodes: Sequence[Episode], loss: PPOLoss, values: ValueOptions | None, step: int) -> dict:
        """All updates of a step. Returns the metrics, means over real tokens of all its updates."""
        self.model.train()
        norms = []
        for epoch in range(self.args.num_ppo_epochs):
            for chosen in self.mini_batches(episodes, step, epoch):
                norms.append(self._update(chosen, loss, values))
        metrics = self.means.pop(self._sum) | self.ptx_means.pop(self._sum)
        grad_norm = float(np.mean(torch.stack(norms).tolist()))
        return {**metrics, "grad_norm": grad_norm, "lr": self.scheduler.get_last_lr()[0]}

    def _update(self, chosen: Sequence[Episode], loss: PPOLoss, values: ValueOptions | None) -> Tensor:
        """One optimiser step on one mini-batch; returns the gradient's norm."""
        counted = [e.counted for e in chosen]
        tokens = sum(counted)
        items = sum(n > 0 for n in counted) if loss.config["normalization"] in _SEQUENCE_MEANS else tokens
        size = self.args.per_device_train_batch_size
        own = sorted(self.mine(chosen), key=lambda e: -len(e.prompt.ids) - len(e.ids))
        if self.grouped:  # side by side, in the order of each group's longest
            numbers = group_numbers(own)
            own = [own[i] for i in sorted(range(len(own)), key=numbers.__getitem__)]
        parts = [own[start : start + size] for start in range(0, len(own), size)]
        self._pretraining()
        for number, part in enumerate(parts):
            with self._syncs(number == len(parts) - 1):
                self.backward(self.loss(self.batch(part, self.grouped), loss, values, tokens, items))
        return self.optimizer_step(chosen)

    def batch(self, episodes: Sequence[Episode], grouped: bool = False) -> Batch:
        """The episodes padded, with old log-probabilities, advantages and the rest where the labels are: [B, T]."""
        batch = collate(episodes, self.fill, grouped=grouped)
        for name in _OF_TOKENS:
            rows = [getattr(e, name) for e in episodes]
            if rows[0] is not None:
                # On the CPU, where the episodes are: to find the places of a mask is to wait for a GPU.
                batch[f"rollout_{name}"] = spread(rows, batch["labels"])
        left_out = [(~e.kept).float() for e in episodes if e.kept is not None]
        if left_out:
            batch["labels"][spread(left_out, batch["labels"]) > 0] = IGNORE
        if not all(e.counts for e in episodes):
            batch["labels"][torch.tensor([not e.counts for e in episodes])] = IGNORE
        return {name: x.to(self.accelerator.device) for name, x in batch.items()}

    def loss(self, batch: Batch, loss: PPOLoss, values: ValueOptions | None, tokens: int, items: int) -> Tensor:
        """The micro-batch's share of the mini-batch's loss; notes its metrics."""
        mask = batch["labels"] != IGNORE
        count = mask.sum()
        logits = self.logits(batch, values is not None)
        exact = loss.config["kl_estimator"] == "exact"
        drifts = loss.config["general"].off_policy_mask_threshold is not None
        out = loss(
            logits,
            batch["labels"],
            batch["rollout_logps"],
            batch["rollout_advantages"],
            ref_logps=None if exact or not loss.config["kl_coef"] else batch.get("rollout_ref_logps"),
            ref_logits=self.reference(batch) if exact and self.reference is not None else None,
            importance_weights=batch.get("rollout_importance_weights"),
            sampler_logps=batch.get("rollout_sampler_logps") if drifts else None,
            num_items=items,
        )
        metrics = self._metrics(out, count, tokens)
        total = out.loss
        if values is not None and logits.answer.values is not None:
            share, more = self.value_share(logits.answer.values, batch, values, tokens)
            total, metrics = total + share, {**metrics, **more}
        self.means.add(metrics, count)
        return total

    def logits(self, batch: Batch, values: bool = False) -> ModelLogits:
        """What stands for the policy's logits in a loss; after it, `answer` holds the values of that forward pass."""
        return policy_logits(self.model, batch, values, self.args)

    def value_share(
        self, predicted: Tensor, batch: Batch, values: ValueOptions, tokens: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's share of vf_coef times the mini-batch's value loss, and the metrics."""
        mask = batch["labels"] != IGNORE
        old, returns = batch["rollout_values"], batch["rollout_returns"]
        value = value_loss(predicted, old, returns, mask, cliprange_value=values.cliprange_value)
        share = values.vf_coef * value.loss * (mask.sum() / max(tokens, 1))
        return share, {"loss/value_avg": value.loss.detach(), "val/clipfrac_avg": value.clipfrac}

    @staticmethod
    def _metrics(out: PolicyLossOutput, count: Tensor, tokens: int) -> dict[str, Tensor]:
        found = {name: getattr(out, field) for name, field in _POLICY_METRICS.items()}
        # The policy loss is a share of the mini-batch's already; the means below weigh by tokens.
        count = count.clamp(min=1)  # of none all shares are 0
        return {name: x * tokens / count if name in _PER_ITEM else x for name, x in found.items() if x is not None}

    # ------------------------------------------------------------------------------------------------- PPO-ptx
    def _pretraining(self) -> None:
        """Adds the gradient of -ptx_coef times the mean log-likelihood of this update's pretraining rows."""
        if self.ptx is None:
            return
        chosen = [self.ptx.rows[i] for i in self.ptx.batch(self.updates)]
        tokens = int((self.ptx.collator(chosen)["labels"] != IGNORE).sum())
        own = self.mine(chosen)
        size = self.args.per_device_train_batch_size
        for start in range(0, len(own), size):
            batch = self.ptx.collator(own[start : start + size])
            batch = {name: x.to(self.accelerator.device) for name, x in batch.items()}
            mask = batch["labels"] != IGNORE
            with self._syncs(False):
                logps = self.logits(batch).stats(batch["labels"]).logps
                loss = ptx_loss(logps.new_zeros(()), logps, mask, ptx_coef=self.args.ptx_coef)
                self.backward(loss * (mask.sum() / tokens))
            self.ptx_means.add({"loss/ptx_avg": loss}, mask.sum())

    # --------------------------------------------------------------------------------------------- the machinery
    def backward(self, loss: Tensor) -> None:
        """Adds the gradient. Processes' gradients are averaged at the last one of an update, hence their number."""
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def _syncs(self, now: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if now else self.accelerator.no_sync(self.model)

    def optimizer_step(self, chosen: Sequence[Episode]) -> Tensor:
        """Cuts the gradient, steps optimiser and scheduler. Returns the norm before the cut.

        Raises FloatingPointError, in every process alike and with the weights as they were, if it is not finite.
        """
        limit = self.args.max_grad_norm or float("inf")
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if not math.isfinite(float(norm)):
            self.optimizer.zero_grad()
            raise FloatingPointError(
                f"update {self.updates + 1} was not made: the gradient's norm is {float(norm)}; it is of responses to "
                f"{name_rows(e.prompt.row for e in chosen)}"
            )
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.updates += 1
        return norm

    def _sum(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum")


def make_accelerator(args: PolicyConfig) -> Accelerator:
    """One of its own for each trainer."""
    # As transformers does: an earlier trainer's precision, and its device, are not this one's.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        cpu=args.use_cpu,
        mixed_precision="bf16" if args.bf16 else None,
        log_with=args.report_to or None,
        project_dir=args.output_dir,
    )


def make_optimizer(args: Any, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW; weight decay is for matrices alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (args.adam_beta1, args.adam_beta2)
    groups = [g for g in groups if g["params"]]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon)


def make_scheduler(args: Any, optimizer: torch.optim.Optimizer, updates: int) -> Any:
    """The schedule of the learning rate over that many updates."""
    warmup = args.warmup_steps if args.warmup_steps >= 1 else args.warmup_steps * updates
    return get_scheduler(args.lr_scheduler_type, optimizer, num_warmup_steps=round(warmup), num_training_steps=updates)


def pretraining_stream(args: Any, tokenizer: PreTrainedTokenizerBase, processes: int) -> PretrainingStream:
    """The rows of `ptx_dataset`, tokenised."""
    length = args.max_prompt_length + args.response_length
    how: Any = {"truncation_mode": args.truncation_mode, "skip_bad_rows": args.skip_bad_rows}
    how["template_options"] = args.chat_template_kwargs or {}
    with named("ptx_dataset"), tally("ptx_dataset"):
        rows = tokenize_sft(read_rows(args.ptx_dataset, args.reading), Encoder(tokenizer, length, **how))
    responses = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    return PretrainingStream(rows, args.ptx_batch_size or responses, pad_id(tokenizer), args.seed)
