"""A head whose weight lies in shards: two processes (gloo) with tokens of their own, and a weight gathered for a while.

The file is also the program that the processes run: `python test_head_sharded.py RANK PORT FOLDER`.
"""

import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fastalign as fa

TOKENS, HIDDEN, VOCAB = 6, 8, 41


def inputs(rank):
    draw = torch.Generator().manual_seed(10 + rank)
    hidden = torch.randn(TOKENS, HIDDEN, generator=draw)
    labels = torch.randint(VOCAB, (TOKENS,), generator=draw)
    labels[:rank] = -100
    return hidden, labels


def weights():
    draw = torch.Generator().manual_seed(0)
    return torch.randn(VOCAB, HIDDEN, generator=draw), torch.randn(VOCAB, generator=draw)


def loss(hidden, weight, bias, labels, plan):
    stats = fa.head_token_stats(hidden, weight, labels, bias=bias, plan=plan, chunk_bytes=64 * 4, entropy=True)
    return (stats.logps + 0.5 * stats.entropy).sum()


def run(rank, port, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for plan in ("keep", "recompute"):
        weight, bias = (distribute_tensor(t, mesh, [Shard(0)]).requires_grad_() for t in weights())
        hidden, labels = inputs(rank)
        loss(hidden.requires_grad_(), weight, bias, labels, plan).backward()
        found[plan] = (hidden.grad, weight.grad.full_tensor(), bias.grad.full_tensor())
        assert weight.grad.placements == (Shard(0),)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_shards_get_the_mean_of_the_processes_gradients(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__]
    started = [
        subprocess.Popen([*command, str(rank), str(port), str(tmp_path)], cwd=tempfile.gettempdir()) for rank in (0, 1)
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    weight, bias = (t.requires_grad_() for t in weights())
    total = sum(loss(hidden, weight, bias, labels, "keep") for hidden, labels in map(inputs, (0, 1)))
    want = [g / 2 for g in torch.autograd.grad(total, [weight, bias])]
    for rank in (0, 1):
        hidden, labels = inputs(rank)
        (own,) = torch.autograd.grad(loss(hidden.requires_grad_(), weight, bias, labels, "keep"), hidden)
        for got in torch.load(tmp_path / f"{rank}.pt").values():
            for ours, exact in zip(got, [own, *want], strict=True):
                torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("plan", ["keep", "recompute"])
def test_a_weight_that_is_gathered_for_the_call_alone(plan):
    """As under ZeRO-3: between forward and backward the parameter holds nothing; it is gathered again for backward."""
    whole, bias = weights()
    hidden, labels = inputs(0)
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.data = whole.clone()
    value = loss(hidden.requires_grad_(), parameter, bias, labels, plan)
    parameter.data = torch.empty(0)
    with pytest.raises(ValueError, match="ZeRO-3"):
        loss(hidden, parameter, bias, labels, plan)
    parameter.data = whole.clone()
    got = torch.autograd.grad(value, [hidden, parameter])
    reference = whole.requires_grad_()
    want = torch.autograd.grad(loss(hidden, reference, bias, labels, plan), [hidden, reference])
    for ours, exact in zip(got, want, strict=True):
        assert torch.equal(ours, exact)


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
