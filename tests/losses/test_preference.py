"""Pairwise preference losses (and where they share tests, KTO): exact values, limits, invariances, what they refuse."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign.losses import DPOLoss, KTOLoss, dpo_loss, kto_loss
from fastalign.losses.preference import F_DIVERGENCES, PAIRWISE

OPTIONS = {"exo_pair": {"label_smoothing": 0.1}, "discopop": {"discopop_tau": 0.5}}
EVERY = sorted(PAIRWISE)
WITH_REFERENCE = [name for name in EVERY if "reference" in PAIRWISE[name].honours]
# AOT sorts the batch: it is the one family whose loss is not a mean over independent pairs.
COUPLED = ("aot", "aot_unpaired")


def make(name, **more):
    """Keyword arguments of one loss, with what it cannot do without. NLL terms by sequence: a mean over pairs."""
    return {"loss_type": name, "nll_normalization": "sequence", **OPTIONS.get(name, {}), **more}


def sides(name, pairs, dtype=torch.float64, seed=0, scale=3.0):
    """(chosen, rejected[, references]) log-probabilities and lengths for one loss."""
    generator = torch.Generator().manual_seed(seed)
    logps = -10 + scale * torch.randn((4, pairs), generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 9, (2, pairs), generator=generator)
    used = logps if name in WITH_REFERENCE else logps[:2]
    return [t.to(dtype) for t in used], {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}


def batch(pairs=4, length=6, vocab=11, seed=0):
    """Logits, labels with ragged completions of at least one token, and reference logits: [2B, T(, V)], float64."""
    generator = torch.Generator().manual_seed(seed)
    logits, ref_logits = torch.randn((2, 2 * pairs, length, vocab), generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocab, (2 * pairs, length), generator=generator)
    ends = torch.randint(2, length + 1, (2 * pairs, 1), generator=generator)
    place = torch.arange(length)
    return logits, labels.masked_fill((place < 1) | (place >= ends), -100), ref_logits


def run(name, logits, labels, ref_logits, **more):
    """Loss and gradient of one loss from logits."""
    logits = logits.clone().requires_grad_()
    reference = {"ref_logits": ref_logits} if name in WITH_REFERENCE else {}
    out = DPOLoss(**make(name, **more))(logits, labels, **reference)
    out.loss.backward()
    return out, logits.grad


# --------------------------------------------------------------------------------------------------------- exact values
@pytest.mark.parametrize("pairs", [1, 3, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_first_step_is_exactly_ln2(pairs, dtype):
    logits, labels, _ = batch(pairs)
    logits = logits.to(dtype)
    out = DPOLoss()(logits.requires_grad_(), labels, ref_logits=logits.detach().clone())
    assert out.loss.item() == torch.tensor(math.log(2), dtype=torch.float32).item()
    for metric in (out.chosen_rewards, out.rejected_rewards, out.margins, out.accuracies):
        assert torch.equal(metric, torch.zeros(pairs))


def test_accuracy_is_strict_and_metrics_are_per_pair():
    chosen, rejected = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-2.0, -2.0, -2.0])
    out = dpo_loss(chosen.requires_grad_(), rejected, torch.zeros(3), torch.zeros(3), beta=0.5)
    assert out.accuracies.tolist() == [1.0, 0.0, 0.0]
    assert out.chosen_rewards.tolist() == [-0.5, -1.0, -1.5]
    assert out.margins.tolist() == [0.5, 0.0, -0.5]
    assert torch.equal(out.chosen_logps, chosen)
    assert out.loss.requires_grad
    assert not any(metric.requires_grad for metric in out[1:] if metric is not None)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("divergence", sorted(F_DIVERGENCES))
def test_finite_at_ten_thousand(name, divergence):
    if divergence != "reverse_kl" and "f_divergence" not in PAIRWISE[name].honours:
        divergence = "reverse_kl"
    logps = torch.tensor([[1e4, -1e4, -1e4, 0.0], [-1e4, 1e4, 0.0, -1e4]]).unbind(0)
    reference = [torch.zeros(4), torch.zeros(4)] if name in WITH_REFERENCE else []
    leaves = [t.clone().requires_grad_() for t in logps]
    lengths = torch.tensor([1, 2, 0, 4])  # an empty completion too
    options = make(name, chosen_lengths=lengths, rejected_lengths=lengths.flip(0), f_divergence=divergence)
    out = dpo_loss(*leaves, *reference, **options)
    out.loss.backward()
    assert out.loss.isfinite()
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves)  # sft has no rejected side
    assert leaves[0].grad is not None


@pytest.mark.parametrize("name", EVERY)
def test_gradcheck(name):
    tensors, lengths = sides(name, 5)
    leaves = tuple(t.requires_grad_() for t in tensors[:2])
    assert torch.autograd.gradcheck(
        lambda w, l: dpo_loss(w, l, *tensors[2:], **make(name, **lengths)).loss,  # noqa: E741
        leaves,
    )


@pytest.mark.parametrize("name", EVERY)
def test_dtypes(name):
    tensors, lengths = sides(name, 5)
    assert dpo_loss(*tensors, **make(name, **lengths)).loss.dtype == torch.float64
    for low in (torch.bfloat16, torch.float16):
        tensors, lengths = sides(name, 5, low)
        loss = dpo_loss(*tensors, **make(name, **lengths)).loss
        assert loss.dtype == torch.float32
        assert torch.equal(loss, dpo_loss(*(t.float() for t in tensors), **make(name, **lengths)).loss)


# --------------------------------------------------------------------------------------------------- limits, identities
def test_beta_to_zero():
    """-log sigmoid(beta Delta) = ln 2 - beta Delta / 2 + O(beta^2)."""
    tensors, _ = sides("sigmoid", 6)
    delta = (tensors[0] - tensors[1] - tensors[2] + tensors[3]).mean()
    loss = dpo_loss(*tensors, beta=1e-6).loss
    torch.testing.assert_close((math.log(2) - loss) / 1e-6, delta / 2, rtol=1e-4, atol=0)


def test_robust_is_unbiased_under_flips():
    """Chowdhury et al. 2024: the expectation over labels flipped with probability e is the loss on clean labels."""
    (w, l, rw, rl), _ = sides("robust", 6)  # noqa: E741
    e = 0.3
    straight = dpo_loss(w, l, rw, rl, loss_type="robust", label_smoothing=e).loss
    flipped = dpo_loss(l, w, rl, rw, loss_type="robust", label_smoothing=e).loss
    torch.testing.assert_close((1 - e) * straight + e * flipped, dpo_loss(w, l, rw, rl).loss)


def test_exo_is_zero_where_it_matches_its_target():
    """KL(sigmoid(z) || 1 - e) = 0 at z = log((1 - e) / e)."""
    z = torch.tensor([math.log(0.9 / 0.1)], dtype=torch.float64)
    loss = dpo_loss(z, 0 * z, beta=1.0, loss_type="exo_pair", label_smoothing=0.1).loss
    assert abs(loss) < 1e-15


@pytest.mark.parametrize(("alpha", "same_as"), [(0.0, "reverse_kl"), (1.0, "forward_kl")])
def test_alpha_divergence_ends(alpha, same_as):
    tensors, _ = sides("sigmoid", 6)
    ours = dpo_loss(*tensors, f_divergence="alpha_divergence", f_alpha=alpha).loss
    torch.testing.assert_close(ours, dpo_loss(*tensors, f_divergence=same_as).loss)


def test_averages_are_given_logps_divided_by_lengths():
    tensors, lengths = sides("sigmoid", 6)
    nw, nl = lengths["chosen_lengths"], lengths["rejected_lengths"]
    halves = [t / n for t, n in zip(tensors, (nw, nl, nw, nl), strict=True)]
    assert torch.equal(dpo_loss(*tensors, average=True, **lengths).loss, dpo_loss(*halves).loss)
    assert torch.equal(dpo_loss(*tensors, loss_type="ipo_avg", **lengths).loss, dpo_loss(*halves, loss_type="ipo").loss)


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_reference_free_is_a_reference_of_zeros(name):
    tensors, lengths = sides(name, 6)
    zeros = torch.zeros(6, dtype=torch.float64)
    options = make(name, **lengths)
    assert torch.equal(dpo_loss(*tensors[:2], **options).loss, dpo_loss(*tensors[:2], zeros, zeros, **options).loss)


def test_weighted_sums():
    tensors, lengths = sides("sigmoid", 6)
    parts = {name: dpo_loss(*tensors, loss_type=name).loss for name in ("sigmoid", "hinge", "bco_pair")}
    mixed = dpo_loss(*tensors, loss_type={"sigmoid": 0.8, "hinge": -0.5, "bco_pair": 0.2}).loss
    expected = 0.8 * parts["sigmoid"] - 0.5 * parts["hinge"] + 0.2 * parts["bco_pair"]
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(
        dpo_loss(*tensors, loss_type=["sigmoid", "hinge"]).loss, parts["sigmoid"] + parts["hinge"]
    )
    sppo = dpo_loss(*tensors, loss_type="sppo").loss
    assert torch.equal(dpo_loss(*tensors, loss_type="sppo_hard").loss, sppo)
    assert torch.equal(dpo_loss(*tensors, loss_type=["sigmoid"], **lengths).loss, parts["sigmoid"])


def test_length_term_is_no_reward():
    tensors, lengths = sides("sigmoid", 6)
    plain, regularised = dpo_loss(*tensors), dpo_loss(*tensors, length_alpha=0.5, **lengths)
    assert plain.loss != regularised.loss
    assert torch.equal(plain.margins, regularised.margins)


@pytest.mark.parametrize(("alpha", "slope"), [(0.0, 0.0), (0.05, -0.5), (-0.05, 0.5)])
def test_length_regularisation_shortens(alpha, slope):
    """A bandit with arms of length 1..6 and raters who do not care: pairs come in both orders. DPO then has nothing to
    learn (alpha = 0 stays at the reference), and DPO-R must find the optimum of the length-penalised objective,
    pi ~ pi_ref exp(-alpha |y| / beta): shorter for alpha > 0, longer for alpha < 0."""
    lengths = torch.arange(1, 7)
    reference = torch.log_softmax(torch.tensor([0.0, 0.5, 0.2, -0.3, 0.1, 0.4], dtype=torch.float64), 0)
    policy = reference.clone().requires_grad_()
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    w, l = pairs[pairs[:, 0] != pairs[:, 1]].unbind(1)  # noqa: E741
    optimizer = torch.optim.LBFGS([policy], lr=1, max_iter=300, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        logps = torch.log_softmax(policy, 0)
        sized = {"length_alpha": alpha, "chosen_lengths": lengths[w], "rejected_lengths": lengths[l]}
        loss = dpo_loss(logps[w], logps[l], reference[w], reference[l], beta=0.1, **sized).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    found = torch.log_softmax(policy.detach(), 0)
    torch.testing.assert_close(found, torch.log_softmax(reference + slope * lengths, 0), atol=1e-5, rtol=0)
    change = (found.exp() - reference.exp()) @ lengths.double()
    assert change < -0.5 if alpha > 0 else change > 0.5 if alpha < 0 else abs(change) < 1e-6


@pytest.mark.parametrize("name", sorted(PAIRWISE))
def test_one_pair_is_the_mean_of_two_alike(name):
    """Its loss, which is no mean of several, is the same to the bit, and so is its gradient."""
    options = {"label_smoothing": 0.1} if name == "exo_pair" else {}
    of = {}
    for count in (1, 2):
        logps = [torch.full((count,), x, requires_grad=True) for x in (-3.25, -4.5)]
        refs = [torch.full((count,), x) for x in (-3.0, -5.0)] if "reference" in PAIRWISE[name].honours else [None] * 2
        lengths = {f"{side}_lengths": torch.full((count,), 3) for side in ("chosen", "rejected")}
        loss = dpo_loss(*logps, *refs, loss_type=name, **lengths, **options).loss
        grads = torch.autograd.grad(loss, logps, allow_unused=True)
        of[count] = loss, [None if g is None else g.sum() for g in grads]
        assert loss.shape == ()
    assert torch.equal(of[1][0], of[2][0])
    for one, two in zip(of[1][1], of[2][1], strict=True):
        assert (one is None and two is None) or torch.equal(one, two)


# ----------------------------------------------------------------------------------------- invariances, from the logits
@pytest.mark.parametrize("name", EVERY)
def test_what_may_not_change_the_loss(name):
    logits, labels, ref_logits = batch()
    out, grad = run(name, logits, labels, ref_logits)

    shift = torch.randn(labels.shape, dtype=torch.float64).unsqueeze(-1)
    shifted, shifted_grad = run(name, logits + 7 * shift, labels, ref_logits - shift)
    torch.testing.assert_close(shifted.loss, out.loss)
    torch.testing.assert_close(shifted_grad, grad)

    for left, right in ((3, 0), (0, 2)):  # padding of either side, and what it hides is not a number
        pad = (0, 0, left, right)
        wide = [torch.nn.functional.pad(t, pad, value=math.nan) for t in (logits, ref_logits)]
        padded, padded_grad = run(name, wide[0], torch.nn.functional.pad(labels, pad[2:], value=-100), wide[1])
        torch.testing.assert_close(padded.loss, out.loss)
        torch.testing.assert_close(padded_grad[:, left : left + labels.shape[1]], grad)
        assert padded_grad.isfinite().all()
    hidden = (labels == -100).unsqueeze(-1)
    masked, masked_grad = run(name, logits.masked_fill(hidden, math.inf), labels, ref_logits)
    assert torch.equal(masked.loss, out.loss)
    assert torch.equal(masked_grad, grad)

    order = torch.tensor([2, 0, 3, 1])
    rows = torch.cat([order, order + 4])
    permuted, permuted_grad = run(name, logits[rows], labels[rows], ref_logits[rows])
    torch.testing.assert_close(permuted.loss, out.loss)
    torch.testing.assert_close(permuted_grad, grad[rows])


@pytest.mark.parametrize("name", [name for name in EVERY if name not in COUPLED])
def test_microbatches_average_to_the_batch(name):
    logits, labels, ref_logits = batch()
    out, grad = run(name, logits, labels, ref_logits)
    losses, grads = [], torch.zeros_like(grad)
    for pairs in ([0, 1], [2, 3]):
        rows = torch.tensor([*pairs, *(pair + 4 for pair in pairs)])
        part, grads[rows] = run(name, logits[rows], labels[rows], ref_logits[rows])
        losses.append(part.loss)
    torch.testing.assert_close(sum(losses) / 2, out.loss)
    torch.testing.assert_close(grads / 2, grad)


def test_precomputed_references_equal_reference_logits():
    logits, labels, ref_logits = batch()
    module = DPOLoss(temperature=0.7, softcap=4.0)
    free = module(ref_logits, labels)
    given = module(logits, labels, ref_chosen_logps=free.chosen_logps, ref_rejected_logps=free.rejected_logps)
    assert torch.equal(given.loss, module(logits, labels, ref_logits=ref_logits).loss)
    assert given.loss != DPOLoss()(logits, labels, ref_logits=ref_logits).loss


def test_the_reference_is_a_constant():
    logits, labels, ref_logits = batch()
    leaf, ref_leaf = logits.requires_grad_(), ref_logits.requires_grad_()
    DPOLoss()(leaf, labels, ref_logits=ref_leaf).loss.backward()
    KTOLoss()(leaf, labels, torch.ones(8).bool(), ref_logits=ref_leaf).loss.backward()
    w, l, *references = (torch.randn(3, requires_grad=True) for _ in range(4))  # noqa: E741
    dpo_loss(w, l, *references).loss.backward()
    kto_loss(w, torch.ones(3).bool(), references[0]).loss.backward()
    assert all(tensor.grad is None for tensor in (ref_leaf, *references))


def test_in_place_backward_gives_the_same_gradient_and_keeps_the_reference():
    logits, labels, ref_logits = batch()
    _, grad = run("sigmoid", logits, labels, ref_logits)
    leaf = logits.clone().requires_grad_()
    scratch, kept = leaf * 1.0, ref_logits.clone()
    DPOLoss(inplace_backward=True)(scratch, labels, ref_logits=ref_logits).loss.backward()
    torch.testing.assert_close(leaf.grad, grad)
    assert torch.equal(ref_logits, kept)


def test_compiles_without_graph_break():
    tensors, lengths = sides("sigmoid", 4, torch.float32)
    options = {"label_smoothing": 0.1, "length_alpha": 0.01, **lengths}
    compiled = torch.compile(lambda *t: dpo_loss(*t, **options).loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors), dpo_loss(*tensors, **options).loss)


# ------------------------------------------------------------------------------------------------------------ bad input
PAIR = torch.zeros(3)
BAD = [
    ({"loss_type": "dppo"}, ValueError, "loss_type must be one of"),
    ({"loss_type": []}, ValueError, "at least one"),
    ({"loss_type": ["sigmoid", "sigmoid"]}, ValueError, "once"),
    ({"loss_type": {"sigmoid": math.nan}}, ValueError, "weight of loss_type 'sigmoid'"),
    ({"beta": 0.0}, ValueError, "beta must be in"),
    ({"beta": math.nan}, ValueError, "beta must be in"),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be in"),
    ({"label_smoothing": 0.1, "loss_type": "ipo"}, ValueError, "label_smoothing has no effect"),
    ({"length_alpha": 0.1, "loss_type": "ipo"}, ValueError, "length_alpha has no effect"),
    ({"f_divergence": "forward_kl", "loss_type": "sppo"}, ValueError, "f_divergence has no effect"),
    ({"f_divergence": "chi"}, ValueError, "f_divergence must be one of"),
    ({"label_smoothing": 0.5, "loss_type": "robust"}, ValueError, "below 0.5"),
    ({"loss_type": "exo_pair"}, ValueError, "exo_pair"),
    ({"length_alpha": 0.1}, ValueError, "chosen_lengths and rejected_lengths are needed"),
    ({"loss_type": "simpo"}, ValueError, "chosen_lengths and rejected_lengths are needed"),
    ({"chosen_lengths": PAIR}, ValueError, "must both be given"),
    ({"chosen_lengths": PAIR, "rejected_lengths": PAIR[:2]}, ValueError, "rejected_lengths must have shape"),
    ({"ref_chosen_logps": PAIR}, ValueError, "ref_chosen_logps and ref_rejected_logps must both"),
    ({"ref_chosen_logps": PAIR[:2], "ref_rejected_logps": PAIR}, ValueError, "ref_chosen_logps must have shape"),
    ({"chosen_logps": PAIR.long()}, TypeError, "chosen_logps must be a floating-point"),
    ({"chosen_logps": torch.zeros(3, 2)}, ValueError, r"chosen_logps must have shape \[B\]"),
    ({"rejected_logps": PAIR[:2]}, ValueError, "rejected_logps must have shape"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        dpo_loss(**{"chosen_logps": PAIR, "rejected_logps": PAIR, **arguments})


def test_bad_input_of_the_modules():
    logits, labels, ref_logits = batch()
    with pytest.raises(ValueError, match="2B"):
        DPOLoss()(logits[:3], labels[:3])
    with pytest.raises(ValueError, match="not both"):
        DPOLoss()(logits, labels, ref_logits=ref_logits, ref_chosen_logps=PAIR)
    with pytest.raises(ValueError, match="ref_logits must be None"):
        DPOLoss(loss_type="cpo")(logits, labels, ref_logits=ref_logits)
    with pytest.raises(ValueError, match="ref_chosen_logps must be None"):
        dpo_loss(PAIR, PAIR, PAIR, PAIR, loss_type="simpo", chosen_lengths=PAIR, rejected_lengths=PAIR)
    with pytest.raises(TypeError, match="unknown"):
        DPOLoss(unknown=1)
    with pytest.raises(ValueError, match=r"logits must be \[B, T, V\]"):
        KTOLoss()(logits[0], labels[0], PAIR.bool())
    with pytest.raises(ValueError, match="not both"):
        KTOLoss()(logits, labels, torch.ones(8).bool(), ref_logits=ref_logits, ref_logps=torch.zeros(8))
