"""Policy losses against other people's code, run live where it is installed: TRL 1.16 and Liger 0.8.5."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from fastalign import losses
from fastalign.losses.policy_objectives import KINDS

B, T, V, H = 4, 6, 17, 5


def _batch(dtype=torch.float64):
    """Right-padded responses, as both peers want them; advantages per sequence."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    lengths = torch.tensor([[6], [1], [4], [3]])
    logps = -2 + 0.5 * randn(B, T)
    return SimpleNamespace(
        mask=torch.arange(T) < lengths,
        logps=logps,
        old=logps + 0.4 * randn(B, T),
        ref=logps + 0.4 * randn(B, T),
        sampler=logps + 0.4 * randn(B, T),
        entropy=randn(B, T).abs(),
        advantages=randn(B),
        hidden=randn(B, T, H),
        weight=randn(V, H),
        labels=torch.randint(0, V, (B, T), generator=generator),
    )


# No float32 rounds these, which TRL passes through one.
OPTIONS = {"sapo_temperature_pos": 1.25, "sapo_temperature_neg": 1.5}
OPTIONS |= {"vespo_k_pos": 2.5, "vespo_lambda_pos": 2.75, "vespo_k_neg": 1.5, "vespo_lambda_neg": 1.75}


def _of(kind):
    return {name: value for name, value in OPTIONS.items() if name.startswith(kind)}


def _trl_loss(batch, logps, *, loss_type, level="token", beta=0.0, low=0.2, high=0.2, delta=None, **more):
    """GRPOTrainer's loss, its method called on a stand-in that returns our log-probabilities: (loss, metrics)."""
    base = pytest.importorskip("trl.trainer.grpo_trainer", reason="trl is not installed").GRPOTrainer
    trainer = base
    if loss_type == "gmpo":
        trainer = pytest.importorskip("trl.experimental.gmpo", reason="this trl has no GMPO").GMPOTrainer
    same = {"gather": lambda x: x, "pad_across_processes": lambda x, **_: x, "reduce": lambda x, reduction: x}
    accelerator = SimpleNamespace(**same, num_processes=1)
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logps, batch.entropy, None),
        _metrics={"eval": defaultdict(list)},
        _entropy_bonus_enabled=more.get("entropy_coef", 0.0) != 0.0,
        entropy_coef=more.get("entropy_coef", 0.0),
        use_adaptive_entropy=False,
        accelerator=accelerator,
        args=SimpleNamespace(use_bias_correction_kl=more.get("bias_correction", False), delta=delta, **OPTIONS),
        get_gamma_weights=base.get_gamma_weights,
        get_off_policy_mask=base.get_off_policy_mask,
        get_high_entropy_mask=lambda *given: base.get_high_entropy_mask(stub, *given),
        aux_loss_enabled=False,
        beta=beta,
        epsilon_low=low,
        epsilon_high=high,
        importance_sampling_level=level,
        loss_type=loss_type,
        max_completion_length=more.get("max_length"),
        model=SimpleNamespace(training=False),
        off_policy_mask_threshold=more.get("off_policy"),
        top_entropy_quantile=more.get("top_entropy", 1.0),
        use_vllm="weights" in more,
        vllm_importance_sampling_correction=True,
    )
    ids = torch.zeros(B, T, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1] + 1,
        "completion_ids": ids,
        "completion_mask": batch.mask.long(),
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old,
        "ref_per_token_logps": batch.ref,
        "importance_sampling_ratio": more.get("weights"),
        "sampling_per_token_logps": batch.sampler,
        "num_items_in_batch": torch.tensor(float(more.get("num_items", 0))),
    }
    return trainer._compute_loss(stub, None, inputs), {k: v[0] for k, v in stub._metrics["eval"].items()}


def _compare(batch, peer_options, **ours):
    """Losses and gradients with respect to the log-probabilities agree; returns our output and their metrics."""
    mine, theirs = (batch.logps.clone().requires_grad_() for _ in range(2))
    expected, metrics = _trl_loss(batch, theirs, **peer_options)
    output = losses.policy_loss(mine, batch.old, batch.advantages, batch.mask, **ours)
    expected.backward()
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    return output, metrics


