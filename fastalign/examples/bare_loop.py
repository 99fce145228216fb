"""DPO in a loop of your own: the loss takes hidden states and the head's weight, and the logits are never held whole.

    python -m fastalign.examples.bare_loop

Policy and reference are the same small recurrent network, so the first loss is ln 2; completions from one half of the
vocabulary are preferred over those from the other. Any model that gives hidden states does in its place: of
transformers' causal ones, `model.model(input_ids).last_hidden_state` and `model.lm_head.weight`. Needs torch alone.
"""

from __future__ import annotations

import copy
import sys

import torch
from torch import Tensor, nn

import fastalign as fa
from fastalign.examples.tiny import run
from fastalign.losses import DPOLoss

VOCAB, SIZE, PAIRS, PROMPT, COMPLETION = 512, 64, 8, 4, 12


class Model(nn.Module):
    """Embeddings, a body, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, SIZE)
        self.body = nn.GRU(SIZE, SIZE, batch_first=True)
        self.lm_head = nn.Linear(SIZE, VOCAB, bias=False)

    def head(self, ids: Tensor) -> fa.Head:
        """What stands for the logits of [B, T] tokens."""
        return fa.Head(self.body(self.embed(ids))[0], self.lm_head.weight)


def batch() -> tuple[Tensor, Tensor]:
    """Input ids and labels of the chosen rows, then of the rejected ones; prompts do not count."""
    prompts = torch.randint(VOCAB, (PAIRS, PROMPT))
    chosen, rejected = (torch.randint(VOCAB // 2, (PAIRS, COMPLETION)) + low for low in (0, VOCAB // 2))
    rows = torch.cat([torch.cat([prompts, side], 1) for side in (chosen, rejected)])
    labels = rows[:, 1:].clone()  # labels[b, t] is the target of position t: nothing shifts inside
    labels[:, : PROMPT - 1] = -100
    return rows[:, :-1], labels


def main(steps: int = 30) -> str:
    torch.manual_seed(0)
    policy = Model()
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    objective = DPOLoss(beta=0.1)
    found = []
    for _ in range(steps):
        ids, labels = batch()
        out = objective(policy.head(ids), labels, ref_logits=reference.head(ids))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        found.append((float(out.loss.detach()), float(out.accuracies.mean())))
    (first, _), (last, right) = found[0], found[-1]
    return f"{steps} steps of DPO: loss {first:.4f} -> {last:.4f}, {right:.0%} of the last pairs in the right order"


if __name__ == "__main__":
    sys.exit(run(main, "train"))
