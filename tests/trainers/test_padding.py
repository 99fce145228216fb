"""The side that a batch is padded on does not reach the results: losses, metrics and weights are equal to the bit."""

from __future__ import annotations

import copy
import os

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")

from transformers import AutoModelForSequenceClassification

from fastalign.trainers.common.callbacks import LOG_NAME, read_log
from fastalign.trainers.data.collate import pad, padding_last
from fastalign.trainers.dpo import DPOConfig, DPOTrainer
from fastalign.trainers.pro import PROConfig, PROTrainer
from fastalign.trainers.reward import RewardConfig, RewardTrainer
from fastalign.trainers.sft import SFTConfig, SFTTrainer

# Long and short: below about a hundred tokens torch's attention gives equal bits on both sides by itself.
WORDS = [" movie", " good", " bad", " fun", " dull"]
TEXTS = ["".join(WORDS[(i * 3 + j * j) % 5] for j in range(words)) for i, words in enumerate((3, 90, 1, 40, 70, 12))]
SFT = [{"prompt": "the", "completion": text} for text in TEXTS]
PAIRS = [{"prompt": "the", "chosen": a, "rejected": b} for a, b in zip(TEXTS, TEXTS[::-1], strict=True)]
TRAINERS = {
    "sft": (SFTConfig, SFTTrainer, SFT),
    "dpo": (DPOConfig, DPOTrainer, PAIRS),
    "pro": (PROConfig, PROTrainer, PAIRS),
    "reward": (RewardConfig, RewardTrainer, PAIRS),
}
CLOCKED = ("time", "runtime", "per_second", "total_flos")


def padded_sides(trainer) -> list[int]:
    """Where the first real token of every row of the first batch is."""
    return next(iter(trainer.get_train_dataloader()))["attention_mask"].argmax(-1).tolist()


@pytest.mark.parametrize("name", TRAINERS)
def test_both_sides_train_and_evaluate_alike(name, tiny_model, tiny_tokenizer, tmp_path):
    config, trainer_class, rows = TRAINERS[name]
    results = []
    for side in ("right", "left"):
        model = tiny_model()
        if name == "reward":
            model.save_pretrained(tmp_path / "base")
            torch.manual_seed(0)
            model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
        options = {"output_dir": str(tmp_path / side), "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
        options |= {"learning_rate": 1e-2, "logging_steps": 1, "max_steps": 3, "max_length": 256}
        args = config(padding_side=side, per_device_train_batch_size=3, per_device_eval_batch_size=4, **options)
        trainer = trainer_class(model, args, rows, rows, copy.deepcopy(tiny_tokenizer))  # it may gain a padding token
        assert (max(padded_sides(trainer)) > 0) is (side == "left")
        trainer.train()
        trainer.evaluate()
        log = [
            {k: v for k, v in line.items() if not k.endswith(CLOCKED)}
            for line in read_log(os.path.join(str(tmp_path / side), LOG_NAME))
        ]
        results.append((log, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_padding_moves_behind_the_tokens():
    sequences = [([5], [6, 7, 8]), ([], [9, 4]), ([3, 2], [1])]
    left, right = (pad(sequences, 0, side) for side in ("left", "right"))
    moved = padding_last({**left, "places": torch.tensor([[0, 1], [2, -1]])})
    real = right["attention_mask"].bool()
    for name in ("attention_mask", "labels"):
        assert torch.equal(moved[name], right[name])
    for name in ("input_ids", "position_ids"):
        assert torch.equal(moved[name][real], right[name][real])
    assert moved["places"].tolist() == [[0, 1], [2, -1]]
