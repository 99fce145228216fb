"""Losses on log-probabilities and scores, and the modules that take logits."""

from .custom import CustomOutput, PairLoss, TokenLoss
from .distillation import DistillationLoss, DistillationOutput, TopK, distillation_loss
from .kl import importance_weights, kl_estimate
from .listwise import ListOutput, PROLoss, PROOutput, plackett_luce_loss, pro_loss
from .policy import PolicyLossOutput, PPOLoss, policy_loss
from .preference import DPOLoss, PreferenceOutput, dpo_loss
from .reward import RewardOutput, best_of_k_loss, kwise_reward_loss, last_token_scores, reward_loss
from .sft import SFTLoss, SFTOutput, sft_loss
from .triple import TPOLoss, TPOOutput, tpo_loss
from .unpaired import KTOLoss, KTOOutput, kto_loss
from .value import ValueLossOutput, ptx_loss, value_loss

__all__ = [
    "CustomOutput",
    "DPOLoss",
    "DistillationLoss",
    "DistillationOutput",
    "KTOLoss",
    "KTOOutput",
    "ListOutput",
    "PPOLoss",
    "PROLoss",
    "PROOutput",
    "PairLoss",
    "PolicyLossOutput",
    "PreferenceOutput",
    "RewardOutput",
    "SFTLoss",
    "SFTOutput",
    "TPOLoss",
    "TPOOutput",
    "TokenLoss",
    "TopK",
    "ValueLossOutput",
    "best_of_k_loss",
    "distillation_loss",
    "dpo_loss",
    "importance_weights",
    "kl_estimate",
    "kto_loss",
    "kwise_reward_loss",
    "last_token_scores",
    "plackett_luce_loss",
    "policy_loss",
    "pro_loss",
    "ptx_loss",
    "reward_loss",
    "sft_loss",
    "tpo_loss",
    "value_loss",
]
