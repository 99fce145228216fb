"""A study's report as one HTML file that needs nothing else: text, tables, and the pictures inside it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from .methods import METHODS

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-size:13px}th,td{border:1px solid #ccc;padding:.25rem .6rem}
td{text-align:right}td:first-child,th{text-align:left}th{background:#f3f3f3}img{max-width:100%}
code{background:#f3f3f3;padding:.1rem .3rem}caption{text-align:left;font-weight:600;padding:.3rem 0}"""


def interval(e: dict[str, float], digits: int = 2) -> str:
    """An estimate as text: its mean, and its interval where it has one."""
    if e["mean"] != e["mean"]:
        return "-"
    span = "" if e["low"] != e["low"] else f" [{e['low']:.{digits}f}, {e['high']:.{digits}f}]"
    return f"{e['mean']:.{digits}f}{span}"


def table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; all texts are escaped here."""
    top = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>\n" for row in rows)
    return f"<table><caption>{escape(caption)}</caption><tr>{top}</tr>\n{body}</table>"


def image(path: Path, text: str) -> str:
    """The PNG inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{escape(text, quote=True)}" src="data:image/png;base64,{data}"></p>'


def page(title: str, parts: Sequence[str]) -> str:
    """A whole document."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def origin(results: dict[str, Any]) -> str:
    """Command, date, machine, versions."""
    m = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in m["versions"].items() if number)
    commit = (m["commit"] or "unknown")[:12] + (" with uncommitted changes" if m["dirty"] else "")
    where = f"{m['cpu']}, {m['cores']} cores" + (f", {m['accelerator']}" if m["accelerator"] else "")
    first, last = results["first_seed"], results["first_seed"] + results["seeds"] - 1
    seeds = f"seeds {first} to {last}" if last > first else f"seed {first}"
    call = results["call"]
    return (
        f"<p>Command: <code>{escape(results['command'])}</code>; {seeds}; {escape(m['date'])}; "
        f"commit {escape(commit)}; {escape(where)}; {escape(versions)}; all cells together took "
        f"{results['seconds']:.0f} s, {results['cpu_seconds']:.0f} s of them the processor's; the last call "
        f"ran {call['cells']} of {len(results['grounds']) + len(results['cells'])} in {call['seconds']:.0f} s.</p>"
    )


def grounds(results: dict[str, Any]) -> str:
    """What the methods of each seed started from."""
    rows = []
    for name, g in results["grounds"].items():
        corpus, samples, proxy = g["corpus"]["gold"], g["samples"], g["proxy"]
        rows.append(
            [
                name.rpartition("-")[2],
                f"{corpus['pearson']:.3f} ({corpus['texts']})",
                f"{g['base']['parameters']:,}",
                f"{samples['lists']}",
                f"{samples['pairs']}",
                f"{samples['words']['chosen']:.1f} / {samples['words']['rejected']:.1f}",
                f"{proxy['accuracy']:.2f} ({proxy['pairs']})",
            ]
        )
    heads = [
        *("seed", "gold reward: Pearson with people (held-out texts)", "weights", "lists", "pairs"),
        *("words, chosen / rejected", "learned reward: accuracy (held-out pairs)"),
    ]
    return table("What every method of a seed starts from", heads, rows)


def runs(results: dict[str, Any]) -> str:
    """The end of every run, averaged over seeds."""
    last: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for cell in results["cells"].values():
        if cell["method"] in METHODS:
            last.setdefault((cell["method"], cell["coefficient"]), []).append(cell["points"][-1])
    names = ("kl", "gold", "proxy", "independent", "words", "tax")
    rows = []
    for (method, value), points in last.items():
        means = [sum(p[n]["mean"] for p in points) / len(points) for n in names]
        plain = [sum(p[n] for p in points) / len(points) for n in ("finished", "distinct_2")]
        sweep = f"{METHODS[method].coefficient} {value:g}"
        rows.append([METHODS[method].label, sweep, *(f"{x:.2f}" for x in means), *(f"{x:.2f}" for x in plain)])
    heads = [
        *("method", "coefficient", "KL", "gold", "learned reward", "VADER", "words"),
        *("tax, nats a token", "texts that end", "distinct word pairs"),
    ]
    return table("The end of every run, mean over seeds", heads, rows)


def write_frontier(results: dict[str, Any], folder: Path) -> None:
    """Writes `frontier.html` beside `frontier.png`."""
    summary = results["summary"]
    heads = ("", *(f"KL ≤ {b:g}" for b in summary["budgets"]))
    best = [[METHODS[m].label, *map(interval, row)] for m, row in summary["envelope"].items()]
    gaps = []
    for name, row in summary["differences"].items():
        ours, theirs = (METHODS[part].label for part in name.split(" - "))
        gaps.append([f"{ours} minus {theirs}", *map(interval, row)])
    parts = [
        "<p>Controlled sentiment (Rafailov et al. 2023, sec. 6): openings of held-out movie reviews are continued; the "
        "gold reward is a regression fitted to human ratings. Every point is one policy at one moment of its training: "
        "its mean gold reward on held-out prompts against its KL to the fine-tuned model, summed over the tokens of a "
        "text, exact over the vocabulary.</p>",
        image(folder / "frontier.png", "gold reward against KL"),
        "<p>Right: the best policy of each seed within a KL budget, chosen by one half of the prompts and counted by "
        "the other; bars are 95 % intervals over seeds. Dashed and dotted: best of n samples of the fine-tuned model, "
        "against the bound log n &minus; (n &minus; 1)/n on its KL.</p>",
        table("Gold reward within a KL budget, mean over seeds [95 %]", heads, best),
        table("Differences within seeds, mean [95 %]", heads, gaps) if gaps else "",
        runs(results),
        grounds(results),
        "<p>Methods share their learning rates by kind (pairs and lists; sampling) and are not tuned one by one. The "
        "learned reward is a Bradley-Terry model on comparisons, by the gold reward, of reviews and of the samples "
        "that DPO's pairs come from: it has seen more of the gold reward than DPO has. Its scale is arbitrary. VADER "
        "is a rule-based scorer that took no part. Tax: rise of the negative log-likelihood of held-out reviews.</p>",
        origin(results),
    ]
    (folder / "frontier.html").write_text(page("Gold reward against KL", parts), encoding="utf-8")
