"""Rows at the ends of what a softmax can be, and what must come of them: for every backend, whichever serves the call.

Not a test file: the tests of the CPU's and CUDA's kernels and those of the interpreted ones call these checks.
"""

from __future__ import annotations

import torch

import fastalign as fa

ROUNDING = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}
"""Of numbers about 1 that passed through 16 bits once, or of sums in float32."""


def close(name, ours, exact, dtype):
    """Equal up to rounding; NaN and infinities where the exact numbers have them."""
    margin = ROUNDING[dtype]
    torch.testing.assert_close(
        ours.detach().double(), exact.detach(), rtol=margin, atol=margin, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


def exact_statistics(x, z, labels):
    """logps, entropy and KL of finite logits by torch's own operations."""
    logp, logq = torch.log_softmax(x, -1), torch.log_softmax(z, -1)
    p = logp.exp()
    return logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(p * logp).sum(-1), (p * (logp - logq)).sum(-1)


# ------------------------------------------------------------------------------------------------------ nothing there
def rows_of_nothing(dtype, vocab):
    """A row of nothing but -inf among others keeps to itself: its log-probability is NaN, as torch's is, its lse -inf,
    also as what a backward or a merge gets of it; without a gradient of its own it has none."""
    g = torch.Generator().manual_seed(vocab)
    x, z = ((2 * torch.randn(3, vocab, generator=g)).to(dtype) for _ in range(2))
    x[1] = -torch.inf
    labels = torch.tensor([0, vocab // 2, vocab - 1])
    saved = torch.ops.fastalign.token_stats(x, labels, z, -100, 1.0, 0.0, True, False, False)[-1]
    assert (saved[1, 0] + saved[1, 1]).item() == -torch.inf
    assert torch.isfinite(saved[[0, 2]]).all()
    leaf = x.clone().requires_grad_()
    stats = fa.token_stats(leaf, labels, ref_logits=z, entropy=True, kl=True)
    exact = exact_statistics(x[[0, 2]].double(), z[[0, 2]].double(), labels[[0, 2]])
    for name, ours, wanted in zip(("logps", "entropy", "kl"), (stats[0], *stats[2:]), exact, strict=True):
        close(name, ours[[0, 2]], wanted, torch.float64 if dtype == torch.float64 else torch.float32)
        assert ours[1].isnan()
    assert stats.lse[1] == -torch.inf
    (gradient,) = torch.autograd.grad((stats.logps + stats.entropy + stats.kl)[[0, 2]].sum(), leaf)
    assert torch.isfinite(gradient).all()
    assert not gradient[1].any()
    (gradient,) = torch.autograd.grad(fa.token_logps(leaf, labels).sum(), leaf)
    assert gradient.isnan().any(-1).tolist() == [False, True, False]


def references_that_exclude(dtype, vocab):
    """The reference is -inf where the policy is not: the KL is infinite, and nothing else knows of it."""
    g = torch.Generator().manual_seed(vocab)
    x, z = ((2 * torch.randn(4, vocab, generator=g)).to(dtype) for _ in range(2))
    z[1, vocab // 3], z[2, 1:], x[3, 0], z[3, 0] = -torch.inf, -torch.inf, -torch.inf, -torch.inf
    labels = torch.tensor([vocab // 2, vocab // 3, vocab - 1, 1])

    def gradient(choose, **options):
        leaf = x.clone().requires_grad_()
        stats = fa.token_stats(leaf, labels, **options)
        return stats, torch.autograd.grad(choose(stats).sum(), leaf)[0]

    finite = torch.tensor([True, False, False, True])
    with_z = {"ref_logits": z, "kl": True, "entropy": True}
    _, alone = gradient(lambda s: s.logps + 0.3 * s.entropy, entropy=True)
    stats, beside = gradient(lambda s: s.logps + 0.3 * s.entropy, **with_z)
    assert (stats.kl == torch.inf).tolist() == [False, True, True, False]
    close("gradient beside a KL that nobody uses", beside, alone.double(), dtype)
    _, masked = gradient(lambda s: s.logps + 0.3 * s.entropy + torch.where(finite, s.kl, 0), **with_z)
    close("gradient where the KL is hidden", masked[1:3], alone[1:3].double(), dtype)
    leaf = x[[0, 3], 1:].double().requires_grad_()
    logps, entropy, kl = exact_statistics(leaf, z[[0, 3], 1:].double(), labels[[0, 3]] - 1)
    (exact,) = torch.autograd.grad((logps + 0.3 * entropy + kl)[1], leaf)
    close("gradient with the KL", masked[3, 1:], exact[1], dtype)
    close("kl", stats.kl[3], kl[1], torch.float64 if dtype == torch.float64 else torch.float32)


def empty_tiles(dtype, vocab, real):
    """Of a head's tiles of 1,024 columns those from column `real` on have nothing but -inf, the reference's too."""
    g = torch.Generator().manual_seed(real)
    tokens, width = 4, 8
    hidden, ref_hidden = ((0.5 * torch.randn(tokens, width, generator=g)).to(dtype) for _ in range(2))
    weight, ref_weight = (torch.randn(vocab, width, generator=g).to(dtype) for _ in range(2))
    bias = torch.randn(vocab, generator=g).to(dtype).index_fill(0, torch.arange(real, vocab), -torch.inf)
    labels = torch.tensor([0, real - 1, -100, real // 2])
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    reference = {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": bias.detach(), "kl": True}
    budget = 2 * 3 * 1024 * hidden.element_size()
    stats = fa.head_token_stats(
        hidden, weight, labels, bias=bias, **reference, entropy=True, plan="recompute", chunk_bytes=budget,
        extras=["log_sum_sq_probs"],
    )  # fmt: skip
    gradients = torch.autograd.grad((stats.logps + 0.5 * stats.entropy + 0.2 * stats.kl).sum(), leaves)

    wide = [t.detach().double().requires_grad_() for t in leaves]
    live = labels != -100
    x, z = wide[0] @ wide[1].T + wide[2], ref_hidden.double() @ ref_weight.double().T + bias.detach().double()
    if dtype.itemsize == 2:  # what the tiles hold
        x = x + (x.to(dtype).double() - x).nan_to_num(0).detach()
        z = z.to(dtype).double()
    logps, entropy, kl = exact_statistics(x[live, :real], z[live, :real], labels[live])
    exact = torch.autograd.grad((logps + 0.5 * entropy + 0.2 * kl).sum(), wide)
    found = (stats.logps, stats.entropy, stats.kl, stats.log_sum_sq_probs)
    sq = (2 * torch.log_softmax(x[live, :real], -1)).logsumexp(-1)
    for name, ours, wanted in zip(("logps", "entropy", "kl", "sq"), found, (logps, entropy, kl, sq), strict=True):
        close(name, ours[live], wanted, dtype)
    for name, ours, wanted in zip(("hidden", "weight", "bias"), gradients, exact, strict=True):
        assert torch.isfinite(ours).all(), name
        error = (ours.double() - wanted).norm() / wanted.norm()
        assert error <= ROUNDING[dtype], (name, float(error))


def tiles_that_the_reference_excludes(dtype):
    """A tile that the reference does not have makes the KL infinite, not NaN, and leaves the rest as it is; one that
    the policy does not have leaves even the KL."""
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(3, 6, generator=g).to(dtype), torch.randn(3000, 6, generator=g).to(dtype)
    labels, none = torch.tensor([5, 1500, 2900]), torch.zeros(3000, dtype=dtype)
    hole = none.index_fill(0, torch.arange(1024, 2048), -torch.inf)
    budget = {"plan": "recompute", "chunk_bytes": 2 * 3 * 1024 * hidden.element_size()}

    def stats(bias, ref_bias):
        leaf = hidden.clone().requires_grad_()
        reference = {"ref_hidden": hidden, "ref_weight": weight, "ref_bias": ref_bias, "kl": True}
        found = fa.head_token_stats(leaf, weight, labels, bias=bias, **reference, entropy=True, **budget)
        return found, torch.autograd.grad(found.logps[[0, 2]].sum() + found.entropy.sum(), leaf)[0]

    alike, gradient = stats(none, none)
    excluded, same = stats(none, hole)
    assert (excluded.kl == torch.inf).all()
    for a, b in ((excluded.logps, alike.logps), (excluded.entropy, alike.entropy), (same, gradient)):
        assert torch.equal(a, b)
    narrower, gradient = stats(hole, none)
    assert torch.isfinite(narrower.kl).all()
    assert torch.isfinite(gradient).all()
    assert narrower.logps[1] == -torch.inf
