"""What people get wrong on the command line: one line that names the argument, and no traceback."""

import json
import shutil
import sys

import pytest

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")

from fastalign.cli import commands as cli

FILES = {
    "pairs.jsonl": [{"prompt": "the movie", "chosen": " is good", "rejected": " is bad"}] * 2,
    "columns.jsonl": [{"question": "the movie", "good": " is good"}] * 2,
    "none.jsonl": [{"prompt": "the movie", "chosen": None, "rejected": " is bad"}] * 2,
    "numbers.jsonl": [{"prompt": 1, "chosen": 2, "rejected": 3}] * 2,
    "lists.jsonl": [{"prompt": "the movie", "completions": [" is good", " is bad"], "rewards": [1]}] * 2,
}
DPO = "dpo --model m --output_dir run --use_cpu"
PPO = "ppo --model m --output_dir run --use_cpu --reward_fn reward.py:score"

MISTAKES = {
    f"{DPO} --dataset absent.jsonl": "dataset must be an existing file; there is no 'absent.jsonl'",
    f"{DPO} --dataset pairs.jsonl --eval_dataset absent.jsonl": "eval_dataset: dataset must be an existing file",
    f"{DPO} --dataset pairs.jsonl --eval_dataset columns.jsonl": "eval_dataset: dataset needs the columns",
    f"{DPO} --dataset columns.jsonl": "dataset needs the columns (prompt, chosen, rejected) or (chosen, rejected)",
    f"{DPO} --dataset empty.jsonl": "dataset must have at least one row; 'empty.jsonl' has none",
    f"{DPO} --dataset broken.jsonl": "dataset 'broken.jsonl' could not be read: JSON parse error",
    f"{DPO} --dataset notes.txt": "dataset must be a folder, or a file ending in .jsonl",
    f"{DPO} --dataset none.jsonl": "column 'chosen' must not be empty; it is in row 0 (from 0)",
    f"{DPO} --dataset numbers.jsonl": "column 'chosen' must hold text; row 0 (from 0) has a int",
    f"{DPO} --dataset pairs.jsonl --model ./absent": "model must be a model's folder or a hub's name",
    f"{DPO} --dataset pairs.jsonl --model absent": "no folder 'absent', and no hub gave it",
    f"{DPO} --dataset pairs.jsonl --model folder": "model 'folder' could not be loaded: the folder has no config.json",
    f"{DPO} --dataset pairs.jsonl --tokenizer ./absent": "tokenizer must be a model's folder",
    f"{DPO} --dataset pairs.jsonl --ref_model ./absent": "ref_model must be a model's folder",
    f"{DPO} --dataset pairs.jsonl --model": "--model needs a value",
    f"{DPO} --dataset pairs.jsonl --output_dir notes.txt": "output_dir must be a folder; 'notes.txt' is none",
    f"{DPO} --dataset pairs.jsonl --output_dir done": "output_dir 'done' holds checkpoint-3: continue it with",
    f"{DPO} --dataset pairs.jsonl --batch_size 4": "unknown key --batch_size; did you mean",
    f"{DPO} --dataset pairs.jsonl --per_device_train_batch_size 0": "per_device_train_batch_size must be above 0",
    f"{DPO} --dataset pairs.jsonl --gradient_accumulation_steps 0": "gradient_accumulation_steps must be above 0",
    f"{DPO} --dataset pairs.jsonl --learning_rate -1": "learning_rate must be at least 0; got -1",
    f"{DPO} --dataset pairs.jsonl --train_sampling_strategy foo": "train_sampling_strategy must be one of group_by",
    f"{DPO} --dataset pairs.jsonl --loss_type foo": "loss_type must be one of alphapo",
    "dpo --config folder": "--config must be a YAML file; folder cannot be read",
    "dpo --config": "--config needs a value",
    "pro --model m --output_dir run --use_cpu --dataset lists.jsonl": "column 'rewards' must hold one number for each",
    f"{PPO} --dataset absent.jsonl": "dataset must be an existing file; there is no 'absent.jsonl'",
    f"{PPO} --dataset pairs.jsonl --eval_dataset columns.jsonl": "eval_dataset: dataset needs the columns prompt",
    f"{PPO} --dataset pairs.jsonl --ptx_dataset absent.jsonl": "ptx_dataset: dataset must be an existing file",
    f"{PPO} --dataset pairs.jsonl --ptx_dataset pairs.jsonl": "ptx_dataset: dataset needs the columns",
    "ppo --model m --output_dir run --use_cpu --dataset pairs.jsonl": "exactly one reward must be given: reward_model",
    "ppo --model m --output_dir run --use_cpu --dataset pairs.jsonl --reward_model ./a": "reward_model must be a",
    "eval --models ./absent --dataset pairs.jsonl": "models must be a model's folder or a hub's name",
    "eval --models m --dataset pairs.jsonl --reference ./absent": "reference must be a model's folder",
    "eval --models m --dataset columns.jsonl": "dataset needs the column prompt; 'columns.jsonl' has question, good",
    "sample --model ./absent --prompt the": "model must be a model's folder",
    "sample --model m --prompt": "--prompt needs a value",
    f"{PPO} --dataset pairs.jsonl --cliprange -1": "cliprange must be in [0, inf]; got -1",
    f"{PPO} --dataset pairs.jsonl --dual_clip 1": "dual_clip must be in (1, inf]; got 1",
    f"{PPO} --dataset pairs.jsonl --gamma 2": "gamma must be in [0, 1]; got 2",
    f"{PPO} --dataset pairs.jsonl --value_model ./absent": "value_model must be a model's folder",
    "sample --model m --prompt the --output folder": "output must be a file; 'folder' is a folder",
    "eval --models m --dataset pairs.jsonl --output notes.txt/x.json": "output must be a file in a folder that can be",
    "eval --models m --dataset pairs.jsonl --judge absent.jsonl": "judge must be an existing file of labels",
    "demo --model ./absent --output_dir notes.txt": "output_dir must be a folder; 'notes.txt' is none",
    "sample --model m": "give either --prompt or --dataset",
    "doctor --model m --dataset absent.jsonl": "dataset must be an existing file",
    f"{DPO} --dataset pairs.jsonl --model notes.txt": "there is no folder 'notes.txt'",
    f"{DPO} --dataset pairs.jsonl --model damaged": "model 'damaged' could not be loaded: ",
    f"{DPO} --dataset pairs.jsonl --model bare": "model 'bare' must hold a tokenizer's files",
    f"{DPO} --dataset pairs.jsonl --tokenizer bare": "tokenizer 'bare' must hold a tokenizer's files",
    f"{DPO} --dataset pairs.jsonl:test": "dataset 'pairs.jsonl' is one file, whose only split is train; got 'test'",
    f"{DPO} --dataset pairs.jsonl --output_dir notes.txt/x": "output_dir must be a folder that can be made",
    f"{DPO} --dataset pairs.jsonl --optim foo": "--optim must be adamw_torch | ",
    f"{DPO} --dataset pairs.jsonl --lr_scheduler_type foo": "--lr_scheduler_type must be linear | cosine | ",
    f"{DPO} --dataset pairs.jsonl --save_strategy foo": "--save_strategy must be no | steps | epoch | best; got",
    f"{DPO} --dataset pairs.jsonl --max_steps 0": "max_steps must be above 0; got 0",
    f"{DPO} --dataset pairs.jsonl --num_train_epochs -1": "num_train_epochs must be above 0; got -1",
    f"{DPO} --dataset pairs.jsonl --weight_decay -1": "weight_decay must be at least 0; got -1",
    f"{DPO} --dataset pairs.jsonl --logging_steps -1": "logging_steps must be above 0; got -1",
    f'{DPO} --dataset pairs.jsonl --loss_type {{"sigmoid":"x"}}': "loss_type must be one of alphapo",
    "ppo --model m --output_dir run --use_cpu --dataset pairs.jsonl --reward_fn broken.py:f": "reward_fn names 'broken",
    "eval --models m --dataset pairs.jsonl --judge absent": "judge must be gold, the folder of a reward model, or",
    "eval --models m --dataset pairs.jsonl --judge http://h/v1": "judge_model must be the chat model's name behind",
    "demo --model m --output_dir notes.txt/x": "output_dir must be a folder that can be made",
    "study labelers --labels absent.csv": "labels must be an existing file; there is no 'absent.csv'",
    "study labelers --output_dir notes.txt": "output_dir must be a folder; 'notes.txt' is none",
}


