"""Plots of a results file as PNG, and a page of table and plots that stands alone.

Times and memory against the size of the logits, and a roofline: arithmetic done a second against arithmetic for a byte
that has to be moved, under the bandwidth measured in the same rounds. Declared as arithmetic are
3 operations a logit forward (subtract, exponential, add) and 4 backward (these, and a product).
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

OPERATIONS = {"forward": 3, "backward": 4, "both": 7}
Record = dict[str, Any]


_AXES = {"list_length": "list length K", "hidden": "hidden size"}
"""What a case may be measured against instead of the number of logits."""


def _axis(case: Record) -> tuple[str, int]:
    """(what the case's size is, the size)."""
    for name, text in _AXES.items():
        if case.get(name):
            return text, case[name]
    text = "sequences x length" if case["suite"] == "gae" else "logits (tokens x vocabulary)"
    return text, case["rows"] * case["vocab"]


def _groups(results: Record) -> dict[str, list[Record]]:
    """Title → cases that differ in size alone, smallest first; several vocabularies and threads of a sweep apart."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for case in results["cases"]:
        if case["suite"] == "overhead":  # of one size, which is not that of logits
            continue
        title = f"{case['suite']} {case['job']}, {case['dtype']}"
        groups[title + (f", {case['threads']} threads" if case.get("threads") else "")].append(case)
    # A line needs two points: GAE alone has one.
    kept = {title: cases for title, cases in groups.items() if cases[0]["suite"] != "gae" or len(cases) > 1}
    return {title: sorted(cases, key=lambda case: (_axis(case), case["rows"])) for title, cases in sorted(kept.items())}


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return stream.getvalue()


def _against_size(results: Record, value: Callable[[Record, Record], float | None], label: str) -> bytes | None:
    """One panel for each group: a line for each variant, with the spread of its times where there is one."""
    groups = _groups(results)
    if not any(value(case, row) for cases in groups.values() for case in cases for row in case["variants"].values()):
        return None
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5 * columns, 3.6 * lines), squeeze=False)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    names = dict.fromkeys(n for cases in groups.values() for c in cases for n in c["variants"])
    colors = {name: f"C{i}" for i, name in enumerate(names)}  # one in all panels
    for axis, (title, cases) in zip(axes.flat, groups.items(), strict=False):
        for name in names:
            points = [(_axis(c)[1], value(c, c["variants"][name])) for c in cases if name in c["variants"]]
            known = [(x, y) for x, y in points if y is not None and y > 0]
            if known:
                width = 2.5 if name.startswith("fastalign") else 1
                axis.plot(*zip(*known, strict=True), "o-", label=name, lw=width, color=colors[name])
        axis.set(xscale="log", yscale="log", title=title, xlabel=_axis(cases[0])[0])
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    handles = dict(pair[::-1] for axis in axes.flat for pair in zip(*axis.get_legend_handles_labels(), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="lower center", bbox_to_anchor=(0.5, -0.12 / lines), ncol=4)
    figure.tight_layout()
    return _png(figure)


def _roofline(results: Record) -> bytes | None:
    groups = _groups(results).values()
    cases = [case for group in groups for case in group if "read" in case.get("probes", {})]
    if not cases:
        return None
    figure, axis = plt.subplots(figsize=(7, 4.5))
    marks = {"fastalign": "o", "fastalign in place": "s", "eager": "x", "torch.compile": "^"}
    for name, mark in marks.items():
        points = []
        for case in cases:
            if name in case["variants"]:
                work = OPERATIONS[case["job"]] * case["rows"] * case["vocab"]
                moved = case["read_bytes"] + case["copied_bytes"]
                points.append((work / moved, work / case["variants"][name]["median"] / 1e9))
        if points:
            axis.scatter(*zip(*points, strict=True), marker=mark, label=name)
    rates = [case["probes"][probe]["rate"] for case in cases for probe in ("read", "copy")]
    span = [0.2, 4]
    for rate, style in ((max(rates), "-"), (min(rates), "--")):
        axis.plot(span, [x * rate / 1e9 for x in span], style, color="gray", label=f"memory at {rate / 1e9:.0f} GB/s")
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="operations for a byte that must be moved",
        ylabel="billion operations a second",
    )
    axis.set_title("Roofline")
    axis.legend()
    axis.grid(alpha=0.3)
    return _png(figure)


OVERVIEW: dict[str, Callable[[Record], float]] = {
    "ms": lambda row: 1e3 * row["median"],
    "MiB beyond the logits": lambda row: row["peak_bytes"] / 2**20,
}
"""What the README's picture shows of each variant, a panel each."""


def overview(cases: list[Record], title: str) -> bytes:
    """The README's picture: a bar for each variant of each case, which differ in dtype. The numbers are in the file."""
    names = list(dict.fromkeys(name for case in cases for name in case["variants"]))
    shown = {
        what: {c["dtype"]: [round(value(c["variants"][name]), 1) for name in names] for c in cases}
        for what, value in OVERVIEW.items()
    }
    figure, axes = plt.subplots(1, len(shown), figsize=(11, 3.4), sharey=True)
    height = 0.8 / len(cases)
    for axis, (what, by_dtype) in zip(axes, shown.items(), strict=True):
        for i, (dtype, numbers) in enumerate(by_dtype.items()):
            places = [place + (i - (len(cases) - 1) / 2) * height for place in range(len(names))]
            bars = axis.barh(places, numbers, height, label=dtype)
            axis.bar_label(bars, fmt="%.0f", padding=2)
        axis.set_yticks(range(len(names)), names)
        axis.set_xlabel(what)
        axis.margins(x=0.12)
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    axes[0].legend()
    figure.suptitle(title)
    figure.tight_layout()
    stream = io.BytesIO()
    about = json.dumps({"title": title, "variants": names, **shown})
    figure.savefig(stream, format="png", dpi=110, bbox_inches="tight", metadata={"Description": about})
    plt.close(figure)
    return stream.getvalue()


def plots(results: Record) -> dict[str, bytes]:
    """File name → PNG; a plot for which the file holds nothing is left out."""
    made = {
        "time.png": _against_size(results, lambda case, row: 1e3 * row["median"], "ms"),
        "memory.png": _against_size(
            results, lambda case, row: row.get("peak_bytes") and row["peak_bytes"] / 2**20, "MiB beyond the logits"
        ),
        "roofline.png": _roofline(results),
    }
    return {name: png for name, png in made.items() if png is not None}


def page(text: str, images: dict[str, bytes]) -> str:
    """A page that needs no other file: the report's text, its table as one, and the images."""
    parts, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            if not set(line) <= set("|-: "):
                tag = "td" if rows else "th"
                cells = (html.escape(cell.strip()) for cell in line.strip("|").split("|"))
                rows.append("<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>")
            continue
        if rows:
            parts.append(f"<table>{''.join(rows)}</table>")
            rows = []
        if line:
            parts.append(f"<p>{html.escape(line)}</p>")
    for name, png in images.items():
        encoded = base64.b64encode(png).decode()
        parts.append(f'<img alt="{html.escape(name)}" src="data:image/png;base64,{encoded}">')
    style = (
        "body{font:15px sans-serif;margin:2em}table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:4px}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>fastalign benchmarks</title>'
        f"<style>{style}img{{max-width:100%}}</style><h1>fastalign benchmarks</h1>{''.join(parts)}</html>\n"
    )
