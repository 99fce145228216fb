"""Preference losses against other people's numbers: TRL and Liger, run live where installed, and worked examples."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from fastalign.losses import DPOLoss, KTOLoss, dpo_loss, kto_loss

PAIRS, LENGTH, VOCAB, HIDDEN = 4, 7, 13, 5
BETA = 0.4


def batch(seed=0):
    """float32 hidden states of policy and reference, head weights, and ragged labels: 2 * PAIRS rows."""
    generator = torch.Generator().manual_seed(seed)
    hidden, ref_hidden = torch.randn((2, 2 * PAIRS, LENGTH, HIDDEN), generator=generator)
    weight, ref_weight = torch.randn((2, VOCAB, HIDDEN), generator=generator)
    labels = torch.randint(0, VOCAB, (2 * PAIRS, LENGTH), generator=generator)
    ends = torch.randint(2, LENGTH + 1, (2 * PAIRS, 1), generator=generator)
    place = torch.arange(LENGTH)
    return hidden, weight, ref_hidden, ref_weight, labels.masked_fill((place < 1) | (place >= ends), -100)


def per_token(logits, labels):
    """What another library's model hands to its loss: log-probabilities, 0 where ignored."""
    logps = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return logps * (labels != -100)


# -------------------------------------------------------------------------------------------- TRL, its trainers' losses
@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl", reason="trl is not installed", exc_type=ImportError)


