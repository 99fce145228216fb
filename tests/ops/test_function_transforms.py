"""Forward mode, `torch.func` and batched gradients: the numbers that torch's own operations give, on every way in."""

from __future__ import annotations

import pytest
import torch
from torch import func
from torch.autograd import forward_ad
from torch.nn import functional as F

import fastalign as fa
from fastalign.losses import DPOLoss, KTOLoss, PPOLoss, SFTLoss

B, T, V, H = 2, 3, 5, 4
G = torch.Generator().manual_seed(0)
X, TANGENT = (torch.randn(B, T, H, generator=G) for _ in range(2))
WEIGHT, REFERENCE = torch.randn(V, H, generator=G), torch.randn(B, T, V, generator=G)
TRAINED = WEIGHT.clone().requires_grad_()
LABELS = torch.tensor([[1, -100, 4], [0, 3, 3]])
OLD, CLASSES = torch.full((B, T), -1.5), torch.rand(V, generator=G)
each_backend = pytest.mark.parametrize("backend", ["cpu", "eager"])


def logits_of(x):
    return x @ WEIGHT.T


def head_of(x, plan=None):
    return fa.Head(x, TRAINED, plan=plan)


def exact_logps(x, temperature=1.0, cap=None):
    z = logits_of(x)
    z = z if cap is None else cap * torch.tanh(z / cap)
    logp = torch.log_softmax(z / temperature, -1)
    return torch.where(LABELS == -100, 0, logp.gather(-1, LABELS.clamp(min=0).unsqueeze(-1)).squeeze(-1))


def exact_statistics(x):
    logp, logq = torch.log_softmax(logits_of(x), -1), torch.log_softmax(REFERENCE, -1)
    valid, p = LABELS != -100, logp.exp()
    return exact_logps(x) + torch.where(valid, -(p * logp).sum(-1) + 2 * (p * (logp - logq)).sum(-1), 0)


def exact_dpo(x):
    sums = exact_logps(x).sum(-1)
    return -F.logsigmoid(0.1 * (sums[:1] - sums[1:])).mean()


def exact_ppo(x):
    ratio = (exact_logps(x) - OLD).exp()
    return torch.maximum(-ratio, -ratio.clamp(0.8, 1.2))[LABELS != -100].mean()


def exact_kto(x):
    return torch.sigmoid(-0.1 * exact_logps(x).sum(-1)).mean()


def ours_statistics(stats):
    return stats.logps + stats.entropy + 2 * stats.kl


def exact_nll(x):
    return -exact_logps(x).sum() / 5


def of_statistics(x):
    return ours_statistics(fa.token_stats(logits_of(x), LABELS, ref_logits=REFERENCE, entropy=True, kl=True))


def of_options(x):
    return fa.token_logps(logits_of(x), LABELS, temperature=0.7, softcap=3.0)


def of_classes(f):
    return lambda x: f(logits_of(x).flatten(0, 1), LABELS.flatten(), CLASSES, label_smoothing=0.2)


def ppo(source):
    return lambda x: PPOLoss()(source(x), LABELS, OLD, torch.ones(B)).loss


def objective(x):
    return head_of(x, "objective")


CALLS = {
    "token_logps": (lambda x: fa.token_logps(logits_of(x), LABELS), exact_logps),
    "options": (of_options, lambda x: exact_logps(x, 0.7, 3.0)),
    "token_stats": (of_statistics, exact_statistics),
    "sequence_logps": (lambda x: fa.sequence_logps(logits_of(x), LABELS), lambda x: exact_logps(x).sum(-1)),
    "cross_entropy": (lambda x: fa.cross_entropy(logits_of(x).flatten(0, 1), LABELS.flatten()), exact_nll),
    "classes": (of_classes(fa.cross_entropy), of_classes(F.cross_entropy)),
    "SFTLoss": (lambda x: SFTLoss()(logits_of(x), LABELS).loss, exact_nll),
    "one_launch": (lambda x: SFTLoss(fuse_backward=True)(logits_of(x), LABELS).loss, exact_nll),
    "DPOLoss": (lambda x: DPOLoss()(logits_of(x), LABELS).loss, exact_dpo),
    "PPOLoss": (ppo(logits_of), exact_ppo),
    "KTOLoss": (lambda x: KTOLoss()(logits_of(x), LABELS, torch.ones(B).bool()).loss, exact_kto),
    "head_token_stats": (lambda x: fa.head_token_stats(x, WEIGHT, LABELS).logps, exact_logps),
    "recompute": (lambda x: fa.head_token_stats(x, WEIGHT, LABELS, plan="recompute").logps, exact_logps),
    "SFTLoss of a head": (lambda x: SFTLoss()(head_of(x), LABELS).loss, exact_nll),
    "DPOLoss of a head": (lambda x: DPOLoss()(head_of(x), LABELS).loss, exact_dpo),
    "SFTLoss by parts": (lambda x: SFTLoss()(objective(x), LABELS).loss, exact_nll),
    "DPOLoss by parts": (lambda x: DPOLoss()(objective(x), LABELS).loss, exact_dpo),
    "PPOLoss by parts": (ppo(objective), exact_ppo),
}
each_call = pytest.mark.parametrize("name", CALLS)


