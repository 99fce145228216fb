"""A disk that has no room: one line, nothing half-written left, and what was there before still there.

The kernel's own limit on the size of files stands in for the full disk: the same calls fail in the same libraries.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")
pytest.importorskip("resource", reason="needs a POSIX system")

import resource

from fastalign.cli import commands as cli
from fastalign.demo.models import small_model
from fastalign.trainers.common import checkpoints, ref_cache

PAIRS = [
    {"prompt": "the movie", "chosen": f" is good {i}", "rejected": " is bad", "completion": " fun"} for i in range(6)
]
COMMANDS = {
    "sft": "",
    "dpo": "",
    "kto": "--sync_ref_model true --per_device_train_batch_size 2",
    "pro": "",
    "reward": "",
    "ppo": "--reward_fn {place}/reward.py:score",
    "grpo": "--reward_fn {place}/reward.py:score --num_generations 2",
}


@contextlib.contextmanager
def room_for_files_of(size: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def place(tiny_tokenizer, tmp_path):
    small_model(len(tiny_tokenizer), hidden_size=64, layers=2, seed=0).save_pretrained(tmp_path / "m")
    tiny_tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    (tmp_path / "reward.py").write_text(
        "def score(completions):\n    return [float(len(c) % 5) for c in completions]\n"
    )
    return tmp_path


def argv(command: str, place, extra: str) -> list[str]:
    keys = f"--model {place}/m --dataset {place}/rows.jsonl --output_dir {place}/run --use_cpu --disable_tqdm true "
    return [command, *(keys + COMMANDS[command].format(place=place) + " " + extra).split()]


def partials(folder) -> list[str]:
    return [
        os.path.join(at, name)
        for at, folders, names in os.walk(folder)
        for name in [*folders, *names]
        if "partial" in name
    ]


@pytest.mark.parametrize("when", ["a checkpoint", "the model at the end"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(place, capfd, command, when):
    never = "--save_steps null" if command in ("ppo", "grpo") else "--save_strategy no"
    saving = "--save_steps 1" if when == "a checkpoint" else never
    with room_for_files_of(100_000):  # the weights take 460 kB
        status = cli.main(argv(command, place, f"{saving} --per_device_train_batch_size 2"))
    out = capfd.readouterr()
    assert status == 1
    line = out.err.strip().splitlines()[-1]
    what = "checkpoint-1" if when == "a checkpoint" else "run"
    assert line.startswith(f"fastalign {command}: error: {place}/run")
    assert f"{what} could not be written: " in line
    assert "GB free there" in line
    assert "Traceback" not in out.err
    assert "saved to" not in out.out
    assert not partials(place / "run")
    assert not (place / "run" / "checkpoint-1").exists()
    assert not (place / "run" / "config.json").exists()


@pytest.mark.parametrize("command", ["sft", "grpo"])
def test_what_was_there_stays(place, command):
    """The earlier checkpoint and the earlier model, byte for byte."""
    assert cli.main(argv(command, place, "--save_steps 1 --per_device_train_batch_size 6")) == 0
    before = {name: (place / "run" / name).read_bytes() for name in ("model.safetensors", "config.json")}
    rest = "--save_steps 3 --per_device_train_batch_size 2 --overwrite_output_dir true --num_train_epochs 1"
    with room_for_files_of(100_000):
        assert cli.main(argv(command, place, rest)) == 1
    assert {name: (place / "run" / name).read_bytes() for name in before} == before


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    checkpoints.write_json(tmp_path / "x.json", [1])
    monkeypatch.setenv("FASTALIGN_REFERENCE_CACHE", str(tmp_path / "reference"))
    with room_for_files_of(2000):
        with pytest.raises(OSError, match=r"x\.json could not be written: .*too large.* GB free there"):
            checkpoints.write_json(tmp_path / "x.json", ["long"] * 1000)
        with pytest.raises(OSError, match=r"a\.npz could not be written: "):
            ref_cache.cached("a", lambda: [[0.1 * i for i in range(4000)]], ["chosen"])
    assert json.loads((tmp_path / "x.json").read_text()) == [1]
    assert not partials(tmp_path)


def test_other_errors_stay_themselves(tmp_path):
    """And leave nothing half-written either."""
    for error in (KeyError("a"), RuntimeError("shapes differ"), KeyboardInterrupt()):

        def write(folder, error=error):
            os.makedirs(folder)
            torch.save({}, os.path.join(folder, "half.pt"))
            raise error

        with pytest.raises(type(error)):
            checkpoints.write_folder(str(tmp_path), write)
        assert not partials(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
def test_a_log_on_a_full_disk_is_one_line(place, capfd):
    os.makedirs(place / "run")
    os.symlink("/dev/full", place / "run" / "log.jsonl.partial")
    assert cli.main(argv("sft", place, "--save_strategy no")) == 1
    assert capfd.readouterr().err.strip().splitlines()[-1].startswith("fastalign sft: error: ")
