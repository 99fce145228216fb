"""The stages of the demo. Each seeds itself, so that a run that was cut off ends as one that was not."""

from __future__ import annotations

import itertools
import json
import resource
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from ..evaluation.estimates import estimate
from ..evaluation.gold import agreement, fit_gold, load_independent
from ..evaluation.policy import measure
from ..evaluation.ranked_samples import best_against_worst, ranked_samples
from ..evaluation.sampling import Sample, sample
from ..models.loading import load, load_tokenizer, placed
from ..models.sampling import Sampling
from ..trainers.common.callbacks import LOG_NAME, read_log
from ..trainers.common.run import start_point, train
from ..trainers.data.reviews import Review, load_reviews, opening, split_reviews
from ..trainers.dpo import DPOConfig, DPOTrainer
from ..trainers.sft import SFTConfig, SFTTrainer
from . import models as demo_models
from . import step_memory
from .config import DemoConfig

OWN = ("stages", "base", "sft", "dpo", "pairs.jsonl", "eval_pairs.jsonl", "results.json", "curves.png")
_BATCH = 384  # continuations sampled at once: large enough to keep two cores in matrix products


def clear(path: Path, own: Sequence[str] = OWN) -> None:
    """Removes what an earlier demo (or another run that leaves things of these names) left there, and nothing else."""
    for name in own:
        target = path / name
        if target.is_dir():
            shutil.rmtree(target)
        elif target.exists():
            target.unlink()


