"""Counts that say whether the mechanism still is one: ways into the kernels, copies of formulas, steps of the host.

    python bench/counts.py                  print every count beside its limit, and what was counted
    python bench/counts.py --root FOLDER    the counts of source text alone, of another checkout

Exit status 1 where a count is above its limit. `tests/bench/test_counts.py` holds them.
"""

from __future__ import annotations

import argparse
import ast
import io
import itertools
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
_SOURCES = (".py", ".h", ".cuh", ".cpp", ".cu")


class Row(NamedTuple):
    """One count: what, how many, at most how many, and where or of what."""

    what: str
    count: int
    limit: int
    found: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------------------ the text
def production(root: Path) -> list[Path]:
    """The files of which a user runs something: the float64 reference is the oracle and not among them."""
    found = [path for folder in ("fastalign", "kernels", "csrc") for path in (root / folder).rglob("*")]
    inside = (path.relative_to(root).parts for path in found)
    return sorted(
        path
        for path, parts in zip(found, inside, strict=True)
        # fastalign/kernels may be a link to kernels/
        if path.suffix in _SOURCES and parts[:2] not in (("fastalign", "reference"), ("fastalign", "kernels"))
    )


def code(path: Path) -> str:
    """The file's text with comments and, in Python, strings blanked: lines and columns stay where they are."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return re.sub(r"//[^\n]*|/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.DOTALL)
    lines = text.splitlines(keepends=True)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            for number in range(token.start[0] - 1, token.end[0]):
                line = lines[number]
                first = token.start[1] if number == token.start[0] - 1 else 0
                last = token.end[1] if number == token.end[0] - 1 else len(line.rstrip("\n"))
                lines[number] = line[:first] + " " * (last - first) + line[last:]
    return "".join(lines)


_FUNCTION = re.compile(
    r"^(?:[ \t]*def \w|(?:FA_HD|inline|static|template|struct|class|double|float|void)\b)", re.MULTILINE
)


def blocks(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of what lies between the beginnings of functions."""
    starts = [0, *(match.start() for match in _FUNCTION.finditer(text)), len(text)]
    for start, end in itertools.pairwise(starts):
        yield text.count("\n", 0, start) + 1, text[start:end]


# -------------------------------------------------------------------------------------------------- copies of formulas
_ONE = r"\b1(?:\.0)?f?\s*"
_CUT = re.compile(
    rf"{_ONE}-\s*[\w.]*(?:low|eps\w*|cliprange).{{0,60}}?{_ONE}\+\s*[\w.]*(?:high|eps\w*|cliprange)", re.DOTALL
)
_LARGER = re.compile(r">\s*plain|plain\s*<|\b(?:maximum|minimum|fmaxf?|fminf?)\(|(?:torch\.|std::)(?:max|min)\(")
_NESTED = re.compile(r"(?:\w+\.)?min\w*\((?:\w+\.)?max\w*\([\w.]+,\s*$")
"""The beginning of a cut that is written as the smaller of the larger."""


def ppo_clip(text: str) -> Iterator[int]:
    """A ratio that is cut on both sides, and its term compared with that of the ratio itself (CISPO only cuts)."""
    for line, block in blocks(text):
        cut = _CUT.search(block)
        if cut and _LARGER.search(_NESTED.sub("", block[: cut.start()]) + block[cut.end() :]):
            yield line + block.count("\n", 0, cut.start())


_LOG_SIGMOID = r"(?:\w+(?:\.|::))*log_?sigmoid(?:_of|_exact)?"
_DPO = re.compile(
    # (1 - e) loss - e log sigmoid(-z), or (e - 1) log sigmoid(z) first; weights of softplus(-z) and softplus(z); their
    # derivative
    rf"\(1(?:\.0f?)? - (\w+)\) \* .*? - \1 \* {_LOG_SIGMOID}\(-[\w.]+\)\s*$"
    rf"|\((\w+) - 1(?:\.0f?)?\) \* .*? - \2 \* {_LOG_SIGMOID}\(-[\w.]+\)\s*$"
    r"|\* softplus\(-(\w+)\).*\* softplus\(\3\)"
    r"|\* sigmoid\((\w+)\) - \w+ \* sigmoid\(-\4\)",
    re.MULTILINE,
)
_K3 = re.compile(r"expm1f?(?:_of)?\(\(?-([a-z_]\w*)\b.*\+ \1\b|\bexp\(-(\w+)\) - 1(?:\.0f?)? \+ \2\b")


