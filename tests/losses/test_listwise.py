"""Ranked lists: Plackett-Luce, ListMLE and PRO."""

import math

import pytest
import torch

import fastalign as fa
from fastalign.losses import PROLoss, plackett_luce_loss, pro_loss, reward_loss
from fastalign.reference import Sizes, listwise

F64 = torch.float64
NAN, INF = float("nan"), float("inf")


def rand(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def value_and_grad(loss, x):
    x = x.clone().requires_grad_()
    out = loss(x)
    return out, torch.autograd.grad(out.loss, x)[0]


def best_first_rewards(b, k, seed=1):
    return rand(b, k, seed=seed).sort(-1, descending=True).values


def pro_as_printed(s, r):
    """The authors' loop, unshifted, on one list: sum_k log(e^{s_k T_k} + sum_{i>k} e^{s_i (r_k - r_i)}) - s_k T_k."""
    total = 0.0
    for k in range(len(s) - 1):
        gaps = [r[k] - r[i] for i in range(k + 1, len(s))]
        denominator = math.exp(s[k] * max(gaps)) + sum(
            math.exp(s[i] * gap) for i, gap in zip(range(k + 1, len(s)), gaps, strict=True)
        )
        total += math.log(denominator) - s[k] * max(gaps)
    return total


FUNCTIONS = {
    "plackett_luce": lambda s, mask=None, rewards=None: plackett_luce_loss(s, mask=mask),
    "pro": lambda s, mask=None, rewards=None: pro_loss(s, mask=mask, sft_weight=0.1),
    "pro_infonce": lambda s, mask=None, rewards=None: pro_loss(s, mask=mask, form="infonce"),
    "pro_rewards": lambda s, mask=None, rewards=None: pro_loss(s, mask=mask, rewards=rewards, sft_weight=0.1),
    "listmle": lambda s, mask=None, rewards=None: plackett_luce_loss(s, ranks=-rewards, mask=mask),
}
every_function = pytest.mark.parametrize("loss", FUNCTIONS.values(), ids=FUNCTIONS)


# -------------------------------------------------------------------------------------------------------------- goldens
@pytest.mark.parametrize("case", listwise.CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("sizes", [Sizes(), Sizes(batch=3, length=5, vocab=17, list_length=6)], ids=["K3", "K6"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (torch.float32, 2e-5)], ids=["float64", "float32"])
def test_equals_the_papers_formula(as_the_reference, case, sizes, dtype, tolerance):
    as_the_reference(case, sizes, dtype, tolerance)


def test_stored_plackett_luce():
    """exp(s) = 4, 2, 1: the likelihood of the order is 4/7 * 2/3 = 8/21, so PL = ln(21/8); its first factor is 4/7."""
    s = torch.tensor([[4.0, 2.0, 1.0]], dtype=F64).log()
    assert plackett_luce_loss(s).loss.item() == pytest.approx(math.log(21 / 8), abs=1e-14)
    assert pro_loss(s).loss.item() == pytest.approx(math.log(21 / 8), abs=1e-14)
    assert pro_loss(s, form="infonce").loss.item() == pytest.approx(math.log(7 / 4), abs=1e-14)


def test_stored_pro_with_temperatures_and_sft():
    """exp(s) = 1/2, 1/4, 1/8, rewards 3, 2, 0.

    k = 1: T = 1, 3, T_1 = 3: ln(1/8 + 1/4 + 1/512) - ln(1/8) = ln(193/64). k = 2: T_2 = T_23 = 2:
    ln(1/16 + 1/64) - ln(1/16) = ln(5/4). SFT: (3 - 1)^2 * 0.05 * ln 2.
    """
    s = torch.tensor([[0.5, 0.25, 0.125]], dtype=F64).log()
    out = pro_loss(s, rewards=torch.tensor([[3.0, 2.0, 0.0]], dtype=F64), sft_weight=0.05)
    assert out.list_loss.item() == pytest.approx(math.log(193 / 64) + math.log(5 / 4), abs=1e-14)
    assert out.sft_loss.item() == pytest.approx(4 * math.log(2), abs=1e-14)
    assert out.loss.item() == pytest.approx(math.log(193 / 64) + math.log(5 / 4) + 0.2 * math.log(2), abs=1e-14)


def test_equals_the_authors_loop():
    s, r = rand(6, 5, scale=2), best_first_rewards(6, 5)
    expected = sum(pro_as_printed(a, b) for a, b in zip(s.tolist(), r.tolist(), strict=True)) / 6
    assert pro_loss(s, rewards=r).loss.item() == pytest.approx(expected, rel=1e-13)


def test_sft_takes_its_own_logps():
    s, sums = rand(2, 3), rand(2, 3, seed=4)
    out = pro_loss(s, sft_weight=0.5, sft_logps=sums)
    assert out.sft_loss.item() == pytest.approx(-4 * sums[:, 0].mean().item(), rel=1e-14)
    assert out.loss.item() == pytest.approx(plackett_luce_loss(s).loss.item() + 0.5 * out.sft_loss.item(), rel=1e-14)


# ---------------------------------------------------------------------------------------------------------- metamorphic
def test_two_entries_are_a_pair():
    s = rand(7, 2, scale=3)
    pair = reward_loss(s[:, 0], s[:, 1])
    for out in (plackett_luce_loss(s), pro_loss(s), pro_loss(s, form="infonce")):
        assert torch.equal(out.loss, pair.loss)
        assert torch.equal(out.accuracy, pair.accuracy)
        assert torch.equal(out.margin, pair.margin)
    gaps = torch.rand(7, dtype=F64)
    rewards = torch.stack([gaps, torch.zeros(7, dtype=F64)], -1)
    expected = -torch.nn.functional.logsigmoid(gaps * (s[:, 0] - s[:, 1])).mean()
    torch.testing.assert_close(pro_loss(s, rewards=rewards).loss, expected)


def test_without_a_shift_nothing_changes_under_one():
    s = rand(4, 5)
    torch.testing.assert_close(plackett_luce_loss(s + rand(4, 1)).loss, plackett_luce_loss(s).loss, rtol=1e-13, atol=0)


@every_function
def test_order_of_lists_does_not_matter(loss):
    s, r, mask = rand(5, 4), best_first_rewards(5, 4), torch.rand(5, 4) > 0.3
    order = torch.tensor([3, 0, 4, 1, 2])
    out, grad = value_and_grad(lambda x: loss(x, mask, r), s)
    moved, moved_grad = value_and_grad(lambda x: loss(x, mask[order], r[order]), s[order])
    torch.testing.assert_close(moved, out, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(moved_grad, grad[order], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("form", ["plackett_luce", "infonce"])
def test_rewards_and_ranks_give_the_order_themselves(form):
    s, r = rand(5, 6), best_first_rewards(5, 6)
    r[:, 2] = r[:, 1]  # a tie, and another at the top of one list
    r[0, 1:3] = r[0, 0]
    order = torch.tensor([5, 2, 0, 4, 1, 3])
    args = {"form": form}
    torch.testing.assert_close(pro_loss(s[:, order], rewards=r[:, order], **args), pro_loss(s, rewards=r, **args))
    shuffled = plackett_luce_loss(s[:, order], ranks=order.expand(5, 6))
    torch.testing.assert_close(shuffled, plackett_luce_loss(s))


@every_function
@pytest.mark.parametrize("hidden", [NAN, INF, -INF, 1e30])
@pytest.mark.parametrize("where", ["front", "middle", "back"])
def test_hidden_entries_change_nothing(loss, hidden, where):
    s, r = rand(4, 3), best_first_rewards(4, 3)
    keep = {"front": [2, 3, 4], "middle": [0, 2, 4], "back": [0, 1, 2]}[where]
    wide_s, wide_r = torch.full((4, 5), hidden, dtype=F64), torch.full((4, 5), hidden, dtype=F64)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    wide_s[:, keep], wide_r[:, keep], mask[:, keep] = s, r, True
    out, grad = value_and_grad(lambda x: loss(x, None, r), s)
    padded, padded_grad = value_and_grad(lambda x: loss(x, mask, wide_r), wide_s)
    torch.testing.assert_close(padded, out, rtol=1e-14, atol=0)
    torch.testing.assert_close(padded_grad[:, keep], grad, rtol=1e-14, atol=0)
    assert (padded_grad[~mask] == 0).all()


@every_function
def test_lists_without_a_comparison_contribute_nothing(loss):
    s, r = rand(4, 3), best_first_rewards(4, 3)
    mask = torch.tensor([[True, True, True], [False, True, False], [False, False, False], [True, True, False]])
    out, grad = value_and_grad(lambda x: loss(x, mask, r), s)
    torch.testing.assert_close(out, loss(s[[0, 3]], mask[[0, 3]], r[[0, 3]]), rtol=1e-14, atol=0)
    assert out.num_lists.item() == 2
    assert (grad[[1, 2]] == 0).all()


@every_function
@pytest.mark.parametrize("shape", [(3, 1), (3, 4), (0, 4)], ids=["K1", "all_hidden", "no_list"])
def test_nothing_to_compare_is_zero(loss, shape):
    mask = torch.ones(shape, dtype=torch.bool) if shape[1] == 1 else torch.zeros(shape, dtype=torch.bool)
    out, grad = value_and_grad(lambda x: loss(x, mask, rand(*shape)), torch.full(shape, -5.0, dtype=F64))
    assert all(field.item() == 0 for field in out)
    assert torch.equal(grad, torch.zeros(shape, dtype=F64))


@every_function
def test_microbatches_add_up(loss):
    s, r = rand(6, 4), best_first_rewards(6, 4)
    mask = torch.arange(4) < torch.tensor([[4], [1], [3], [2], [4], [0]])
    out, grad = value_and_grad(lambda x: loss(x, mask, r), s)
    parts = [value_and_grad(lambda x, i=i: loss(x, mask[i], r[i]), s[i]) for i in (slice(0, 2), slice(2, 6))]
    total = sum(p.loss * p.num_lists for p, _ in parts) / out.num_lists
    torch.testing.assert_close(total, out.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.cat([g * p.num_lists for p, g in parts]) / out.num_lists, grad)


# ------------------------------------------------------------------------------------------------ ties and large values
def test_tied_rewards_do_not_push_each_other():
    s, r = rand(1, 3), torch.tensor([[2.0, 2.0, 1.0]], dtype=F64)
    for form, share in (("plackett_luce", 1.0), ("infonce", 0.5)):
        out, grad = value_and_grad(lambda x, form=form: pro_loss(x, rewards=r, form=form), s)
        each = torch.sigmoid(s[0, 2] - s[0, :2])  # two separate pairs with the third, at temperature 1
        torch.testing.assert_close(grad[0, :2], -share * each)
        torch.testing.assert_close(grad[0, 2], share * each.sum())
        assert out.margin.item() == pytest.approx((s[0, :2].mean() - s[0, 2]).item())


@pytest.mark.parametrize("loss", [FUNCTIONS["pro_rewards"], FUNCTIONS["listmle"]], ids=["pro_rewards", "listmle"])
def test_all_tied_is_no_comparison(loss):
    out, grad = value_and_grad(lambda x: loss(x, None, torch.ones(2, 4, dtype=F64)), rand(2, 4))
    assert out.loss.item() == 0
    assert out.num_lists.item() == 0
    assert (grad == 0).all()


@every_function
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_1e4_neither_overflow_nor_lose_the_gradient(loss, sign, dtype):
    s = torch.tensor([[sign * 1e4, -sign * 1e4]], dtype=dtype)
    out, grad = value_and_grad(lambda x: loss(x, None, torch.tensor([[1.0, 0.0]])), s)
    rank_loss = 0.0 if sign > 0 else 2e4
    supervised = 0.1 * -s[0, 0].item() if hasattr(out, "sft_loss") and out.loss != out.list_loss else 0.0
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(rank_loss + supervised, rel=1e-2)
    assert grad.isfinite().all()
    assert grad[0, 1].item() == (0.0 if sign > 0 else 1.0)


def test_64_entries():
    s, r = rand(3, 64, scale=2), best_first_rewards(3, 64)
    everything = torch.ones(3, 64, dtype=torch.bool)
    torch.testing.assert_close(plackett_luce_loss(s).loss, listwise.plackett_luce(s, everything))
    expected = sum(pro_as_printed(a, b) for a, b in zip(s.tolist(), r.tolist(), strict=True)) / 3
    assert pro_loss(s, rewards=r).loss.item() == pytest.approx(expected, rel=1e-12)


@every_function
def test_gradcheck(loss):
    r, mask = best_first_rewards(3, 4), torch.arange(4) < torch.tensor([[4], [2], [1]])
    assert torch.autograd.gradcheck(lambda x: loss(x, mask, r).loss, rand(3, 4).requires_grad_())


def test_metrics():
    s = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, NAN]], dtype=F64)
    out = plackett_luce_loss(s, mask=~s.isnan())
    assert out.accuracy.item() == pytest.approx(2 / 4)  # (3>1), (3>2) of four pairs: a draw is not a win
    assert out.margin.item() == pytest.approx((2 + 1 - 1 + 0) / 4)
    assert out.top1_accuracy.item() == pytest.approx(1 / 2)
    assert out.num_lists.item() == 2
    below_zero = plackett_luce_loss(torch.tensor([[-3.0, -4.0, NAN]]), mask=torch.tensor([[True, True, False]]))
    assert below_zero.top1_accuracy.item() == 1


# -------------------------------------------------------------------------------------------------------------- PROLoss
def completions(b=2, k=3, t=5, v=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, v, (b, k, t), generator=generator)
    labels[:, :, 0] = -100
    labels[:, 1, 1:3] = -100
    return torch.randn((b, k, t, v), generator=generator, dtype=F64), labels


@pytest.mark.parametrize("average", [True, False], ids=["mean", "sum"])
def test_module_scores_by_log_probability(average):
    logits, labels = completions()
    rewards = best_first_rewards(2, 3)
    out = PROLoss(average=average, sft_weight=0.2)(logits, labels, rewards=rewards)
    scores = fa.sequence_logps(logits.flatten(0, 1), labels.flatten(0, 1), average=average).view(2, 3)
    sums = fa.sequence_logps(logits.flatten(0, 1), labels.flatten(0, 1)).view(2, 3)
    torch.testing.assert_close(out, pro_loss(scores, rewards=rewards, sft_weight=0.2, sft_logps=sums))
    means = fa.sequence_logps(logits.flatten(0, 1), labels.flatten(0, 1), average=True).view(2, 3)
    averaged = PROLoss(sft_average=True, sft_weight=0.2)(logits, labels)
    torch.testing.assert_close(averaged, pro_loss(means, sft_weight=0.2))


def test_module_takes_flat_responses():
    logits, labels = completions()
    rewards, mask = best_first_rewards(2, 3), torch.ones(2, 3, dtype=torch.bool)
    module, flat = PROLoss(sft_weight=0.2), (logits.flatten(0, 1), labels.flatten(0, 1))
    torch.testing.assert_close(module(*flat, list_size=3), module(logits, labels), rtol=0, atol=0)
    torch.testing.assert_close(module(*flat, mask=mask), module(logits, labels), rtol=0, atol=0)
    torch.testing.assert_close(module(*flat, rewards=rewards), module(logits, labels, rewards=rewards), rtol=0, atol=0)


@pytest.mark.parametrize("hide_by", ["mask", "labels"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_module_does_not_see_padding(hide_by, side):
    """Filler responses and filler tokens on either side, with NaN logits, change neither loss nor gradient."""
    logits, labels = completions()
    wide = torch.full((2, 5, 8, 11), NAN, dtype=F64)
    wide_labels = torch.full((2, 5, 8), -100)
    part = slice(3, 8) if side == "left" else slice(0, 5)
    wide[:, :3, part], wide_labels[:, :3, part] = logits, labels
    mask = None
    if hide_by == "mask":
        mask = torch.arange(5).expand(2, 5) < 3
        wide_labels[:, 3:] = 12345  # not even a token: never read
    module = PROLoss(sft_weight=0.2)
    out, grad = value_and_grad(lambda x: module(x, labels), logits)
    padded, padded_grad = value_and_grad(lambda x: module(x, wide_labels, mask=mask), wide)
    torch.testing.assert_close(padded, out, rtol=1e-14, atol=0)
    torch.testing.assert_close(padded_grad[:, :3, part], grad, rtol=1e-14, atol=0)
    assert (padded_grad[:, 3:] == 0).all()


def test_module_passes_its_options_on():
    logits, labels = completions()
    hot = PROLoss(temperature=2.0, ignore_index=7)(logits, labels.masked_fill(labels < 0, 7))
    torch.testing.assert_close(hot, PROLoss()(logits / 2, labels.masked_fill(labels == 7, -100)))
    assert "form='infonce'" in repr(PROLoss(form="infonce"))
    before = logits._version
    PROLoss(inplace_backward=True)(logits.requires_grad_(), labels).loss.backward()
    assert logits._version > before


def test_module_compiles_to_one_graph():
    logits, labels = completions()
    module = PROLoss(sft_weight=0.1)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(logits, labels), module(logits, labels))


# ------------------------------------------------------------------------------------------------------------ bad input
S, M = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
L, Y = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, dtype=torch.int64)
BAD = {
    "no_tensor": (lambda: plackett_luce_loss([[1.0]]), TypeError, "scores must be a torch.Tensor; got list"),
    "integers": (lambda: plackett_luce_loss(S.long()), TypeError, "scores must be a floating-point tensor"),
    "one_dim": (lambda: pro_loss(S[0]), ValueError, r"logps must be \[B, K\] with K >= 1; got shape \[3\]"),
    "no_entry": (lambda: pro_loss(S[:, :0]), ValueError, r"logps must be \[B, K\] with K >= 1; got shape \[2, 0\]"),
    "mask_dtype": (lambda: pro_loss(S, mask=S), TypeError, "mask must be a boolean tensor"),
    "mask_shape": (lambda: pro_loss(S, mask=M[:, :2]), ValueError, r"mask must have shape \[2, 3\], that of logps"),
    "rewards_dtype": (lambda: pro_loss(S, rewards=S.long()), TypeError, "rewards must be a floating-point tensor"),
    "rewards_shape": (lambda: pro_loss(S, rewards=S[:1]), ValueError, r"rewards must have shape \[2, 3\]"),
    "sft_logps": (lambda: pro_loss(S, sft_logps=S[:, 0]), ValueError, r"sft_logps must have shape \[2, 3\]"),
    "weight": (lambda: pro_loss(S, sft_weight=-0.1), ValueError, "sft_weight must be in"),
    "form": (
        lambda: pro_loss(S, form="softmax"),
        ValueError,
        "form must be one of infonce, plackett_luce; got 'softmax'",
    ),
    "ranks_dtype": (lambda: plackett_luce_loss(S, ranks=M), TypeError, "ranks must be an integer or floating"),
    "ranks_shape": (lambda: plackett_luce_loss(S, ranks=S[0]), ValueError, r"ranks must have shape \[2, 3\]"),
    "module_form": (lambda: PROLoss(form="dpo"), ValueError, "form must be one of"),
    "module_weight": (lambda: PROLoss(sft_weight=NAN), ValueError, "sft_weight must be in"),
    "module_logits": (
        lambda: PROLoss()(L[0, 0], Y[0, 0]),
        ValueError,
        r"logits must be \[B, K, T, V\] or \[B\*K, T, V\]",
    ),
    "module_labels": (lambda: PROLoss()(L, Y[:, :2]), ValueError, "labels must have the shape of logits without"),
    "labels_type": (lambda: PROLoss()(L, Y.tolist()), TypeError, "labels must be a torch.Tensor; got list"),
    "labels_dtype": (lambda: PROLoss()(L, Y.float()), TypeError, "labels must be int64 or int32"),
    "no_list_size": (lambda: PROLoss()(L[0], Y[0]), ValueError, "list_size must agree .* got None"),
    "two_sizes": (lambda: PROLoss()(L, Y, list_size=2), ValueError, r"list_size must agree .* got \[2, 3\]"),
    "not_a_divisor": (lambda: PROLoss()(L[0], Y[0], list_size=2), ValueError, "list_size must divide the 3 responses"),
    "module_mask": (lambda: PROLoss()(L, Y, mask=M[:1]), ValueError, r"mask must have shape \[2, 3\]"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