@pytest.mark.parametrize(
    ("peer", "ours"),
    [
        ({"loss_type": "grpo"}, {"normalization": "grpo"}),
        ({"loss_type": "bnpo"}, {"normalization": "bnpo"}),
        ({"loss_type": "bnpo", "high": 0.28, "delta": 1.4}, {"cliprange_high": 0.28, "dual_clip": 1.4}),
        ({"loss_type": "dr_grpo", "max_length": 9}, {"normalization": "dr_grpo", "max_length": 9}),
        ({"loss_type": "dapo", "num_items": 31}, {"normalization": "dapo", "num_items": 31}),
        ({"loss_type": "grpo", "level": "sequence", "low": 0.03, "high": 0.04},
         {"kind": "gspo", "cliprange": 0.03, "cliprange_high": 0.04, "normalization": "grpo"}),
        ({"loss_type": "cispo", "high": 1.2, "num_items": 31},
         {"kind": "cispo", "cliprange": 1.0, "cliprange_high": 0.2, "normalization": "dapo", "num_items": 31}),
        ({"loss_type": "cispo", "high": 0.8, "num_items": 31},
         {"kind": "cispo", "cliprange": 1.0, "cliprange_high": -0.2, "normalization": "dapo", "num_items": 31}),
        ({"loss_type": "sapo"}, {"kind": "sapo", "normalization": "grpo", **_of("sapo")}),
        ({"loss_type": "luspo", "level": "sequence", "low": 0.03, "high": 0.04},
         {"kind": "luspo", "cliprange": 0.03, "cliprange_high": 0.04, "normalization": "grpo"}),
        ({"loss_type": "vespo", "num_items": 31},
         {"kind": "vespo", "normalization": "dapo", "num_items": 31, **_of("vespo")}),
        ({"loss_type": "gmpo", "low": 0.2, "high": 0.3},
         {"kind": "gmpo", "cliprange": 0.2, "cliprange_high": 0.3, "normalization": "grpo"}),
    ],
    ids=["grpo", "bnpo", "delta", "dr_grpo", "dapo", "gspo", "cispo", "cispo-low", "sapo", "luspo", "vespo", "gmpo"],
)  # fmt: skip
def test_grpo_family_matches_trl(peer, ours):
    output, metrics = _compare(_batch(), peer, **ours)
    if peer["loss_type"] in ("bnpo", "gmpo") and "delta" not in peer:
        assert output.clipfrac.item() == pytest.approx(metrics["clip_ratio/region_mean"])
        assert output.clipfrac > 0


def test_luspo_with_its_kl_matches_trl():
    """TRL multiplies the KL by the length too: GSPO, summed over each sequence's tokens."""
    batch = _batch()
    _compare(
        batch,
        {"loss_type": "luspo", "level": "sequence", "beta": 0.3},
        kind="gspo",
        normalization="dr_grpo",
        max_length=1,
        ref_logps=batch.ref,
        kl_coef=0.3,
        kl_estimator="k3",
    )


def test_vespo_takes_the_samplers_weights_into_its_own():
    batch = _batch()
    weights = (batch.old - batch.sampler).exp().clamp(max=1.5)
    _compare(
        batch,
        {"loss_type": "vespo", "num_items": 31, "weights": torch.where(batch.mask, weights, 1.0)},
        kind="vespo",
        normalization="dapo",
        num_items=31,
        sampler_logps=batch.sampler,
        importance_cap=1.5,
        **_of("vespo"),
    )


def test_kl_term_and_its_metric_match_trl():
    batch = _batch()
    output, metrics = _compare(
        batch,
        {"loss_type": "grpo", "beta": 0.3},
        normalization="grpo",
        ref_logps=batch.ref,
        kl_coef=0.3,
        kl_estimator="k3",
    )
    assert output.kl.item() == pytest.approx(metrics["kl"])


