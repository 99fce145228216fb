"""One pass over a prompt for all its completions: where tokens go, that nothing but rounding changes, who may not."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")

import transformers

from fastalign.models.logits import Request, ask, logits_of, prompt_sharing
from fastalign.models.shared_prompts import PromptSharing, _size, share
from fastalign.trainers.common.callbacks import LOG_NAME, read_log
from fastalign.trainers.data.collate import pad
from fastalign.trainers.dpo import DPOConfig, DPOTrainer
from fastalign.trainers.grpo import GRPOConfig, GRPOTrainer
from fastalign.trainers.ppo import PPOConfig, PPOTrainer
from fastalign.trainers.pro import PROConfig, PROTrainer

_DECODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_NEO = {"hidden_size": 32, "num_layers": 2, "num_heads": 4}
MODELS = {
    "Llama": {**_DECODER, "num_key_value_heads": 2},
    "Qwen2": {**_DECODER, "num_key_value_heads": 2},
    "Phi": _DECODER,
    "GPTNeoX": _DECODER,
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
PROMPT = list(range(3, 15))
CASES = {
    "pairs": ([(PROMPT, [20, 21]), (PROMPT[:9], [40, 41, 42]), (PROMPT, [30]), (PROMPT[:9], [50, 51])], [0, 1, 0, 1]),
    "lists": ([(PROMPT, [20 + i, 21][: 1 + i % 2]) for i in range(5)] + [(PROMPT[2:], [7, 8])], [0, 0, 0, 1, 1, 2]),
    "a beginning of another": ([(PROMPT, [20, 21, 22]), (PROMPT, [20, 21]), (PROMPT, [20])], [0, 0, 0]),
    "all alike": ([(PROMPT, [20, 21])] * 3, [0, 0, 0]),
}


def build(name: str, dtype: torch.dtype = torch.float64, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"GPTNeo": _NEO, **MODELS}.get(name, _DECODER)
    config = getattr(transformers, f"{name}Config")(vocab_size=101, **{**sizes, **options})
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config.update(ends)
    model = f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    return getattr(transformers, model)(config).to(dtype).train()


def neo(second: str, **options) -> torch.nn.Module:
    return build("GPTNeo", attention_types=[[["global", second], 1]], **options)


def test_layout_by_hand():
    batch = pad([([1, 2], [3, 4]), ([7], [8]), ([1, 2], [5])], 0)
    found = share(batch, torch.tensor([0, 1, 0]))
    assert found.inputs["input_ids"].tolist() == [[1, 2, 3, 4, 5], [7, 8, 0, 0, 0]]
    assert found.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 2], [0, 1, 0, 0, 0]]
    assert found.rows.tolist() == [[0, 1, 2, 3], [5, 6, 0, 0], [0, 1, 4, 0]]
    seen = found.inputs["attention_mask"][0, 0].long().tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    assert found.inputs["attention_mask"][1, 0].any(-1).all()  # a row that sees nothing would be NaN


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_log_probs_and_gradients_are_those_of_the_plain_pass(name, case, attention):
    model = build(name, attn_implementation=attention)
    sequences, groups = CASES[case]
    batch, tokens, found = pad(sequences, 0), [], []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: tokens.append(args[0].numel()))
    assert isinstance(prompt_sharing(model), PromptSharing)
    for given in (None, torch.tensor(groups)):
        model.zero_grad()
        logps = logits_of(model, batch, groups=given).stats(batch["labels"]).logps
        (logps * torch.linspace(0.5, 2, logps.numel()).view_as(logps)).sum().backward()
        found.append([logps.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert tokens[-1] < tokens[-2] == batch["input_ids"].numel()
    assert len(found[0]) == len(found[1]) > 5
    for plain, shared in zip(*found, strict=True):  # the statistics of float64 hidden states are float32
        torch.testing.assert_close(shared, plain, rtol=1e-5, atol=1e-6 * float(plain.abs().max()))


def test_hidden_states_that_are_handed_out_lie_as_the_batch_does():
    policy, reference = build("Llama"), build("Llama")
    with torch.no_grad():
        for weight in reference.parameters():
            weight.mul_(1.5)
    sequences, groups = CASES["pairs"]
    batch, found = pad(sequences, 0), []
    for given in (None, torch.tensor(groups)):
        ours, theirs = (logits_of(model, batch, groups=given) for model in (policy, reference))
        stats, ref = ours.with_reference(theirs, batch["labels"])
        found.append([stats.logps, stats.kl, stats.entropy, ref.logps])
        hidden = ask(policy, batch, Request(batch["labels"], hidden=True), given).hidden
        assert hidden.shape[:2] == batch["input_ids"].shape
    for plain, shared in zip(*found, strict=True):
        assert torch.equal(plain, shared)


def test_who_cannot_says_why():
    assert "sliding_window=64" in prompt_sharing(build("Mistral", sliding_window=64, num_key_value_heads=2))
    assert isinstance(prompt_sharing(build("Mistral", sliding_window=None, num_key_value_heads=2)), PromptSharing)
    assert "layers of sliding_attention" in prompt_sharing(build("Gemma2", sliding_window=8, head_dim=8))
    assert "layers of local" in prompt_sharing(neo("local", window_size=8))
    with pytest.raises(ValueError, match="the configuration must say hidden_size; got None"):
        _size(SimpleNamespace(), "hidden_size")
    bloom = transformers.BloomConfig(vocab_size=101, hidden_size=32, n_layer=1, n_head=4)
    assert "takes no position_ids" in prompt_sharing(transformers.BloomForCausalLM(bloom))


def test_a_model_that_turns_out_otherwise_is_refused():
    model = build("Llama")
    body = model.model.forward
    # Positions that the model makes itself, whatever it is given.
    model.model.forward = lambda *args, position_ids=None, **kwargs: body(*args, **kwargs)
    assert "gives other hidden states" in prompt_sharing(model)
    assert all(module.training for module in model.modules())


DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_rounding_is_no_reason(name, dtype, attention):
    """Weights far from their initial values, where layers differ more, and more layers than two."""
    for layers in (1, 12):
        sizes = {"n_layer": layers} if name == "GPT2" else {"num_hidden_layers": layers}
        model = build(name, dtype, attn_implementation=attention, **{**MODELS[name], **sizes})
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.2)
        assert isinstance(prompt_sharing(model), PromptSharing)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("dtype", "mistake"), [(torch.float64, 1e-6), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_a_small_mistake_is_found(name, dtype, mistake, attention):
    model = build(name, dtype, attn_implementation=attention)
    body = model.base_model
    forward = body.forward

    def wrong(*args, attention_mask=None, **kwargs):
        result = forward(*args, attention_mask=attention_mask, **kwargs)
        if attention_mask.dim() == 4:  # only where a prompt is shared
            result.last_hidden_state.mul_(1 + mistake)
        return result

    body.forward = wrong
    found = prompt_sharing(model)
    assert "gives other hidden states" in found
    assert float(found.split(" by ")[1].split(";")[0]) == pytest.approx(mistake, rel=0.7)


def alibi(query, key):
    """A distance along the row, whatever positions are given."""
    at = torch.arange(key.shape[-2])
    return -0.05 * (at[:, None] - at).abs()


def window(query, key):
    at = torch.arange(key.shape[-2])
    return torch.where((at[:, None] - at).abs() < 4, 0.0, -1e4)


@pytest.mark.parametrize("bias", [alibi, window])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_along_the_row_is_found(dtype, bias, monkeypatch):
    """Of a model whose configuration does not say so."""
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.eager_attention_forward

    def along(module, query, key, value, attention_mask, **options):
        added = bias(query, key).to(query.dtype).expand(query.shape[0], 1, -1, -1)
        mask = added if attention_mask is None else torch.clamp(added + attention_mask, torch.finfo(query.dtype).min)
        return plain(module, query, key, value, mask, **options)

    model = build("Llama", dtype, attn_implementation="eager")
    with torch.no_grad():  # initial weights are so small that attention hardly matters
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.2)
    assert isinstance(prompt_sharing(model, anew=True), PromptSharing)
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", along)
    assert "gives other hidden states" in prompt_sharing(model, anew=True)


def test_autocast_counts_as_the_arithmetic_that_it_is():
    model = build("Llama", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert isinstance(prompt_sharing(model), PromptSharing)


def test_a_row_is_no_longer_than_a_table_of_its_mask():
    batch, groups = pad([(PROMPT, [1, 2, 3, 4]), (PROMPT, [5, 6, 7, 8])], 0), torch.tensor([0, 0])
    for positions, fits in ((16, False), (20, True)):
        model = neo("global", max_position_embeddings=positions)
        assert (prompt_sharing(model)(model, batch, groups) is not None) is fits
        assert torch.isfinite(logits_of(model, batch, groups=groups).stats(batch["labels"]).logps).all()


def test_work_is_estimated_without_embeddings():
    """Which no token is multiplied with; tied ones are there once."""
    for tied in (False, True):
        model = build("Llama", tie_word_embeddings=tied)
        body = sum(p.numel() for p in model.model.parameters()) - model.model.embed_tokens.weight.numel()
        assert prompt_sharing(model)._per_token == body


def test_only_where_it_pays():
    model = build("Llama")
    sharing, groups = prompt_sharing(model), torch.tensor([0, 0])
    apart = pad([([1, 2, 3], [4, 5]), ([6, 7, 8], [9, 9])], 0)
    assert sharing(model, apart, groups) is None
    assert sharing(model, pad([(PROMPT, [1]), (PROMPT, [2])], 0), groups) is not None
    long = [5] * 3000  # attention outweighs all else in a model this small
    assert sharing(model, pad([(long, [1] * 3000), (long, [2] * 3000)], 0), groups) is None
    dropping = build("GPT2", resid_pdrop=0.1)
    batch = pad([(PROMPT, [1]), (PROMPT, [2])], 0)
    assert prompt_sharing(dropping)(dropping.train(), batch, groups) is None
    assert prompt_sharing(dropping)(dropping.eval(), batch, groups) is not None


PAIRS = [
    {"prompt": "the movie is a great film and", "chosen": " fun" * (1 + i % 3), "rejected": " dull"} for i in range(4)
]
LISTS = [
    {"prompt": "the movie is a great film and", "completions": [" fun", " long", " dull , dull"]} for _ in range(4)
]


@pytest.mark.parametrize(
    ("config", "trainer", "rows", "options"),
    [
        (DPOConfig, DPOTrainer, PAIRS, {}),
        (DPOConfig, DPOTrainer, PAIRS, {"precompute_ref_log_probs": False}),
        (DPOConfig, DPOTrainer, PAIRS, {"padding_side": "left", "gradient_checkpointing": True}),
        (DPOConfig, DPOTrainer, PAIRS, {"lora_rank": 2, "lora_dropout": 0.0}),
        (PROConfig, PROTrainer, LISTS, {}),
    ],
)
def test_trainers_learn_the_same_from_fewer_tokens(
    tiny_model, tiny_tokenizer, tmp_path, config, trainer, rows, options
):
    logs, tokens = [], []
    for shared in (False, None):
        options |= {"output_dir": str(tmp_path / str(shared)), "use_cpu": True, "disable_tqdm": True, "max_steps": 3}
        options |= {"save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-2, "report_to": "none"}
        model, seen = tiny_model(), []
        model.get_input_embeddings().register_forward_hook(
            lambda module, args, out, seen=seen: seen.append(args[0].numel())
        )
        made = trainer(model, config(share_prompts=shared, **options), rows, None, tiny_tokenizer)
        made.train()
        logs.append(read_log(os.path.join(options["output_dir"], LOG_NAME)))
        tokens.append(sum(seen))
    assert tokens[1] < 0.8 * tokens[0]
    for plain, shared in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "num_tokens"):
            if name in plain:
                assert shared[name] == pytest.approx(plain[name], rel=2e-4, abs=1e-5), name


def test_each_trainer_looks_at_the_model_as_it_is_then(tiny_model, tiny_tokenizer, tmp_path):
    model, options = tiny_model(), {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    DPOTrainer(model, DPOConfig(**options), PAIRS, None, tiny_tokenizer)
    made = DPOTrainer(model, DPOConfig(**options, lora_rank=2, lora_dropout=0.5), PAIRS, None, tiny_tokenizer)
    batch, groups = pad([(PROMPT, [1]), (PROMPT, [2])], 0), torch.tensor([0, 0])
    assert prompt_sharing(made.model)(made.model.eval(), batch, groups) is not None
    assert prompt_sharing(made.model)(made.model.train(), batch, groups) is None


def test_asking_for_what_cannot_be_is_refused(tiny_model, tiny_tokenizer, tmp_path):
    options = {"output_dir": str(tmp_path), "use_cpu": True, "share_prompts": True}
    with pytest.raises(ValueError, match="share_prompts must be false here: it needs fused_head"):
        DPOTrainer(tiny_model(), DPOConfig(**options, fused_head=False), PAIRS, None, tiny_tokenizer)
    model = tiny_model()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="share_prompts must be false here: attn_implementation"):
        DPOTrainer(model, DPOConfig(**options), PAIRS, None, tiny_tokenizer)


RESPONSES = {"per_device_train_batch_size": 8, "num_generations": 4, "response_length": 6, "total_episodes": 16}


def policy_trainer(kind, model, tokenizer, folder, **options):
    config, trainer = {"grpo": (GRPOConfig, GRPOTrainer), "ppo": (PPOConfig, PPOTrainer)}[kind]
    given = {**RESPONSES, "output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2}
    rows = [{"prompt": "the movie is a great film and great fun" + " , and long" * i} for i in range(2)]
    lengths = lambda completions: [len(text) % 7 - 3.0 for text in completions]  # noqa: E731
    return trainer(model, config(**{**given, **options}), rows, None, tokenizer, reward=lengths)


def counted(model, seen):
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    return model


POLICIES = [
    ("grpo", {}),
    ("grpo", {"lora_rank": 2, "gradient_checkpointing": True}),
    ("grpo", {"loss_type": "dapo", "temperature": 0.7, "kl_coef": 0.0}),
    ("ppo", {"num_ppo_epochs": 1}),
]


@pytest.mark.parametrize(("kind", "options"), POLICIES)
def test_an_update_over_groups_has_the_plain_loss_and_gradient(kind, options, tiny_model, tiny_tokenizer, tmp_path):
    seen, found, tokens = [], [], []
    trainer = policy_trainer(kind, counted(tiny_model(), seen), tiny_tokenizer, tmp_path, **options)
    updater, episodes = trainer._ready(), trainer.roll_out()
    assert updater.grouped
    trainer.advantages(episodes, trainer.shape(episodes, 0.0))
    trainer.model.train()
    for grouped in (False, True):
        batch = updater.batch(episodes, grouped)
        seen.clear()
        trainer.model.zero_grad()
        loss = updater.loss(batch, trainer.loss(), trainer.value_options(), 40, 40)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in trainer.model.parameters() if p.grad is not None)])
        tokens.append(seen[0])
    assert tokens[1] < 0.8 * tokens[0] == 0.8 * batch["input_ids"].numel()
    assert len(found[0]) == len(found[1]) > 2
    (loss, *grads), (other_loss, *others) = found
    # The loss is a mean of A rho, |A| below 2, rho within float32's eps of its value: of advantages that cancel it is
    # 0, and what is left of it no more than 2 eps.
    torch.testing.assert_close(other_loss, loss, rtol=1e-4, atol=2 * torch.finfo(torch.float32).eps)
    for one, other in zip(grads, others, strict=True):  # float32
        torch.testing.assert_close(other, one, rtol=1e-4, atol=2e-5 * float(one.abs().max()) + 1e-8)


@pytest.mark.parametrize(("kind", "options"), POLICIES)
def test_policies_learn_the_same_from_fewer_tokens(kind, options, tiny_model, tiny_tokenizer, tmp_path):
    logs, tokens = [], []
    for shared in (False, None):
        seen, folder = [], tmp_path / str(shared)
        made = policy_trainer(
            kind, counted(tiny_model(), seen), tiny_tokenizer, folder, share_prompts=shared, **options
        )
        made.train()
        logs.append(read_log(os.path.join(folder, LOG_NAME)))
        tokens.append(sum(seen))
    assert tokens[1] < tokens[0]
    for plain, shared in zip(*logs, strict=True):
        assert plain.keys() == shared.keys()
        for name in plain.keys() - {"time", "eps"}:
            assert shared[name] == pytest.approx(plain[name], rel=2e-3, abs=1e-4), name


def test_what_gives_its_hidden_states_back_runs_as_it_is(tiny_model, tiny_tokenizer, tmp_path):
    """An exact KL and values of the policy's own body need hidden states where the batch has its tokens."""
    for kind, options in (("grpo", {"kl_estimator": "exact"}), ("ppo", {"value_model": "shared"})):
        seen = []
        trainer = policy_trainer(kind, counted(tiny_model(), seen), tiny_tokenizer, tmp_path, **options)
        updater, episodes = trainer._ready(), trainer.roll_out()
        trainer.advantages(episodes, trainer.shape(episodes, 0.0))
        batch = updater.batch(episodes, True)
        seen.clear()
        updater.loss(batch, trainer.loss(), trainer.value_options(), 40, 40)
        assert batch["input_ids"].numel() in seen
        assert max(seen) == batch["input_ids"].numel()
    with pytest.raises(ValueError, match="share_prompts must be false here: it needs fused_head"):
        policy_trainer("grpo", tiny_model(), tiny_tokenizer, tmp_path, share_prompts=True, fused_head=False)
    assert not policy_trainer("ppo", tiny_model(), tiny_tokenizer, tmp_path, num_generations=1)._grouped
