"""Distillation against TRL's GKD and Liger's chunked divergence, where they are installed."""

import pytest
import torch

from fastalign.losses import DistillationLoss


def problem(vocab=61, seed=0):
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(3, 7, vocab, generator=draw) for _ in range(2))
    labels = torch.randint(vocab, (3, 7), generator=draw)
    labels[0, 4:] = labels[2] = -100
    return student.requires_grad_(), teacher, labels


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("num_items", [None, 40])
def test_trl_gkd(beta, temperature, num_items):
    """Value and gradient of `GKDTrainer.generalized_jsd_loss`."""
    trl = pytest.importorskip("trl.experimental.gkd", reason="needs a TRL with GKD (the extra `dev`)")
    student, teacher, labels = problem()
    theirs = trl.GKDTrainer.generalized_jsd_loss(
        student, teacher, labels, beta=beta, temperature=temperature, num_items_in_batch=num_items
    )
    ours = DistillationLoss(beta=beta, temperature=temperature)(student, labels, teacher, num_items=num_items).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (ours, theirs)), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("nll", [0.0, 0.5])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_liger_fused_linear_jsd(beta, nll):
    """Two heads of different size, with the hard labels' loss and without: `LigerFusedLinearJSDLoss`."""
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="needs liger-kernel (the extra `dev`)")
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 6, 8, generator=draw), 0.5 * torch.randn(61, 8, generator=draw)
    their_hidden, their_weight = torch.randn(2, 6, 12, generator=draw), 0.5 * torch.randn(61, 12, generator=draw)
    labels = torch.randint(61, (2, 6), generator=draw)
    labels[0, 3:] = -100
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    theirs = liger.LigerFusedLinearJSDLoss(nll, 1.0, beta, compiled=False, chunk_size=4)(
        hidden.view(-1, 8), weight, their_hidden.view(-1, 12), their_weight, labels.view(-1)
    )
    ours = DistillationLoss(beta=beta, nll_weight=nll)((hidden, weight), labels, (their_hidden, their_weight)).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for got, want in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
