"""`fastalign study labelers`: how far people agree, and whether what was learned from some holds for others.

    fastalign study labelers
    fastalign study labelers --labels labels.jsonl

On the corpus's own ratings, one by one: Krippendorff's alpha in every domain; and where it is known who gave which
rating (movie reviews), how often two people agree on which of two texts is better, and the accuracy of a scorer on the
preferences of people it learned from and of people it never saw (InstructGPT's 72.4 % against 69.6 %).
With --labels instead: rates and agreement for each column of a file of InstructGPT's table (see `eval.labelers`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from ..evaluation.agreement import Rating, held_out_labelers, krippendorff_alpha, pairwise_agreement
from ..evaluation.gold import fit_gold
from ..evaluation.labelers import read_labels, summarise
from ..trainers.common import arguments
from ..trainers.common.arguments import Keys, key
from ..trainers.common.checkpoints import make_folder
from ..trainers.data.reviews import DOMAINS, Review, load_reviews
from ..utils.checks import check_positive
from . import report
from .machine import machine
from .study import PACKAGES, save


@dataclass
class LabelersConfig(Keys):
    """Agreement between the people who rated the corpus, and generalisation to people who were not learned from."""

    labels: str | None = key(None, "A .jsonl file of labels to look at, instead of the corpus")
    output_dir: str = key("runs/study", "Folder for labelers.json")
    folds: int = key(5, "Parts of the labelers, each held out once")
    held_out_items: float = key(0.2, "Share of the texts that nothing is learned from")
    reviews: int = key(0, "Use the first so many texts of a domain; 0: all")
    seed: int = key(0, "Seed of the split of labelers and texts")

    def __post_init__(self) -> None:
        check_positive("held_out_items", self.held_out_items)
        if self.reviews < 0 or self.held_out_items >= 1:
            raise ValueError(
                f"reviews must be at least 0 and held_out_items below 1; got {self.reviews} and {self.held_out_items}"
            )


def fit_ratings(texts: Sequence[str], ratings: Sequence[float]) -> Callable[[Sequence[str]], np.ndarray]:
    """The gold reward's model (TF-IDF, ridge regression), fitted to the mean of the given ratings of each text."""
    by_text: dict[str, list[float]] = {}
    for text, value in zip(texts, ratings, strict=True):
        by_text.setdefault(text, []).append(value)
    return fit_gold([Review(float(np.mean(values)), text, ()) for text, values in by_text.items()])


def run_labelers(config: LabelersConfig) -> dict[str, Any]:
    """What `labelers.json` holds."""
    domains = {}
    for domain in DOMAINS:
        ratings = [r.ratings for r in load_reviews(domain)[: config.reviews or None]]
        alphas = {level: krippendorff_alpha(ratings, level=level) for level in ("interval", "ordinal")}
        domains[domain] = {"texts": len(ratings), "ratings": sum(map(len, ratings)), **alphas}
    movies = [
        Rating(review.text, name, float(value))
        for review in load_reviews()[: config.reviews or None]
        for name, value in review.labelers()
    ]
    found = held_out_labelers(
        movies, fit_ratings, folds=config.folds, held_out_items=config.held_out_items, seed=config.seed
    )
    return {
        "study": "labelers",
        "command": f"fastalign study labelers --folds {config.folds} --held_out_items {config.held_out_items} "
        f"--reviews {config.reviews} --seed {config.seed}",
        "machine": machine(PACKAGES),
        "domains": domains,
        "pairwise_agreement": pairwise_agreement(movies)._asdict(),
        "known_labelers": found.known._asdict(),
        "new_labelers": found.new._asdict(),
        "labelers": found.labelers,
    }


def show(results: dict[str, Any], console: Console) -> None:
    """Prints the figures."""
    table = Table(title="agreement (Krippendorff's alpha)", title_justify="left")
    for head in ("domain", "texts", "ratings", "interval", "ordinal"):
        table.add_column(head, justify="left" if head == "domain" else "right")
    for domain, d in results["domains"].items():
        table.add_row(domain, f"{d['texts']:,}", f"{d['ratings']:,}", f"{d['interval']:.3f}", f"{d['ordinal']:.3f}")
    console.print(table)
    lines = {
        "two people agree on which of two movie reviews is better": "pairwise_agreement",
        "a scorer agrees with people that it learned from, on new texts": "known_labelers",
        "and with people that it never saw": "new_labelers",
    }
    for text, name in lines.items():
        console.print(f"{text}: {report.interval(results[name], 3)}", markup=False, highlight=False)


def show_table(columns: dict[str, dict[str, float]], console: Console) -> None:
    """Prints what `eval.labelers.summarise` found."""
    table = Table("column", *(Column(name, justify="right") for name in ("mean", "alpha", "kappa", "items", "ratings")))
    for name, c in columns.items():
        figures = [f"{c[n]:.3f}" for n in ("mean", "alpha", "kappa")]
        table.add_row(name, *figures, *(f"{c[n]:.0f}" for n in ("items", "ratings")))
    console.print(table)


def main(argv: list[str]) -> int:
    """The `fastalign study labelers` command."""
    try:
        config = arguments.parse(LabelersConfig, argv, command="study labelers")
    except arguments.Helped as text:
        print(text)
        return 0
    console = Console(width=None if Console().is_terminal else 120)
    if config.labels is not None:
        if not os.path.isfile(os.path.expanduser(config.labels)):
            raise ValueError(f"labels must be an existing file; there is no {config.labels!r}")
        show_table(summarise(read_labels(config.labels)), console)
        return 0
    path = Path(os.path.expanduser(config.output_dir)) / "labelers.json"
    make_folder(str(path.parent))
    results = run_labelers(config)
    save(path, results)
    show(results, console)
    print(f"figures in {path}")
    return 0