def _lines(pattern: re.Pattern[str]) -> Callable[[str], Iterator[int]]:
    return lambda text: (text.count("\n", 0, match.start()) + 1 for match in pattern.finditer(text))


FORMULAS: dict[str, Callable[[str], Iterator[int]]] = {
    "copies of PPO-clip": ppo_clip,
    "copies of DPO's sigmoid": _lines(_DPO),
    "copies of k1, k2, k3": _lines(_K3),  # k3 stands for the three: wherever it is, the others are beside it
}
"""Name → the lines of a text where the formula, or its derivative, is written out."""


def copies(root: Path) -> list[Row]:
    texts = [(path.relative_to(root).as_posix(), code(path)) for path in production(root)]
    return [
        Row(what, len(found), 1, found)
        for what, finds in FORMULAS.items()
        for found in [tuple(f"{name}:{line}" for name, text in texts for line in finds(text))]
    ]


# ---------------------------------------------------------------------------------------------------------- structure
_WAYS = {"forward": "token statistics", "logps": "token statistics", "loss": "fused loss", "objective": "fused loss"}
"""Function of a backend that takes logits forward → the way that it belongs to; one that is new is a way of its own."""


_OF_TWO = ("divergence",)
"""Ways of what no statistics of one model's logits have: a mixture of two distributions."""


def _listed(ways: dict[str, list[str]]) -> tuple[str, ...]:
    return tuple(f"{way}: {place}" for way, places in ways.items() for place in places)


def _takes_logits(root: Path) -> set[str]:
    """The functions of the backend `cpu` that take logits and are not a backward's."""
    tree = ast.parse((root / "fastalign" / "_backends" / "cpu.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.args.args]
    return {f.name for f in functions if f.args.args[0].arg in ("logits", "call") and "backward" not in f.name}


def _calls_of_backends(function: ast.AST) -> Iterator[tuple[str, int]]:
    """(name, line) of what a function takes from `_backends.pick(..)` or `.direct(..)`, held in a name, an attribute
    `cpu`, or not at all."""

    def chosen(node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and ast.unparse(node.func) in ("_backends.pick", "_backends.direct")

    held = set()
    for node in ast.walk(function):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=False))
            held |= {name.id for name, value in pairs if isinstance(name, ast.Name) and chosen(value)}
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute):
            of = node.value
            named = isinstance(of, ast.Name) and of.id in held
            if named or chosen(of) or (isinstance(of, ast.Attribute) and of.attr == "cpu"):
                yield node.attr, node.lineno


def structure(root: Path) -> list[Row]:
    """Ways in, nodes of autograd's graph, entry points of the CPU's module."""
    ways: dict[str, list[str]] = {}
    nodes: list[str] = []
    kernels = _takes_logits(root)
    for path in production(root):
        name = path.relative_to(root).as_posix()
        if path.suffix != ".py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            bases = [ast.unparse(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []
            if isinstance(node, ast.ClassDef) and any(base.endswith("autograd.Function") for base in bases):
                nodes.append(f"{node.name} {name}:{node.lineno}")
            if isinstance(node, ast.FunctionDef) and not name.startswith("fastalign/_backends/"):
                for kernel, line in _calls_of_backends(node):
                    if kernel in kernels:
                        place = f"{kernel} in {node.name} {name}:{line}"
                        ways.setdefault(_WAYS.get(kernel, kernel), []).append(place)
    of_two = {way: ways.pop(way) for way in _OF_TWO if way in ways}
    bindings = code(root / "csrc" / "bindings.cpp")
    entries = tuple(re.findall(r'\b(?:m\.def\(|def_fast<&\w+>\(m,)\s*"(\w+)"', bindings))
    return [
        Row("ways from a model's logits into the kernels", len(ways), 2, _listed(ways)),
        Row("ways from two models' logits into them", len(of_two), 1, _listed(of_two)),
        Row("classes of autograd.Function", len(nodes), 5, tuple(nodes)),
        Row("m.def in csrc/bindings.cpp", len(entries), 14, entries),
    ]


