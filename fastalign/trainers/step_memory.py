"""Peak memory of one DPO forward and backward pass, with the logits formed whole and without, each in a fresh process.

    python -m fastalign.trainers.step_memory MODEL_FOLDER PAIRS.jsonl PAIRS_IN_A_BATCH true|false

prints a number of bytes: how far resident memory rises during the pass on the longest pairs, weights and gradients
being there before. Needs Linux, whose kernel keeps a high-water mark that can be reset; elsewhere it prints nothing.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import resident
from .allocator import map_large_blocks


def measure(model: Path, pairs: Path, batch_size: int) -> dict[str, int] | None:
    """{"logits": bytes, "fused": bytes}; None where it cannot be measured."""
    found = {}
    for name, fused in (("logits", "false"), ("fused", "true")):
        arguments = [str(model.resolve()), str(pairs.resolve()), str(batch_size), fused]
        command = [sys.executable, "-m", __spec__.name, *arguments]
        # Elsewhere than in the working folder, whose packages Python would take for installed ones.
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tempfile.gettempdir())
        if not done.stdout.strip():
            return None
        found[name] = int(done.stdout.split()[-1])
    return found


def _trainer(model: str, pairs: str, batch_size: int, fused: bool, folder: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .dpo import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir=folder, per_device_train_batch_size=batch_size, fused_head=fused, precompute_ref_log_probs=False,
        reference_free=True, share_prompts=False, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    policy = AutoModelForCausalLM.from_pretrained(model)
    return DPOTrainer(policy, config, pairs, None, AutoTokenizer.from_pretrained(model))


def main(model: str, pairs: str, batch_size: str, fused: str) -> None:
    if not resident.measurable():
        return
    map_large_blocks(128 << 10)  # later passes would else be served from what earlier ones left behind, unseen
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(model, pairs, int(batch_size), fused == "true", folder)
        rows = trainer.train_dataset
        longest = sorted(range(len(rows)), key=lambda i: -rows[i]["length"])[: int(batch_size)]
        batch = trainer.data_collator([rows[i] for i in longest])
        before = 0
        for last in (False, False, True):  # the first two leave the gradients, thread stacks and tables behind
            gc.collect()
            if last:
                resident.reset_peak()
                before = resident.resident()
            trainer.compute_loss(trainer.model, dict(batch)).backward()
        print(max(0, resident.peak() - before))


if __name__ == "__main__":
    main(*sys.argv[1:])
