"""Adapters as the model that a run starts from: merged, trained on, built upon; and as rewards and references."""

from __future__ import annotations

import json
import math
import os
import re
import shutil

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")
pytest.importorskip("peft", reason="needs peft (the extra `train`)")

import peft
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from fastalign.cli import commands as cli
from fastalign.evaluation.scorers import load_judge
from fastalign.models.actor_critic import with_values
from fastalign.models.loading import load
from fastalign.trainers.common import run
from fastalign.trainers.common.callbacks import LOG_NAME, read_log
from fastalign.trainers.dpo import DPOConfig, DPOTrainer
from fastalign.trainers.grpo import GRPOConfig, GRPOTrainer
from fastalign.trainers.policy.rewards import ModelReward
from fastalign.trainers.policy.rollout import Episode, Prompt
from fastalign.trainers.ppo import PPOConfig, PPOTrainer
from fastalign.trainers.reward import RewardConfig, RewardTrainer
from fastalign.trainers.sft import SFTConfig, SFTTrainer

PAIRS = [{"prompt": "the movie", "chosen": " is good" * (1 + i % 3), "rejected": " is bad"} for i in range(8)]
SFT = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
PROMPTS = [{"prompt": "the movie"}, {"prompt": "a film"}]
IDS = torch.tensor([[0, 5, 9, 40, 7]])
ADAPTERS = {"lora_rank": 2, "lora_merge": False, "lora_alpha": 8}


@pytest.fixture(scope="module")
def place(tiny_tokenizer, tmp_path_factory):
    """A base model, adapters of a language model on it, and those of a reward model with a padding token of its own."""
    from fastalign.demo.models import small_model

    path = tmp_path_factory.mktemp("adapters")
    small_model(len(tiny_tokenizer), hidden_size=16, layers=1, seed=0).save_pretrained(path / "base")
    tiny_tokenizer.save_pretrained(path / "base")
    options = {"use_cpu": True, "disable_tqdm": True, "max_steps": 3, "learning_rate": 0.05, "save_strategy": "no"}
    for name, rows, config, trainer in (
        ("sft", SFT, SFTConfig, SFTTrainer),
        ("reward", PAIRS, RewardConfig, RewardTrainer),
    ):
        args = config(output_dir=str(path / name), **options, **ADAPTERS, seed=3)
        model, tokenizer = trainer.load(str(path / "base"), args)
        one = trainer(model, args, rows, None, tokenizer)
        run.train(one)
        ids = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
        with torch.no_grad():
            torch.save(one.model.eval()(**ids).logits, path / f"{name}.pt")
        assert os.path.exists(path / name / "adapter_config.json")
    return path


@pytest.fixture
def options(tmp_path):
    shared = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    shared |= {"logging_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_steps": 3}
    return {**shared, "train_sampling_strategy": "sequential"}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def saved(folder) -> torch.Tensor:
    """What a user gets who loads the folder with transformers or peft alone."""
    if os.path.exists(os.path.join(folder, "config.json")):
        return logits(AutoModelForCausalLM.from_pretrained(folder))
    return logits(peft.AutoPeftModelForCausalLM.from_pretrained(folder))


WAYS = [
    {"adapters": "merge"},
    {"adapters": "merge", "lora_rank": 3},
    {"adapters": "continue"},
    {"adapters": "continue", "lora_merge": False},
    {"adapters": "stack", "lora_rank": 3},
    {"adapters": "stack", "lora_rank": 3, "lora_merge": False},
]


