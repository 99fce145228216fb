"""The policy trainers: updates against plain torch, exact resume, learning, and models that load again."""

from __future__ import annotations

import math
import os

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")
pytest.importorskip("accelerate", reason="needs accelerate (the extra `train`)")

from accelerate.tracking import GeneralTracker
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastalign import rl
from fastalign.cli import commands as cli
from fastalign.models.actor_critic import with_values
from fastalign.trainers.common import run
from fastalign.trainers.common.callbacks import LOG_NAME, read_log
from fastalign.trainers.grpo import VARIANTS, GRPOConfig, GRPOTrainer
from fastalign.trainers.ppo import PPOConfig, PPOTrainer

PROMPTS = [{"prompt": text} for text in ("the movie", "a film", "the", "a great", "fun and", "long", "is", "a")]
PTX = [{"prompt": "the movie", "completion": " is good"}, {"prompt": "", "completion": "a dull film"}] * 2


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.inner.parameters()])


def log_of(trainer) -> list[dict]:
    lines = read_log(os.path.join(trainer.args.output_dir, LOG_NAME))
    return [{k: v for k, v in line.items() if k not in ("time", "eps")} for line in lines]


class TestUpdate:
    def test_first_update_starts_from_the_policy_that_sampled(self, make):
        metrics = make(num_ppo_epochs=1, num_mini_batches=1, total_episodes=4).train()
        assert metrics["objective/kl"] == pytest.approx(0, abs=1e-6)
        assert metrics["val/ratio"] == pytest.approx(1, abs=1e-5)
        assert metrics["policy/approxkl_avg"] == pytest.approx(0, abs=1e-9)
        assert metrics["policy/clipfrac_avg"] == 0
        assert metrics["policy/entropy_avg"] * metrics["length"] == pytest.approx(
            metrics["objective/entropy"], rel=1e-3
        )

    @pytest.mark.parametrize("kl_in", ["reward", "loss"])
    def test_gradient_is_that_of_plain_torch(self, make, kl_in):
        """Second pass over a batch, ratios away from 1: clip, value clip and KL written out in float64, row by row."""
        trainer = make(kl_in=kl_in, kl_estimator="k3", kl_coef=0.3, temperature=0.8, entropy_coef=0.01, vf_coef=0.5)
        updater = trainer._ready()
        episodes = trainer.roll_out()
        shaped = trainer.shape(episodes, 0.1)
        trainer.advantages(episodes, shaped)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in trainer.inner.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        chosen = episodes[:5]
        tokens = sum(len(e.ids) for e in chosen)
        for part in (chosen[:2], chosen[2:]):
            updater.loss(updater.batch(part), trainer.loss(), trainer.value_options(), tokens, tokens).backward()
        grads = [p.grad.clone() for p in trainer.inner.parameters()]
        trainer.inner.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for e in chosen:
            row = torch.tensor([e.prompt.ids + e.ids])
            span, at = slice(len(e.prompt.ids) - 1, -1), torch.tensor(e.ids)[:, None]
            p = (trainer.inner.policy(row).logits[0, span].double() / 0.8).log_softmax(-1)
            logps = p.gather(1, at)[:, 0]
            ratio = (logps - e.logps).exp()
            loss = torch.maximum(-e.advantages * ratio, -e.advantages * ratio.clamp(0.8, 1.2))
            loss = loss + 0.01 * (p.exp() * p).sum(-1)
            if kl_in == "loss":
                gap = logps - e.ref_logps
                loss = loss + 0.3 * ((-gap).exp() - 1 + gap)
            value = trainer.inner.value_head(trainer.inner.critic(row).last_hidden_state)[0, span, 0].double()
            cut = e.values + (value - e.values).clamp(-0.2, 0.2)
            loss = loss + 0.5 * 0.5 * torch.maximum((value - e.returns) ** 2, (cut - e.returns) ** 2)
            total = total + loss.sum() / tokens
        total.backward()
        for got, parameter in zip(grads, trainer.inner.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad, rtol=2e-3, atol=2e-6)

    @pytest.mark.parametrize("extra", [{}, {"value_model": "shared"}, {"ptx_dataset": PTX, "ptx_coef": 0.5}])
    def test_micro_batches_change_nothing(self, make, extra):
        results = []
        for size, steps in ((4, 1), (1, 4)):
            trainer = make(per_device_train_batch_size=size, gradient_accumulation_steps=steps, **extra)
            results.append((trainer.train(), weights(trainer)))
        torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-3, atol=1e-4)
        for name in ("loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "grad_norm"):
            assert results[1][0][name] == pytest.approx(results[0][0][name], rel=1e-2, abs=1e-5), name

    def test_pretraining_text_becomes_likelier(self, make):
        """Without a reward to follow, the mixed-in text is all there is to learn."""
        trainer = make(ptx_dataset=PTX, ptx_coef=5.0, reward=lambda prompts: [0.0] * len(prompts), total_episodes=64)
        trainer.train()
        losses = [line["loss/ptx_avg"] for line in log_of(trainer)]
        assert losses[-1] < losses[0] - 5.0

    def test_equal_returns_leave_nothing_to_explain(self, make):
        """All returns are one number: their rounded mean is not, and 1 - x / 1e-16 is no share of a variance."""
        trainer = make(kl_coef=0.0, gamma=1.0, lam=1.0)
        episodes = trainer.roll_out()
        for reward in (n / 100 for n in range(100)):
            for e in episodes:
                e.score = reward
            assert trainer.advantages(episodes, trainer.shape(episodes, 0.0))["val/explained_variance"] == 0.0
            assert all((e.advantages == 0).all() for e in episodes)

    @pytest.mark.parametrize(("trainer", "config"), [(PPOTrainer, PPOConfig), (GRPOTrainer, GRPOConfig)])
    def test_a_generation_config_with_several_ends_is_heeded(self, make, trainer, config):
        """As `sample` does: here every token ends a response, so all of them end, with one token each."""
        run = make(trainer, config, num_generations=2, missing_eos_penalty=10.0)
        run.inner.policy.generation_config.eos_token_id = list(range(run.inner.policy.config.vocab_size))
        metrics = run.train()
        assert (metrics["eos_rate"], metrics["length"]) == (1.0, 1.0)

    def test_missing_end_is_penalised_and_score_falls_on_the_last_token(self, make):
        trainer = make(missing_eos_penalty=10.0, kl_coef=0.0)
        episodes = trainer.roll_out()
        shaped = trainer.shape(episodes, 0.0)
        for e, row, score in zip(episodes, shaped.rewards, shaped.scores, strict=True):
            assert float(score) == pytest.approx(e.score - (0.0 if e.ended else 10.0))
            assert float(row[len(e.ids) - 1]) == pytest.approx(float(score))
            assert row.count_nonzero() <= 1
        assert not all(e.ended for e in episodes)

    def test_trust_region_step_improves_within_its_bound(self, make):
        trainer = make(objective="trpo", trpo_delta=0.02, kl_coef=0.01)
        metrics = trainer.train()
        assert metrics["policy/accepted"] == 1
        assert 0 < metrics["policy/step_kl"] <= 0.02
        assert all(p.grad is None for p in trainer.inner.policy.parameters())
        assert not (trainer.inner.value_head.weight == 0).all()

    def test_controllers_follow_the_kl(self, make):
        adaptive = make(kl_controller="adaptive", target=1e-3, horizon=20, total_episodes=40)
        adaptive.train()
        coefficients = [line["objective/kl_coef"] for line in log_of(adaptive)]
        assert coefficients[0] == 0.05
        assert coefficients[-1] > 0.05 * 1.05
        penalty = make(objective="penalty", penalty_target=1e3)
        penalty.train()
        assert [line["objective/penalty_coef"] for line in log_of(penalty)] == [1.0, 0.5]


class TestGroups:
    # The other two hold every token to the old policy, whose log-probabilities were rounded in another batch.
    @pytest.mark.parametrize("loss_type", sorted(set(VARIANTS) - {"dro", "kl_cov"}))
    def test_equal_rewards_teach_nothing(self, make, loss_type):
        """A prompt whose samples are all as good as one another: no gradient at all, whatever the rounded mean is."""
        same = {"reward": lambda prompts: [0.3] * len(prompts), "kl_coef": 0.0, "loss_type": loss_type}
        size = {
            "num_generations": 7,
            "per_device_train_batch_size": 7,
            "num_mini_batches": 1,
            "gradient_accumulation_steps": 1,
        }
        trainer = make(GRPOTrainer, GRPOConfig, **size, **same)
        before = weights(trainer)
        metrics = trainer.train()
        assert metrics["objective/group_std"] == 0
        assert metrics["grad_norm"] == 0
        assert torch.equal(weights(trainer), before)

    @pytest.mark.parametrize("loss_type", list(VARIANTS))
    def test_every_variant_trains(self, make, loss_type):
        trainer = make(GRPOTrainer, GRPOConfig, loss_type=loss_type, num_generations=4)
        start = weights(trainer).clone()
        metrics = trainer.train()
        assert all(math.isfinite(value) for value in metrics.values())
        assert not torch.equal(weights(trainer), start)

    def test_advantages_are_the_groups(self, make):
        for loss_type, expected in {"rloo": rl.rloo_advantages, "grpo": rl.grpo_advantages}.items():
            trainer = make(GRPOTrainer, GRPOConfig, loss_type=loss_type, num_generations=4)
            episodes = trainer.roll_out()
            assert [e.prompt.text for e in episodes[:4]] == [episodes[0].prompt.text] * 4
            assert len({tuple(e.ids) for e in episodes[:4]}) > 1
            trainer.advantages(episodes, trainer.shape(episodes, 0.0))
            rewards = torch.tensor([e.score for e in episodes]).view(-1, 4)
            for e, advantage in zip(episodes, expected(rewards).flatten(), strict=True):
                assert e.advantages.tolist() == pytest.approx([float(advantage)] * len(e.ids))

    def test_own_keys_win_over_the_variant(self, tmp_path):
        dapo = GRPOConfig(output_dir=str(tmp_path), loss_type="dapo").variant
        assert (dapo.cliprange, dapo.cliprange_high) == (0.2, 0.28)
        own = GRPOConfig(output_dir=str(tmp_path), loss_type="dapo", cliprange=0.1, scale_rewards=False).variant
        assert (own.cliprange, own.cliprange_high, own.advantages) == (0.1, None, "centred")


@pytest.mark.parametrize(
    ("trainer", "config", "extra"),
    [
        (PPOTrainer, PPOConfig, {"kl_coef": 0.01, "learning_rate": 4e-2, "total_episodes": 96}),
        (GRPOTrainer, GRPOConfig, {"kl_coef": 0.01, "learning_rate": 4e-2, "total_episodes": 96, "num_generations": 4}),
    ],
)
def test_policy_learns_what_is_rewarded(make, trainer, config, extra):
    """The reward counts the letter a: the mean count at least doubles, and two runs give the same numbers."""
    logs = []
    for _ in range(2):
        one = make(trainer, config, reward=lambda completions: [float(c.count("a")) for c in completions], **extra)
        one.train()
        logs.append(log_of(one))
    assert logs[0] == logs[1]
    scores = [line["objective/scores"] for line in logs[0]]
    assert sum(scores[-3:]) > 2 * sum(scores[:3]) > 0


class TestSaving:
    @pytest.mark.parametrize("source", ["separate", "shared"])
    def test_saved_model_loads_in_transformers_and_the_values_come_back(self, make, tmp_path, source):
        trainer = make(value_model=source)
        trainer.train()
        trainer.save_model()
        out = trainer.args.output_dir
        model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
        assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
        assert tokenizer("the movie")["input_ids"] == trainer.processing_class("the movie")["input_ids"]
        batch = {"input_ids": torch.tensor([[0, 5, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
        batch["position_ids"] = torch.arange(3)[None]
        trainer.inner.eval()
        answer = trainer.inner(batch)
        values = answer.values
        torch.testing.assert_close(model(**batch).logits, answer.logits)
        assert (values != 0).all()
        again = with_values(model, "shared" if source == "shared" else out, torch.float32)
        if source == "shared":
            again.load_head(out)
        torch.testing.assert_close(again.eval()(batch).values, values)

    def test_best_weights_are_kept(self, make):
        """The evaluation's score falls from the second one on: what is saved is the first one's model."""
        seen = []
        trainer = make(eval_rows=PROMPTS[:3], eval_steps=1, load_best_model_at_end=True, total_episodes=24)
        evaluate = trainer.evaluate
        trainer.evaluate = lambda: {**evaluate(), "eval/score": -float(len(seen))}
        after = trainer._after_step
        trainer._after_step = lambda metrics, bar: (after(metrics, bar), seen.append(weights(trainer).clone()))
        trainer.train()
        assert len(seen) == 3
        assert torch.equal(weights(trainer), seen[0])
        assert not torch.equal(seen[2], seen[0])
        assert trainer.state.best_step == 1

    def test_trackers_get_what_is_logged(self, make):
        class Kept(GeneralTracker):
            name, requires_logging_directory, tracker = "kept", False, None

            def __init__(self):
                super().__init__()
                self.lines, self.config = [], {}

            def store_init_configuration(self, values):
                self.config = values

            def log(self, values, step=None, **kwargs):
                self.lines.append((step, values))

        tracker = Kept()
        trainer = make(report_to=[tracker])
        trainer.train()
        assert tracker.config["kl_coef"] == 0.05
        assert [step for step, _ in tracker.lines] == [1, 2]
        assert tracker.lines[1][1]["objective/scores"] == log_of(trainer)[1]["objective/scores"]

    def test_only_the_newest_checkpoints_stay(self, make):
        trainer = make(save_steps=1, save_total_limit=2, total_episodes=32)
        trainer.train()
        names = [os.path.basename(path) for path in run.checkpoints(trainer.args.output_dir)]
        assert names == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize(
    ("config", "extra", "message"),
    [
        (PPOConfig, {"objective": "ppo"}, "objective must be one of clip, penalty, trpo"),
        (PPOConfig, {"kl_in": "loss"}, "kl_estimator must be other than k1"),
        (PPOConfig, {"objective": "trpo", "value_model": "shared"}, "must not be shared"),
        (PPOConfig, {"top_p": 0.0}, "top_p must be in"),
        (PPOConfig, {"temperature": 0.0}, "temperature must be above 0"),
        (PPOConfig, {"load_best_model_at_end": True}, "needs eval_steps"),
        (GRPOConfig, {"num_generations": 3}, "multiple of num_generations; got 8 and 3"),
        (GRPOConfig, {"loss_type": "gpro"}, "loss_type must be one of grpo"),
        (GRPOConfig, {"adv_estimator": "gae"}, "adv_estimator must be one of grpo"),
        (GRPOConfig, {"adv_estimator": "opo", "scale_rewards": True}, "scale_rewards must be left out"),
        (GRPOConfig, {"overlong_buffer": 65}, r"overlong_buffer must be in \[1, 64\]; got 65"),
        (GRPOConfig, {"kl_cov_ratio": 0.0}, r"kl_cov_ratio must be in \(0, 1"),
        (PPOConfig, {"dro_beta": -1.0}, "dro_beta must be in"),
    ],
)
def test_bad_configuration_is_refused(config, extra, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(output_dir=str(tmp_path), **extra)


def test_exactly_one_reward_is_needed(make):
    with pytest.raises(ValueError, match=r"exactly one reward must be given.*got 0"):
        make(reward=None)
    with pytest.raises(ValueError, match="got 2"):
        make(reward_fn="math:sqrt")


@pytest.mark.parametrize("command", ["ppo", "grpo"])
def test_commands_explain_themselves(command, capsys):
    assert cli.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"--{name}\n" in shown for name in ("output_dir", "reward_fn", "kl_coef", "num_ppo_epochs"))
    assert cli.main([command, "--kl_cof", "1"]) == 2
    assert "did you mean --kl_coef" in capsys.readouterr().err
