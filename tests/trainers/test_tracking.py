"""TensorBoard and Weights & Biases (offline) get the numbers of log.jsonl; the final save is there whole or not; free
memory is given back."""

from __future__ import annotations

import json
import os
import platform
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
from fastalign.trainers.sft import SFTConfig, SFTTrainer

ROWS = [{"prompt": "the movie", "completion": text} for text in (" is good", " is bad", " is long and dull", " is fun")]


@pytest.fixture
def supervised(tiny_model, tiny_tokenizer, tmp_path):
    """A function that trains for two updates and returns the log, reporting to the tracker as well."""

    def build(tracker: str) -> list[dict]:
        options = {"output_dir": str(tmp_path / "sft"), "use_cpu": True, "max_steps": 2, "logging_steps": 1}
        args = SFTConfig(**options, save_strategy="no", disable_tqdm=True, report_to=[tracker])
        SFTTrainer(tiny_model(), args, ROWS, None, tiny_tokenizer).train()
        return read_log(str(tmp_path / "sft" / LOG_NAME))

    return build


@pytest.fixture
def policy(make, tmp_path):
    """The same with PPO."""

    def build(tracker: str) -> list[dict]:
        make(report_to=[tracker]).train()
        return read_log(str(tmp_path / "run" / LOG_NAME))

    return build


BOTH = pytest.mark.parametrize(("trainer", "name"), [("supervised", "loss"), ("policy", "objective/scores")])


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """tag → (step, value) of every event file under the folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[tuple[int, float]]] = {}
    for place in {path.parent for path in folder.rglob("events.out.tfevents.*")}:
        events = EventAccumulator(str(place)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return found


@BOTH
def test_tensorboard_gets_the_log(trainer, name, request, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    monkeypatch.chdir(tmp_path)
    log = request.getfixturevalue(trainer)("tensorboard")
    written = [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in log if name in line]
    scalars = tensorboard_scalars(tmp_path)
    [tag] = [tag for tag in scalars if tag in (name, f"train/{name}")]
    assert scalars[tag] == written
    assert len(written) == 2


@BOTH
def test_wandb_gets_the_log_offline(trainer, name, request, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    try:
        log = request.getfixturevalue(trainer)("wandb")
    finally:
        wandb.teardown()  # settings are read once for all runs of a process
    [path] = tmp_path.rglob("run-*.wandb")
    written, values = path.read_bytes(), [line[name] for line in log if name in line]
    assert name.encode() in written
    assert [json.dumps(value).encode() in written for value in values] == [True, True]


class TestFinalSave:
    """Policy, value function and tokenizer are there whole or not at all."""

    def test_a_save_cut_short_leaves_what_was_there(self, make, tmp_path, monkeypatch):
        trainer, out = make(), tmp_path / "saved"
        trainer.save_model(str(out))
        before = weights(out)
        trainer.train()

        def full(*args, **kwargs):
            raise OSError("no space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(type(trainer.processing_class), "save_pretrained", full)  # the last thing to be written
            for folder in (out, tmp_path / "new"):
                with pytest.raises(OSError, match="no space"):
                    trainer.save_model(str(folder))
        assert torch.equal(weights(out), before)
        assert not any(path.name == "config.json" for path in (tmp_path / "new").glob("*"))
        trainer.save_model(str(out))
        assert not torch.equal(weights(out), before)
        assert sorted(path.name for path in out.iterdir() if path.name.startswith(".")) == []

    def test_a_move_cut_short_leaves_no_model_of_two_halves(self, make, tmp_path, monkeypatch):
        trainer, out = make(), tmp_path / "saved"
        trainer.save_model(str(out))
        trainer.train()
        replace = os.replace

        def cut(source, target):
            if target.endswith("model.safetensors"):
                raise OSError("killed")
            replace(source, target)

        monkeypatch.setattr(os, "replace", cut)
        with pytest.raises(OSError, match="killed"):
            trainer.save_model(str(out))
        monkeypatch.undo()
        with pytest.raises((OSError, ValueError), match=r"config\.json"):
            weights(out)


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in AutoModelForCausalLM.from_pretrained(folder).parameters()])


_GROWING = """
import ctypes
from fastalign.trainers.common import resident
from fastalign.trainers.common.callbacks import GiveBackCallback
malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, malloc.argtypes, free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
free(malloc(30 << 20))  # from now on glibc serves blocks of that size from its heap
callback = GiveBackCallback(above=64 << 20)
callback.on_step_begin(None, None, None)
before = resident.resident()
blocks = [malloc(1 << 20) for _ in range(200)]
for block in blocks:
    ctypes.memset(block, 1, 1 << 20)
pin = malloc(1 << 20)  # behind them: without it, freeing them would shrink the heap
for block in blocks:
    free(block)
kept = resident.resident() - before
callback.on_step_begin(None, None, None)
print(kept >> 20, resident.resident() - before >> 20)
"""


def test_free_memory_is_given_back_before_an_update():
    if platform.libc_ver()[0] != "glibc" or not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs glibc and Linux's /proc")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", _GROWING], env=environment, cwd=tempfile.gettempdir(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    kept, after = map(int, done.stdout.split())
    assert kept > 150
    assert after < 20