def trl_trainer(**attributes):
    """An object with what a trainer's loss method reads of its trainer: no model, no data."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=lambda t: t, gather_for_metrics=lambda t: t)
    common = {
        "accelerator": accelerator,
        "model": SimpleNamespace(training=True),
        "beta": BETA,
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return SimpleNamespace(**{**common, **attributes})


def trl_inputs(logits, labels):
    """(a stand-in for the model, tokenised inputs): TRL drops the first position, so one more is put in front."""
    mask = torch.nn.functional.pad((labels != -100).long(), (1, 0))
    logps = per_token(logits, labels)
    zeros = torch.zeros_like(logps)
    outputs = SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    outputs.log_sum_sq_probs = (2 * logits.log_softmax(-1)).logsumexp(-1)
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": mask, "completion_mask": mask}
    return (lambda **_: outputs), inputs


def trl_dpo(trl, logits, ref_logits, labels, types, weights=None, **attributes):
    reference, real = per_token(ref_logits, labels), labels != -100
    if attributes.get("ld_alpha") is not None:
        shared = torch.minimum(*real.sum(-1).chunk(2)).repeat(2)[:, None]
        reference = torch.where(real.cumsum(-1) > shared, attributes["ld_alpha"] * reference, reference)
    reference = reference.sum(-1)
    settings = {
        "ld_alpha": None,
        "use_weighting": False,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "args": SimpleNamespace(discopop_tau=0.5),
        "loss_types": types,
        "loss_weights": weights or [1.0] * len(types),
    }
    trainer = trl_trainer(**{**settings, **attributes})
    model, inputs = trl_inputs(logits, labels)
    inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = reference.chunk(2)
    return trl.DPOTrainer._compute_loss(trainer, model, inputs, False), trainer._metrics["train"]


SMOOTH = {"label_smoothing": 0.1}
TRL_DPO = [
    # our options, TRL's loss types, their weights, TRL's other settings
    ({}, ["sigmoid"], None, {}),
    ({"loss_type": "hinge"}, ["hinge"], None, {}),
    ({"loss_type": "ipo_avg"}, ["ipo"], None, {}),
    ({"loss_type": "exo_pair", **SMOOTH}, ["exo_pair"], None, SMOOTH),
    ({"loss_type": "nca_pair"}, ["nca_pair"], None, {}),
    ({"loss_type": "robust", **SMOOTH}, ["robust"], None, SMOOTH),
    ({"loss_type": "bco_pair"}, ["bco_pair"], None, {}),
    ({"loss_type": "sppo_hard"}, ["sppo_hard"], None, {}),
    ({"loss_type": "aot", **SMOOTH}, ["aot"], None, SMOOTH),
    ({"loss_type": "aot_unpaired", **SMOOTH}, ["aot_unpaired"], None, SMOOTH),
    ({"loss_type": "apo_zero"}, ["apo_zero"], None, {}),
    ({"loss_type": "apo_down"}, ["apo_down"], None, {}),
    ({"loss_type": "discopop", "discopop_tau": 0.5}, ["discopop"], None, {}),
    ({"average": True}, ["sigmoid_norm"], None, {}),
    ({"loss_type": "rpo", "nll_weight": 0.7}, ["sigmoid", "sft"], [1.0, 0.7], {}),
    ({"loss_type": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}}, ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], {}),
    ({"loss_type": "sigmoid_norm"}, ["sigmoid_norm"], None, {}),
    ({"loss_type": "aot_pair"}, ["aot"], None, {}),
    ({"use_weighting": True}, ["sigmoid"], None, {"use_weighting": True}),
    ({"use_weighting": True, "loss_type": "apo_down"}, ["apo_down"], None, {"use_weighting": True}),
    ({"ld_alpha": 0.4}, ["sigmoid"], None, {"ld_alpha": 0.4}),
    ({"ld_alpha": 0.0, "loss_type": "ipo_avg"}, ["ipo"], None, {"ld_alpha": 0.0}),
    ({"f_divergence": "forward_kl"}, ["sigmoid"], None, {"f_divergence_type": "forward_kl"}),
    ({"f_divergence": "js_divergence"}, ["sigmoid"], None, {"f_divergence_type": "js_divergence"}),
    # TRL's coefficient is 1 - alpha of the paper
    (
        {"f_divergence": "alpha_divergence", "f_alpha": 0.3},
        ["sigmoid"],
        None,
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    ),
]


@pytest.mark.parametrize(("ours", "types", "weights", "settings"), TRL_DPO, ids=lambda value: str(value)[:40])
def test_trl_dpo(trl, ours, types, weights, settings):
    hidden, weight, ref_hidden, ref_weight, labels = batch()
    logits, ref_logits = (hidden @ weight.T).requires_grad_(), ref_hidden @ ref_weight.T
    theirs, metrics = trl_dpo(trl, logits, ref_logits, labels, types, weights, **settings)
    (their_grad,) = torch.autograd.grad(theirs, logits)
    out = DPOLoss(beta=BETA, **ours)(logits, labels, ref_logits=ref_logits)
    (our_grad,) = torch.autograd.grad(out.loss, logits)
    torch.testing.assert_close(out.loss, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-4, atol=1e-6 * their_grad.abs().max().item())
    assert out.chosen_logps.mean().item() == pytest.approx(metrics["logps/chosen"][0], rel=1e-5)
    if "f_divergence" not in ours and "average" not in ours:  # TRL logs the plain log-ratio there too
        for name, value in (
            ("chosen", out.chosen_rewards),
            ("rejected", out.rejected_rewards),
            ("accuracies", out.accuracies),
            ("margins", out.margins),
        ):
            assert value.mean().item() == pytest.approx(metrics[f"rewards/{name}"][0], rel=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["simpo", "sigmoid", "hinge", "ipo"])
def test_trl_cpo(trl, kind, smoothing):
    """TRL's CPO trainer hands averages to simpo and ipo, sums to the others, and adds the NLL outside."""
    cpo = pytest.importorskip("trl.experimental.cpo", reason="trl has no CPO trainer", exc_type=ImportError)
    generator = torch.Generator().manual_seed(1)
    chosen, rejected = -5 - torch.rand((2, 6), generator=generator)
    lengths = torch.randint(1, 9, (2, 6), generator=generator)
    trainer = trl_trainer(loss_type=kind, label_smoothing=smoothing, simpo_gamma=0.7, alpha=0.0)
    averaged = kind in ("simpo", "ipo")
    given = (chosen / lengths[0], rejected / lengths[1]) if averaged else (chosen, rejected)
    losses, won, lost = cpo.CPOTrainer.cpo_loss(trainer, *given)
    name = {"sigmoid": "cpo", "ipo": "ipo_avg"}.get(kind, kind)
    options = {"label_smoothing": smoothing} if kind in ("simpo", "sigmoid") else {}
    sizes = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    out = dpo_loss(chosen, rejected, beta=BETA, loss_type=name, simpo_gamma=0.7, nll_weight=0.0, **options, **sizes)
    torch.testing.assert_close(out.loss, losses.mean())
    if kind != "ipo":  # rewards of ipo are of sums here
        torch.testing.assert_close(out.chosen_rewards, won)
        torch.testing.assert_close(out.rejected_rewards, lost)