# ------------------------------------------------------------------------------------------------- the model to train
@pytest.mark.parametrize("precompute", [True, False])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_dpo_starts_at_the_adapters_and_saves_what_it_trained(place, options, way, precompute):
    """The reference is the model that --model names, adapters on: the first loss is log 2. The base alone is not it."""
    args = DPOConfig(**options, **way, precompute_ref_log_probs=precompute)
    model, tokenizer = DPOTrainer.load(str(place / "sft"), args)
    expected = torch.load(place / "sft.pt")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(saved(place / "base"), expected, atol=1e-2)
    trainer = DPOTrainer(model, args, PAIRS, None, tokenizer)
    run.train(trainer)
    losses = [line["loss"] for line in read_log(os.path.join(args.output_dir, LOG_NAME))[:3]]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[2] < losses[0] - 1e-3
    trained = logits(trainer.model)
    assert not torch.allclose(trained, expected, atol=1e-3)
    torch.testing.assert_close(saved(args.output_dir), trained, rtol=1e-4, atol=1e-4)
    alone = way.get("lora_merge") is False
    assert os.path.exists(os.path.join(args.output_dir, "adapter_config.json")) == alone
    assert os.path.exists(os.path.join(args.output_dir, "config.json")) != alone
    torch.testing.assert_close(
        logits(load("model", AutoModelForCausalLM, args.output_dir)), trained, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("trainer", "config"), [(PPOTrainer, PPOConfig), (GRPOTrainer, GRPOConfig)])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_policies_start_at_the_adapters(place, tmp_path, way, trainer, config):
    """KL to the reference 0 at first, though the adapters are far from their base; and more after updates."""
    keys = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "disable_tqdm": True, "response_length": 5}
    keys |= {"per_device_train_batch_size": 4, "total_episodes": 12, "num_generations": 2, "learning_rate": 0.03}
    args = config(model=str(place / "sft"), **keys, **way)
    one = trainer(None, args, PROMPTS, reward=lambda completions: [float(len(c) % 5) for c in completions])
    one.train()
    kl = [line["objective/kl"] for line in read_log(os.path.join(args.output_dir, LOG_NAME))]
    assert kl[0] == pytest.approx(0, abs=1e-4)
    assert abs(kl[-1]) > 1e-3
    one.save_model()
    torch.testing.assert_close(saved(args.output_dir), logits(one.inner.policy), rtol=1e-4, atol=1e-4)


