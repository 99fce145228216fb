"""Distillation: heads and logits, a teacher's likeliest tokens, temperatures, tiles, and what is refused."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastalign as fa
from fastalign.losses import DistillationLoss, TopK, distillation_loss
from fastalign.losses.divergences import DIVERGENCE_ALIASES, DIVERGENCES
from fastalign.reference import distillation as reference

FORMULAS = {
    "forward_kl": reference.forward_kl,
    "reverse_kl": reference.reverse_kl,
    "jsd": reference.jsd(0.5),
    "skewed_kl": reference.skewed_kl,
    "skewed_reverse_kl": reference.skewed_reverse_kl,
}


def problem(rows=3, length=5, vocab=53, hidden=7, wider=11, dtype=torch.float32, seed=0):
    """(student's hidden states, weight and bias, the teacher's two, labels), one row without a real token."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    labels = torch.randint(vocab, (rows, length), generator=draw)
    labels[:, 0] = -100
    labels[1] = -100
    student = normal(rows, length, hidden), normal(vocab, hidden), normal(vocab)
    return *student, normal(rows, length, wider), normal(vocab, wider), labels


def exact(formula, logits, teacher, labels, temperature=1.0):
    """The mean over real tokens of a divergence in float64."""
    student, teacher = (torch.log_softmax(x.double() / temperature, -1) for x in (logits, teacher))
    return formula(student, teacher)[labels != -100].mean()


def gradients(loss, *leaves):
    return [g.double() for g in torch.autograd.grad(loss, leaves)]


