"""What the trainers learn on human ratings of movie reviews, in CPU minutes: `python bench/learning.py reward`.

    reward     a small transformer from scratch on ranked lists of reviews, against logistic regression on TF-IDF
               features (words and word pairs), both judged on the same 4,000 held-out pairs
    labelers   the same model on single people's own rankings: those it learned from, and people it never saw
    dpo, pro   on pairs or ranked lists of the demo's fine-tuned model's own samples: the gold reward before and after
               on held-out prompts, the paired change with its 95 % interval, and the KL between them
    ppo, grpo  the same, by reinforcement learning from the gold reward
    twice      runs the jobs named after it (all by default) twice with one seed, each time in a process of its own and
               at a fraction of the size, and fails unless every number is the same

    --seed N   another seed (default 0)    --quick    a fraction of the size    --folder F    default runs/learning
    --resume   go on with the fine-tuned model, and the checkpoint of ppo or grpo, that an earlier command left

Prints one JSON object. `seconds` are this command's own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from scipy.sparse import vstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import set_seed

from fastalign.demo.command import Workplace
from fastalign.demo.config import DemoConfig
from fastalign.demo.models import small_model, train_tokenizer
from fastalign.demo.stages import Demo
from fastalign.evaluation.ranked_samples import ranked_samples
from fastalign.evaluation.sampling import sample
from fastalign.trainers.common.run import start_point, train
from fastalign.trainers.data.reviews import (
    Review,
    labeler_lists,
    load_reviews,
    ranked_reviews,
    review_pairs,
    split_reviews,
)
from fastalign.trainers.grpo import GRPOConfig, GRPOTrainer
from fastalign.trainers.ppo import PPOConfig, PPOTrainer
from fastalign.trainers.pro import PROConfig, PROTrainer
from fastalign.trainers.reward import RewardConfig, RewardTrainer, load_reward_model

HELD_OUT = 1600
POLICY = "policy"
"""Folder of the fine-tuned model that dpo, pro, ppo and grpo start from."""


class Size(NamedTuple):
    """How much of everything: reviews, passes over them, lists' length, pairs judged on, prompts, episodes."""

    reviews: int | None = None
    passes: int = 6
    list_size: int = 64
    pairs: int = 4000
    demo: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    prompts: int = 4000
    episodes: int = 1


QUICK = Size(
    reviews=256,
    passes=1,
    pairs=500,
    demo={"vocab_size": 2000, "hidden_size": 32, "layers": 1, "sft_rows": 512, "sft_learning_rate": 1e-2}
    | {"prompts": 24, "eval_prompts": 8, "max_new_tokens": 80, "min_gap": 0.05},
    prompts=200,
    episodes=12,
)
"""`episodes` divides the number of responses."""


class Job(NamedTuple):
    """What a job is told."""

    folder: Path
    seed: int
    size: Size
    resume: bool


# ------------------------------------------------------------------------------------------------------- reward models
def logistic_regression(
    reviews: Sequence[Review], held_out: Sequence[Review], pairs: Sequence[dict[str, Any]], seed: int
) -> dict[str, float]:
    """Accuracy on held-out pairs of logistic regression on differences of TF-IDF features (the best of three C)."""
    features = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True).fit([r.text for r in reviews])
    rows = review_pairs(reviews, 30_000, seed)
    gaps = features.transform([r["chosen"] for r in rows]) - features.transform([r["rejected"] for r in rows])
    answers = np.repeat([1, 0], len(rows))
    place = {review.text: i for i, review in enumerate(held_out)}
    chosen, rejected = (np.array([place[row[side]] for row in pairs]) for side in ("chosen", "rejected"))
    ratings = np.array([review.rating for review in held_out])
    better, worse = np.nonzero(ratings[:, None] > ratings)
    found = []
    for c in (0.3, 1.0, 3.0):
        model = LogisticRegression(C=c, max_iter=1000, fit_intercept=False).fit(vstack([gaps, -gaps]), answers)
        scores = features.transform([review.text for review in held_out]) @ model.coef_[0]
        every = float(np.mean(scores[better] > scores[worse]))
        found.append({"accuracy": float(np.mean(scores[chosen] > scores[rejected])), "accuracy_all_pairs": every})
    return max(found, key=lambda each: each["accuracy"])


