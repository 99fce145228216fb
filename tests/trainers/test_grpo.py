"""Baselines of `fastalign grpo`, groups that count for nothing, long responses, and other libraries' names."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")
pytest.importorskip("accelerate", reason="needs accelerate (the extra `train`)")

from fastalign import rl
from fastalign.trainers.grpo import ADVANTAGE_ESTIMATORS, VARIANTS, GRPOConfig, GRPOTrainer
from fastalign.trainers.policy import rollout
from fastalign.trainers.ppo import PPOConfig, PPOTrainer


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.inner.parameters()])


def sum_of_squares(trainer, episodes) -> torch.Tensor:
    """[E, R] of each token's distribution, from whole logits of one response at a time; 1 beyond its end."""
    found = torch.ones(len(episodes), max(len(e.ids) for e in episodes))
    for row, e in zip(found, episodes, strict=True):
        with torch.no_grad():
            logits = trainer.inner.policy(torch.tensor([e.prompt.ids + e.ids])).logits[0, len(e.prompt.ids) - 1 : -1]
        row[: len(e.ids)] = (logits / trainer.args.temperature).softmax(-1).square().sum(-1)
    return found


@pytest.mark.parametrize("name", list(ADVANTAGE_ESTIMATORS))
def test_every_estimator_of_advantages(make, name):
    """As `rl` computes it, at every token of a response; the run that they make is finite."""
    trainer = make(GRPOTrainer, GRPOConfig, adv_estimator=name, num_generations=4)
    episodes = trainer.roll_out()
    shaped = trainer.shape(episodes, 0.0)
    trainer.advantages(episodes, shaped)
    mask = rollout.response_mask(episodes)
    rewards, lengths = shaped.scores.view(-1, 4), mask.sum(-1).view(-1, 4)
    expected = {
        "grpo": lambda: rl.grpo_advantages(rewards),
        "dr_grpo": lambda: rl.grpo_advantages(rewards, scale=False),
        "rloo": lambda: rl.rloo_advantages(rewards),
        "opo": lambda: rl.opo_advantages(rewards, lengths),
        "optimal_token_baseline": lambda: rl.otb_advantages(
            *(x.unflatten(0, (-1, 4)) for x in (shaped.rewards, mask, rollout.stacked(episodes, "logps"))),
            sum_of_squares(trainer, episodes).log().unflatten(0, (-1, 4)),
        ),
        "grpo_passk": lambda: rl.passk_advantages(rewards),
        "gpg": lambda: rl.gpg_advantages(rewards),
        "gdpo": lambda: rl.gdpo_advantages(rewards[..., None]),
        "reinforce_plus_plus": lambda: rl.reinforce_pp_advantages(shaped.rewards, mask),
        "reinforce_plus_plus_baseline": lambda: rl.reinforce_pp_baseline_advantages(
            rewards, mask.view(*rewards.shape, -1)
        ),
    }[name]()
    wide = expected.flatten(0, 1) if expected.dim() == 3 else expected
    wide = wide.flatten()[:, None].expand(mask.shape) if expected.shape == rewards.shape else wide
    for episode, row in zip(episodes, wide, strict=True):
        assert episode.advantages.tolist() == pytest.approx(row[: len(episode.ids)].tolist(), rel=1e-5, abs=1e-6)
    assert all(math.isfinite(value) for value in trainer.train().values())


