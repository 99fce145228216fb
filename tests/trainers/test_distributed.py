"""Two processes (gloo) against one: the same losses and weights, uneven last batches, checkpoints that interchange.

The file is also the program that the processes run: `python test_distributed.py FOLDER [PART ...]`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")
pytest.importorskip("accelerate", reason="needs accelerate (the extra `train`)")

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from fastalign.cli import commands as cli
from fastalign.trainers.common.callbacks import LOG_NAME, read_log
from fastalign.trainers.dpo import DPOConfig, DPOTrainer
from fastalign.trainers.grpo import GRPOConfig, GRPOTrainer
from fastalign.trainers.kto import KTOConfig, KTOTrainer
from fastalign.trainers.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from fastalign.trainers.policy.rewards import FunctionReward
from fastalign.trainers.ppo import PPOConfig, PPOTrainer
from fastalign.trainers.sft import SFTConfig, SFTTrainer

ADAPTED = ("continue", "stack")
SUPERVISED = ("sft", "dpo", "kto", "moving", "lora", *ADAPTED)
PARTS = (*SUPERVISED, "ppo", "grpo", "online")
SHARDED = tuple(part for part in PARTS if part != "moving")  # which mixes whole weights
WORDS = ["the", "movie", "is", "good", "bad", "great", "dull", "film", "fun", "awful", "long", "and"]


def text(i: int, words: int) -> str:
    return "".join(" " + WORDS[(i * 5 + j * j) % len(WORDS)] for j in range(words))


# Five rows and batches of four: the second batch has one row, which leaves a second process without any.
SFT_ROWS = [{"prompt": "the movie", "completion": text(i, 1 + i % 5)} for i in range(5)]
PAIRS = [{"prompt": "a film", "chosen": text(i, 1 + i % 4), "rejected": text(i + 3, 2 + i % 3)} for i in range(5)]
LABELLED = [{"prompt": text(i, 2), "completion": text(i + 1, 1 + i % 4), "label": i % 2 == 0} for i in range(5)]
PROMPTS = [{"prompt": text(i, 1 + i % 3).strip()} for i in range(5)]


def lengths(completions):
    return [len(c) % 7 - 3.0 for c in completions]


def supervised(out: Path, part: str, processes: int, **extra):
    """The trainer of `sft`, `dpo`, `kto`, DPO with a reference that moves, or DPO of adapters (new ones; those of a
    folder; new ones on those): four rows an update, however many processes."""
    others = {"sft": (SFTConfig, SFTTrainer, SFT_ROWS), "kto": (KTOConfig, KTOTrainer, LABELLED)}
    config, trainer, rows = others.get(part, (DPOConfig, DPOTrainer, PAIRS))
    options = {"output_dir": str(out / part), "use_cpu": True, "learning_rate": 0.05, "lr_scheduler_type": "constant"}
    options |= {"per_device_train_batch_size": 4 // processes, "per_device_eval_batch_size": 2, "logging_steps": 1}
    options |= {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "disable_tqdm": True, "optim": "sgd"}
    if part == "kto":
        # Its gradient is at most a quarter of beta; its baseline is a batch's, of all processes, in evaluations too.
        options |= {"learning_rate": 0.5, "per_device_eval_batch_size": 4 // processes}
    if part == "moving":
        options |= {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.3}
    if part == "lora":  # whose second matrices start at zero, so that the first updates move little
        options |= {"lora_rank": 2, "lora_merge": False, "learning_rate": 1.0}
    if part in ADAPTED:
        options |= {"adapters": part, "lora_rank": 2 * (part == "stack"), "lora_merge": False, "learning_rate": 0.5}
    args = config(**{**options, **extra})
    model, tokenizer = trainer.load(str(out.parent / ("adapted" if part in ADAPTED else "base")), args)
    return trainer(model, args, rows, rows[:3], tokenizer)


def policy(out: Path, part: str, processes: int, **extra):
    """The trainer of `ppo`, `grpo` or online DPO: eight responses a step in two updates."""
    config, trainer, more = {
        "ppo": (
            PPOConfig,
            PPOTrainer,
            {"ptx_dataset": SFT_ROWS, "ptx_batch_size": 3, "kl_controller": "adaptive", "target": 0.1},
        ),
        "grpo": (GRPOConfig, GRPOTrainer, {"num_generations": 4}),
        "online": (OnlineDPOConfig, OnlineDPOTrainer, {"num_generations": 2}),
    }[part]
    options = {"output_dir": str(out / part), "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2}
    options |= {"per_device_train_batch_size": 4 // processes, "num_mini_batches": 2, "num_ppo_epochs": 2}
    options |= {
        "response_length": 6,
        "total_episodes": 32,
        "save_steps": 2,
        "eval_steps": 2,
        "model": str(out.parent / "base"),
    }
    args = config(**{**options, **more, **extra})
    sets = {"most": PROMPTS[:3], "rest": PROMPTS[3:]} if part == "grpo" else PROMPTS[:3]
    return trainer(None, args, PROMPTS, sets, reward=lengths)


def run_part(out: Path, part: str, processes: int, start: Path | None = None, **extra) -> None:
    """Trains (from the checkpoint of another run, if one is given), evaluates, saves."""
    build = supervised if part in SUPERVISED else policy
    trainer = build(out, part, processes, **extra)
    checkpoint = None if start is None else str(start / part / "checkpoint-2")
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate()
    (trainer.save_whole if part in ADAPTED else trainer.save_model)()
    if int(os.environ.get("RANK", 0)) == 0:
        (out / f"{part}.json").write_text(json.dumps(metrics))


class _Ruin(TrainerCallback):
    """From the third step on, the second process alone computes NaN."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2 and int(os.environ["RANK"]) == 1:
            inner = getattr(model, "module", model)
            inner.transformer.ln_f.register_forward_hook(lambda *seen: seen[-1] * math.nan)


