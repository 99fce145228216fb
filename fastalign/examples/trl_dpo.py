"""TRL's DPOTrainer on our kernels: `patch()` before it, and its loss stays TRL's own.

    python -m fastalign.examples.trl_dpo

A tiny GPT-2 is trained on sixteen pairs twice, as TRL comes and patched, and the logged losses are compared. Needs the
extra `trl`.
"""

from __future__ import annotations

import sys
import tempfile

from fastalign.examples.tiny import PAIRS, run, tiny_model, tiny_tokenizer


def main(steps: int = 12) -> str:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from fastalign.integrations import trl as fused

    tokenizer = tiny_tokenizer()

    def losses() -> list[float]:
        """Those that TRL logs, one a step."""
        with tempfile.TemporaryDirectory() as folder:
            args = DPOConfig(
                folder,
                max_steps=steps,
                per_device_train_batch_size=4,
                learning_rate=1e-2,
                logging_steps=1,
                use_cpu=True,
                bf16=False,
                report_to=[],
                disable_tqdm=True,
                save_strategy="no",
            )
            trainer = DPOTrainer(
                tiny_model(tokenizer),
                tiny_model(tokenizer),
                args=args,
                train_dataset=Dataset.from_list(PAIRS),
                processing_class=tokenizer,
            )
            trainer.train()
            return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    theirs = losses()
    fused.patch()
    try:
        ours = losses()
    finally:
        fused.unpatch()
    apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    return f"{steps} steps of TRL's DPO: loss {ours[0]:.4f} -> {ours[-1]:.4f}, at most {apart:.1e} from TRL unpatched"


if __name__ == "__main__":
    sys.exit(run(main, "trl"))
