"""`fastalign study transfer`: trained on movie reviews, asked about other things.

    fastalign study transfer --quick

As Rafailov et al. 2023 (table 1) take policies trained on Reddit posts to news articles, DPO and PPO policies trained
on openings of movie reviews continue the openings of Amazon reviews, tweets and news editorials. They are judged by the
gold reward of the movies, which they were trained for, and by one fitted to people's ratings of the domain itself.
Writes `transfer.png`, `transfer.html` (stands alone) and `transfer.json`.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..evaluation.estimates import estimate
from ..evaluation.gold import Scorer, fit_gold
from ..evaluation.policy import Measured, measure
from ..trainers.common import arguments
from ..trainers.data.reviews import DOMAINS, load_reviews, split_reviews
from . import plots, report
from .callbacks import Tracker
from .config import StudyConfig
from .methods import METHODS, Job
from .setup import Setup, setup_of
from .study import run_study, save, seed_of

POLICIES = ("dpo", "ppo-gold")
FIGURES = {"gold": "gold reward of the movies", "own": "gold reward of the domain itself"}


@dataclass
class TransferConfig(StudyConfig):
    """DPO and PPO policies trained on movie reviews, on the openings of other domains."""


class Elsewhere(Tracker):
    """Looks at the policy only at the end, in every domain."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.changes: dict[str, dict[str, Any]] = {}

    def look(self, step: int, policy: Any, *, end: bool) -> None:
        self.changes = {domain: self._change(domain, policy) for domain in DOMAINS}

    def _change(self, domain: str, policy: Any) -> dict[str, Any]:
        """Figures of the policy in the domain, and the change of both rewards from the fine-tuned model's."""
        setup = self.setup
        prompts, own = self._domain(domain)
        scorers = {"gold": setup.demo.gold, "own": own}
        before, after = (self._measure(model, prompts, scorers) for model in (setup.reference, policy))
        changes = {f"{n}_change": estimate(after.scores[n] - before.scores[n])._asdict() for n in FIGURES}
        kept = ("gold", "own", "kl", "words", "finished")
        return {**changes, "before": {n: before.figures[n] for n in kept}, **{n: after.figures[n] for n in kept}}

    def _measure(self, model: Any, prompts: list[str], scorers: dict[str, Scorer]) -> Measured:
        config = self.setup.config
        return measure(
            model,
            self.setup.reference,
            self.setup.tokenizer,
            prompts,
            scorers,
            per_prompt=config.eval_samples,
            how=self.setup.demo.how,
            seed=self.setup.seed + 1,
        )

    @functools.cache  # noqa: B019 (one object for each cell, which ends with its process's cell)
    def _domain(self, domain: str) -> tuple[list[str], Scorer]:
        """Openings of the domain's held-out texts, and a gold reward fitted to people's ratings of the others."""
        setup = self.setup
        if domain == "movies":
            return setup.eval_prompts, setup.demo.gold
        texts = load_reviews(domain)
        train, held_out = split_reviews(texts, min(setup.config.held_out, len(texts) // 2), setup.seed)
        return setup.demo.prompts(held_out, setup.config.eval_prompts), fit_gold(train)


def cells(config: TransferConfig) -> list[str]:
    """One for each policy, at the middle of its sweep, and seed."""
    names = []
    for seed in config.all_seeds:
        for method in POLICIES:
            sweep = METHODS[method].full if config.full else METHODS[method].quick
            names.append(f"transfer/{method}-{sweep[len(sweep) // 2]:g}-{seed}")
    return names


def run_cell(root: Path, config: TransferConfig, name: str) -> dict[str, Any]:
    """Trains one policy on movie reviews; the changes in every domain."""
    method, value, _ = name.removeprefix("transfer/").rsplit("-", 2)
    # One evaluation alone, at the end.
    setup = setup_of(root, dataclasses.replace(config, evaluations=1), seed_of(name))
    tracker, work = Elsewhere(setup), root / name / "work"
    shutil.rmtree(work, ignore_errors=True)
    METHODS[method].train(Job(setup, float(value), work, tracker))
    shutil.rmtree(work, ignore_errors=True)
    return {"method": method, "coefficient": float(value), "seed": setup.seed, "domains": tracker.changes}


def summarise(results: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Method → domain → figures, means over seeds with intervals; with one seed alone, that seed's over prompts."""
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for method in POLICIES:
        own = [c["domains"] for c in results["cells"].values() if c["method"] == method]
        for domain in DOMAINS:
            rows = [d[domain] for d in own]
            names = [name for name, value in rows[0].items() if isinstance(value, dict) and "mean" in value]
            out.setdefault(method, {})[domain] = {
                n: rows[0][n] if len(rows) == 1 else estimate(np.array([r[n]["mean"] for r in rows]))._asdict()
                for n in names
            }
    return out


def write_report(results: dict[str, Any], folder: Path) -> None:
    """`transfer.html` beside `transfer.png`."""
    heads = ["method", "domain", "movies' gold, change", "domain's gold, change", "KL", "words"]
    names = ("gold_change", "own_change", "kl", "words")
    rows = [
        [METHODS[method].label, domain, *(report.interval(row[n]) for n in names)]
        for method, domains in results["summary"].items()
        for domain, row in domains.items()
    ]
    parts = [
        "<p>Policies trained on openings of movie reviews continue openings of held-out texts of four domains. Changes "
        "are from the fine-tuned model's continuations of the same openings.</p>",
        report.image(folder / "transfer.png", "change of the gold reward by domain"),
        report.table("Mean over seeds [95 %]", heads, rows),
        report.grounds(results),
        report.origin(results),
    ]
    (folder / "transfer.html").write_text(report.page("Transfer to other domains", parts), encoding="utf-8")


def run_transfer(config: TransferConfig) -> dict[str, Any] | None:
    """Runs the study, or as much as there is time for; what `transfer.json` holds, or None if cells are left."""
    console = Console(width=None if Console().is_terminal else 120)
    results = run_study("transfer", config, cells(config), run_cell, console)
    if results is None:
        return None
    folder = Path(config.output_dir)
    results["summary"] = summarise(results)
    save(folder / "transfer.json", results)
    plots.transfer(results, FIGURES, folder / "transfer.png")
    write_report(results, folder)
    for method, domains in results["summary"].items():
        for domain, row in domains.items():
            text = "  ".join(f"{n} {report.interval(row[n])}" for n in ("gold_change", "own_change", "kl"))
            console.print(f"{method:<9} {domain:<7} {text}", markup=False, highlight=False)
    console.print(f"transfer.png, .html and .json are in [bold]{folder}[/]")
    return results


def main(argv: list[str]) -> int:
    """The `fastalign study transfer` command."""
    try:
        config = arguments.parse(TransferConfig, argv, command="study transfer")
    except arguments.Helped as text:
        print(text)
        return 0
    run_transfer(config)
    return 0
