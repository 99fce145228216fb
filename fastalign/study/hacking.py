"""`fastalign study hacking`: what goes wrong when a policy follows a reward that is not the one that was meant.

    fastalign study hacking --quick

Over-optimisation (Gao et al. 2023): the learned reward and the gold reward along PPO on the learned one and along DPO,
with best-of-n by the learned reward as the yardstick. Length (Park et al. 2024): preferences of labelers who like long
answers, DPO on them, and DPO-R over its alpha. In the folder of a frontier study of like settings its cells are used
again, not trained anew. Writes `hacking.png`, `hacking.html` (stands alone) and `hacking.json`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from scipy import stats

from ..evaluation.estimates import estimate
from ..evaluation.judges import compare_scores
from ..evaluation.policy import Measured, measure
from ..evaluation.ranked_samples import best_against_worst
from ..evaluation.winrate import length_matched, tally
from ..trainers.common import arguments
from ..trainers.common.arguments import key
from ..utils.checks import check_positive
from . import frontier, plots, report
from .callbacks import Tracker
from .frontier import FrontierConfig
from .methods import Job, train_pairs
from .setup import Setup, setup_of
from .study import run_study, save

PATHS = ["dpo", "ppo-learned"]
"""Methods of the frontier along which the two rewards are followed."""

_OWN = ("length_bonus", "beta", "nll_weight")
_CHANGES = ("words_change", "gold_change", "win_rate", "win_rate_matched")
_SHOWN = ("finished", "gold_length", "learned_length", "longer_chosen")
_SHARES = ("finished", "finished_before", "gold_length", "learned_length")


@dataclass
class HackingConfig(FrontierConfig):
    """Learned reward against gold reward, and outputs that grow, under preferences for length."""

    length_bonus: float = key(0.1, "What the biased labelers add to the gold reward for each word", group="Loss")
    beta: float = key(0.1, "DPO's beta on their preferences", group="Loss")
    nll_weight: float = key(
        0.05, "Weight there of the chosen texts' NLL; without it small models stop ending their texts", group="Loss"
    )

    def __post_init__(self) -> None:
        self.methods = list(PATHS)
        check_positive("length_bonus", self.length_bonus)
        check_positive("beta", self.beta)
        check_positive("nll_weight", self.nll_weight)
        super().__post_init__()

    @property
    def alphas(self) -> tuple[float, ...]:
        """DPO-R's alpha in nats a token; 0 is DPO."""
        return (0.0, 0.02, 0.05, 0.1, 0.2, 0.3) if self.full else (0.0, 0.1, 0.3)

    def settings(self) -> dict[str, Any]:
        """Those of the frontier: the cells of this study have its own three in their names."""
        return {k: v for k, v in super().settings().items() if k not in _OWN}


# -------------------------------------------------------------------------------------------------------------- cells
def cells(config: HackingConfig) -> list[str]:
    """The frontier's cells along `PATHS`, and one for each alpha and seed."""
    own = "hacking/length-" + "-".join(f"{getattr(config, name):g}" for name in _OWN)
    mine = [f"{own}-{alpha:g}-{seed}" for seed in config.all_seeds for alpha in config.alphas]
    return frontier.cells(config) + mine


def run_cell(root: Path, config: HackingConfig, name: str) -> dict[str, Any]:
    """A cell of the frontier, or DPO-R at one alpha on the preferences of labelers who like length."""
    if name.startswith("frontier/"):
        return frontier.run_cell(root, config, name)
    bonus, beta, nll_weight, alpha, seed = (float(x) for x in name.removeprefix("hacking/length-").split("-"))
    setup = setup_of(root, config, int(seed))
    tracker, work = Tracker(setup), root / name / "work"
    shutil.rmtree(work, ignore_errors=True)
    rows = length_biased(setup, bonus)
    options = {"beta": beta, "length_alpha": alpha, "loss_type": "rpo", "nll_weight": nll_weight}
    # A rate that falls to 0: what is compared is the end of each run, and at a constant rate lengths swing to the last.
    train_pairs(Job(setup, alpha, work, tracker), rows, lr_scheduler_type="cosine", **options)
    shutil.rmtree(work, ignore_errors=True)
    before = measure(
        setup.reference,
        setup.reference,
        setup.tokenizer,
        setup.eval_prompts,
        setup.scorers,
        per_prompt=config.eval_samples,
        how=setup.demo.how,
        seed=setup.seed + 1,
    )
    if tracker.last is None:
        raise RuntimeError("the run ended without a look at its policy")
    found = compare(before, tracker.last)
    longer = np.mean([len(r["chosen"].split()) > len(r["rejected"].split()) for r in rows])
    return {"alpha": alpha, "seed": int(seed), "points": tracker.points, "longer_chosen": float(longer), **found}


def length_biased(setup: Setup, bonus: float) -> list[dict[str, str]]:
    """Pairs from the setup's lists as labelers would make them who add `bonus` to the gold reward for each word."""
    rows = setup.read("lists")
    for row in rows:
        row["rewards"] = [r + bonus * len(t.split()) for r, t in zip(row["rewards"], row["completions"], strict=True)]
    return best_against_worst(rows, setup.config.min_gap)


