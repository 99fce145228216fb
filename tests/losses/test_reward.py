"""Reward models: pairs, rankings, best of K, and the position of the score."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from fastalign.losses import best_of_k_loss, kwise_reward_loss, last_token_scores, plackett_luce_loss, reward_loss
from fastalign.reference import Sizes, reward

F64 = torch.float64
NAN, INF = float("nan"), float("inf")


def rand(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def value_and_grad(loss, x):
    x = x.clone().requires_grad_()
    out = loss(x)
    return out, torch.autograd.grad(out.loss, x)[0]


LISTS = {"kwise": kwise_reward_loss, "best_of_k": best_of_k_loss}
every_list_loss = pytest.mark.parametrize("loss", LISTS.values(), ids=LISTS)


# -------------------------------------------------------------------------------------------------------------- goldens
@pytest.mark.parametrize("case", reward.CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("sizes", [Sizes(), Sizes(batch=7, list_length=9)], ids=["K3", "K9"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"])
def test_equals_the_papers_formula(as_the_reference, case, sizes, dtype, tolerance):
    as_the_reference(case, sizes, dtype, tolerance)


def test_stored_bradley_terry():
    """exp(r_w - r_l) = 3 and 1: -ln(3/4) and ln 2; a margin of ln 3 makes that ln 2. (r_w + r_l)^2 = (ln 3)^2, 4."""
    chosen, rejected = torch.tensor([math.log(3), 1.0], dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    plain = reward_loss(chosen, rejected)
    assert plain.loss.item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2, abs=1e-14)
    assert plain.accuracy.item() == 0.5  # a draw is not a win
    assert plain.margin.item() == pytest.approx(math.log(3) / 2)
    assert plain.mean_reward.item() == pytest.approx((math.log(3) + 2) / 4)
    margin = reward_loss(chosen, rejected, margin=torch.tensor([math.log(3), 0.0], dtype=F64))
    assert margin.loss.item() == pytest.approx(math.log(2), abs=1e-14)
    assert margin[1:] == plain[1:]
    centred = reward_loss(chosen, rejected, center_coefficient=0.5)
    assert centred.loss.item() == pytest.approx(plain.loss.item() + 0.25 * (math.log(3) ** 2 + 4), abs=1e-14)


def test_stored_kwise():
    """exp(r) = 4, 2, 1: the pairs have probabilities 2/3, 4/5, 2/3, so the loss is (ln 3/2 + ln 5/4 + ln 3/2) / 3."""
    scores = torch.tensor([[4.0, 2.0, 1.0]], dtype=F64).log()
    expected = math.log(1.5 * 1.25 * 1.5) / 3
    assert kwise_reward_loss(scores).loss.item() == pytest.approx(expected, abs=1e-14)
    # ranks 0, 1, 1: the tied pair is neither summed nor counted
    tied = kwise_reward_loss(scores, ranks=torch.tensor([[0, 1, 1]]))
    assert tied.loss.item() == pytest.approx(math.log(1.5 * 1.25) / 2, abs=1e-14)
    assert tied.margin.item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    # the best completion last: its softmax probability is 1/7
    best = best_of_k_loss(scores, best=torch.tensor([2]))
    assert best.loss.item() == pytest.approx(math.log(7), abs=1e-14)
    assert best.accuracy.item() == 0
    assert best_of_k_loss(scores).loss.item() == pytest.approx(math.log(7 / 4), abs=1e-14)


@pytest.mark.parametrize("margin", [False, True], ids=["plain", "margin"])
@pytest.mark.parametrize("center", [None, 0.01], ids=["free", "centred"])
def test_equals_trl(margin, center):
    """TRL's own `RewardTrainer.compute_loss`, run on a model that returns the scores it is given."""
    trl = pytest.importorskip("trl", reason="needs trl (the extra `dev`)")
    scores = rand(10, scale=2).requires_grad_()
    accelerator = SimpleNamespace(gather=lambda t: t, gather_for_metrics=lambda t: t)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=center),
        accelerator=accelerator,
        _total_train_tokens=0,
        _metrics={"eval": defaultdict(list)},
    )
    inputs = {"attention_mask": torch.ones(10, 3)} | ({"margin": rand(5, seed=3).abs()} if margin else {})
    model = lambda **_: SimpleNamespace(logits=scores.unsqueeze(-1))  # noqa: E731
    theirs = trl.RewardTrainer.compute_loss(trainer, model, dict(inputs))
    ours = reward_loss(scores[:5], scores[5:], margin=inputs.get("margin"), center_coefficient=center or 0.0)
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-14, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x, scores)[0] for x in (ours.loss, theirs)))
    for name in ("accuracy", "margin", "mean_reward"):
        assert getattr(ours, name).item() == pytest.approx(trainer._metrics["eval"][name][0], rel=1e-6)


