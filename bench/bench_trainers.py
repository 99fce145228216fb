"""A training step of a small causal language model of transformers: its own loss, and the same from hidden states.

One layer of 64 dimensions under a vocabulary of the given size, so that the head is nearly all there is: the case in
which a fused loss matters most. Rows are tokens, in sequences of 128.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from harness import device as _device
from harness.case import DTYPES, Case
from harness.interleave import interleave, replay, summary
from harness.suite import Options, peak_memory, peer_ratios
from harness.variants import EAGER, OURS, Variant
from torch import Tensor

HIDDEN, LENGTH = 64, 128
Step = Callable[[], Tensor]


class Problem:
    """The model, and tokens that are their own labels."""

    def __init__(self, case: Case, seed: int, device: str):
        from transformers import LlamaConfig, LlamaForCausalLM  # imported late: it takes seconds

        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=case.vocab, hidden_size=HIDDEN, intermediate_size=HIDDEN, num_hidden_layers=1,
            num_attention_heads=1, max_position_embeddings=case.rows,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config).to(device=device, dtype=DTYPES[case.dtype])
        batch = max(1, case.rows // LENGTH)
        self.ids = torch.randint(case.vocab, (batch, case.rows // batch), device=device)

    def step(self, **options: Any) -> Tensor:
        """The loss, its gradients computed and let go."""
        loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False, **options).loss
        torch.autograd.grad(loss, [*self.model.parameters()])
        return loss.detach()


def _eager(problem: Problem) -> Step:
    return problem.step


def _fused(problem: Problem) -> Step:
    from fastalign.integrations.transformers import apply_fused_loss

    def run() -> Tensor:
        with apply_fused_loss(problem.model):
            return problem.step()

    return run


def _trl(problem: Problem) -> Step:
    from trl.trainer.utils import add_fused_lm_head

    def run() -> Tensor:
        add_fused_lm_head(problem.model)
        try:
            return problem.step(fused_lm_head=True)
        finally:
            del problem.model.forward

    return run


def _trl_patched(problem: Problem) -> Step:
    from fastalign.integrations import trl

    run = _trl(problem)

    def patched() -> Tensor:
        with trl.patched():
            return run()

    return patched


class TrainersSuite:
    name = "trainers"
    variants: ClassVar[dict[str, Variant]] = {
        OURS: Variant(lambda: _fused, ours=True, package="transformers"),
        "fastalign under TRL": Variant(lambda: _trl_patched, ours=True, package="trl"),
        EAGER: Variant(lambda: _eager, package="transformers"),
        "TRL fused head": Variant(lambda: _trl, package="trl"),
    }

    def cases(self, options: Options) -> list[Case]:
        sizes = [(rows, vocab, dtype) for rows in options.rows for vocab in options.vocabs for dtype in options.dtypes]
        return [Case(self.name, "both", *size) for size in sizes]

    def variants_of(self, case: Case, options: Options) -> dict[str, Variant]:
        return options.chosen(self.variants)

    def problem(self, case: Case, options: Options) -> Problem:
        return Problem(case, options.seed, options.device)

    def contenders(self, case: Case, problem: Problem, options: Options) -> dict[str, Callable[[], Step]]:
        installed = {name: v for name, v in self.variants_of(case, options).items() if v.missing is None}
        steps = {name: v.build()(problem) for name, v in installed.items()}
        return {name: partial(_already, step) for name, step in steps.items()}

    def measure(self, case: Case, options: Options) -> dict[str, Any]:
        problem = self.problem(case, options)
        contenders = self.contenders(case, problem, options)
        losses = {name: float(prepare()()) for name, prepare in contenders.items()}
        seconds = interleave(
            contenders,
            rounds=options.rounds,
            warmup=options.warmup,
            seed=options.seed,
            measure=_device.seconds_of(options.device),
        )
        del problem, contenders
        peaks = peak_memory(case, options) if options.memory else {}
        rows = {
            name: {"ours": self.variants[name].ours, "seconds": samples, **summary(samples)}
            | {"peak_bytes": peaks.get(name)}
            for name, samples in seconds.items()
        }
        return case.to_dict() | {
            "calls": 1,
            "variants": rows,
            "ratios": peer_ratios(rows),
            "checks": {"losses": losses},
        }


def _already(step: Step) -> Step:
    """Nothing to prepare."""
    return step


SUITE = TrainersSuite()


def bench_trainers(case, variant, record_of, benchmark):
    replay(benchmark, record_of(case)["variants"][variant]["seconds"])
