"""What the trainers share: the way from a batch to logits, exact averaging under gradient accumulation, and metrics.

A trainer is an objective on top of transformers' Trainer: it says what one batch's mean loss is and how many items
(tokens, sequences or pairs) that mean is over. Everything else is here: the loss of an update is the mean over all
items of all its micro-batches and processes, whatever their sizes, and so are the metrics between two log lines.
"""

from __future__ import annotations

import math
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ...models.adapters import join_with_base
from ...models.loading import load_model, load_tokenizer
from ...models.logits import ModelLogits, can_answer, logits_of, shares_prompts
from ...models.lora import is_adapted, merged, with_lora
from ...ops.sequences import sum_tokens
from ...utils.batch import Batch
from ..data.collate import padding_last
from ..data.files import Rows, named, read_rows
from ..data.problems import tally
from ..data.sampler import UpdateSampler
from ..data.template import use_template
from .callbacks import ConsoleCallback, GiveBackCallback, JsonlCallback, LinesCallback
from .checkpoints import PARTIAL, publish, rotate, seal, write_folder, writing
from .config import GroupsConfig, TrainingConfig
from .even import FILLER, EvenCollator, even
from .finite import CheckedUpdates, refuse_bad_weights
from .given import check_config, model_given, refuse_others, with_peft_config


class Weighted(NamedTuple):
    """A metric that is a mean over other items than the loss is: pairs, say, where the loss is over lists."""

    mean: Tensor
    weight: Tensor


Metrics = Mapping[str, Tensor | Weighted]


class Means:
    """Weighted means of named scalars, kept on the device and read out, over all processes, at a log line."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, metrics: Metrics, weight: Tensor) -> None:
        """Counts one batch: `metrics` are its means over `weight` items, or over their own."""
        for name, metric in metrics.items():
            value, items = metric if isinstance(metric, Weighted) else (metric, weight)
            items = torch.as_tensor(items, dtype=torch.float32, device=value.device)
            pair = torch.stack([value.detach().float() * items, items])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def pop(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means since the last call, summed over processes by `reduce`; empty if nothing was added.

        Every process must have added the same names.
        """
        if not self._sums:
            return {}
        names = sorted(self._sums)
        totals = reduce(torch.stack([self._sums[name] for name in names])).tolist()
        self._sums = {}
        return {name: total / count if count else 0.0 for name, (total, count) in zip(names, totals, strict=True)}


def learned_positions(model: Any) -> int | None:
    """How many positions the model has learned a vector for; None for one that computes them (rotary, ALiBi)."""
    count, tokens = getattr(model.config, "max_position_embeddings", None), model.get_input_embeddings()
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    # OPT's table has two rows more.
    return count if count and any(0 <= rows - count <= 2 for rows in tables) else None


