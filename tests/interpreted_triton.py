"""The Triton backend in Triton's interpreter, on CPU tensors; `test_triton.py` runs this file with TRITON_INTERPRET=1.

Not named test_*: in a process of its own, since Triton decides at import whether it interprets.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

import fastalign as fa
from fastalign import _backends
from fastalign.reference import CASES, Sizes, cast

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of -inf - -inf and overflow to inf
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MARGIN = 1e-6  # over torch's own error
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


# ------------------------------------------------------------------------------------------ a better interpreter
class _Nothing:
    def restore(self):
        pass


@pytest.fixture(autouse=True, scope="session")
def interpreter_like_a_gpu():
    """Conversions to bfloat16 round (the interpreter cuts off), and helpers called by a kernel are fast: the
    interpreter prepares the language anew for each call of each helper, which takes 2 ms."""
    patch_language, convert = interpreter._patch_lang, interpreter._convert_float
    done = set()

    def patch_once(function):
        key = "tl" in function.__globals__
        if key not in done:
            done.add(key)
            patch_language(function)
        return _Nothing()

    def round_to_bfloat16(data, source, target, mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.int16)
            return rounded.numpy().view(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.astype(np.uint32) << 16
        return convert(data, source, target, mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        patch.setattr(interpreter, "_convert_float", round_to_bfloat16)
        object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)
        yield


@pytest.fixture(autouse=True)
def on_triton():
    with fa.use_backend("triton"):
        yield


def test_the_backend_serves_cpu_tensors_when_interpreted():
    assert _backends.choose(torch.empty(1)) == "triton"
    assert fa.backends()["triton"] == "available"
    with pytest.raises(RuntimeError, match=r"backend 'triton' serves float32.*got torch\.float64"):
        fa.token_logps(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.long))


# ---------------------------------------------------------------------------------------------------- objectives
def losses(function, inputs, leaves, dtype=None):
    inputs = {
        name: (t.to(dtype) if dtype is not None and t.is_floating_point() else t).detach().clone()
        for name, t in inputs.items()
    }
    for name in leaves:
        inputs[name].requires_grad_()
    loss = function(**inputs)
    if loss.requires_grad:
        loss.backward()
    gradients = (torch.zeros_like(inputs[n]) if inputs[n].grad is None else inputs[n].grad for n in leaves)
    return [loss.detach().double(), *(gradient.double() for gradient in gradients)]


def relative(got, want):
    return [float((g - w).norm() / w.norm().clamp(min=1e-3)) for g, w in zip(got, want, strict=True)]


def rms(rows):
    return torch.tensor(rows, dtype=torch.float64).square().mean(0).sqrt().tolist()


SIZES = (
    Sizes(batch=2, length=3),
    Sizes(batch=1, length=2, vocab=3, list_length=2),
    Sizes(batch=2, length=2, vocab=1301, list_length=2),
)
# The reference of few losses alone touches logits; the others start from log-probs or scores and meet no kernel.
WITH_LOGITS = [case for case in CASES if "logits" in case.leaves]


@each_dtype
@pytest.mark.parametrize("case", WITH_LOGITS, ids=lambda case: case.name)
def test_no_less_exact_than_eager(case, dtype):
    ours, eager = [], []
    for seed, sizes in enumerate(SIZES):
        inputs = cast(case.inputs(sizes, torch.Generator().manual_seed(seed)), dtype)
        exact = losses(case.reference, inputs, case.leaves, torch.float64)
        with fa.use_backend("eager"):
            eager.append(relative(losses(case.reference, inputs, case.leaves), exact))
        ours.append(relative(losses(case.fused, inputs, case.leaves), exact))
    for what, error, plain in zip(("loss", *case.leaves), rms(ours), rms(eager), strict=True):
        assert error <= plain + MARGIN, f"{what}: relative error {error:.2e}, eager's {plain:.2e}"
