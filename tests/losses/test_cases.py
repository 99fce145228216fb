"""Every objective against its float64 oracle, in every dtype; and that no objective goes without an oracle."""

from __future__ import annotations

import pytest
import torch

from fastalign.losses.preference import F_DIVERGENCES, PAIRWISE
from fastalign.losses.sft import NORMALIZATIONS
from fastalign.reference import CASES, Sizes, cast

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = (Sizes(), Sizes(batch=1, length=2, vocab=3, list_length=2), Sizes(batch=5, length=4, vocab=130, list_length=6))
# The margin over eager torch's own error. The oracle itself is float64, so float64 gets a margin of its own.
MARGIN = {torch.float64: 1e-11, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}


def loss_and_gradients(function, inputs, leaves, dtype=None):
    """The loss and the leaves' gradients as float64; `dtype` casts floats first."""
    inputs = {
        name: (t.to(dtype) if dtype is not None and t.is_floating_point() else t).detach().clone()
        for name, t in inputs.items()
    }
    for name in leaves:
        inputs[name].requires_grad_()
    loss = function(**inputs)
    if loss.requires_grad:  # a batch without a single comparison may be a plain 0
        loss.backward()
    gradients = (torch.zeros_like(inputs[n]) if inputs[n].grad is None else inputs[n].grad for n in leaves)
    return [loss.detach().double(), *(gradient.double() for gradient in gradients)]


def relative(got, want):
    """Norm of the error over the norm of what is right."""
    return [float((g - w).norm() / w.norm().clamp(min=1e-3)) for g, w in zip(got, want, strict=True)]


def rms(rows):
    """Root mean square of each column."""
    return torch.tensor(rows, dtype=torch.float64).square().mean(0).sqrt().tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_less_exact_than_eager(case, dtype):
    """Our error against float64 is at most that of the paper's formula in plain torch, both over several batches: in a
    single batch rounding may happen to favour either."""
    ours, eager = [], []
    for seed in range(2 * len(SIZES)):
        inputs = cast(case.inputs(SIZES[seed % len(SIZES)], torch.Generator().manual_seed(seed)), dtype)
        exact = loss_and_gradients(case.reference, inputs, case.leaves, torch.float64)
        ours.append(relative(loss_and_gradients(case.fused, inputs, case.leaves), exact))
        eager.append(relative(loss_and_gradients(case.reference, inputs, case.leaves), exact))
    for what, error, plain in zip(("loss", *case.leaves), rms(ours), rms(eager), strict=True):
        assert error <= plain + MARGIN[dtype], f"{what}: relative error {error:.2e}, eager's {plain:.2e}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_oracle_is_live(case):
    """An oracle of zero, or without gradient, would pass anything."""
    inputs = case.inputs(Sizes(), torch.Generator().manual_seed(0))
    loss, *gradients = loss_and_gradients(case.reference, inputs, case.leaves)
    assert loss.isfinite()
    assert loss != 0
    assert all(gradient.isfinite().all() and gradient.norm() > 0 for gradient in gradients)


def test_case_names_are_unique():
    names = [case.name for case in CASES]
    assert sorted(names) == sorted(set(names))


def test_every_pairwise_loss_has_a_case():
    assert {case.name.split(":")[1] for case in CASES if case.name.startswith("dpo:")} == set(PAIRWISE)


def test_every_divergence_has_a_case():
    variants = {case.name.removeprefix("dpo:sigmoid:") for case in CASES if case.name.startswith("dpo:sigmoid:")}
    assert set(F_DIVERGENCES) <= variants


def test_every_sft_normalization_has_a_case():
    assert {case.name.split(":")[1] for case in CASES if case.name.startswith("sft:")} == set(NORMALIZATIONS)