@pytest.fixture(scope="module")
def folder(tiny_tokenizer, tmp_path_factory):
    from fastalign.demo.models import small_model

    path = tmp_path_factory.mktemp("mistakes")
    for name, rows in FILES.items():
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "empty.jsonl").write_text("")
    (path / "broken.jsonl").write_text('{"prompt": "a", \n')
    (path / "notes.txt").write_text("notes")
    (path / "reward.py").write_text("def score(completions):\n    return [0.0] * len(completions)\n")
    (path / "folder").mkdir()
    (path / "done" / "checkpoint-3").mkdir(parents=True)
    (path / "done" / "checkpoint-3" / "trainer_state.json").write_text("{}")
    small_model(len(tiny_tokenizer), hidden_size=16, layers=1, seed=0).save_pretrained(path / "m")
    for name in ("bare", "damaged"):
        shutil.copytree(path / "m", path / name)
    (path / "damaged" / "model.safetensors").write_bytes(b"damaged")
    tiny_tokenizer.save_pretrained(path / "m")
    tiny_tokenizer.save_pretrained(path / "damaged")
    (path / "broken.py").write_text("def f(\n")
    return path


@pytest.mark.parametrize("line", MISTAKES)
def test_one_line_names_the_argument(line, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no hub is asked for 'absent'
    assert cli.main(line.split()) == 2
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith(f"fastalign {line.split()[0]}: error: ")
    assert MISTAKES[line] in last
    assert not (folder / "run").exists() or not list((folder / "run").glob("checkpoint-*"))


def test_a_missing_package_of_an_option_is_named(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    line = f"{DPO} --dataset pairs.jsonl --output_dir flash --attn_implementation flash_attention_2"
    assert cli.main(line.split()) == 1
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith("fastalign dpo: error: FlashAttention2")


def test_a_metric_that_is_not_there_is_named(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    line = f"{DPO} --dataset pairs.jsonl --eval_dataset pairs.jsonl --output_dir best --max_steps 1 --disable_tqdm"
    line += " --load_best_model_at_end --metric_for_best_model foo --eval_strategy epoch --save_strategy epoch"
    assert cli.main(line.split()) == 2
    assert "fastalign dpo: error: The `metric_for_best_model`" in capsys.readouterr().err
