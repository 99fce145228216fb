"""The studies' pictures."""

from __future__ import annotations

import math
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
    figure, (left, right) = plt.subplots(1, 2, figsize=(17, 7), sharey=True, sharex=True, constrained_layout=True)
    cells = [c for c in results["cells"].values() if c["method"] in METHODS]
    reach = {m: max(p["kl"]["mean"] for c in cells if c["method"] == m for p in c["points"]) for m in curves}
    for method in curves:
        points = [p for c in cells if c["method"] == method for p in c["points"]]
        xs, ys = ([p[name]["mean"] for p in points] for name in ("kl", "gold"))
        style = {"marker": _STYLES[method], "color": _COLORS[method]}
        left.scatter(xs, ys, s=26, alpha=0.75, linewidths=0, label=METHODS[method].label, **style)
    for place, (method, own) in enumerate(curves.items()):
        shown = [i for i, kl in enumerate(GRID) if kl <= 1.1 * reach[method]]
        means = [e.mean for e in over_seeds([curve[shown] for curve in own])]
        line = {"color": _COLORS[method], "label": METHODS[method].label}
        right.plot([GRID[i] for i in shown], means, drawstyle="steps-post", lw=1.6, alpha=0.85, **line)
        if len(own) > 1:
            _intervals(right, method, results["summary"], reach[method], (place - (len(curves) - 1) / 2) * 0.035)
    _yardstick((left, right), results)
    left.set(title="every policy looked at", xlabel="exact KL to the reference, nats a text", ylabel="gold reward")
    right.set(xlabel="KL budget, nats a text")
    title = "best policy of a seed within a KL budget: chosen on one half of the prompts,\ncounted on the other (so a "
    seeds = f"mean over {results['seeds']} seeds; bars: 95 % intervals" if results["seeds"] > 1 else "one seed"
    right.set_title(f"{title}curve may dip); {seeds}", fontsize=11)
    largest, rewards = max(reach.values(), default=1.0), [p["gold"]["mean"] for c in cells for p in c["points"]]
    left.set_ylim(min([*rewards, 0.0]) - 0.25, max([*rewards, 1.0]) + 0.25)
    for axis in (left, right):
        _root_scale(axis)
        axis.set_xlim(0, 1.15 * largest)
        axis.grid(alpha=0.3)
    right.legend(fontsize=10, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _intervals(axis: Any, method: str, summary: dict[str, Any], reach: float, shift: float) -> None:
    """The tables' figures on the curve, each method's a little aside (along the root of the KL), so that all show."""
    rows = [(b, e) for b, e in zip(summary["budgets"], summary["envelope"][method], strict=True) if b <= 1.1 * reach]
    xs = [(math.sqrt(budget) + shift) ** 2 for budget, _ in rows]
    means = [e["mean"] for _, e in rows]
    spans = [[e["mean"] - e["low"] for _, e in rows], [e["high"] - e["mean"] for _, e in rows]]
    style = {"fmt": _STYLES[method], "color": _COLORS[method], "ms": 5, "lw": 1, "capsize": 2}
    axis.errorbar(xs, means, spans, **style)


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
    figure, axes = plt.subplots(2, 2, figsize=(14, 10.5), constrained_layout=True)
    for axis, name in zip(axes[0], ("gold", "proxy"), strict=True):
        _two_rewards(axis, results, name)
    axes[0, 0].sharey(axes[0, 1])
    axes[0, 0].legend(fontsize=9)
    alphas = [float(a) for a in results["summary"]]
    shares = {"win_rate": "wins by gold", "win_rate_matched": "wins among equally long", "finished": "texts that end"}
    for axis, names in ((axes[1, 0], {"words_change": "words"}), (axes[1, 1], shares)):
        for shift, (name, label) in enumerate(names.items()):
            rows = [row[name] for row in results["summary"].values()]
            means = [r["mean"] for r in rows]
            spans = [[r["mean"] - r["low"] for r in rows], [r["high"] - r["mean"] for r in rows]]
            xs = [i + 0.08 * shift for i in range(len(alphas))]
            axis.errorbar(xs, means, np.nan_to_num(spans), fmt="o-", capsize=4, label=label)
        axis.set(xticks=range(len(alphas)), xticklabels=["0 (DPO)", *(f"{a:g}" for a in alphas[1:])])
        axis.set(xlabel="alpha of DPO-R, nats a token")
    axes[1, 0].set(title="preferences for length: change of the outputs' length", ylabel="words a text")
    axes[1, 0].axhline(0, color="grey", lw=0.8)
    axes[1, 1].set(title="the same policies against the fine-tuned model", ylabel="share", ylim=(0, 1))
    axes[1, 1].axhline(0.5, color="grey", lw=0.8)
    axes[1, 1].legend(fontsize=9)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _two_rewards(axis: Any, results: dict[str, Any], name: str) -> None:
    """Change of one reward along the runs: each run thin, the mean over seeds of each setting thick."""
    cells = [c for c in results["cells"].values() if "alpha" not in c]
    best = {c["seed"]: c["points"] for c in cells if c["method"] not in METHODS}
    runs: dict[tuple[str, float], list[Any]] = {}
    for c in cells:
        if c["method"] in METHODS:
            start = best[c["seed"]][0]["figures"][name]["mean"]
            path = [(0.0, 0.0), *((p["kl"]["mean"], p[name]["mean"] - start) for p in c["points"])]
            runs.setdefault((c["method"], c["coefficient"]), []).append(path)
    for place, ((method, value), paths) in enumerate(runs.items()):
        style = {"color": _COLORS[method], "ls": ("-", "--")[place % 2]}
        for path in paths:
            axis.plot(*zip(*path, strict=True), lw=0.7, alpha=0.5, **style)
        label = f"{METHODS[method].label}, {METHODS[method].coefficient} {value:g}"
        mean = np.mean(np.array(paths), axis=0)
        axis.plot(*mean.T, lw=2.2, marker=_STYLES[method], label=label, **style)
    key = {"gold": "gold_by_proxy", "proxy": "proxy"}[name]
    ys = np.mean([[p[key] - points[0][key] for p in points] for points in best.values()], axis=0)
    axis.plot([p["kl"] for p in next(iter(best.values()))], ys, "k:", label="best-of-n by the learned reward")
    _root_scale(axis)
    axis.set_xlim(left=0)
    axis.axhline(0, color="grey", lw=0.8)
    title = {"gold": "gold reward (what was meant)", "proxy": "learned reward (what PPO followed)"}[name]
    axis.set(title=title, xlabel="exact KL to the reference, nats a text", ylabel="change from the fine-tuned model")


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