@pytest.mark.parametrize("alpha", [0.3, 1.5])
def test_trl_alphapo(trl, alpha):
    """TRL's CPO trainer with its alpha; its rewards are the shaped ones, ours the log-probabilities as SimPO's."""
    cpo = pytest.importorskip("trl.experimental.cpo", reason="trl has no CPO trainer", exc_type=ImportError)
    generator = torch.Generator().manual_seed(1)
    given = (-5 - torch.rand((2, 6), generator=generator, dtype=torch.float64)).requires_grad_()
    lengths = torch.randint(1, 9, (2, 6), generator=generator)
    trainer = trl_trainer(loss_type="simpo", label_smoothing=0.1, simpo_gamma=0.7, alpha=alpha)
    losses, won, lost = cpo.CPOTrainer.cpo_loss(trainer, given[0] / lengths[0], given[1] / lengths[1])
    options = {"loss_type": "alphapo", "alphapo_alpha": alpha, "simpo_gamma": 0.7, "label_smoothing": 0.1}
    sizes = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    out = dpo_loss(given[0], given[1], beta=BETA, **options, **sizes)
    torch.testing.assert_close(out.loss, losses.mean())
    assert torch.equal(out.accuracies, (won > lost).to(out.accuracies.dtype))
    pairs = [torch.autograd.grad(loss, given, retain_graph=True)[0] for loss in (out.loss, losses.mean())]
    torch.testing.assert_close(*pairs)


def test_trl_orpo(trl):
    orpo = pytest.importorskip("trl.experimental.orpo", reason="trl has no ORPO trainer", exc_type=ImportError)
    generator = torch.Generator().manual_seed(2)
    chosen, rejected = -5 * torch.rand((2, 6), generator=generator) - 0.1
    lengths = torch.randint(1, 9, (2, 6), generator=generator)
    terms, won, lost, _, _ = orpo.ORPOTrainer.odds_ratio_loss(trl_trainer(), chosen / lengths[0], rejected / lengths[1])
    sizes = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    out = dpo_loss(chosen, rejected, beta=BETA, loss_type="orpo", **sizes)
    torch.testing.assert_close(out.loss, -chosen.sum() / lengths[0].sum() - terms.mean())
    torch.testing.assert_close(out.chosen_rewards, won)
    torch.testing.assert_close(out.rejected_rewards, lost)


@pytest.mark.parametrize("with_kl", [True, False])
def test_trl_kto(trl, with_kl):
    hidden, weight, ref_hidden, ref_weight, labels = batch(3)
    logits, ref_logits = (hidden @ weight.T).requires_grad_(), ref_hidden @ ref_weight.T
    desirable = torch.tensor([1, 0, 1, 1, 0, 1, 0, 0]).bool()
    kl_logps, ref_kl_logps = torch.randn((2, 8), generator=torch.Generator().manual_seed(4)) + torch.tensor(
        [[1.0], [0.0]]
    )
    trainer = trl_trainer(
        calculate_KL=with_kl,
        loss_type="kto" if with_kl else "apo_zero_unpaired",
        desirable_weight=1.5,
        undesirable_weight=0.7,
        _compute_kl_logps=lambda model, inputs: kl_logps,
    )
    model, inputs = trl_inputs(logits, labels)
    ref_logps = per_token(ref_logits, labels).sum(-1)
    inputs |= {"label": desirable, "ref_logps": ref_logps, "ref_KL_logps": ref_kl_logps}
    theirs = trl.KTOTrainer._compute_loss(trainer, model, inputs, False)
    (their_grad,) = torch.autograd.grad(theirs, logits)
    baseline = {"kl_logps": kl_logps, "ref_kl_logps": ref_kl_logps} if with_kl else {}
    module = KTOLoss(beta=BETA, desirable_weight=1.5, undesirable_weight=0.7)
    out = module(logits, labels, desirable, ref_logits=ref_logits, **baseline)
    (our_grad,) = torch.autograd.grad(out.loss, logits)
    torch.testing.assert_close(out.loss, theirs)
    torch.testing.assert_close(our_grad, their_grad)
    metrics = trainer._metrics["train"]
    assert out.kl.item() == pytest.approx(metrics["kl"][0])
    assert (out.kl > 0) == with_kl
    assert out.chosen_rewards.item() == pytest.approx(metrics["rewards/chosen"][0], rel=1e-5)
    assert out.rejected_rewards.item() == pytest.approx(metrics["rewards/rejected"][0], rel=1e-5)


