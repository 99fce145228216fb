"""Arguments in the forms that users have them: counts as tensors, ignore_index and labels of any integers, tensors
without memory, torch's deprecated arguments; and errors that name the arguments of the function that was called."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import fastalign as fa
from fastalign.integrations.transformers import fused_lm_loss
from fastalign.losses import DPOLoss, KTOLoss, PPOLoss, PROLoss, SFTLoss, TokenLoss, kto_loss, policy_loss, sft_loss

B, T, V, H = 4, 3, 7, 5
each_backend = pytest.mark.parametrize("backend", ["cpu", "eager"])


def batch(device="cpu"):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(B, T, H, generator=g).to(device), torch.randn(V, H, generator=g).to(device)
    labels = torch.randint(0, V, (B, T), generator=g).to(device)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def sources(hidden, weight):
    return {
        "logits": (hidden @ weight.T),
        "head": fa.Head(hidden, weight),
        "objective": fa.Head(hidden, weight, plan="objective"),
    }


# ----------------------------------------------------------------------------------------------------------- num_items
@each_backend
@pytest.mark.parametrize("way", ["logits", "head", "objective"])
def test_a_count_of_shape_1_is_a_number(way, backend):
    hidden, weight, labels = batch()
    source = sources(hidden, weight)[way]
    old = fa.token_logps((hidden @ weight.T).detach(), labels)
    count = torch.tensor([10.0])

    def ppo(n, normalization):
        loss = PPOLoss(normalization=normalization, max_length=6)
        return loss(source, labels, old, torch.ones(B), num_items=n)

    with fa.use_backend(backend):
        for normalization in ("token", "sequence"):
            loss = SFTLoss(normalization=normalization)
            found, wanted = (loss(source, labels, num_items=n) for n in (count, 10))
            assert all(a.shape == () for a in found)
            torch.testing.assert_close(found, wanted)
        for normalization in ("token", "grpo", "dapo", "dr_grpo"):
            found, wanted = ppo(count, normalization), ppo(10, normalization)
            assert all(a is None or a.shape == () for a in found)
            torch.testing.assert_close(found, wanted)


def test_a_count_of_shape_1_is_a_number_for_log_probabilities_too():
    logps, mask, count = torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.tensor([10])
    assert sft_loss(logps, mask, num_items=count).loss.shape == ()
    assert policy_loss(logps, logps, torch.ones(2), mask, num_items=count).loss.shape == ()
    assert fused_lm_loss(torch.randn(2, 3, V), torch.ones(2, 3).long(), num_items_in_batch=count).shape == ()
    with pytest.raises(ValueError, match=r"num_items must be one number; got a tensor of shape \[2\]"):
        sft_loss(logps, mask, num_items=torch.tensor([1, 2]))


# ----------------------------------------------------------------------------------------------------------- KTO
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("baseline", [{}, {"kl": 0.4}, {"kl_logps": [-3.0], "ref_kl_logps": [-3.5]}])
@pytest.mark.parametrize("reference", [None, "logps", "logits"])
def test_kto_by_parts_is_kto(reference, baseline, dtype):
    hidden, weight, labels = batch()
    labels[0, 0] = -100
    hidden, weight = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
    desirable = torch.tensor([True, False, False, True])
    given = {k: torch.tensor(v, dtype=dtype) for k, v in baseline.items()}
    if reference == "logps":
        given["ref_logps"] = torch.linspace(-7, -5, B, dtype=dtype)
    elif reference == "logits":
        given["ref_logits"] = fa.Head((hidden * 0.9).detach(), weight.detach())
    budget = 2 * T * V * hidden.element_size()  # two responses of four
    outputs = []
    for head in (fa.Head(hidden, weight), fa.Head(hidden, weight, plan="objective", chunk_bytes=budget)):
        out = KTOLoss(beta=0.3, undesirable_weight=1.5)(head, labels, desirable, **given)
        outputs.append((*out, *torch.autograd.grad(out.loss, (hidden, weight))))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-7)


def test_kto_by_parts_names_what_is_wrong():
    hidden, weight, labels = batch()
    head = fa.Head(hidden, weight, plan="objective")
    with pytest.raises(ValueError, match=r"desirable must have shape \[4\]"):
        KTOLoss()(head, labels, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"ref_logps must have shape \[4\]"):
        KTOLoss()(head, labels, torch.ones(4, dtype=torch.bool), ref_logps=torch.zeros(2))
    with pytest.raises(ValueError, match="not both"):
        KTOLoss()(head, labels, torch.ones(4, dtype=torch.bool), kl=0.1, kl_logps=torch.zeros(1), ref_kl_logps=labels)


# ------------------------------------------------------------------------------------------------- shapes by parts
@pytest.mark.parametrize("loss", [SFTLoss(), TokenLoss(lambda t: -t.logps)], ids=lambda loss: type(loss).__name__)
def test_one_sequence_by_parts_is_that_of_a_batch_of_one(loss):
    hidden, weight, labels = batch()
    labels[0, 1] = -100
    one, many = (fa.Head(x, weight, plan="objective") for x in (hidden[0], hidden[:1]))
    found = [(out.loss, *torch.autograd.grad(out.loss, (hidden, weight)))
             for out in (loss(one, labels[0]), loss(many, labels[:1]))]  # fmt: skip
    torch.testing.assert_close(*found)
    nothing = loss(fa.Head(hidden[:0], weight, plan="objective"), labels[:0]).loss
    assert float(nothing) == 0.0


@pytest.mark.parametrize("name", ["SFT", "Token", "DPO", "PPO", "KTO", "PRO"])
def test_labels_of_another_shape_are_refused_by_parts_too(name):
    hidden, weight, labels = batch()
    head, fewer = fa.Head(hidden, weight, plan="objective"), labels[:2]
    calls = {
        "SFT": lambda: SFTLoss()(head, fewer),
        "Token": lambda: TokenLoss(lambda t: -t.logps)(head, fewer),
        "DPO": lambda: DPOLoss(loss_type="simpo")(head, fewer),
        "PPO": lambda: PPOLoss()(head, fewer, torch.zeros(2, T), torch.ones(2)),
        "KTO": lambda: KTOLoss()(head, fewer, torch.ones(2, dtype=torch.bool)),
        "PRO": lambda: PROLoss()(head, fewer, list_size=2),
    }
    with pytest.raises(ValueError, match=rf"labels must have the shape of .*\[{B}, {T}\]; got \[2, {T}\]"):
        calls[name]()


# ----------------------------------------------------------------------------------------------------------- meta
@pytest.mark.parametrize("plan", [None, "keep", "recompute", "objective"])
def test_tensors_without_memory_have_losses_and_gradients_of_the_right_shape(plan):
    hidden, weight, labels = (t.detach() for t in batch("meta"))
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    head = fa.Head(*leaves, plan=plan)
    old, desirable = torch.zeros(B, T, device="meta"), torch.ones(B, dtype=torch.bool, device="meta")
    losses = [
        SFTLoss()(head, labels).loss,
        DPOLoss()(head, labels).loss,
        PPOLoss()(head, labels, old, torch.ones(B, device="meta")).loss,
        KTOLoss()(head, labels, desirable).loss,
        PROLoss()(head, labels, list_size=2).loss,
    ]
    for loss in losses:
        assert loss.is_meta
        assert [g.shape for g in torch.autograd.grad(loss, leaves)] == [hidden.shape, weight.shape]


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"label_smoothing": 0.1}])
def test_cross_entropy_of_tensors_without_memory(options):
    x = torch.zeros(2, 5, device="meta", requires_grad=True)
    target = torch.zeros(2, dtype=torch.long, device="meta")
    found, wanted = fa.cross_entropy(x, target, **options), F.cross_entropy(x, target, **options)
    assert (found.shape, found.dtype, found.device) == (wanted.shape, wanted.dtype, wanted.device)
    assert torch.autograd.grad(found.sum(), x)[0].shape == x.shape


# ----------------------------------------------------------------------------------------------------- cross_entropy
X = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 4, 2, 1, 3, 2])


@each_backend
def test_targets_in_bytes(backend):
    with fa.use_backend(backend):
        for options in ({}, {"reduction": "none"}, {"weight": torch.rand(5)}, {"ignore_index": 2}):
            ours, torchs = (f(X, Y.byte(), **options) for f in (fa.cross_entropy, F.cross_entropy))
            torch.testing.assert_close(ours, torchs)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_deprecated_arguments_mean_what_they_do_in_torch(size_average, reduce):
    wanted = F.cross_entropy(X, Y, None, size_average, 2, reduce, "sum")
    if size_average is reduce is None:
        found = fa.cross_entropy(X, Y, None, size_average, 2, reduce, "sum")
    else:
        with pytest.warns(DeprecationWarning, match="use reduction="):
            found = fa.cross_entropy(X, Y, None, size_average, 2, reduce, "sum")
    torch.testing.assert_close(found, wanted)


WRONG = [
    ({"target": Y[:2]}, ValueError, r"target must be \[6\], input without C; got \[2\]"),
    ({"target": Y + 3}, ValueError, r"target must be in \[0, 5\) or equal to ignore_index=-100; got 7 at .* 1"),
    ({"target": Y.short()}, TypeError, r"target must be int64, int32 or uint8; got torch\.int16"),
    ({"target": Y.to("meta")}, ValueError, "target must be on the device of input, cpu; got meta"),
    ({"input": X[:, :0]}, ValueError, r"input must be \[C\], .*; got \[6, 0\]"),
    ({"input": X.long()}, TypeError, "input must be a floating-point tensor"),
    ({"ignore_index": -1.0}, TypeError, r"ignore_index must be an int; got float -1\.0"),
]


@each_backend
@pytest.mark.parametrize("more", [{}, {"reduction": "none"}, {"label_smoothing": 0.1}, {"weight": torch.ones(5)}])
@pytest.mark.parametrize(("given", "error", "message"), WRONG)
def test_errors_name_the_arguments_of_cross_entropy(given, error, message, more, backend):
    with fa.use_backend(backend), pytest.raises(error, match=message) as raised:
        fa.cross_entropy(**({"input": X, "target": Y} | given | more))
    assert "labels" not in str(raised.value)
    assert "logits" not in str(raised.value)


# ----------------------------------------------------------------------------------------------------- ignore_index
@each_backend
@pytest.mark.parametrize("value", [-1.0, True, "a", None, torch.tensor([1, 2])])
def test_an_ignore_index_is_an_int(value, backend):
    hidden, weight, labels = batch()
    logits = (hidden @ weight.T).detach()
    calls = [
        lambda: fa.token_logps(logits, labels, ignore_index=value),
        lambda: fa.sequence_logps(logits, labels, ignore_index=value),
        lambda: fa.head_token_stats(hidden, weight, labels, ignore_index=value),
        lambda: fa.cross_entropy(logits[0], labels[0], ignore_index=value),
        lambda: fused_lm_loss(logits, labels, ignore_index=value),
        *(lambda loss=loss: loss(ignore_index=value) for loss in (SFTLoss, DPOLoss, PPOLoss, KTOLoss, PROLoss)),
    ]
    with fa.use_backend(backend):
        for call in calls:
            with pytest.raises(TypeError, match="ignore_index must be an int; got "):
                call()
        with pytest.raises(ValueError, match="ignore_index must fit into int64"):
            fa.token_logps(logits, labels, ignore_index=2**63)


@each_backend
@pytest.mark.parametrize("by", [2**32, -(2**40), 2**63 - 2**34])
def test_narrow_labels_never_equal_a_wide_ignore_index(by, backend):
    """2^32 + y has the low 32 bits of y: nothing may be dropped for it."""
    hidden, weight, labels = batch()
    logits, narrow, value = (hidden @ weight.T).detach(), labels.int(), by + int(labels[0, 0])
    old, desirable = torch.zeros(B, T), torch.tensor([True, False, True, False])

    def results(labels, value):
        options = {"ignore_index": value}
        yield fa.token_logps(logits, labels, **options)
        yield fa.sequence_logps(logits, labels, average=True, **options)
        yield fa.token_stats(logits, labels, diagnostics=["is_top1", "mean_logits"], **options).is_top1
        yield fa.cross_entropy(logits[0], labels[0], **options)
        yield fused_lm_loss(logits, labels, ignore_index=value)
        for source in sources(hidden, weight).values():
            yield SFTLoss(**options)(source, labels).loss.detach()
            yield DPOLoss(loss_type="simpo", **options)(source, labels).loss.detach()
            yield PPOLoss(**options)(source, labels, old, torch.ones(B)).loss.detach()
            yield KTOLoss(**options)(source, labels, desirable).loss.detach()
            mask = torch.tensor([[True, True], [True, False]])
            yield PROLoss(**options)(source, labels, mask=mask, list_size=2).loss.detach()

    with fa.use_backend(backend):
        for found, wanted in zip(results(narrow, value), results(labels, -100), strict=True):
            torch.testing.assert_close(found, wanted)


def test_the_baseline_of_the_loss_by_parts_is_that_of_the_loss():
    logps, kl = torch.tensor([-1.0, -2.0]), torch.tensor([0.5])
    assert kto_loss(logps, torch.tensor([True, False]), kl=kl).kl == 0.5
