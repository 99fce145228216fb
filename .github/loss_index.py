"""The index of losses, papers, equations and functions, written from docstrings and from the oracle's CASES.

    python .github/loss_index.py                                 print it
    python .github/loss_index.py --update .github/docs/losses.md  rewrite that page between its markers

What a row says is the first paragraph of the function's docstring; the papers are the citations in it; the cases are
those of `fastalign.reference.CASES` whose loss is this one.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fastalign import cross_entropy, losses, rl
from fastalign.losses.base import LogitsLoss
from fastalign.losses.pairwise import PAIRWISE
from fastalign.losses.policy_objectives import KINDS
from fastalign.losses.reductions import NORMALIZATIONS
from fastalign.reference import CASES, Case

BEGIN = "<!-- losses: written by .github/loss_index.py -->"
END = "<!-- end of losses -->"

_ARXIV = r"arXiv[: ](\d{4}\.\d{5})"
_AUTHORS = r"(?:de )?[A-Z][\w'-]+(?: et al\.| and [A-Z]\w+)?"
PAPER = re.compile(
    rf"\b{_AUTHORS} (?:19|20)\d\d(?:(?:, | \(){_ARXIV}\)?)?(?:, (?:eq|sec)\. [\d.]*\d)?(?:,? \(?\"[^\"]+\"\)?)?"
)
"""A citation as docstrings have them: authors, year, and after it arXiv's number, equation or section, title."""

FAMILIES: dict[str, tuple[tuple[str, ...], ...]] = {
    "Supervised": (("sft_loss", "SFTLoss"), ("cross_entropy",)),
    "Triples": (("tpo_loss", "TPOLoss"),),
    "Distillation": (("DistillationLoss", "distillation_loss", "TopK"),),
    "Unpaired": (("kto_loss", "KTOLoss"),),
    "Ranked lists": (("pro_loss", "PROLoss"), ("plackett_luce_loss",)),
    "Reward models": (("reward_loss",), ("kwise_reward_loss",), ("best_of_k_loss",), ("last_token_scores",)),
    "Beside the policy's loss": (("value_loss",), ("ptx_loss",), ("kl_estimate",), ("importance_weights",)),
    "Of your own": (("TokenLoss",), ("PairLoss",)),
}
"""Heading → the names of `PUBLIC` that are no rows of a table of theirs: function and module in one."""

PUBLIC = {name: getattr(losses, name) for name in losses.__all__} | {"cross_entropy": cross_entropy}


# -------------------------------------------------------------------------------------------------------- of docstrings
def description(target: Any) -> list[str]:
    """The paragraphs of a docstring before its arguments, each in one line."""
    before = re.split(r"^ *Args:", target.__doc__ or "", flags=re.MULTILINE)[0]
    return [" ".join(part.split()) for part in before.strip().split("\n\n")]


def summary(target: Any) -> str:
    """The first paragraph, with the formula that it may lead to."""
    first, *rest = description(target)
    while rest and not first.endswith("."):
        first += f" {rest.pop(0)}"
    return first


def papers(text: str) -> str:
    """The citations of a text, each once, arXiv's numbers as links."""
    found = [match[0] for match in PAPER.finditer(text)]
    whole = dict.fromkeys(one if one.count("(") == one.count(")") else one.rstrip(")") for one in found)
    return "; ".join(re.sub(_ARXIV, r"[arXiv:\1](https://arxiv.org/abs/\1)", cell(one)) for one in whole) or "-"


def cell(text: str) -> str:
    """Plain text for a cell of a table, but for what stands in backticks."""
    parts = text.split("`")
    for i, part in enumerate(parts):
        part = part.replace("|", "&#124;")
        if i % 2 == 0:  # "<" has no escape that both GitHub and the site know
            part = re.sub(r"([*_\[])", r"\\\1", part).replace("<", "&lt;")
        parts[i] = part
    return "`".join(parts)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ------------------------------------------------------------------------------------------------------------ of CASES
