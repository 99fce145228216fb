"""Under `torch.compile`: few graphs for many lengths, no warning, and the numbers of the function as it is written."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastalign as fa
from fastalign.integrations.transformers import apply_fused_loss
from fastalign.losses import DPOLoss, KTOLoss, PPOLoss, PROLoss, SFTLoss

V, H, B = 11, 8, 2
ONES, DESIRABLE = torch.ones(B), torch.tensor([True, False])


def batch(length):
    g = torch.Generator().manual_seed(length)
    hidden, weight = torch.randn(B, length, H, generator=g), torch.randn(V, H, generator=g)
    labels = torch.randint(0, V, (B, length), generator=g)
    labels[0, : length // 3] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), (labels, torch.full((B, length), -2.0))


LOSSES = {
    "SFTLoss": lambda x, y: SFT(x, y[0]).loss,
    "one_launch": lambda x, y: ONE(x, y[0]).loss,
    "DPOLoss": lambda x, y: DPO(x, y[0]).loss,
    "PPOLoss": lambda x, y: PPO(x, y[0], y[1], ONES).loss,
    "KTOLoss": lambda x, y: KTO(x, y[0], DESIRABLE).loss,
    "PROLoss": lambda x, y: PRO(x, y[0], list_size=2).loss,
}
SFT, ONE, DPO, PPO, KTO, PRO = SFTLoss(), SFTLoss(fuse_backward=True), DPOLoss(), PPOLoss(), KTOLoss(), PROLoss()
WAYS = {
    "logits": lambda h, w: 2 * h @ w.T,
    "head": lambda h, w: fa.Head(2 * h, w),
    "objective": lambda h, w: fa.Head(2 * h, w, plan="objective"),
}
FUNCTIONS = {
    "head_token_stats": lambda h, w, y: 3 * fa.head_token_stats(2 * h, w, y[0]).logps,
    "recompute": lambda h, w, y: 3 * fa.head_token_stats(2 * h, w, y[0], plan="recompute").logps,
    "token_logps": lambda h, w, y: 3 * fa.token_logps(2 * h @ w.T, y[0]),
    "cross_entropy": lambda h, w, y: fa.cross_entropy((h @ w.T).flatten(0, 1), y[0].flatten()),
}
FUNCTIONS |= {
    f"{name} of {way}": lambda h, w, y, loss=loss, source=source: 3 * loss(source(h, w), y)
    for name, loss in LOSSES.items()
    for way, source in WAYS.items()
}


def counted(function, calls):
    """Graphs compiled while `calls(compiled function)` runs; fails on any warning."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        calls(torch.compile(function, backend=counter))
    assert not [str(w.message) for w in seen]
    return counter.frame_count


@pytest.mark.parametrize("name", FUNCTIONS)
def test_four_graphs_at_most_serve_ten_lengths(name, caplog):
    function = FUNCTIONS[name]

    def calls(compiled):
        for length in range(3, 13):
            hidden, weight, labels = batch(length)
            found, wanted = compiled(hidden, weight, labels), function(hidden, weight, labels)
            torch.testing.assert_close(found, wanted)
            ours = torch.autograd.grad(found.sum(), (hidden, weight))
            torch.testing.assert_close(ours, torch.autograd.grad(wanted.sum(), (hidden, weight)))

    with caplog.at_level(logging.WARNING):
        assert counted(function, calls) <= 4
    assert not caplog.records


def test_a_compiled_model_with_the_fused_loss_has_four_graphs_at_most():
    transformers = pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "attn_implementation": "eager"}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    apply_fused_loss(model)

    def calls(compiled):
        for length in range(4, 10):
            ids = torch.randint(0, 32, (2, length))
            found = compiled(input_ids=ids, labels=ids, use_cache=False).loss
            torch.testing.assert_close(found, model(input_ids=ids, labels=ids, use_cache=False).loss)
            found.backward()

    assert counted(model, calls) <= 4