def run_broken(out: Path, part: str) -> None:
    """A run that fails in the second process alone; each writes down what it raised."""
    rank = int(os.environ["RANK"])
    if part in SUPERVISED:
        trainer = supervised(out, part, 2, save_strategy="no")
        trainer.add_callback(_Ruin())
    else:
        trainer, calls = policy(out, part, 2, save_steps=None, eval_steps=None), []

        def reward(completions):
            calls.append(1)
            return [math.nan] * len(completions) if rank == 1 and len(calls) > 2 else lengths(completions)

        trainer.reward = FunctionReward(reward)
    try:
        trainer.train()
    except (ValueError, FloatingPointError) as error:
        (out / f"{part}-{rank}.txt").write_text(f"{type(error).__name__}: {error}")


def main(folder: str, name: str, *parts: str) -> None:
    """What each process runs: every part from its start, and again from the single process's checkpoint."""
    processes = int(os.environ["WORLD_SIZE"])
    if name == "broken":
        for part in parts:
            run_broken(Path(folder) / name, part)
        return
    if os.environ.get("ACCELERATE_USE_FSDP"):
        _shard_on_the_cpu()
    for part in parts:
        run_part(Path(folder) / name, part, processes)
        run_part(Path(folder) / f"{name}-resumed", part, processes, start=Path(folder) / "one")