# -------------------------------------------------------------------------------------------- Liger, its chunked losses
@pytest.fixture(scope="module")
def liger():
    return pytest.importorskip(
        "liger_kernel.chunked_loss", reason="liger-kernel is not installed", exc_type=ImportError
    )


LIGER = [
    # Liger's class and its options, our options; Liger's default is the per-token mean for ORPO and SimPO
    ("DPO", {}, {}),
    ("DPO", {"loss_type": "hinge"}, {"loss_type": "hinge"}),
    ("DPO", {"loss_type": "robust", **SMOOTH}, {"loss_type": "robust", **SMOOTH}),
    ("DPO", {"loss_type": "apo_down"}, {"loss_type": "apo_down"}),
    ("DPO", {"average_log_prob": True}, {"average": True}),
    ("DPO", {"compute_nll_loss": True, "alpha": 0.6}, {"loss_type": "rpo", "nll_weight": 0.6}),
    ("ORPO", {}, {"loss_type": "orpo"}),
    (
        "SimPO",
        {"gamma": 0.7, "compute_nll_loss": False, **SMOOTH},
        {"loss_type": "simpo", "simpo_gamma": 0.7, **SMOOTH},
    ),
    ("CPO", {"alpha": 0.6, **SMOOTH}, {"loss_type": "cpo", "nll_weight": 0.6, **SMOOTH}),
]


@pytest.mark.parametrize(("kind", "settings", "ours"), LIGER, ids=lambda value: str(value)[:40])
def test_liger(liger, kind, settings, ours):
    hidden, weight, ref_hidden, ref_weight, labels = batch(5)
    hidden.requires_grad_()
    weight.requires_grad_()
    head = getattr(liger, f"LigerFusedLinear{kind}Loss")(beta=BETA, compiled=False, **settings)
    reference = {"ref_input": ref_hidden, "ref_weight": ref_weight} if kind == "DPO" else {}
    theirs = head(weight, hidden, labels, **reference)[0]
    their_grads = torch.autograd.grad(theirs, (hidden, weight))
    ref_logits = {"ref_logits": ref_hidden @ ref_weight.T} if kind == "DPO" else {}
    out = DPOLoss(beta=BETA, **ours)(hidden @ weight.T, labels, **ref_logits)
    our_grads = torch.autograd.grad(out.loss, (hidden, weight))
    torch.testing.assert_close(out.loss, theirs)
    torch.testing.assert_close(our_grads, their_grads, rtol=1e-4, atol=1e-5)


