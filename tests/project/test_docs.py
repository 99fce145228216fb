"""README and the documentation's pages: their examples run as printed, their commands, links, messages and names are
there, and the index of losses is what the sources say."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import fastalign as fa
from fastalign.cli import commands as cli

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / ".github" / "docs"
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))
}
DROP_IN, LOSSES = TEXTS[".github/docs/drop-in.md"], TEXTS[".github/docs/losses.md"]


def blocks(text, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


MOVES = re.findall(
    r"^### (.*?)\n\nYours:\n\n```python\n(.*?)^```\n\nWith fastalign:\n\n```python\n(.*?)^```$",
    DROP_IN,
    re.MULTILINE | re.DOTALL,
)
"""Heading, code as it was, code with fastalign."""
OURS = {
    "transformers' Trainer": "apply_fused_loss(model)",
    "TRL": "fused.patch()",
    "A loop with cross-entropy": "fa.cross_entropy(",
}
EXAMPLES = {
    page: [block for block in blocks(text) if not any(block in move for move in MOVES)] for page, text in TEXTS.items()
}


# ------------------------------------------------------------------------------------------- a move to fastalign
def before_the_move(kind, tiny_model, tokenizer, folder):
    """What an example takes as given."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
    torch.manual_seed(0)
    model = tiny_model()
    ids = torch.arange(12).reshape(2, 6) + 5
    found = {"model": model, "input_ids": ids, "labels": ids.masked_fill(ids < 8, -100), "F": F}
    options = {"use_cpu": True, "max_steps": 2, "learning_rate": 1e-2, "report_to": [], "save_strategy": "no"}
    options |= {"per_device_train_batch_size": 2, "disable_tqdm": True}
    if kind == "transformers' Trainer":
        found |= {"Trainer": transformers.Trainer, "args": transformers.TrainingArguments(folder, **options)}
        found |= {"rows": [{"input_ids": row, "labels": row} for row in ids]}
    elif kind == "TRL":
        trl = pytest.importorskip("trl", reason="needs TRL (the extra `trl`)")
        datasets = pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")
        pairs = [{"prompt": "the movie is", "chosen": " good", "rejected": " bad"}] * 2
        found |= {"DPOTrainer": trl.DPOTrainer, "args": trl.DPOConfig(folder, bf16=False, **options)}
        found |= {"pairs": datasets.Dataset.from_list(pairs), "tokenizer": tokenizer}
        found |= {"ref_model": tiny_model()}
    return found


@pytest.mark.parametrize(("kind", "yours", "ours"), MOVES, ids=[move[0] for move in MOVES])
def test_yours_and_ours_do_the_same(kind, yours, ours, tiny_model, tiny_tokenizer, tmp_path):
    assert OURS[kind] in ours
    assert OURS[kind] not in yours
    results = []
    for code in (yours, ours):
        given = before_the_move(kind, tiny_model, tiny_tokenizer, str(tmp_path))
        start = [p.detach().clone() for p in given["model"].parameters()]
        try:
            exec(compile(code, "drop-in.md", "exec"), given)
        finally:
            if "fused" in given:
                given["fused"].unpatch()
        after = list(given["model"].parameters())
        loop = "cross_entropy" in code
        results.append([p.grad if loop else p.detach() - s for p, s in zip(after, start, strict=True)])
    assert any(float(change.norm()) > 0 for change in results[0])
    for a, b in zip(*results, strict=True):
        # Adam's first steps follow the sign of a gradient, so that where it is rounding alone they may differ.
        assert float((a - b).norm()) <= 1e-3 * float(a.norm()) + 1e-6


def test_every_move_is_shown():
    assert [move[0] for move in MOVES] == list(OURS)


# ------------------------------------------------------------------------------------------------- all other examples
def what_pages_take_as_given(model):
    torch.manual_seed(0)
    ids = torch.randint(3, 67, (4, 6))
    labels = ids.masked_fill(torch.arange(6) < 2, -100)
    hidden = torch.randn(4, 6, 16)
    halves = [torch.tensor([-9.0, -7.0]), torch.tensor([-8.0, -7.5])]
    base = {"model": model, "input_ids": ids, "labels": labels, "chosen_labels": labels[:2]}
    base |= {"logits": torch.randn(4, 6, 67).requires_grad_(), "chosen_logits": torch.randn(2, 6, 67)}
    base |= {"rejected": halves[1], "ref_chosen": halves[0], "ref_rejected": halves[1]}
    base |= {"rc": halves[0], "rr": halves[1], "old_logps": torch.full((4, 6), -4.0), "advantages": torch.ones(4)}
    base |= {"hidden": hidden.clone(), "weight": model.lm_head.weight, "ref_hidden": hidden.clone()}
    return base | {"ref_weight": model.lm_head.weight.detach()}


