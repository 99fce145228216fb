"""Keys as other libraries (TRL above all) call them: understood where ours means the same, else answered with ours.

One table for the command line and for the configuration classes in Python.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

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
    "teacher_model_name_or_path": ("teacher_model",),
    "lora_r": ("lora_rank",),
    "f_divergence_type": ("f_divergence",),
    "clip_ratio": ("cliprange",),
    "clip_ratio_low": ("cliprange",),
    "clip_ratio_high": ("cliprange_high",),
    "kl_loss_coef": ("kl_coef",),
    "kl_loss_type": ("kl_estimator",),
    "loss_mode": ("loss_type", "objective"),
    "tau_pos": ("sapo_temperature_pos",),
    "tau_neg": ("sapo_temperature_neg",),
    "ppo_kl_coef": ("kl_cov_coef",),
    "vllm_importance_sampling_clip_max": ("rollout_is_threshold",),
    "vllm_importance_sampling_cap": ("rollout_is_threshold",),
    "vllm_importance_sampling_clip_min": ("rollout_is_threshold_lower",),
}
"""Their name → ours of the same meaning; the first that a command has."""

_ANSWERS: dict[str, str] = {
    "{models} are the folders of the models that are compared": "model_name_or_path",
    "{lora_rank=16} trains LoRA adapters of that rank": "use_peft",
    "weights stay as they are: {dtype=bfloat16} halves them, {lora_rank=16} trains few of them": "load_in_4bit "
    "load_in_8bit bnb_4bit_quant_type bnb_4bit_quant_storage use_bnb_nested_quant",
    "a trainer's peft_config, in Python, takes any of peft's configurations": "use_rslora use_dora lora_task_type "
    "lora_modules_to_save lora_target_parameters",
    "{total_episodes=N} ends a run after N responses (a step takes {per_device_train_batch_size} * "
    "{gradient_accumulation_steps} * {num_mini_batches} of each process)": "max_steps",
    "{max_length=N} bounds prompt and completion together": "max_completion_length",
    "{max_prompt_length=N} bounds the prompt, {response_length=N} the completion": "max_length",
    "{reward_fn=FILE.py:NAME}, or {reward_model=FOLDER}": "reward_funcs",
    "{reward_fn} names functions: bound their numbers inside them": "reward_clip_range",
    "{adv_estimator=gdpo} standardises each reward by itself": "multi_objective_aggregation",
    "rewards are of commands that sample: leave it out": "reward_weights",
    "{dataset=FOLDER:SPLIT} names a split; a configuration is a folder of its own": "dataset_config",
    "{dataset=FOLDER:SPLIT}": "dataset_train_split",
    "{eval_dataset=FOLDER:SPLIT}": "dataset_test_split",
    "{columns=NAME=text} reads that column as text": "dataset_text_field",
    "rows are read in any of the usual forms, and tokenised in one process": "dataset_kwargs dataset_num_proc",
    "of prompt and completion the completion alone is trained on, of a conversation the assistant's turns; rows of "
    "text alone are trained on whole": "completion_only_loss assistant_only_loss",
    "{packing=true} packs what is trained on and what is evaluated, best fit first": "eval_packing packing_strategy",
    "batches of like lengths hold little padding, and sft has {packing}: leave it out": "padding_free",
    "rows come in a new order in every pass: leave it out": "shuffle_dataset",
    "{loss_type=rpo} {nll_weight=W}": "rpo_alpha",
    "the command has one loss, with the keys that its --help lists": "loss_type loss_weights",
    "{f_alpha=A}, where A is 1 - f_alpha_divergence_coef": "f_alpha_divergence_coef",
    "{loss_type=gspo} takes ratios of whole responses": "importance_sampling_level",
    "{loss_type} names the variants that there are": "sapo_temperature_neg sapo_temperature_pos vespo_k_pos "
    "vespo_k_neg vespo_lambda_pos vespo_lambda_neg use_weighting ld_alpha",
    "{scale_rewards=true} divides a group's advantages by their deviation (not rloo's)": "normalize_advantages",
    "{missing_eos_penalty=P} is subtracted from the score of a response that did not end": "mask_truncated_completions",
    "policies train without dropout, other models with their configuration's: leave it out": "disable_dropout "
    "lora_dropout",
    "responses are sampled by the trainer itself: leave it out": "use_vllm vllm_mode vllm_model_impl "
    "vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url vllm_server_host vllm_server_port "
    "vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size "
    "vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min vllm_importance_sampling_cap "
    "use_transformers_paged cache_implementation "
    "use_transformers_continuous_batching transformers_continuous_batching_config ds3_gather_for_generation "
    "max_tool_calling_iterations",
    "{rollout_is=token} and {rollout_is_mode=truncate} weigh samples, {rollout_is=null} does not": "vllm_importance_"
    "sampling_correction vllm_importance_sampling_mode",
    "{temperature}, {top_k} and {top_p} are how responses are drawn": "min_p repetition_penalty generation_kwargs",
    "one response to each prompt is drawn in an evaluation": "num_generations_eval",
    "{num_mini_batches=N} makes N updates of each batch of responses": "steps_per_generation",
    "{per_device_train_batch_size} * {gradient_accumulation_steps} * {num_mini_batches}": "generation_batch_size",
    "log.jsonl has every step's figures; `fastalign sample` shows what a model says": "log_completions log_multimodal "
    "num_completions_to_print log_unique_prompts log_completions_hub_repo",
    "the reference stays what it is: {ref_model=FOLDER} names another": "sync_ref_model ref_model_mixup_alpha "
    "ref_model_sync_steps",
    "responses end at the tokenizer's and the model's own end tokens; see {missing_eos_penalty}": "stop_token",
    "the tokenizer says it: save one that has it, for {tokenizer=FOLDER}": "eos_token pad_token",
    "{model} may be a folder of adapters; {adapters} says what becomes of them": "model_adapter_name ref_adapter_name",
    "code that comes with a model is not run: leave it out": "trust_remote_code",
    "{dtype} and {attn_implementation} are what a model is loaded with": "model_init_kwargs model_revision",
    "losses are of the logits alone: leave it out": "router_aux_loss_coef",
    "logits are never held whole, so that there is nothing to cast or pad for: leave it out": "cast_lm_head_to_fp32 "
    "pad_to_multiple_of",
    "{gradient_checkpointing=true} recomputes activations": "activation_offloading",
    "columns that nothing asks for are left out: leave it out": "remove_unused_columns",
    "{eval_steps=N} evaluates every N steps": "eval_strategy",
    "{save_steps=N}; {save_steps=null} for none": "save_strategy",
}
"""What to say or do here instead → their names of it. `{key}` and `{key=value}` are keys of ours."""

OURS = {name: answer for answer, names in _ANSWERS.items() for name in names.split()}
"""Their name → that, in the commands that have no such key."""

_KEY = re.compile(r"\{(\w+)(?:=([^}]*))?\}")
_LITERALS = {"true": "True", "false": "False", "null": "None"}


def answer(name: str, *, python: bool = False) -> str:
    """What to use instead of another library's key, as it is written on the command line or in Python; or nothing."""

    def written(match: re.Match[str]) -> str:
        key, value = match.groups()
        if not python:
            return f"--{key}" if value is None else f"--{key} {value}"
        return key if value is None else f"{key}={_literal(value)}"

    return _KEY.sub(written, OURS.get(name, ""))


