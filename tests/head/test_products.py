"""Products of a head: sums over tiles in float32, rounded once, whatever the processor's 16-bit units are."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

import fastalign as fa
from fastalign import losses
from fastalign._backends import cpu_isas
from fastalign.head import products

NARROW = (torch.bfloat16, torch.float16)
SIZES = [(1, 1, 1), (3, 5, 7), (13, 33, 40), (96, 384, 64), (97, 1000, 33), (5, 385, 4100), (40, 0, 9), (0, 4, 3)]


def factor(rows, columns, dtype, transposed, generator):
    x = torch.randn((columns, rows) if transposed else (rows, columns), generator=generator).to(dtype)
    return x.t() if transposed else x


@pytest.mark.parametrize("isa", cpu_isas())
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sums_of_every_dtype_and_layout(size, isa):
    m, k, n = size
    g = torch.Generator().manual_seed(0)
    wide = (torch.float32, *NARROW)
    for (one, other), at, bt, first in itertools.product(
        itertools.product(wide, repeat=2), (False, True), (False, True), (False, True)
    ):
        a, b = factor(m, k, one, at, g), factor(k, n, other, bt, g)
        before = torch.randn(m, n, generator=g)
        total = before.clone()
        with fa.use_backend("cpu", isa=isa):
            products.add_product(total, a, b, first)
        held = torch.zeros(m, n, dtype=torch.float64) if first else before.double()
        # Of a sum of k + 1 terms, each step of which rounds to float32 (Higham 2002, sec. 3.1).
        bound = (k + 1) * 2**-24 * (a.double().abs() @ b.double().abs() + held.abs()) * 1.01 + 1e-38
        assert ((total.double() - (held + a.double() @ b.double())).abs() <= bound).all()


def gradients(dtype, plan, chunk_bytes, logits_dtype=None, weight_dtype=None):
    """(of hidden, of weight) of a mean of log-probabilities, or of SFT's loss for the plan that needs to know it."""
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(8, 40, 64, generator=g).to(dtype)
    weight = (0.3 * torch.randn(4096, 64, generator=g)).to(dtype)
    labels = torch.randint(0, 4096, (8, 40), generator=g)
    hidden, weight = hidden.requires_grad_(), weight.to(weight_dtype or dtype).requires_grad_()
    if plan == "logits":
        source = hidden @ weight.t()
    else:
        source = fa.Head(hidden, weight, plan=plan, chunk_bytes=chunk_bytes, logits_dtype=logits_dtype)
    loss = losses.SFTLoss()(source, labels, num_items=1).loss
    return torch.autograd.grad(loss, [hidden, weight])


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


CUTS = {
    "columns": ("recompute", 320 * 1024 * 2),
    "columns and rows": ("recompute", 64 * 1024 * 2),
    "parts": ("objective", 40 * 4096 * 2),
    "one part": ("objective", None),
    "kept": ("keep", None),
}