# ---------------------------------------------------------------------------------------------------------- two heads
@pytest.mark.parametrize("chunk_bytes", [None, 8 * 53 * 4, 1], ids=["whole", "four", "one"])
@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_heads_of_different_size(dtype, name, chunk_bytes):
    """Loss and gradients of hidden states, weight and bias against the formula of whole logits in float64."""
    hidden, weight, bias, their_hidden, their_weight, labels = problem(dtype=dtype)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    student = fa.Head(*leaves, logit_scale=0.5, chunk_bytes=chunk_bytes, logits_dtype=None)
    out = DistillationLoss(divergence=name)(student, labels, fa.Head(their_hidden, their_weight, logit_scale=0.25))
    got = gradients(out.loss, *leaves)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    logits = 0.5 * (wide[0] @ wide[1].T + wide[2])
    teacher = 0.25 * (their_hidden.double() @ their_weight.double().T)
    want = exact(FORMULAS[name], logits, teacher, labels)
    expected = torch.autograd.grad(want, wide)
    near = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.loss.double(), want.detach(), rtol=near, atol=near)
    torch.testing.assert_close(out.divergence, out.loss.detach())
    assert out.num_tokens == (labels != -100).sum()
    nll = -torch.log_softmax(logits.detach(), -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(out.nll.double(), nll[labels != -100].mean(), rtol=near, atol=near)
    for g, w in zip(got, expected, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=near * float(w.abs().max()))


def test_every_way_to_give_both_models_is_one():
    hidden, weight, _, their_hidden, their_weight, labels = problem()
    weight.requires_grad_()
    theirs = their_hidden @ their_weight.T
    ways = {
        "heads": ((hidden, weight), (their_hidden, their_weight)),
        "head and logits": ((hidden, weight), theirs),
        "logits and head": (hidden @ weight.T, (their_hidden, their_weight)),
        "logits": (hidden @ weight.T, theirs),
        "rows that lie apart": ((hidden @ weight.T).repeat(1, 2, 1)[:, :5], theirs.repeat(1, 2, 1)[:, 5:]),
        "the teacher's all tokens": (
            (hidden, weight),
            TopK(torch.arange(53).expand(3, 5, 53), torch.log_softmax(theirs, -1)),
        ),
        "all tokens, logits": (
            hidden @ weight.T,
            TopK(torch.arange(53).expand(3, 5, 53), torch.log_softmax(theirs, -1)),
        ),
    }
    found = {}
    for name, (student, teacher) in ways.items():
        out = distillation_loss(student, labels, teacher, beta=0.3)
        found[name] = (out.loss.detach(), out.nll, *gradients(out.loss, weight))
    for name, values in found.items():
        for got, want in zip(values, found["heads"], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=name)


class _Largest(TorchDispatchMode):
    """The largest tensor that an operation has made or written."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor) and t.dim() and t.storage_offset() == 0:
                self.bytes = max(self.bytes, t.numel() * t.element_size())
        return result


@pytest.mark.parametrize("teacher", ["head", "top_k"])
def test_logits_are_never_whole(teacher):
    """Nothing as large as a model's logits is made, nor larger than a tile and the weight's gradient."""
    vocab, rows, width = 4096, 64, 8
    hidden, weight, _, their_hidden, their_weight, labels = problem(rows, 5, vocab, width, 16)
    weight.requires_grad_(), hidden.requires_grad_()
    tile = 10 * vocab * 4
    few = TopK(torch.arange(6).expand(rows, 5, 6), torch.full((rows, 5, 6), -3.0))
    other = (their_hidden, their_weight) if teacher == "head" else few
    with _Largest() as seen:
        student = fa.Head(hidden, weight, chunk_bytes=2 * tile)
        DistillationLoss()(student, labels, other).loss.backward()
    assert max(tile, 16 * vocab * 4) >= seen.bytes
    assert seen.bytes < (labels != -100).sum() * vocab * 4 / 10


def test_no_bit_depends_on_tiles_threads_or_neighbours():
    """Of the compiled kernels; torch's own operations promise nothing of the kind."""
    if fa._backends.automatic(torch.zeros(1), "divergence") != "cpu" or fa._backends.choose(torch.zeros(1)) != "cpu":
        pytest.skip("needs the compiled module fastalign._C")
    hidden, weight, _, their_hidden, their_weight, labels = problem(rows=6)
    theirs = their_hidden @ their_weight.T

    def run(which, chunk_bytes=None):
        leaf = hidden[which].clone().requires_grad_()
        head = fa.Head(leaf, weight, chunk_bytes=chunk_bytes)
        out = DistillationLoss()(head, labels[which], theirs[which], num_items=7)
        return out.loss.detach(), torch.autograd.grad(out.loss, leaf)[0]

    whole, before = run(slice(None)), torch.get_num_threads()
    torch.set_num_threads(1 if before > 1 else 2)
    assert torch.equal(run(slice(None))[1], whole[1])
    torch.set_num_threads(before)
    logits = (hidden @ weight.T).requires_grad_()
    apart = [DistillationLoss()(x, y, z, num_items=7).loss for x, y, z in zip(logits, labels, theirs, strict=True)]
    together = DistillationLoss()(logits, labels, theirs, num_items=7).loss
    torch.testing.assert_close(sum(apart), together)
    (g,) = torch.autograd.grad(sum(apart), logits)
    assert torch.equal(g, torch.autograd.grad(together, logits)[0])


# ------------------------------------------------------------------------------------------------------ what is given
@pytest.mark.parametrize("name", ["forward_kl", "jsd", "skewed_kl", "reverse_kl"])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_a_bucket_holds_what_the_teachers_likeliest_leave(name, softcap):
    """Ids in any order, labels among them and not, a temperature for each sequence."""
    hidden, weight, _, their_hidden, their_weight, labels = problem(rows=8)
    temperature = torch.linspace(0.5, 2, 8)
    logits = (hidden @ weight.T).requires_grad_()
    cap = (lambda x: x) if softcap is None else (lambda x: softcap * torch.tanh(x / softcap))
    theirs = torch.log_softmax(cap(their_hidden @ their_weight.T / 3) / temperature[:, None, None], -1)
    ids = theirs.topk(4).indices.flip(-1)
    out = distillation_loss(
        *(logits, labels, TopK(ids.int(), theirs.gather(-1, ids))),
        divergence=name,
        temperature=temperature,
        softcap=softcap,
    )
    (got,) = gradients(out.loss, logits)
    x = logits.detach().double().requires_grad_()
    student = torch.log_softmax(cap(x) / temperature[:, None, None], -1)
    both = reference.bucketed(student, ids), reference.bucketed(theirs.double(), ids)
    want = FORMULAS[name](*both)[labels != -100].mean()
    torch.testing.assert_close(out.loss.double(), want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, torch.autograd.grad(want, x)[0], rtol=1e-4, atol=1e-7)
    assert not got[labels == -100].any()


def test_a_students_small_rest_is_exact():
    """The student's share beside the teacher's likeliest is e^-30, far below what 1 minus a float32 sum could tell."""
    logits = torch.full((1, 40), -30.0 - math.log(38)).index_fill(1, torch.tensor([3, 9]), -math.log(2))
    teacher = TopK(torch.tensor([[3, 9]]), torch.tensor([[0.4, 0.4]]).log())
    out = distillation_loss(logits, torch.tensor([3]), teacher, divergence="forward_kl")
    want = 0.8 * math.log(0.8) + 0.2 * (math.log(0.2) + 30)
    assert out.loss.item() == pytest.approx(want, rel=1e-6)


def test_temperatures_of_tokens_sequences_and_all():
    hidden, weight, _, their_hidden, their_weight, labels = problem()
    loss, heads = DistillationLoss(divergence="reverse_kl"), ((hidden, weight), labels, (their_hidden, their_weight))
    whole = distillation_loss(*heads, divergence="reverse_kl", temperature=1.7)
    by_sequence = loss(*heads, temperature=torch.full((3,), 1.7))
    by_token = loss(*heads, temperature=torch.full((3, 5), 1.7))
    torch.testing.assert_close(by_sequence.loss, whole.loss)
    torch.testing.assert_close(by_token.loss, whole.loss)
    hidden_too = torch.where(labels == -100, torch.nan, torch.full((3, 5), 1.7))
    assert torch.equal(loss(*heads, temperature=hidden_too).loss, by_token.loss)
    each = torch.linspace(0.5, 2, 15).view(3, 5)
    logits = hidden @ weight.T
    want = exact(reference.reverse_kl, logits, their_hidden @ their_weight.T, labels, each.double().unsqueeze(-1))
    torch.testing.assert_close(loss(*heads, temperature=each).loss.double(), want, rtol=1e-6, atol=1e-6)


def test_weights_of_tokens_and_num_items():
    hidden, weight, _, their_hidden, their_weight, labels = problem()
    logits = (hidden @ weight.T).requires_grad_()
    teacher = their_hidden @ their_weight.T
    weights = torch.linspace(0, 2, 15).view(3, 5)
    out = DistillationLoss()(logits, labels, teacher, weights=weights, num_items=20)
    each = reference.jsd(0.5)(*(torch.log_softmax(x.double(), -1) for x in (logits, teacher)))
    want = (each * weights * (labels != -100)).sum() / 20
    torch.testing.assert_close(out.loss.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (out.loss, want)), rtol=1e-4, atol=1e-7)
    mean = DistillationLoss()(logits, labels, teacher, weights=weights).loss
    torch.testing.assert_close(mean * (weights * (labels != -100)).sum() / 20, out.loss)
    with pytest.raises(ValueError, match="weights must be at least 0; got -"):
        DistillationLoss()(logits, labels, teacher, weights=weights - 1)
    with pytest.raises(ValueError, match="weights need a normalization that counts tokens; got 'dr_grpo'"):
        DistillationLoss(normalization="dr_grpo", max_length=5)(logits, labels, teacher, weights=weights)