def reward_trainer(job: Job, reviews: Sequence[Review], rows: Any, eval_rows: Any, **options: Any) -> RewardTrainer:
    """A fresh one-layer transformer with 8,000 tokens of vocabulary, to be trained as a reward model."""
    tokenizer = train_tokenizer([r.text for r in reviews], 8000)
    model = small_model(len(tokenizer), hidden_size=128, layers=1, seed=job.seed, dropout=0.3)
    # Nine thousand short texts are soon known by heart.
    model.config.embd_pdrop, model.config.attn_pdrop = 0.5, 0.3
    model.save_pretrained(job.folder / "base")
    tokenizer.save_pretrained(job.folder / "base")
    args = RewardConfig(
        output_dir=str(job.folder / "reward"),
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.3,
        adam_beta2=0.98,
        num_train_epochs=1,
        per_device_eval_batch_size=64,
        max_length=160,
        save_strategy="no",
        logging_steps=50,
        seed=job.seed,
        **options,
    )
    set_seed(job.seed)
    model, tokenizer = load_reward_model(str(job.folder / "base"), args)
    return RewardTrainer(model, args, rows, eval_rows, tokenizer)


def reward(job: Job) -> dict[str, Any]:
    """Held-out pairwise accuracy of the reward model and of logistic regression."""
    size = job.size
    reviews, held_out = split_reviews(load_reviews(), HELD_OUT, 0)
    reviews = reviews[: size.reviews]
    pairs = review_pairs(held_out, size.pairs, 1)
    rows = ranked_reviews(reviews, size.list_size, size.passes * len(reviews) // size.list_size, job.seed)
    start = time.perf_counter()
    trainer = reward_trainer(job, reviews, rows, pairs, per_device_train_batch_size=1)
    metrics = train(trainer)
    seconds = time.perf_counter() - start
    # The 4,000 pairs are a sample of all that there are, and add some noise of their own.
    every = trainer.prepare(ranked_reviews(held_out, len(held_out), 1, 0), trainer.args, trainer.processing_class)
    return {
        "accuracy": metrics["eval_accuracy"],
        "accuracy_all_pairs": trainer.evaluate(every)["eval_accuracy"],
        "loss": metrics["eval_loss"],
        "seconds": seconds,
        "logistic_regression": logistic_regression(reviews, held_out, pairs, 0),
        "pairs": size.pairs,
    }


def labelers(job: Job) -> dict[str, Any]:
    """Agreement on held-out reviews with people whose rankings were learned from, and with a fifth who were not."""
    reviews, held_out = split_reviews(load_reviews(), HELD_OUT, 0)
    reviews = reviews[: job.size.reviews]
    start = time.perf_counter()
    options = {"held_out_labelers": 0.2, "per_device_train_batch_size": 8}
    trainer = reward_trainer(job, reviews, labeler_lists(reviews, 8, job.seed), None, **options)
    trainer.train()
    known = set(trainer.known_labelers)
    rows = labeler_lists(held_out, 30, 1)
    sides = {"known": [r for r in rows if r["labeler"] in known], "new": [r for r in rows if r["labeler"] not in known]}
    result: dict[str, Any] = {"seconds": time.perf_counter() - start, "training_lists": len(trainer.train_dataset)}
    for name, side in sides.items():
        metrics = trainer.evaluate(trainer.prepare(side, trainer.args, trainer.processing_class))
        result[name] = {"accuracy": metrics["eval_accuracy"], "labelers": len(side)}
    return result


# ------------------------------------------------------------------------------------------------------------ policies
def fine_tuned(job: Job) -> tuple[Demo, Workplace]:
    """The demo up to its fine-tuned model, made now or by an earlier command that is gone on with."""
    path = job.folder.parent / POLICY
    if path.exists() and not job.resume:
        shutil.rmtree(path)
    config = DemoConfig(output_dir=str(path), seed=job.seed, **job.size.demo)
    demo = Demo(config, path)
    place = Workplace(demo, Console(stderr=True))
    place.stage("base", "Tokenizer and base model", demo.base)
    place.stage("sft", "Supervised fine-tuning", demo.sft)
    return demo, place


def compared(demo: Demo, model: Any, tokenizer: Any) -> dict[str, Any]:
    """The demo's comparison of this model with the fine-tuned one."""
    model.save_pretrained(demo.path)
    tokenizer.save_pretrained(demo.path)
    result = demo.compare()
    kept = ("gold", "independent", "kl", "words", "finished", "distinct_2")
    sides = {name: {k: result[name][k] for k in kept} for name in ("before", "after")}
    return {**sides, "gold_change": result["gold_change"]}


def dpo(job: Job) -> dict[str, Any]:
    """The demo's own last stages."""
    demo, place = fine_tuned(job)
    start = time.perf_counter()
    place.stage("pairs", "Sampling and pairing", demo.pairs)
    place.stage("dpo", "Direct preference optimisation", demo.dpo)
    return {**compared(demo, *demo.load("")), "seconds": time.perf_counter() - start}


def pro(job: Job) -> dict[str, Any]:
    """PRO instead of DPO, on all of a prompt's samples in the order of their gold rewards."""
    demo, _ = fine_tuned(job)
    config = demo.config
    start = time.perf_counter()
    model, tokenizer = demo.load("sft")
    set_seed(job.seed)
    prompts = demo.prompts(demo.reviews[0], config.prompts)
    drawn = sample(model, tokenizer, prompts, per_prompt=config.samples_per_prompt, how=demo.how)
    rows = ranked_samples(prompts, drawn, demo.gold)
    args = PROConfig(
        output_dir=str(job.folder / "run"),
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
        seed=job.seed,
    )
    PROTrainer(model, args, rows, None, tokenizer).train()
    result = compared(demo, model, tokenizer)
    return {**result, "lists": len(rows), "seconds": time.perf_counter() - start}


POLICIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "ppo": (PPOConfig, PPOTrainer, {"total_episodes": 1536, "kl_coef": 0.1, "missing_eos_penalty": 1.0}),
    "grpo": (GRPOConfig, GRPOTrainer, {"total_episodes": 3072, "kl_coef": 0.1, "missing_eos_penalty": 1.0}),
}


