"""WPO's weights of pairs and LD-DPO's of tokens: by hand, from logits, heads and models, as programs and not."""

import math

import pytest
import torch

import fastalign as fa
from fastalign.losses import DPOLoss
from fastalign.losses.pair_weights import shared_length_weights, wpo_weights
from fastalign.reference.preference import ragged_labels

WEIGHTED = [{"use_weighting": True}, {"ld_alpha": 0.3}, {"use_weighting": True, "ld_alpha": 0.3, "loss_type": "hinge"}]


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, 6, 5, 23, generator=generator, dtype=torch.float64).to(dtype)
    labels = ragged_labels(6, fa.reference.Sizes(batch=3, length=5, vocab=23), generator)
    return logits.requires_grad_(), ref_logits, labels


def outcome(loss, logits, labels, **more):
    out = loss(logits, labels, **more)
    leaf = logits.hidden if isinstance(logits, fa.Head) else logits
    return out, torch.autograd.grad(out.loss, leaf)[0]


def test_weights_by_hand():
    """Probabilities 1/2 and 1/4 among (1/2, 1/4, 1/4): over sums of squares of 3/8, their geometric mean; times 8/3."""
    logits = torch.tensor([[[0.5, 0.25, 0.25]] * 2, [[0.5, 0.25, 0.25]] * 2], dtype=torch.float64).log()
    labels = torch.tensor([[0, 1], [-100, 0]])
    stats = fa.token_stats(logits, labels, diagnostics=("log_sum_sq_probs",))
    expected = math.sqrt(1 / 2 * 1 / 4) / (3 / 8) * (1 / 2) / (3 / 8)
    assert wpo_weights(stats, labels != -100).tolist() == pytest.approx([expected])


def test_shared_lengths_by_hand():
    mask = torch.tensor([[0, 1, 1, 1], [1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 0, 1]], dtype=torch.bool)
    found = shared_length_weights(mask, 0.25)  # lengths 3 and 2, 1 and 3
    assert torch.where(mask, found, 0).tolist() == [[0, 1, 1, 0.25], [1, 0, 0, 0], [0, 1, 1, 0], [1, 0.25, 0, 0.25]]


@pytest.mark.parametrize("options", WEIGHTED, ids=str)
def test_the_same_everywhere(options, programs):
    """Program, torch operations, float64, a head."""
    logits, ref_logits, labels = batch()
    loss = DPOLoss(**options)
    found, gradient = outcome(loss, logits, labels, ref_logits=ref_logits)
    if fa.backends()["cpu"] == "available":
        assert "program of" in loss.fused[True].explain()
    with programs.off():
        plain, expected = outcome(loss, logits, labels, ref_logits=ref_logits)
    wide, reference, _ = batch(torch.float64)
    exact, slope = outcome(loss, wide, labels, ref_logits=reference)
    for a, b, c in zip(*(filter(torch.is_tensor, out) for out in (found, plain, exact)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.double(), c, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-4, atol=1e-6)
    head = fa.Head(logits.detach().requires_grad_(), torch.eye(23))
    torch.testing.assert_close(outcome(loss, head, labels, ref_logits=ref_logits)[1], gradient, rtol=1e-4, atol=1e-6)


def test_all_of_alpha_one_is_plain():
    logits, ref_logits, labels = batch()
    plain = outcome(DPOLoss(), logits, labels, ref_logits=ref_logits)
    same = outcome(DPOLoss(ld_alpha=1.0), logits, labels, ref_logits=ref_logits)
    assert torch.equal(plain[0].loss, same[0].loss)
    assert torch.equal(plain[1], same[1])


@pytest.mark.parametrize("options", [{}, *WEIGHTED], ids=str)
def test_what_stands_for_logits_is_asked_once(options, programs):
    """Where no program serves, too: asking a model is a forward pass."""
    logits, ref_logits, labels = batch()

    class Source:
        shape, asked = logits.shape, 0

        def stats(self, labels, **more):
            self.asked += 1
            return fa.token_stats(logits, labels, **more)

    for off in (False, True):
        source, loss = Source(), DPOLoss(**options)
        if off:
            with programs.off():
                loss(source, labels, ref_logits=ref_logits)
        else:
            loss(source, labels, ref_logits=ref_logits)
        assert source.asked == 1


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="use_weighting is of single pairs; loss_type 'aot' sorts them"):
        DPOLoss(loss_type="aot", use_weighting=True)
    with pytest.raises(ValueError, match=r"ld_alpha must be in \[0, 1"):
        DPOLoss(ld_alpha=1.5)
    logits, ref_logits, labels = batch()
    head = fa.Head(logits.detach().requires_grad_(), torch.eye(23), plan="objective")
    with pytest.raises(ValueError, match="use_weighting=True is none"):
        DPOLoss(use_weighting=True)(head, labels, ref_logits=ref_logits)
    assert DPOLoss(ld_alpha=0.5)(head, labels, ref_logits=ref_logits).loss.isfinite()