# ---------------------------------------------------------------------------------------------------------- metamorphic
def test_two_completions_are_a_pair():
    s = rand(9, 2, scale=3)
    pair = reward_loss(s[:, 0], s[:, 1])
    for name, value in kwise_reward_loss(s)._asdict().items():
        torch.testing.assert_close(value, getattr(pair, name), rtol=1e-14, atol=0)
    assert torch.equal(best_of_k_loss(s).loss, pair.loss)
    assert torch.equal(plackett_luce_loss(s).loss, pair.loss)


def test_a_constant_margin_is_a_tensor_of_it():
    a, b = rand(2, 4)
    assert torch.equal(
        reward_loss(a, b, margin=0.5).loss, reward_loss(a, b, margin=torch.full((4,), 0.5, dtype=F64)).loss
    )


def test_order_does_not_matter():
    s, ranks = rand(5, 4), torch.randint(0, 3, (5, 4), generator=torch.Generator().manual_seed(2))
    rows, columns = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([2, 3, 0, 1])
    out = kwise_reward_loss(s, ranks=ranks)
    moved = kwise_reward_loss(s[rows][:, columns], ranks=ranks[rows][:, columns])
    torch.testing.assert_close(moved, out, rtol=1e-13, atol=1e-15)
    a, b = s[:, 0], s[:, 1]
    torch.testing.assert_close(reward_loss(a[rows], b[rows]), reward_loss(a, b), rtol=1e-13, atol=1e-15)


@every_list_loss
@pytest.mark.parametrize("hidden", [NAN, INF, -INF, 1e30])
def test_hidden_completions_change_nothing(loss, hidden):
    s = rand(4, 3)
    wide = torch.full((4, 6), hidden, dtype=F64)
    mask = torch.zeros(4, 6, dtype=torch.bool)
    wide[:, 1:6:2], mask[:, 1:6:2] = s, True
    out, grad = value_and_grad(loss, s)
    padded, padded_grad = value_and_grad(lambda x: loss(x, mask=mask), wide)
    torch.testing.assert_close(padded, out, rtol=1e-14, atol=0)
    torch.testing.assert_close(padded_grad[mask].view(4, 3), grad, rtol=1e-14, atol=0)
    assert (padded_grad[~mask] == 0).all()


@pytest.mark.parametrize("hidden", [NAN, INF, -INF])
def test_hidden_pairs_change_nothing(hidden):
    a, b, margin = rand(3, 4)
    filler = torch.full((2,), hidden, dtype=F64)
    mask = torch.tensor([True] * 4 + [False] * 2)
    wide = torch.cat([margin, filler])
    out, grad = value_and_grad(lambda x: reward_loss(x, b, margin=margin, center_coefficient=0.1), a)
    padded, padded_grad = value_and_grad(
        lambda x: reward_loss(x, torch.cat([b, filler]), margin=wide, center_coefficient=0.1, mask=mask),
        torch.cat([a, filler]),
    )
    torch.testing.assert_close(padded, out, rtol=1e-14, atol=0)
    torch.testing.assert_close(padded_grad, torch.cat([grad, torch.zeros(2, dtype=F64)]), rtol=1e-14, atol=0)


