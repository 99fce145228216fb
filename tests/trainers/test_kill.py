"""A process that is killed at any moment loses nothing before its last checkpoint, and never loads half of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")

from transformers import AutoModelForCausalLM

from fastalign.trainers.common.callbacks import LOG_NAME, read_log
from fastalign.trainers.common.checkpoints import PARTIAL, checkpoints, publish, remove, rotate, write_folder

CHILD = """
import os, signal, sys
from transformers import TrainerCallback
from fastalign.trainers import dpo
from fastalign.trainers.common import base, checkpoints, run

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def at(name, step):
    def check(self, *args, **kwargs):
        if self.state.global_step == step:
            die()
        return original(self, *args, **kwargs)
    original = getattr(base.AlignmentTrainer, name)
    setattr(base.AlignmentTrainer, name, check)

point = sys.argv[1]
if point == "half a checkpoint":
    at("_save_rng_state", 2)
elif point == "whole, not yet in its place":
    base.publish = die
elif point == "old one half removed":
    def rmtree(path, *args, **kwargs):
        if "removed-" in str(path) and os.path.exists(path):
            die()
    checkpoints.shutil.rmtree = rmtree
elif point == "in a step":
    at("training_step", 4)
elif point == "while saving the end":
    checkpoints.os.replace = lambda a, b: die() if at_end(str(a), str(b)) else real(a, b)
    at_end = lambda a, b: b.endswith("model.safetensors") and checkpoints.PARTIAL in a
    real = os.rename
sys.exit(run.run("dpo", dpo.DPOConfig, dpo.DPOTrainer, sys.argv[2:]))
"""
POINTS = (
    "half a checkpoint",
    "whole, not yet in its place",
    "in a step",
    "old one half removed",
    "while saving the end",
    "none",
)
PAIRS = [
    {"prompt": "the movie", "chosen": " is good" * (1 + i % 3), "rejected": " is bad" * (1 + i % 2)} for i in range(6)
]


def child(point: str, argv: list[str]) -> int:
    """Exit status of a run in a process of its own, which kills itself there."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, point, *argv],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tempfile.gettempdir(),
        env=environment,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-2000:]
    return done.returncode


def test_killed_anywhere_and_resumed_equals_uninterrupted(tiny_model, tiny_tokenizer, tmp_path):
    base, data = tmp_path / "base", tmp_path / "pairs.jsonl"
    tiny_model().save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))

    def argv(name: str) -> list[str]:
        keys = {"model": base, "dataset": data, "output_dir": tmp_path / name, "learning_rate": 1e-2, "max_steps": 6}
        keys |= {"per_device_train_batch_size": 2, "save_steps": 1, "save_total_limit": 2, "logging_steps": 1}
        keys |= {"resume_from_checkpoint": "auto", "use_cpu": "true", "disable_tqdm": "true"}
        return [f"--{key}={value}" for key, value in keys.items()]

    steps = []
    for point in POINTS:
        status = child(point, argv("cut"))
        assert status == (0 if point == "none" else -signal.SIGKILL), point
        found = [os.path.basename(path) for path in checkpoints(str(tmp_path / "cut"))]
        steps.append(int(found[-1].rpartition("-")[2]))
        if point == "while saving the end":
            assert not (tmp_path / "cut" / "config.json").exists()
    assert steps == [1, 1, 4, 5, 6, 6]
    assert child("none", argv("whole")) == 0
    cut, whole = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("cut", "whole"))
    assert all(torch.equal(cut[name], whole[name]) for name in whole)
    lines = [
        [(line["step"], line["loss"]) for line in read_log(str(tmp_path / name / LOG_NAME)) if "loss" in line]
        for name in ("cut", "whole")
    ]
    assert lines[0] == lines[1]


def make_checkpoint(folder: Path, step: int, content: str = "") -> str:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text("{}")
    (path / "weights").write_text(content)
    return str(path)


class TestFolders:
    def test_rotation_keeps_the_newest_and_the_best(self, tmp_path):
        paths = [make_checkpoint(tmp_path, step) for step in (2, 4, 10, 12)]
        rotate(str(tmp_path), 2, paths[1])
        assert checkpoints(str(tmp_path)) == [paths[1], paths[3]]
        rotate(str(tmp_path), None, None)
        assert checkpoints(str(tmp_path)) == [paths[1], paths[3]]
        rotate(str(tmp_path), 1, None)
        assert checkpoints(str(tmp_path)) == [paths[3]]

    def test_a_checkpoint_takes_the_place_of_an_older_one(self, tmp_path):
        old = make_checkpoint(tmp_path, 2, "old")
        publish(make_checkpoint(tmp_path / PARTIAL, 2, "new"), old)
        assert Path(old, "weights").read_text() == "new"
        remove(old)
        assert checkpoints(str(tmp_path)) == []

    def test_failed_writing_leaves_what_was_there(self, tmp_path):
        (tmp_path / "config.json").write_text("old")

        def write(folder):
            Path(folder).mkdir(parents=True)
            Path(folder, "config.json").write_text("new")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_folder(str(tmp_path), write)
        assert (tmp_path / "config.json").read_text() == "old"
