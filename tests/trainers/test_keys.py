"""Keys of commands and arguments of trainers as other libraries name them; mistyped ones refused before imports."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")

from fastalign.cli import commands as cli
from fastalign.cli import keys
from fastalign.doctor.command import DoctorConfig
from fastalign.evaluation.evaluate import EvalConfig
from fastalign.trainers.common import arguments
from fastalign.trainers.common.other_names import OURS, SAME, answer
from fastalign.trainers.dpo import DPOConfig, DPOTrainer
from fastalign.trainers.grpo import GRPOConfig, GRPOTrainer
from fastalign.trainers.kto import KTOConfig, KTOTrainer
from fastalign.trainers.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from fastalign.trainers.ppo import PPOConfig, PPOTrainer
from fastalign.trainers.pro import PROConfig, PROTrainer
from fastalign.trainers.reward import RewardConfig, RewardTrainer
from fastalign.trainers.sft import SFTConfig, SFTTrainer
from fastalign.trainers.tpo import TPOConfig, TPOTrainer


@pytest.mark.parametrize("command", keys.CONFIGS)
def test_keys_read_from_the_source_are_those_of_the_class(command):
    module, name = keys.CONFIGS[command]
    config = getattr(importlib.import_module(f"fastalign.{module}"), name)
    assert keys.known_keys(command) == {f.name for f in dataclasses.fields(config) if f.init}


def test_a_mistyped_key_is_refused_before_anything_heavy_is_imported(tmp_path):
    """Not even torch; and so in a fraction of a second of a processor, all told."""
    (tmp_path / "run.yaml").write_text("lerning_rate: 1\n")
    code = (
        "import sys, time\n"
        "from fastalign.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "heavy = {'torch', 'numpy', 'transformers', 'datasets', 'accelerate', 'peft', 'pandas'} & set(sys.modules)\n"
        "print(status, sorted(heavy), time.process_time())\n"
    )
    for argv in (["dpo", "--lerning_rate", "3"], ["grpo", "--config", str(tmp_path / "run.yaml")]):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code, *argv]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert "unknown key --lerning_rate; did you mean --learning_rate" in done.stderr
        status, heavy, seconds = done.stdout.split()
        assert (status, heavy) == ("2", "[]")
        assert float(seconds) < 1


SAME_MEANING = pytest.mark.parametrize(
    ("config", "argv", "own", "value"),
    [
        (DPOConfig, "--model_name_or_path m", "model", "m"),
        (SFTConfig, "--dataset_name rows.jsonl", "dataset", "rows.jsonl"),
        (SFTConfig, "--lora_r 8", "lora_rank", 8),
        (SFTConfig, "--torch_dtype bfloat16", "dtype", "bfloat16"),
        (GRPOConfig, "--max_completion_length 99", "response_length", 99),
        (GRPOConfig, "--max-completion-length=99", "response_length", 99),
        (GRPOConfig, "--beta 0.5", "kl_coef", 0.5),
        (GRPOConfig, "--num_iterations 3", "num_ppo_epochs", 3),
        (DPOConfig, "--beta 0.5", "beta", 0.5),
        (DPOConfig, "--f_divergence_type js_divergence", "f_divergence", "js_divergence"),
    ],
)


@SAME_MEANING
def test_keys_of_the_same_meaning_are_understood(config, argv, own, value, tmp_path):
    args = arguments.parse(config, [*argv.split(), "--output_dir", str(tmp_path), "--use_cpu"], command="x")
    assert getattr(args, own) == value


@SAME_MEANING
def test_arguments_of_the_same_meaning_are_understood_in_python(config, argv, own, value, tmp_path):
    name = re.split("[ =]", argv)[0].lstrip("-").replace("-", "_")
    args = config(**{name: value}, output_dir=str(tmp_path), use_cpu=True)
    assert getattr(args, own) == value
    assert getattr(dataclasses.replace(args), own) == value
    with pytest.raises(TypeError, match="kl_coef and beta are one argument of GRPOConfig; give it once"):
        GRPOConfig(str(tmp_path), kl_coef=0.1, beta=0.2)
    assert SFTConfig(output_dir=str(tmp_path), use_cpu=True, torch_dtype=torch.bfloat16).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (SFTConfig, {"use_peft": True}, "SFTConfig takes no use_peft: lora_rank=16 trains LoRA adapters"),
        (DPOConfig, {"rpo_alpha": 1.0}, "DPOConfig takes no rpo_alpha: loss_type='rpo' nll_weight=W"),
        (DPOConfig, {"max_completion_length": 9}, "DPOConfig takes no max_completion_length: max_length=N bounds"),
        (GRPOConfig, {"save_strategy": "no"}, "GRPOConfig takes no save_strategy: save_steps=N; save_steps=None for"),
        (PPOConfig, {"reward_funcs": len}, "PPOConfig takes no reward_funcs: reward_fn='FILE.py:NAME', or"),
        (GRPOConfig, {"lora_dropout": 0.1}, "GRPOConfig takes no lora_dropout: policies train without dropout"),
        (DPOConfig, {"modle": "m"}, "DPOConfig takes no modle: did you mean model"),
        (EvalConfig, {"model_name_or_path": "m"}, "EvalConfig takes no model_name_or_path: models are the"),
        (DoctorConfig, {"load_in_4bit": True}, "DoctorConfig takes no load_in_4bit: .* dtype='bfloat16' halves"),
        (RewardConfig, {"zzz": 1}, "RewardConfig takes no zzz$"),
    ],
)
def test_other_arguments_are_answered_with_ours_in_python(config, given, message):
    with pytest.raises(TypeError, match=message):
        config(**given)


def test_a_configurations_signature_is_its_keys():
    """For editors and help(); and what is printed of one, pickled or copied is as ever."""
    given = inspect.signature(DPOConfig).parameters
    assert {"beta", "model", "learning_rate"} <= set(given)
    assert given["beta"].default == 0.1


TRL = {
    "sft": [("sft_config", "SFTConfig")],
    "dpo": [("dpo_config", "DPOConfig")],
    "kto": [("kto_config", "KTOConfig")],
    "tpo": [("../experimental/tpo/tpo_config", "TPOConfig")],
    "online-dpo": [("../experimental/online_dpo/online_dpo_config", "OnlineDPOConfig")],
    "grpo": [("grpo_config", "GRPOConfig"), ("rloo_config", "RLOOConfig")],
    "reward": [("reward_config", "RewardConfig")],
}


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")
@pytest.mark.parametrize("command", TRL)
def test_every_key_of_trl_is_known_understood_or_answered(command):
    """Those that its configurations add to transformers' own, and those that describe a model."""
    ours = keys.known_keys(command)
    for module, name in (*TRL[command], ("model_config", "ModelConfig")):
        path = Path(importlib.util.find_spec("trl").submodule_search_locations[0], "trainer", f"{module}.py")
        (owner,) = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == name]
        theirs = [n.target.id for n in owner.body if isinstance(n, ast.AnnAssign)]
        assert len(theirs) > 10
        assert not [n for n in theirs if n not in ours and n not in OURS and not set(SAME.get(n, ())) & ours]