def test_entropy_bonus_matches_trl():
    batch = _batch()
    output, metrics = _compare(
        batch, {"loss_type": "bnpo", "entropy_coef": 0.05}, entropy=batch.entropy, entropy_coef=0.05
    )
    assert output.entropy.item() == pytest.approx(metrics["entropy"])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_sampler_correction_matches_trl(level):
    """TRL truncates exp(old - sampler), of a token or summed over the sequence, and scales the policy term by it."""
    batch = _batch()
    difference = (batch.old - batch.sampler) * batch.mask
    difference = difference if level == "token" else difference.sum(-1, keepdim=True)
    _compare(
        batch,
        {"loss_type": "bnpo", "weights": difference.exp().clamp(max=1.5), "beta": 0.1},
        sampler_logps=batch.sampler,
        importance_level=level,
        importance_cap=1.5,
        ref_logps=batch.ref,
        kl_coef=0.1,
        kl_estimator="k3",
    )


@pytest.mark.parametrize("beside", [0.0, 0.05, 0.3])
def test_off_policy_sequence_mask_matches_trl(beside):
    """DeepSeek-V3.2's, against the sampler; without one against the old policy. The KL is left alone by it."""
    batch = _batch()
    drift = ((batch.sampler - batch.logps) * batch.mask).sum(-1) / batch.mask.sum(-1)
    drops = (drift > beside) & (batch.advantages < 0)
    options = {"ref_logps": batch.ref, "kl_coef": 0.1, "kl_estimator": "k3", "off_policy_mask_threshold": beside}
    peer = {"loss_type": "bnpo", "off_policy": beside, "beta": 0.1, "weights": torch.ones(B, T)}
    _compare(batch, peer, sampler_logps=batch.sampler, importance_weights=torch.ones(B, T), **options)
    batch.sampler = batch.old
    _compare(batch, peer, **options)
    if beside == 0.0:
        assert 0 < drops.sum() < B


def test_unbiased_kl_matches_trl():
    batch = _batch()
    peer = {"loss_type": "grpo", "beta": 0.3, "bias_correction": True}
    given = {"ref_logps": batch.ref, "kl_coef": 0.3, "kl_estimator": "k3"}
    output, metrics = _compare(batch, peer, normalization="grpo", use_bias_correction_kl=True, **given)
    assert output.kl.item() == pytest.approx(metrics["kl"])


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.77])
def test_policy_term_of_the_top_entropies_matches_trl(share):
    batch = _batch()
    batch.entropy = batch.entropy.float().double()  # which TRL rounds before it compares
    peer = {"loss_type": "bnpo", "top_entropy": share, "beta": 0.1}
    given = {"ref_logps": batch.ref, "kl_coef": 0.1, "kl_estimator": "k3", "entropy": batch.entropy}
    _compare(batch, peer, top_entropy_quantile=share, **given)


def test_rloo_matches_trl():
    """RLOO clips the ratio of whole sequences: the same objective with a sequence as its one token."""
    trainer = pytest.importorskip("trl.trainer.rloo_trainer", reason="trl is not installed").RLOOTrainer
    batch = _batch()
    mine, theirs = (batch.logps.clone().requires_grad_() for _ in range(2))
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (theirs, batch.entropy, None),
        _metrics={"eval": defaultdict(list)},
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
        aux_loss_enabled=False,
        epsilon_low=0.2,
        epsilon_high=0.2,
        model=SimpleNamespace(training=False),
    )
    ids = torch.zeros(B, T, dtype=torch.long)
    old = (batch.old * batch.mask).sum(-1)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1] + 1,
        "completion_ids": ids,
        "completion_mask": batch.mask.long(),
        "advantages": batch.advantages,
        "old_logps": old,
    }
    expected = trainer._compute_loss(stub, None, inputs)
    sequence = (mine * batch.mask).sum(-1, keepdim=True)
    output = losses.policy_loss(sequence, old[:, None], batch.advantages, torch.ones(B, 1, dtype=torch.bool))
    expected.backward()
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    assert output.clipfrac.item() == pytest.approx(stub._metrics["eval"]["clip_ratio/region_mean"][0])


