"""Peak memory of one DPO forward and backward pass, with the logits formed whole and without, each in a fresh process.

    python -m fastalign.trainers.step_memory MODEL_FOLDER PAIRS.jsonl PAIRS_IN_A_BATCH true|false

prints a number of bytes: how far memory rises during the pass on the longest pairs, weights and gradients being there
before. On a GPU that is what torch's allocator has given out; on a CPU it is resident memory and needs Linux, whose
kernel keeps a high-water mark that can be reset: elsewhere nothing is printed.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..trainers.common import resident
from ..trainers.common.allocator import map_large_blocks


def measure(model: Path, pairs: Path, batch_size: int) -> dict[str, int] | None:
    """{"logits": bytes, "fused": bytes}; None where it cannot be measured."""
    found = {}
    for name, fused in (("logits", "false"), ("fused", "true")):
        arguments = [str(model.resolve()), str(pairs.resolve()), str(batch_size), fused]
        command = [sys.executable, "-m", __spec__.name, *arguments]
        # Elsewhere than in the working folder, whose packages Python would take for installed ones.
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tempfile.gettempdir())
        if done.returncode:
            raise RuntimeError(f"measuring the memory of a DPO pass failed:\n{done.stderr.strip()}")
        if not done.stdout.strip():
            return None
        found[name] = int(done.stdout.split()[-1])
    return found


def _trainer(model: str, pairs: str, batch_size: int, fused: bool, folder: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..trainers.dpo import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir=folder, per_device_train_batch_size=batch_size, fused_head=fused, precompute_ref_log_probs=False,
        reference_free=True, share_prompts=False, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    policy = AutoModelForCausalLM.from_pretrained(model)
    return DPOTrainer(policy, config, pairs, None, AutoTokenizer.from_pretrained(model))


class _Resident:
    """The meter of a CPU: this process's resident memory."""

    reset, now, peak = staticmethod(resident.reset_peak), staticmethod(resident.resident), staticmethod(resident.peak)


class _Allocated:
    """The meter of an accelerator: what torch's allocator has given out there."""

    def __init__(self, kind: str) -> None:
        module = getattr(torch, kind)
        self.reset, self.now, self.peak = (
            module.reset_peak_memory_stats, module.memory_allocated, module.max_memory_allocated
        )  # fmt: skip


def main(model: str, pairs: str, batch_size: str, fused: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(model, pairs, int(batch_size), fused == "true", folder)
        kind = trainer.args.device.type
        meter = _Allocated(kind) if kind in ("cuda", "xpu") else _Resident
        if meter is _Resident:
            if not resident.measurable():
                return
            map_large_blocks(128 << 10)  # later passes would else be served from what earlier ones left behind, unseen
        rows = trainer.train_dataset
        longest = sorted(range(len(rows)), key=lambda i: -rows[i]["length"])[: int(batch_size)]
        batch = trainer.data_collator([rows[i] for i in longest])
        before = 0
        for last in (False, False, True):  # the first two leave the gradients, thread stacks and tables behind
            gc.collect()
            if last:
                meter.reset()
                before = meter.now()
            trainer.compute_loss(trainer.model, trainer._prepare_inputs(dict(batch))).backward()
        print(max(0, meter.peak() - before))


if __name__ == "__main__":
    main(*sys.argv[1:])