@pytest.mark.parametrize(
    ("config", "argv", "message"),
    [
        (SFTConfig, "--use_peft", "there is no key --use_peft here; --lora_rank 16 trains LoRA"),
        (DPOConfig, "--load_in_4bit true", "there is no key --load_in_4bit here; .*--dtype bfloat16"),
        (GRPOConfig, "--max_steps 10", "there is no key --max_steps here; --total_episodes N"),
        (GRPOConfig, "--reward_funcs x", "--reward_fn FILE.py:NAME"),
        (GRPOConfig, "--beta 0.1 --kl_coef 0.2", "--beta and --kl_coef are one key; give it once"),
        (DPOConfig, "--model_name_or_pth m", "unknown key --model_name_or_pth"),
    ],
)
def test_others_are_answered_with_ours(config, argv, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments.parse(config, [*argv.split(), "--output_dir", str(tmp_path)], command="x")


def test_the_command_line_wins_over_the_file_under_either_name(tmp_path):
    (tmp_path / "run.yaml").write_text("beta: 0.3\nmax_completion_length: 7\n")
    argv = ["--config", str(tmp_path / "run.yaml"), "--kl_coef", "0.1", "--output_dir", str(tmp_path)]
    args = arguments.parse(GRPOConfig, argv, command="grpo")
    assert (args.kl_coef, args.response_length) == (0.1, 7)


def test_every_answer_names_keys_that_there_are():
    """What one is told to use instead exists in some command."""
    everything = set().union(*(keys.known_keys(command) for command in keys.CONFIGS))
    assert {own for ours in SAME.values() for own in ours} <= everything
    named = {name for other in OURS for name in re.findall(r"--(\w+)", answer(other))}
    assert named - {"help"} <= everything
    assert not [other for other in OURS if re.search("[{}]|--(?!help)", answer(other, python=True))]


# ---------------------------------------------------------------------------------------------------- from Python
ROWS = [
    {
        "prompt": "the movie",
        "chosen": f" is good {i}",
        "rejected": " is bad",
        "completion": " is fun",
        "reference": " ok",
    }
    for i in range(4)
]
TRAINERS = {SFTTrainer: SFTConfig, DPOTrainer: DPOConfig, PROTrainer: PROConfig, RewardTrainer: RewardConfig}
TRAINERS |= {KTOTrainer: KTOConfig, TPOTrainer: TPOConfig}
POLICIES = {PPOTrainer: PPOConfig, GRPOTrainer: GRPOConfig, OnlineDPOTrainer: OnlineDPOConfig}
BOTH = {**TRAINERS, **POLICIES}


@pytest.fixture
def place(tiny_model, tiny_tokenizer, tmp_path):
    tiny_model().save_pretrained(tmp_path / "m")
    tiny_tokenizer.save_pretrained(tmp_path / "m")
    return tmp_path


def options(trainer, place, **more):
    keys = {"output_dir": str(place / "run"), "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 2}
    own = {"response_length": 4, "total_episodes": 4, "num_generations": 2} if trainer in POLICIES else {"max_steps": 2}
    return {**keys, **own, **more}


def lengths(completions):
    return [float(len(c)) for c in completions]


def reward_of(trainer):
    return {"reward": lengths} if trainer in POLICIES else {}


@pytest.mark.parametrize("trainer", BOTH, ids=lambda t: t.__name__)
@pytest.mark.parametrize("how", ["folder", "args.model"])
def test_a_model_may_be_a_folder_or_none(place, trainer, how):
    args = BOTH[trainer](**options(trainer, place, **({"model": str(place / "m")} if how == "args.model" else {})))
    run = trainer(str(place / "m") if how == "folder" else None, args, ROWS, **reward_of(trainer))
    run.train()
    assert run.processing_class("the")["input_ids"]


@pytest.mark.parametrize("trainer", BOTH, ids=lambda t: t.__name__)
def test_adapters_of_a_peft_config(place, trainer):
    peft = pytest.importorskip("peft", reason="needs peft (the extra `train`)")
    task = "SEQ_CLS" if trainer is RewardTrainer else "CAUSAL_LM"
    config = peft.LoraConfig(r=3, target_modules="all-linear", task_type=task)
    args = BOTH[trainer](**options(trainer, place, lora_merge=False))
    run = trainer(str(place / "m"), args, ROWS, **reward_of(trainer), peft_config=config)
    run.train()
    run.save_model()
    assert peft.PeftConfig.from_pretrained(place / "run").r == 3
    twice = BOTH[trainer](**options(trainer, place, lora_rank=2))
    with pytest.raises(ValueError, match="peft_config must be None where adapters come from lora_rank=2"):
        trainer(str(place / "m"), twice, ROWS, **reward_of(trainer), peft_config=config)


@pytest.mark.parametrize("trainer", BOTH, ids=lambda t: t.__name__)
def test_what_is_missing_or_of_others_is_answered(place, trainer, tiny_model):
    name = BOTH[trainer].__name__
    args = BOTH[trainer](**options(trainer, place))
    with pytest.raises(TypeError, match=rf"args must be a {name}, such as {name}\(output_dir=.*; got None"):
        trainer(str(place / "m"), None, ROWS)
    with pytest.raises(TypeError, match=rf"args must be a {name}.*; got function; reward functions are given by name"):
        trainer(str(place / "m"), lengths, ROWS)
    with pytest.raises(ValueError, match=r"model must be a model or its folder, here or in args\.model; got None"):
        trainer(None, args, ROWS, **reward_of(trainer))
    with pytest.raises(ValueError, match="processing_class must be the model's tokenizer; got None"):
        trainer(tiny_model(), args, ROWS, **reward_of(trainer))
    for other, said in {
        "compute_metrics": "does not take compute_metrics: logits are never held whole",
        "tokenizer": "does not take tokenizer: processing_class is its name",
        "data_collator": "does not take data_collator: rows are collated by the trainer",
        "nonsense": "does not take nonsense: it has no such argument",
    }.items():
        with pytest.raises(TypeError, match=said):
            trainer(str(place / "m"), args, ROWS, **reward_of(trainer), **{other: len})
        trainer(str(place / "m"), args, ROWS, **reward_of(trainer), **{other: None})


@pytest.mark.parametrize("trainer", POLICIES, ids=lambda t: t.__name__)
def test_reward_funcs_is_reward(place, trainer):
    """One function, or several, whose numbers are added up, None counting for nothing."""
    args = POLICIES[trainer](**options(trainer, place))

    def only_long(completions, **kwargs):
        return [100.0 if len(c) > 3 else None for c in completions]

    scores = []
    for given in ({"reward": lengths}, {"reward_funcs": lengths}, {"reward_funcs": [lengths, only_long]}):
        run = trainer(str(place / "m"), args, ROWS, **given)
        scores.append([(e.text, e.score) for e in run.roll_out()])
    assert scores[0] == scores[1]
    assert scores[2] == [(text, score + 100 * (len(text) > 3)) for text, score in scores[0]]
    with pytest.raises(ValueError, match="reward and reward_funcs are one argument"):
        trainer(str(place / "m"), args, ROWS, reward=lengths, reward_funcs=lengths)


# -------------------------------------------------------------------------------------------------------- the console
@pytest.mark.parametrize("command", ["dpo", "grpo"])
def test_without_a_progress_bar_there_are_still_lines(place, capfd, command):
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (place / "reward.py").write_text("def score(completions):\n    return [float(len(c)) for c in completions]\n")
    argv = [command, "--model", str(place / "m"), "--dataset", str(place / "rows.jsonl"), "--use_cpu"]
    argv += ["--output_dir", str(place / "run"), "--disable_tqdm", "true", "--logging_steps", "1"]
    policy = ["--reward_fn", f"{place}/reward.py:score", "--num_generations", "2", "--response_length", "4"]
    assert cli.main([*argv, *(policy if command == "grpo" else [])]) == 0
    out = capfd.readouterr()
    lines = [line for line in out.out.splitlines() if line.startswith("step ")]
    assert lines
    assert ("loss" if command == "dpo" else "objective/scores") in lines[0]
    assert not re.search(r"(^|[\r\n])\s*\d+%\|", out.err)  # a bar without a name: that of the steps
    assert out.out.count("saved to") == 1
