"""The memory that is predicted is the memory that is taken."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from fastalign import memory

# Large enough that what a GEMM keeps whatever its size (2.6 MB with AMX tiles) is within the tenth.
TOKENS, VOCAB, HIDDEN = 768, 32000, 64
MEASURE = """
import ctypes, gc, sys
import torch
import fastalign as fa
from pathlib import Path

tokens, vocab, hidden = (int(n) for n in sys.argv[1:4])
name, budget, dtype = sys.argv[4], int(sys.argv[5]), getattr(torch, sys.argv[6])
ctypes.CDLL(None).mallopt(-3, 128 << 10)  # large blocks are given back when freed
x = torch.randn(tokens, hidden).to(dtype).requires_grad_()
w = torch.randn(vocab, hidden).to(dtype).requires_grad_(name != "project")
labels = torch.randint(0, vocab, (tokens,))

def run():
    if name == "objective":
        head = fa.Head(x.view(-1, 32, hidden), w, plan=name, chunk_bytes=budget)
        return torch.autograd.grad(fa.losses.SFTLoss()(head, labels.view(-1, 32)).loss, [x, w])
    if name == "eager":
        logps = torch.log_softmax(x @ w.t(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    else:
        logps = fa.head_token_stats(x, w, labels, plan=name, chunk_bytes=budget).logps
    return torch.autograd.grad(logps.sum(), [t for t in (x, w) if t.requires_grad])

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

run()
gc.collect()
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
result = run()
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["eager", "keep", "recompute", "project", "objective"])
def test_prediction_within_a_tenth(name, dtype):
    budget = 32 << 20
    found = memory.estimates(TOKENS, VOCAB, HIDDEN, getattr(torch, dtype), frozen=name == "project", chunk_bytes=budget)
    (predicted,) = [e.peak for e in found if e.name == name]
    arguments = [*map(str, (TOKENS, VOCAB, HIDDEN)), name, str(budget), dtype]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=tempfile.gettempdir(),
        env=os.environ | {"FASTALIGN_KEPT_MIB": "0"},
    )
    assert int(done.stdout) == pytest.approx(predicted, rel=0.1)


def test_the_table(capsys):
    sizes = ["--vocab", "1000", "--hidden", "64", "--batch", "4", "--length", "128", "--dtype", "float32"]
    assert memory.main([*sizes, "--live", "0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "512 tokens, 256 of them valid, V = 1,000, H = 64, float32"
    assert [line.split()[0] for line in lines[3:]] == ["eager", "keep", "recompute", "objective"]
    with pytest.raises(SystemExit):
        memory.main(["--batch", "1", "--length", "1"])


SIZES = "--vocab 50 --hidden 8 --batch 1 --length 8"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "--model ./absent --batch 1 --length 8",
            "--model must be a folder with config.json, or a hub's name; got './ab",
        ),
        (
            "--model absent --batch 1 --length 8",
            "--model must be a folder with config.json, or a hub's name; got 'absent",
        ),
        ("--model . --batch 1 --length 8", "--model must be a folder with config.json, or a hub's name; got '.'"),
        ("--vocab 50 --batch 1 --length 8", "either --model, or --vocab and --hidden, must be given"),
        (f"{SIZES} --model m", "either --model, or --vocab and --hidden, must be given"),
        (f"{SIZES} --batch 0", "argument --batch: must be above 0; got 0"),
        (f"{SIZES} --valid 2", "argument --valid: must be in (0, 1]; got 2"),
        (f"{SIZES} --chunk_bytes -1", "argument --chunk_bytes: must be above 0; got -1"),
    ],
)
def test_mistakes_name_the_argument(line, message, capsys, monkeypatch, tmp_path):
    pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no hub is asked for 'absent'
    with pytest.raises(SystemExit) as stopped:
        memory.main(line.split())
    assert stopped.value.code == 2
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert message in last
