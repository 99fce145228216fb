"""Loss programs in CUDA, run by a PTX simulator through the real launch code: one launch between forward and backward,
whose loss, metrics and gradients are the CPU's."""

import importlib
from pathlib import Path

import pytest
import torch

import fastalign as fa
from fastalign import losses

BENCH = Path(__file__).resolve().parents[2] / "bench"
SIMULATION = {"check_uninit": True, "check_races": True}
B, T, V = 6, 5, 37


def problem(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(B, T, V, generator=g)).to(dtype)
    labels = torch.randint(0, V, (B, T), generator=g)
    labels[0, :3] = -100
    labels[4] = -100
    return logits, labels


def numbers(*size, seed, scale=1.0, shift=0.0):
    return shift + scale * torch.randn(*size, generator=torch.Generator().manual_seed(seed))


HALF = numbers(B // 2, seed=1, scale=3, shift=-15)
PAIR = {"ref_chosen_logps": HALF, "ref_rejected_logps": HALF - 1}
OLD = numbers(B, T, seed=2, shift=-4)
POLICY = {"old_logps": OLD, "advantages": numbers(B, seed=3)}
REFERENCE = {"ref_logps": OLD}
REWARDS = {"rewards": torch.tensor([[2.0, 1.0, 0.5], [0.5, 1.0, 1.0]])}
MODULES = {
    "sft": (losses.SFTLoss, {"z_loss": 1e-2, "label_smoothing": 0.1}, {}),
    "sft by sequence": (losses.SFTLoss, {"normalization": "sequence"}, {}),
    "dpo": (losses.DPOLoss, {}, PAIR),
    "dpo in float64": (losses.DPOLoss, {}, {name: x.double() for name, x in PAIR.items()}),
    "dpo, length": (losses.DPOLoss, {"length_alpha": 0.1}, PAIR),
    "ipo": (losses.DPOLoss, {"loss_type": "ipo_avg"}, PAIR),
    "rpo": (losses.DPOLoss, {"loss_type": "rpo"}, PAIR),
    "orpo": (losses.DPOLoss, {"loss_type": "orpo"}, {}),
    "pro": (losses.PROLoss, {"sft_weight": 0.1}, REWARDS),
    "infonce": (losses.PROLoss, {"form": "infonce"}, REWARDS),
    "ppo": (losses.PPOLoss, {"dual_clip": 3.0, "entropy_coef": 0.01}, POLICY),
    "grpo": (losses.PPOLoss, {"normalization": "grpo", "kl_coef": 0.1, "kl_estimator": "k3"}, POLICY | REFERENCE),
    "gspo": (losses.PPOLoss, {"kind": "gspo"}, POLICY),
    "cispo": (losses.PPOLoss, {"kind": "cispo", "cliprange": 1.0}, POLICY),
    "importance": (losses.PPOLoss, {"importance_level": "sequence"}, POLICY | {"sampler_logps": OLD - 0.1}),
    "kto": (losses.KTOLoss, {}, {"desirable": torch.arange(B) % 2 == 0, "ref_logps": numbers(B, seed=5, shift=-12)}),
    "custom": (losses.TokenLoss, {"formula": lambda t: -t.logps * t.entropy}, {}),
}  # fmt: skip


def outcome(module, logits, labels, given, factor=1.0):
    leaf = logits.clone().requires_grad_()
    out = module(leaf, labels, **given)
    (gradient,) = torch.autograd.grad(factor * out.loss, leaf)
    return [t for t in out if isinstance(t, torch.Tensor)], gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_results_are_the_cpus_in_four_launches(name, dtype, cuda_simulator):
    kind, options, given = MODULES[name]
    logits, labels = problem(dtype)
    want, want_gradient = outcome(kind(**options), logits, labels, given, 0.5)
    with cuda_simulator(**SIMULATION) as launches, cuda_simulator.raising():
        got, gradient = outcome(kind(**options), logits, labels, given, 0.5)
    kernels = [launch.kernel for launch in launches]
    assert sum("loss_kernel" in kernel for kernel in kernels) == 1, kernels
    assert len(kernels) == 3, kernels  # forward, loss, backward; torch scales the derivatives in a fourth
    assert len(got) == len(want)
    for mine, other in zip(got, want, strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=2e-6, atol=1e-6)
    wide, exact = gradient.double(), want_gradient.double()
    assert float((wide - exact).norm() / exact.norm()) < (1e-6 if dtype == torch.float32 else 2e-3)


def test_many_tokens_and_threads(cuda_simulator):
    """More tokens than threads, more sequences than warps, sequences longer than a warp."""
    g = torch.Generator().manual_seed(4)
    logits, labels = torch.randn(18, 40, 3, generator=g), torch.randint(0, 3, (18, 40), generator=g)
    labels[torch.rand(18, 40, generator=g) < 0.2] = -100
    half = numbers(9, seed=6, scale=2, shift=-30)
    pair = {"ref_chosen_logps": half, "ref_rejected_logps": half}
    policy = {"old_logps": numbers(18, 40, seed=7, scale=0.1, shift=-1), "advantages": numbers(18, seed=8)}
    for module, given in (
        (losses.DPOLoss(loss_type="rpo", nll_normalization="sequence"), pair),
        (losses.PPOLoss(kind="gspo"), policy),
    ):
        want, want_gradient = outcome(module, logits, labels, given)
        with cuda_simulator(**SIMULATION), cuda_simulator.raising():
            got, gradient = outcome(module, logits, labels, given)
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(gradient, want_gradient, rtol=1e-5, atol=1e-9)


def test_a_loss_of_each_sequence(cuda_simulator):
    logits, labels = problem()
    upstream = numbers(B, seed=9)
    leaf = logits.clone().requires_grad_()
    want = fa.sequence_logps(leaf, labels)
    (want_gradient,) = torch.autograd.grad(want, leaf, upstream)
    with cuda_simulator(**SIMULATION) as launches, cuda_simulator.raising():
        found = fa.sequence_logps(leaf, labels)
        (gradient,) = torch.autograd.grad(found, leaf, upstream)
    assert len(launches) == 3
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-5, atol=1e-8)


