"""What is wrong with a call is said in the same words wherever it comes in: logits, heads, transforms, one launch."""

import re

import pytest
import torch

import fastalign as fa
from fastalign.losses import SFTLoss

X, H, W = torch.randn(2, 3, 8), torch.randn(2, 3, 4), torch.randn(8, 4)
Y = torch.tensor([[1, 2, 3], [4, -100, 7]])


def of_logits(labels, **options):
    return fa.token_stats(X, labels, **options)


def of_an_operator(labels, ignore_index=-100, temperature=1.0, softcap=None):
    options = (ignore_index, temperature, 0.0 if softcap is None else softcap)
    return torch.ops.fastalign.token_stats(X, labels, None, *options, False, False, False)


def of_a_head(labels, **options):
    return fa.head_token_stats(H, W, labels, **options)


def of_a_head_by_parts(labels, **options):
    head = fa.Head(H, W.clone().requires_grad_(), plan="objective")
    return SFTLoss(**options)(head, labels)


def under_a_transform(labels, **options):
    return torch.func.grad(lambda x: fa.token_stats(x, labels, **options).logps.sum())(X)


def of_a_head_under_a_transform(labels, **options):
    return torch.func.grad(lambda h: fa.head_token_stats(h, W, labels, **options).logps.sum())(H)


def in_one_launch(labels, **options):
    return fa.token_objective(X, labels, torch.ones(2, 3), fa.Objective("sft"), **options)


WAYS = (
    of_logits,
    of_an_operator,
    of_a_head,
    of_a_head_by_parts,
    under_a_transform,
    of_a_head_under_a_transform,
    in_one_launch,
)
SERVED = [(way, backend) for way in WAYS for backend in ("cpu", "eager") if (way, backend) != (in_one_launch, "eager")]
RANGE = "labels must be in [0, 8) or equal to ignore_index=-100; got "
NAN, INF = float("nan"), float("inf")
BAD = {
    "labels' dtype": (TypeError, "labels must be int64 or int32; got torch.float32", Y.float(), {}),
    "labels' shape": (ValueError, "labels must have the shape of ", Y[:, :2], {}),
    "labels' device": (ValueError, "labels must be on the device of ", Y.to("meta"), {}),
    "too large a label": (
        ValueError,
        RANGE + "8",
        Y.where(Y != 7, 8),
        {},
    ),
    "a label below 0": (
        ValueError,
        RANGE + "-1",
        Y.where(Y != 7, -1),
        {},
    ),
    "temperature": (ValueError, "temperature must be a finite number above 0; got 0.0", Y, {"temperature": 0.0}),
    "no temperature": (ValueError, "temperature must be a finite number above 0; got nan", Y, {"temperature": NAN}),
    "soft-cap below 0": (ValueError, "softcap must be None or a finite number above 0; got -1", Y, {"softcap": -1.0}),
    "infinite soft-cap": (ValueError, "softcap must be None or a finite number above 0; got inf", Y, {"softcap": INF}),
}


@pytest.mark.parametrize(("way", "backend"), SERVED, ids=lambda given: getattr(given, "__name__", given))
@pytest.mark.parametrize("what", BAD)
def test_one_set_of_words(what, way, backend):
    kind, words, labels, options = BAD[what]
    with fa.use_backend(backend), pytest.raises(kind, match=re.escape(words)):
        way(labels, **options)


@pytest.mark.parametrize("way", [w for w in WAYS if w is not of_an_operator], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("given", "words"),
    [(-1.0, "ignore_index must be an int; got float -1.0"), (True, "ignore_index must be an int; got bool True")],
)
def test_an_ignore_index_that_is_no_integer(way, given, words):
    with pytest.raises(TypeError, match=re.escape(words)):
        way(Y, ignore_index=given)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_options_mean_the_same_to_all(softcap):
    """Temperature and soft-cap on logits, an operator, a head: one conversion, one number."""
    logits = H @ W.T
    wanted = fa.token_stats(logits, Y, temperature=0.7, softcap=softcap).logps
    flat = torch.ops.fastalign.token_stats(logits, Y, None, -100, 0.7, softcap or 0.0, False, False, False)[0]
    assert torch.equal(flat, wanted)
    of_head = fa.head_token_stats(H, W, Y, temperature=0.7, softcap=softcap).logps
    torch.testing.assert_close(of_head, wanted)
