"""Examples of README and guide run as printed; of those that show a move to fastalign, both columns do the same."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from fastalign.cli import commands as cli

README = Path(__file__).resolve().parents[1] / "README.md"
GUIDE = README.parent / ".github" / "GUIDE.md"
TEXT = README.read_text(encoding="utf-8")
GUIDE_TEXT = GUIDE.read_text(encoding="utf-8")
SECTION = TEXT.partition("<table>")[2].partition("</table>")[0]
BLOCKS = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
OTHERS = [block for block in re.findall(r"```python\n(.*?)```", TEXT + GUIDE_TEXT, re.DOTALL) if block not in BLOCKS]
COMMANDS = re.findall(
    r"^fastalign .*", "".join(re.findall(r"```bash\n(.*?)```", TEXT + GUIDE_TEXT, re.DOTALL)), re.MULTILINE
)
EXAMPLES = dict(zip(("transformers", "trl", "loop"), zip(BLOCKS[::2], BLOCKS[1::2], strict=True), strict=True))
OURS = {"transformers": "apply_fused_loss(model)", "trl": "fused.patch()", "loop": "fa.cross_entropy("}


def names(kind, tiny_model, tokenizer, folder):
    """What an example takes as given."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
    torch.manual_seed(0)
    model = tiny_model()
    ids = torch.arange(12).reshape(2, 6) + 5
    found = {"model": model, "input_ids": ids, "labels": ids.masked_fill(ids < 8, -100), "F": F}
    options = {"use_cpu": True, "max_steps": 2, "learning_rate": 1e-2, "report_to": [], "save_strategy": "no"}
    options |= {"per_device_train_batch_size": 2, "disable_tqdm": True}
    if kind == "transformers":
        found |= {"Trainer": transformers.Trainer, "args": transformers.TrainingArguments(folder, **options)}
        found |= {"rows": [{"input_ids": row, "labels": row} for row in ids]}
    elif kind == "trl":
        trl = pytest.importorskip("trl", reason="needs TRL (the extra `dev`)")
        datasets = pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")
        pairs = [{"prompt": "the movie is", "chosen": " good", "rejected": " bad"}] * 2
        found |= {"DPOTrainer": trl.DPOTrainer, "args": trl.DPOConfig(folder, bf16=False, **options)}
        found |= {"pairs": datasets.Dataset.from_list(pairs), "tokenizer": tokenizer}
        found |= {"ref_model": tiny_model()}
    return found


@pytest.mark.parametrize("kind", EXAMPLES)
def test_both_columns_do_the_same(kind, tiny_model, tiny_tokenizer, tmp_path):
    yours, ours = EXAMPLES[kind]
    assert OURS[kind] in ours
    assert OURS[kind] not in yours
    results = []
    for code in (yours, ours):
        given = names(kind, tiny_model, tiny_tokenizer, str(tmp_path))
        start = [p.detach().clone() for p in given["model"].parameters()]
        try:
            exec(compile(code, "README.md", "exec"), given)
        finally:
            if "fused" in given:
                given["fused"].unpatch()
        after = list(given["model"].parameters())
        results.append([p.grad if kind == "loop" else p.detach() - s for p, s in zip(after, start, strict=True)])
    assert any(float(change.norm()) > 0 for change in results[0])
    for a, b in zip(*results, strict=True):
        # Adam's first steps follow the sign of a gradient, so that where it is rounding alone they may differ.
        assert float((a - b).norm()) <= 1e-3 * float(a.norm()) + 1e-6


def test_every_other_block_runs(causal_model, tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """One after the other, as a reader goes through them: later blocks use the imports of earlier ones, but what they
    take as given is as it was."""
    pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("runs/sft")
    tiny_tokenizer.save_pretrained("runs/sft")
    torch.manual_seed(0)
    model = causal_model("Llama")
    ids = torch.randint(3, 67, (4, 6))
    labels = ids.masked_fill(torch.arange(6) < 2, -100)
    hidden = torch.randn(4, 6, 16)
    halves = [torch.tensor([-9.0, -7.0]), torch.tensor([-8.0, -7.5])]
    base = {"model": model, "input_ids": ids, "labels": labels, "chosen_labels": labels[:2]}
    base |= {"logits": torch.randn(4, 6, 67).requires_grad_(), "chosen_logits": torch.randn(2, 6, 67)}
    base |= {"rejected": halves[1], "ref_chosen": halves[0], "ref_rejected": halves[1]}
    base |= {"rc": halves[0], "rr": halves[1], "old_logps": torch.full((4, 6), -4.0), "advantages": torch.ones(4)}
    base |= {"hidden": hidden.clone(), "weight": model.lm_head.weight, "ref_hidden": hidden.clone()}
    base |= {"ref_weight": model.lm_head.weight.detach()}
    shown = []
    base["print"] = lambda *words: shown.extend(" ".join(map(str, words)).split())
    assert len(OTHERS) == 7
    given = {}
    for block in OTHERS:
        given |= base
        if "cu_seqlens" in block:  # the same four rows, end to end
            given |= {"labels": labels.flatten(), "hidden": hidden.flatten(0, 1)}
            given |= {"cu_seqlens": torch.tensor([0, 6, 12, 18, 24])}
        if "DPOConfig(" in block:
            block = block.replace("DPOConfig(", "DPOConfig(use_cpu=True, ")
        shown.clear()
        exec(compile(block, "README.md", "exec"), given)
        said = re.findall(r"^# (.*)", block, re.MULTILINE)
        assert said == [] or " ".join(said) == " ".join(shown)
    assert given["ranked"].explain().count("torch operations") == 1
    for own in ("ratio", "margin"):
        assert re.search(r"program of \d+ steps", given[own].explain())
    assert given["logits"].grad.abs().sum() > 0
    assert torch.isfinite(given["out"].loss)
    assert (tmp_path / "runs" / "dpo" / "model.safetensors").exists()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda line: line.partition("#")[0].strip())