def test_nothing_counts(cuda_simulator):
    logits, labels = problem()
    labels[:] = -100
    with cuda_simulator(**SIMULATION), cuda_simulator.raising():
        out, gradient = outcome(losses.SFTLoss(), logits, labels, {})
        assert fa.cross_entropy(logits.flatten(0, 1), labels.flatten()).isnan()
    assert float(out[0]) == 0
    assert not gradient.any()


def test_statistics_of_a_head_take_the_program_too(cuda_simulator):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(B, T, 8, generator=g), torch.randn(V, 8, generator=g).requires_grad_()
    _, labels = problem()
    module = losses.DPOLoss()
    want = module(fa.Head(hidden, weight), labels, **PAIR)
    (want_gradient,) = torch.autograd.grad(want.loss, weight)
    with cuda_simulator(**SIMULATION) as launches, cuda_simulator.raising():
        got = module(fa.Head(hidden, weight), labels, **PAIR)
        (gradient,) = torch.autograd.grad(got.loss, weight)
    assert sum("loss_kernel" in launch.kernel for launch in launches) == 1
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-5, atol=1e-8)


def test_beyond_a_blocks_worth_of_tokens_torchs_operations_take_its_place(cuda_simulator, monkeypatch):
    monkeypatch.setattr("fastalign._backends.cuda.PROGRAM_TOKENS", B * T - 1)
    logits, labels = problem()
    want, _ = outcome(losses.SFTLoss(), logits, labels, {})
    with cuda_simulator(**SIMULATION) as launches, cuda_simulator.raising():
        got, _ = outcome(losses.SFTLoss(), logits, labels, {})
    assert not any("loss_kernel" in launch.kernel for launch in launches)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["SFT", "DPO", "PRO", "PPO", "PPO with entropy", "GRPO"])
def test_launches_and_torchs_operations_together(name, cuda_simulator, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    launches = importlib.import_module("launches")
    loss, limit = launches.cases()[name]
    ours, others = launches.launches(cuda_simulator, loss)
    assert ours + len(others) <= limit, others
    assert launches.cases().keys() == {"SFT", "DPO", "PRO", "PPO", "PPO with entropy", "GRPO"}
