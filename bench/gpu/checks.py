"""What `gpu_check.py` checks beside plain numbers and graphs: options, losses, the head, sizes, streams, trainers.

Each check takes (device, backend) and returns what it has shown in a line; a failure is a SystemExit that says where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from math import isfinite
from typing import Any

import torch
from gpu.trainers import trainers
from torch import Tensor
from torch.nn import functional as F

import fastalign as fa
from fastalign import Objective, token_objective
from fastalign.kernels.eager import gae_eager
from fastalign.reference import CASES, Sizes, cast

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MARGIN = 1e-6
"""Over eager PyTorch's own error: relative for a number above 1, absolute below."""
VOCABS = (77, 1000, 9001, 40007)
LONG = 2**31
"""Logits of the long check: more than these."""
Results = list[Tensor]


def compare(where: str, exact: Results, plain: Results, ours: Results, share: float = 1.0) -> None:
    """Each result's largest error: at most eager PyTorch's (times a share) and the margin."""
    for e, p, o in zip(exact, plain, ours, strict=True):
        e, p, o = e.double(), p.double(), o.double()
        error, allowed = (o - e).abs().max(), share * (p - e).abs().max() + MARGIN * e.abs().max().clamp(min=1)
        if not error <= allowed:
            raise SystemExit(f"{where}: error {error:.3g}, allowed {allowed:.3g}")


# --------------------------------------------------------------------------------------------------------- statistics
def _two_steps(x: Tensor, z: Tensor | None, labels: Tensor, weights: Tensor, **options: Any) -> Results:
    """Statistics, and the gradient of a random combination of them."""
    x = x.detach().requires_grad_()
    stats = [s for s in fa.token_stats(x, labels, ref_logits=z, kl=z is not None, **options) if s is not None]
    loss = sum((s.double() * w).sum() for s, w in zip(stats, weights.double(), strict=False))
    return [*(s.detach() for s in stats), *torch.autograd.grad(loss, x)]


def options(device: str, backend: str) -> str:
    """Entropy, exact KL, soft-cap, temperature, smoothing, from addresses that are off every vector's width."""
    asked: tuple[dict[str, Any], ...] = (
        {"entropy": True},
        {"softcap": 5.0, "temperature": 0.7},
        {"softcap": 30.0, "entropy": True, "temperature": 1.3},
        {"label_smoothing": 0.1},
    )
    count = 0
    for dtype, vocab, chosen, ref in product(DTYPES, VOCABS, asked, (False, True)):
        g = torch.Generator(device).manual_seed(vocab)
        flat = torch.empty(2, 4 * vocab + 3, device=device).normal_(0, 3, generator=g)
        x = flat[0].to(dtype)[1 : 1 + 4 * vocab].view(4, vocab)
        z = (flat[0] + 0.1 * flat[1]).to(dtype)[3 : 3 + 4 * vocab].view(4, vocab) if ref else None
        labels = torch.randint(vocab, (4,), generator=g, device=device)
        labels[2] = -100
        weights = torch.randn(4, 4, generator=g, device=device)
        with fa.use_backend("eager"):
            exact = _two_steps(x.double(), None if z is None else z.double(), labels, weights, **chosen)
            plain = _two_steps(x, z, labels, weights, **chosen)
        with fa.use_backend(backend):
            compare(f"{dtype}, vocabulary {vocab}, {chosen}, reference {ref}", exact, plain,
                    _two_steps(x, z, labels, weights, **chosen))  # fmt: skip
        count += 1
    return f"right for {count} combinations"


def gae(device: str, backend: str) -> str:
    for rows, length, dtype in ((1, 1, torch.float32), (37, 1300, torch.float32), (64, 333, torch.float64)):
        g = torch.Generator(device).manual_seed(rows)
        rewards, values = (torch.randn(rows, length, generator=g, device=device, dtype=dtype) for _ in range(2))
        mask = torch.rand(rows, length, generator=g, device=device) < 0.8
        exact = list(gae_eager.gae(rewards.double(), values.double(), mask, 0.99, 0.95))
        plain = list(gae_eager.gae(rewards, values, mask, 0.99, 0.95))
        with fa.use_backend(backend):
            ours = list(fa.rl.gae(rewards, values, mask, gamma=0.99, lam=0.95))
        compare(f"{rows} x {length} {dtype}", exact, plain, ours)
    return "right for 3 shapes"


