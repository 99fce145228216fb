"""The loop of every command that learns from its own samples: roll out, weigh, update, log, evaluate, save.

A step samples a batch of responses, scores them, computes advantages, and makes `num_ppo_epochs` passes over them in
`num_mini_batches` updates each. Subclasses say what advantages and what loss. The loop runs on accelerate: one process,
several (DDP) or sharded weights (FSDP2), with the same result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, set_seed

from ... import rl
from ...models.actor_critic import ActorCritic, policy_logits
from ...models.adapters import join_with_base
from ...models.loading import disable_dropout, load_model, load_tokenizer, pad_id
from ...models.logits import GROUPS, Answer, ModelLogits, Request, ask, can_answer, shares_prompts
from ...models.lora import adapters_off, is_adapted, with_lora
from ...models.sampling import Sampling
from ...utils.batch import Batch
from ..common.callbacks import JsonlCallback, shown
from ..common.checkpoints import PARTIAL, rotate, write_folder
from ..common.given import check_config, model_given, refuse_others, with_peft_config
from ..common.sharding import whole_weights
from ..data.collate import pad
from ..data.files import Rows
from ..data.template import use_template
from . import rollout, update
from .checkpoint import RunState, load_training_state, save_policy, save_whole
from .config import PolicyConfig
from .correction import correct, entropy_control
from .keep import kept
from .reference import frozen_reference
from .rewards import RewardFunction, load_reward, scored
from .rollout import Episode, Prompt, describe, fill_in, generate, prompt_order, response_mask, stacked
from .update import PretrainingStream, Updater, ValueOptions

_SHOWN = ("objective/scores", "objective/kl", "objective/entropy", "eval/score", "eval/kl", "length", "lr")


class PolicyTrainer(ABC):
    """Base of `PPOTrainer` and `GRPOTrainer`.

    Args:
        model: a causal language model (transformers), or its folder; None takes `args.model`.
        args: the configuration.
        train_dataset, eval_dataset: rows with a `prompt` (see `data.files.read_rows`); evaluation sets may be several,
            as a mapping of names to rows.
        processing_class: the model's tokenizer; None loads that of `args.tokenizer` or the model's folder.
        reward: a function of the lists `prompts` (text or messages, as the rows have them) and `completions` (and
            columns of the rows, by name) that returns one number each; None takes `args.reward_fn` or
            `args.reward_model`.
        ref_model: the reference; None takes `args.ref_model`, or the model as it is now.
        peft_config: adapters to train, as peft describes them, in place of the lora_* keys of args.
        reward_funcs: TRL's name of `reward`; a list of functions is added up, a text is a reward model's folder.

    Raises TypeError for args of another kind, and for arguments of other libraries' trainers, with what to use instead.
    """

    updater_class: type[Updater] = Updater

    def __init__(
        self,
        model: Any,
        args: PolicyConfig,
        train_dataset: Rows,
        eval_dataset: Rows | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        reward: RewardFunction | Sequence[RewardFunction] | str | None = None,
        ref_model: Any = None,
        peft_config: Any = None,
        reward_funcs: Any = None,
        **others: Any,
    ) -> None:
        refuse_others(self, others)
        check_config(self, args)
        if reward is not None and reward_funcs is not None:
            raise ValueError("reward and reward_funcs are one argument; give it once")
        self.args, model = args, model_given(model, args)
        reward = reward_funcs if reward is None else reward
        path = model if isinstance(model, str) else args.model
        self.accelerator = update.make_accelerator(args)
        set_seed(args.seed)
        policy = load_model(str(path), args) if isinstance(model, str) else model
        if not isinstance(model, str) and processing_class is None and not (args.tokenizer or args.model):
            raise ValueError("processing_class must be the model's tokenizer; got None, and args.tokenizer names none")
        policy = with_peft_config(policy, peft_config, args)
        self.processing_class: Any = processing_class or load_tokenizer(args.tokenizer, str(path))
        use_template(self.processing_class, args.chat_template_path)
        self.fill = pad_id(self.processing_class)
        self.state = RunState(is_world_process_zero=self.accelerator.is_main_process)
        self.reward = self.load_reward(reward)
        self.data_counts: dict[str, int] = {}
        self.prompts, self.eval_prompts, self.eval_sets = rollout.all_prompts(
            train_dataset, eval_dataset, self.processing_class, args, self.reward, self.data_counts
        )
        self._reference = frozen_reference(policy, ref_model, args, self.accelerator.device)
        self.inner = self.build(policy)
        disable_dropout(self.inner)
        self.inner.policy = with_lora(policy, args, "CAUSAL_LM")  # type: ignore[arg-type]
        if args.fused_head:
            can_answer(self.inner.policy)  # before it is wrapped
        self._grouped = args.num_generations > 1 and shares_prompts(self.inner.policy, args, self.accelerator.device)
        if args.gradient_checkpointing:
            self.inner.policy.gradient_checkpointing_enable()
        self._ptx: PretrainingStream | None = None
        if args.ptx_dataset is not None:
            self._ptx = update.pretraining_stream(args, self.processing_class, self.accelerator.num_processes)
        self.model: Any = None
        self.optimizer: Any = None
        self.scheduler: Any = None
        self.updater: Updater | None = None
        self._jsonl = JsonlCallback()

    # ------------------------------------------------------------------------------------------- for subclasses
    def build(self, policy: Any) -> ActorCritic:
        """The module to train."""
        return ActorCritic(policy)

    def load_reward(self, given: Any) -> Any:
        """What scores the responses; `given` is what Python gave."""
        return load_reward(self.args, given, self.accelerator.device)

    @abstractmethod
    def advantages(self, episodes: Sequence[Episode], shaped: rl.ShapedRewards) -> dict[str, float]:
        """Sets every episode's advantages (and returns); returns metrics."""

    @abstractmethod
    def loss(self) -> Any:
        """The loss of this step, as the updater takes it."""

    def value_options(self) -> ValueOptions | None:
        """What the value loss needs; None without a value function."""
        return None

    def update(self, episodes: Sequence[Episode]) -> dict[str, float]:
        """Changes the policy by the episodes; returns metrics."""
        return self._ready().run(episodes, self.loss(), self.value_options(), self.state.global_step)

    def controllers(self) -> dict[str, rl.FixedKL | rl.AdaptiveEntropy]:
        """Coefficients that change while training, by name. `kl_coef` is the weight of the KL to the reference."""
        return {"kl_coef": self.kl} if self.entropy is None else {"kl_coef": self.kl, "entropy_coef": self.entropy}

    @functools.cached_property
    def kl(self) -> rl.FixedKL:
        """The controller of the KL to the reference."""
        return self.kl_controller()

    @functools.cached_property
    def entropy(self) -> rl.AdaptiveEntropy | None:
        """The controller of the entropy bonus; None for a constant one."""
        return entropy_control(self.args)

    def kl_controller(self) -> rl.FixedKL:
        """A fresh controller of the KL to the reference."""
        return rl.FixedKL(self.args.kl_coef)

    # ------------------------------------------------------------------------------------------------- setting up
    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.args.steps(len(self.prompts), self.accelerator.num_processes)

    def _ready(self, checkpoint: str | None = None) -> Updater:
        """Wraps model and optimiser, once; from a checkpoint, if one is given."""
        if self.updater is not None:
            return self.updater
        args = self.args
        if checkpoint is not None:
            self.inner.load(checkpoint)
        optimizer = update.make_optimizer(args, self.inner)
        updates = self.total_steps * args.num_ppo_epochs * args.num_mini_batches
        self.model, self.optimizer = self.accelerator.prepare(self.inner, optimizer)
        self.inner = self.accelerator.unwrap_model(self.model)
        if isinstance(self.inner, FSDPModule):
            # FSDP takes the first module to run for the root, and sampling does not run the outermost one.
            token = {name: x.to(self.accelerator.device) for name, x in pad([([self.fill], [])], self.fill).items()}
            with torch.no_grad():
                self.model(token)
            self.inner.reshard()  # the outermost module keeps its weights gathered after a forward
        self.scheduler = update.make_scheduler(args, self.optimizer.optimizer, updates)
        reference = self.reference_logits if args.needs_reference else None
        run = (self.model, self.optimizer, self.scheduler)
        self.updater = self.updater_class(args, self.accelerator, *run, reference, self.fill, self._ptx, self._grouped)
        if checkpoint is not None:
            load_training_state(self, checkpoint)
        return self.updater

    def reference_logits(self, batch: Batch) -> ModelLogits:
        """What stands for the reference's logits [B, T, V] in a loss."""
        own = self._reference is None
        model = self.inner.policy if own else self._reference

        def call(request: Request | None) -> Answer:
            off = adapters_off(model) if own else contextlib.nullcontext()
            with torch.no_grad(), self.accelerator.autocast(), off:
                return ask(model, batch, request, batch.get(GROUPS))

        args = self.args
        return ModelLogits(call, model, batch["input_ids"].shape, fused=args.fused_head, chunk_bytes=args.chunk_bytes)

    # --------------------------------------------------------------------------------------------------- rollouts
    def sampling(self) -> Sampling:
        """How responses are drawn."""
        args = self.args
        return Sampling(args.response_length, args.rollout_batch_size, args.temperature, args.top_k, args.top_p)

    def _sample(self, prompts: Sequence[Prompt], keys: Sequence[tuple[int, ...]]) -> list[Episode]:
        """Responses of all processes, in order of process; each process brings its own prompts."""
        self._ready()
        episodes: list[Episode] = []
        if prompts:
            with whole_weights(self.inner), self.accelerator.autocast():
                model = self.inner.eval()
                episodes = generate(model.policy, self.processing_class, prompts, keys, self.sampling(), self.args.seed)
                fill_in(
                    episodes,
                    functools.partial(policy_logits, model, values=model.has_values, args=self.args),
                    self.reference_logits if self.args.needs_reference else None,
                    fill=self.fill,
                    device=self.accelerator.device,
                    temperature=self.args.temperature,
                    exact_kl=self.args.kl_estimator == "exact",
                    energy=self.args.needs_energy,
                    batch_size=self.args.rollout_batch_size,
                    grouped=self._grouped,
                )
        return scored(self.reward, episodes)

    def roll_out(self, attempt: int = 0) -> list[Episode]:
        """The responses of this step, those of one prompt side by side; the same list in every process.

        attempt: above 0 others, to prompts of another shuffle.
        """
        args, processes = self.args, self.accelerator.num_processes
        each = args.num_generations
        per_process = args.local_batch_size // each
        number = per_process * processes
        order = prompt_order(len(self.prompts), self.state.global_step * number, number, args.seed, attempt)
        first = self.accelerator.process_index * per_process
        mine = [(i, k) for i in range(first, first + per_process) for k in range(each)]
        prompts = [self.prompts[order[i]] for i, _ in mine]
        again = (attempt,) if attempt else ()
        return self._sample(prompts, [(self.state.global_step, i * each + k, *again) for i, k in mine])

    def shape(self, episodes: Sequence[Episode], kl_coef: float) -> rl.ShapedRewards:
        """Token rewards, KL and scores of the responses."""
        args = self.args
        logps, mask = stacked(episodes, "logps"), response_mask(episodes)
        exact = args.kl_estimator == "exact" and args.needs_reference
        reference = None if exact else stacked(episodes, "ref_logps") if args.needs_reference else logps
        return rl.shape_rewards(
            torch.tensor([e.score for e in episodes]).nan_to_num(0.0),
            logps,
            reference,
            mask,
            kl_coef=kl_coef,
            kl_estimator="exact" if exact else args.kl_estimator if args.needs_reference else "k1",
            kl=stacked(episodes, "kl") if exact else None,
            missing_eos_penalty=args.missing_eos_penalty,
            ended=torch.tensor([e.ended for e in episodes]),
        )

    # --------------------------------------------------------------------------------------------------- the loop
    def train(self, resume_from_checkpoint: str | None = None) -> dict[str, float]:
        """Runs to the end, from the checkpoint if one is given. Returns the last step's metrics."""
        self._ready(resume_from_checkpoint)
        if self.args.report_to:
            config = {k: v for k, v in dataclasses.asdict(self.args).items() if isinstance(v, (int, float, str, bool))}
            self.accelerator.init_trackers(self.args.run_name, config)
        if self.accelerator.is_main_process:
            shutil.rmtree(os.path.join(str(self.args.output_dir), PARTIAL), ignore_errors=True)
        self._jsonl.on_train_begin(self.args, self.state, None)
        if self.eval_prompts and self.args.eval_steps and self.state.global_step == 0:
            self.log(self.evaluate())
        metrics: dict[str, float] = {}
        hidden = self.args.disable_tqdm or not self.accelerator.is_main_process
        with tqdm(total=self.total_steps, initial=self.state.global_step, disable=hidden) as bar:
            while self.state.global_step < self.total_steps:
                with kept(self):
                    metrics = self.step()
                with kept(self):
                    self._after_step(metrics, bar)
        if self.args.load_best_model_at_end and self.state.best_step is not None:
            self.inner.load(self.best_folder)
        for tracker in self.accelerator.trackers:
            tracker.finish()  # not end_training, which takes the process group down as well
        return metrics

    def step(self) -> dict[str, float]:
        """One batch of responses and its updates; returns the metrics."""
        start = time.perf_counter()
        episodes = self.roll_out()
        shaped = self.shape(episodes, self.kl.value if self.args.kl_in == "reward" else 0.0)
        coefficients = {f"objective/{name}": c.value for name, c in self.controllers().items()}
        metrics = {**describe(episodes, shaped), **coefficients, **self.advantages(episodes, shaped)}
        metrics |= correct(self.args, episodes) | self.update(episodes)
        self.kl.update(metrics["objective/kl"], len(episodes))
        if self.entropy is not None:
            self.entropy.update(metrics["policy/entropy_avg"])
        self.state.global_step += 1
        self.state.episodes += len(episodes)
        self.state.num_tokens += sum(len(e.prompt.ids) + len(e.ids) for e in episodes)
        self.state.updates = self._ready().updates
        counters = {"episode": self.state.episodes, "num_tokens": self.state.num_tokens}
        return {**metrics, **counters, "eps": len(episodes) / (time.perf_counter() - start)}

    def _after_step(self, metrics: dict[str, float], bar: Any) -> None:
        """Logs, evaluates and saves where it is time to."""
        args, step = self.args, self.state.global_step
        last = step >= self.total_steps
        if step % args.logging_steps == 0 or last:
            self.log(metrics, bar)
        if self.eval_prompts and ((args.eval_steps and step % args.eval_steps == 0) or last):
            found = self.evaluate()
            self.log(found, bar)
            score = found.get("eval/score")  # none where the reward applies to no response
            if score is not None and (self.state.best_score is None or score > self.state.best_score):
                self.state.best_score, self.state.best_step = score, step
                if args.load_best_model_at_end:
                    save_whole(self, self.best_folder, resumable=False)
        if args.save_steps and step % args.save_steps == 0:
            save_whole(self, os.path.join(str(args.output_dir), f"checkpoint-{step}"))
            if self.accelerator.is_main_process:
                rotate(str(args.output_dir), args.save_total_limit, None)
        bar.update(1)

    def log(self, metrics: dict[str, float], bar: Any = None) -> None:
        """To log.jsonl, the trackers and the console."""
        self._jsonl.on_log(self.args, self.state, None, metrics)
        if self.args.report_to:
            self.accelerator.log(metrics, step=self.state.global_step)
        line = shown(self.state.global_step, metrics, _SHOWN)
        if bar is not None and not bar.disable:
            bar.write(line)
        elif self.accelerator.is_main_process:
            print(line, flush=True)

    def evaluate(self) -> dict[str, float]:
        """One response to each evaluation prompt, always drawn alike; of several sets also the figures of each."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        numbers = list(range(rank, len(self.eval_prompts), processes))
        # A step number that no training step has: the same draws at every evaluation.
        episodes = self._sample([self.eval_prompts[i] for i in numbers], [(2**31, i) for i in numbers])
        found = rollout.describe_briefly(episodes, self.shape(episodes, 0.0), "eval")
        order = [i for r in range(processes) for i in range(r, len(self.eval_prompts), processes)]
        for name, own in rollout.by_set(self.eval_sets, dict(zip(order, episodes, strict=True))):
            found |= rollout.describe_briefly(own, self.shape(own, 0.0), f"eval/{name}")
        return found

    # ----------------------------------------------------------------------------------------------------- saving
    @property
    def best_folder(self) -> str:
        """Where the weights with the best evaluation score are."""
        return os.path.join(str(self.args.output_dir), "best")

    def save_model(self, folder: str | None = None) -> None:
        """Policy (for AutoModelForCausalLM), tokenizer and values into output_dir or `folder`, all or nothing."""
        self._ready()
        write_folder(folder or str(self.args.output_dir), self._save_final, is_writer=self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()

    def _save_final(self, partial: str) -> None:
        save_policy(self, partial, merge=self.args.lora_merge)
        adapters_alone = is_adapted(self.inner.policy) and not self.args.lora_merge
        if adapters_alone and self.accelerator.is_main_process:
            join_with_base(partial)

    def state_dict(self) -> dict[str, Any]:
        """Counters and controllers, as JSON holds them."""
        controllers = {name: c.state_dict() for name, c in self.controllers().items()}
        return {**dataclasses.asdict(self.state), "controllers": controllers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` returned."""
        for name, stored in state["controllers"].items():
            self.controllers()[name].load_state_dict(stored)
        own = self.state.is_world_process_zero
        values = {f.name: state[f.name] for f in dataclasses.fields(RunState)}
        self.state = RunState(**{**values, "is_world_process_zero": own})
        self._ready().updates = self.state.updates
