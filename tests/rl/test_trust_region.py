"""TRPO: its parts against linear algebra, and its promise on a tabular policy and on a small language model."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import fastalign as fa
from fastalign import losses, rl

DELTA = 0.01


# ------------------------------------------------------------------------------------------------------------ its parts
def test_conjugate_gradient_solves():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    matrix, b = root @ root.T + torch.eye(8), torch.randn(8, generator=generator, dtype=torch.float64)
    x = rl.conjugate_gradient(matrix.mv, b, iterations=20, tolerance=1e-24)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b))
    assert (rl.conjugate_gradient(matrix.mv, torch.zeros_like(b)) == 0).all()


def test_step_is_the_natural_gradient():
    """One softmax: the Fisher matrix is diag(p) - p p^T. Undamped but for what makes it invertible, the step is along
    -F^-1 g, and its length is that whose second-order KL is delta."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(5, generator=generator, dtype=torch.float64)
    gains, theta = torch.randn(5, generator=generator, dtype=torch.float64), start.clone().requires_grad_()
    p, damping = torch.softmax(start, 0), 1e-3
    delta = 1e-7  # so short a step that the first try is accepted
    region = rl.TrustRegion([theta], delta=delta * 1.01, cg_iterations=30, damping=damping)
    result = region.step(
        lambda: -(torch.softmax(theta, 0) * gains).sum(),
        lambda: rl.exact_kl(theta[None], start[None], torch.ones(1, dtype=torch.bool)),
    )
    fisher = torch.diag(p) - torch.outer(p, p) + damping * torch.eye(5)
    direction = torch.linalg.solve(fisher, p * (gains - p @ gains))
    expected = direction * torch.sqrt(2 * delta * 1.01 / (direction @ fisher @ direction))
    assert result.accepted
    assert result.backtracks == 0
    torch.testing.assert_close(theta.detach() - start, expected, rtol=1e-4, atol=1e-9)


def test_kl_has_the_fisher_matrix_as_its_hessian():
    """exact_kl twice differentiated is diag(p) - p p^T; sampled_kl, averaged over the old policy's tokens, the same."""
    start = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64)
    p, one = torch.softmax(start, 0), torch.ones(1, dtype=torch.bool)
    fisher = torch.diag(p) - torch.outer(p, p)
    exact = torch.autograd.functional.hessian(lambda x: rl.exact_kl(x[None], start[None], one), start)
    torch.testing.assert_close(exact, fisher)
    old = torch.log_softmax(start, 0)

    def expected(x):
        return sum(p[a] * rl.sampled_kl(torch.log_softmax(x, 0)[a : a + 1], old[a : a + 1], one) for a in range(3))

    torch.testing.assert_close(torch.autograd.functional.hessian(expected, start), fisher)


def test_exact_kl_ignores_hidden_rows():
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 0.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[0.0, 0.0], [0.0, float("nan")]], dtype=torch.float64)
    divergence = rl.exact_kl(logits, old, torch.tensor([True, False]))
    q = torch.softmax(torch.tensor([0.0, 1.0], dtype=torch.float64), 0)
    torch.testing.assert_close(divergence, (0.5 * (0.5 / q).log()).sum())
    divergence.backward()
    assert (logits.grad[1] == 0).all()


# ---------------------------------------------------------------------------------------------------------- its promise
def _keeps_its_promise(result, delta):
    return result.accepted and 0 < result.kl <= delta * 1.01 and result.improvement > 0


@pytest.mark.parametrize("divergence", ["exact", "sampled"])
def test_tabular_policy_improves_monotonically(divergence):
    """A contextual bandit, 6 states and 4 actions, with the true expectation as the surrogate: every step is accepted,
    within delta, and the expected reward rises at each to near the best there is."""
    generator = torch.Generator().manual_seed(2)
    gains = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    theta = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    everything = torch.ones(6, dtype=torch.bool)
    region = rl.TrustRegion([theta], delta=0.05, damping=1e-3)
    curve = [gains.mean().item()]
    for _ in range(14):
        old = torch.log_softmax(theta.detach(), -1)
        advantages = gains - (old.exp() * gains).sum(-1, keepdim=True)

        def surrogate(old=old, advantages=advantages):
            return -(old.exp() * (torch.log_softmax(theta, -1) - old).exp() * advantages).sum(-1).mean()

        def kl(old=old):
            if divergence == "exact":
                return rl.exact_kl(theta, old, everything)
            ratio = torch.log_softmax(theta, -1) - old
            return (old.exp() * losses.kl_estimate(torch.zeros_like(ratio), ratio, kind="k3")).sum(-1).mean()

        result = region.step(surrogate, kl)
        assert _keeps_its_promise(result, 0.05)
        curve.append((torch.softmax(theta.detach(), -1) * gains).sum(-1).mean().item())
    assert all(after > before for before, after in pairwise(curve))
    best = gains.amax(-1).mean().item()
    assert best - curve[-1] < 0.05 * (best - curve[0])


class TinyLM(nn.Module):
    """A GRU over 12 tokens."""

    def __init__(self, vocab=12, width=16):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocab)

    def forward(self, tokens):
        return self.head(self.gru(self.embed(tokens))[0])

    @torch.no_grad()
    def sample(self, batch, length, generator):
        tokens = torch.zeros(batch, 1, dtype=torch.long)
        for _ in range(length):
            probabilities = torch.softmax(self(tokens)[:, -1], -1)
            tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], 1)
        return tokens


