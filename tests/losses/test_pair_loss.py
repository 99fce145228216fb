"""DPO and its like on the CPU in one call: the numbers of the table, from float64 formulas; else the general path."""

import math

import pytest
import torch

from fastalign.losses import DPOLoss

OPTIONS = [
    {"beta": 0.1},
    {"beta": 0.7, "label_smoothing": 0.2},
    {"beta": 0.5, "label_smoothing": 1.0},
    {"loss_type": "robust", "beta": 0.4, "label_smoothing": 0.1},
    {"loss_type": {"sigmoid": 0.5}, "beta": 2},
]
REFERENCES = ["none", "float32", "float64", "logits"]


def problem(pairs=3, length=5, vocab=37, dtype=torch.float32, scale=3.0):
    draw = torch.Generator().manual_seed(pairs * length * vocab)
    x = torch.randn(2 * pairs, length, vocab, generator=draw).mul(scale).to(dtype)
    y = torch.randint(vocab, (2 * pairs, length), generator=draw)
    y[torch.rand(2 * pairs, length, generator=draw) < 0.3] = -100
    return x.requires_grad_(), y


def references(kind, x, y):
    if kind == "none":
        return {}
    draw = torch.Generator().manual_seed(1)
    other = (x.detach().float() + 0.1 * torch.randn(x.shape, generator=draw)).to(x.dtype)
    if kind == "logits":
        return {"ref_logits": other}
    logps = other.double().log_softmax(-1).gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    chosen, rejected = torch.where(y >= 0, logps, 0).sum(-1).to(getattr(torch, kind)).chunk(2)
    return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}


def outcome(options, x, y, given, scale=1.0):
    out = DPOLoss(**options)(x, y, **given)
    return [t.detach() for t in out if t is not None], torch.autograd.grad(scale * out.loss, x)[0]


def by_the_table(programs, *args):
    """As torch operations."""
    with programs.off():
        return outcome(*args)


