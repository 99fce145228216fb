"""The fused head: every plan and every loss equals the path over logits; nothing masked is touched."""

import pytest
import torch
from torch.nn import functional as F

import fastalign as fa
from fastalign import losses
from fastalign.head import PLANS, as_head

B, T, H, V = 4, 6, 16, 2311
TILES = [("keep", None), ("recompute", None), ("recompute", 40_000), ("recompute", 9_000), ("project", 40_000)]
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "everything": {"bias": True, "entropy": True, "kl": True, "temperature": 0.8, "softcap": 3.0, "logit_scale": 2.0},
    "smoothed": {"label_smoothing": 0.1, "logit_scale": 0.5, "bias": True},
}
# Relative error of a gradient. In 16 bits logits and their gradient are rounded to 8 or 11 bits before the GEMM, in
# eager torch as here; the test compares with eager's own error.
MARGIN = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 0.0, torch.float16: 0.0}


def problem(dtype, *, frozen=False, seed=0, weight_dtype=None):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, H, generator=g).to(dtype)
    weight = (0.5 * torch.randn(V, H, generator=g)).to(weight_dtype or dtype)
    bias = torch.randn(V, generator=g).to(weight_dtype or dtype)
    ref = (torch.randn(B, T, 8, generator=g).to(dtype), torch.randn(V, 8, generator=g).to(weight_dtype or dtype))
    labels = torch.randint(0, V, (B, T), generator=g)
    labels[0, :4] = -100
    labels[2, 5] = -100
    leaves = [hidden.requires_grad_(), weight.requires_grad_(not frozen), bias.requires_grad_(not frozen)]
    return leaves, ref, labels, g


def scalar(stats, labels):
    """A loss that uses every statistic there is, with a coefficient of its own for each token."""
    draw = torch.Generator().manual_seed(3)
    used = [t for t in (stats.logps, stats.entropy, stats.kl) if t is not None]
    return sum((torch.randn(labels.shape, generator=draw).to(t.dtype) * t).sum() for t in used)


def eager(leaves, ref, labels, options):
    """(statistics, gradients) over logits that torch makes, of the leaves' own dtype."""
    options = dict(options)
    scale, bias = options.pop("logit_scale", 1.0), options.pop("bias", False)
    hidden, weight, b = leaves
    logits = scale * F.linear(hidden, weight, b if bias else None)
    with fa.use_backend("eager"):
        extra = {"ref_logits": scale * F.linear(*ref)} if options.get("kl") else {}
        stats = fa.token_stats(logits, labels, **extra, **options)
        wanted = [t for t in (hidden, weight, *((b,) if bias else ())) if t.requires_grad]
        return stats, torch.autograd.grad(scalar(stats, labels), wanted)