def _shard_on_the_cpu() -> None:
    """Accelerate takes FSDP for accelerators alone; torch shards on the CPU as well, and that is what is tested."""
    before = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        # The state is one for all instances, and each new one would set it back to processes without shards.
        plugin = fsdp_plugin or self._shared_state.get("fsdp_plugin")
        before(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    AcceleratorState.__init__ = init


def weights(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return torch.cat([p.flatten() for p in model.parameters()])


def log_of(folder: Path) -> list[dict]:
    own = ("time", "eps", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    own += ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
    return [{k: v for k, v in line.items() if k not in own} for line in read_log(str(folder / LOG_NAME))]


def start(modules: list[str], env: dict[str, str] | None = None) -> None:
    """Runs `python -m` with these arguments; fails with what it printed. A hang ends after five minutes."""
    # Processes on the CPU, also where there is a GPU, of which two would need two.
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {})}
    command = [sys.executable, "-m", *modules]
    done = subprocess.run(
        command, cwd=tempfile.gettempdir(), env=surroundings, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def start_two(*argv: str, env: dict[str, str] | None = None) -> None:
    """Runs this file in two processes."""
    start(["torch.distributed.run", "--nproc_per_node=2", "--standalone", __file__, *argv], env)


@pytest.fixture(scope="module")
def runs(tiny_tokenizer, tmp_path_factory) -> Path:
    """A folder with every part run by one process (`one`), by two (`two`), and by two from one's checkpoint."""
    from fastalign.demo.models import small_model

    folder = tmp_path_factory.mktemp("distributed")
    small_model(len(tiny_tokenizer), hidden_size=16, layers=1, seed=0).save_pretrained(folder / "base")
    tiny_tokenizer.save_pretrained(folder / "base")
    adapted = supervised(folder / "first", "lora", 1, save_strategy="no")
    adapted.train()
    adapted.save_whole()
    shutil.move(folder / "first" / "lora", folder / "adapted")
    for part in PARTS:
        run_part(folder / "one", part, 1)
    start_two(str(folder), "two", *PARTS)
    return folder


def test_what_fails_in_one_process_ends_all_with_a_checkpoint(runs):
    """No process waits for the others, all say the same, and what was reached before is there."""
    parts = ("sft", "lora", "ppo", "grpo")
    start_two(str(runs), "broken", *parts)
    for part in parts:
        said = [(runs / "broken" / f"{part}-{rank}.txt").read_text() for rank in (0, 1)]
        assert said[0] == said[1]
        assert "checkpoint-2 holds the run up to there" in said[0]
        assert ("update 3 was not made: the gradient's norm is nan" if part in SUPERVISED else "is nan, for") in said[0]
        assert [path.name for path in (runs / "broken" / part).glob("checkpoint-*")] == ["checkpoint-2"]
        kept = runs / "broken" / part / "checkpoint-2"
        if part == "lora":
            assert all(value.isfinite().all() for value in load_file(kept / "adapter_model.safetensors").values())
        else:
            assert weights(kept).isfinite().all()


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
FSDP2 |= {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}


@pytest.fixture(scope="module")
def sharded_runs(runs) -> Path:
    """The same folder with every part run by two processes that hold half of the weights each."""
    start_two(str(runs), "sharded", *SHARDED, env=FSDP2)
    return runs


def assert_same_numbers(one: list[dict], two: list[dict], rel: float) -> None:
    assert len(one) == len(two)
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        for name, value in left.items():
            assert right[name] == pytest.approx(value, rel=rel, abs=1e-4), (left["step"], name)


@pytest.mark.parametrize("part", PARTS)
class TestTwoProcesses:
    def test_every_logged_number_and_the_weights_are_those_of_one(self, runs, part):
        """Losses, gradient norms, metrics, token counts, evaluations on uneven batches, the final weights."""
        assert_same_numbers(log_of(runs / "one" / part), log_of(runs / "two" / part), rel=2e-3)
        torch.testing.assert_close(weights(runs / "two" / part), weights(runs / "one" / part), rtol=1e-3, atol=2e-4)
        metrics = [json.loads((runs / name / f"{part}.json").read_text()) for name in ("one", "two")]
        loss = "eval_loss" if part in SUPERVISED else "eval/score"
        assert metrics[1][loss] == pytest.approx(metrics[0][loss], rel=1e-3)
        assert part != "grpo" or {"eval/most/score", "eval/rest/kl"} <= set(log_of(runs / "two" / part)[0])

    def test_two_go_on_from_the_checkpoint_of_one(self, runs, part):
        torch.testing.assert_close(
            weights(runs / "two-resumed" / part), weights(runs / "one" / part), rtol=1e-3, atol=2e-4
        )

    def test_one_goes_on_from_the_checkpoint_of_two(self, runs, part, tmp_path):
        out = runs / f"back-{part}"
        run_part(out, part, 1, start=runs / "two")
        torch.testing.assert_close(weights(out / part), weights(runs / "one" / part), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("part", SHARDED)
class TestShardedWeights:
    def test_every_logged_number_and_the_weights_are_those_of_one(self, sharded_runs, part):
        runs = sharded_runs
        assert_same_numbers(log_of(runs / "one" / part), log_of(runs / "sharded" / part), rel=2e-3)
        torch.testing.assert_close(weights(runs / "sharded" / part), weights(runs / "one" / part), rtol=1e-3, atol=2e-4)
        if part in ("lora", *ADAPTED):
            saved = load_file(runs / "sharded" / part / "adapter_model.safetensors")
            assert all(value.abs().max() > 2e-3 for name, value in saved.items() if "lora_B" in name)

    def test_checkpoints_interchange(self, sharded_runs, part):
        runs = sharded_runs
        again = weights(runs / "sharded-resumed" / part)
        torch.testing.assert_close(again, weights(runs / "one" / part), rtol=1e-3, atol=2e-4)
        run_part(runs / f"whole-{part}", part, 1, start=runs / "sharded")
        torch.testing.assert_close(weights(runs / f"whole-{part}" / part), again, rtol=1e-3, atol=2e-4)


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m"],
    # The flag is accelerate's word for several processes on one machine; they stay on the CPU.
    "accelerate": ["accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes=2", "-m"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_command_under_a_launcher_gives_the_model_of_one_process(launcher, runs, tmp_path):
    """`torchrun ... -m fastalign sft` and `accelerate launch ... -m fastalign sft`, five rows in batches of four."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in SFT_ROWS))
    options = {"model": runs / "base", "dataset": data, "use_cpu": "true", "max_steps": 4, "learning_rate": 0.05}
    options |= {"optim": "sgd", "save_strategy": "no", "logging_steps": 1, "report_to": "none"}
    argv = ["sft", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
    assert cli.main([*argv, "--output_dir", str(tmp_path / "one"), "--per_device_train_batch_size", "4"]) == 0
    argv += ["--output_dir", str(tmp_path / "two"), "--per_device_train_batch_size", "2"]
    start([*LAUNCHERS[launcher], "fastalign", *argv])
    assert_same_numbers(log_of(tmp_path / "one"), log_of(tmp_path / "two"), rel=2e-3)
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-3, atol=2e-4)


if __name__ == "__main__":
    main(*sys.argv[1:])