def wide(x, given):
    return x.detach().double().requires_grad_(), {k: v.double() for k, v in given.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_further_from_float64_than_the_table(programs, options, kind, dtype):
    x, y = problem(dtype=dtype)
    given = references(kind, x, y)
    found, gradient = outcome(options, x, y, given)
    assert programs.ran[0] is not None
    tensors, table_gradient = by_the_table(programs, options, x, y, given)
    exact, exact_gradient = by_the_table(programs, options, *wide(x, given)[:1], y, wide(x, given)[1])
    for got, other, want in zip(found, tensors, exact, strict=True):
        assert got.dtype == other.dtype == torch.float32
        assert got.shape == other.shape
        off, theirs = ((t.double() - want).abs().max() for t in (got, other))
        assert off <= theirs + 1e-6 * want.abs().max(), (off, theirs)
    off, theirs = ((g.double() - exact_gradient).abs().max() for g in (gradient, table_gradient))
    assert off <= theirs + 1e-6 * exact_gradient.abs().max(), (off, theirs)


def test_first_step_is_ln_2_and_no_reward():
    x, y = problem(pairs=7)
    by_logits = DPOLoss()(x, y, ref_logits=x.detach())
    sums = {"ref_chosen_logps": by_logits.chosen_logps, "ref_rejected_logps": by_logits.rejected_logps}
    for out in (by_logits, DPOLoss()(x, y, **sums)):
        assert out.loss.item() == torch.tensor(math.log(2), dtype=torch.float32).item()
        assert not torch.stack([out.chosen_rewards, out.rejected_rewards, out.margins, out.accuracies]).any()


def test_scaled_losses():
    x, y = problem(dtype=torch.bfloat16)
    _, one = outcome({}, x, y, {})
    _, scaled = outcome({}, x, y, {}, 4.0)
    assert torch.equal(4 * one, scaled)


def test_in_place():
    x, y = problem()
    z = x * 1
    out = DPOLoss(inplace_backward=True)(z, y)
    (found,) = torch.autograd.grad(out.loss, x)
    assert torch.equal(found, outcome({}, x, y, {})[1])
    assert torch.equal(found, z.detach())


def test_without_gradients():
    x, y = problem()
    with torch.no_grad():
        out = DPOLoss()(x, y)
    assert not out.loss.requires_grad
    expected, _ = outcome({}, x, y, {})
    for got, want in zip(filter(torch.is_tensor, out), expected, strict=True):
        assert torch.equal(got, want)


def test_metrics_are_no_part_of_the_graph_and_of_their_own():
    x, y = problem()
    out = DPOLoss()(x, y)
    assert out.loss.requires_grad
    assert not any(t.requires_grad for t in out[1:] if t is not None)
    rewards = out.rejected_rewards.clone()
    out.chosen_rewards.add_(1)
    assert torch.equal(out.rejected_rewards, rewards)


def test_a_second_derivative_is_refused():
    x, y = problem()
    (first,) = torch.autograd.grad(DPOLoss()(x, y).loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(first.sum(), x)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_huge_margins(programs, scale):
    x, y = problem(scale=scale)
    found, gradient = outcome({"beta": 0.1}, x, y, {})
    assert programs.ran[0] is not None
    expected, exact = by_the_table(programs, {"beta": 0.1}, x.detach().double().requires_grad_(), y, {})
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-6, atol=1e-7)


def test_an_impossible_response(programs):
    """A label of probability 0 among the rejected: no loss and no slope; among the chosen: an infinite loss."""
    x, y = problem(pairs=1, vocab=9)
    y[y < 0] = 0
    for row, loss in ((1, 0.0), (0, math.inf)):
        z = x.detach().clone()
        z[row, 2, y[row, 2]] = -math.inf
        out = DPOLoss(beta=0.5)(z.requires_grad_(), y)
        assert out.loss.item() == loss
        (found,) = torch.autograd.grad(out.loss, z)
        assert bool(torch.isfinite(found).all())
        assert found.any() == (row == 0)


def test_no_pairs_and_no_tokens():
    for shape in ((0, 4, 5), (4, 0, 5)):
        x = torch.zeros(shape, requires_grad=True)
        out = DPOLoss()(x, torch.zeros(shape[:2], dtype=torch.int64))
        assert out.loss.item() == pytest.approx(math.log(2) if shape[0] else 0, abs=1e-7)
        assert torch.autograd.grad(out.loss, x)[0].shape == shape


BOTH = ("ref_chosen_logps", "ref_rejected_logps")
BAD = {
    "one reference": ({"ref_chosen_logps": torch.zeros(3)}, "both be given or both be None"),
    "too many": (dict.fromkeys(BOTH, torch.zeros(4)), r"shape \[3\]"),
    "a row each": (dict.fromkeys(BOTH, torch.zeros(3, 1)), r"shape \[3\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_references_are_named(name):
    given, message = BAD[name]
    x, y = problem()
    with pytest.raises(ValueError, match=message):
        DPOLoss()(x, y, **given)


def test_bad_labels_are_named():
    x, y = problem()
    y[1, 2] = 37
    with pytest.raises(ValueError, match=r"labels must be in \[0, 37\) .*got 37 at flat position 7"):
        DPOLoss()(x, y)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "hinge"},
        {"length_alpha": 0.1},
        {"average": True},
        {"f_divergence": "js_divergence"},
        {"loss_type": ("sigmoid", "sft")},
        {"loss_type": "rpo"},
        {"loss_type": "orpo"},
        {"loss_type": "aot"},
    ],
    ids=str,
)
def test_no_cliff_between_options(programs, options):
    """Every row of the table and every option is a program too, but those that couple the batch by sorting it."""
    x, y = problem()
    found, gradient = outcome(options, x, y, {})
    coupled = options.get("loss_type") == "aot"  # only the sums of its sequences are a program's, which gives no more
    assert (len(programs.ran[-1]) == 1) == coupled
    exact, exact_gradient = by_the_table(programs, options, x.detach().double().requires_grad_(), y, {})
    for got, want in zip([*found, gradient], [*exact, exact_gradient], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=3e-6)


def test_references_of_two_dtypes_run_as_torch_operations(programs):
    x, y = problem()
    one, other = torch.zeros(3), torch.zeros(3, dtype=torch.float64)
    outcome({}, x, y, {"ref_chosen_logps": one, "ref_rejected_logps": other})
    assert [len(results) for results in programs.ran] == [1]  # the sums of the sequences alone


def test_threads_change_no_bit():
    x, y = problem(pairs=16, length=9, vocab=1001)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(outcome({}, x, y, {}))
    finally:
        torch.set_num_threads(before)
    for found, gradient in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0][0], strict=True))
        assert torch.equal(gradient, results[0][1])