@pytest.mark.parametrize(
    ("peer", "ours"),
    [
        ({"loss_type": "grpo"}, {"normalization": "grpo"}),
        ({"loss_type": "bnpo", "delta": 1.5}, {"normalization": "bnpo", "dual_clip": 1.5}),
        ({"loss_type": "dr_grpo", "max_completion_length": 9}, {"normalization": "dr_grpo", "max_length": 9}),
        ({"loss_type": "dapo", "epsilon_high": 0.28},
         {"normalization": "dapo", "cliprange_high": 0.28, "num_items": 14}),
        ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, {"kind": "gspo", "normalization": "grpo"}),
        ({"loss_type": "cispo", "epsilon_high": 1.3},
         {"kind": "cispo", "cliprange": 1.0, "cliprange_high": 0.3, "normalization": "token"}),
    ],
    ids=["grpo", "two-sided", "dr_grpo", "dapo", "gspo", "cispo"],
)  # fmt: skip
def test_matches_liger(peer, ours):
    """From hidden states: their fused linear loss, ours on logits of the same head. Their sums are in float32."""
    name = "liger_kernel.chunked_loss.grpo_loss"
    module = pytest.importorskip(name, reason="liger-kernel is not installed").LigerFusedLinearGRPOLoss
    batch = _batch(torch.float32)
    with torch.no_grad():
        logps = torch.log_softmax(batch.hidden @ batch.weight.T, -1).gather(-1, batch.labels[..., None])[..., 0]
    old, ref = logps + 0.2 * batch.old, logps + 0.2 * batch.ref
    options = {"epsilon_high": 0.2, **peer}
    mine, theirs = (batch.hidden.clone().requires_grad_() for _ in range(2))
    expected, metrics = module(beta=0.04, compiled=False, use_ref_model=True, **options)(
        theirs,
        batch.weight,
        batch.labels,
        batch.mask.long(),
        batch.advantages,
        ref_per_token_logps=ref,
        old_per_token_logps=old,
    )
    labels = batch.labels.masked_fill(~batch.mask, -100)
    arguments = {"kl_coef": 0.04, "kl_estimator": "k3", **ours}
    num_items = arguments.pop("num_items", None)
    output = losses.PPOLoss(**arguments)(
        mine @ batch.weight.T, labels, old, batch.advantages, ref_logps=ref, num_items=num_items
    )
    expected.backward()
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output.kl, metrics[0], rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------- worked examples, by hand from the publications
# One sequence of two tokens: pi = 1/2 and 1/5, pi_old = 1/4 and 2/5, so rho = 2 and 1/2; A = 1 and -2.
# Value of the loss, and its derivatives by log pi of both tokens.
WORKED = {
    # Williams 1992: -(ln 1/2 - 2 ln 1/5) / 2; -A / 2
    "reinforce": ({}, -1.2628643221541278, [-0.5, 1.0]),
    # Schulman et al. 2015, eq. 14: -(2 - 1) / 2; -A rho / 2
    "trpo": ({}, -0.5, [-1.0, 0.5]),
    # Schulman et al. 2017, eq. 8, with k3 of KL(pi_old, pi): rho - 1 - ln rho = 0.3068528, 0.1931472, mean 1/4;
    # -1/2 + 1/2 * 1/4; its derivative is rho - 1, so (-A rho + (rho - 1) / 2) / 2
    "penalty": ({"kl_coef": 0.5, "kl_estimator": "k3"}, -0.375, [-0.75, 0.375]),
    # eq. 7 with epsilon 0.2: max(-2, -1.2) and max(1, 1.6), both cut: -0.6 + 0.8
    "clip": ({"cliprange": 0.2}, 0.2, [0.0, 0.0]),
    # Zheng et al. 2025, eq. 5: s = sqrt(2 * 1/2) = 1; -s (1 - 2) / 2, and ds / dlog pi = s / 2
    "gspo": ({"cliprange": 0.2}, 0.5, [0.25, 0.25]),
    # eq. 13: the same value, each token with its own advantage in the gradient
    "gspo_token": ({"cliprange": 0.2}, 0.5, [-0.5, 1.0]),
    # MiniMax 2025, eq. 4 with an upper bound of 1.5: -(1.5 * 1 * ln 1/2 + 0.5 * -2 * ln 1/5) / 2
    "cispo": ({"cliprange": 1.0, "cliprange_high": 0.5}, -0.2848585707970912, [-0.75, 0.5]),
    # Gao et al. 2025: gates 4 sigmoid(1) and 4 / 1.05 sigmoid(-0.525); their derivatives in log rho, 4 s (1 - s) rho
    "sapo": ({}, -0.0461788269566432, [-0.7864477329659274, 0.4670699116426963]),
    # arXiv:2602.05261: gspo's times two tokens
    "luspo": ({"cliprange": 0.2}, 1.0, [0.5, 0.5]),
    # Shen et al. 2026: W = 2 * 1/2 = 1, of weight e^lambda e^-lambda = 1: reinforce's
    "vespo": ({}, -1.2628643221541278, [-0.5, 1.0]),
    # Zhao et al. 2025, eq. 4: ln 2 is below 1, ln 1/2 below -0.4: cut; s = exp((ln 2 - 0.4) / 2), value -s (1 - 2) / 2
    "gmpo": ({"cliprange": 0.4, "cliprange_high": 1.0}, 0.5789300674674098, [0.2894650337337049, 0.0]),
    # Qi et al. 2026: up by 0.25, too far; down by 0.2, not: the loss is that of the second token, 1/2 * 2 ln 1/5
    "dppo_tv": ({"cliprange": 0.22}, -0.8047189562170501, [0.0, 0.5]),
    # KL(1/4, 1/2) = 0.1308, too far; KL(2/5, 1/5) = 0.1047, not
    "dppo_kl": ({"cliprange": 0.12}, -0.8047189562170501, [0.0, 0.5]),
    # Richemond et al. 2024: reinforce's, and beta / 2 (ln 2)^2; derivatives -A + beta log rho
    "dro": ({"dro_beta": 0.1}, -1.2388416714582176, [-0.4653426409720, 0.9653426409720]),
    # Chu et al. 2025: reinforce's
    "gpg": ({}, -1.2628643221541278, [-0.5, 1.0]),
    # Cui et al. 2025: both covariances are 1.5 * ln(5/2) / 2 = 0.6872; the first token is cut by PPO-clip, -1.2; the
    # second is not, and is left out
    "clip_cov": (
        {"cliprange": 0.7, "cliprange_high": 0.2, "clip_cov_ratio": 1.0, "clip_cov_lb": 0.5},
        -0.6,
        [0.0, 0.0],
    ),
    # trpo's, and |log rho| = ln 2 for both tokens, of derivatives 1 and -1
    "kl_cov": ({"kl_cov_ratio": 1.0}, 0.1931471805599453, [-0.5, 0.0]),
}


