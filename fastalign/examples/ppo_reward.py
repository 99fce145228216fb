"""PPO with a function as the reward: responses are sampled, scored by it, and made likelier or less likely.

    python -m fastalign.examples.ppo_reward

The reward is the share of a response's characters that are lower-case letters; a tiny GPT-2 with fresh weights starts
with few of them. Needs the extra `train`.
"""

from __future__ import annotations

import sys
import tempfile

from fastalign.examples.tiny import PAIRS, run, tiny_model, tiny_tokenizer


def letters(completions: list[str]) -> list[float]:
    """A reward takes the responses' texts (and prompts, and columns of the rows, by their names): a number for each."""
    return [sum("a" <= c <= "z" for c in text) / max(len(text), 1) for text in completions]


def main(episodes: int = 768) -> str:
    from fastalign.trainers.common.callbacks import LOG_NAME, read_log
    from fastalign.trainers.ppo import PPOConfig, PPOTrainer

    tokenizer = tiny_tokenizer()
    prompts = [{"prompt": pair["prompt"]} for pair in PAIRS]
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(
            output_dir=folder,
            total_episodes=episodes,
            response_length=8,
            per_device_train_batch_size=32,
            num_ppo_epochs=2,
            learning_rate=3e-3,
            kl_coef=0.01,
            logging_steps=1,
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = PPOTrainer(tiny_model(tokenizer), args, prompts, processing_class=tokenizer, reward=letters)
        trainer.train()
        log = read_log(f"{folder}/{LOG_NAME}")
    first, last = (log[at]["objective/scores"] for at in (0, -1))
    return f"PPO over {episodes} responses: share of lower-case letters {first:.2f} -> {last:.2f}"


if __name__ == "__main__":
    sys.exit(run(main, "train"))
