"""The trainers and the commands around them on a device: `gpu_check.py --only trainers`."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from math import isclose, isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import fastalign as fa

STEPS, SAVED = 4, 2
"""Updates of a run, and after how many of them the checkpoint is written that another run continues from."""
TOLERANCE = {"cpu": 0.0}
NEAR = 1e-3
"""Relative and absolute, between two runs of one seed: a GPU adds up in no fixed order, and a policy that samples
multiplies what that leaves. On a CPU they are the same to the last bit."""
MIXED = {"bf16": True}
"""Of a run in mixed precision."""
_OF_THE_RUN = ("time", "eps", "runtime", "per_second", "train_loss")
"""Parts of the log's names that hold what a clock says, or a mean over what one process has done."""


class Method(NamedTuple):
    trainer: Any
    config: Any
    rows: list[dict[str, Any]]
    options: dict[str, Any]
    reward: Callable[..., list[float]] | None = None
    """Of the methods that sample while they train."""


def _lengths(completions: list[str]) -> list[float]:
    return [len(text) % 7 - 3.0 for text in completions]


def methods() -> dict[str, Method]:
    from fastalign.trainers.dpo import DPOConfig, DPOTrainer
    from fastalign.trainers.grpo import GRPOConfig, GRPOTrainer
    from fastalign.trainers.ppo import PPOConfig, PPOTrainer
    from fastalign.trainers.pro import PROConfig, PROTrainer
    from fastalign.trainers.reward import RewardConfig, RewardTrainer
    from fastalign.trainers.sft import SFTConfig, SFTTrainer

    prompts = [{"prompt": f"the {noun} is"} for noun in ("movie", "film", "plot", "story") * 2]
    good, bad = (" good", " great fun", " a great film"), (" bad", " dull and awful", " long and bad")
    pairs = [{**row, "chosen": good[i % 3], "rejected": bad[(i + 1) % 3]} for i, row in enumerate(prompts)]
    lists = [{**row, "completions": [*good[: 1 + i % 2], *bad[:2]]} for i, row in enumerate(prompts)]
    texts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    trained = {"max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trained |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    sampled = {"total_episodes": 8 * STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    sampled |= {"num_mini_batches": 2, "num_ppo_epochs": 2, "response_length": 6, "rollout_batch_size": 4}
    # Not from the disk: what is to be shown is that they are computed.
    dpo = {**trained, "cache_ref_log_probs": False}
    return {
        "sft": Method(SFTTrainer, SFTConfig, texts, trained),
        "dpo": Method(DPOTrainer, DPOConfig, pairs, dpo),
        "pro": Method(PROTrainer, PROConfig, lists, trained),
        "reward": Method(RewardTrainer, RewardConfig, pairs, trained),
        "ppo": Method(PPOTrainer, PPOConfig, prompts, sampled, _lengths),
        "grpo": Method(GRPOTrainer, GRPOConfig, prompts, {**sampled, "num_generations": 4}, _lengths),
    }


def tokenizer() -> Any:
    from fastalign.demo.models import train_tokenizer

    return train_tokenizer(["the movie is good and great fun", "a dull film , the plot is bad and long"] * 3, 300)


class Bench:
    """Trains methods in a folder, on a device, and holds each run to what any run must be."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device, self.methods = folder, device, methods()

    def model(self, name: str) -> Any:
        """The same one again and again: a GPT-2 of some ten thousand weights, or one with a score for `reward`."""
        from transformers import AutoModelForSequenceClassification, set_seed

        from fastalign.demo.models import small_model

        model = small_model(len(tokenizer()), hidden_size=16, layers=1, seed=0)
        if name != "reward":
            # Where nothing is set, transformers' generate draws from the 50 likeliest tokens, which the doctor reports.
            model.generation_config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
            return model
        model.save_pretrained(self.folder / "body")
        set_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(self.folder / "body", num_labels=1)

    def trainer(self, name: str, folder: str, **options: Any) -> Any:
        method = self.methods[name]
        given = {"learning_rate": 1e-2, "seed": 0, "disable_tqdm": True, "use_cpu": self.device == "cpu"}
        args = method.config(output_dir=str(self.folder / folder), **{**given, **method.options, **options})
        sampled = {} if method.reward is None else {"reward": method.reward}
        return method.trainer(self.model(name), args, method.rows, None, tokenizer(), **sampled)

    def run(self, name: str, folder: str, *, checkpoint: str | None = None, **options: Any) -> list[dict[str, Any]]:
        """Trains and saves; the log, without what two runs may differ in."""
        trainer = self.trainer(name, folder, **options)
        sampled = self.methods[name].reward is not None
        before = {n: p.detach().cpu().clone() for n, p in _weights(trainer, sampled)}
        trainer.train(None if checkpoint is None else str(self.folder / folder / checkpoint))
        where, changed, still = f"{name} in {folder}", list[str](), list[str]()
        for parameter, after in _weights(trainer, sampled):
            if after.device.type != self.device:
                raise SystemExit(f"{where}: {parameter} is on {after.device}")
            if not torch.isfinite(after).all():
                raise SystemExit(f"{where}: {parameter} is not finite")
            moved = not torch.equal(after.detach().cpu(), before[parameter])
            if moved and not after.requires_grad:
                raise SystemExit(f"{where}: {parameter} has changed, which is not trained")
            if after.requires_grad:
                (changed if moved else still).append(parameter)
        # Some gradients are exactly 0, those of a reward's last bias for one, which comparisons do not see.
        if len(changed) < 3 * len(still) or not changed:
            raise SystemExit(f"{where}: not changed: {', '.join(still)}")
        trainer.save_model() if sampled else trainer.save_whole()
        lines = [json.loads(line) for line in (self.folder / folder / "log.jsonl").read_text().splitlines()]
        log = [{k: v for k, v in line.items() if not any(word in k for word in _OF_THE_RUN)} for line in lines]
        for line in log:
            for key, value in line.items():
                if not isfinite(value):
                    raise SystemExit(f"{where}: {key} is {value} at step {line['step']}")
        if {line["step"] for line in log} != set(range(1, STEPS + 1)):
            raise SystemExit(f"{where}: the log has steps {sorted({line['step'] for line in log})}")
        return log

    def repeats(self, name: str) -> None:
        """The same seed twice, and a run that is taken up from its checkpoint: one log."""
        saves = {"save_steps": SAVED} if self.methods[name].reward else {"save_strategy": "steps", "save_steps": SAVED}
        first, again = self.run(name, f"{name}-first", **saves), self.run(name, f"{name}-again")
        resumed = self.run(name, f"{name}-first", checkpoint=f"checkpoint-{SAVED}", **saves)
        near = TOLERANCE.get(self.device, NEAR)
        for what, log in (("the same seed again", again), ("a resumed run", resumed)):
            for one, other in zip(first, log, strict=True):
                for key, value in one.items():
                    if not isclose(value, other[key], rel_tol=near, abs_tol=near):
                        raise SystemExit(f"{name}, {what}: {key} is {other[key]} for {value} at step {one['step']}")

    def commands(self, model: str, other: str) -> None:
        """Sampling, evaluation and the doctor on what was trained."""
        from fastalign.doctor.command import DoctorConfig, examine
        from fastalign.evaluation import sample
        from fastalign.evaluation.evaluate import EvalConfig, evaluate

        rows = self.folder / "pairs.jsonl"
        rows.write_text("\n".join(json.dumps(row) for row in self.methods["dpo"].rows) + "\n", encoding="utf-8")
        folders = {name: str(self.folder / name) for name in (model, other, "reward")}
        output = self.folder / "samples.jsonl"
        sample.main(["--model", folders[model], "--dataset", str(rows), "--output", str(output),
                     "--max_new_tokens", "6", "--samples_per_prompt", "2"])  # fmt: skip
        if len(output.read_text().splitlines()) != len(self.methods["dpo"].rows):
            raise SystemExit("sample: not a line for each prompt")
        found = evaluate(EvalConfig(models=[folders[model], folders[other]], dataset=str(rows), max_new_tokens=6,
                                    reward=folders["reward"], reference=folders[other]))  # fmt: skip
        for name, figures in found.items():
            numbers = [figures["perplexity"], *(figures[key]["mean"] for key in ("reward", "kl", "kl_k1", "tokens"))]
            if not all(map(isfinite, numbers)):
                raise SystemExit(f"evaluate: not finite for {name}: {numbers}")
        if abs(found[folders[other]]["kl"]["mean"]) > NEAR:
            raise SystemExit(f"evaluate: a model's KL to itself is {found[folders[other]]['kl']['mean']}")
        findings = examine(DoctorConfig(model=folders[model], dataset=str(rows), reward_model=folders["reward"]))
        for finding in findings:
            if finding.level == "error":
                raise SystemExit(f"doctor: {finding.check}: {finding.text}")


def _weights(trainer: Any, sampled: bool) -> list[tuple[str, nn.Parameter]]:
    return list((trainer.inner if sampled else trainer.model).named_parameters())


@contextlib.contextmanager
def ran_on() -> Iterator[set[str]]:
    """Collects the kinds of devices of all weights that any forward pass uses."""
    kinds: set[str] = set()

    def note(module: nn.Module, args: Any) -> None:
        kinds.update(p.device.type for p in module.parameters(recurse=False))

    hook = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield kinds
    finally:
        hook.remove()


def trainers(device: str, backend: str) -> str:
    """A few updates by every method, with all weights and with LoRA; repeated, resumed; the commands on the results."""
    if importlib.util.find_spec("transformers") is None:
        raise SystemExit("needs transformers (the extra `train`)")
    lora = importlib.util.find_spec("peft") is not None
    with contextlib.ExitStack() as stack:
        bench = Bench(Path(stack.enter_context(tempfile.TemporaryDirectory())), device)
        for quiet in (contextlib.redirect_stdout, contextlib.redirect_stderr):
            stack.enter_context(quiet(io.StringIO()))
        stack.enter_context(fa.use_backend(backend))
        kinds = stack.enter_context(ran_on())
        for name in bench.methods:
            bench.run(name, name)
            if lora:
                bench.run(name, f"{name}-lora", lora_rank=4)
        bench.run("dpo", "dpo-mixed", **MIXED)
        for name in ("dpo", "ppo"):
            bench.repeats(name)
        bench.commands("dpo", "sft")
        if kinds != {device}:
            raise SystemExit(f"forward passes ran on {', '.join(sorted(kinds))}")
    near = TOLERANCE.get(device, NEAR)
    same = f"within {near:g}" if near else "to the last bit"
    return (
        f"{len(bench.methods)} methods{' with and without LoRA' if lora else ''} train on {device}, DPO and PPO repeat "
        f"and resume {same}, and sample, eval and doctor run there"
    )
