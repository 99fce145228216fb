"""What each kind of policy loss takes beside PPO-clip: from logits, forward and backward, every kind in turn.

    python bench/kinds.py [--rows 2] [--vocab 256] [--rounds 60] [--limit 1.3] [--kinds sapo vespo ...]

prints the median of the rounds' ratios to PPO-clip and exits with 1 if one of a kind that needs no choice among the
batch's tokens is above the limit. `clip_cov` and `kl_cov` choose between two calls, by sorting; they are shown.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch
from harness.interleave import interleave, ratio, summary

from fastalign.losses import PPOLoss
from fastalign.losses.policy_objectives import KINDS
from fastalign.losses.policy_selection import SELECTIONS

BASE, CALLS = "clip", 100
Run = Callable[[], object]


def step(kind: str, rows: int, vocab: int) -> Run:
    """Loss and gradient of one token a row."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, 1, vocab, generator=draw).requires_grad_()
    labels = torch.randint(0, vocab, (rows, 1), generator=draw)
    old = logits.detach().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1) + 0.1
    advantages, loss = torch.randn(rows, generator=draw), PPOLoss(kind=kind)

    def run() -> object:
        logits.grad = None
        loss(logits, labels, old, advantages).loss.backward()
        return logits.grad

    return run


def _ready(run: Run) -> Run:
    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rows", 2), ("vocab", 256), ("rounds", 60)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--limit", type=float, default=1.3)
    parser.add_argument("--kinds", nargs="+", default=sorted(KINDS), choices=sorted(KINDS))
    given = parser.parse_args()
    kinds = dict.fromkeys([BASE, *given.kinds])
    runs = {kind: functools.partial(_ready, step(kind, given.rows, given.vocab)) for kind in kinds}
    seconds = interleave(runs, rounds=given.rounds, warmup=5, calls=CALLS)
    print(f"{given.rows} x {given.vocab}, {torch.get_num_threads()} threads: {BASE} {_us(seconds[BASE])}")
    above = []
    for kind in kinds:
        found = ratio(seconds[kind], seconds[BASE])
        if found["median"] > given.limit and kind not in SELECTIONS:
            above.append(kind)
        print(f"{kind:12} {_us(seconds[kind])}  {found['median']:.2f} (p10 {found['p10']:.2f}, p90 {found['p90']:.2f})")
    if above:
        print(f"above {given.limit}: {', '.join(above)}")
    return int(bool(above))


def _us(samples: list[float]) -> str:
    return f"{1e6 * summary(samples)['median']:.1f} us"


if __name__ == "__main__":
    raise SystemExit(main())
