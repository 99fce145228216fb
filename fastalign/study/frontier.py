"""`fastalign study frontier`: gold reward against KL for every method (Rafailov et al. 2023, fig. 2 left).

    fastalign study frontier --quick
    fastalign study frontier --full --processes 1

For each seed: a split of the corpus, a gold reward fitted to human ratings, a fine-tuned model, samples of it, pairs
and ranked lists of those by the gold reward, and a reward model learned from it. Then each method at each value
of its coefficient, looked at several times while it trains. The output folder holds `frontier.png`, `frontier.html`
(stands alone), `frontier.csv` (every point) and `frontier.json`. A run that was cut off goes on where it stood, cell
by cell.

What it leaves out: the methods are not tuned one by one; learning rates are shared by those that learn from pairs or
lists, and by those that sample.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..evaluation.best_of_n import best_of_n, best_of_n_kl
from ..evaluation.policy import measure
from ..trainers.common import arguments
from ..trainers.common.arguments import key
from ..utils.checks import check_choice
from . import plots, report
from .callbacks import Tracker
from .config import StudyConfig
from .envelope import BUDGETS, Point, difference, envelope, over_seeds
from .methods import METHODS, Job
from .setup import Setup, setup_of
from .study import run_study, save, seed_of

BEST_OF = "best-of-n"
COLUMNS = ("kl", "kl_k1", "kl_k3", "gold", "proxy", "independent", "words", "tax")
PLAIN = ("kl_token", "entropy", "finished", "distinct_2")


@dataclass
class FrontierConfig(StudyConfig):
    """Gold reward against KL for DPO, DPO-R, IPO, PRO, PPO and GRPO, each over a sweep of its coefficient."""

    methods: list[str] | None = key(  # noqa: RUF009 (it makes a dataclasses.field)
        None, f"Methods, separated by commas; all by default: {', '.join(METHODS)}"
    )

    def __post_init__(self) -> None:
        for name in self.methods or []:
            check_choice("methods", name, tuple(METHODS))
        super().__post_init__()

    @property
    def chosen(self) -> list[str]:
        """The methods to run, in the order of the table."""
        return [name for name in METHODS if self.methods is None or name in self.methods]

    def sweep(self, method: str) -> tuple[float, ...]:
        """Values of the method's coefficient."""
        return METHODS[method].full if self.full else METHODS[method].quick


# -------------------------------------------------------------------------------------------------------------- cells
def cells(config: FrontierConfig) -> list[str]:
    """Names of all cells; seed by seed, so that a run that is cut off has whole seeds."""
    names = []
    for seed in config.all_seeds:
        names.append(f"frontier/{BEST_OF}-{seed}")
        names += [f"frontier/{m}-{value:g}-{seed}" for m in config.chosen for value in config.sweep(m)]
    return names


def run_cell(root: Path, config: FrontierConfig, name: str) -> dict[str, Any]:
    """Trains one method at one coefficient and one seed; its points."""
    setup = setup_of(root, config, seed_of(name))
    if name.startswith(f"frontier/{BEST_OF}"):
        return {"method": BEST_OF, "coefficient": 0.0, "seed": setup.seed, "points": best_of_points(setup)}
    method, value, _ = name.removeprefix("frontier/").rsplit("-", 2)
    tracker = Tracker(setup)
    work = root / name / "work"
    shutil.rmtree(work, ignore_errors=True)
    METHODS[method].train(Job(setup, float(value), work, tracker))
    shutil.rmtree(work, ignore_errors=True)
    return {"method": method, "coefficient": float(value), "seed": setup.seed, "points": tracker.points}


def best_of_points(setup: Setup) -> list[dict[str, Any]]:
    """The fine-tuned model itself, and the best of 2, 4, 8, ... of its samples by the gold and by the learned reward.

    `kl` is the bound log n - (n - 1)/n; the start's is 0.
    """
    config = setup.config
    found = measure(
        setup.reference,
        setup.reference,
        setup.tokenizer,
        setup.eval_prompts,
        setup.scorers,
        per_prompt=config.best_of,
        how=setup.demo.how,
        seed=setup.seed + 1,
    )
    points: list[dict[str, Any]] = []
    n = 1
    while n <= config.best_of:
        point: dict[str, Any] = {"step": n, "kl": best_of_n_kl(n)}
        for name, by in (("gold", "gold"), ("gold_by_proxy", "proxy")):
            values = best_of_n(found.scores[by], found.scores["gold"], n)
            point |= {name: float(values.mean()), f"{name}_halves": [float(values[i::2].mean()) for i in (0, 1)]}
        proxy = found.scores["proxy"]
        points.append({**point, "proxy": float(best_of_n(proxy, proxy, n).mean())})
        n *= 2
    start = {name: value for name, value in found.figures.items() if name in (*COLUMNS, *PLAIN)}
    return [{**points[0], "figures": start}, *points[1:]]


