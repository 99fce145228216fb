"""A policy run that is stopped or killed goes on as if nothing had happened, to the bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")
pytest.importorskip("accelerate", reason="needs accelerate (the extra `train`)")

from transformers import AutoModelForCausalLM

from fastalign.cli import commands as cli
from fastalign.trainers.common import run
from fastalign.trainers.common.callbacks import LOG_NAME, read_log

PROMPTS = [{"prompt": text} for text in ("the movie", "a film", "the", "a great", "fun and", "long", "is", "a")]
PTX = [{"prompt": "the movie", "completion": " is good"}, {"prompt": "", "completion": "a dull film"}] * 2


def score_lengths(completions):
    return [len(text) % 7 - 3.0 for text in completions]


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.inner.parameters()])


def log_of(trainer) -> list[dict]:
    lines = read_log(os.path.join(trainer.args.output_dir, LOG_NAME))
    return [{k: v for k, v in line.items() if k not in ("time", "eps")} for line in lines]


class TestResume:
    @pytest.mark.parametrize(
        "extra",
        [
            {"kl_controller": "adaptive", "target": 0.1, "horizon": 50, "ptx_dataset": PTX},
            {"value_model": "shared", "objective": "penalty", "warmup_steps": 3},
            {"lora_rank": 2},
        ],
    )
    def test_resumed_run_equals_uninterrupted_one(self, make, tmp_path, extra):
        """To the bit: weights, values, losses and rewards that draw from torch's and python's own generators."""

        def noisy(completions):
            return [score + random.random() + float(torch.rand(())) for score in score_lengths(completions)]

        shared = {
            **extra,
            "total_episodes": 40,
            "save_steps": 2,
            "reward": noisy,
            "eval_steps": 2,
            "eval_rows": PROMPTS[:3],
        }
        whole = make(**shared, output_dir=str(tmp_path / "whole"))
        whole.train()
        cut = make(**shared, output_dir=str(tmp_path / "cut"))
        step = cut.step
        cut.step = lambda: step() if cut.state.global_step < 3 else (_ for _ in ()).throw(KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            cut.train()
        random.seed(99)
        torch.manual_seed(99)
        resumed = make(**shared, output_dir=str(tmp_path / "cut"), resume_from_checkpoint="auto")
        start = run.start_point(resumed.args)
        assert os.path.basename(start) == "checkpoint-3"  # what the interrupt itself has left
        for name in ("checkpoint-2", "checkpoint-3"):
            resumed = make(**shared, output_dir=str(shutil.copytree(tmp_path / "cut", tmp_path / name)))
            resumed.train(str(tmp_path / name / name))
            assert torch.equal(weights(resumed), weights(whole))
            assert log_of(resumed) == log_of(whole)
            assert resumed.state_dict() == whole.state_dict()

    def test_killed_run_goes_on_and_no_half_written_checkpoint_is_loaded(self, tiny_model, tiny_tokenizer, tmp_path):
        """SIGKILL from outside while it trains and writes checkpoints all the time; then the same command again."""
        tiny_model().save_pretrained(tmp_path / "base")
        tiny_tokenizer.save_pretrained(tmp_path / "base")
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
        (tmp_path / "rewards.py").write_text(
            "def lengths(completions):\n    return [len(c) % 7 - 3.0 for c in completions]\n"
        )

        def argv(out: Path, *more: str) -> list[str]:
            keys = {"model": tmp_path / "base", "dataset": tmp_path / "prompts.jsonl", "output_dir": out}
            keys |= {
                "reward_fn": f"{tmp_path}/rewards.py:lengths",
                "save_steps": 1,
                "total_episodes": 48,
                "learning_rate": 0.01,
            }
            keys |= {"per_device_train_batch_size": 4, "response_length": 6, "kl_controller": "adaptive", "target": 0.1}
            return [part for k, v in keys.items() for part in (f"--{k}", str(v))] + [
                "--use_cpu",
                "--disable_tqdm",
                *more,
            ]

        assert cli.main(["ppo", *argv(tmp_path / "whole")]) == 0
        command = [sys.executable, "-m", "fastalign", "ppo", *argv(tmp_path / "cut")]
        process = subprocess.Popen(
            command, cwd=tempfile.gettempdir(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 240
        while not run.checkpoints(str(tmp_path / "cut"))[1:]:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "cut" / "metrics.json").exists()
        (tmp_path / "cut" / ".partial" / "checkpoint-99").mkdir(parents=True, exist_ok=True)
        assert cli.main(["ppo", *argv(tmp_path / "cut", "--resume_from_checkpoint", "auto")]) == 0
        one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "cut"))
        assert all(torch.equal(one[name], two[name]) for name in one)
        whole, cut = (
            [line["objective/scores"] for line in read_log(str(tmp_path / name / LOG_NAME))]
            for name in ("whole", "cut")
        )
        assert whole == cut
        assert not list((tmp_path / "cut" / ".partial").glob("*"))