@pytest.mark.parametrize("name", FORMULAS)
def test_what_is_ignored_is_not_read_and_extremes_stay_finite(name):
    x = 3 * torch.randn(4, 130, generator=torch.Generator().manual_seed(1))
    z = x.flip(-1)
    x[0] = z[0] = torch.nan
    x[1] += 1e4
    z[2] -= 1e4
    x[3, 5] = z[3, 5] = z[3, 7] = -torch.inf  # a token that neither has, and one that the teacher has not
    labels = torch.tensor([-100, 1, 2, 3])
    if name == "reverse_kl":
        z[3, 7] = 0.0  # or it would be infinite
    leaf = x.clone().requires_grad_()
    out = DistillationLoss(divergence=name)(leaf, labels, z)
    (got,) = gradients(out.loss, leaf)
    wide = x.double()[1:].masked_fill(x[1:].isinf(), -200).requires_grad_()
    want = exact(FORMULAS[name], wide, z[1:].masked_fill(z[1:].isinf(), -200), labels[1:])
    torch.testing.assert_close(out.loss.double(), want.detach(), rtol=1e-5, atol=1e-6)
    assert not got[0].any()
    # logits of 1e4 are a multiple of 2^-10: what they lose in float32 is in both
    torch.testing.assert_close(got[1:], torch.autograd.grad(want, wide)[0], rtol=1e-4, atol=1e-6)


def test_equal_models_have_no_divergence_and_no_gradient():
    x = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    for name in FORMULAS:
        leaf = x.clone().requires_grad_()
        out = DistillationLoss(divergence=name)(leaf, torch.arange(4), x)
        assert out.loss.abs() < 1e-7
        assert torch.autograd.grad(out.loss, leaf)[0].abs().max() < 1e-8


