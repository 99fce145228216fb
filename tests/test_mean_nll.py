"""The one node for a mean negative log-likelihood: the numbers of the general road, to the bit."""

import sys

import pytest
import torch

import fastalign as fa
from fastalign.losses import SFTLoss

ROADS = [sys.modules["fastalign.losses.cross_entropy"], sys.modules["fastalign.losses.sft"]]
LOSSES = {
    "mean": lambda x, y: (fa.cross_entropy(x, y),),
    "sum": lambda x, y: (fa.cross_entropy(x, y, reduction="sum"),),
    "sft": lambda x, y: SFTLoss()(x.unsqueeze(0), y.unsqueeze(0)),
    "sft in place": lambda x, y: SFTLoss(inplace_backward=True)(x.unsqueeze(0).clone(), y.unsqueeze(0)),
}


def outcome(loss, x, y):
    x = x.clone().requires_grad_()
    outputs = LOSSES[loss](x, y)
    (0.37 * outputs[0]).backward()
    return [*(t.detach() for t in outputs), x.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("hidden", ["none", "some", "all"])
def test_as_the_general_road_to_the_bit(monkeypatch, loss, hidden, dtype):
    draw = torch.Generator().manual_seed(0)
    for rows, vocab in ((1, 5), (7, 257), (64, 3000)):
        x, y = torch.randn(rows, vocab, generator=draw).mul(3).to(dtype), torch.randint(vocab, (rows,), generator=draw)
        share = {"none": 0.0, "some": 0.5, "all": 1.0}[hidden]
        y[torch.rand(rows, generator=draw) < share] = -100
        found = outcome(loss, x, y)
        with monkeypatch.context() as patch:
            for road in ROADS:
                patch.setattr(road, "mean_nll_applies", lambda *_: False)
            expected = outcome(loss, x, y)
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_it_is_the_road_taken():
    x, y = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 4, -100])
    assert "MeanNLL" in type(SFTLoss()(x, y).loss.grad_fn).__name__
    assert "MeanNLL" in type(fa.cross_entropy(x, y).grad_fn).__name__
    assert "MeanNLL" not in type(fa.cross_entropy(x, y, label_smoothing=0.1).grad_fn).__name__


@pytest.mark.parametrize("loss", LOSSES)
def test_everything_stays_where_the_logits_are(loss):
    """Under `torch.set_default_device` too; meta stands for an accelerator."""
    x, y = torch.randn(3, 5), torch.tensor([0, 4, 2])
    found = outcome(loss, x, y)
    with torch.device("meta"):
        elsewhere = outcome(loss, x, y)
    for got, want in zip(elsewhere, found, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("loss", ["mean", "sft"])
def test_differentiated_once_and_refused_twice(loss):
    x, y = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 4, 2])
    (first,) = torch.autograd.grad(LOSSES[loss](x, y)[0], x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(first.sum(), x)


def test_written_over_logits_are_refused():
    x, y = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 4, 2])
    loss = fa.cross_entropy(x, y)
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("label", [-1, 5])
def test_bad_labels_are_named(label):
    x, y = torch.randn(2, 5, requires_grad=True), torch.tensor([0, label])
    for loss in LOSSES.values():
        with pytest.raises(ValueError, match=rf"labels must be in \[0, 5\) .*got {label} at flat position 1"):
            loss(x, y)
