"""The `fastalign study` command: which study, and its own keys."""

from __future__ import annotations

from collections.abc import Callable

from . import frontier, hacking, labelers, transfer

STUDIES: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "frontier": ("gold reward against KL for DPO, DPO-R, IPO, PRO, PPO and GRPO", frontier.main),
    "hacking": ("learned reward against gold reward; preferences for length, and DPO-R against them", hacking.main),
    "transfer": ("policies trained on movie reviews, asked about other things", transfer.main),
    "labelers": ("agreement between the corpus's raters, and generalisation to held-out ones", labelers.main),
}


def main(argv: list[str]) -> int:
    """Runs the study that the first argument names. ValueError if there is no such study."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        rows = "\n".join(f"  {name:<10} {summary}" for name, (summary, _) in STUDIES.items())
        print(f"usage: fastalign study STUDY [--key value ...]\n\nstudies:\n{rows}")
        return 0
    if argv[0] not in STUDIES:
        raise ValueError(f"study must be one of {', '.join(STUDIES)}; got {argv[0]!r}")
    return STUDIES[argv[0]][1](argv[1:])
