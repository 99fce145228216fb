"""What stands for a model's logits in the trainers: the same losses and gradients, and a model left as it was."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("accelerate", reason="needs accelerate (the extra `train`)")

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GraniteConfig, LlamaConfig, LlamaForCausalLM

from fastalign import losses
from fastalign.losses import chunks
from fastalign.models.actor_critic import ActorCritic, policy_logits
from fastalign.models.logits import can_answer, logits_of, model_logits
from fastalign.trainers.data.collate import pad

_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 61,
}
CONFIGS = {
    "llama": LlamaConfig(**_SIZES, num_key_value_heads=1),
    "tied": LlamaConfig(**_SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=61, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    "granite": GraniteConfig(**_SIZES, num_key_value_heads=1, logits_scaling=4.0),
    "gemma2": Gemma2Config(**_SIZES, num_key_value_heads=1, head_dim=8, final_logit_softcapping=3.0),
}


def tiny(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).float()


def batch(side="right"):
    return pad([([3, 4, 5], [6, 7]), ([8], [9, 10, 11, 12]), ([1, 2], [13]), ([20, 21, 22, 23], [24, 25])], 0, side)


class Switches:
    fused_head, chunk_bytes = True, None


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(got, want):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients_are_those_of_logits(name):
    model, rows = tiny(name), batch()
    half = torch.tensor([-9.0, -5.0])
    for module, more in (
        (losses.SFTLoss(label_smoothing=0.1, z_loss=1e-3), {}),
        (losses.DPOLoss(), {"ref_chosen_logps": half, "ref_rejected_logps": half}),
    ):
        want = module(model_logits(model, rows), rows["labels"], **more)
        got = module(logits_of(model, rows), rows["labels"], **more)
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-6)
        close(gradients(model, got.loss), gradients(model, want.loss))
    assert logits_of(model, rows).shape == model_logits(model, rows).shape


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_policy_and_reference_are_compared_with_one_forward_pass_of_each(name, fused):
    rows = batch()
    policy, reference = tiny(name), tiny(name)
    with torch.no_grad():
        for weight in reference.parameters():
            weight.mul_(1.5)
    passes = []
    for model in (policy, reference):
        model.base_model.register_forward_hook(lambda *_, model=model: passes.append(model))
    sources = (logits_of(model, rows, fused=fused) for model in (policy, reference))
    found, ref = next(sources).with_reference(next(sources), rows["labels"], temperature=0.7)
    assert passes == [reference, policy]
    ours, theirs = ((model_logits(m, rows) / 0.7).double().log_softmax(-1) for m in (policy, reference))
    real = rows["labels"] != -100
    want = {"kl": (ours.exp() * (ours - theirs)).sum(-1), "entropy": -(ours.exp() * ours).sum(-1)}
    for field, value in want.items():
        torch.testing.assert_close(getattr(found, field).double(), value * real, rtol=1e-4, atol=2e-6)
    at = rows["labels"].clamp(min=0)[..., None]
    for stats, logps in ((found, ours), (ref, theirs)):
        torch.testing.assert_close(stats.logps.double(), logps.gather(-1, at)[..., 0] * real, rtol=1e-5, atol=1e-6)
    assert float(found.kl.detach().sum()) > 1e-3


def test_exact_kl_and_values_come_with_one_forward_pass():
    rows = batch()
    old, advantages = torch.full(rows["labels"].shape, -4.0), torch.linspace(-1, 1, 4)
    loss = losses.PPOLoss(kl_estimator="exact", kl_coef=0.5, entropy_coef=0.1)
    found = []
    for shared in (True, False):
        policy, reference = tiny("llama"), tiny("tied")
        actor = ActorCritic(policy, None if shared else copy.deepcopy(policy.base_model), shared=shared)
        torch.nn.init.ones_(actor.value_head.weight)
        for fused in (True, False):
            switches = Switches()
            switches.fused_head = fused
            calls = []
            hook = policy.base_model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            logits = policy_logits(actor, rows, True, switches)
            out = loss(logits, rows["labels"], old, advantages, ref_logits=logits_of(reference, rows, fused=fused))
            hook.remove()
            assert len(calls) == 1
            total = out.loss + logits.answer.values.square().mean()
            found.append((out.loss, out.kl, logits.answer.values, gradients(actor, total)))
    for fused, plain in (found[:2], found[2:]):
        for a, b in zip(fused[:3], plain[:3], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        close(fused[3], plain[3])


def test_adapters_checkpointing_and_autocast():
    peft = pytest.importorskip("peft", reason="needs peft (the extra `train`)")
    rows = batch()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny("llama"), config)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    model.train()
    results = []
    for fused in (True, False):
        loss = losses.SFTLoss()(logits_of(model, rows, fused=fused), rows["labels"]).loss
        results.append((loss, gradients(model, loss)))
        with model.disable_adapter():
            results[-1] += (losses.SFTLoss()(logits_of(model, rows, fused=fused), rows["labels"]).loss,)
    (loss, grads, off), (want, want_grads, want_off) = results
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(off, want_off, rtol=1e-5, atol=1e-6)
    assert abs(float(off - loss)) > 1e-3
    assert any("lm_head.lora_A" in name for name in grads)
    close(grads, want_grads)
    with torch.autocast("cpu", torch.bfloat16):
        half = losses.SFTLoss()(logits_of(model, rows), rows["labels"]).loss
    torch.testing.assert_close(half, want, rtol=2e-2, atol=2e-2)


def test_the_model_stays_what_it_was(tmp_path):
    model, rows = tiny("llama"), batch()
    kind, before = type(model), model_logits(model, rows)
    assert can_answer(model)
    assert can_answer(model)
    assert type(model) is kind
    assert torch.equal(model_logits(model, rows), before)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(model_logits(model, rows), before)
    stats = logits_of(twin, rows).stats(rows["labels"])  # the copy answers with its own weights
    torch.testing.assert_close(stats.lse[rows["labels"] != -100], torch.full((9,), 61.0).log())
    revived = pickle.loads(pickle.dumps(model))
    assert torch.equal(model_logits(revived, rows), before)
    assert torch.equal(
        logits_of(revived, rows).stats(rows["labels"]).lse, logits_of(model, rows).stats(rows["labels"]).lse
    )
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is kind
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert (
        model.generate(rows["input_ids"][:1], max_new_tokens=2, do_sample=False).shape[1]
        == rows["input_ids"].shape[1] + 2
    )


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_head_of_unknown_form_gets_logits():
    model, rows = tiny("llama"), batch()
    model.lm_head = Doubled(16, 61, bias=False)
    assert not can_answer(model)
    assert "forward" not in vars(model)
    got = losses.SFTLoss()(logits_of(model, rows), rows["labels"])
    torch.testing.assert_close(got.loss, losses.SFTLoss()(model_logits(model, rows), rows["labels"]).loss)


def test_two_soft_caps_are_refused():
    rows = batch()
    with pytest.raises(ValueError, match="softcap must be None for a head that caps its logits itself, at 3"):
        losses.SFTLoss(softcap=5.0)(logits_of(tiny("gemma2"), rows), rows["labels"])


class Rescaled(LlamaForCausalLM):
    def forward(self, input_ids, attention_mask=None, **kwargs):
        output = super().forward(input_ids, attention_mask, **kwargs)
        output.logits = 2 * output.logits
        return output


def test_logits_of_which_the_configuration_does_not_speak_are_refused():
    rows, model = batch(), Rescaled(CONFIGS["llama"])
    with pytest.raises(ValueError, match=r"the head of Rescaled is not known: its logits are not 1\.0 times those"):
        logits_of(model, rows).stats(rows["labels"])
    assert torch.isfinite(logits_of(model, rows, fused=False).stats(rows["labels"]).logps).all()


@pytest.mark.parametrize("names", [("llama", "granite"), ("gemma2", "llama")], ids=" against ".join)
def test_a_reference_that_scales_or_caps_otherwise(names):
    rows, (policy, reference) = batch(), map(tiny, names)
    found = []
    for fused in (True, False):
        ours, theirs = (logits_of(model, rows, fused=fused) for model in (policy, reference))
        stats, own = ours.with_reference(theirs, rows["labels"])
        found.append((ours.stats(rows["labels"], kl=True, ref_logits=theirs).kl, stats.kl, own.logps))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_compiled_model_answers():
    rows, model = batch(), tiny("llama")
    want = losses.SFTLoss()(logits_of(model, rows), rows["labels"]).loss
    expected = gradients(model, want)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        got = losses.SFTLoss()(logits_of(compiled, rows), rows["labels"]).loss
        torch.testing.assert_close(got, want)
        close(gradients(model, got), expected)


def test_mixed_precision_of_accelerate_is_put_around_it():
    rows, plain = batch(), tiny("llama")
    model = tiny("llama")
    assert can_answer(model)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        model = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
        assert can_answer(model)
        calls = []
        model.lm_head.register_forward_hook(lambda *call: calls.append(call[2].shape))
        stats = logits_of(model, rows).stats(rows["labels"], diagnostics=["is_top1", "mean_logits"])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert all(shape[:2] == (1, 1) for shape in calls)
    with torch.autocast("cpu", torch.bfloat16):
        want = logits_of(plain, rows, fused=False).stats(rows["labels"], diagnostics=["is_top1", "mean_logits"])
    torch.testing.assert_close(stats.logps, want.logps, rtol=2e-2, atol=2e-2)
    # accelerate makes what the forward returns anew, to make it float32
    torch.testing.assert_close(stats.mean_logits, want.mean_logits, rtol=2e-2, atol=2e-2)
    assert stats.is_top1.dtype == torch.bool
    assert stats.is_top1.shape == rows["labels"].shape
    assert stats.log_sum_sq_probs is None


HALF = torch.tensor([-9.0, -5.0])
OBJECTIVES = {
    "sft": (lambda: losses.SFTLoss(label_smoothing=0.1, z_loss=1e-3), {}),
    "dpo": (lambda: losses.DPOLoss(), {"ref_chosen_logps": HALF, "ref_rejected_logps": HALF}),
    "dpo, reference's logits": (lambda: losses.DPOLoss(), {"ref_logits": "reference"}),
    "ppo, exact kl": (
        lambda: losses.PPOLoss(kl_estimator="exact", kl_coef=0.1, entropy_coef=0.01),
        {"old_logps": torch.full((4, 6), -4.0), "advantages": torch.tensor([1.0, -1.0, 2.0, 0.5])}
        | {"ref_logits": "reference"},
    ),
    "custom": (lambda: losses.TokenLoss(lambda t: -t.logps * t.logps.exp().detach()), {}),
}


@pytest.mark.parametrize("by_parts", [True, False], ids=["by parts", "whole"])
@pytest.mark.parametrize("name", ["llama", "granite", "gemma2"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_loss_is_formed_within_the_models_forward(objective, name, by_parts, monkeypatch):
    """Where the logits do not fit, part by part with its gradients: three products of the head and no fourth."""
    formed = []
    attach = chunks.attach_gradients
    monkeypatch.setattr(chunks, "attach_gradients", lambda *given: formed.append(1) or attach(*given))
    monkeypatch.setattr("fastalign.head.plan._WORTH", 1)
    model, reference, rows = tiny(name), tiny(name), batch()
    with torch.no_grad():
        next(reference.parameters()).mul_(1.1)
    make, given = OBJECTIVES[objective]
    more = {key: model_logits(reference, rows).detach() if x == "reference" else x for key, x in given.items()}
    want = make()(model_logits(model, rows), rows["labels"], **more)
    want_gradients = gradients(model, want.loss)
    budget = 6 * 61 * 4 if by_parts else None
    more = {key: logits_of(reference, rows) if x == "reference" else x for key, x in given.items()}
    source = logits_of(model, rows, chunk_bytes=budget)
    got = make()(source, rows["labels"], **more)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-6)
    close(gradients(model, got.loss), want_gradients)
    assert len(formed) == by_parts
    assert source.answer.output is got