def test_a_resumed_run_stands_on_the_same_adapters(place, options, tmp_path):
    """To the bit; and a checkpoint that is loaded as a model is the adapters on the adapters that it was trained on."""
    saving = {**options, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    results = []
    for name, start in (("whole", None), ("cut", "checkpoint-2")):
        args = DPOConfig(**{**saving, "output_dir": str(tmp_path / name)}, adapters="stack", lora_rank=3)
        model, tokenizer = DPOTrainer.load(str(place / "sft"), args)
        trainer = DPOTrainer(model, args, PAIRS, None, tokenizer)
        if start is not None:
            shutil.copytree(tmp_path / "whole" / start, tmp_path / "cut" / start)
        trainer.train(resume_from_checkpoint=start and str(tmp_path / "cut" / start))
        results.append(logits(trainer.model))
    assert torch.equal(*results)
    last = load("model", AutoModelForCausalLM, str(tmp_path / "whole" / "checkpoint-4"))
    torch.testing.assert_close(logits(last), results[0], rtol=1e-4, atol=1e-4)


def test_a_trained_peft_model_from_python_is_its_own_reference(place, options):
    """As with `continue`: what training starts from is the model with its adapters on."""
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    model = peft.PeftModel.from_pretrained(base, str(place / "sft"), is_trainable=True)
    args = DPOConfig(**options)
    _, tokenizer = DPOTrainer.load(str(place / "base"), args)
    trainer = DPOTrainer(model, args, PAIRS, None, tokenizer)
    trainer.train()
    assert read_log(os.path.join(args.output_dir, LOG_NAME))[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            "--lora_rank 2 --lora_merge false",
            "lora_merge must be true where new adapters are trained on .*adapters=stack",
        ),
        ("--adapters continue --lora_rank 2", "lora_rank must be 0 with adapters=continue"),
        ("--adapters stack", "lora_rank must be above 0 with adapters=stack"),
        ("--adapters keep", "adapters must be one of merge, continue, stack"),
        ("--adapters continue --model {place}/base", "adapters=continue needs a model that is a folder of adapters"),
        ("--model {place}/reward", "its adapters are those of a SEQ_CLS model, not of a language model"),
        ("--ref_model {place}/reward", "ref_model .*/reward' could not be loaded: its adapters are those of a SEQ_CLS"),
        ("--model {place}/orphan", "orphan' could not be loaded: its adapters stand on the base model '/gone/away'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(place, tmp_path, capsys, keys, message):
    if "orphan" in keys and not (place / "orphan").exists():
        shutil.copytree(place / "sft", place / "orphan")
        about = json.loads((place / "orphan" / "adapter_config.json").read_text())
        about["base_model_name_or_path"] = "/gone/away"
        (place / "orphan" / "adapter_config.json").write_text(json.dumps(about))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    argv = ["dpo", "--model", str(place / "sft"), "--dataset", str(rows), "--output_dir", str(tmp_path / "run")]
    assert cli.main([*argv, "--use_cpu", *keys.format(place=place).split()]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("fastalign dpo: error: ")
    assert re.search(message, line), line


@pytest.mark.parametrize("keys", ["--adapters continue", "--adapters stack --lora_rank 2"])
@pytest.mark.parametrize("command", ["dpo", "grpo"])
def test_sharded_weights_that_would_be_merged_into_are_refused(place, tmp_path, capsys, monkeypatch, command, keys):
    """Before anything is trained, in one line; with lora_merge=false both ways work: see the tests of two processes."""
    monkeypatch.setattr("fastalign.utils.environment.launched_with_fsdp", lambda: True)
    (tmp_path / "judge.py").write_text("def score(completions):\n    return [0.0 for _ in completions]\n")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    argv = [command, "--model", str(place / "sft"), "--dataset", str(rows), "--output_dir", str(tmp_path / "run")]
    argv += ["--use_cpu", *keys.split(), *(["--reward_fn", f"{tmp_path}/judge.py:score"] if command == "grpo" else [])]
    assert cli.main(argv) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "lora_merge must be false with FSDP, whose shards cannot be merged into; got true" in line
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_adapters_that_transformers_put_in_are_refused(place, options):
    args = SFTConfig(**options)
    _, tokenizer = SFTTrainer.load(str(place / "base"), args)
    with pytest.raises(ValueError, match="model holds adapters that transformers has put beside its weights"):
        SFTTrainer(AutoModelForCausalLM.from_pretrained(place / "sft"), args, SFT, None, tokenizer)


# --------------------------------------------------------------------------------------------- rewards and others
def test_reward_adapters_with_a_new_padding_token_load_everywhere(place, options):
    """The token's row of the embeddings is one more than the base model has."""
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    expected = torch.load(place / "reward.pt")
    model = load("reward", AutoModelForSequenceClassification, str(place / "reward"))
    assert model.get_input_embeddings().num_embeddings == base.get_input_embeddings().num_embeddings + 1
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    texts = [" is good", " is bad and very long", ""]
    judged = load_judge(str(place / "reward"))(["the movie"] * 3, texts)
    reward = ModelReward(str(place / "reward"), device=torch.device("cpu"), dtype=torch.float32)
    scored = reward([Episode(Prompt([0], "the movie", {}), [1], text or " ", True) for text in texts])
    assert scored.tolist() == pytest.approx(judged.tolist(), abs=1e-4)
    assert len(set(scored.tolist())) == 3
    args = RewardConfig(**options, adapters="continue", lora_merge=False)
    start, tokenizer = RewardTrainer.load(str(place / "reward"), args)
    torch.testing.assert_close(logits(start), expected, rtol=1e-4, atol=1e-5)
    trainer = RewardTrainer(start, args, PAIRS, None, tokenizer)
    run.train(trainer)
    again = load("reward", AutoModelForSequenceClassification, args.output_dir)
    torch.testing.assert_close(logits(again), logits(trainer.model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(again), expected, atol=1e-3)


def test_a_reward_model_from_a_language_models_adapters(place, options):
    args = RewardConfig(**options)
    model, _ = RewardTrainer.load(str(place / "sft"), args)
    merged = load("model", AutoModelForCausalLM, str(place / "sft"))
    for name, value in merged.base_model.state_dict().items():
        assert torch.equal(model.base_model.state_dict()[name], value), name


@pytest.mark.parametrize("name", ["sft", "reward"])
def test_a_value_function_from_adapters(place, name):
    kinds = {"sft": AutoModelForCausalLM, "reward": AutoModelForSequenceClassification}
    whole = load("x", kinds[name], str(place / name)).base_model
    backbone = load("value_model", AutoModel, str(place / name))
    assert all(torch.equal(backbone.state_dict()[k], v) for k, v in whole.state_dict().items())
    assert with_values(
        AutoModelForCausalLM.from_pretrained(place / "base"), str(place / name), torch.float32
    ).has_values


def test_adapters_moved_together_with_their_base_are_found(place, tmp_path):
    for name in ("base", "sft"):
        shutil.copytree(place / name, tmp_path / name)
    about = json.loads((tmp_path / "sft" / "adapter_config.json").read_text())
    about["base_model_name_or_path"] = "/elsewhere/base"
    (tmp_path / "sft" / "adapter_config.json").write_text(json.dumps(about))
    model = load("model", AutoModelForCausalLM, str(tmp_path / "sft"))
    torch.testing.assert_close(logits(model), torch.load(place / "sft.pt"), rtol=1e-4, atol=1e-5)
