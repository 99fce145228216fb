"""Other labels for the NLL of pairwise losses, its value, and mean logits: from one read, on every path."""

from __future__ import annotations

import pytest
import torch

import fastalign as fa
from fastalign.losses import DPOLoss, dpo_loss

PAIRS, LENGTH, VOCAB, HIDDEN = 4, 7, 13, 5
WITH_NLL = {
    "orpo": {"loss_type": "orpo", "nll_weight": 0.6},
    "cpo by sequence": {"loss_type": "cpo", "nll_normalization": "sequence"},
    "rpo of sums": {"loss_type": "rpo", "nll_normalization": "sum", "nll_weight": 0.05},
    "mixed": {"loss_type": {"sigmoid": 1.0, "sft": 0.3}, "nll_normalization": "sequence"},
    "rpo, long tails": {"loss_type": "rpo", "nll_normalization": "sequence", "ld_alpha": 0.4},
    "rpo, weighted": {"loss_type": "rpo", "nll_normalization": "sequence", "use_weighting": True},
}


def batch(dtype=torch.float64, seed=0):
    """Hidden states, head, labels of completions, and the chosen rows' labels with those of their prompts."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2 * PAIRS, LENGTH, HIDDEN, generator=draw, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCAB, HIDDEN, generator=draw, dtype=torch.float64).to(dtype)
    tokens = torch.randint(VOCAB, (2 * PAIRS, LENGTH), generator=draw)
    ends = torch.randint(3, LENGTH + 1, (2 * PAIRS, 1), generator=draw)
    place = torch.arange(LENGTH)
    labels = tokens.masked_fill((place < 2) | (place >= ends), -100)
    return hidden, weight, labels, tokens[:PAIRS].masked_fill(place >= ends[:PAIRS], -100)


def references(options):
    used = DPOLoss(**options).options.uses_reference
    sums = torch.linspace(-30, -5, 2 * PAIRS, dtype=torch.float64).view(2, PAIRS)
    return {"ref_chosen_logps": sums[0], "ref_rejected_logps": sums[1]} if used else {}


def outcome(module, source, leaf, labels, **given):
    out = module(source, labels, **given)
    return [None if t is None else t.detach().double() for t in out], torch.autograd.grad(out.loss, leaf)[0].double()


def from_logits(module, dtype, labels, hidden, weight, **given):
    logits = (hidden @ weight.T).to(dtype).requires_grad_()
    return outcome(module, logits, logits, labels, **given)


def assert_same(found, expected, **tolerance):
    for a, b in zip([*found[0], found[1]], [*expected[0], expected[1]], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **tolerance)


# -------------------------------------------------------------------------------------------------------------- the NLL
@pytest.mark.parametrize("name", WITH_NLL)
def test_the_nll_of_other_labels(name):
    """The loss is the loss with the NLL of its own labels, with that exchanged."""
    options = {key: value for key, value in WITH_NLL[name].items() if key != "use_weighting"}
    hidden, weight, labels, nll_labels = batch()
    given = references(options)
    module = DPOLoss(beta=0.3, **options)
    logits = hidden @ weight.T
    logps = logits.log_softmax(-1).gather(-1, nll_labels.clamp(min=0).repeat(2, 1).unsqueeze(-1)).squeeze(-1)[:PAIRS]
    real = nll_labels != -100
    sums, lengths = (logps * real).sum(-1), real.sum(-1)
    terms = {"token": -sums * PAIRS / lengths.sum(), "sequence": -sums / lengths, "sum": -sums}
    own, other = module(logits, labels, **given), module(logits, labels, nll_labels=nll_labels, **given)
    expected = terms[options.get("nll_normalization", "token")]
    torch.testing.assert_close(other.nll, expected)
    share = options["loss_type"]["sft"] if isinstance(options["loss_type"], dict) else 1.0
    change = share * options.get("nll_weight", 1.0) * (expected.mean() - own.nll.mean())
    torch.testing.assert_close(other.loss - own.loss, change)
    assert change.abs() > 1e-3
    for field in ("chosen_rewards", "rejected_logps", "margins"):
        torch.testing.assert_close(getattr(other, field), getattr(own, field))


@pytest.mark.parametrize("name", WITH_NLL)
@pytest.mark.parametrize("report", [False, True])
def test_on_every_road(name, report):
    """A program on float32, torch operations on float64, heads whole and by parts: the same."""
    options, (hidden, weight, labels, nll_labels) = WITH_NLL[name], batch()
    given = {"nll_labels": nll_labels, **references(options)}
    module = DPOLoss(beta=0.3, report_logits=report, **options)
    exact = from_logits(module, torch.float64, labels, hidden, weight, **given)
    assert (exact[0][-1] is not None) == report
    for backend in ("cpu", "eager"):
        if fa.backends()[backend] != "available":
            continue
        with fa.use_backend(backend):
            found = from_logits(module, torch.float32, labels, hidden, weight, **given)
        assert_same(found, exact, rtol=3e-5, atol=3e-6)
    leaf = hidden.clone().requires_grad_()
    plans = [None, "objective"] if module.options.by_pairs and not module.use_weighting else [None]
    for plan in plans:
        found = outcome(module, fa.Head(leaf, weight, plan=plan), leaf, labels, **given)
        assert_same(found, (exact[0], exact[1] @ weight))


def test_a_program_serves():
    if fa.backends()["cpu"] != "available":
        pytest.skip("needs the compiled module fastalign._C")
    hidden, weight, labels, nll_labels = batch(torch.float32)
    module = DPOLoss(loss_type="orpo", report_logits=True)
    module(hidden @ weight.T, labels, nll_labels=nll_labels)
    said = module.fused[True].explain()
    assert "program of" in said
    assert "torch operations" not in said


def test_orpo_of_whole_texts_matches_liger():
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    hidden, weight, labels, nll_labels = batch(torch.float32)
    mine, theirs = (hidden.clone().requires_grad_() for _ in range(2))
    head = liger.LigerFusedLinearORPOLoss(beta=0.3, compiled=False)
    expected, (*_, nll, _, _, _) = _their_outputs(head(weight, theirs, labels, nll_target=nll_labels.repeat(2, 1)))
    out = DPOLoss(loss_type="orpo", beta=0.3)(mine @ weight.T, labels, nll_labels=nll_labels)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.nll.mean(), nll)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, x)[0] for loss, x in ((out.loss, mine), (expected, theirs))), rtol=1e-4, atol=1e-5
    )


def _their_outputs(returned):
    """(loss, the five of every loss and ORPO's three)."""
    loss, more = returned
    assert len(more) >= 5
    return loss, (*more[:5], *[None] * 3)


def test_losses_without_an_nll_report_none_and_take_no_labels_of_one():
    hidden, weight, labels, nll_labels = batch()
    out = DPOLoss()(hidden @ weight.T, labels)
    assert out.nll is out.chosen_logits is out.rejected_logits is None
    with pytest.raises(ValueError, match="nll_labels must be None: loss_type 'sigmoid' has no NLL"):
        DPOLoss()(hidden @ weight.T, labels, nll_labels=nll_labels)
    sums = torch.tensor([-3.0, -5.0])
    of_sums = dpo_loss(sums, sums - 1, loss_type="cpo", nll_normalization="sum")
    assert torch.equal(of_sums.nll, -sums)


def test_bad_labels_of_the_nll_are_named():
    hidden, weight, labels, nll_labels = batch()
    module = DPOLoss(loss_type="orpo")
    with pytest.raises(ValueError, match=r"nll_labels must be a tensor of shape \[4, 7\], one row a pair; got \[8"):
        module(hidden @ weight.T, labels, nll_labels=nll_labels.repeat(2, 1))
    place = tuple((labels[:PAIRS] != -100).nonzero()[0])
    nll_labels[place] = (nll_labels[place] + 1) % VOCAB
    with pytest.raises(ValueError, match="nll_labels must be the chosen rows' labels wherever both count; got others"):
        module(hidden @ weight.T, labels, nll_labels=nll_labels)


# ---------------------------------------------------------------------------------------------------------- mean logits
@pytest.mark.parametrize(
    "options", [{}, {"loss_type": "simpo"}, {"use_weighting": True}, {"temperature": 0.7}], ids=str
)
def test_mean_logits_are_trls(options):
    """TRL's are over all tokens of a side; ours of each response, which its lengths weigh."""
    hidden, weight, labels, _ = batch()
    logits = hidden @ weight.T
    given = references({key: value for key, value in options.items() if key == "loss_type"})
    out = DPOLoss(report_logits=True, **options)(logits, labels, **given)
    plain = DPOLoss(**options)(logits, labels, **given)
    torch.testing.assert_close(out.loss, plain.loss)
    means, mask = logits.mean(-1) / options.get("temperature", 1.0), labels != -100
    for field, at in (("chosen_logits", slice(PAIRS)), ("rejected_logits", slice(PAIRS, None))):
        found, lengths = getattr(out, field), mask[at].sum(-1)
        assert not found.requires_grad
        torch.testing.assert_close((found * lengths).sum() / lengths.sum(), means[at][mask[at]].mean())
