"""transformers' Trainer on a model whose loss comes from hidden states: one line before it, and no logits in training.

    python -m fastalign.examples.transformers_trainer

A tiny GPT-2 learns sixteen reviews by heart. Before that its fused loss is held to its own, and after the `with` block
the model is as it was: it returns logits again. Needs the extra `train`.
"""

from __future__ import annotations

import sys
import tempfile

from fastalign.examples.tiny import TEXTS, run, tiny_model, tiny_tokenizer


def main(steps: int = 40) -> str:
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    from fastalign.integrations.transformers import apply_fused_loss

    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    batch = collator(rows)
    own = float(model(**batch).loss.detach())
    with tempfile.TemporaryDirectory() as folder, apply_fused_loss(model):
        fused = model(**batch)
        if fused.logits is not None:
            raise RuntimeError("the model formed its logits, which the fused loss does without")
        args = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            logging_steps=10,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
        )
        Trainer(model, args, train_dataset=rows, data_collator=collator).train()
    apart, after = abs(float(fused.loss.detach()) - own), model(**batch)
    return (
        f"{steps} steps of Trainer: loss {own:.3f} -> {float(after.loss.detach()):.3f}; at first the fused loss was "
        f"{apart:.1e} from the model's own; now it gives logits of {list(after.logits.shape)} again"
    )


if __name__ == "__main__":
    sys.exit(run(main, "train"))