def dual(f, train):
    with forward_ad.dual_level():
        given = forward_ad.make_dual(X.clone().requires_grad_(train), TANGENT)
        return forward_ad.unpack_dual(f(given)).tangent


def batch_of_gradients(f):
    leaf = X.clone().requires_grad_()
    out = f(leaf)
    each = torch.stack([torch.ones_like(out), torch.full_like(out, -2.0), torch.zeros_like(out)])
    return torch.autograd.grad(out, leaf, each, is_grads_batched=True)[0]


WAYS = {
    "jvp": lambda f: func.jvp(f, (X,), (TANGENT,))[1],
    "jvp of what is trained": lambda f: func.jvp(f, (X.clone().requires_grad_(),), (TANGENT,))[1],
    "dual": lambda f: dual(f, False),
    "dual of what is trained": lambda f: dual(f, True),
    "jacfwd": lambda f: func.jacfwd(f)(X),
    "forward-mode": lambda f: torch.autograd.functional.jacobian(f, X, vectorize=True, strategy="forward-mode"),
    "grad": lambda f: func.grad(lambda x: f(x).sum())(X),
    "vjp": lambda f: func.vjp(lambda x: f(x).sum(), X)[1](torch.tensor(2.0))[0],
    "jacrev": lambda f: func.jacrev(f)(X),
    "jacobian": lambda f: torch.autograd.functional.jacobian(f, X, vectorize=True),
    "hessian": lambda f: func.hessian(lambda x: f(x).sum())(X),
    "is_grads_batched": batch_of_gradients,
}


@each_backend
@each_call
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_differentiating_gives_torchs_numbers(way, name, backend):
    ours, exact = CALLS[name]
    with fa.use_backend(backend):
        if backend == "eager" and name == "one_launch" and way in ("jacobian", "is_grads_batched"):
            with pytest.raises(RuntimeError, match="backend"):  # these two call the kernel, which it does not have
                WAYS[way](ours)
            return
        found = WAYS[way](ours)
    wanted = WAYS[way](exact)
    assert wanted.any()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


PER_SAMPLE = {
    "token_logps": lambda w, x, y: -fa.token_logps(x @ w.T, y).sum(),
    "cross_entropy": lambda w, x, y: fa.cross_entropy(x @ w.T, y, reduction="sum"),
    "SFTLoss": lambda w, x, y: SFTLoss(normalization="sequence")(x @ w.T, y).loss,
    "head": lambda w, x, y: -fa.head_token_stats(x, w, y).logps.sum(),
    "head with rows": lambda w, x, y: -fa.head_token_stats(x, w, y, rows=torch.tensor([0, 1, 2])).logps.sum(),
}


@each_backend
@pytest.mark.parametrize("name", PER_SAMPLE)
def test_gradients_of_each_sample_are_those_of_samples_alone(name, backend):
    f = PER_SAMPLE[name]
    with fa.use_backend(backend):
        found = func.vmap(func.grad(f, (0, 1)), (None, 0, 0))(WEIGHT, X, LABELS)
        for k in range(B):
            leaves = WEIGHT.clone().requires_grad_(), X[k].clone().requires_grad_()
            alone = torch.autograd.grad(f(*leaves, LABELS[k]), leaves)
            torch.testing.assert_close(tuple(g[k] for g in found), alone, rtol=1e-4, atol=1e-6)


@each_backend
def test_a_tangent_of_the_weight_alone_is_seen(backend):
    tangent = torch.randn(V, H, generator=G)

    def exact(w):
        return torch.log_softmax(X[0] @ w.T, -1)[:, 1]

    with fa.use_backend(backend):
        found = func.jvp(lambda w: fa.head_token_stats(X[0], w, torch.ones(T).long()).logps, (WEIGHT,), (tangent,))[1]
    torch.testing.assert_close(found, func.jvp(exact, (WEIGHT,), (tangent,))[1], rtol=1e-4, atol=1e-5)


@each_backend
def test_what_is_hidden_or_excluded_makes_no_nan_under_a_transform(backend):
    x = logits_of(X)
    x[0, 1] = torch.nan  # its label is ignored
    x[1, 0, 4] = -torch.inf

    def f(x):
        stats = fa.token_stats(x, LABELS, ref_logits=REFERENCE, entropy=True, kl=True)
        return ours_statistics(stats).sum()

    with fa.use_backend(backend):
        found = func.grad(f)(x)
        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(found, torch.autograd.grad(f(leaf), leaf)[0], rtol=1e-4, atol=1e-6)
        assert torch.isfinite(func.jvp(f, (x,), (torch.ones_like(x),))[1])


def test_diagnostics_are_there_under_a_transform_too():
    names = ["log_sum_sq_probs", "mean_logits", "is_top1", "argmax"]
    x = logits_of(X)
    wanted = fa.token_stats(x, LABELS, diagnostics=names)
    found = func.vmap(lambda x, y: fa.token_stats(x, y, diagnostics=names)[4:])(x, LABELS)
    torch.testing.assert_close(tuple(found), tuple(wanted[4:]))


def test_a_wrong_label_is_named_under_a_transform_too():
    with pytest.raises(ValueError, match=r"labels must be in \[0, 5\)"):
        func.grad(lambda x: fa.token_logps(x, LABELS + 5).sum())(logits_of(X))