class AlignmentTrainer(CheckedUpdates, ABC):
    """Base of the trainers. Subclasses give `collator`, `prepare`, `items` and `batch_loss`.

    Args:
        model: a causal language model, or what the subclass names; its folder; None takes `args.model`.
        args: the configuration.
        train_dataset, eval_dataset: rows of text (see `data.files.read_rows`); may be None. Evaluation sets may be
            several, as a mapping of names to rows.
        processing_class: the tokenizer; must be given with a model, and is that of the folder for a folder.
        callbacks: more callbacks; console and JSONL logging are there already.
        optimizers: as in transformers.
        peft_config: adapters to train, as peft describes them, in place of the lora_* keys of args.

    Raises:
        TypeError: args of another kind; arguments of other libraries' trainers, with what to use instead.
        ValueError: no processing_class; several GPUs in one process; what a row, the model or the configuration has
            wrong.
    """

    args: TrainingConfig
    task = "CAUSAL_LM"
    """Peft's name of what the model is for."""

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None,
        args: TrainingConfig,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        **others: Any,
    ) -> None:
        refuse_others(self, others)
        check_config(self, args)
        given: Any = model_given(model, args)
        if isinstance(given, str):
            set_seed(args.seed)  # a fresh head is drawn while loading
            given, own = self.load(given, args)
            processing_class = processing_class or own
        model = given
        if processing_class is None:
            raise ValueError("processing_class must be the model's tokenizer; got None")
        if args.n_gpu > 1:  # transformers would take torch.nn.DataParallel, whose replicas share one forward and head
            raise ValueError(
                f"a process must train on one device; got {args.n_gpu} GPUs: start it with torchrun or accelerate "
                "launch, or choose one with CUDA_VISIBLE_DEVICES"
            )
        use_template(processing_class, args.chat_template_path)
        self.check_model(model, args, processing_class)
        self._means = {"train": Means(), "eval": Means()}
        self._partial: str | None = None
        self.data_counts: dict[str, int] = {}
        super().__init__(
            model=with_lora(with_peft_config(model, peft_config, args), args, self.task),
            args=args,
            data_collator=EvenCollator(self.collator(args, processing_class)),
            train_dataset=self._prepared("dataset", train_dataset, args, processing_class),
            eval_dataset=self._prepared("eval_dataset", eval_dataset, args, processing_class),
            processing_class=processing_class,
            callbacks=[JsonlCallback(), *(callbacks or [])],
            optimizers=optimizers,
        )
        self._check_positions()
        if self.args.device.type == "cpu":
            self.add_callback(GiveBackCallback())
        if args.fused_head:
            can_answer(self.model)  # before it is wrapped
        # Of the trainers, those whose rows hold several completions of a prompt have the key.
        grouped = isinstance(args, GroupsConfig)
        self._share_prompts = grouped and shares_prompts(self.model, args, self.args.device)
        for plain in (ProgressCallback, PrinterCallback):
            self.remove_callback(plain)
        self.add_callback(LinesCallback() if args.disable_tqdm else ConsoleCallback())
        # Our losses are means over the items of the whole update: Trainer must not divide them by the number of
        # micro-batches once more. (The second name is the one that releases before 5.2x look at.)
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True

    def _prepared(self, key: str, rows: Rows | None, args: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Tokenised rows; of several evaluation sets, which are given by name, each."""
        if isinstance(rows, Mapping):
            return {name: self._prepared(f"{key}_{name}", each, args, tokenizer) for name, each in rows.items()}
        if rows is None:
            return None
        with named(key), tally(key) as counts:
            prepared = self.prepare(read_rows(rows, args.reading), args, tokenizer)
        self.data_counts.update({f"data/{key}/{name}": value for name, value in counts.counts().items()})
        return prepared

    def _check_positions(self) -> None:
        """ValueError for rows that the model has no positions for: on a GPU they would end all use of it."""
        positions = learned_positions(self.model)
        for key, rows in self.all_rows().items():
            if positions is None or rows is None:
                continue
            # Each sequence of a packed row begins at position 0.
            name, what = ("longest", "sequence") if "longest" in rows.column_names else ("length", "row")
            longest = max(rows[name], default=0) if name in rows.column_names else 0
            if longest > positions:
                raise ValueError(
                    f"max_length must be at most {positions}, the model's learned positions, for such rows as "
                    f"{key} has; got {self.args.max_length} and a {what} of {longest} tokens"
                )

    def all_rows(self) -> dict[str, Any]:
        """The tokenised rows of every set, by the key that gave it."""
        given = self.eval_dataset
        several = {f"eval_dataset_{name}": rows for name, rows in given.items()} if isinstance(given, dict) else {}
        return {"dataset": self.train_dataset, **(several or {"eval_dataset": given})}

    # ------------------------------------------------------------------------------------------- for subclasses
    def check_model(self, model: Any, args: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """What model and tokenizer must be, or be made, before rows are tokenised; ValueError if they cannot."""

    @abstractmethod
    def collator(self, args: Any, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Batch]:
        """What makes batches of tokenised rows."""

    @abstractmethod
    def prepare(self, rows: Rows, args: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Rows of text to tokenised rows."""

    def update_batches(self, batches: list[Batch]) -> list[Batch]:
        """The micro-batches that an update takes in place of those of the data."""
        return batches

    @abstractmethod
    def items(self, batch: Batch) -> Tensor:
        """How many items the batch's mean loss is over: a scalar tensor."""

    def groups(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """[N], int64: the group of each of the batch's sequences, of those that have a prompt in common; or None."""
        return None

    @abstractmethod
    def batch_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """The batch's mean loss, and metrics that are means over the same items (or say over how many others)."""

    def complete(self, means: dict[str, float]) -> dict[str, float]:
        """The means of a log line or an evaluation, with what follows from them."""
        return means

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> ModelLogits:
        """What stands for the logits [B, T, V] of a padded batch in a loss."""
        groups = self.groups(batch) if self._share_prompts else None
        return logits_of(model, batch, groups=groups, fused=self.args.fused_head, chunk_bytes=self.args.chunk_bytes)

    def sequence_logps(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Sums of the log-probabilities of each row's labels, [B]."""
        return sum_tokens(self.logits(model, batch).stats(batch["labels"]).logps)

    @classmethod
    def load(cls, path: str, args: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and the tokenizer that a command starts from."""
        return load_model(path, args), load_tokenizer(args.tokenizer, path)

    # ------------------------------------------------------------------------------------------- Trainer's hooks
    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of one update, and the number of items in all of them on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = self.update_batches(batches)
        self.note_update(batches)
        if not batches:
            return batches, None
        count = torch.stack([self._count(batch) for batch in batches]).sum().to(device)
        return batches, self.accelerator.gather(count.float()).sum()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """`group_by_length` sorts inside each update (see `UpdateSampler`); the other strategies are transformers'."""
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        if rows is None or args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(rows)
        size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return UpdateSampler(list(rows["length"]), size, args.seed if args.data_seed is None else args.data_seed)

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, sampler_fn: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """On several processes the last batches are filled up, not with rows that would count twice."""
        if self.args.world_size > 1 and sampler_fn is not None:
            dataset, sampler_fn = even(dataset, sampler_fn, batch_size * self.args.world_size)
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn, *args, **kwargs)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """On the device, and padded on the right: so the padding's side does not reach the results' last bits."""
        inputs = super()._prepare_inputs(inputs)
        args: Any = self.args
        return padding_last(inputs) if args.padding_side == "left" and "attention_mask" in inputs else inputs

    def _count(self, batch: Batch) -> Tensor:
        """Items that count: none in a batch that only fills up."""
        items = self.items(batch)
        return items * 0 if FILLER in batch else items

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The batch's share of the update's mean loss; its plain mean where Trainer gives no count (evaluation)."""
        count = self._count(inputs)
        loss, metrics = self.batch_loss(model, inputs)
        if FILLER in inputs:
            metrics = {k: metric.mean if isinstance(metric, Weighted) else metric for k, metric in metrics.items()}
        training = model.training
        if training:
            self.note_loss(loss)
        self._means["train" if training else "eval"].add(metrics if training else {"loss": loss, **metrics}, count)
        if training:
            real = inputs["attention_mask" if "attention_mask" in inputs else "num_tokens"]
            tokens = self.accelerator.gather(real.sum() * (FILLER not in inputs))
            self.state.num_input_tokens_seen += int(tokens.sum())
        if num_items_in_batch is not None:
            # Gradients are averaged over processes, hence their number; an update without any item has no gradient.
            share = count * self.accelerator.num_processes / torch.as_tensor(num_items_in_batch).clamp(min=1)
            loss = loss * share
        return (loss, {"loss": loss}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """The batch's loss; logits are not kept."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Transformers' loop; loss and metrics are exact means over the items, however the batches fall."""
        self._means["eval"] = Means()
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        means = self.complete(self._means["eval"].pop(self._sum))
        means_by_key = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return output._replace(metrics={**(output.metrics or {}), **means_by_key})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics gathered since the last log line, and the tokens seen so far."""
        if "loss" in logs:
            logs.update(self.complete(self._means["train"].pop(self._sum)))
            logs["num_tokens"] = self.state.num_input_tokens_seen
        super().log(logs, start_time)

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        """NaN is never the best, nor what later ones are compared with."""
        name = str(self.args.metric_for_best_model)
        if math.isnan(metrics.get(name if name.startswith("eval_") else f"eval_{name}", 0.0)):
            return False
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError as error:
            raise ValueError(error.args[0]) from None

    # -------------------------------------------------------------------------------------------------- saving
    def _get_output_dir(self, trial: Any) -> str:
        return self._partial or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Transformers' checkpoint, written elsewhere and renamed into its place when all of it is there."""
        output_dir, name = super()._get_output_dir(trial), f"checkpoint-{self.state.global_step}"
        self._partial = os.path.join(output_dir, PARTIAL)
        if self.args.should_save:
            shutil.rmtree(self._partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        written, target = os.path.join(self._partial, name), os.path.join(output_dir, name)
        try:
            with writing(target, written):
                super()._save_checkpoint(model, trial)
        finally:
            self._partial = None
        if self.state.best_model_checkpoint == written:
            self.state.best_model_checkpoint = target
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            with writing(target, written):
                self.state.save_to_json(os.path.join(written, TRAINER_STATE_NAME))
                seal(written)
                publish(written, target)
            rotate(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def save_whole(self) -> None:
        """Saves the model and the tokenizer to `output_dir`, whole or not at all; with adapters merged if so asked."""
        refuse_bad_weights(self.model, self.accelerator, f"the model in {self.args.output_dir}")
        write_folder(str(self.args.output_dir), self._save_final, is_writer=self.args.should_save)
        self.accelerator.wait_for_everyone()

    def _save_final(self, folder: str) -> None:
        args: Any = self.args
        if not (is_adapted(self.model) and args.lora_merge):
            self.save_model(folder, _internal_call=True)
            if args.should_save and is_adapted(self.model):
                join_with_base(folder)
        elif args.should_save:
            merged(self.model).save_pretrained(folder)
            self.processing_class.save_pretrained(folder)  # type: ignore[union-attr]

    def _sum(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum")
