"""The studies' results as text, and the part of bench/README.md that they make.

    python bench/studies.py                          print that part, from the newest results of each study
    python bench/studies.py --update bench/README.md rewrite it between its markers
    python bench/studies.py --take FOLDER            first copy what the studies left in that folder to bench/results

Every number of the part comes from the JSON of a study. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import report

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- studies: written by bench/studies.py -->", "<!-- end of studies -->"
METHODS = {
    "dpo": "DPO",
    "dpo-r": "DPO-R",
    "ipo": "IPO",
    "pro": "PRO",
    "ppo-gold": "PPO, gold reward",
    "ppo-learned": "PPO, learned reward",
    "grpo": "GRPO, gold reward",
}


# ------------------------------------------------------------------------------------------------------------- pieces
def interval(e: dict[str, Any], digits: int = 2) -> str:
    """An estimate with its 95 % interval, where it has one."""
    if e["mean"] is None:
        return "-"
    span = "" if e["low"] is None else f" [{e['low']:.{digits}f}, {e['high']:.{digits}f}]"
    return f"{e['mean']:.{digits}f}{span}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown: the first column is text, the others are numbers."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def origin(results: dict[str, Any], path: Path) -> str:
    """Where the figures are, and how they came about."""
    m = results["machine"]
    others = [path.with_suffix(end) for end in (".png", ".html", ".csv") if path.with_suffix(end).exists()]
    links = ", ".join(f"[{p.suffix[1:]}](results/{p.name})" for p in (*others, path))
    first, count = results.get("first_seed", 0), results.get("seeds", 1)
    seeds = f"seeds {first} to {first + count - 1}; " if count > 1 else ""
    return f"({links}; `{results['command']}`; {seeds}{m['date'][:10]}; {m['cpu']}, {m['cores']} cores)"


def span(values: Iterable[float], digits: int = 2) -> str:
    """Smallest to largest."""
    low, high = (f"{f(values):.{digits}f}" for f in (min, max))
    return low if low == high else f"{low} to {high}"


# ------------------------------------------------------------------------------------------------------------- studies
def kl_agreement(cells: Iterable[dict[str, Any]]) -> str:
    """How often an estimate by sampling is within two of its standard errors of the exact KL on the same samples."""
    points = [p for cell in cells if cell["method"] in METHODS for p in cell["points"]]
    shares = []
    for name in ("kl_k1", "kl_k3"):
        near = [abs(p[name]["mean"] - p["kl"]["mean"]) <= 2 * math.hypot(p[name]["se"], p["kl"]["se"]) for p in points]
        shares.append(f"{sum(near)} (k{name[-1]})")
    return (
        f"Of {len(points)} policies, {' and '.join(shares)} have a sampled KL within two standard errors of the exact."
    )


def endings(cells: Iterable[dict[str, Any]]) -> str:
    """Shares of texts that end by themselves: before training, and at the runs' ends by method."""
    before = [c["points"][0]["figures"]["finished"] for c in cells if c["method"] not in METHODS]
    after: dict[str, list[float]] = {}
    for c in cells:
        if c["method"] in METHODS:
            after.setdefault(METHODS[c["method"]], []).append(c["points"][-1]["finished"])
    shares = "; ".join(f"{name} {span(values)}" for name, values in after.items())
    return f"Share of texts that end by themselves: {span(before)} before; at the ends of the runs {shares}."


def frontier(results: dict[str, Any]) -> str:
    """Envelopes, differences, and what all methods of a seed started from."""
    summary, cells = results["summary"], results["cells"].values()
    heads = ["", *(f"KL ≤ {b:g}" for b in summary["budgets"])]
    best = table(heads, ([METHODS[m], *map(interval, row)] for m, row in summary["envelope"].items()))
    gaps = {name: row for name, row in summary["differences"].items() if name.startswith("dpo - ")}
    rows = [[" minus ".join(METHODS[m] for m in name.split(" - ")), *map(interval, row)] for name, row in gaps.items()]
    starts = [c["points"][0]["gold"] for c in cells if c["method"] not in METHODS]
    grounds = results["grounds"].values()
    accuracy = span([g["proxy"]["accuracy"] for g in grounds])
    pairs = span([g["samples"]["pairs"] for g in grounds], 0)
    text = (
        f"The fine-tuned models have a gold reward of {span(starts)}; {pairs} pairs a seed; the learned reward is "
        f"right on {accuracy} of held-out pairs. {kl_agreement(cells)}"
    )
    text = f"{text} {endings(cells)}"
    return "\n\n".join([best, table(heads, rows), text] if rows else [best, text])


