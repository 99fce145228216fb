"""The studies' pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .envelope import over_seeds
from .methods import METHODS

GRID = tuple(float(x) for x in np.geomspace(0.05, 64, 80))
"""KL budgets at which envelopes are drawn, in nats."""

_STYLES = dict(zip(METHODS, ("o", "s", "^", "D", "v", "P", "X"), strict=True))
_COLORS = {name: f"C{i}" for i, name in enumerate(METHODS)}


def frontier(results: dict[str, Any], curves: dict[str, list[np.ndarray]], path: Path) -> None:
    """Left: every point of every run. Right: each method's envelope over seeds. Best-of-n is the yardstick in both."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 6), sharey=True, sharex=True, constrained_layout=True)
    cells = [c for c in results["cells"].values() if c["method"] in METHODS]
    for method in curves:
        points = [p for c in cells if c["method"] == method for p in c["points"]]
        xs, ys = ([p[name]["mean"] for p in points] for name in ("kl", "gold"))
        style = {"marker": _STYLES[method], "color": _COLORS[method]}
        left.scatter(xs, ys, s=26, alpha=0.75, linewidths=0, label=METHODS[method].label, **style)
    largest = max((p["kl"]["mean"] for c in cells for p in c["points"]), default=1.0)
    for method, own in curves.items():
        reach = max(p["kl"]["mean"] for c in cells if c["method"] == method for p in c["points"])
        shown = [i for i, kl in enumerate(GRID) if kl <= 1.1 * reach]
        estimates = over_seeds([curve[shown] for curve in own])
        xs = [GRID[i] for i in shown]
        right.plot(xs, [e.mean for e in estimates], color=_COLORS[method], label=METHODS[method].label, lw=2)
        if len(own) > 1:
            low, high = [e.low for e in estimates], [e.high for e in estimates]
            right.fill_between(xs, low, high, color=_COLORS[method], alpha=0.12, lw=0)
    _yardstick((left, right), results)
    left.set(title="all points", xlabel="exact KL to the reference, nats a text", ylabel="gold reward")
    title = "best within a KL budget, mean over seeds"
    right.set(title=title + (" and 95 % interval" if results["seeds"] > 1 else ""), xlabel="KL budget, nats a text")
    for axis in (left, right):
        axis.set_xscale("symlog", linthresh=1.0)
        axis.set_xlim(0, 1.15 * largest)
        axis.grid(alpha=0.3)
    right.legend(fontsize=9, loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _yardstick(axes: Any, results: dict[str, Any]) -> None:
    """Best-of-n of the fine-tuned model, by the gold reward and by the learned one, against the bound on its KL."""
    own = [c["points"] for c in results["cells"].values() if c["method"] not in METHODS]
    xs = [p["kl"] for p in own[0]]
    for name, style, label in (("gold", "--", "best-of-n, gold"), ("gold_by_proxy", ":", "best-of-n, learned")):
        ys = np.mean([[p[name] for p in points] for points in own], axis=0)
        for axis in axes:
            axis.plot(xs, ys, style, color="black", lw=1.3, label=label)
