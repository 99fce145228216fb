"""Every public name that could be imported on 2026-11-30 still can: code outside is written against them."""

import importlib
import sys
import warnings

import pytest

NAMES = {
    "fastalign": """
        Head HeadPlan Objective Packed TokenStats TokenStatsAndExtras attach_gradient backends cross_entropy
        head_plan head_token_stats keep_memory losses packed_sequences release_memory rl sequence_logps token_logps
        token_objective token_stats use_backend
    """,
    "fastalign.losses": """
        DPOLoss KTOLoss KTOOutput ListOutput PPOLoss PROLoss PROOutput PolicyLossOutput PreferenceOutput
        RewardOutput SFTLoss SFTOutput ValueLossOutput best_of_k_loss dpo_loss importance_weights kl_estimate
        kto_loss kwise_reward_loss last_token_scores plackett_luce_loss policy_loss pro_loss ptx_loss reward_loss
        sft_loss value_loss
    """,
    "fastalign.rl": """
        AdaptiveKL FixedKL SchulmanKL ShapedRewards TrustRegion TrustRegionStep conjugate_gradient
        discounted_returns exact_kl gae grpo_advantages masked_whiten rloo_advantages sampled_kl shape_rewards
    """,
    "fastalign.integrations.transformers": """FusedLoss apply_fused_loss fused_lm_loss""",
    "fastalign.integrations.trl": """
        ChunkedLogProbFunction VERSIONS entropy_from_logits patch patched selective_log_softmax
        selective_log_softmax_and_entropy unpatch
    """,
    "fastalign.trainers.sft": """SFTConfig SFTTrainer main""",
    "fastalign.trainers.dpo": """DPOConfig DPOTrainer main""",
    "fastalign.trainers.pro": """PROConfig PROTrainer main""",
    "fastalign.trainers.reward": """
        PAD_TOKEN RewardConfig RewardTrainer load_reward_model main separate_padding split_labelers
    """,
    "fastalign.trainers.ppo": """PPOConfig PPOTrainer main""",
    "fastalign.trainers.grpo": """GRPOConfig GRPOTrainer VARIANTS Variant main""",
    "fastalign.losses.cross_entropy": """cross_entropy""",
    "fastalign.losses.listwise": """FORMS ListOutput PROLoss PROOutput plackett_luce_loss pro_loss""",
    "fastalign.losses.policy": """PPOLoss PolicyLossOutput policy_loss""",
    "fastalign.losses.preference": """
        DPOLoss F_DIVERGENCES NLL_NORMALIZATIONS PAIRWISE PreferenceOutput dpo_loss
    """,
    "fastalign.losses.reward": """
        RewardOutput best_of_k_loss kwise_reward_loss last_token_scores reward_loss
    """,
    "fastalign.losses.sft": """NORMALIZATIONS SFTLoss SFTOutput sft_loss""",
    "fastalign.losses.unpaired": """KTOLoss KTOOutput kto_loss""",
    "fastalign.losses.value": """ValueLossOutput ptx_loss value_loss""",
    "fastalign.ops": """TokenStats TokenStatsAndExtras token_logps token_stats""",
    "fastalign.head": """Head HeadPlan LogitsSource PLANS as_head head_plan head_token_stats""",
    "fastalign.objective": """Objective attach_gradient attach_gradients token_objective""",
    "fastalign.packed": """Packed packed_sequences""",
    "fastalign.memory": """Estimate estimates main""",
    "fastalign.rl.gae": """discounted_returns gae grpo_advantages masked_whiten rloo_advantages""",
    "fastalign.rl.kl": """AdaptiveKL FixedKL SchulmanKL""",
    "fastalign.rl.rewards": """ShapedRewards last_real shape_rewards""",
    "fastalign.rl.trust_region": """TrustRegion TrustRegionStep conjugate_gradient exact_kl sampled_kl""",
}


@pytest.mark.parametrize("module", NAMES)
def test_public_names_can_be_imported(module):
    if module.startswith(("fastalign.trainers", "fastalign.integrations.transformers")):
        pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
        pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = importlib.import_module(module)
        assert not [name for name in NAMES[module].split() if not hasattr(found, name)]


def test_a_moved_module_is_the_new_one_and_says_so(monkeypatch):
    monkeypatch.delitem(sys.modules, "fastalign.packed", raising=False)
    with pytest.warns(DeprecationWarning, match=r"fastalign\.packed is now fastalign\.ops\.packed"):
        old = importlib.import_module("fastalign.packed")
    assert old is importlib.import_module("fastalign.ops.packed")
    assert old.__spec__.name == "fastalign.ops.packed"
