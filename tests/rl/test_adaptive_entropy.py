"""The adaptive coefficient of the entropy bonus against TRL's, run live where it is installed."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from fastalign import rl


def test_matches_trl_batch_after_batch():
    """The coefficient, and the bonus that a batch is given: that of a loss whose advantages are 0."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="trl is not installed").GRPOTrainer
    entropies = [1.0, 0.5, 0.3, 0.29, 0.2, 0.31, 0.1, 0.1, 0.9, 0.9, 0.9, 0.9, 0.05]
    given = SimpleNamespace(entropy_target=0.3, entropy_coef_delta=0.02, entropy_coef_min=0.01, entropy_coef_max=0.09)
    given.delta, given.use_bias_correction_kl = None, False
    ours = rl.AdaptiveEntropy(0.05, target=0.3, delta=0.02, low=0.01, high=0.09)
    ids = torch.zeros(2, 3, dtype=torch.long)
    same = {"gather": lambda x: x, "reduce": lambda x, reduction: x, "sync_gradients": True, "num_processes": 1}
    now = {}
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (torch.zeros(2, 3), now["entropy"], None),
        _metrics={"train": defaultdict(list)},
        _entropy_bonus_enabled=True,
        _entropy_window_stats=None,
        _last_world_entropy=float("inf"),
        accelerator=SimpleNamespace(**same),
        args=given,
        aux_loss_enabled=False,
        beta=0.0,
        current_gradient_accumulation_steps=1,
        entropy_coef=0.05,
        epsilon_low=0.2,
        epsilon_high=0.2,
        importance_sampling_level="token",
        loss_type="bnpo",
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_adaptive_entropy=True,
        use_vllm=False,
    )
    inputs = dict.fromkeys(("prompt_ids", "completion_ids"), ids)
    inputs |= dict.fromkeys(("prompt_mask", "completion_mask"), ids + 1) | {"advantages": torch.zeros(2)}
    applied = set()
    for entropy in entropies:
        now["entropy"] = torch.full((2, 3), entropy, dtype=torch.float64)
        bonus = -trainer._compute_loss(stub, None, inputs).item() / entropy
        assert bonus == pytest.approx(ours.value)
        applied.add(round(bonus, 6))
        ours.update(entropy)
        assert ours.coefficient == pytest.approx(stub.entropy_coef)
    assert len(applied) > 3