# ------------------------------------------------------------------------------------------------------------- losses
def _loss_and_gradients(function: Callable[..., Tensor], inputs: dict[str, Tensor], leaves: tuple[str, ...]) -> Results:
    inputs = {name: t.detach().clone().requires_grad_(name in leaves) for name, t in inputs.items()}
    loss = function(**inputs)
    found = torch.autograd.grad(loss, [inputs[n] for n in leaves], allow_unused=True) if loss.requires_grad else ()
    gradients = found or [None] * len(leaves)
    zeros = (torch.zeros_like(inputs[n]) if t is None else t for n, t in zip(leaves, gradients, strict=True))
    return [loss.detach().double(), *(t.double() for t in zeros)]


def _relative(got: Results, exact: Results) -> list[float]:
    return [float((g - e).norm() / e.norm().clamp(min=1e-3)) for g, e in zip(got, exact, strict=True)]


def cases(device: str, backend: str) -> str:
    """Every objective against its float64 formula, the root mean square of errors over several batches."""
    sizes = (Sizes(), Sizes(batch=1, length=2, vocab=3, list_length=2), Sizes(5, 4, 130, 6), Sizes(2, 3, 5003, 2))
    served = [case for case in CASES if backend != "cuda" or not _two_models(case.name)]
    for case, dtype in product(served, DTYPES):
        ours, plain = [], []
        for seed, size in enumerate(2 * sizes):
            inputs = cast(case.inputs(size, torch.Generator().manual_seed(seed)), dtype)
            inputs = {name: t.to(device) for name, t in inputs.items()}
            wide = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
            exact = _loss_and_gradients(case.reference, wide, case.leaves)
            plain.append(_relative(_loss_and_gradients(case.reference, inputs, case.leaves), exact))
            with fa.use_backend(backend):
                ours.append(_relative(_loss_and_gradients(case.fused, inputs, case.leaves), exact))
        errors = (torch.tensor(rows, dtype=torch.float64).square().mean(0).sqrt().tolist() for rows in (ours, plain))
        for what, error, allowed in zip(("loss", *case.leaves), *errors, strict=True):
            # In 16 bits the formula itself may overflow: then ours must be as good as the dtype.
            if not error <= (allowed if isfinite(allowed) else torch.finfo(dtype).eps) + MARGIN:
                raise SystemExit(f"{case.name}, {dtype}, {what}: relative error {error:.3g}, eager's {allowed:.3g}")
    return f"right for {len(served)} objectives in {len(DTYPES)} dtypes"


def _two_models(name: str) -> bool:
    """Whether a case compares two models' whole rows, for which CUDA C++ has no kernel and Triton has."""
    return name.startswith("distillation:") and not name.endswith("top_k")