@pytest.fixture(scope="module")
def language_model_run():
    """TRPO on the tiny model: rewarded for every even token; its steps, the rewards, and what the steps cost in KL."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(3)
    model = TinyLM().double()
    region = rl.TrustRegion(model.parameters(), delta=DELTA, damping=1e-2)
    steps, rewards, measured = [], [], []
    for _ in range(10):
        tokens = model.sample(256, 8, generator)
        labels, ended = tokens[:, 1:], tokens[:, 1:].eq(11)
        mask = ended.cumsum(-1) - ended.long() == 0  # token 11 ends the sentence
        targets = labels.masked_fill(~mask, -100)
        reward = (labels % 2 == 0).double() * mask
        rewards.append((reward.sum() / mask.sum()).item())
        advantages = rl.masked_whiten(reward, mask)
        with torch.no_grad():
            old_logits = model(tokens[:, :-1])
        old_logps = fa.token_logps(old_logits, targets)

        def surrogate(tokens=tokens, targets=targets, old_logps=old_logps, advantages=advantages):
            module = losses.PPOLoss(kind="trpo")
            return module(model(tokens[:, :-1]), targets, old_logps, advantages).loss

        def kl(tokens=tokens, old_logits=old_logits, mask=mask):
            return rl.exact_kl(model(tokens[:, :-1]), old_logits, mask)

        steps.append(region.step(surrogate, kl))
        with torch.no_grad():
            measured.append(
                fa.token_stats(old_logits, targets, ref_logits=model(tokens[:, :-1]), kl=True).kl[mask].mean()
            )
    return steps, rewards, measured


def test_language_model_steps_keep_the_trust_region(language_model_run):
    """Reported and measured anew through the fused statistics, which know nothing of `exact_kl`."""
    steps, _, measured = language_model_run
    for step, kl in zip(steps, measured, strict=True):
        assert _keeps_its_promise(step, DELTA)
        assert kl.item() == pytest.approx(step.kl, rel=1e-6)


def test_language_model_learns_monotonically(language_model_run):
    """On fresh samples every time: from about a half, which is chance, to nearly all."""
    _, rewards, _ = language_model_run
    assert all(after > before for before, after in pairwise(rewards))
    assert rewards[0] < 0.6
    assert rewards[-1] > 0.9


# -------------------------------------------------------------------------------------------------------- when it fails
def test_nothing_moves_when_no_step_is_accepted():
    theta = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    before, base = theta.detach().clone(), theta.detach().clone()
    stuck = rl.TrustRegion([theta], max_backtracks=3)
    # A KL whose curvature at the start says nothing of the cliff next to it.
    cliff = stuck.step(lambda: theta.sum(), lambda: (theta - base).square().sum() + 100.0 * (theta != base).any())
    assert not cliff.accepted
    assert cliff.backtracks == 4
    assert torch.equal(theta, before)
    flat = stuck.step(lambda: (theta * 0).sum(), lambda: (theta - base).square().sum())
    assert flat == (False, 0.0, 0.0, 0.0, 0.0, 0)
    assert torch.equal(theta, before)


def test_line_search_shortens_a_step_that_overshoots():
    """|theta| falls along its gradient only until 0: a quadratic KL would allow a step four times as long."""
    theta = torch.tensor([0.05], dtype=torch.float64, requires_grad=True)
    region = rl.TrustRegion([theta], delta=0.01, damping=0.0)
    result = region.step(lambda: theta.abs().sum(), lambda: 0.5 * (theta - 0.05).square().sum())
    assert result.accepted
    assert result.backtracks == 1
    assert abs(theta.item()) < 0.05
    assert result.improvement == pytest.approx(0.05 - abs(theta.item()))


def test_parameters_that_play_no_part_stay():
    used, unused = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    frozen = torch.ones(2)
    region = rl.TrustRegion([used, unused, frozen], damping=0.1)
    assert region.step(lambda: used.sum(), lambda: (used - 1).square().sum()).accepted
    assert (used != 1).all()
    assert (unused == 1).all()
    assert (frozen == 1).all()


def test_fused_statistics_in_the_kl_are_refused_with_the_way_out():
    x = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    labels, base = torch.zeros(1, dtype=torch.long), torch.zeros(1, 4, dtype=torch.float64)
    region = rl.TrustRegion([x])
    with pytest.raises(RuntimeError, match=r"once only.*log_softmax"):
        region.step(
            lambda: -fa.token_logps(x, labels).sum(),
            lambda: fa.token_stats(x, labels, ref_logits=base, kl=True).kl.sum(),
        )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: rl.TrustRegion([]), ValueError, "params must hold at least one tensor that requires a gradient"),
        (lambda x: rl.TrustRegion([x.detach()]), ValueError, "params must hold at least one"),
        (lambda x: rl.TrustRegion(["x"]), TypeError, "params must be tensors; got str"),
        (lambda x: rl.TrustRegion([x], delta=0.0), ValueError, r"delta must be in \(0"),
        (lambda x: rl.TrustRegion([x], backtrack=1.0), ValueError, "backtrack must be in"),
        (lambda x: rl.TrustRegion([x], damping=-1.0), ValueError, "damping must be in"),
        (lambda x: rl.TrustRegion([x]).step(lambda: x, x.sum), ValueError, "surrogate_fn must have shape"),
        (lambda x: rl.TrustRegion([x]).step(x.sum, lambda: x.sum() / 0), ValueError, "kl_fn must be finite"),
        (lambda x: rl.exact_kl(x, x[:1], x > 0), ValueError, "old_logits must have shape"),
        (lambda x: rl.sampled_kl(x, x, x), TypeError, "mask must be a boolean tensor"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(2, requires_grad=True))
