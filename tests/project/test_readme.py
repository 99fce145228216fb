"""The README is short and begins with its two commands; the derivation of the kernels, and what lists their files."""

import re
from pathlib import Path

import torch

README = Path(__file__).resolve().parents[2] / "README.md"
TEXT = README.read_text(encoding="utf-8")

FIRST = """```bash
python3 -m venv .venv && .venv/bin/pip install --no-compile torch==2.13.0 '.[train]' && .venv/bin/fastalign demo
```

Pass the tests:

```bash
python3 -m venv .venv && .venv/bin/pip install torch==2.13.0 '.[dev]' && .venv/bin/pytest -n logical --dist loadfile
```
"""


def test_readme_is_short_and_opens_with_its_two_commands():
    assert len(TEXT.splitlines()) <= 180
    assert TEXT.startswith("# fastalign\n")
    assert TEXT.index(FIRST) < TEXT.index("\n## ")


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
    named = re.findall(r"`([\w*/]+\.(?:\w+|\*))`", KERNELS.read_text(encoding="utf-8").partition("## Files")[2])
    root, kinds = KERNELS.parent, (".h", ".cpp", ".cu", ".cuh", ".py")
    there = {path.relative_to(root) for path in root.rglob("*") if path.suffix in kinds and path.name != "__init__.py"}
    found = {name: {path.relative_to(root) for path in root.glob(name)} for name in named}
    assert [name for name, files in found.items() if not files] == []
    assert there == set().union(*found.values())