@pytest.mark.parametrize("gemm", ["16bit", "float32"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_plan_is_as_exact_as_one_product(dtype, cut, gemm, monkeypatch):
    monkeypatch.setattr("fastalign.utils.environment.CPU_GEMM", gemm)
    want = gradients(torch.float64, "logits", None)
    whole = gradients(dtype, "logits", None)
    plan, chunk_bytes = CUTS[cut]
    for logits_dtype in (None, torch.float32):
        got = gradients(dtype, plan, chunk_bytes, logits_dtype)
        for mine, one, exact in zip(got, whole, want, strict=True):
            assert mine.dtype == dtype
            assert relative(mine, exact) <= 1.05 * relative(one, exact)


def test_a_wide_weight_keeps_what_16_bits_would_round():
    want = gradients(torch.bfloat16, "logits", None)[1]
    got = gradients(torch.bfloat16, "recompute", 64 * 1024 * 2, weight_dtype=torch.float32)[1]
    assert got.dtype == torch.float32
    assert not torch.equal(got, got.bfloat16().float())
    assert relative(got, want) < 0.01


@pytest.mark.parametrize("cut", ["columns", "columns and rows", "parts"])
def test_threads_change_no_bit(cut):
    plan, chunk_bytes = CUTS[cut]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(gradients(torch.bfloat16, plan, chunk_bytes, torch.float32))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("isa", cpu_isas())
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
def test_other_rows_and_columns_change_no_bit(dtype, isa):
    g = torch.Generator().manual_seed(3)
    a, b = factor(50, 700, dtype, True, g), factor(700, 90, dtype, False, g)
    whole, part = torch.empty(50, 90), torch.empty(13, 41)
    with fa.use_backend("cpu", isa=isa):
        products.add_product(whole, a, b, True)
        products.add_product(part, a[20:33], b[:, 30:71], True)
    assert torch.equal(part, whole[20:33, 30:71])


def noise(logits_dtype, plan):
    g = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(64, 128, generator=g).bfloat16(), torch.randn(2048, 128, generator=g).bfloat16()
    labels = torch.randint(0, 2048, (64,), generator=g)
    found = fa.head_token_stats(
        hidden, weight, labels, plan=plan, chunk_bytes=64 * 1024 * 4 if plan else None, logits_dtype=logits_dtype
    )
    want = fa.token_logps(hidden.double() @ weight.double().t(), labels)
    return float((found.logps.double() - want).abs().max())


@pytest.mark.parametrize("plan", [None, "recompute"])
def test_float32_logits_lose_the_noise_of_16_bits(plan, monkeypatch):
    monkeypatch.setattr("fastalign.utils.environment.CPU_GEMM", "16bit")
    assert noise(None, plan) > 0.02  # logits of some 30, whose last bit in bfloat16 is 1/8
    assert noise(torch.float32, plan) < 2e-5


def test_a_processor_without_16_bit_units_takes_float32_logits(monkeypatch):
    monkeypatch.setattr(products, "slowness", lambda dtype: 40.0)
    assert noise(None, None) < 2e-5
    plan = fa.head_plan(100, 1000, 8, torch.bfloat16)
    assert plan.scratch_bytes == 100 * 1000 * 4
    assert "40 times" in products.advice(torch.bfloat16)
    monkeypatch.setattr(products, "slowness", lambda dtype: 0.5)
    assert fa.head_plan(100, 1000, 8, torch.bfloat16).scratch_bytes == 100 * 1000 * 2
    assert products.advice(torch.bfloat16) is None


@pytest.mark.parametrize("value", ["16bit", "float32"])
def test_the_environment_says_it_instead(value, tmp_path):
    code = "import torch, fastalign as fa; print(fa.head_plan(10, 10, 8, torch.bfloat16).scratch_bytes)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,  # a checkout's root would come before the package that was installed
        env={**os.environ, "FASTALIGN_CPU_GEMM": value},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(found.stdout) == 100 * (2 if value == "16bit" else 4)


def test_the_environment_is_checked(tmp_path):
    found = subprocess.run(
        [sys.executable, "-c", "import fastalign"],
        cwd=tmp_path,
        env={**os.environ, "FASTALIGN_CPU_GEMM": "fp8"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "FASTALIGN_CPU_GEMM must be one of 16bit, float32; got 'fp8'" in found.stderr


@pytest.mark.parametrize(
    ("hidden", "logits", "message"),
    [
        (torch.float64, torch.float32, "must be None, that of hidden, torch.float64; got torch.float32"),
        (torch.bfloat16, torch.float16, "torch.bfloat16, or torch.float32; got torch.float16"),
        (torch.float32, torch.bfloat16, "must be None, that of hidden, torch.float32; got torch.bfloat16"),
    ],
)
def test_other_dtypes_are_refused(hidden, logits, message):
    x = torch.zeros(2, 4, dtype=hidden)
    with pytest.raises(TypeError, match="logits_dtype") as error:
        fa.head_token_stats(x, torch.zeros(5, 4, dtype=hidden), torch.tensor([0, 1]), logits_dtype=logits)
    assert message in str(error.value)


def test_on_cuda_the_sum_is_the_librarys():
    """Without a device an operator can be called on tensors that have no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        a, b = torch.empty(4, 6, dtype=torch.bfloat16, device="cuda"), torch.empty(6, 8, device="cuda").bfloat16()
        total = torch.empty(4, 8, device="cuda")
        products.add_product(total, a, b, True)
        assert (total.shape, total.dtype) == ((4, 8), torch.float32)


def test_on_cuda_the_sum_is_added_to_by_the_librarys(monkeypatch):
    """Its kernel cannot be reached without a device: that the operator is there, and what it is called with."""
    called = {}
    monkeypatch.setattr(torch, "addmm", lambda *given, **options: called.update(given=given, options=options))
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        a, b = torch.empty(4, 6, dtype=torch.bfloat16, device="cuda"), torch.empty(6, 8, device="cuda").bfloat16()
        total = torch.empty(4, 8, device="cuda")
        products.add_product(total, a, b, False)
    assert called["given"][0] is total is called["options"]["out"]
    assert called["options"]["out_dtype"] == torch.float32
    schema = torch.ops.aten.addmm.dtype_out._schema
    assert {"out_dtype", "out"} <= {argument.name for argument in schema.arguments}


def test_a_plan_for_a_device_that_is_not_here():
    plan = fa.head_plan(100, 1000, 8, torch.bfloat16, device="cuda", chunk_bytes=1 << 30)
    assert plan.scratch_bytes == 100 * 1000 * 2