@pytest.mark.parametrize("kind", WORKED)
def test_worked_example(kind):
    options, value, derivatives = WORKED[kind]
    logps = torch.tensor([[1 / 2, 1 / 5]], dtype=torch.float64).log().requires_grad_()
    old = torch.tensor([[1 / 4, 2 / 5]], dtype=torch.float64).log()
    advantages = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    loss = losses.policy_loss(logps, old, advantages, torch.ones(1, 2, dtype=torch.bool), kind=kind, **options).loss
    assert loss.item() == pytest.approx(value, abs=1e-12)
    assert torch.autograd.grad(loss, logps)[0].flatten().tolist() == pytest.approx(derivatives, abs=1e-12)


def test_every_kind_has_a_worked_example():
    assert set(WORKED) == set(KINDS)


def test_ptx_by_hand():
    """Ouyang et al. 2022, eq. 2: the policy's loss plus gamma times the pretraining text's negative log-likelihood."""
    logps = torch.tensor([[-1.0, -3.0, -7.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    loss = losses.ptx_loss(torch.tensor(0.5), logps, mask, ptx_coef=0.25)
    assert loss.item() == 0.5 + 0.25 * 2.0
    assert torch.autograd.grad(loss, logps)[0].tolist() == [[-0.125, -0.125, 0.0]]
