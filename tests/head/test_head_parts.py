"""Losses formed part by part from a head, packed sequences and shared prompts: all equal the path over logits."""

import pytest
import torch
from torch.nn import functional as F

import fastalign as fa
from fastalign import losses

B, T, H, V = 6, 5, 12, 531
MARGIN = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 0.0}


def problem(dtype, *, frozen=False, weight_dtype=None):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, H, generator=g).to(dtype).requires_grad_()
    weight = (0.5 * torch.randn(V, H, generator=g)).to(weight_dtype or dtype).requires_grad_(not frozen)
    bias = torch.randn(V, generator=g).to(weight_dtype or dtype).requires_grad_(not frozen)
    labels = torch.randint(0, V, (B, T), generator=g)
    labels[0, :3] = -100
    labels[4, 2:] = -100
    ref = (torch.randn(B, T, 7, generator=g).to(dtype), torch.randn(V, 7, generator=g).to(dtype))
    return (hidden, weight, bias), labels, ref


def modules(dtype):
    """(module, its further arguments, tokens that must not be labelled for it) of every loss that goes by parts."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    half = torch.linspace(-30, -20, B // 2, dtype=wide)
    reference = {"ref_chosen_logps": half, "ref_rejected_logps": half - 1}
    rewards = torch.tensor([[2.0, 1.0, 0.5], [0.5, 1.0, 1.0]], dtype=wide)
    old, advantages = torch.full((B, T), -8.0, dtype=wide), torch.linspace(-1, 1, B, dtype=wide)
    policy = {"old_logps": old, "advantages": advantages}
    return {
        "dpo": (losses.DPOLoss(), reference),
        "ipo": (losses.DPOLoss(loss_type="ipo_avg"), reference),
        "rpo": (losses.DPOLoss(loss_type="rpo", nll_normalization="sequence"), reference),
        "pro": (losses.PROLoss(sft_weight=0.1), {"rewards": rewards}),
        "pro-infonce": (losses.PROLoss(form="infonce", average=False), {"list_size": 2}),
        "sft": (losses.SFTLoss(), {}),
        "sft-z": (losses.SFTLoss(normalization="sequence", z_loss=0.01, label_smoothing=0.1), {}),
        "sft-items": (losses.SFTLoss(temperature=0.7, softcap=4.0), {"num_items": 40}),
        "ppo": (losses.PPOLoss(entropy_coef=0.01, report_entropy=True), policy),
        "grpo": (losses.PPOLoss(normalization="grpo", kl_coef=0.1), {**policy, "ref_logps": old - 0.5}),
        "ppo-kl": (losses.PPOLoss(kl_estimator="exact", kl_coef=0.1), {**policy, "ref_logits": "head"}),
    }


def outcome(module, logits, labels, arguments, leaves):
    out = module(logits, labels, **arguments)
    return out, torch.autograd.grad(2 * out.loss, [t for t in leaves if t.requires_grad])


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", MARGIN, ids=str)
@pytest.mark.parametrize("name", modules(torch.float32))
def test_by_parts_equals_the_logits_path(name, dtype, frozen):
    leaves, labels, ref = problem(dtype, frozen=frozen)
    module, arguments = modules(dtype)[name]

    def over_logits(leaves, ref, dtype):
        more = dict(modules(dtype)[name][1])
        if "ref_logits" in more:
            more["ref_logits"] = F.linear(*ref)
        with fa.use_backend("eager"):
            return outcome(module, F.linear(*leaves), labels, more, leaves)

    double = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    exact, exact_grads = over_logits(double, [t.double() for t in ref], torch.float64)
    _, torch_grads = over_logits(leaves, ref, dtype)
    more = {k: fa.Head(*ref) if isinstance(v, str) else v for k, v in arguments.items()}
    for chunk_bytes in (1, 20 * V * dtype.itemsize):  # one group a part; a few tokens' worth
        head = fa.Head(*leaves, chunk_bytes=chunk_bytes, plan="objective")
        out, grads = outcome(module, head, labels, more, leaves)
        bound = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]
        for field, ours, want in zip(out._fields, out, exact, strict=True):
            assert (ours is None) == (want is None), field
            if want is not None:
                torch.testing.assert_close(ours.double(), want.double(), rtol=bound, atol=bound)
        for ours, theirs, want in zip(grads, torch_grads, exact_grads, strict=True):
            assert ours.dtype == theirs.dtype
            assert relative(ours, want) <= 1.5 * relative(theirs, want) + MARGIN[dtype]


def test_master_weights_and_repeated_runs():
    leaves, labels, _ = problem(torch.bfloat16, weight_dtype=torch.float32)
    head = fa.Head(*leaves, chunk_bytes=1, plan="objective")
    out, grads = outcome(losses.SFTLoss(), head, labels, {}, leaves)
    again, repeated = outcome(losses.SFTLoss(), head, labels, {}, leaves)
    assert torch.equal(out.loss, again.loss)
    assert all(map(torch.equal, grads, repeated))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]


def test_one_part_at_a_time_is_held(monkeypatch):
    (hidden, weight, _), labels, _ = problem(torch.float32)
    sizes = []
    plain = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **k: (sizes.append((a.shape[0], b.shape[1])), plain(a, b, **k))[1])
    losses.DPOLoss(loss_type="simpo")(fa.Head(hidden, weight, chunk_bytes=1, plan="objective"), labels).loss.backward()
    held = [rows for rows, columns in sizes if columns == V]
    valid = (labels != -100).sum(-1)
    assert held == (valid[:3] + valid[3:]).tolist()  # a GEMM per pair, none over two of them, and none repeated


def test_chosen_where_the_logits_do_not_fit(monkeypatch):
    (hidden, weight, _), labels, _ = problem(torch.float32)
    monkeypatch.setattr("fastalign.head.plan._WORTH", 4)
    calls = []
    plain = losses.sft.by_parts
    monkeypatch.setattr(losses.sft, "by_parts", lambda *a, **k: (calls.append(1), plain(*a, **k))[1])
    fits, scarce, tiny = (fa.Head(hidden, weight, chunk_bytes=tokens * V * 4) for tokens in (B * T, 6, 3))
    want = losses.SFTLoss()(fits, labels).loss
    assert not calls
    torch.testing.assert_close(losses.SFTLoss()(scarce, labels).loss, want)
    assert calls == [1]
    torch.testing.assert_close(losses.SFTLoss()(tiny, labels).loss, want)
    frozen = scarce._replace(weight=weight.detach())
    torch.testing.assert_close(losses.SFTLoss()(frozen, labels).loss, want)
    with torch.no_grad():
        torch.testing.assert_close(losses.SFTLoss()(scarce._replace(plan="objective"), labels).loss, want)
    assert calls == [1]


def test_losses_of_the_whole_batch_and_second_uses_are_refused():
    (hidden, weight, _), labels, _ = problem(torch.float32)
    head = fa.Head(hidden, weight, plan="objective")
    half = torch.zeros(B // 2)
    for kind in ("aot", "rpo"):
        with pytest.raises(ValueError, match="each pair by itself"):
            losses.DPOLoss(loss_type=kind)(head, labels, ref_chosen_logps=half, ref_rejected_logps=half)
    out = losses.SFTLoss()(head, labels)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be used once"):
        out.loss.backward()


# --------------------------------------------------------------------------------------- packed rows, shared prompts
@pytest.mark.parametrize("plan", ["keep", "recompute", "objective"])
def test_packed_sequences_equal_padded_ones(plan):
    (hidden, weight, _), labels, _ = problem(torch.float64)
    lengths = torch.tensor([5, 3, 4, 5, 2, 1])
    inside = torch.arange(T) < lengths.unsqueeze(1)
    labels = labels.masked_fill(~inside, -100)
    want, want_grads = outcome(
        losses.DPOLoss(loss_type="simpo"), F.linear(hidden, weight), labels, {}, [hidden, weight]
    )
    row_labels = labels[inside]
    bounds = F.pad(lengths.cumsum(0), (1, 0))
    positions = torch.cat([torch.arange(n) for n in lengths])
    for packed in (
        fa.packed_sequences(row_labels, cu_seqlens=bounds.int()),
        fa.packed_sequences(row_labels[None], position_ids=positions[None]),
    ):
        head = fa.Head(hidden[inside], weight, rows=packed.rows, plan=plan, chunk_bytes=12 * V * 8)
        out, grads = outcome(losses.DPOLoss(loss_type="simpo"), head, packed.labels, {}, [hidden, weight])
        torch.testing.assert_close(out.loss, want.loss)
        for ours, exact in zip(grads, want_grads, strict=True):
            torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("plan", ["keep", "objective"])
def test_completions_share_their_prompt(plan):
    """One prompt's last hidden state predicts the first token of each of its completions."""
    (hidden, weight, _), labels, _ = problem(torch.float64)
    prompt, completions = hidden[0, :1], hidden[1:5]  # [1, H]; [4, T, H]
    labels = labels[1:5].clamp(min=0)
    shared = torch.cat([prompt, completions.flatten(0, 1)])
    rows = torch.cat([torch.zeros(4, 1, dtype=torch.int64), 1 + torch.arange(4 * T).view(4, T)[:, :-1]], 1)
    repeated = torch.cat([prompt.expand(4, 1, H), completions[:, :-1]], 1)
    rewards = torch.tensor([[3.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
    want, want_grads = outcome(
        losses.PROLoss(), F.linear(repeated, weight), labels, {"rewards": rewards}, [hidden, weight]
    )
    head = fa.Head(shared, weight, rows=rows, plan=plan)
    out, grads = outcome(losses.PROLoss(), head, labels, {"rewards": rewards}, [hidden, weight])
    torch.testing.assert_close(out.loss, want.loss)
    for ours, exact in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(ours, exact)


BAD = {
    "rows must be an int64 tensor": (TypeError, {"rows": torch.zeros(2, 3)}),
    r"rows must be in \[0, 4\)": (ValueError, {"rows": torch.full((2, 3), 4)}),
    r"labels must have the shape of hidden .*\[2, 2\]": (
        ValueError,
        {"rows": torch.zeros(2, 2, dtype=torch.int64)},
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_rows_are_named(message):
    kind, change = BAD[message]
    with pytest.raises(kind, match=message):
        fa.head_token_stats(torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(2, 3, dtype=torch.int64), **change)


BAD_PACKS = {
    "give cu_seqlens or position_ids": (ValueError, {}),
    "cu_seqlens must hold integers": (TypeError, {"cu_seqlens": torch.zeros(2)}),
    "cu_seqlens must rise": (ValueError, {"cu_seqlens": torch.tensor([0, 3, 2, 6])}),
    "to the 6 tokens": (ValueError, {"cu_seqlens": torch.tensor([0, 5])}),
    "position_ids must be": (ValueError, {"position_ids": torch.tensor([0, 1])}),
    "position_ids must begin with 0; got 3": (ValueError, {"position_ids": torch.tensor([3, 4, 0, 1, 2, 3])}),
    "position_ids must begin with 0; got 1": (ValueError, {"position_ids": torch.arange(1, 7)}),
}


@pytest.mark.parametrize("message", BAD_PACKS)
def test_bad_packs_are_named(message):
    kind, change = BAD_PACKS[message]
    with pytest.raises(kind, match=message):
        fa.packed_sequences(torch.zeros(6, dtype=torch.int64), **change)
