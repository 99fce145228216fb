"""DPO by fastalign's `DPOTrainer` and by TRL's: one model, the same pairs and settings, each in a process of its own.

    python bench/trainers.py --steps 20

takes SmolLM2-135M-Instruct (`--model` any folder), pairs of random words of exactly `--tokens` tokens, `--pairs` of
them a step, float32, AdamW at a constant rate, no dropout, and reference log-probabilities computed beforehand by both.
It prints the loss of every step side by side and their largest difference; tokens a second over the steps after the
first; the peak of resident memory while training, above that of the process before it loaded the model; and where the
steps' time went: the model's body forward and backward, head and loss forward and backward, the optimiser, the rest.

    --peers fastalign,trl    who runs, in this order; `fastalign,trl,fastalign,trl` alternates; `unshared` is fastalign
              with `share_prompts` false
    --ops     the ten most expensive operations of the last step (which then counts in no figure)
    --until N stop after step N and leave a checkpoint in `--folder`; the same command goes on from there
    --json F  write everything to F
    --show F  the lines of bench/README.md on a results file, and no run; `--update bench/README.md` writes them there
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fastalign.trainers.common import resident

_OPS = 10
BEGIN, END = "<!-- trainers: written by bench/trainers.py -->", "<!-- end of trainers -->"


# ---------------------------------------------------------------------------------------------------------------- data
def word_pairs(tokenizer: Any, count: int, tokens: int, seed: int) -> list[dict[str, str]]:
    """`count` pairs of which every sequence, prompt (half of it) to end-of-sequence token, has `tokens` tokens."""
    draw = random.Random(seed)
    vocabulary = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    words = [word for word in vocabulary if word[:1] == " " and word[1:].isalpha() and word.isascii()]
    extra = len(tokenizer("")["input_ids"]) + 1  # what the tokenizer puts in front, and the end of the sequence
    half = tokens // 2
    text = lambda n: "".join(draw.choices(words, k=n))  # noqa: E731
    rows = []
    for _ in range(count):
        row = {"prompt": text(half), "chosen": text(tokens - half - extra), "rejected": text(tokens - half - extra)}
        rows.append(row)
    for row in rows:
        for side in ("chosen", "rejected"):
            found = len(tokenizer(row["prompt"] + row[side])["input_ids"]) + 1
            if found != tokens:
                raise ValueError(f"the tokenizer makes {found} tokens of {tokens} words; it must keep words whole")
    return rows


# ------------------------------------------------------------------------------------------------------- one trainer
def fastalign_trainer(
    given: argparse.Namespace, rows: list[dict[str, str]], shared: dict[str, Any], share_prompts: bool = True
) -> Any:
    """Ours."""
    from transformers import AutoTokenizer

    from fastalign.models.loading import load_model
    from fastalign.trainers.dpo import DPOConfig, DPOTrainer

    args = DPOConfig(precompute_ref_batch_size=given.pairs, share_prompts=share_prompts, **shared)
    model, tokenizer = load_model(given.model, args), AutoTokenizer.from_pretrained(given.model)
    return timed(DPOTrainer)(model, args, rows, None, tokenizer)


def unshared_trainer(given: argparse.Namespace, rows: list[dict[str, str]], shared: dict[str, Any]) -> Any:
    """Ours, running a prompt once for each of its completions."""
    return fastalign_trainer(given, rows, shared, share_prompts=False)


def trl_trainer(given: argparse.Namespace, rows: list[dict[str, str]], shared: dict[str, Any]) -> Any:
    """TRL's."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    options = {"bf16": False, "gradient_checkpointing": False, "model_init_kwargs": {"dtype": "float32"}}
    args = DPOConfig(precompute_ref_log_probs=True, precompute_ref_batch_size=given.pairs, **options, **shared)
    return timed(DPOTrainer)(given.model, args=args, train_dataset=Dataset.from_list(rows))


PEERS = {"fastalign": fastalign_trainer, "unshared": unshared_trainer, "trl": trl_trainer}


def timed(trainer_class: type) -> type:
    """The trainer, keeping every step's loss and phases: where the model's body begins and ends, both ways."""

    class Timed(trainer_class):  # type: ignore[misc, valid-type]
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            self.marks = {"start": time.perf_counter()}
            loss = super().training_step(*args, **kwargs)
            self.marks["end"] = time.perf_counter()
            self.losses = [*getattr(self, "losses", []), float(loss)]
            return loss

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            result = super().compute_loss(*args, **kwargs)
            self.marks["loss"] = time.perf_counter()
            return result

        def watch(self, body: Any) -> None:
            """Marks when the body starts, when it hands its hidden states over, and when their gradient comes back."""

            def before(*_: Any) -> None:
                self.marks["body"] = time.perf_counter()

            def after(_: Any, __: Any, output: Any) -> None:
                self.marks["hidden"] = time.perf_counter()
                hidden = output[0]
                if hidden.requires_grad:
                    hidden.register_hook(lambda _: self.marks.update(gradient=time.perf_counter()))

            body.register_forward_pre_hook(before)
            body.register_forward_hook(after)

    return Timed