# ------------------------------------------------------------------------------------------------------------ results
def curves(results: dict[str, Any], budgets: Sequence[float]) -> dict[str, list[np.ndarray]]:
    """Method → for each seed the envelope at the budgets. The fine-tuned model is every method's point at KL 0."""
    starts = {
        cell["seed"]: Point(0.0, tuple(cell["points"][0]["gold_halves"]))
        for cell in results["cells"].values()
        if cell["method"] == BEST_OF
    }
    found: dict[str, dict[int, list[Point]]] = {}
    for cell in results["cells"].values():
        if cell["method"] != BEST_OF:
            own = found.setdefault(cell["method"], {}).setdefault(cell["seed"], [starts[cell["seed"]]])
            own += [Point(p["kl"]["mean"], tuple(p["halves"])) for p in cell["points"]]
    return {m: [envelope(seeds[s], budgets) for s in sorted(seeds)] for m, seeds in found.items()}


def summarise(results: dict[str, Any]) -> dict[str, Any]:
    """The envelopes at `BUDGETS` with intervals over seeds, and each method's distance to PPO with the gold reward."""
    by_method = curves(results, BUDGETS)
    pairs = [(m, other) for other in ("ppo-gold", "ppo-learned") for m in by_method if m != other in by_method]
    return {
        "budgets": list(BUDGETS),
        "envelope": {m: [e._asdict() for e in over_seeds(c)] for m, c in by_method.items()},
        "differences": {
            f"{m} - {other}": [e._asdict() for e in difference(by_method[m], by_method[other])] for m, other in pairs
        },
    }


def write_points(results: dict[str, Any], path: Path) -> None:
    """Every point of every run as a row of CSV."""
    heads = [f"{c}{end}" for c in COLUMNS for end in ("", "_se")]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "coefficient", "seed", "step", *heads, *PLAIN])
        for cell in results["cells"].values():
            for point in cell["points"]:
                row = [cell["method"], cell["coefficient"], cell["seed"], point["step"]]
                for name in COLUMNS:
                    value = point.get(name, "")
                    row += [value["mean"], value["se"]] if isinstance(value, dict) else [value, ""]
                writer.writerow([*row, *(point.get(name, "") for name in PLAIN)])


def show(results: dict[str, Any], console: Console) -> None:
    """Prints the envelopes."""
    table = Table(title="gold reward within a KL budget, mean over seeds [95 %]", title_justify="left")
    for head in ("", *(f"KL ≤ {b:g}" for b in BUDGETS)):
        table.add_column(head, justify="left" if not head else "right")
    for method, row in results["summary"]["envelope"].items():
        table.add_row(METHODS[method].label, *(report.interval(e) for e in row))
    console.print(table)


def run_frontier(config: FrontierConfig) -> dict[str, Any] | None:
    """Runs the study, or as much as there is time for; what `frontier.json` holds, or None if cells are left."""
    console = Console(width=None if Console().is_terminal else 120)
    results = run_study("frontier", config, cells(config), run_cell, console)
    if results is None:
        return None
    folder = Path(config.output_dir)
    results["summary"] = summarise(results)
    save(folder / "frontier.json", results)
    write_points(results, folder / "frontier.csv")
    plots.frontier(results, curves(results, plots.GRID), folder / "frontier.png")
    report.write_frontier(results, folder)
    show(results, console)
    console.print(f"frontier.png, .html, .csv and .json are in [bold]{folder}[/]")
    return results


def main(argv: list[str]) -> int:
    """The `fastalign study frontier` command; 0 also where time was up, since the same command goes on."""
    try:
        config = arguments.parse(FrontierConfig, argv, command="study frontier")
    except arguments.Helped as text:
        print(text)
        return 0
    run_frontier(config)
    return 0