def _head_problem(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    g = torch.Generator(device).manual_seed(0)
    hidden, weight, ref_hidden, ref_weight = (
        torch.empty(size, device=device).normal_(0, std, generator=g).to(dtype)
        for size, std in (((4, 48, 64), 1.0), ((5003, 64), 0.3)) * 2
    )
    labels = torch.randint(5003, (4, 48), generator=g, device=device)
    labels[:, :7] = -100
    return hidden, weight, ref_hidden, ref_weight, labels


def _dpo(policy: Any, reference: Any, labels: Tensor, hidden: Tensor, weight: Tensor) -> Results:
    loss = fa.losses.DPOLoss(beta=0.1)(policy, labels, ref_logits=reference).loss
    return [loss.detach(), *torch.autograd.grad(loss, [t for t in (hidden, weight) if t.requires_grad])]


def _from_logits(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, labels: Tensor, trained: bool):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_(trained)
    return _dpo(F.linear(hidden, weight), F.linear(ref_hidden, ref_weight), labels, hidden, weight)


def _from_head(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    labels: Tensor,
    trained: bool,
    budget: int | None,
    plan: str | None,
) -> Results:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_(trained)
    policy = fa.Head(hidden, weight, chunk_bytes=budget, plan=plan)
    return _dpo(policy, fa.Head(ref_hidden, ref_weight), labels, hidden, weight)


def head(device: str, backend: str) -> str:
    """DPO from hidden states by every plan, against float64 from whole logits."""
    plans: tuple[tuple[str | None, int | None, bool], ...] = (
        (None, None, True), ("keep", None, True), ("recompute", 1 << 18, True), ("objective", 1 << 18, True),
        ("project", 1 << 18, False), ("recompute", 1 << 18, False),
    )  # fmt: skip
    wide = torch.float64
    for dtype, (plan, budget, trained) in product(DTYPES, plans):
        *tensors, labels = _head_problem(device, dtype)

        with fa.use_backend("eager"):
            exact, plain = (_from_logits(*(t.to(kind) for t in tensors), labels, trained) for kind in (wide, dtype))
        with fa.use_backend(backend):
            ours = _from_head(*tensors, labels, trained, budget, plan)
        compare(f"{dtype}, plan {plan}, head trained {trained}", exact, plain, ours, 1.5)
    return f"right for {len(plans)} plans in {len(DTYPES)} dtypes (up to 1.5 times eager's error)"


# -------------------------------------------------------------------------------------------------- sizes and streams
def sizes(device: str, backend: str) -> str:
    """Logits that 32 bits cannot count, and more rows than a grid has in its second axis, equal rows on their own."""
    with fa.use_backend(backend):
        for rows, vocab in ((LONG // 128256 + 65, 128256), (70000, 7)):
            x = torch.empty(rows, vocab, dtype=torch.bfloat16, device=device).normal_(0, 3)
            labels = torch.randint(vocab, (rows,), device=device)
            weight = torch.rand(rows, device=device)
            last = slice(rows - 33, rows)
            alone, inplace = x[last].clone(), fa.token_stats(x.requires_grad_(), labels, inplace_backward=True).logps
            (gradient,) = torch.autograd.grad(inplace, x, weight)
            leaf = alone.clone().requires_grad_()
            logps = fa.token_logps(leaf, labels[last])
            (expected,) = torch.autograd.grad(logps, leaf, weight[last])
            one_launch = token_objective(alone, labels[last], weight[last], Objective("sft"))[1]
            same = torch.equal(logps, inplace[last]) and torch.equal(gradient[last], expected)
            if not same or (one_launch.double() + expected.double()).norm() > 1e-2 * expected.double().norm():
                raise SystemExit(f"{rows} x {vocab}: the last rows differ from the same rows on their own")
            del x, gradient, inplace
    return "rows beyond 2^31 logits and beyond 65,535 rows, the same to the last bit as on their own"


def _calls(labels: Tensor) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    old, advantage = torch.zeros(labels.shape, device=labels.device), torch.ones(labels.shape, device=labels.device)
    ref = torch.zeros(len(labels) // 2, device=labels.device)
    yield "token_logps", lambda x: fa.token_logps(x, labels).sum()
    yield "DPOLoss", lambda x: fa.losses.DPOLoss()(x, labels, ref_chosen_logps=ref, ref_rejected_logps=ref).loss
    yield "SFTLoss", lambda x: fa.losses.SFTLoss()(x, labels).loss
    yield "PPOLoss", lambda x: fa.losses.PPOLoss()(x, labels, old, advantage).loss
    yield "PPOLoss in one launch", lambda x: fa.losses.PPOLoss(fuse_backward=True)(x, labels, old, advantage).loss
    yield "cross_entropy", lambda x: fa.cross_entropy(x.flatten(0, 1), labels.flatten())


def streams(device: str, backend: str) -> str:
    """Losses on a stream that is busy: they are queued behind its work and never wait for it."""
    labels = torch.randint(5003, (4, 16), device=device)
    old, new = (torch.randn(4, 16, 5003, device=device) for _ in range(2))
    with fa.use_backend(backend):
        for name, call in _calls(labels):
            expected = torch.autograd.grad(call(leaf := new.clone().requires_grad_()), leaf)[0]
            x, stream, done = old.clone().requires_grad_(), torch.cuda.Stream(), torch.cuda.Event()
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                torch.cuda._sleep(400_000_000)  # some 0.2 s
                x.data.copy_(new)
                torch.cuda.set_sync_debug_mode("error")
                try:
                    (gradient,) = torch.autograd.grad(call(x), x)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                done.record()
            if done.query():
                raise SystemExit(f"{name}: the call waited for the device")
            torch.cuda.synchronize()
            if not torch.equal(gradient, expected):
                raise SystemExit(f"{name}: another gradient on a busy stream of its own")
    return "six losses queued behind a busy stream, none waits, the same to the last bit"


def compiled(device: str, backend: str) -> str:
    """`torch.compile(fullgraph=True)` of losses, for two lengths."""
    with fa.use_backend(backend):
        for length in (16, 24):
            labels = torch.randint(5003, (4, length), device=device)
            for name, call in list(_calls(labels))[1:4]:
                results = []
                data = torch.randn(4, length, 5003, device=device)
                for function in (call, torch.compile(call, fullgraph=True)):
                    x = data.clone().requires_grad_()
                    loss = function(x)
                    results.append((loss.detach(), *torch.autograd.grad(loss, x)))
                for a, b in zip(*results, strict=True):
                    if not torch.allclose(a, b, rtol=1e-5, atol=1e-6):
                        raise SystemExit(f"{name}: compiled it gives other numbers ({(a - b).abs().max():.3g} apart)")
    return "three losses compiled without a break, as they are without"


CHECKS: dict[str, Callable[[str, str], str]] = {
    "options": options,
    "cases": cases,
    "head": head,
    "gae": gae,
    "sizes": sizes,
    "streams": streams,
    "compiled": compiled,
    "trainers": trainers,
}
