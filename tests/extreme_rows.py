"""Rows at the ends of what a softmax can be, and what must come of them: for every backend, whichever serves the call.

Not a test file: the tests of the CPU's and CUDA's kernels and those of the interpreted ones call these checks.
"""

from __future__ import annotations

import itertools

import torch

import fastalign as fa
from fastalign import Objective, _backends, token_objective

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


# ------------------------------------------------------------------------------------------------------- diagnostics
DIAGNOSTICS = ("log_sum_sq_probs", "mean_logits", "is_top1", "argmax")


def exact_diagnostics(x, labels, temperature=1.0, softcap=None):
    """By torch's own operations in float64; a row without a softmax has no argmax."""
    wide = x.double()
    wide = (wide if softcap is None else softcap * torch.tanh(wide / softcap)) / temperature
    valid = labels != -100
    best = torch.where(valid & wide.logsumexp(-1).isfinite(), x.argmax(-1), -1)
    return {
        "log_sum_sq_probs": torch.where(valid, (2 * wide.log_softmax(-1)).logsumexp(-1), 0),
        "mean_logits": torch.where(valid, torch.where(best < 0, torch.nan, wide.mean(-1)), 0),
        "is_top1": best == torch.where(valid, labels, -2),
        "argmax": best,
    }


def diagnostics(dtype, vocab, offset=0, **options):
    """Of ordinary rows, rows with equal maxima at their ends, ignored ones, a sure one, and rows without a softmax."""
    g = torch.Generator().manual_seed(vocab)
    storage = torch.empty(9 * vocab + offset, dtype=dtype)
    x = storage[offset:].view(9, vocab)
    x.copy_(3 * torch.randn(9, vocab, generator=g))
    most = 20.0
    x[1, vocab // 2 :: max(1, vocab // 7)] = most  # of equal ones the first
    x[2, 0] = x[2, -1] = most
    x[3, -1] = most + 20
    x[4, vocab // 3], x[5, 0], x[6] = torch.nan, torch.inf, -torch.inf
    x[7, 1:] = -torch.inf
    labels = x.argmax(-1)
    labels[0] = vocab // 4
    labels[8] = -100
    wanted = exact_diagnostics(x, labels, **options)
    leaf = x.detach().requires_grad_()
    for names in (DIAGNOSTICS, DIAGNOSTICS[::2]):
        stats = fa.token_stats(leaf, labels, diagnostics=names, **options)
        for name in names:
            found = getattr(stats, name)
            assert not found.requires_grad
            if found.is_floating_point():
                found = torch.where(wanted[name].isnan(), torch.nan, found) if name == "mean_logits" else found
                close(name, found, wanted[name], torch.float64 if dtype == torch.float64 else torch.float32)
            else:
                assert torch.equal(found, wanted[name]), (name, found, wanted[name])
    reference = torch.roll(x.detach(), 1, -1)
    both = fa.token_stats(leaf, labels, ref_logits=reference, kl=True, entropy=True, diagnostics=DIAGNOSTICS, **options)
    alone = fa.token_stats(leaf, labels, ref_logits=reference, kl=True, entropy=True, **options)
    for ours, other in zip(both[:4], alone, strict=True):
        close("beside a KL", ours, other.double(), torch.float32)
    assert torch.equal(both.argmax, wanted["argmax"])
    close("log_sum_sq_probs", both.log_sum_sq_probs, wanted["log_sum_sq_probs"], torch.float32)


# ------------------------------------------------------------------------------------------------------ nothing there
def rows_of_nothing(dtype, vocab):
    """A row of nothing but -inf among others keeps to itself: its log-probability is NaN, as torch's is, its lse -inf,
    also as what a backward or a merge gets of it; without a gradient of its own it has none."""
    g = torch.Generator().manual_seed(vocab)
    x, z = ((2 * torch.randn(3, vocab, generator=g)).to(dtype) for _ in range(2))
    x[1] = -torch.inf
    labels = torch.tensor([0, vocab // 2, vocab - 1])
    saved = torch.ops.fastalign.token_stats(x, labels, z, -100, 1.0, 0.0, True, False, False)[5]
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
        diagnostics=["log_sum_sq_probs"],
    )  # fmt: skip
    gradients = torch.autograd.grad((stats.logps + 0.5 * stats.entropy + 0.2 * stats.kl).sum(), leaves)

    wide = [t.detach().double().requires_grad_() for t in leaves]
    valid = labels != -100
    x, z = wide[0] @ wide[1].T + wide[2], ref_hidden.double() @ ref_weight.double().T + bias.detach().double()
    if dtype.itemsize == 2:  # what the tiles hold
        x = x + (x.to(dtype).double() - x).nan_to_num(0).detach()
        z = z.to(dtype).double()
    logps, entropy, kl = exact_statistics(x[valid, :real], z[valid, :real], labels[valid])
    exact = torch.autograd.grad((logps + 0.5 * entropy + 0.2 * kl).sum(), wide)
    found = (stats.logps, stats.entropy, stats.kl, stats.log_sum_sq_probs)
    sq = (2 * torch.log_softmax(x[valid, :real], -1)).logsumexp(-1)
    for name, ours, wanted in zip(("logps", "entropy", "kl", "sq"), found, (logps, entropy, kl, sq), strict=True):
        close(name, ours[valid], wanted, dtype)
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


# ---------------------------------------------------------------------------------------------------- certain targets
LEADS = (17.0, 25.0, 37.5, 60.0)
"""Of the target over the largest other logit, in nats."""


def certain(dtype, vocab, places, temperature=1.0, leads=LEADS):
    """Rows whose target leads, by each of `leads` at each place, [leads * places, vocab]; and the labels."""
    g = torch.Generator().manual_seed(vocab)
    cases = list(itertools.product(leads, places))
    x = torch.rand(len(cases), vocab, generator=g) - 3
    labels = torch.tensor([place for _, place in cases])
    leads = torch.tensor([lead for lead, _ in cases]) * temperature
    return x.scatter(-1, labels[:, None], leads[:, None] - 2).to(dtype), labels


def complement(x, labels, temperature=1.0, cap=None):
    """(log p, 1 - p, slope of the cap) of the targets, from the others' sum in float64."""
    x = x.double()
    capped = x if cap is None else cap * torch.tanh(x / cap)
    target = capped.gather(-1, labels[:, None])
    odds = ((capped - target) / temperature).exp().scatter(-1, labels[:, None], 0).sum(-1)
    at = x.gather(-1, labels[:, None]).squeeze(-1)
    squash = torch.ones_like(odds) if cap is None else 1 - torch.tanh(at / cap) ** 2
    return -torch.log1p(odds), odds / (1 + odds), squash


def check_certain(logps, at_target, weights, x, labels, **options):
    """Log-probabilities to 1e-3, gradients of the targets' logits to 1e-2, relative; `weights`: upstream gradients."""
    exact, rest, squash = complement(x, labels, **options)
    slope = weights.double() * rest * squash / options.get("temperature", 1.0)
    assert (logps <= 0).all()
    torch.testing.assert_close(logps.double(), exact, rtol=1e-3, atol=0)
    torch.testing.assert_close(at_target.double(), slope, rtol=1e-2, atol=0)


def certain_targets(dtype, vocab, places, *, leads=LEADS, everything=True):
    """In all modes, by way of autograd and in one launch, in place and not."""
    for temperature, cap in ((1.0, None), (0.7, None), (1.3, 50.0)) if everything else ((1.0, None),):
        options = {"temperature": temperature} | ({} if cap is None else {"cap": cap})
        x, labels = certain(dtype, vocab, places, temperature, leads)
        rest = complement(x, labels, **options)[1]
        weights = (1 / rest).float()  # the gradients at the targets are about 1 then, in any dtype
        call = {"temperature": temperature, "softcap": cap}
        for more in ({}, {"entropy": True}, {"ref_logits": x.flip(0) / 2, "kl": True}) if everything else ({},):
            for inplace in (False, True):
                leaf = x.clone().requires_grad_()
                stats = fa.token_stats(leaf * 1, labels, inplace_backward=inplace, **call, **more)
                (gradient,) = torch.autograd.grad(stats.logps, leaf, weights.to(stats.logps.dtype))
                at = gradient.gather(-1, labels[:, None]).squeeze(-1)
                check_certain(stats.logps.detach(), at, weights, x, labels, **options)
        if _backends.choose(x) == "eager":
            continue
        for inplace in (False, True):
            stats, gradient = token_objective(x.clone(), labels, weights, Objective("sft"), inplace=inplace, **call)
            at = -gradient.gather(-1, labels[:, None]).squeeze(-1)
            check_certain(stats.logps, at, weights, x, labels, **options)


def certain_losses(dtype):
    """Cross-entropy, SFT in two reads and in one, DPO: the gradients of the targets' logits, of 1 - p each."""
    places = (0, 700, 1299)
    x, labels = certain(dtype, 1300, places)
    exact, rest, _ = complement(x, labels)
    x, labels = x.reshape(4, 3, 1300), labels.reshape(4, 3)

    def check(loss, derivatives, value=None, least=1.0):
        """`loss(logits)`, and its derivatives in the log-probabilities, [12], times a scale that 16 bits can hold. What
        float16 has no number for was rounded before or (`least` = 1) after that."""
        leaf = x.clone().requires_grad_()
        found = loss(leaf)
        up = 1 / float(rest.max())
        (gradient,) = torch.autograd.grad(found, leaf, torch.full_like(found, up))
        at = gradient.gather(-1, labels[..., None]).flatten().double()
        least *= 2.0**-25 if dtype == torch.float16 else 0
        torch.testing.assert_close(at, derivatives.double() * rest * up, rtol=1e-2, atol=least)
        if value is not None and found.dtype == torch.float32:
            torch.testing.assert_close(found.detach().double(), value, rtol=1e-3, atol=0)

    count = labels.numel()
    mean = torch.full((count,), -1 / count)
    check(lambda t: fa.cross_entropy(t.view(-1, 1300), labels.view(-1)), mean, -exact.mean())
    for fused in (False, True) if _backends.choose(x) != "eager" else (False,):
        sft = fa.losses.SFTLoss(fuse_backward=fused)
        check(lambda t, sft=sft: sft(t, labels).loss, mean, -exact.mean(), 1 / float(rest.max()) if fused else 1)
    # Rows 0 and 1 are chosen, 2 and 3 rejected, without a reference.
    chosen, rejected = exact.view(4, 3).sum(-1).chunk(2)
    slope = -0.1 * torch.sigmoid(-0.1 * (chosen - rejected)) / 2
    derivatives = torch.cat([slope, -slope])[:, None].expand(4, 3).flatten()
    dpo = fa.losses.DPOLoss(beta=0.1)
    check(lambda t: dpo(t, labels).loss, derivatives)


def never_above_zero(dtype, vocab, steps=301):
    """Whatever the lead, from none to far beyond all that exponentials can tell from 0."""
    leads = torch.cat([torch.linspace(0, 30, steps), torch.tensor([60.0, 90.0, 110.0, 300.0, 1e4])])
    for place in {0, vocab // 2, vocab - 1}:
        x = torch.randn(len(leads), vocab, generator=torch.Generator().manual_seed(place)).clamp(max=0)
        x[:, place] = leads
        x = x.to(dtype)
        labels = torch.full((len(leads),), place)
        leaf = x.clone().requires_grad_()
        logps = fa.token_logps(leaf, labels)
        (gradient,) = torch.autograd.grad(logps.sum(), leaf)
        exact, rest, _ = complement(x, labels)
        assert (logps <= 0).all()
        assert (gradient[:, place] >= 0).all()
        # From sums to 4.5e-6 (see `is_sure` in token_stats.h), and where p is near 1 to 1e-3 of what there is; powers
        # below 2^-126 may be 0.
        torch.testing.assert_close(logps.detach().double(), exact, rtol=1e-5, atol=4.5e-6)
        torch.testing.assert_close(logps.detach().double(), exact, rtol=1e-3, atol=vocab * 2.0**-126)
        close("gradient", gradient[:, place], rest, dtype)


def one_word(dtype):
    """A vocabulary of one: exactly 0, both."""
    x = torch.tensor([[3.25], [-7.5], [0.0], [1e4]]).to(dtype)
    labels = torch.zeros(4, dtype=torch.long)
    for options in ({}, {"temperature": 0.7}, {"temperature": 1.3, "softcap": 5.0}, {"entropy": True}):
        leaf = x.clone().requires_grad_()
        logps = fa.token_stats(leaf, labels, **options).logps
        (gradient,) = torch.autograd.grad(logps.sum(), leaf)
        assert logps.tolist() == [0.0] * 4
        assert gradient.flatten().tolist() == [0.0] * 4
        if _backends.choose(x) != "eager":
            weights, same = torch.ones(4), {name: v for name, v in options.items() if name != "entropy"}
            stats, gradient = token_objective(x.clone(), labels, weights, Objective("sft"), **same)
            assert stats.logps.tolist() == gradient.flatten().tolist() == [0.0] * 4


def certain_heads(dtype, plan):
    """A head whose logits are its weights: each token's hidden state has a 1 of its own. Tiles of 1,024 columns; the
    target's may have all that there is beside it, some or none."""
    vocab = 2500
    x, labels = certain(dtype, vocab, (0, 1023, 1500, 2499))
    x[::3, 1024:2048] -= 5
    x[1::3, :1024] = -torch.inf
    x.scatter_(-1, labels[:, None], certain(dtype, vocab, (0, 1023, 1500, 2499))[0].gather(-1, labels[:, None]))
    tokens = len(labels)
    hidden = torch.eye(tokens).to(dtype).requires_grad_()
    weight = torch.where(x == -torch.inf, -30000, x).T.contiguous().requires_grad_()
    budget = tokens * 1024 * hidden.element_size()
    stats = fa.head_token_stats(hidden, weight, labels, plan=plan, chunk_bytes=budget)
    weights = (1 / complement(weight.detach().T, labels)[1]).to(stats.logps.dtype)
    (gradient,) = torch.autograd.grad(stats.logps, weight, weights)
    at_target = gradient[labels, torch.arange(tokens)]
    check_certain(stats.logps.detach(), at_target, weights, weight.detach().T, labels)