def test_keys_of_the_commands_are_known(command, capfd):
    pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")
    _, name, *words = command.partition("#")[0].split()
    keys = [word.partition("=")[0] for word in words if word.startswith("--")]
    if name == "bench":
        pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark (the extra `dev`)")
    verb = [word for word in words[:1] if word in ("frontier", "hacking", "transfer", "labelers", "head")]
    assert cli.main([name, *verb, "--help"]) == 0
    shown = capfd.readouterr().out
    assert not [key for key in keys if key not in shown and key != "--config"]


def test_the_version_matrix_is_what_is_installed_for_the_tests():
    root = README.parent
    pins = re.findall(r"([a-z-]+)==([\d.]+)", (root / "pyproject.toml").read_text(encoding="utf-8"))
    pins += re.findall(r"(torch)==([\d.]+)", (root / ".ci" / "run").read_text(encoding="utf-8"))
    rows = [line for line in GUIDE_TEXT.splitlines() if line.startswith("| ")]
    for package, name in {"torch": "PyTorch", "trl": "TRL", "liger-kernel": "Liger", "triton": "Triton"}.items():
        (versions,) = {version for pinned, version in pins if pinned == package}
        assert any(name in row.split("|")[1] and versions in row.split("|")[2] for row in rows), (package, versions)


FIRST = """```bash
python3 -m venv .venv && .venv/bin/pip install torch==2.13.0 '.[train]' && .venv/bin/fastalign demo
```

Pass the tests:

```bash
python3 -m venv .venv && .venv/bin/pip install torch==2.13.0 '.[dev]' && .venv/bin/pytest -n logical --dist loadfile
```
"""


def test_readme_is_short_and_opens_with_its_two_commands():
    assert len(TEXT.splitlines()) <= 250
    assert TEXT.startswith("# fastalign\n")
    assert TEXT.index(FIRST) < TEXT.index("\n## ")


@pytest.mark.parametrize(
    "page", ["README.md", ".github/GUIDE.md", ".github/CONTRIBUTING.md", "bench/README.md", "kernels/README.md"]
)
def test_links_lead_somewhere(page):
    path = README.parent / page
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", path.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, link


KERNELS = README.parent / "kernels" / "README.md"


def test_the_derivation_of_the_kernels_is_right():
    """Its block against autograd, for each statistic by itself and for all of them."""
    (block,) = re.findall(r"```python\n(.*?)```", KERNELS.read_text(encoding="utf-8"), re.DOTALL)
    given = {}
    exec(compile(block, "kernels/README.md", "exec"), given)
    draw = torch.Generator().manual_seed(0)
    x, z, weights = (torch.randn(9, generator=draw, dtype=torch.float64) for _ in range(3))
    names = ("logps", "lse", "entropy", "kl", "mean")
    for chosen in (*((name,) for name in names), names):
        leaf = x.clone().requires_grad_()
        log_p, log_q = torch.log_softmax(leaf, -1), torch.log_softmax(z, -1)
        entropy, kl = -(log_p.exp() * log_p).sum(), (log_p.exp() * (log_p - log_q)).sum()
        stats = dict(zip(names, (log_p[2], torch.logsumexp(leaf, -1), entropy, kl, leaf.mean()), strict=True))
        g = {name: weights[k] if name in chosen else torch.zeros_like(z[0]) for k, name in enumerate(names)}
        (wanted,) = torch.autograd.grad(sum(g[name] * stats[name] for name in names), leaf)
        torch.testing.assert_close(given["gradient"](x, z, 2, g), wanted, rtol=1e-12, atol=1e-14)


def test_every_kernel_is_in_the_table_of_files():
    named = re.findall(r"`([\w*]+\.(?:\w+|\*))`", KERNELS.read_text(encoding="utf-8").partition("## Files")[2])
    there = {path.name for path in KERNELS.parent.iterdir() if path.suffix in (".h", ".cpp", ".cu", ".cuh", ".py")}
    found = {name: {path.name for path in KERNELS.parent.glob(name)} for name in named}
    assert [name for name, files in found.items() if not files] == []
    assert there - {"__init__.py"} == set().union(*found.values())
