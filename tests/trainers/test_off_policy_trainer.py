"""What the sampler says of its draws, and what trainers do by it: weights, responses left out, entropy."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")
pytest.importorskip("accelerate", reason="needs accelerate (the extra `train`)")

from fastalign import rl
from fastalign.losses import importance_weights
from fastalign.trainers.common import arguments
from fastalign.trainers.grpo import GRPOConfig, GRPOTrainer
from fastalign.trainers.policy.correction import correct, rejections, weighting
from fastalign.trainers.policy.rollout import collate, response_mask, stacked
from fastalign.trainers.ppo import PPOConfig, PPOTrainer

GROUPS = {"num_generations": 4, "per_device_train_batch_size": 4, "num_mini_batches": 1, "num_ppo_epochs": 1}


def logits_of_tokens(trainer, episodes):
    """[tokens, V] of each response, by the model as it is."""
    batch = collate(episodes, trainer.fill)
    with torch.no_grad():
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = trainer.inner.policy(**given).logits
    return [row[labels != -100] for row, labels in zip(logits, batch["labels"], strict=True)]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6, "temperature": 1.3}], ids=str
)
def test_the_samplers_log_probabilities_are_of_what_it_drew_from(make, options):
    trainer = make(**options)
    episodes = trainer.roll_out()
    least = math.inf
    for episode, logits in zip(episodes, logits_of_tokens(trainer, episodes), strict=True):
        logits = logits.double() / options.get("temperature", 1.0)
        if "top_k" in options:
            logits = logits.masked_fill(logits < logits.topk(options["top_k"]).values[:, -1:], -torch.inf)
        if "top_p" in options:
            p, order = logits.softmax(-1).sort(descending=True)
            out = (p.cumsum(-1) - p >= options["top_p"]).gather(-1, order.argsort(-1))
            logits = logits.masked_fill(out, -torch.inf)
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(episode.ids)[:, None]).squeeze(-1)
        torch.testing.assert_close(episode.sampler_logps.double(), expected, rtol=1e-4, atol=1e-5)
        least = min(least, float((episode.sampler_logps - episode.logps).min()))
    if "top_k" in options or "top_p" in options:  # what is left of the distribution is more likely each
        assert least > 0
    else:
        assert least > -1e-4


def test_weights_are_of_the_whole_step_and_weigh_the_loss(make):
    options = {"rollout_is": "geometric", "rollout_is_threshold": 0.5, "rollout_is_threshold_lower": 0.01}
    trainer = make(top_k=20, rollout_is_mode="mask", rollout_is_batch_normalize=True, **options)
    episodes = trainer.roll_out()
    metrics = correct(trainer.args, episodes)
    mask = response_mask(episodes)
    both = stacked(episodes, "logps"), stacked(episodes, "sampler_logps")
    how = {"level": "geometric", "mode": "mask", "cap": 0.5, "floor": 0.01, "normalize": True}
    weights = importance_weights(*both, mask, **how)
    assert torch.equal(stacked(episodes, "importance_weights"), weights * mask)
    assert weights[mask].unique().numel() > 4
    found = rl.off_policy_metrics(*both, mask, weights=weights)
    assert metrics == {f"sampling/{name}": float(x) for name, x in found._asdict().items()}
    assert metrics["sampling/kl"] > 0.01
    assert metrics["sampling/largest_ratio"] < 1
    trainer.advantages(episodes, trainer.shape(episodes, 0.0))
    batch = trainer._ready().batch(episodes)
    assert torch.equal(batch["rollout_importance_weights"][batch["labels"] != -100], weights[mask])


@pytest.mark.parametrize(("trainer_class", "config"), [(PPOTrainer, PPOConfig), (GRPOTrainer, GRPOConfig)])
def test_no_weight_is_no_update(make, trainer_class, config):
    """Weights of 0 for every token: the policy stays; by default they are near 1 and it moves."""
    options = {"kl_coef": 0.0, **(GROUPS if config is GRPOConfig else {})}
    moved = {}
    for name, bounds in {"none": {"rollout_is_mode": "mask", "rollout_is_threshold": 0.5}, "default": {}}.items():
        trainer = make(trainer_class, config, **options, **bounds)
        before = [p.detach().clone() for p in trainer.inner.policy.parameters()]
        metrics = trainer.train()
        after = trainer.inner.policy.parameters()
        moved[name] = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["sampling/effective_sample_size"] == pytest.approx(float(name == "default"), abs=1e-3)
        assert abs(metrics["sampling/kl"]) < 1e-3
    assert moved == {"none": False, "default": True}


def test_without_correction_nothing_is_weighed(make):
    trainer = make(rollout_is=None, top_k=5)
    episodes = trainer.roll_out()
    metrics = correct(trainer.args, episodes)
    assert all(e.importance_weights is None and e.kept is None for e in episodes)
    assert metrics["sampling/kl"] > 0
    episodes[0].sampler_logps = None
    assert correct(trainer.args, episodes) == {}


def test_what_is_left_out_is_in_no_loss_and_in_no_count(make):
    """The update is that of the other responses alone, KL and all."""
    options = {**GROUPS, "loss_type": "bnpo", "kl_coef": 0.1, "max_grad_norm": 0, "num_mini_batches": 2}
    norms = []
    for left_out in (True, False):
        trainer = make(GRPOTrainer, GRPOConfig, rollout_rs="seq_max_k2", rollout_rs_threshold="0.01", **options)
        episodes = trainer.roll_out()
        for k, episode in enumerate(episodes):
            episode.score = float(k % 5)
        trainer.advantages(episodes, trainer.shape(episodes, 0.0))
        far = episodes[::3]
        if left_out:
            for episode in far:
                episode.sampler_logps[-1] -= 1.0
            metrics = correct(trainer.args, episodes)
            assert [bool(e.kept.all()) for e in episodes] == [k % 3 != 0 for k in range(len(episodes))]
            assert all(not e.kept.any() for e in far)
            tokens = [sum(len(e.ids) for e in group) for group in (far, episodes)]
            assert metrics["sampling/rejected"] == pytest.approx(tokens[0] / tokens[1])
        else:
            for episode in far:
                episode.counts = False
        trainer.args.num_mini_batches = 1
        norms.append(trainer.update(episodes)["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_some_tokens_of_a_response_may_be_left_out(make):
    """Of PPO, whose values learn nothing of them either."""
    trainer = make(rollout_rs="token_k1", rollout_rs_threshold="0.99_1.01", num_mini_batches=1)
    episodes = trainer.roll_out()
    for episode in episodes:
        episode.sampler_logps[0] += 0.5
    correct(trainer.args, episodes)
    trainer.advantages(episodes, trainer.shape(episodes, 0.0))
    batch = trainer._ready().batch(episodes)
    assert (batch["labels"] != -100).sum() == sum(e.counted for e in episodes)
    assert all(e.kept.tolist() == [False] + [True] * (len(e.ids) - 1) for e in episodes)
    assert all(math.isfinite(value) for value in trainer.update(episodes).values())


def test_options_reach_the_loss(make):
    options = {"off_policy_mask_threshold": 0.1, "use_bias_correction_kl": True, "top_entropy_quantile": 0.5}
    trainer = make(GRPOTrainer, GRPOConfig, **GROUPS, **options)
    assert trainer.loss().config["general"]._asdict().items() >= options.items()
    assert all(math.isfinite(value) for value in trainer.train().values())
    trainer = make(top_entropy_quantile=0.5, off_policy_mask_threshold=0.1, kl_in="loss", kl_estimator="k3")
    assert trainer.loss().config["general"].top_entropy_quantile == 0.5
    assert all(math.isfinite(value) for value in trainer.train().values())


def test_the_off_policy_mask_is_against_the_sampler(make):
    """Every advantage below 0 and every response far from its sampler: nothing moves the policy."""
    norms = {}
    for far in (0.0, 1.0):
        trainer = make(GRPOTrainer, GRPOConfig, **GROUPS, kl_coef=0.0, off_policy_mask_threshold=0.5)
        episodes = trainer.roll_out()
        for episode in episodes:
            episode.advantages = torch.full((len(episode.ids),), -1.0)
            episode.sampler_logps += far
        norms[far] = trainer.update(episodes)["grad_norm"]
    assert norms[1.0] == 0
    assert norms[0.0] > 0


# -------------------------------------------------------------------------------------------------------------- entropy
def test_the_entropy_bonus_adapts_and_is_resumed(make):
    options = {
        "use_adaptive_entropy": True,
        "entropy_coef": 0.02,
        "entropy_coef_delta": 0.01,
        "entropy_coef_max": 0.035,
    }
    trainer = make(**options, entropy_target=100.0, total_episodes=24)
    assert trainer.loss().config["entropy_coef"] == 0  # nothing is known of the entropy
    seen = [trainer.step()["objective/entropy_coef"] for _ in range(3)]
    assert seen == pytest.approx([0.0, 0.03, 0.035])
    assert trainer.loss().config["entropy_coef"] == pytest.approx(0.035)
    other = make(**options, entropy_target=100.0)
    other.load_state_dict(trainer.state_dict())
    assert other.loss().config["entropy_coef"] == trainer.loss().config["entropy_coef"]
    low = make(GRPOTrainer, GRPOConfig, **GROUPS, **options, entropy_target=1e-3)
    low.step()
    assert (low.entropy.coefficient, low.loss().config["entropy_coef"]) == (pytest.approx(0.01), 0.0)


def test_the_controller_refuses_what_is_none():
    for options, message in (
        ({"delta": 0.0}, "delta must be in"),
        ({"entropy_coef": 2.0}, r"entropy_coef must be in \[0.0, 1.0\]; got 2.0"),
        ({"low": 0.5, "high": 0.1}, r"high must be in \[0.5, inf\]"),
    ):
        with pytest.raises(ValueError, match=message):
            rl.AdaptiveEntropy(**options)
    control = rl.AdaptiveEntropy(0.1)
    with pytest.raises(ValueError, match="entropy must be finite; got nan"):
        control.update(math.nan)
    with pytest.raises(ValueError, match="state must have the keys 'coefficient' and 'acts' alone"):
        control.load_state_dict({"value": 0.1})


# ----------------------------------------------------------------------------------------------------------------- keys
def test_keys_of_other_libraries(tmp_path):
    argv = ["--output_dir", str(tmp_path), "--vllm_importance_sampling_clip_max", "3", "--rollout_is", "geometric"]
    argv += ["--rollout_rs", "token_k1,seq_mean_k3", "--rollout_rs_threshold", "0.5_2.0,0.01"]
    args = arguments.parse(GRPOConfig, argv, command="grpo")
    assert weighting(args)[:2] == ("geometric", 3.0)
    assert rejections(args) == {"token_k1": (0.5, 2.0), "seq_mean_k3": 0.01}
    both = GRPOConfig(output_dir=str(tmp_path), rollout_rs=["token_k2", "token_k3"], rollout_rs_threshold=[0.5])
    assert rejections(both) == {"token_k2": 0.5, "token_k3": 0.5}
    with pytest.raises(
        TypeError, match="rollout_is='token' and rollout_is_mode='truncate' weigh samples, rollout_is=None"
    ):
        GRPOConfig(output_dir=str(tmp_path), vllm_importance_sampling_mode="token_mask")


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (GRPOConfig, {"rollout_is": "word"}, "rollout_is must be one of token, sequence, geometric"),
        (GRPOConfig, {"rollout_is_mode": "cut"}, "rollout_is_mode must be one of truncate, mask"),
        (GRPOConfig, {"rollout_is_threshold_lower": 3.0}, "importance_floor must be at most importance_cap, 2.0"),
        (GRPOConfig, {"rollout_rs": "token_k9", "rollout_rs_threshold": "1"}, "rejection rule must be one of"),
        (GRPOConfig, {"rollout_rs": "token_k2"}, "rollout_rs_threshold must be a bound for each of rollout_rs"),
        (GRPOConfig, {"rollout_rs_threshold": "1"}, "rollout_rs_threshold must be a bound for each of rollout_rs"),
        (GRPOConfig, {"rollout_rs": "token_k2", "rollout_rs_threshold": "a"}, "must be numbers, of k1 also low_high"),
        (GRPOConfig, {"off_policy_mask_threshold": -1.0}, "off_policy_mask_threshold must be in"),
        (GRPOConfig, {"top_entropy_quantile": 2.0}, "top_entropy_quantile must be in"),
        (GRPOConfig, {"use_adaptive_entropy": True, "entropy_coef_delta": 0.0}, "delta must be in"),
        (PPOConfig, {"use_bias_correction_kl": True}, "of a KL that is estimated in the loss; got kl_in=reward"),
        (PPOConfig, {"objective": "trpo", "top_entropy_quantile": 0.5}, "top_entropy_quantile must be left out with"),
    ],
)  # fmt: skip
def test_bad_keys_are_named(config, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(output_dir=str(tmp_path), **options)
