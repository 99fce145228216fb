"""DPO's reference: kept on disk by what it depends on, adapters off under LoRA; and the signs of a run gone wrong."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")

from transformers import AutoModelForCausalLM, TrainerControl, TrainerState

from fastalign.models.lora import with_lora
from fastalign.trainers.common import ref_cache, run
from fastalign.trainers.common.callbacks import LOG_NAME, read_log
from fastalign.trainers.common.preference_callback import LINES, PreferenceWatch
from fastalign.trainers.dpo import DPOConfig, DPOTrainer
from fastalign.utils.environment import reference_cache_dir

PAIRS = [
    {"prompt": "the movie", "chosen": " is good" * (1 + i % 3), "rejected": " is bad and long"[: 7 + 3 * (i % 4)]}
    for i in range(8)
]


@pytest.fixture
def make(tiny_model, tiny_tokenizer, tmp_path):
    def build(rows=PAIRS, model=None, eval_rows=None, **options):
        shared = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
        shared |= {"logging_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_steps": 3}
        args = DPOConfig(**{**shared, "train_sampling_strategy": "sequential", **options})
        return DPOTrainer(model or tiny_model(), args, rows, eval_rows, tiny_tokenizer)

    return build


def stored() -> list[Path]:
    return sorted(reference_cache_dir().glob("*"))


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class TestCache:
    def test_second_run_computes_nothing_and_sees_the_same(self, make, monkeypatch):
        first = make()
        assert len(stored()) == 1
        monkeypatch.setattr(DPOTrainer, "_compute_reference", lambda *_: pytest.fail("computed again"))
        second = make()
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            assert second.train_dataset[name] == first.train_dataset[name]

    def test_another_model_other_data_or_length_is_another_entry(self, make, tiny_model):
        other = tiny_model()
        with torch.no_grad():
            next(other.parameters()).mul_(1.001)
        make()
        for count, changed in enumerate(
            ({"model": other}, {"rows": PAIRS[:7]}, {"rows": PAIRS[::-1]}, {"max_length": 8}, {"bf16": True}), 2
        ):
            make(**changed)
            assert len(stored()) == count
        make()
        assert len(stored()) == count

    @pytest.mark.parametrize("options", [{"ld_alpha": 0.25}, {"use_weighting": True}], ids=str)
    def test_weights_are_alike_precomputed_and_on_the_fly(self, make, options):
        """Of tokens the reference's sums are weighted too, and kept apart from unweighted ones."""
        logs = []
        for precompute in (True, False):
            trainer = make(precompute_ref_log_probs=precompute, **options)
            trainer.train()
            logs.append([line["loss"] for line in read_log(os.path.join(trainer.args.output_dir, LOG_NAME))[:3]])
        assert logs[0] == pytest.approx(logs[1], rel=1e-5)
        plain = make()
        assert len(stored()) == (2 if "ld_alpha" in options else 1)
        plain.train()
        assert [line["loss"] for line in read_log(os.path.join(plain.args.output_dir, LOG_NAME))[:3]] != logs[0]

    def test_nothing_is_kept_where_it_is_not_wanted(self, make):
        make(cache_ref_log_probs=False)
        assert stored() == []

    def test_cut_off_writing_leaves_nothing_that_is_read(self, make, monkeypatch):
        monkeypatch.setattr(ref_cache.np, "savez", lambda file, **_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make()
        assert not [path for path in stored() if path.suffix == ".npz"]


class TestLoRA:
    @pytest.fixture(autouse=True)
    def peft(self):
        pytest.importorskip("peft", reason="needs peft (the extra `train`)")

    def test_reference_is_the_model_with_its_adapters_off(self, make, tiny_model):
        results = []
        for options in ({"precompute_ref_log_probs": True}, {"precompute_ref_log_probs": False}):
            trainer = make(lora_rank=4, **options)
            assert trainer.ref_model is None
            trainer.train()
            lines = read_log(os.path.join(trainer.args.output_dir, LOG_NAME))[:3]
            results.append([line["loss"] for line in lines])
            base = trainer.model.get_base_model()
            unadapted = {k: v for k, v in base.state_dict().items() if "lora_" not in k}
            for (_, value), before in zip(unadapted.items(), tiny_model().state_dict().values(), strict=True):
                assert torch.equal(value, before)
        assert results[0][0] == pytest.approx(math.log(2), abs=1e-6)
        assert results[0][2] < results[0][0]
        assert results[1] == pytest.approx(results[0], abs=1e-5)

    def test_saved_model_is_plain_and_the_trained_one(self, make):
        trainer = make(lora_rank=4, gradient_checkpointing=True)
        run.train(trainer)
        plain = AutoModelForCausalLM.from_pretrained(trainer.args.output_dir).eval()
        assert not Path(trainer.args.output_dir, "adapter_config.json").exists()
        ids = torch.tensor([[0, 5, 9, 40]])
        with torch.no_grad():
            trained = trainer.model.eval()(ids).logits
            torch.testing.assert_close(plain(ids).logits, trained, rtol=1e-4, atol=1e-5)
            with trainer.model.disable_adapter():
                assert not torch.allclose(trainer.model(ids).logits, trained, atol=1e-4)

    def test_merging_into_shards_is_refused_before_the_run(self, make, tiny_model, monkeypatch):
        args = make(lora_rank=4).args
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(ValueError, match="lora_merge must be false with FSDP"):
            with_lora(tiny_model(), args, "CAUSAL_LM")
        args.lora_merge = False
        assert with_lora(tiny_model(), args, "CAUSAL_LM").peft_config["default"].r == 4

    def test_adapters_alone_and_resume(self, make, tmp_path):
        kept = {"lora_rank": 4, "lora_merge": False, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        whole = make(**kept, output_dir=str(tmp_path / "whole"))
        run.train(whole)
        assert Path(tmp_path / "whole" / "adapter_config.json").exists()
        again = make(**kept, output_dir=str(tmp_path / "whole"))
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        assert torch.equal(weights(again.model), weights(whole.model))


def test_best_checkpoint_is_kept_and_loaded(make, tmp_path):
    """The learning rate is so high that later checkpoints are worse than the first."""
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make(
        eval_rows=PAIRS, **often, load_best_model_at_end=True, metric_for_best_model="eval_loss", save_total_limit=1,
        learning_rate=0.3, max_steps=6,
    )  # fmt: skip
    trainer.train()
    losses = {
        line["step"]: line["eval_loss"] for line in read_log(str(tmp_path / "run" / LOG_NAME)) if "eval_loss" in line
    }
    best = min(losses, key=lambda step: losses[step])
    assert best < 6, "the case needs a run that gets worse"
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / f"checkpoint-{best}")
    assert run.checkpoints(str(tmp_path / "run")) == [trainer.state.best_model_checkpoint]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)