def test_in_place_and_without_gradient():
    hidden, weight, _, their_hidden, their_weight, labels = problem()
    teacher = their_hidden @ their_weight.T
    base = (hidden @ weight.T).requires_grad_()
    want = torch.autograd.grad(DistillationLoss()(base, labels, teacher).loss, base)[0]
    kept = base.detach().clone()
    logits = base * 1.0
    out = DistillationLoss(inplace_backward=True)(logits, labels, teacher)
    with torch.no_grad():
        assert torch.equal(logits, want)
    assert torch.equal(torch.autograd.grad(out.loss, base)[0], want)
    with torch.no_grad():
        plain = DistillationLoss(inplace_backward=True)(kept, labels, teacher)
    assert torch.equal(plain.loss, out.loss)
    assert torch.equal(kept, base)


def test_names_and_ends_of_beta():
    hidden, weight, _, their_hidden, their_weight, labels = problem()
    heads = (hidden, weight), labels, (their_hidden, their_weight)

    def value(**options):
        return distillation_loss(*heads, **options).loss

    for theirs, ours in DIVERGENCE_ALIASES.items():
        assert torch.equal(value(divergence=theirs), value(divergence=ours))
    assert torch.equal(value(beta=0.0), value(divergence="forward_kl"))
    assert torch.equal(value(beta=1.0), value(divergence="reverse_kl"))
    assert torch.equal(value(divergence="skewed_kl", skew_alpha=0.0), value(divergence="forward_kl"))
    assert set(FORMULAS) == set(DIVERGENCES)
    text = DistillationLoss.__doc__
    assert all(f'"{name}"' in text for name in (*DIVERGENCES, *DIVERGENCE_ALIASES))


# ------------------------------------------------------------------------------------------------------------ refused
def test_what_is_refused():
    hidden, weight, _, their_hidden, their_weight, labels = problem()
    student, teacher = (hidden, weight), their_hidden @ their_weight.T
    loss = DistillationLoss()
    with pytest.raises(ValueError, match=r"divergence must be one of forward_kl, jsd, .* got 'tv'"):
        DistillationLoss(divergence="tv")
    with pytest.raises(ValueError, match=r"beta must be in \[0.0, 1.0\]; got 1.5"):
        DistillationLoss(beta=1.5)
    with pytest.raises(ValueError, match="skew_alpha must be below 1"):
        DistillationLoss(divergence="skewed_kl", skew_alpha=1.0)
    with pytest.raises(ValueError, match="temperature must be 1 with nll_weight"):
        DistillationLoss(nll_weight=0.1, temperature=2.0)
    with pytest.raises(ValueError, match=r"temperature must be 1 with nll_weight.* got one for each token"):
        DistillationLoss(nll_weight=0.1)(student, labels, teacher, temperature=torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"teacher must have shape \[3, 5, 53\], that of the student's logits"):
        loss(student, labels, teacher[..., :50])
    with pytest.raises(ValueError, match=r"teacher must have the vocabulary and the tokens of the student, \[3, "):
        loss(student, labels, (their_hidden, their_weight[:50]))
    with pytest.raises(ValueError, match="teacher must not require a gradient"):
        loss(student, labels, teacher.requires_grad_())
    with pytest.raises(ValueError, match=r"temperature must be finite and above 0 at every token; got 0\.0"):
        loss(student, labels, teacher.detach(), temperature=torch.zeros(3))
    with pytest.raises(ValueError, match=r"temperature must be a number, or have the shape of labels, \[3, 5\]"):
        loss(student, labels, teacher.detach(), temperature=torch.ones(5))
    with pytest.raises(ValueError, match="plan must be None or 'objective'"):
        loss(fa.Head(hidden, weight, plan="keep"), labels, teacher.detach())
    with pytest.raises(TypeError, match="teacher"):
        loss(student, labels, "teacher")


@pytest.mark.parametrize(
    ("ids", "logps", "message"),
    [
        (torch.zeros(3, 5, 2).long(), torch.zeros(3, 5, 2), "teacher's ids must name each token once"),
        (torch.full((3, 5, 1), 53), torch.zeros(3, 5, 1), r"teacher's ids must be in \[0, 53\); got 53 to 53"),
        (torch.zeros(3, 4, 1).long(), torch.zeros(3, 4, 1), r"teacher's ids must be \[3, 5, 'K'\] with K in \[1, 53\]"),
        (torch.zeros(3, 5, 1).long(), torch.zeros(3, 5, 2), r"teacher's logps must have shape \[3, 5, 1\]"),
        (torch.zeros(3, 5, 1), torch.zeros(3, 5, 1), "teacher's ids must be int64 or int32; got torch.float32"),
    ],
)
def test_likeliest_tokens_that_are_refused(ids, logps, message):
    hidden, weight, *_, labels = problem()
    with pytest.raises((ValueError, TypeError), match=message):
        DistillationLoss()((hidden, weight), labels, TopK(ids, logps))