def _literal(value: str) -> str:
    return _LITERALS.get(value) or (value if re.fullmatch(r"[A-Z]|[\d.]+", value) else repr(value))


def _same(name: str, ours: Collection[str]) -> str | None:
    """Our name of the key, if we have one."""
    return name if name in ours else next((own for own in SAME.get(name, ()) if own in ours), None)


def near(name: str, ours: Iterable[str]) -> list[str]:
    """The keys that a mistyped name is most like."""
    return difflib.get_close_matches(name, list(ours), n=3, cutoff=0.6)


def translate(name: str, ours: Collection[str]) -> str:
    """Our name of the key, or the name itself.

    Raises ValueError with what to use instead, for a key that means something here under no name.
    """
    found = _same(name, ours)
    if found is None and name in OURS:
        raise ValueError(f"there is no key --{name} here; {answer(name)}")
    return found or name


def in_python(owner: str, given: Mapping[str, Any], ours: Collection[str]) -> dict[str, Any]:
    """Keyword arguments of a configuration under our names.

    Raises TypeError for one that is none (with what to use instead, or the nearest ones), or that is given under two
    names.
    """
    values: dict[str, Any] = {}
    named: dict[str, str] = {}
    for name, value in given.items():
        own = _same(name, ours)
        if own is None:
            like = near(name, ours)
            hint = answer(name, python=True) or (like and f"did you mean {' or '.join(like)}?")
            raise TypeError(f"{owner} takes no {name}" + (f": {hint}" if hint else ""))
        if own in named:
            raise TypeError(f"{named[own]} and {name} are one argument of {owner}; give it once")
        named[own], values[own] = name, value
    return values