def run_one(given: argparse.Namespace) -> dict[str, Any]:
    """Trains with one peer in this process; what it measured."""
    import torch
    from transformers import AutoTokenizer, TrainerCallback

    torch.set_num_threads(given.threads)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    rows = word_pairs(tokenizer, given.pairs * given.steps, given.tokens, given.seed)
    folder = Path(given.folder) / given.one
    shared = {"output_dir": str(folder), "max_steps": given.steps, "per_device_train_batch_size": given.pairs}
    shared |= {"max_length": given.tokens, "learning_rate": given.learning_rate, "lr_scheduler_type": "constant"}
    shared |= {"use_cpu": True, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    shared |= {"seed": given.seed, "train_sampling_strategy": "sequential", "beta": 0.1}
    start = resident.resident()
    trainer = PEERS[given.one](given, rows, shared)
    steps: list[dict[str, float]] = []
    profiled: list[dict[str, Any]] = []

    class Start(TrainerCallback):
        """Before all other callbacks, so that what a trainer's own do at the beginning of a step counts."""

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begun = time.perf_counter()

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            trainer.watch(trainer.model.base_model)
            resident.reset_peak()

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if given.ops and state.global_step == given.steps - 1:
                self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
                self.profile.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            marks, end = trainer.marks, time.perf_counter()
            whole = end - started.begun
            parts = {
                "body forward": marks["hidden"] - marks["body"],
                "head and loss forward": marks["loss"] - marks["hidden"],
                "head and loss backward": marks["gradient"] - marks["loss"],
                "body backward": marks["end"] - marks["gradient"],
                "clipping and optimiser": end - marks["end"],
            }
            if given.ops and state.global_step == given.steps:
                self.profile.__exit__(None, None, None)
                table = sorted(self.profile.key_averages(), key=lambda row: -row.self_cpu_time_total)[:_OPS]
                profiled.extend({"op": r.key, "calls": r.count, "seconds": r.self_cpu_time_total / 1e6} for r in table)
            else:
                steps.append({"step": whole, **parts, "rest": whole - sum(parts.values())})
            if given.until and state.global_step >= given.until:
                control.should_training_stop = control.should_save = True

    started = Start()
    trainer.callback_handler.callbacks.insert(0, started)
    trainer.add_callback(Clock())
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)
    return {
        "losses": trainer.losses,
        "steps": steps,
        "ops": profiled,
        "peak_bytes": resident.peak() - start,
        "first_step": trainer.state.global_step - len(trainer.losses) + 1,
    }


# -------------------------------------------------------------------------------------------------------------- report
def report(results: list[tuple[str, dict[str, Any]]], given: argparse.Namespace) -> str:
    """The losses side by side, then speed, memory and phases of each."""
    names = [name for name, _ in results]
    lines = ["step  " + "  ".join(f"{name:>10}" for name in names)]
    first = results[0][1]["first_step"]
    for i, losses in enumerate(zip(*(found["losses"] for _, found in results), strict=False)):
        lines.append(f"{i + first:>4}  " + "  ".join(f"{loss:>10.6f}" for loss in losses))
    gaps = [
        abs(a - b) for _, found in results[1:] for a, b in zip(results[0][1]["losses"], found["losses"], strict=False)
    ]
    if gaps:
        lines.append(f"largest difference of a loss: {max(gaps):.2e}")
    for name, found in results:
        later, median = found["steps"][1:] or found["steps"], median_step(found)
        speed = 2 * given.pairs * given.tokens / median["step"]
        lines.append(
            f"\n{name}: {speed:.1f} tokens/s, {median['step']:.2f} s a step (median of {len(later)}: "
            f"{min(step['step'] for step in later):.2f} to {max(step['step'] for step in later):.2f}), "
            f"peak {found['peak_bytes'] / 2**20:.0f} MiB above the start"
        )
        for part, seconds in median.items():
            if part != "step":
                lines.append(f"  {part:<24} {seconds:7.2f} s  {seconds / median['step']:6.1%}")
        lines += [f"    {row['op']:<40} {row['calls']:>6} calls  {row['seconds']:8.3f} s" for row in found["ops"]]
    return "\n".join(lines)