def fused(leaves, ref, labels, options, **choice):
    options = dict(options)
    hidden, weight, b = leaves
    use_bias = options.pop("bias", False)
    if options.get("kl"):
        options |= {"ref_hidden": ref[0], "ref_weight": ref[1]}
    stats = fa.head_token_stats(hidden, weight, labels, bias=b if use_bias else None, **options, **choice)
    wanted = [t for t in (hidden, weight, *((b,) if use_bias else ())) if t.requires_grad]
    return stats, torch.autograd.grad(scalar(stats, labels), wanted)


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("plan", "chunk_bytes"), TILES)
@pytest.mark.parametrize("dtype", MARGIN, ids=str)
def test_equals_the_logits_path(dtype, plan, chunk_bytes, options):
    leaves, ref, labels, _ = problem(dtype, frozen=plan == "project")
    double = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    want, want_grads = eager(double, tuple(t.double() for t in ref), labels, options)
    torch_stats, torch_grads = eager(leaves, ref, labels, options)
    got, grads = fused(leaves, ref, labels, options, plan=plan, chunk_bytes=chunk_bytes)
    for name, ours, theirs, exact in zip(got._fields, got, torch_stats, want, strict=True):
        if exact is None:
            assert ours is None
            continue
        margin = {torch.float64: 1e-13}.get(dtype, 2e-6) * float(exact.detach().abs().max())
        # 16-bit logits: ours come from the same GEMM, up to its own order of summation.
        allowed = float((theirs.double() - exact).abs().max()) * (1.0 if dtype.itemsize > 2 else 1.5) + margin
        assert float((ours.double() - exact).abs().max()) <= allowed, name
        assert (ours[labels == -100] == 0).all()
    for ours, theirs, exact in zip(grads, torch_grads, want_grads, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative(ours, exact) <= 1.5 * relative(theirs, exact) + MARGIN[dtype]


@pytest.mark.parametrize(("plan", "chunk_bytes"), TILES[:-1])
def test_master_weights_of_another_dtype(plan, chunk_bytes):
    leaves, ref, labels, _ = problem(torch.bfloat16, weight_dtype=torch.float32)
    double = [t.detach().double().requires_grad_() for t in leaves]
    want = eager(double, tuple(t.double() for t in ref), labels, {})[1]
    got = fused(leaves, ref, labels, {}, plan=plan, chunk_bytes=chunk_bytes)[1]
    assert [t.dtype for t in got] == [torch.bfloat16, torch.float32]
    assert all(relative(a, b) < 1.2e-2 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("plan", "chunk_bytes"), TILES)
def test_gradcheck(plan, chunk_bytes):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 3, dtype=torch.float64, generator=g, requires_grad=True)
    weight = torch.randn(1100, 3, dtype=torch.float64, generator=g, requires_grad=plan != "project")
    labels = torch.tensor([0, 7, -100, 1099, 1030])

    def logps(h, w):
        return fa.head_token_stats(h, w, labels, plan=plan, chunk_bytes=chunk_bytes).logps

    assert torch.autograd.gradcheck(lambda h: logps(h, weight.detach()), (hidden,), eps=1e-6)
    if weight.requires_grad:
        some = torch.zeros(1100, 1, dtype=torch.float64)
        some[[0, 7, 1030, 1099, 500]] = 1

        def through(part):
            return logps(hidden.detach(), weight.detach() + some * part)

        assert torch.autograd.gradcheck(through, (torch.zeros(3, dtype=torch.float64, requires_grad=True),), eps=1e-6)


@pytest.mark.parametrize(("plan", "chunk_bytes"), TILES)
def test_runs_repeat_bit_for_bit(plan, chunk_bytes):
    leaves, ref, labels, _ = problem(torch.float32, frozen=plan == "project")
    runs = [fused(leaves, ref, labels, {}, plan=plan, chunk_bytes=chunk_bytes) for _ in range(2)]
    assert torch.equal(runs[0][0].logps, runs[1][0].logps)
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


@pytest.mark.parametrize(("plan", "chunk_bytes"), TILES)
def test_nothing_masked_is_touched(plan, chunk_bytes):
    leaves, ref, labels, _ = problem(torch.float32, frozen=plan == "project")
    clean = fused(leaves, ref, labels, {}, plan=plan, chunk_bytes=chunk_bytes)
    with torch.no_grad():
        leaves[0][labels == -100] = torch.nan
    spoilt = fused(leaves, ref, labels, {}, plan=plan, chunk_bytes=chunk_bytes)
    assert torch.equal(clean[0].logps, spoilt[0].logps)
    for a, b in zip(clean[1], spoilt[1], strict=True):
        assert torch.equal(a, b)
    assert (spoilt[1][0][labels == -100] == 0).all()


@pytest.mark.parametrize(("plan", "chunk_bytes"), TILES)
def test_all_masked(plan, chunk_bytes):
    leaves, ref, labels, _ = problem(torch.float32, frozen=plan == "project")
    stats, grads = fused(leaves, ref, torch.full_like(labels, -100), {}, plan=plan, chunk_bytes=chunk_bytes)
    assert (stats.logps == 0).all()
    assert all((g == 0).all() for g in grads)