def test_flat_groups_count_for_nothing(make):
    """With them masked, the update is that of the other groups alone; the KL does not move on them either."""
    options = {
        "num_generations": 4,
        "num_mini_batches": 1,
        "per_device_train_batch_size": 4,
        "num_ppo_epochs": 1,
        "kl_coef": 0.1,
        "loss_type": "bnpo",
        "max_grad_norm": 0,
    }
    norms = {}
    for masked in (False, True):
        trainer = make(GRPOTrainer, GRPOConfig, mask_flat_groups=masked, **options)
        episodes = trainer.roll_out()
        for k, episode in enumerate(episodes):
            episode.score = 0.3 if k < 4 else float(k)
        metrics = trainer.advantages(episodes, trainer.shape(episodes, 0.0))
        assert metrics["objective/flat_groups"] == 4 / len(episodes)
        assert [e.counts for e in episodes] == [not masked or k >= 4 for k in range(len(episodes))]
        norms[masked] = trainer.update(episodes)["grad_norm"]
    alone = make(GRPOTrainer, GRPOConfig, **options)
    rest = alone.roll_out()
    for k, episode in enumerate(rest):
        episode.score = float(k)
    alone.advantages(rest, alone.shape(rest, 0.0))
    assert alone.update(rest[4:])["grad_norm"] == pytest.approx(norms[True], rel=1e-4)
    assert norms[True] > 1.2 * norms[False]


def test_all_flat_and_masked_is_no_update(make):
    same = {"reward": lambda prompts: [0.3] * len(prompts), "kl_coef": 0.1, "mask_flat_groups": True}
    trainer = make(GRPOTrainer, GRPOConfig, num_generations=4, **same)
    before = weights(trainer)
    metrics = trainer.train()
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["objective/flat_groups"] == 1
    assert torch.equal(weights(trainer), before)


def test_long_responses_cost(make):
    """The penalty is of the reward that advantages see, not of the score that is reported."""
    trainer = make(GRPOTrainer, GRPOConfig, num_generations=4, overlong_buffer=4, overlong_penalty=3.0)
    episodes = trainer.roll_out()
    for k, episode in enumerate(episodes):
        episode.score = 1.0
        for name in ("ids", "logps", "ref_logps"):  # some ended earlier
            setattr(episode, name, getattr(episode, name)[: 1 + k % 6])
    shaped = trainer.shape(episodes, 0.0)
    trainer.advantages(episodes, shaped)
    lengths = torch.tensor([float(len(e.ids)) for e in episodes])
    late = 3 * rl.overlong_penalty(lengths, max_length=trainer.args.response_length, buffer=4)
    expected = rl.grpo_advantages((1 + late).view(-1, 4)).flatten()
    assert late.unique().numel() > 1
    for episode, advantage in zip(episodes, expected.tolist(), strict=True):
        assert episode.advantages.tolist() == pytest.approx([advantage] * len(episode.ids), rel=1e-5, abs=1e-6)
    assert (shaped.scores == 1).all()


def test_names_of_other_libraries(tmp_path):
    folder = str(tmp_path)
    assert GRPOConfig(output_dir=folder, loss_type="geo_mean").variant == VARIANTS["gmpo"]
    assert GRPOConfig(output_dir=folder, loss_type="vanilla").variant == VARIANTS["grpo"]
    assert GRPOConfig(output_dir=folder, kl_estimator="low_var_kl+").kl_estimator == "k3+"
    assert PPOConfig(output_dir=folder, objective="vanilla").objective == "clip"


def test_several_rewards(make):
    """Weighted sums are the scores; GDPO standardises each reward in its group, then their weighted sum."""

    def length(completions):
        return [float(len(c)) for c in completions]

    def loud(completions):
        return [100.0 * c.count("a") for c in completions]

    options = {"num_generations": 4, "reward": [length, loud], "reward_weights": [1.0, 0.5]}
    trainer = make(GRPOTrainer, GRPOConfig, adv_estimator="gdpo", **options)
    episodes = trainer.roll_out()
    parts = torch.tensor([[len(e.text), 100.0 * e.text.count("a")] for e in episodes], dtype=torch.float64)
    assert [e.score for e in episodes] == pytest.approx((parts @ torch.tensor([1.0, 0.5]).double()).tolist())
    trainer.advantages(episodes, trainer.shape(episodes, 0.0))
    expected = rl.gdpo_advantages(parts.view(-1, 4, 2), [1.0, 0.5]).flatten()
    for episode, advantage in zip(episodes, expected.tolist(), strict=True):
        assert episode.advantages.tolist() == pytest.approx([advantage] * len(episode.ids), rel=1e-5, abs=1e-6)
    assert all(math.isfinite(value) for value in trainer.train().values())