@every_list_loss
def test_lists_of_fewer_than_two_contribute_nothing(loss):
    s = rand(4, 3)
    mask = torch.tensor([[True, True, True], [False, True, False], [False, False, False], [True, False, True]])
    out, grad = value_and_grad(lambda x: loss(x, mask=mask), s)
    torch.testing.assert_close(out, loss(s[[0, 3]], mask=mask[[0, 3]]), rtol=1e-14, atol=0)
    assert (grad[[1, 2]] == 0).all()


@every_list_loss
@pytest.mark.parametrize("shape", [(3, 1), (3, 4), (0, 4)], ids=["K1", "all_hidden", "no_list"])
def test_nothing_to_compare_is_zero(loss, shape):
    mask = torch.ones(shape, dtype=torch.bool) if shape[1] == 1 else torch.zeros(shape, dtype=torch.bool)
    out, grad = value_and_grad(lambda x: loss(x, mask=mask), rand(*shape))
    assert all(field.item() == 0 for field in out)
    assert torch.equal(grad, torch.zeros(shape, dtype=F64))


def test_no_pair_is_zero():
    out = reward_loss(rand(3), rand(3, seed=1), mask=torch.zeros(3, dtype=torch.bool), center_coefficient=1.0)
    assert all(field.item() == 0 for field in out)
    assert reward_loss(rand(0), rand(0)).loss.item() == 0


