"""Starting anew: what is removed, when, and what never."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")

from fastalign.cli import commands as cli

ROWS = [{"prompt": "the movie", "completion": " is good"}] * 4
SHARED = {"use_cpu": "true", "disable_tqdm": "true", "per_device_train_batch_size": "2", "save_steps": "1"}
KINDS = {
    "sft": {**SHARED, "max_steps": "2", "save_strategy": "steps"},
    "grpo": {
        **SHARED,
        "num_generations": "2",
        "total_episodes": "4",
        "response_length": "4",
        "reward_fn": "r.py:score",
    },
}
MISTAKES = {
    "sft": "model=./absent model=folder tokenizer=./absent dataset=columns.jsonl eval_dataset=columns.jsonl optim=adam",
    "grpo": "model=./absent ref_model=./absent dataset=columns.jsonl ptx_dataset=columns.jsonl reward_fn=r.py:absent",
}


@pytest.fixture(params=KINDS)
def command(request, tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """A function that runs `sft` or `grpo` into `out`, where it has once left two checkpoints; its attribute: which."""
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("m")
    tiny_tokenizer.save_pretrained("m")
    Path("folder").mkdir()
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    Path("columns.jsonl").write_text('{"question": "the movie"}\n')
    Path("r.py").write_text("def score(completions):\n    return [float(len(c)) for c in completions]\n")

    def run(**options):
        given = {"model": "m", "dataset": "rows.jsonl", "output_dir": "out", **KINDS[request.param], **options}
        return cli.main([request.param, *(f"--{name}={value}" for name, value in given.items())])

    run.kind = request.param
    assert run() == 0
    assert [Path(f"out/checkpoint-{step}").is_dir() for step in (1, 2)] == [True, True]
    return run


def there(folder: str = "out") -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_mistake_removes_nothing(command, capsys):
    before = there()
    for mistake in MISTAKES[command.kind].split():
        name, _, value = mistake.partition("=")
        assert command(overwrite_output_dir="true", **{name: value}) == 2, mistake
        assert there() == before, mistake
    assert command() == 2
    assert "out' holds checkpoint-2: continue it with" in capsys.readouterr().err


def test_a_run_removes_the_checkpoints_of_the_one_before_and_nothing_else(command):
    Path("out/notes.txt").write_text("mine")
    Path("out/checkpoint-mine").mkdir()
    Path("out/checkpoint-mine/weights").write_text("mine")
    shorter = {"sft": {"max_steps": "1"}, "grpo": {"total_episodes": "2"}}[command.kind]
    assert command(overwrite_output_dir="true", **shorter) == 0
    assert [Path(f"out/checkpoint-{step}").is_dir() for step in (1, 2)] == [True, False]
    assert Path("out/notes.txt").read_text() == Path("out/checkpoint-mine/weights").read_text() == "mine"


def test_a_model_without_checkpoints_is_not_written_over(command, capsys):
    for step in (1, 2):
        shutil.rmtree(f"out/checkpoint-{step}")
    before = there()
    assert command() == 2
    assert "out' holds a model (config.json): choose another folder, or write over it with" in capsys.readouterr().err
    assert there() == before
    assert command(overwrite_output_dir="true") == 0


def _write(path: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("mine")


FOREIGN = {
    "a file in a checkpoint": lambda: _write("out/checkpoint-1/notes.txt"),
    "a folder in a checkpoint": lambda: _write("out/checkpoint-1/plots/loss.png"),
    "a checkpoint of another program": lambda: _write("out/checkpoint-7/trainer_state.json"),
    "a file of that name": lambda: _write("out/checkpoint-7"),
    "a link to elsewhere": lambda: Path("out/checkpoint-7").symlink_to("../m"),
}


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("command", ["sft"], indirect=True)
def test_what_no_run_wrote_is_refused_and_stays(command, what, capsys):
    FOREIGN[what]()
    before = there(".")
    assert command(overwrite_output_dir="true") == 2
    assert "overwrite_output_dir removes only checkpoints that fastalign wrote" in capsys.readouterr().err
    assert there(".") == before


@pytest.mark.parametrize("name", ["demo", "study frontier"])
def test_demo_and_study_with_a_mistyped_model_remove_nothing(name, made_up_corpus, monkeypatch, capsys):
    monkeypatch.chdir(made_up_corpus)
    command, mark = name.split(), f"{name.split()[0]}.json"
    Path("out/stages").mkdir(parents=True)
    for file in (mark, "stages/sft.json"):
        Path("out", file).write_text("{}")
    before = there()
    assert cli.main([*command, "--output_dir", "out", "--overwrite", "true", "--model", "./absent"]) == 2
    assert "model must be a model's folder or a hub's name" in capsys.readouterr().err
    assert there() == before
    assert cli.main([*command, "--output_dir", "new", "--model", "./absent"]) == 2
    assert not Path("new").exists()  # or the right name would be another demo's settings