# ----------------------------------------------------------------------------------------------------- the host's steps
def tensor_operations(step: Callable[[], Any]) -> int:
    """The aten events of one step, after three that fill every cache."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    return sum(event.name.startswith("aten::") for event in profiler.events())


def python_calls(step: Callable[[], Any]) -> int:
    """Calls of Python functions in one step, after three that fill every cache."""
    for _ in range(3):
        step()
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(before)
    return count - 1  # the step's own


def _step(loss: Any, source: Callable[[], Any], *args: Any, **more: Any) -> Callable[[], Any]:
    return lambda: loss(source(), *args, **more).loss.backward()


def operations() -> list[Row]:
    """Tensor operations of one step, forward and backward, at B = 4, T = 8: the host's price of a small batch."""
    import torch

    import fastalign as fa
    from fastalign.losses import DPOLoss, PPOLoss, PROLoss

    B, T, V, H = 4, 8, 64, 16
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, V, (B, T), generator=draw)
    labels[:, :2] = -100
    logits, hidden, weight = (
        torch.randn(*shape, generator=draw, requires_grad=True) for shape in ((B, T, V), (B, T, H), (V, H))
    )
    old, advantages = torch.randn(B, T, generator=draw) - 4, torch.randn(B, generator=draw)
    chosen, rejected = torch.randn(2, B // 2, generator=draw).double() - 20  # as the DPO trainer keeps them
    pairs = {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    grpo = PPOLoss(normalization="grpo", kl_coef=0.04, kl_estimator="k3", cliprange_high=0.28)

    def plain() -> Any:
        return logits

    def head() -> Any:
        return fa.Head(hidden, weight)

    steps = {
        "DPO from a tensor": (20, _step(DPOLoss(), plain, labels, **pairs)),
        "GRPO from a tensor": (40, _step(grpo, plain, labels, old, advantages, ref_logps=old + 0.1)),
        "DPO from a head": (120, _step(DPOLoss(), head, labels, **pairs)),
        "PRO from a head": (200, _step(PROLoss(sft_weight=0.05), head, labels, list_size=4)),
        "PPO from a head": (150, _step(PPOLoss(), head, labels, old, advantages)),
        "GRPO from a head": (150, _step(grpo, head, labels, old, advantages, ref_logps=old + 0.1)),
    }
    return [Row(f"tensor operations, {what}", tensor_operations(step), limit) for what, (limit, step) in steps.items()]


MORE_CALLS = 30
"""Python calls that one option more may cost."""


def options() -> list[Row]:
    """Python calls of a step at 2 x 256 logits under one option more, beside those of the default."""
    import torch

    from fastalign.losses import DPOLoss, PPOLoss, SFTLoss

    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 256, generator=draw, requires_grad=True)
    labels = torch.randint(0, 256, (2, 1), generator=draw)
    old, advantages = torch.full((2, 1), -5.0), torch.tensor([0.5, -1.0])
    reference = torch.tensor([-5.0])
    pairs = {"ref_chosen_logps": reference, "ref_rejected_logps": reference}
    tokens: dict[str, Any] = {"old_logps": old, "advantages": advantages}
    makers: dict[str, tuple[Any, dict[str, Any], dict[str, dict[str, Any]]]] = {
        "SFT": (
            SFTLoss,
            {},
            {
                "z_loss": {"z_loss": 1e-4},
                "label smoothing": {"label_smoothing": 0.1},
                "another normalisation": {"normalization": "sequence"},
            },
        ),
        "PPO": (
            PPOLoss,
            tokens,
            {"entropy bonus": {"entropy_coef": 0.01}, "another normalisation": {"normalization": "grpo"}},
        ),
        "DPO": (
            DPOLoss,
            pairs,
            {"hinge for sigmoid": {"loss_type": "hinge"}, "length term": {"length_alpha": 0.1}},
        ),
    }
    rows = []
    for name, (make, given, variants) in makers.items():
        default = python_calls(_step(make(), lambda: logits, labels, **given))
        for what, more in variants.items():
            calls = python_calls(_step(make(**more), lambda: logits, labels, **given))
            rows.append(Row(f"Python calls, {name}, {what}", calls, default + MORE_CALLS, (f"default: {default}",)))
    return rows


# --------------------------------------------------------------------------------------------------------- the command
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--root", type=Path, metavar="FOLDER", help="count the source text of this checkout, run nothing"
    )
    given = parser.parse_args()
    rows = structure(given.root or ROOT) + copies(given.root or ROOT)
    if given.root is None:
        rows += operations() + options()
    for row in rows:
        print(f"{row.count:>5} of {row.limit:<5} {row.what}{'' if row.count <= row.limit else '   ABOVE ITS LIMIT'}")
        for place in row.found:
            print(f"{'':15}{place}")
    return int(any(row.count > row.limit for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
