"""The demo's table, sampled texts and curves, from its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def _interval(e: dict[str, float], digits: int = 2) -> str:
    return f"{e['mean']:.{digits}f} [{e['low']:.{digits}f}, {e['high']:.{digits}f}]"


def _plus_minus(e: dict[str, float]) -> str:
    return f"{e['mean']:.2f} ± {e['se']:.2f}"


def rows(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, before, after) of every line of the table."""
    compare, dpo, sft = results["compare"], results["dpo"], results["sft"]
    before, after = compare["before"], compare["after"]
    last = dpo["metrics"]

    def plain(name: str, digits: int = 3) -> tuple[str, str]:
        return f"{before[name]:.{digits}f}", f"{after[name]:.{digits}f}"

    def interval(name: str, digits: int = 2) -> tuple[str, str]:
        return _interval(before[name], digits), _interval(after[name], digits)

    def runs(name: str) -> tuple[str, str]:
        return f"{sft[name]:,.0f}", f"{dpo[name]:,.0f}"

    return [
        ("gold reward, mean [95 %]", *interval("gold")),
        ("independent scorer (VADER), mean [95 %]", *interval("independent")),
        ("length in words, mean [95 %]", *interval("words", 1)),
        # Before, the policy is the reference: no rewards, nothing to be right about.
        ("preference accuracy on held-out pairs", "-", f"{last['eval_rewards/accuracies']:.3f}"),
        ("reward margin on held-out pairs", "0", f"{last['eval_rewards/margins']:.3f}"),
        ("KL to the reference, nats a text (± s.e.)", _plus_minus(before["kl"]), _plus_minus(after["kl"])),
        ("entropy, nats a token", *plain("entropy", 2)),
        ("distinct word pairs", *plain("distinct_2")),
        ("texts that end by themselves", *plain("finished")),
        ("training speed, tokens/s", *runs("tokens_per_second")),
        ("peak memory so far, MB", *runs("peak_memory_mb")),
    ]


def show(results: dict[str, Any], console: Console) -> None:
    """Prints the table, a few texts and the stages' times."""
    gold = results["corpus"]["gold"]
    console.print(
        f"\ngold reward against human ratings of {gold['texts']} held-out reviews: Pearson {gold['pearson']:.3f}, "
        f"sign accuracy {gold['sign_accuracy']:.3f}"
    )
    table = Table(title="held-out prompts", title_justify="left")
    table.add_column("")
    table.add_column("before DPO (SFT)", justify="right")
    table.add_column("after DPO", justify="right")
    for row in rows(results):
        table.add_row(*row)
    console.print(table)
    console.print(f"change of the gold reward on the same prompts: {_interval(results['compare']['gold_change'])}\n")
    texts = Table(
        title="first sample of the first held-out prompts (gold reward)", title_justify="left", show_lines=True
    )
    texts.add_column("before DPO", ratio=1)
    texts.add_column("after DPO", ratio=1)
    for example in results["compare"]["samples"]:
        texts.add_row(*(f"{example[n]} [dim]({example[n + '_gold']:+.1f})[/]" for n in ("before", "after")))
    console.print(texts)
    memory = results["memory"]
    if memory["peak"] is not None:
        whole, fused = (memory["peak"][name] / 1e6 for name in ("logits", "fused"))
        console.print(
            f"peak memory of one DPO pass ({memory['pairs']} pairs) beyond weights and gradients: {fused:,.0f} MB with "
            f"the fused head, {whole:,.0f} MB with the logits formed whole"
        )
    times = {name: stage["seconds"] for name, stage in results.items() if "seconds" in stage}
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in times.items())
    console.print(f"time: {spent}; together {sum(times.values()):.0f} s")


def curves(results: dict[str, Any], folder: Path) -> Path:
    """Draws the curves of both trainings and the gold rewards; returns the PNG's path."""
    figure, axes = plt.subplots(2, 3, figsize=(14, 7.5), constrained_layout=True)
    sft, dpo = results["sft"]["log"], results["dpo"]["log"]
    _lines(axes[0, 0], sft, {"loss": "train", "eval_loss": "held out"}, "SFT: loss (nats a token)")
    _lines(axes[0, 1], dpo, {"loss": "train", "eval_loss": "held out"}, "DPO: loss (with its NLL term)")
    accuracies = {"rewards/accuracies": "train", "eval_rewards/accuracies": "held out"}
    _lines(axes[0, 2], dpo, accuracies, "DPO: preference accuracy")
    _lines(axes[1, 0], dpo, {"rewards/margins": "train", "eval_rewards/margins": "held out"}, "DPO: reward margin")
    _lines(axes[1, 1], dpo, {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}, "DPO: implicit rewards")
    _gold(axes[1, 2], results["compare"])
    path = folder / "curves.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _lines(axis: Any, log: list[dict[str, Any]], names: dict[str, str], title: str) -> None:
    for (name, label), style in zip(names.items(), ("-", "o-"), strict=True):
        points = [(line["step"], line[name]) for line in log if name in line]
        axis.plot([x for x, _ in points], [y for _, y in points], style if len(points) < 30 else "-", label=label, ms=4)
    axis.set(title=title, xlabel="update")
    axis.grid(alpha=0.3)
    axis.legend()


def _gold(axis: Any, compare: dict[str, Any]) -> None:
    """Distribution of the gold reward before and after, with the means and their 95 % intervals on top."""
    names = ("before", "after")
    parts = axis.violinplot([compare["gold_scores"][n] for n in names], positions=[0, 1], showextrema=False, widths=0.8)
    for body, color in zip(parts["bodies"], ("C0", "C1"), strict=True):
        body.set(facecolor=color, alpha=0.3)
    for x, name in enumerate(names):
        e = compare[name]["gold"]
        axis.errorbar(
            x, e["mean"], [[e["mean"] - e["low"]], [e["high"] - e["mean"]]], fmt="o", color=f"C{x}", capsize=6
        )
        axis.annotate(f"{e['mean']:.2f}", (x, e["mean"]), xytext=(10, 0), textcoords="offset points", va="center")
    axis.axhline(0, color="grey", lw=0.8)
    axis.set(title="gold reward of sampled texts (mean, 95 %)", xticks=[0, 1], xticklabels=["before DPO", "after DPO"])
    axis.grid(alpha=0.3, axis="y")