@pytest.mark.parametrize("page", [page for page, code in EXAMPLES.items() if code])
def test_examples_run_as_printed(page, causal_model, tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """One after the other, as a reader goes through a page: later blocks use the imports of earlier ones, but what they
    take as given is as it was. What a block prints is in its comments."""
    for package in ("datasets", "trl") if "import trl" in TEXTS[page] else ("datasets",):
        pytest.importorskip(package, reason=f"needs {package} (the extra `dev`)")
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("runs/sft")
    tiny_tokenizer.save_pretrained("runs/sft")
    base, given, shown = what_pages_take_as_given(causal_model("Llama")), {}, []
    base["print"] = lambda *words: shown.extend(" ".join(map(str, words)).split())
    try:
        for block in EXAMPLES[page]:
            given |= base
            if "cu_seqlens" in block:  # the same four rows, end to end
                given |= {"labels": base["labels"].flatten(), "hidden": base["hidden"].flatten(0, 1)}
                given |= {"cu_seqlens": torch.tensor([0, 6, 12, 18, 24])}
            block = re.sub(r"\b((?:DPO|PPO)Config)\(", r"\1(use_cpu=True, ", block)
            shown.clear()
            exec(compile(block, page, "exec"), given)
            said = re.findall(r"^# (.*)", block, re.MULTILINE)
            assert " ".join(said) == " ".join(shown)
    finally:
        if "fused" in given:
            given["fused"].unpatch()
    if "out" in given:
        assert torch.isfinite(given["out"].loss)
    for name in re.findall(r'output_dir="(runs/\w+)"', TEXTS[page]):
        assert (tmp_path / name).is_dir(), name


def test_gradients_flow_and_own_losses_are_programs(causal_model):
    base = what_pages_take_as_given(causal_model("Llama"))
    base["print"] = lambda *_: None
    for block in EXAMPLES[".github/docs/drop-in.md"]:
        exec(compile(block, "drop-in.md", "exec"), base)
    assert base["logits"].grad.abs().sum() > 0
    assert base["ranked"].explain().count("torch operations") == 1
    for own in ("ratio", "margin"):
        assert re.search(r"program of \d+ steps", base[own].explain())


# ------------------------------------------------------------------------------------------------------------- commands
COMMANDS = dict.fromkeys(
    line.partition("#")[0].strip()
    for text in TEXTS.values()
    for line in re.findall(r"^fastalign .*", "".join(blocks(text, "bash")), re.MULTILINE)
)
VERBS = ("frontier", "hacking", "transfer", "labelers", "head", "sweep", "report", "behind", "compare")


@pytest.mark.parametrize("command", COMMANDS)
def test_keys_of_the_commands_are_known(command, capfd):
    pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")
    _, name, *words = command.split()
    keys = [word.partition("=")[0] for word in words if word.startswith("--")]
    if name == "bench":
        pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark (the extra `dev`)")
    verb = [word for word in words[:1] if word in VERBS]
    assert cli.main([name, *verb, "--help"]) == 0
    shown = capfd.readouterr().out
    assert not [key for key in keys if key not in shown and key != "--config"]


def test_estimates_of_memory_are_printed_as_the_page_has_them(capsys):
    from fastalign import memory

    (first, _) = re.findall(r"^python -m fastalign\.memory (.*)$", TEXTS[".github/docs/heads.md"], re.MULTILINE)
    assert memory.main(first.split()) == 0
    shown = capsys.readouterr().out
    for name in ("peak", "of it gradients", "GEMMs", "eager", "keep", "recompute", "objective"):
        assert name in shown
    for option in ("--valid", "--frozen", "--reference", "--chunk_bytes"):
        assert f"`{option}`" in TEXTS[".github/docs/heads.md"]


# -------------------------------------------------------------------------------------------------- names, links, texts
def test_every_message_of_the_troubleshooting_is_one_of_ours():
    """Each of the page's messages is a text of the sources, `…` standing for what is put in."""

    def template(node):
        if isinstance(node, ast.JoinedStr):
            return "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""

    sources = [*Path(fa.__file__).parent.rglob("*.py"), ROOT / "setup.py"]
    nodes = [node for path in sources for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    patterns = {re.sub(r"(\\\0|\0)+", ".+", re.escape(text)) for text in map(template, nodes) if len(text) > 20}
    messages = [" ".join(text.split()) for text in blocks(TEXTS[".github/docs/troubleshooting.md"], "text")]
    assert len(messages) >= 25
    # A pattern of a few letters between what is put in would match anything.
    strict = [re.compile(p) for p in patterns if len(p.replace(".+", "")) > 20]
    assert [m for m in messages if not any(p.fullmatch(m) for p in strict)] == []


@pytest.mark.parametrize("page", [*TEXTS, ".github/CONTRIBUTING.md", "bench/README.md", "kernels/README.md"])
def test_links_lead_somewhere(page):
    path = ROOT / page
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", path.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, link


@pytest.fixture(scope="module")
def loss_index():
    spec = importlib.util.spec_from_file_location("loss_index_under_test", ROOT / ".github" / "loss_index.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_index_of_losses_is_up_to_date(loss_index):
    assert loss_index.updated(LOSSES) == LOSSES


def cells_of(line):
    return [cell.strip() for cell in line.strip("| ").split(" | ")]


def test_every_public_loss_is_in_the_index_with_a_case(loss_index):
    from fastalign import losses, rl
    from fastalign.losses.pairwise import PAIRWISE
    from fastalign.losses.policy_objectives import KINDS
    from fastalign.reference import CASES

    for name in losses.__all__:
        assert name.endswith("Output") or f"`{name}" in LOSSES, name
    for name in rl.__all__:
        assert f"| `rl.{name}` |" in LOSSES, name
    rows = {cells[0].strip("`"): cells for cells in map(cells_of, LOSSES.splitlines()) if cells[0].startswith("`")}
    for name in (*PAIRWISE, *KINDS):
        assert rows[name][-1] != "-", f"{name} has no case"
    listed = {case for cells in rows.values() if len(cells) == 5 for case in re.findall(r"`([\w:]+)`", cells[-1])}
    assert {case.name for case in CASES} == listed
    for name in PAIRWISE:
        assert re.search(r"(19|20)\d\d", rows[name][1]), f"{name} names no paper"


def test_the_reference_has_every_public_name():
    from fastalign import api, losses, rl

    places = re.findall(r"^::: (\S+)\.(\w+)$", TEXTS[".github/docs/reference.md"], re.MULTILINE)
    for module, name in places:
        assert hasattr(importlib.import_module(module), name), (module, name)
    names = {*api.__all__, *losses.__all__, *rl.__all__} - {"losses", "rl", "__version__"}
    assert names - {name for _, name in places} == set()


def test_the_examples_page_lists_every_example():
    import fastalign.examples

    names = {p.stem for p in Path(fastalign.examples.__file__).parent.glob("*.py")} - {"__init__", "tiny"}
    text = TEXTS[".github/docs/examples.md"]
    assert set(re.findall(r"python -m fastalign\.examples\.(\w+)`", text)) == names
    assert set(re.findall(r"^::: fastalign\.examples\.(\w+)$", text, re.MULTILINE)) == names


def test_the_version_matrix_is_what_is_installed_for_the_tests():
    pins = re.findall(r"([a-z-]+)==([\d.]+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pins += re.findall(r"(torch)==([\d.]+)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    rows = [line for line in DROP_IN.splitlines() if line.startswith("| ")]
    names = {"torch": "PyTorch", "trl": "TRL", "liger-kernel": "Liger", "triton": "Triton"}
    names |= {name: name for name in ("transformers", "peft", "accelerate", "datasets")}
    for package, name in names.items():
        (version,) = {version for pinned, version in pins if pinned == package}
        assert any(name in row.split("|")[1] and version in row.split("|")[2] for row in rows), (package, version)