def test_a_reward_that_applies_to_some_is_standardised_among_these(make):
    def always(completions):
        return [float(len(c)) for c in completions]

    def sometimes(completions):
        return [None if len(c) % 2 else float(c.count("a")) for c in completions]

    trainer = make(GRPOTrainer, GRPOConfig, adv_estimator="gdpo", num_generations=4, reward=[always, sometimes])
    assert all(math.isfinite(value) for value in trainer.train().values())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"kl_in": "reward"}, "kl_in changes a sum of rewards"),
        ({"overlong_buffer": 4}, "overlong_buffer changes a sum of rewards"),
        ({"missing_eos_penalty": 1.0}, "missing_eos_penalty changes a sum of rewards"),
        ({"reward_weights": ["a"]}, "reward_weights must be finite numbers"),
    ],
)
def test_what_gdpo_cannot_take_is_refused(extra, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(output_dir=str(tmp_path), adv_estimator="gdpo", **extra)


def test_weights_are_as_many_as_functions(make):
    with pytest.raises(ValueError, match="reward_weights must be 1, one for each function; got 2"):
        make(GRPOTrainer, GRPOConfig, num_generations=4, reward_weights=[1.0, 2.0])


def test_dynamic_sampling_puts_groups_with_spread_in_the_place_of_others(make):
    """The reward is constant for one prompt in two: with further batches no such group is left, and the others stay."""

    def reward(prompts, completions):
        return [0.3 if len(p) % 2 else float(len(c)) for p, c in zip(prompts, completions, strict=True)]

    def groups(**options):
        trainer = make(GRPOTrainer, GRPOConfig, num_generations=2, num_ppo_epochs=1, reward=reward, **options)
        episodes = trainer.roll_out()
        return trainer, [episodes[i : i + 2] for i in range(0, len(episodes), 2)]

    def scores(group):
        return [e.score for e in group]

    plain, before = groups()
    trainer, after = groups(dynamic_sampling=20)
    assert any(len(set(scores(g))) == 1 for g in before)
    assert all(len(set(scores(g))) == 2 for g in after)
    assert all(g[0].prompt.text == g[1].prompt.text for g in after)
    for was, now in zip(before, after, strict=True):
        if len(set(scores(was))) == 2:
            assert [e.ids for e in was] == [e.ids for e in now]
    assert trainer.resampled == sum(len(set(scores(g))) == 1 for g in before)
    _, again = groups(dynamic_sampling=20)
    assert [e.ids for g in again for e in g] == [e.ids for g in after for e in g]
    metrics = trainer.train()
    assert metrics["objective/flat_groups"] == 0
    assert metrics["objective/resampled_groups"] >= 0
    assert plain.train()["objective/flat_groups"] > 0


@pytest.mark.parametrize("objective", ["cispo", "sapo", "dppo_tv", "dppo_kl", "dro", "clip_cov", "kl_cov"])
def test_ppo_with_every_kind_of_tokens(make, objective):
    trainer = make(PPOTrainer, PPOConfig, objective=objective)
    start = weights(trainer).clone()
    assert trainer.loss().config["kind"] == objective
    assert all(math.isfinite(value) for value in trainer.train().values())
    assert not torch.equal(weights(trainer), start)


def test_keys_of_kinds_reach_the_loss(make):
    trainer = make(GRPOTrainer, GRPOConfig, loss_type="sapo", sapo_temperature_neg=2.0, num_generations=4)
    assert trainer.loss().config["options"].sapo_temperature_neg == 2.0
    held = make(PPOTrainer, PPOConfig, objective="kl_cov", kl_cov_coef=0.5)
    assert held.loss().config["options"].kl_cov_coef == 0.5