def _within(function: Callable[..., Any]) -> Iterator[Any]:
    """What a case's function makes use of."""
    seen = inspect.getclosurevars(inspect.unwrap(function))
    yield from (*seen.nonlocals.values(), *seen.globals.values())


def losses_of(case: Case) -> set[str]:
    """The names that a case checks: of `fastalign.losses`, and as `PPOLoss:kind` and `DPOLoss:loss_type`."""
    public = {id(one): name for name, one in PUBLIC.items()}
    found = {public[id(one)] for one in _within(case.fused) if id(one) in public}
    for module in (one for one in _within(case.fused) if isinstance(one, LogitsLoss)):
        found.add(type(module).__name__)
        if isinstance(module, losses.PPOLoss):
            found.add(f"PPOLoss:{module.config['kind']}")
    kind = re.fullmatch(r"dpo:(\w+)(?::\w+)?", case.name)
    return found | ({f"DPOLoss:{kind[1]}"} if kind else set())


def cases_of(*names: str) -> str:
    return ", ".join(f"`{case.name}`" for case in CASES if losses_of(case) & set(names)) or "-"


# ------------------------------------------------------------------------------------------------------------ the index
_HEAD = ("paper, equation", "what it is", "function", "test cases")


def _row(first: str, target: Any, *cases: str) -> list[str]:
    text, all_of_it = summary(target), " ".join(description(target))
    place = f"`{inspect.getmodule(target).__name__.removeprefix('fastalign.')}.{target.__name__}`"  # type: ignore[union-attr]
    return [first, papers(all_of_it), cell(text), place, cases_of(*cases)]


def pairwise() -> str:
    rows = [_row(f"`{name}`", row.losses, f"DPOLoss:{name}") for name, row in PAIRWISE.items()]
    return table(("`loss_type`", *_HEAD), rows)


def policies() -> str:
    """The table of `policy_loss`'s docstring, with the function and the cases of each kind."""
    rows = re.findall(r"^ *\| `(\w+)` \| (.*) \| (.*) \|$", losses.policy_loss.__doc__ or "", re.MULTILINE)
    assert [name for name, _, _ in rows] == list(KINDS)
    named = [
        [f"`{name}`", papers(source), cell(f"{loss} ({source})"), f"`losses.policy_objectives.{KINDS[name].__name__}`"]
        for name, loss, source in rows
    ]
    return table(("`kind`", *_HEAD), [[*row, cases_of(f"PPOLoss:{row[0].strip('`')}")] for row in named])


def normalizations() -> str:
    rows = [[f"`{name}`", papers(summary(f)), cell(summary(f))] for name, f in NORMALIZATIONS.items()]
    return table(("`normalization`", *_HEAD[:2]), rows)


def others() -> str:
    parts = []
    for heading, names in FAMILIES.items():
        rows = [_row(", ".join(f"`{n}`" for n in both), PUBLIC[both[0]], *both) for both in names]
        parts += [f"## {heading}", table(("loss", *_HEAD), rows)]
    return "\n\n".join(parts)


def _public(module: Any) -> list[tuple[str, Any]]:
    return [(name, getattr(module, name)) for name in module.__all__]


def advantages() -> str:
    rows = [[f"`rl.{name}`", papers(" ".join(description(x))), cell(summary(x))] for name, x in _public(rl)]
    return table(("name", *_HEAD[:2]), sorted(rows))


def index() -> str:
    """The block of the page between its markers."""
    return "\n\n".join(
        [
            "## Pairs: `dpo_loss`, `DPOLoss(loss_type=...)`",
            pairwise(),
            "## Policies: `policy_loss`, `PPOLoss(kind=...)`",
            policies(),
            normalizations(),
            others(),
            "## Advantages, rewards, trust region: `fastalign.rl`",
            advantages(),
        ]
    )


def updated(text: str) -> str:
    """A page with the index between its markers."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{index()}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", type=Path, metavar="FILE", help="rewrite the index between this file's markers")
    page = parser.parse_args().update
    if page is None:
        print(index())
    else:
        page.write_text(updated(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