def policy(name: str, job: Job) -> dict[str, Any]:
    """Reinforcement learning from the gold reward of prompt and response."""
    demo, _ = fine_tuned(job)
    start = time.perf_counter()
    config, trainer_class, options = POLICIES[name]
    args = config(
        **{**options, "total_episodes": options["total_episodes"] // job.size.episodes},
        output_dir=str(job.folder / "run"),
        response_length=40,
        per_device_train_batch_size=32,
        num_mini_batches=4,
        rollout_batch_size=128,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        save_steps=1,
        save_total_limit=1,
        use_cpu=True,
        seed=job.seed,
        resume_from_checkpoint="auto",
    )
    prompts = [{"prompt": p} for p in demo.prompts(demo.reviews[0], job.size.prompts)]
    model, tokenizer = demo.load("sft")
    gold = lambda prompts, completions: demo.gold([p + c for p, c in zip(prompts, completions, strict=True)])  # noqa: E731
    trainer = trainer_class(model, args, prompts, None, tokenizer, reward=gold)
    last = trainer.train(start_point(args))
    result = compared(demo, trainer.inner.policy, tokenizer)
    trained = {key: last[f"objective/{key}"] for key in ("scores", "kl")}
    return {**result, "last_batch": trained, "seconds": time.perf_counter() - start}


JOBS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "reward": reward,
    "labelers": labelers,
    "dpo": dpo,
    "pro": pro,
    "ppo": lambda job: policy("ppo", job),
    "grpo": lambda job: policy("grpo", job),
}


# -------------------------------------------------------------------------------------------------------------- running
def twice(names: Sequence[str], seed: int) -> dict[str, str]:
    """Which jobs gave the same numbers twice, and how those that did not differ first."""
    result = {}
    for name in names:
        runs = []
        for _ in range(2):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, str(Path(__file__).resolve()), name, "--quick", "--seed", str(seed)]
                done = subprocess.run([*command, "--folder", folder], check=True, stdout=subprocess.PIPE, text=True)
                runs.append(numbers(json.loads(done.stdout[done.stdout.index("{\n") :])))
        different = [key for key in runs[0] if runs[0][key] != runs[1].get(key)]
        result[name] = f"{different[0]} differs" if different else f"{len(runs[0])} numbers, all equal"
    return result


def numbers(found: Any, path: str = "") -> dict[str, float]:
    """Every number of a job's result by its place, but for the seconds."""
    if not isinstance(found, dict):
        return {path: found}
    return {
        k: v for key, value in found.items() if key != "seconds" for k, v in numbers(value, f"{path}/{key}").items()
    }


def main() -> int:
    """Runs the job named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=[*JOBS, "twice"])
    parser.add_argument("names", nargs="*", help="jobs to run twice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("runs/learning"))
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in JOBS or given.job != "twice"]
    if unknown:
        parser.error(f"{unknown[0]!r} must be one of {', '.join(JOBS)}, after `twice`")
    if given.job == "twice":
        equal = twice(given.names or list(JOBS), given.seed)
        print(json.dumps({"twice": equal}, indent=1))
        return int(any("differs" in value for value in equal.values()))
    job = Job(given.folder / given.job, given.seed, QUICK if given.quick else Size(), given.resume)
    if job.folder.exists() and not job.resume:
        shutil.rmtree(job.folder)
    print(json.dumps({given.job: JOBS[given.job](job)}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