def test_liger_kto(liger):
    hidden, weight, ref_hidden, ref_weight, labels = batch(6)
    hidden.requires_grad_()
    desirable, kl = torch.tensor([1, 0, 1, 1, 0, 1, 0, 0]).bool(), torch.tensor(0.3)
    head = liger.LigerFusedLinearKTOLoss(beta=BETA, compiled=False, use_ref_model=True)
    theirs = head(
        hidden, weight, labels, preference_labels=desirable, ref_input=ref_hidden, ref_weight=ref_weight, kl=kl
    )[0]
    (their_grad,) = torch.autograd.grad(theirs, hidden)
    out = KTOLoss(beta=BETA)(hidden @ weight.T, labels, desirable, ref_logits=ref_hidden @ ref_weight.T, kl=kl)
    (our_grad,) = torch.autograd.grad(out.loss, hidden)
    torch.testing.assert_close(out.loss, theirs)
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------- worked examples, by hand from the publications
# One pair: log pi(y_w) = -10, log pi(y_l) = -14, log pi_ref = -11 and -12: h_w = 1, h_l = -2, Delta = 3; |y_w| = 8,
# |y_l| = 5; beta = 0.1, so beta Delta = 0.3. Numbers: log(1 + e^-0.3) = 0.5543552445, log(1 + e^0.3) = 0.8543552445.
WORKED = [
    ({}, 0.5543552445),
    # 0.9 * 0.5543552445 + 0.1 * 0.8543552445
    ({"label_smoothing": 0.1}, 0.5843552445),
    # (0.9 * 0.5543552445 - 0.1 * 0.8543552445) / 0.8
    ({"label_smoothing": 0.1, "loss_type": "robust"}, 0.5168552445),
    # (3 - 1 / 0.2)^2
    ({"loss_type": "ipo"}, 4.0),
    # (1 / 8 + 2 / 5 - 5)^2 = 4.475^2
    ({"loss_type": "ipo_avg"}, 20.025625),
    ({"loss_type": "hinge"}, 0.7),
    # Park et al. 2024, eq. 9: log(1 + e^-(0.3 + 0.2 (8 - 5))) = log(1 + e^-0.9)
    ({"length_alpha": 0.2}, 0.3411538747),
    # 0.5543552445 + 10 / 8 per sequence; one sequence, so per token it is the same
    ({"loss_type": "rpo"}, 1.8043552445),
    ({"loss_type": "rpo", "nll_normalization": "sum", "nll_weight": 0.1}, 1.5543552445),
    # h_w > 0: no penalty
    ({"loss_type": "dpop"}, 0.5543552445),
    # (1 - 5)^2 + (-2 + 5)^2
    ({"loss_type": "sppo"}, 25.0),
    # forward KL: s_w - s_l = -e^-1 + e^2 = 7.0211766578; log(1 + e^-0.70211766578)
    ({"f_divergence": "forward_kl"}, 0.4024838785),
]


@pytest.mark.parametrize(("options", "expected"), WORKED, ids=lambda value: str(value))
def test_worked_example(options, expected):
    pair = [torch.tensor([value], dtype=torch.float64) for value in (-10, -14, -11, -12)]
    sizes = {"chosen_lengths": torch.tensor([8]), "rejected_lengths": torch.tensor([5])}
    assert dpo_loss(*pair, beta=0.1, **options, **sizes).loss.item() == pytest.approx(expected, abs=2e-10)


def test_dpop_penalises_a_falling_chosen_response():
    """h_w = -1, h_l = -4, lambda = 5: the logit is 0.1 (3 - 5) = -0.2; log(1 + e^0.2) = 0.7981388694."""
    pair = [torch.tensor([value], dtype=torch.float64) for value in (-12, -16, -11, -12)]
    loss = dpo_loss(*pair, beta=0.1, loss_type="dpop", dpop_lambda=5.0).loss
    assert loss.item() == pytest.approx(0.7981388694, abs=2e-10)


def test_reference_free_worked_examples():
    """Means -10/8 = -1.25 and -14/5 = -2.8. SimPO, gamma 0.5: z = 0.1 * 1.55 - 0.5 = -0.345. ORPO: odds
    e^-1.25 / (1 - e^-1.25) = 0.4015511 and e^-2.8 / (1 - e^-2.8) = 0.0647474; log ratio 1.8248420211; NLL 1.25."""
    pair = [torch.tensor([value], dtype=torch.float64) for value in (-10, -14)]
    sizes = {"chosen_lengths": torch.tensor([8]), "rejected_lengths": torch.tensor([5])}
    simpo = dpo_loss(*pair, beta=0.1, loss_type="simpo", **sizes).loss
    assert simpo.item() == pytest.approx(0.8804520996, abs=2e-10)  # log(1 + e^0.345)
    orpo = dpo_loss(*pair, beta=0.1, loss_type="orpo", **sizes).loss
    assert orpo.item() == pytest.approx(1.2649491082, abs=2e-10)  # 1.25 + 0.1 log(1 + e^-1.8248420211)


def test_kto_worked_example():
    """beta 0.1, h = 5 and -3, z_0 = 1: 1 - sigmoid(0.4) = 0.4013123399 again."""
    h = torch.tensor([5.0, -3.0], dtype=torch.float64)
    loss = kto_loss(h, torch.tensor([True, False]), kl=1.0).loss
    assert loss.item() == pytest.approx(0.4013123399, abs=2e-10)