def compare(before: Measured, after: Measured) -> dict[str, Any]:
    """What training changed on the same prompts, and who wins by the gold reward: of all pairs, of equally long ones.

    `gold_length` and `learned_length` are Spearman's correlation of either reward with the number of words, over the
    texts sampled afterwards.
    """
    words = [np.array([[len(s.text.split()) for s in each] for each in m.samples]) for m in (before, after)]
    gold = [m.scores["gold"] for m in (before, after)]
    outcomes = compare_scores(gold[1], gold[0])
    return {
        "words_change": estimate(words[1] - words[0])._asdict(),
        "gold_change": estimate(gold[1] - gold[0])._asdict(),
        "win_rate": tally(outcomes).rate._asdict(),
        "win_rate_matched": length_matched(outcomes, words[1], words[0], tolerance=0.2)._asdict(),
        "finished": after.figures["finished"],
        "finished_before": before.figures["finished"],
        "gold_length": _correlation(gold[1], words[1]),
        "learned_length": _correlation(after.scores["proxy"], words[1]),
    }


def _correlation(scores: np.ndarray, words: np.ndarray) -> float:
    """Spearman's; 0 where one side does not vary."""
    if len(set(scores.flat)) < 2 or len(set(words.flat)) < 2:
        return 0.0
    return float(stats.spearmanr(scores.ravel(), words.ravel()).statistic)


# ------------------------------------------------------------------------------------------------------------ results
def summarise(results: dict[str, Any], alphas: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Alpha → each figure's mean over seeds with its interval; with one seed alone, that seed's over prompts.

    `words_from_dpo` is the change of length less that of alpha 0, seed by seed.
    """
    out = {}
    dpo = {c["seed"]: c["words_change"]["mean"] for c in results["cells"].values() if c.get("alpha") == 0}
    for alpha in alphas:
        own = [c for c in results["cells"].values() if c.get("alpha") == alpha]
        row: dict[str, Any] = {}
        for name in _CHANGES:
            row[name] = own[0][name] if len(own) == 1 else estimate(np.array([c[name]["mean"] for c in own]))._asdict()
        from_dpo = [c["words_change"]["mean"] - dpo[c["seed"]] for c in own]
        row["words_from_dpo"] = estimate(np.array(from_dpo))._asdict()
        for name in (*_SHARES, "longer_chosen"):
            row[name] = estimate(np.array([c[name] for c in own]))._asdict()
        out[f"{alpha:g}"] = row
    return out


def write_report(results: dict[str, Any], folder: Path) -> None:
    """`hacking.html` beside `hacking.png`."""
    heads = [
        "alpha",
        "words, change",
        "the same less DPO's",
        "gold, change",
        "wins by gold",
        "wins among equally long",
        "texts that end",
    ]
    heads += ["gold with length", "learned with length", "longer side chosen in the data"]
    names = ("words_change", "words_from_dpo", *_CHANGES[1:], *_SHOWN)
    rows = [[alpha, *(report.interval(row[n]) for n in names)] for alpha, row in results["summary"].items()]
    parts = [
        "<p>Above: what was meant and what was followed. The gold reward, and the reward learned from comparisons "
        "that the gold reward made, against the KL to the fine-tuned model, along PPO on the learned reward and along "
        "DPO on pairs by the gold reward; runs thin, means over seeds thick. Best-of-n by the learned reward is the "
        "yardstick, at its bound on the KL. Where the learned reward rises and the gold reward does not, the policy "
        "follows the learned reward's mistakes. Below: DPO on preferences of labelers who like long answers (each word "
        "adds to what they think of a text), and DPO-R over its alpha, with 95 % intervals; both with a small "
        "likelihood term, without which a small model stops ending its texts whatever the preferences.</p>",
        report.image(folder / "hacking.png", "over-optimisation and length"),
        report.table("DPO-R on preferences for length; alpha 0 is DPO. Mean over seeds [95 %]", heads, rows),
        "<p>Correlations are Spearman's with the number of words, over the texts sampled at the end. Equally long: "
        "numbers of words no further apart than a fifth.</p>",
        report.grounds(results),
        report.origin(results),
    ]
    (folder / "hacking.html").write_text(report.page("Reward hacking", parts), encoding="utf-8")


def run_hacking(config: HackingConfig) -> dict[str, Any] | None:
    """Runs the study, or as much as there is time for; what `hacking.json` holds, or None if cells are left."""
    console = Console(width=None if Console().is_terminal else 120)
    results = run_study("hacking", config, cells(config), run_cell, console)
    if results is None:
        return None
    folder = Path(config.output_dir)
    results["summary"] = summarise(results, config.alphas)
    save(folder / "hacking.json", results)
    plots.hacking(results, folder / "hacking.png")
    write_report(results, folder)
    for alpha, row in results["summary"].items():
        text = "  ".join(f"{name} {report.interval(row[name])}" for name in (*_CHANGES, "finished"))
        console.print(f"alpha {alpha}: {text}", markup=False, highlight=False)
    console.print(f"hacking.png, .html and .json are in [bold]{folder}[/]")
    return results


def main(argv: list[str]) -> int:
    """The `fastalign study hacking` command."""
    try:
        config = arguments.parse(HackingConfig, argv, command="study hacking")
    except arguments.Helped as text:
        print(text)
        return 0
    run_hacking(config)
    return 0