def peak_memory_mb() -> float:
    """Most memory of this process so far: allocated on the GPU where one is used, resident where none is."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


class Demo:
    """What the stages share: the configuration, the folder, and the corpus with its scorers."""

    def __init__(self, config: DemoConfig, path: Path) -> None:
        self.config, self.path = config, path
        self._reviews: tuple[list[Review], list[Review]] | None = None
        self._gold: Any = None

    # ---------------------------------------------------------------------------------------------- shared things
    @property
    def reviews(self) -> tuple[list[Review], list[Review]]:
        """(train, held-out)."""
        if self._reviews is None:
            self._reviews = split_reviews(load_reviews(), self.config.held_out, self.config.seed)
        return self._reviews

    @property
    def gold(self) -> Any:
        """The gold reward: texts to scores."""
        if self._gold is None:
            self._gold = fit_gold(self.reviews[0])
        return self._gold

    @property
    def how(self) -> Sampling:
        """How continuations are drawn."""
        return Sampling(self.config.max_new_tokens, _BATCH)

    def prompts(self, reviews: Sequence[Review], count: int) -> list[str]:
        """Openings of the first reviews that go on for at least as long again; each opening once."""
        words = self.config.opening_words
        long = (r.text for r in reviews if len(r.text.split(" ")) >= 2 * words)
        return list(itertools.islice(dict.fromkeys(opening(text, words) for text in long), count))

    def load(self, name: str) -> tuple[Any, Any]:
        """(model on the accelerator if there is one, tokenizer) that a stage left."""
        folder = self.path / name
        model = placed(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        return model, AutoTokenizer.from_pretrained(folder)

    def check(self) -> None:
        """Loads what may not be there, the corpus and a model that is not made here: ValueError or OSError then."""
        _ = self.reviews
        if self.config.model != "scratch":
            self._pretrained()

    def _pretrained(self) -> tuple[str, Any, Any]:
        """(folder or name, model, tokenizer) of a model that is not made here."""
        name = self.config.model
        source = str(demo_models.smollm2()) if name == "smollm2" else name
        return source, load("model", AutoModelForCausalLM, source), load_tokenizer(None, source)

    # ----------------------------------------------------------------------------------------------------- stages
    def corpus(self) -> dict[str, Any]:
        """Fetches the corpus and fits the gold reward on its training part."""
        train_reviews, held_out = self.reviews
        return {
            "train": len(train_reviews),
            "held_out": len(held_out),
            "gold": agreement(self.gold, held_out)._asdict(),
            "independent": agreement(load_independent(), held_out)._asdict(),
        }

    def base(self) -> dict[str, Any]:
        """The model to start from, with its tokenizer, in `base/`."""
        config, folder = self.config, self.path / "base"
        if config.model == "scratch":
            tokenizer: Any = demo_models.train_tokenizer([r.text for r in self.reviews[0]], config.vocab_size)
            model: Any = demo_models.small_model(
                len(tokenizer), hidden_size=config.hidden_size, layers=config.layers, seed=config.seed, dropout=0.1
            )
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            source = str(folder)
        else:
            source, model, tokenizer = self._pretrained()
        return {"source": source, "parameters": model.num_parameters(), "vocabulary": len(tokenizer)}

    def sft(self) -> dict[str, Any]:
        """Fine-tunes on whole reviews: without a prompt, so that openings are learned as well."""
        config = self.config
        train_reviews, held_out = self.reviews
        args = SFTConfig(
            learning_rate=config.sft_learning_rate,
            weight_decay=0.1,
            adam_beta2=0.98,
            eval_strategy="epoch" if config.sft_epochs > 1 else "no",
            **self._training("sft", config.sft_batch_size, config.sft_epochs),
        )
        base = json.loads((self.path / "stages" / "base.json").read_text(encoding="utf-8"))["source"]
        tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        rows = [{"prompt": "", "completion": r.text} for r in train_reviews[: config.sft_rows]]
        held = [{"prompt": "", "completion": r.text} for r in held_out[: 2 * config.eval_prompts]]
        return self._train(SFTTrainer(model, args, rows, held, tokenizer), "sft")

    def pairs(self) -> dict[str, Any]:
        """Samples from the fine-tuned model and pairs by gold reward, on training prompts and on held-out ones."""
        config = self.config
        model, tokenizer = self.load("sft")
        result: dict[str, Any] = {}
        for part, reviews, count in (
            ("pairs", self.reviews[0], config.prompts),
            ("eval_pairs", self.reviews[1], config.eval_prompts),
        ):
            set_seed(config.seed + len(part))
            prompts = self.prompts(reviews, count)
            drawn = self._sample(model, tokenizer, prompts, config.samples_per_prompt, f"continuations ({part})")
            rows = best_against_worst(ranked_samples(prompts, drawn, self.gold), config.min_gap)
            if not rows:
                raise ValueError(f"min_gap={config.min_gap} leaves no pairs; lower it, or raise --prompts")
            with open(self.path / f"{part}.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            lengths = [[len(row[side].split()) for row in rows] for side in ("chosen", "rejected")]
            result[part] = {"pairs": len(rows), "mean_words": [float(np.mean(n)) for n in lengths]}
        return result

    def dpo(self) -> dict[str, Any]:
        """DPO on the pairs; the aligned model goes to the output folder itself."""
        config = self.config
        model, tokenizer = self.load("sft")
        args = DPOConfig(
            beta=config.beta,
            loss_type="rpo" if config.nll_weight else "sigmoid",
            nll_weight=config.nll_weight or 1.0,
            length_alpha=config.length_alpha,
            learning_rate=config.dpo_learning_rate,
            eval_strategy="steps",
            eval_steps=0.25,
            **self._training("dpo", config.dpo_batch_size, config.dpo_epochs),
        )
        rows, held = (str(self.path / f"{name}.jsonl") for name in ("pairs", "eval_pairs"))
        trainer = DPOTrainer(model, args, rows, held, tokenizer)
        result = self._train(trainer, "dpo")
        model.save_pretrained(self.path)
        tokenizer.save_pretrained(self.path)
        return result

    def compare(self) -> dict[str, Any]:
        """Samples from both models on held-out prompts with the same seed, and scores them."""
        config = self.config
        prompts = self.prompts(self.reviews[1], config.eval_prompts)
        independent = load_independent()
        models = {"before": self.load("sft"), "after": self.load("")}
        result: dict[str, Any] = {}
        texts, gold = {}, {}
        for name, (model, tokenizer) in models.items():
            found = measure(
                model,
                models["before"][0],
                tokenizer,
                prompts,
                {"gold": self.gold, "independent": independent},
                per_prompt=config.eval_samples,
                how=self.how,
                seed=config.seed + 1,
                desc=f"continuations ({name})",
            )
            result[name], texts[name], gold[name] = found.figures, found.texts, found.scores["gold"]
        result["gold_change"] = estimate(gold["after"] - gold["before"])._asdict()
        result["samples"] = self._examples(prompts, texts)
        result["gold_scores"] = {name: scores.flatten().tolist() for name, scores in gold.items()}
        result["peak_memory_mb"] = peak_memory_mb()
        return result

    def memory(self) -> dict[str, Any]:
        """Peak memory of a DPO pass with and without the logits formed whole."""
        size = (self.config.dpo_batch_size + 1) // 2
        return {"pairs": size, "peak": step_memory.measure(self.path, self.path / "pairs.jsonl", size)}

    # ---------------------------------------------------------------------------------------------------- helpers
    def _training(self, name: str, batch_size: int, epochs: float) -> dict[str, Any]:
        """Trainer arguments that both trainings share.

        An update runs as two micro-batches, the longer texts and the shorter ones: a fourth less padding, same update.
        """
        return {
            "output_dir": str(self.path / name),
            "per_device_train_batch_size": (batch_size + 1) // 2,
            "gradient_accumulation_steps": min(2, batch_size),
            "per_device_eval_batch_size": 64,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.05,
            "max_length": 160,
            "logging_steps": 5,
            "num_train_epochs": epochs,
            # The stage itself saves its end; a large model's checkpoint there would only cost time.
            "save_strategy": "epoch" if epochs > 1 else "no",
            "save_total_limit": 1,
            "resume_from_checkpoint": "auto",
            "seed": self.config.seed,
        }

    def _train(self, trainer: Any, name: str) -> dict[str, Any]:
        """Trains; the metrics, speed and log of the run. Checkpoints go once the result is saved."""
        metrics = train(trainer, start_point(trainer.args))
        for checkpoint in (self.path / name).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        return {
            "metrics": metrics,
            "tokens": trainer.state.num_input_tokens_seen,
            "tokens_per_second": trainer.state.num_input_tokens_seen / metrics["train_runtime"],
            "log": read_log(str(self.path / name / LOG_NAME)),
            "peak_memory_mb": peak_memory_mb(),
        }

    def _sample(self, model: Any, tokenizer: Any, prompts: list[str], per_prompt: int, desc: str) -> list[list[Sample]]:
        return sample(model, tokenizer, prompts, per_prompt=per_prompt, how=self.how, desc=desc)

    def _examples(self, prompts: list[str], texts: dict[str, list[str]]) -> list[dict[str, Any]]:
        """The first sample of the first prompts, not chosen for their looks, with their gold rewards."""
        step = self.config.eval_samples
        rows = []
        for i in range(min(5, len(prompts))):
            pair = {name: all_texts[i * step] for name, all_texts in texts.items()}
            scores = {f"{name}_gold": float(self.gold([text])[0]) for name, text in pair.items()}
            rows.append({"prompt": prompts[i], **pair, **scores})
        return rows