def test_mixed_precision_trains_in_bfloat16(make):
    trainer = make(bf16=True, precompute_ref_log_probs=False)
    trainer.train()
    lines = read_log(os.path.join(trainer.args.output_dir, LOG_NAME))
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-2)
    assert lines[2]["loss"] < lines[0]["loss"]
    assert trainer.logits(trainer.model_wrapped, trainer.data_collator(list(trainer.train_dataset))).fused


GOOD = {"rewards/chosen": 0.1, "rewards/margins": 0.3, "rewards/longer_preferred": 0.5, "lengths/longer_chosen": 0.5}


class TestWatch:
    def lines(self, tmp_path, logs, repeat=LINES):
        class Args:
            output_dir = str(tmp_path)

        watch = PreferenceWatch()
        for step in range(repeat):
            watch.on_log(Args(), TrainerState(global_step=step), TrainerControl(), logs=logs)
        return watch.warned, [line["warning"] for line in read_log(str(tmp_path / LOG_NAME))]

    def test_falling_chosen_reward_is_named_once(self, tmp_path):
        logs = {**GOOD, "rewards/chosen": -0.1}
        assert self.lines(tmp_path, logs, LINES * 3) == ({"chosen_reward_falls"}, ["chosen_reward_falls"])

    def test_length_growth_is_named(self, tmp_path):
        logs = {**GOOD, "rewards/longer_preferred": 0.9}
        assert self.lines(tmp_path, logs)[1] == ["length_grows"]

    def test_sound_or_short_runs_are_left_alone(self, tmp_path):
        assert self.lines(tmp_path, GOOD) == (set(), [])
        assert self.lines(tmp_path, {**GOOD, "rewards/chosen": -0.1}, LINES - 1) == (set(), [])
        assert self.lines(tmp_path, {"eval_loss": 1.0}) == (set(), [])

    def test_a_run_on_data_that_prefers_length_is_warned(self, make):
        rows = [{"prompt": "the movie", "chosen": " is good" * 6, "rejected": " is bad"} for _ in range(4)]
        trainer = make(rows, max_steps=LINES + 3)
        trainer.train()
        lines = read_log(os.path.join(trainer.args.output_dir, LOG_NAME))
        assert "length_grows" in [line.get("warning") for line in lines]
        assert lines[0]["lengths/longer_chosen"] == 1.0
        assert lines[0]["lengths/chosen"] > lines[0]["lengths/rejected"]
