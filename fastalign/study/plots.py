"""The studies' pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator

from .envelope import over_seeds
from .methods import METHODS

GRID = tuple(float(x) for x in np.geomspace(0.05, 64, 80))
"""KL budgets at which envelopes are drawn, in nats."""

_STYLES = dict(zip(METHODS, ("o", "s", "^", "D", "v", "P", "X"), strict=True))
_COLORS = {name: f"C{i}" for i, name in enumerate(METHODS)}


def frontier(results: dict[str, Any], curves: dict[str, list[np.ndarray]], path: Path) -> None:
    """Left: every point of every run. Right: each method's envelope over seeds. Best-of-n is the yardstick in both."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(15.5, 6), sharey=True, sharex=True, constrained_layout=True)
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
        _root_scale(axis)
        axis.set_xlim(0, 1.15 * largest)
        axis.grid(alpha=0.3)
    right.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _root_scale(axis: Any) -> None:
    """Distances along the axis grow with the root of the KL, as in Gao et al. 2023: near 0 rewards do likewise."""
    axis.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axis.xaxis.set_major_locator(FixedLocator([0, 0.5, 1, 2, 4, 8, 16, 32, 64]))
    axis.xaxis.set_major_formatter("{x:g}")


def _yardstick(axes: Any, results: dict[str, Any]) -> None:
    """Best-of-n of the fine-tuned model, by the gold reward and by the learned one, against the bound on its KL."""
    own = [c["points"] for c in results["cells"].values() if c["method"] not in METHODS]
    xs = [p["kl"] for p in own[0]]
    for name, style, label in (("gold", "--", "best-of-n, gold"), ("gold_by_proxy", ":", "best-of-n, learned")):
        ys = np.mean([[p[name] for p in points] for points in own], axis=0)
        for axis in axes:
            axis.plot(xs, ys, style, color="black", lw=1.3, label=label)


def hacking(results: dict[str, Any], path: Path) -> None:
    """Gold and learned reward against KL along PPO and DPO; changes of length and win rate over DPO-R's alpha."""
    figure, axes = plt.subplots(1, 4, figsize=(18, 4.6), constrained_layout=True)
    cells = results["cells"].values()
    own = [c["points"] for c in cells if c.get("method") not in METHODS and "alpha" not in c]
    for axis, name, yardstick in ((axes[0], "gold", "gold_by_proxy"), (axes[1], "proxy", "proxy")):
        for method in ("ppo-learned", "dpo"):
            points = [p for c in cells if c.get("method") == method for p in c["points"]]
            xs, ys = ([p[key]["mean"] for p in points] for key in ("kl", name))
            axis.scatter(xs, ys, s=24, marker=_STYLES[method], color=_COLORS[method], label=METHODS[method].label)
        ys = np.mean([[p[yardstick] for p in points] for points in own], axis=0)
        axis.plot([p["kl"] for p in own[0]], ys, "k:", label="best-of-n by the learned reward")
        _root_scale(axis)
        axis.set(title=f"{'gold' if name == 'gold' else 'learned'} reward", xlabel="KL, nats a text")
    axes[0].legend(fontsize=8)
    alphas = [float(a) for a in results["summary"]]
    places = range(len(alphas))
    shares = {"win_rate": "wins by gold", "win_rate_matched": "among equally long", "finished": "texts that end"}
    ticks: dict[str, Any] = {"xticks": list(places), "xticklabels": [f"{a:g}" for a in alphas]}
    changes = {"words_change": "words"}
    for axis, names, title in ((axes[2], changes, "change of length, words"), (axes[3], shares, "shares")):
        for shift, (name, label) in enumerate(names.items()):
            rows = [row[name] for row in results["summary"].values()]
            means = [r["mean"] for r in rows]
            spans = [[r["mean"] - r["low"] for r in rows], [r["high"] - r["mean"] for r in rows]]
            xs = [x + 0.08 * shift for x in places]
            axis.errorbar(xs, means, np.nan_to_num(spans), fmt="o-", capsize=4, label=label)
        axis.set(title=title, xlabel="alpha of DPO-R (0: DPO)", **ticks)
    axes[2].axhline(0, color="grey", lw=0.8)
    axes[3].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def transfer(results: dict[str, Any], figures: dict[str, str], path: Path) -> None:
    """Change of either gold reward by domain, for each method."""
    figure, axes = plt.subplots(1, len(figures), figsize=(6 * len(figures), 4.6), sharey=True, constrained_layout=True)
    for axis, (name, title) in zip(axes, figures.items(), strict=True):
        for shift, (method, domains) in enumerate(results["summary"].items()):
            rows = [row[f"{name}_change"] for row in domains.values()]
            spans = [[r["mean"] - r["low"] for r in rows], [r["high"] - r["mean"] for r in rows]]
            xs = [i + 0.15 * shift for i in range(len(rows))]
            label, style = METHODS[method].label, {"color": _COLORS[method], "marker": _STYLES[method]}
            axis.errorbar(xs, [r["mean"] for r in rows], np.nan_to_num(spans), ls="", capsize=4, label=label, **style)
            axis.set(xticks=range(len(rows)), xticklabels=list(domains))
        axis.set(title=f"change of the {title}")
        axis.axhline(0, color="grey", lw=0.8)
        axis.grid(alpha=0.3, axis="y")
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