def test_microbatches_add_up():
    s = rand(6, 5)
    out, grad = value_and_grad(kwise_reward_loss, s)
    parts = [value_and_grad(kwise_reward_loss, s[i]) for i in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close((2 * parts[0][0].loss + 4 * parts[1][0].loss) / 6, out.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.cat([2 * parts[0][1], 4 * parts[1][1]]) / 6, grad)


def test_all_tied_is_no_pair():
    out, grad = value_and_grad(lambda x: kwise_reward_loss(x, ranks=torch.zeros(2, 4)), rand(2, 4))
    assert all(field.item() == 0 for field in out)
    assert (grad == 0).all()


# --------------------------------------------------------------------------------------------------------- large values
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_of_1e4_neither_overflow_nor_lose_the_gradient(sign, dtype):
    s = torch.tensor([[sign * 1e4, -sign * 1e4]], dtype=dtype)
    for loss in (kwise_reward_loss, best_of_k_loss, lambda x: reward_loss(x[:, 0], x[:, 1])):
        out, grad = value_and_grad(loss, s)
        assert out.loss.dtype == torch.float32
        assert out.loss.item() == pytest.approx(0.0 if sign > 0 else 2e4, rel=1e-2)
        assert grad.tolist() == [[0.0, 0.0] if sign > 0 else [-1.0, 1.0]]


def test_64_completions():
    s, everything = rand(2, 64, scale=3), torch.ones(2, 64, dtype=torch.bool)
    torch.testing.assert_close(kwise_reward_loss(s).loss, reward.kwise(s, everything))
    first = torch.zeros(2, dtype=torch.int64)
    torch.testing.assert_close(best_of_k_loss(s).loss, reward.best_of_k(s, everything, first))


def test_gradcheck():
    mask = torch.arange(4) < torch.tensor([[4], [2], [1]])
    s = rand(3, 4).requires_grad_()
    for loss in LISTS.values():
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, mask=mask).loss, s)
    pairs = (rand(4).requires_grad_(), rand(4, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: reward_loss(a, b, margin=0.3, center_coefficient=0.1).loss, pairs)


# -------------------------------------------------------------------------------------------- the position of the score
@pytest.mark.parametrize("filler", [0.0, NAN, INF])
def test_score_is_read_at_the_last_real_token(filler):
    values = torch.full((4, 5), filler, dtype=F64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    values[mask] = torch.arange(1.0, 9.0, dtype=F64)
    scores, at = values.requires_grad_(), torch.tensor([2, 4, 3])
    out = last_token_scores(scores, mask)
    assert out.tolist() == [3.0, 6.0, 8.0, 0.0]
    (grad,) = torch.autograd.grad(out.sum(), scores)
    expected = torch.zeros(4, 5, dtype=F64)
    expected[torch.arange(3), at] = 1
    assert torch.equal(grad, expected)


def test_score_positions_take_any_leading_shape():
    values, mask = rand(2, 3, 4), torch.arange(4) < torch.tensor([[1, 2, 3], [4, 4, 0]]).unsqueeze(-1)
    out = last_token_scores(values, mask)
    assert out.shape == (2, 3)
    assert torch.equal(out.flatten(), last_token_scores(values.flatten(0, 1), mask.flatten(0, 1)))
    assert last_token_scores(values.bfloat16(), mask).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------------ bad input
S, M = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
BAD = {
    "no_tensor": (lambda: reward_loss([1.0], torch.zeros(1)), TypeError, "chosen must be a torch.Tensor; got list"),
    "integers": (lambda: reward_loss(torch.zeros(2), torch.zeros(2).long()), TypeError, "rejected must be a floating"),
    "shapes": (lambda: reward_loss(torch.zeros(2), torch.zeros(3)), ValueError, r"rejected must have shape \[2\]"),
    "margin_shape": (lambda: reward_loss(S, S, margin=torch.zeros(2)), ValueError, r"margin must have shape \[2, 3\]"),
    "margin_type": (
        lambda: reward_loss(S, S, margin="a"),
        TypeError,
        "margin must be None, a number or a torch.Tensor",
    ),
    "margin_nan": (lambda: reward_loss(S, S, margin=NAN), ValueError, "margin must be in"),
    "center": (lambda: reward_loss(S, S, center_coefficient=-1.0), ValueError, "center_coefficient must be in"),
    "pair_mask": (lambda: reward_loss(S, S, mask=M.long()), TypeError, "mask must be a boolean tensor"),
    "one_dim": (lambda: kwise_reward_loss(torch.zeros(3)), ValueError, r"scores must be \[B, K\] with K >= 1"),
    "no_entry": (lambda: best_of_k_loss(torch.zeros(3, 0)), ValueError, r"scores must be \[B, K\] with K >= 1"),
    "mask_dtype": (lambda: kwise_reward_loss(S, mask=S), TypeError, "mask must be a boolean tensor"),
    "mask_shape": (lambda: kwise_reward_loss(S, mask=M[:1]), ValueError, r"mask must have shape \[2, 3\]"),
    "ranks_type": (lambda: kwise_reward_loss(S, ranks=[[0, 1, 2]]), TypeError, "ranks must be a torch.Tensor"),
    "ranks_dtype": (lambda: kwise_reward_loss(S, ranks=M), TypeError, "ranks must be an integer or floating"),
    "ranks_shape": (lambda: kwise_reward_loss(S, ranks=S[:, :2]), ValueError, r"ranks must have shape \[2, 3\]"),
    "best_dtype": (lambda: best_of_k_loss(S, best=torch.zeros(2)), TypeError, "best must be an int64 or int32 tensor"),
    "best_shape": (lambda: best_of_k_loss(S, best=torch.zeros(3).long()), ValueError, r"best must have shape \[2\]"),
    "best_range": (lambda: best_of_k_loss(S, best=torch.tensor([0, 3])), ValueError, "got 3 for list 1"),
    "best_hidden": (
        lambda: best_of_k_loss(S, best=torch.tensor([0, 2]), mask=torch.arange(3).expand(2, 3) < 2),
        ValueError,
        "best must point at a real entry of its list; got 2 for list 1",
    ),
    "last_mask": (lambda: last_token_scores(S, M[:, :2]), ValueError, r"mask must have shape \[2, 3\]"),
    "last_dtype": (lambda: last_token_scores(S, S), TypeError, "mask must be a boolean tensor"),
    "last_empty": (lambda: last_token_scores(S[:, :0], M[:, :0]), ValueError, r"token_scores must be \[..., T\]"),
    "last_scalar": (lambda: last_token_scores(torch.zeros(()), M), ValueError, r"token_scores must be \[..., T\]"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
