"""What the trainers learn on human ratings of movie reviews, in CPU minutes: `python bench/learning.py reward`.

    reward     a small transformer from scratch on ranked lists of 8 reviews, against logistic regression on TF-IDF
               features (words and word pairs), both judged on the same 4,000 held-out pairs
    labelers   the same model on single people's own rankings: those it learned from, and people it never saw
    pro        PRO on ranked lists of the demo's fine-tuned model's own samples: the gold reward before and after, and
               the KL between them, on held-out prompts

Prints one JSON object, with the command's seconds; everything is seeded.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from scipy.sparse import vstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import set_seed

from fastalign.trainers.data.reviews import (
    Review,
    labeler_lists,
    load_reviews,
    ranked_reviews,
    review_pairs,
    split_reviews,
)
from fastalign.trainers.data.sampled import ranked_samples
from fastalign.trainers.demo import Workplace
from fastalign.trainers.demo_config import DemoConfig
from fastalign.trainers.demo_models import small_model, train_tokenizer
from fastalign.trainers.demo_stages import Demo
from fastalign.trainers.eval.sampling import sample
from fastalign.trainers.pro import PROConfig, PROTrainer
from fastalign.trainers.reward import RewardConfig, RewardTrainer, load_reward_model
from fastalign.trainers.run import train

HELD_OUT, LIST, PASSES, PAIRS = 1600, 8, 4, 4000


def logistic_regression(reviews: Sequence[Review], held_out: Sequence[dict[str, Any]], seed: int) -> float:
    """Accuracy on held-out pairs of logistic regression on differences of TF-IDF features (the best of three C)."""
    features = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True).fit([r.text for r in reviews])
    rows = review_pairs(reviews, 30_000, seed)
    gaps = features.transform([r["chosen"] for r in rows]) - features.transform([r["rejected"] for r in rows])
    answers = np.repeat([1, 0], len(rows))
    test = features.transform([r["chosen"] for r in held_out]) - features.transform([r["rejected"] for r in held_out])
    accuracies = []
    for c in (0.3, 1.0, 3.0):
        model = LogisticRegression(C=c, max_iter=1000, fit_intercept=False).fit(vstack([gaps, -gaps]), answers)
        accuracies.append(float(np.mean(test @ model.coef_[0] > 0)))
    return max(accuracies)


def reward_trainer(folder: Path, reviews: Sequence[Review], rows: Any, eval_rows: Any, **options: Any) -> RewardTrainer:
    """A fresh one-layer transformer with 8,000 tokens of vocabulary, to be trained as a reward model."""
    tokenizer = train_tokenizer([r.text for r in reviews], 8000)
    model = small_model(len(tokenizer), hidden_size=128, layers=1, seed=0, dropout=0.3)
    # Nine thousand short texts are soon known by heart.
    model.config.embd_pdrop, model.config.attn_pdrop = 0.5, 0.3
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    args = RewardConfig(
        output_dir=str(folder / "reward"),
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.3,
        adam_beta2=0.98,
        num_train_epochs=1,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=64,
        max_length=160,
        save_strategy="no",
        logging_steps=50,
        overwrite_output_dir=True,
        **options,
    )
    set_seed(0)
    model, tokenizer = load_reward_model(str(folder / "base"), args)
    return RewardTrainer(model, args, rows, eval_rows, tokenizer)


def reward(folder: Path) -> dict[str, Any]:
    """Held-out pairwise accuracy of the reward model and of logistic regression."""
    reviews, held_out = split_reviews(load_reviews(), HELD_OUT, 0)
    pairs = review_pairs(held_out, PAIRS, 1)
    rows = ranked_reviews(reviews, LIST, PASSES * len(reviews) // LIST, 0)
    start = time.perf_counter()
    metrics = train(reward_trainer(folder, reviews, rows, pairs))
    return {
        "accuracy": metrics["eval_accuracy"],
        "seconds": time.perf_counter() - start,
        "logistic_regression": logistic_regression(reviews, pairs, 0),
        "pairs": PAIRS,
    }


def labelers(folder: Path) -> dict[str, Any]:
    """Agreement on held-out reviews with people whose rankings were learned from, and with a fifth who were not."""
    reviews, held_out = split_reviews(load_reviews(), HELD_OUT, 0)
    start = time.perf_counter()
    trainer = reward_trainer(folder, reviews, labeler_lists(reviews, LIST, 0), None, held_out_labelers=0.2)
    trainer.train()
    known = set(trainer.known_labelers)
    rows = labeler_lists(held_out, 30, 1)
    sides = {"known": [r for r in rows if r["labeler"] in known], "new": [r for r in rows if r["labeler"] not in known]}
    result: dict[str, Any] = {"seconds": time.perf_counter() - start, "training_lists": len(trainer.train_dataset)}
    for name, side in sides.items():
        metrics = trainer.evaluate(trainer.prepare(side, trainer.args, trainer.processing_class))
        result[name] = {"accuracy": metrics["eval_accuracy"], "labelers": len(side)}
    return result


def pro(folder: Path) -> dict[str, Any]:
    """The demo's way to a fine-tuned model, PRO instead of DPO, and the demo's comparison."""
    config = DemoConfig(output_dir=str(folder))
    place = Workplace(config, Console())
    demo = Demo(config, place.path)
    place.stage("base", "Tokenizer and base model", demo.base)
    place.stage("sft", "Supervised fine-tuning", demo.sft)
    start = time.perf_counter()
    model, tokenizer = demo.load("sft")
    set_seed(0)
    prompts = demo.prompts(demo.reviews[0], config.prompts)
    drawn = sample(model, tokenizer, prompts, per_prompt=config.samples_per_prompt, how=demo.how)
    rows = ranked_samples(prompts, drawn, demo.gold)
    args = PROConfig(
        output_dir=str(folder / "pro"),
        sft_weight=0.05,
        sft_average=True,
        learning_rate=3e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        num_train_epochs=1,
        per_device_train_batch_size=8,
        max_length=160,
        save_strategy="no",
        logging_steps=20,
        overwrite_output_dir=True,
    )
    trainer = PROTrainer(model, args, rows, None, tokenizer)
    trainer.train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    compared = demo.compare()
    kept = ("gold", "independent", "kl", "words", "finished")
    result = {name: {k: compared[name][k] for k in kept} for name in ("before", "after")}
    return {
        **result,
        "gold_change": compared["gold_change"],
        "lists": len(rows),
        "seconds": time.perf_counter() - start,
    }


JOBS: dict[str, Callable[[Path], dict[str, Any]]] = {"reward": reward, "labelers": labelers, "pro": pro}


def main() -> int:
    """Runs the job named on the command line; its models go to runs/learning."""
    name = sys.argv[1] if len(sys.argv) == 2 else ""
    if name not in JOBS:
        print(f"usage: python bench/learning.py {' | '.join(JOBS)}", file=sys.stderr)
        return 2
    print(json.dumps({name: JOBS[name](Path("runs/learning") / name)}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