def modules():
    """(module, its further arguments) for everything that takes logits."""
    half = torch.linspace(-30, -20, B // 2)
    rewards = torch.tensor([[2.0, 1.0], [1.0, 0.5]])
    old, advantages = torch.full((B, T), -8.0), torch.linspace(-1, 1, B)
    return {
        "sft": (losses.SFTLoss(), {}),
        "sft-z": (losses.SFTLoss(z_loss=0.01, label_smoothing=0.1), {}),
        "dpo": (losses.DPOLoss(), {"ref_chosen_logps": half, "ref_rejected_logps": half - 1}),
        "pro": (losses.PROLoss(sft_weight=0.1), {"rewards": rewards}),
        "kto": (losses.KTOLoss(), {"desirable": torch.tensor([True, False, True, False])}),
        "ppo": (losses.PPOLoss(entropy_coef=0.01), {"old_logps": old, "advantages": advantages}),
        "ppo-one-launch": (losses.PPOLoss(fuse_backward=True), {"old_logps": old, "advantages": advantages}),
    }


@pytest.mark.parametrize("plan", ["keep", "recompute"])
@pytest.mark.parametrize("name", modules())
def test_every_module_takes_a_head(name, plan):
    module, arguments = modules()[name]
    if name == "pro":
        arguments = dict(arguments)
    (hidden, weight, bias), _, labels, _ = problem(torch.float32)
    budget = 40_000 if plan == "recompute" else None
    head = fa.Head(hidden, weight, bias, chunk_bytes=budget, plan=plan)
    got = module(head, labels, **arguments)
    want = module(F.linear(hidden, weight, bias), labels, **arguments)
    for a, b in zip(got, want, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    got_grads = torch.autograd.grad(got.loss, [hidden, weight, bias])
    want_grads = torch.autograd.grad(want.loss, [hidden, weight, bias])
    assert all(relative(a, b) < 2e-5 for a, b in zip(got_grads, want_grads, strict=True))


def test_a_plain_tuple_and_a_reference_head():
    (hidden, weight, _), ref, labels, _ = problem(torch.float32)
    got = losses.DPOLoss()((hidden, weight), labels, ref_logits=ref)
    want = losses.DPOLoss()(F.linear(hidden, weight), labels, ref_logits=F.linear(*ref))
    torch.testing.assert_close(got.loss, want.loss)
    exact = losses.PPOLoss(kl_estimator="exact", kl_coef=0.1)
    arguments = (labels, torch.full((B, T), -8.0), torch.ones(B))
    got_kl = exact((hidden, weight), *arguments, ref_logits=ref)
    want_kl = exact(F.linear(hidden, weight), *arguments, ref_logits=F.linear(*ref))
    torch.testing.assert_close(got_kl.loss, want_kl.loss)
    torch.testing.assert_close(got_kl.kl, want_kl.kl)


def test_microbatches_add_up():
    (hidden, weight, _), _, labels, _ = problem(torch.float64)
    loss = fa.head_token_stats(hidden, weight, labels).logps.sum()
    whole = torch.autograd.grad(loss, [hidden, weight])
    parts = torch.zeros_like(weight)
    for row in range(B):
        part = fa.head_token_stats(hidden[row], weight, labels[row]).logps.sum()
        parts += torch.autograd.grad(part, weight)[0]
    torch.testing.assert_close(parts, whole[1], rtol=1e-12, atol=1e-12)


def test_tied_embeddings_sum_their_gradients():
    weight = torch.randn(V, H, requires_grad=True, generator=torch.Generator().manual_seed(0))
    ids, labels = torch.arange(5), torch.arange(1, 6)
    fused_grad = torch.autograd.grad(fa.head_token_stats(weight[ids], weight, labels).logps.sum(), weight)[0]
    want = torch.autograd.grad(fa.token_logps(weight[ids] @ weight.t(), labels).sum(), weight)[0]
    assert relative(fused_grad, want) < 1e-5


def test_autocast_computes_in_16_bits():
    (hidden, weight, _), _, labels, _ = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logps = fa.head_token_stats(hidden, weight, labels).logps
    want = fa.head_token_stats(hidden.bfloat16(), weight.bfloat16(), labels).logps
    assert torch.equal(logps, want)
    assert [g.dtype for g in torch.autograd.grad(logps.sum(), [hidden, weight])] == [torch.float32] * 2


def test_a_retained_graph_can_be_used_again_and_a_second_derivative_is_refused():
    (hidden, weight, _), _, labels, _ = problem(torch.float32)
    logps = fa.head_token_stats(hidden, weight, labels, plan="keep").logps.sum()
    first = torch.autograd.grad(logps, [hidden, weight], retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(logps, [hidden, weight])))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(logps, hidden)
    other = fa.head_token_stats(hidden, weight, labels, plan="recompute").logps.sum()
    (grad,) = torch.autograd.grad(other, hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), hidden)