def median_step(found: dict[str, Any]) -> dict[str, float]:
    """The median step after the first."""
    later = found["steps"][1:] or found["steps"]
    middle = statistics.median_low(step["step"] for step in later)
    return next(step for step in later if step["step"] == middle)


def figures(kept: dict[str, Any]) -> str:
    """What bench/README.md says of a results file."""
    given, where, results = kept["settings"], kept["environment"], dict(kept["results"])
    ours, theirs = results["fastalign"], results["trl"]
    speeds = [2 * given["pairs"] * given["tokens"] / median_step(found)["step"] for found in (ours, theirs)]
    peaks = [found["peak_bytes"] / 2**20 for found in (ours, theirs)]
    gap = max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    body = [median_step(found)["body forward"] + median_step(found)["body backward"] for found in (ours, theirs)]
    loss = [sum(s for part, s in median_step(found).items() if "head" in part) for found in (ours, theirs)]
    return (
        f"DPO on {given['model']}, {given['pairs']} pairs of {given['tokens']} tokens (half of them prompt) a step, "
        f"float32, {given['threads']} threads, {len(ours['losses'])} steps: {speeds[0]:.0f} tokens/s against "
        f"{speeds[1]:.0f} of TRL {where['versions']['trl']}'s DPOTrainer ({speeds[0] / speeds[1]:.2f}x), a peak of "
        f"{peaks[0]:,.0f} MiB against {peaks[1]:,.0f} MiB ({peaks[0] / peaks[1]:.2f}x), losses at most {gap:.1e} "
        f"apart. Head and loss take {loss[0]:.1f} s of a step against {loss[1]:.1f} s, the body {body[0]:.1f} s "
        f"against {body[1]:.1f} s: a prompt runs once for both completions. ({where['cpu']}, {where['date'][:10]}, "
        f"commit {where['commit'][:12]}; `python bench/trainers.py`)"
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--peers", default="fastalign,trl")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--until", type=int)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder")
    parser.add_argument("--ops", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--show", metavar="RESULTS")
    parser.add_argument("--update", type=Path, metavar="FILE")
    parser.add_argument("--one", choices=list(PEERS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    unknown = set(given.peers.split(",")) - set(PEERS)
    if unknown or given.steps < 1:
        parser.error(f"--peers must be of {', '.join(PEERS)} and --steps at least 1; got {given.peers}, {given.steps}")
    if given.until and not given.folder:
        parser.error("--until needs a --folder for the checkpoint")
    return given


def machine(threads: int) -> dict[str, Any]:
    """What the results were taken with; imported late, since the memory of what it imports would count."""
    from harness.environment import environment
    from harness.suite import Options

    return environment(Options(threads=threads))


def main() -> int:
    """Runs every peer in a process of its own and prints the report."""
    given = arguments()
    if given.show:
        text = figures(json.loads(Path(given.show).read_text(encoding="utf-8")))
        if given.update is None:
            print(text)
        else:
            import report as readme

            old = given.update.read_text(encoding="utf-8")
            given.update.write_text(readme.update(old, text, BEGIN, END), encoding="utf-8")
        return 0
    if given.model is None:
        from fastalign.demo.models import smollm2

        given.model = str(smollm2())
    with tempfile.TemporaryDirectory() as spare:
        given.folder = str(Path(given.folder).resolve()) if given.folder else spare
        if given.one:
            print("\n" + json.dumps(run_one(given)))
            return 0
        results = []
        for name in given.peers.split(","):
            command = [sys.executable, str(Path(__file__).resolve()), "--one", name]
            for key in ("model", "steps", "pairs", "tokens", "learning_rate", "threads", "seed", "folder", "until"):
                if getattr(given, key) is not None:
                    command += [f"--{key.replace('_', '-')}", str(getattr(given, key))]
            caches = {"FASTALIGN_REFERENCE_CACHE": given.folder, "HF_DATASETS_CACHE": given.folder}
            environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads), "HF_HUB_OFFLINE": "1", **caches}
            done = subprocess.run(
                command + ["--ops"] * given.ops, check=True, stdout=subprocess.PIPE, text=True, env=environment,
                cwd=tempfile.gettempdir(),
            )  # fmt: skip
            results.append((name, json.loads(done.stdout.splitlines()[-1])))
            if given.json:
                kept = {k: v for k, v in vars(given).items() if k not in ("folder", "json", "one")}
                kept["model"] = Path(given.model).name
                Path(given.json).write_text(
                    json.dumps({"settings": kept, "environment": machine(given.threads), "results": results}, indent=1)
                )
        print(report(results, given))
    return 0


if __name__ == "__main__":
    sys.exit(main())
