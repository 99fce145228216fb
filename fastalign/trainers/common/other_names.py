"""Keys as other libraries (TRL above all) call them: understood where ours means the same, else answered with ours."""

from __future__ import annotations

from collections.abc import Collection

SAME: dict[str, tuple[str, ...]] = {
    "model_name_or_path": ("model",),
    "sft_model_path": ("model",),
    "dataset_name": ("dataset",),
    "tokenizer_name": ("tokenizer",),
    "tokenizer_name_or_path": ("tokenizer",),
    "torch_dtype": ("dtype",),
    "max_seq_length": ("max_length",),
    "max_completion_length": ("response_length", "max_new_tokens"),
    "max_new_tokens": ("response_length",),
    "num_iterations": ("num_ppo_epochs",),
    "epsilon": ("cliprange",),
    "epsilon_high": ("cliprange_high",),
    "delta": ("dual_clip",),
    "beta": ("kl_coef",),
    "reward_model_path": ("reward_model",),
    "ref_model_name_or_path": ("ref_model",),
    "lora_r": ("lora_rank",),
}
"""Their name → ours of the same meaning; the first that a command has."""

_QUANTISED = "weights stay as they are: --dtype bfloat16 halves them, --lora_rank 16 trains few of them"
OURS: dict[str, str] = {
    "use_peft": "--lora_rank 16 trains LoRA adapters of that rank",
    "load_in_4bit": _QUANTISED,
    "load_in_8bit": _QUANTISED,
    "max_steps": "--total_episodes N ends a run after N responses (a step takes per_device_train_batch_size * "
    "gradient_accumulation_steps * num_mini_batches of each process)",
    "reward_funcs": "--reward_fn file.py:function, or --reward_model FOLDER",
    "reward_weights": "--reward_fn names one function: weigh its parts inside it",
    "dataset_config": "--dataset FOLDER:SPLIT names a split; a configuration is a folder of its own",
    "dataset_train_split": "--dataset FOLDER:SPLIT",
    "dataset_test_split": "--eval_dataset FOLDER:SPLIT",
    "rpo_alpha": "--loss_type rpo --nll_weight W",
    "use_vllm": "responses are sampled by the trainer itself: leave it out",
    "steps_per_generation": "--num_mini_batches N makes N updates of each batch of responses",
    "generation_batch_size": "--per_device_train_batch_size * --gradient_accumulation_steps * --num_mini_batches",
    "stop_token": "responses end at the tokenizer's and the model's own end tokens; see --missing_eos_penalty",
    "model_adapter_name": "--model may be a folder of adapters; --adapters says what becomes of them",
    "trust_remote_code": "code that comes with a model is not run: leave it out",
    "eval_strategy": "--eval_steps N evaluates every N steps",
    "save_strategy": "--save_steps N; null for none",
}
"""Their name → what to say or do here instead, in the commands that have no such key."""


def translate(name: str, ours: Collection[str]) -> str:
    """Our name of the key, or the name itself.

    Raises ValueError with what to use instead, for a key that means something here under no name.
    """
    if name in ours:
        return name
    found = next((own for own in SAME.get(name, ()) if own in ours), None)
    if found is not None:
        return found
    if name in OURS:
        raise ValueError(f"there is no key --{name} here; {OURS[name]}")
    return name