def test_the_plan_can_be_read():
    big = {"tokens": 4096, "vocab": 128256, "hidden_size": 1024, "dtype": torch.bfloat16}
    assert fa.head_plan(**big, chunk_bytes=2 << 30).name == "keep"
    recompute = fa.head_plan(**big, chunk_bytes=64 << 20)
    assert (recompute.name, recompute.gemms) == ("recompute", 4)
    assert recompute.rows * recompute.columns * 2 <= 64 << 20
    frozen = fa.head_plan(**big, chunk_bytes=64 << 20, train_weight=False)
    assert (frozen.name, frozen.gemms, frozen.columns) == ("project", 2, 128256)
    assert fa.head_plan(**big, chunk_bytes=64 << 20, train_weight=False, kl=True).name == "recompute"
    assert {fa.head_plan(**big, plan=plan, train_weight=False).name for plan in PLANS} == set(PLANS)


BAD = {
    "hidden must be a torch.Tensor": (TypeError, {"hidden": [1.0]}),
    "hidden must be float32": (TypeError, {"hidden": torch.zeros(B, T, H, dtype=torch.int64)}),
    r"weight \[V, H\]": (ValueError, {"weight": torch.zeros(V, H + 1)}),
    "ZeRO-3": (ValueError, {"weight": torch.zeros(0)}),
    "labels must be int64 or int32": (TypeError, {"labels": torch.zeros(B, T)}),
    r"labels must have the shape of hidden .*\[4, 6\]": (
        ValueError,
        {"labels": torch.zeros(B, T + 1, dtype=torch.int64)},
    ),
    "got 2311 at flat position 1": (ValueError, {"labels": torch.tensor([[0, V] + [0] * 4] * B)}),
    r"bias must be \[V\]": (ValueError, {"bias": torch.zeros(3)}),
    "temperature must be": (ValueError, {"temperature": float("nan")}),
    "logit_scale must be": (ValueError, {"logit_scale": 0.0}),
    "softcap must be": (ValueError, {"softcap": -1.0}),
    "label_smoothing must be": (ValueError, {"label_smoothing": 2.0}),
    "kl=True goes with": (ValueError, {"kl": True}),
    "plan must be None or one of keep": (ValueError, {"plan": "other"}),
    "needs a frozen head": (ValueError, {"plan": "project"}),
    "chunk_bytes must be": (ValueError, {"chunk_bytes": 0}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    (hidden, weight, _), _, labels, _ = problem(torch.float32)
    kind, change = BAD[message]
    with pytest.raises(kind, match=message):
        fa.head_token_stats(**({"hidden": hidden, "weight": weight, "labels": labels} | change))


def test_a_head_is_made_of_tensors():
    with pytest.raises(TypeError, match=r"logits must be a Head or a tuple \(hidden, weight\[, bias\]\); got list"):
        as_head("logits", [1, 2])
    with pytest.raises(TypeError, match=r"logits's weight must be a torch\.Tensor; got int"):
        losses.SFTLoss()((torch.zeros(2, 3), 5), torch.zeros(2, dtype=torch.int64))


def test_a_compiled_function_steps_out_for_it():
    (hidden, weight, _), _, labels, _ = problem(torch.float32)

    def loss(h, w):
        return -fa.head_token_stats(2 * h, w, labels).logps.mean()

    compiled = torch.compile(loss)
    torch.testing.assert_close(compiled(hidden, weight), loss(hidden, weight))
    got = torch.autograd.grad(compiled(hidden, weight), [hidden, weight])
    want = torch.autograd.grad(loss(hidden, weight), [hidden, weight])
    assert all(relative(a, b) < 1e-5 for a, b in zip(got, want, strict=True))
