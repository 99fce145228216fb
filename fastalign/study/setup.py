"""What all methods of one seed start from: corpus, gold reward, fine-tuned model, its samples, a learned reward."""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from ..demo.command import Workplace
from ..demo.stages import Demo
from ..evaluation.gold import Scorer, load_independent
from ..evaluation.perplexity import TextLikelihood, completions_of, likelihood
from ..evaluation.ranked_samples import best_against_worst, ranked_samples
from ..evaluation.sampling import sample
from ..evaluation.scorers import score_texts
from ..models.loading import placed
from ..trainers.common.run import train
from ..trainers.reward import RewardConfig, RewardTrainer, load_reward_model
from .config import StudyConfig

_LIST = 32
"""Texts in a list that the learned reward is trained on."""


class Setup:
    """Things of one seed, made by `prepare` and loaded when first asked for.

    Args:
        root: the study's folder.
        config: its configuration.
        seed: of the split, the base model, the samples and everything after.
    """

    def __init__(self, root: Path, config: StudyConfig, seed: int) -> None:
        self.config, self.seed, self.path = config, seed, root / "grounds" / f"seed-{seed}" / "ground"
        self.demo = Demo(config.demo(seed), self.path)

    # ------------------------------------------------------------------------------------------------------ making
    def prepare(self) -> dict[str, Any]:
        """Runs the stages that are not done: each is kept, so a run that was cut off goes on. Returns their results."""
        _kept.clear()
        place = Workplace(self.demo, Console(quiet=True))
        stages: dict[str, Callable[[], dict[str, Any]]] = {
            "corpus": self.demo.corpus,
            "base": self.demo.base,
            "sft": self.demo.sft,
            "samples": self._samples,
            "proxy": self._proxy,
        }
        found = {name: place.stage(name, name, run) for name, run in stages.items()}
        # What is told of a run leaves out its long log, and where on this machine it was.
        return {stage: {k: v for k, v in each.items() if k not in ("log", "source")} for stage, each in found.items()}

    def _samples(self) -> dict[str, Any]:
        """Continuations of training prompts, scored: ranked lists (`lists.jsonl`) and pairs (`pairs.jsonl`)."""
        config = self.config
        model, tokenizer = self.demo.load("sft")
        set_seed(self.seed)
        prompts = self.demo.prompts(self.demo.reviews[0], config.prompts)
        how = self.demo.how
        drawn = sample(model, tokenizer, prompts, per_prompt=config.samples_per_prompt, how=how)
        lists = ranked_samples(prompts, drawn, self.demo.gold)
        pairs = best_against_worst(lists, config.min_gap)
        if not pairs:
            raise ValueError(f"min_gap={config.min_gap} leaves no pairs; lower it, or raise --prompts")
        for name, rows in {"lists": lists, "pairs": pairs, "prompts": [{"prompt": p} for p in prompts]}.items():
            with open(self.file(name), "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        words = {side: float(np.mean([len(row[side].split()) for row in pairs])) for side in ("chosen", "rejected")}
        return {"prompts": len(prompts), "lists": len(lists), "pairs": len(pairs), "words": words}

    def _proxy(self) -> dict[str, Any]:
        """A reward model (Bradley-Terry on all comparisons in lists); accuracy on the pairs of a tenth of the prompts.

        Its body is the fine-tuned model's. It learns from the other prompts' samples and from the training reviews, all
        by their gold reward: the samples' few words alone do not teach a small model what words are worth. For the same
        reason the lists are long, and its rate is near that of fine-tuning, not one at which a policy stays close to
        where it was.
        """
        config = self.config
        lists = self.read("lists")
        cut = max(1, len(lists) // 10)
        pairs = best_against_worst(lists[:cut], config.min_gap)
        texts = [r.text for r in self.demo.reviews[0]][: config.sft_rows]
        texts += [row["prompt"] + text for row in lists[cut:] for text in row["completions"]]
        random.Random(self.seed).shuffle(texts)
        scores = self.demo.gold(texts).tolist()
        parts = [slice(i, i + _LIST) for i in range(0, len(texts) - 1, _LIST)]
        rows = [{"prompt": "", "completions": texts[part], "rewards": scores[part]} for part in parts]
        args = RewardConfig(
            output_dir=str(self.path / "proxy"),
            learning_rate=config.reward_learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            weight_decay=0.1,
            num_train_epochs=config.reward_epochs,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=64,
            max_length=160,
            save_strategy="no",
            logging_steps=1000,
            disable_tqdm=True,
            seed=self.seed,
        )
        set_seed(self.seed)
        model, tokenizer = load_reward_model(str(self.path / "sft"), args)
        metrics = train(RewardTrainer(model, args, rows, pairs, tokenizer))
        return {"accuracy": metrics["eval_accuracy"], "pairs": len(pairs), "texts": len(texts)}

    # ----------------------------------------------------------------------------------------------------- loading
    def file(self, name: str) -> Path:
        """`prompts`, `lists` or `pairs`."""
        return self.path / f"{name}.jsonl"

    def read(self, name: str) -> list[dict[str, Any]]:
        """The rows of such a file."""
        return [json.loads(line) for line in self.file(name).read_text(encoding="utf-8").splitlines()]

    def spread(self, scorer: Scorer) -> float:
        """Standard deviation of a reward among the fine-tuned model's samples for one prompt, over 200 prompts."""
        lists = self.read("lists")[:200]
        scores = scorer([row["prompt"] + text for row in lists for text in row["completions"]])
        parts = np.split(scores, np.cumsum([len(row["completions"]) for row in lists])[:-1])
        return math.sqrt(sum(p.var() * len(p) for p in parts) / (len(scores) - len(parts)))

    @property
    def eval_prompts(self) -> list[str]:
        """Openings of held-out reviews."""
        return self.demo.prompts(self.demo.reviews[1], self.config.eval_prompts)

    @functools.cached_property
    def reference(self) -> Any:
        """The fine-tuned model, for KLs. Not to be trained: `demo.load("sft")` gives one of one's own."""
        return self.demo.load("sft")[0].eval().requires_grad_(False)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """Of all models of this seed."""
        return AutoTokenizer.from_pretrained(self.path / "sft")

    @functools.cached_property
    def scorers(self) -> dict[str, Scorer]:
        """Whole texts to scores: the gold reward, the learned one (read after an end), the independent scorer."""
        model = placed(AutoModelForSequenceClassification.from_pretrained(self.path / "proxy").eval())
        tokenizer = AutoTokenizer.from_pretrained(self.path / "proxy")
        learned: Scorer = lambda texts: score_texts(model, tokenizer, [""] * len(texts), texts, 128)  # noqa: E731
        return {"gold": self.demo.gold, "proxy": learned, "independent": load_independent()}

    @functools.cached_property
    def held_out_likelihood(self) -> TextLikelihood:
        """Of held-out reviews under the fine-tuned model."""
        return self.likelihood_of(self.reference)

    def likelihood_of(self, model: Any) -> TextLikelihood:
        """Likelihood of twice as many held-out reviews as there are prompts."""
        texts = [r.text for r in self.demo.reviews[1][: 2 * self.config.eval_prompts]]
        return likelihood(model, self.tokenizer, completions_of(texts), max_length=160)


_kept: dict[tuple[Path, int, str], Setup] = {}


def setup_of(root: Path, config: StudyConfig, seed: int) -> Setup:
    """The setup of a cell: where the cell before it in this process had the same, that one, with all it has loaded."""
    key = (root, seed, json.dumps(config.settings(), sort_keys=True))
    if key not in _kept:
        _kept.clear()
        _kept[key] = Setup(root, config, seed)
    return _kept[key]
