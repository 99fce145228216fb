"""The counts of bench/counts.py are within their limits, and what they count is found where it is."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load():
    spec = importlib.util.spec_from_file_location("counts_under_test", ROOT / "bench" / "counts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


counts = load()
STRUCTURE = (
    "ways from a model's logits into the kernels",
    "ways from two models' logits into them",
    "classes of autograd.Function",
    "m.def in csrc/bindings.cpp",
)

COPIES = {
    "copies of PPO-clip": {
        "fastalign/losses/own.py": "def f(r, a, low, high):\n"
        "    return torch.min(r * a, r.clamp(1 - low, 1 + high) * a)\n",
        "kernels/own.h": "float slope(float r, float a) {\n    const float cut = clamp(r, 1 - o.low, 1 + o.high);\n"
        "    const float plain = -a * r;\n    return -a * cut > plain ? 0 : plain;\n}\n",
        "kernels/own_triton.py": "def slope(r, a, low, high):\n"
        "    cut = tl.minimum(tl.maximum(r, 1.0 - low), 1.0 + high)\n"
        "    return tl.where(-a * cut > plain, 0.0, plain)\n",
    },
    "copies of DPO's sigmoid": {
        "fastalign/losses/own.py": "def f(z, e):\n    return (1 - e) * -F.logsigmoid(z) - e * F.logsigmoid(-z)\n",
        "kernels/own.h": "double loss(double z) { return right * softplus(-z) + wrong * softplus(z); }\n",
        "fastalign/rl/own.py": "def f(z, e):\n    return (e - 1) * F.logsigmoid(z) - e * F.logsigmoid(-z)\n",
        "csrc/own.cpp": "double slope(double z) { return wrong * sigmoid(z) - right * sigmoid(-z); }\n",
    },
    "copies of k1, k2, k3": {
        "fastalign/losses/own.py": "def k3(d):\n    return torch.expm1(-d) + d\n",
        "fastalign/rl/own.py": "def k3(d):\n    return torch.exp(-d) - 1 + d\n",
        "kernels/own.cu": "return std::expm1(-d) + d;\n",
    },
}
INNOCENT = {
    "fastalign/losses/cispo.py": "def f(r, a, low, high):\n    return -r.clamp(1 - low, 1 + high).detach() * a\n",
    "fastalign/losses/robust.py": '''def f(z, e):
    """-(1 - e) log sigmoid(z) - e log sigmoid(-z), but for (1 - e) * l - e * logsigmoid(-z)
    torch.expm1(-d) + d"""
    return (e * F.logsigmoid(-z) - (1 - e) * F.logsigmoid(z)) / (1 - 2 * e)  # torch.expm1(-d)
''',
    "kernels/own_triton.py": "def f(r, low, high):\n    return tl.minimum(tl.maximum(r, 1.0 - low), 1.0 + high)\n",
    "kernels/own.h": "// std::expm1(-d) + d\nfloat tanh_of(float x) { return expm1f(-2 * x); }\n",
    "fastalign/reference/own.py": "def k3(d):\n    return torch.expm1(-d) + d\n",
}


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("row", counts.structure(ROOT) + counts.copies(ROOT), ids=lambda row: row.what)
def test_source_text(row):
    assert 0 < row.count <= row.limit, "\n".join(row.found)


@pytest.mark.parametrize("what", COPIES)
def test_a_copy_is_found_with_its_place(what, tmp_path):
    write(tmp_path, INNOCENT)
    assert [row.count for row in counts.copies(tmp_path)] == [0, 0, 0]
    write(tmp_path, COPIES[what])
    (row,) = (row for row in counts.copies(tmp_path) if row.what == what)
    assert row.count == len(COPIES[what])
    assert {place.rpartition(":")[0] for place in row.found} == set(COPIES[what])


def test_another_way_node_and_entry_are_found(tmp_path):
    for folder in ("fastalign", "csrc"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("kernels", "*.so", "__pycache__")
        )
    before = {row.what: row.count for row in counts.structure(tmp_path)}
    cpu, bindings = tmp_path / "fastalign" / "_backends" / "cpu.py", tmp_path / "csrc" / "bindings.cpp"
    cpu.write_text(cpu.read_text(encoding="utf-8") + "\n\ndef shortcut(logits, labels):\n    pass\n", encoding="utf-8")
    own = "cpu, n = _backends.direct(logits), 1\n    return cpu.shortcut(logits, labels)"
    node = "class _Own(torch.autograd.Function):\n    pass\n"
    write(tmp_path, {"fastalign/ops/own.py": f"def f(logits, labels):\n    {own}\n\n\n{node}"})
    text = bindings.read_text(encoding="utf-8").replace('    m.def("gae"', '    m.def("own", &own);\n    m.def("gae"')
    bindings.write_text(text, encoding="utf-8")
    after = {row.what: row.count for row in counts.structure(tmp_path)}
    both = "ways from two models' logits into them"  # have names of their own
    assert after == {what: count + (what != both) for what, count in before.items()}
    assert tuple(after) == STRUCTURE


def test_calls_and_operations_are_counted():
    import torch

    x = torch.ones(3)

    def inner():
        return x + x

    assert counts.tensor_operations(lambda: x + x + x) == 2
    assert counts.python_calls(lambda: inner() + inner()) == 2
    assert sys.getprofile() is None


def test_tensor_operations_of_a_step():
    needs_the_module()
    for row in counts.operations():
        assert 0 < row.count <= row.limit, row


def test_one_option_more_is_no_cliff():
    needs_the_module()
    for row in counts.options():
        assert 0 < row.count <= row.limit, row


def needs_the_module():
    import fastalign

    if fastalign.backends()["cpu"] != "available":
        pytest.skip("needs the compiled module fastalign._C")
