"""What PPO and GRPO share: rollouts, rewards, updates, checkpoints."""