def hacking(results: dict[str, Any]) -> str:
    """DPO-R over its alpha on preferences for length."""
    names = ("words_change", "words_from_dpo", "gold_change", "win_rate", "win_rate_matched", "finished")
    names = (*names, "gold_length", "learned_length")
    heads = ["alpha of DPO-R", "words, change", "less DPO's", "gold, change", "wins by gold", "among equally long"]
    heads += ["texts that end", "gold with length", "learned with length"]
    rows = [[a, *(interval(row[n]) for n in names)] for a, row in results["summary"].items()]
    best = [c["points"][-1] for c in results["cells"].values() if c.get("method") == "best-of-n"]
    text = (
        f"Best of {best[0]['step']} by the learned reward: gold {span([p['gold_by_proxy'] for p in best])}."
        if best
        else ""
    )
    return "\n\n".join([table(heads, rows), text])


def transfer(results: dict[str, Any]) -> str:
    """Change of either gold reward in each domain."""
    heads = ["", "domain", "movies' gold reward, change", "domain's own gold reward, change", "KL"]
    names = ("gold_change", "own_change", "kl")
    return table(
        heads,
        (
            [METHODS[m], domain, *(interval(row[n]) for n in names)]
            for m, domains in results["summary"].items()
            for domain, row in domains.items()
        ),
    )


def labelers(results: dict[str, Any]) -> str:
    """How far people agree, and how far a scorer agrees with those it learned from and with others."""
    alphas = ", ".join(f"{name} {d['interval']:.2f}" for name, d in results["domains"].items())
    both, known, new = (
        interval({key: 100 * value for key, value in results[name].items()}, 1)
        for name in ("pairwise_agreement", "known_labelers", "new_labelers")
    )
    return (
        f"Krippendorff's alpha (interval): {alphas}. Two people agree on which of two movie reviews is better in "
        f"{both} % of the cases in which both have a preference. TF-IDF with ridge regression agrees with people whose "
        f"ratings of other texts it learned from in {known} % of their preferences, with people whom it never saw in "
        f"{new} %."
    )


STUDIES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "frontier": ("Gold reward of the best policy within a KL budget, mean over seeds [95 %]", frontier),
    "hacking": ("Labelers who like length, mean over seeds [95 %]", hacking),
    "transfer": ("Policies trained on movie reviews, in other domains, mean over seeds [95 %]", transfer),
    "labelers": ("People's ratings [95 %]", labelers),
}


def part() -> str:
    """The part, from the newest results of each study."""
    blocks = []
    for study, (title, write) in STUDIES.items():
        found = sorted(RESULTS.glob(f"{study}-*.json"))
        if found:
            results = json.loads(found[-1].read_text(encoding="utf-8"))
            blocks.append(f"**{title}** {origin(results, found[-1])}\n\n{write(results).strip()}")
    return "\n\n".join(blocks)


def take(folder: Path) -> None:
    """Copies what the studies left in the folder, in place of older results of the same studies."""
    for study in STUDIES:
        source = folder / f"{study}.json"
        if source.exists():
            date = json.loads(source.read_text(encoding="utf-8"))["machine"]["date"][:10]
            for old in RESULTS.glob(f"{study}-*"):
                old.unlink()
            for end in (".json", ".png", ".html", ".csv"):
                if source.with_suffix(end).exists():
                    shutil.copyfile(source.with_suffix(end), RESULTS / f"{study}-{date}{end}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--take", type=Path, metavar="FOLDER", help="copy the studies' results from here first")
    parser.add_argument("--update", type=Path, metavar="FILE", help="rewrite the part between this file's markers")
    arguments = parser.parse_args()
    if arguments.take:
        take(arguments.take)
    if arguments.update:
        text = arguments.update.read_text(encoding="utf-8")
        arguments.update.write_text(report.update(text, part(), BEGIN, END), encoding="utf-8")
    else:
        print(part())


if __name__ == "__main__":
    main()
