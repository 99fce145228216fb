"""Short programs that run as they are, each on a model made in the process; nothing is downloaded.

    python -m fastalign.examples.bare_loop               a loop of your own: DPOLoss on hidden states and a head
    python -m fastalign.examples.custom_loss             losses of your own: TokenLoss and PairLoss
    python -m fastalign.examples.transformers_trainer    transformers' Trainer with apply_fused_loss
    python -m fastalign.examples.trl_dpo                 TRL's DPOTrainer with patch()
    python -m fastalign.examples.ppo_reward              PPO with a function as the reward

The first two need torch alone. Each ends with one line of result, and takes seconds on two cores.
"""
