"""The head of a causal language model as it is read: logits made of it and of what it is given are the model's own."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

transformers = pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
peft = pytest.importorskip("peft", reason="needs peft (the extra `train`)")

from fastalign.models.headless import Headless  # noqa: E402
from fastalign.models.lm_head import head_module, head_parameters, logit_transform, unwrapped  # noqa: E402

FAMILIES = ["Llama", "Qwen2", "GPT2", "Gemma2", "Mistral", "Phi3", "GPTNeoX", "Granite", "Cohere", "FalconH1", "GPTJ"]
FAMILIES += ["MiniCPM3"]  # scales its hidden states in front of its head
IDS = torch.arange(14).reshape(2, 7) + 3


def weight_of(model):
    return head_parameters(head_module(unwrapped(model)))[0]


def logits_by_head(model):
    """What the reader's description gives, in plain torch."""
    headless = Headless(unwrapped(model))
    try:
        head = headless.take(headless.run(IDS).logits)
    finally:
        headless.remove()
    logits = head.logit_scale * F.linear(head.hidden, head.weight, head.bias)
    return logits if headless.softcap is None else headless.softcap * torch.tanh(logits / headless.softcap)


def agree(model):
    """Logits and the gradients of every parameter, both ways."""
    model.double()
    weight = torch.randn(2, 7, 67, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    trained = [p for p in model.parameters() if p.requires_grad]
    theirs = model(input_ids=IDS).logits
    ours = logits_by_head(model)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    want = torch.autograd.grad((weight * theirs).sum(), trained)
    got = torch.autograd.grad((weight * ours).sum(), trained)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    return dict(zip([name for name, p in model.named_parameters() if p.requires_grad], got, strict=True))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_the_models_own(causal_model, family, tied):
    agree(causal_model(family, tied))


def test_what_is_read(causal_model):
    model = causal_model("Gemma2", True)
    read = Headless(model)
    assert (read.scale, read.softcap) == (1.0, 0.3)
    head = read.take(read.run(IDS).logits, plan="keep")
    assert head.weight is model.model.embed_tokens.weight
    assert (head.bias, head.logit_scale, head.plan) == (None, 1.0, "keep")
    torch.testing.assert_close(head.hidden, model.model(IDS).last_hidden_state)
    with pytest.raises(ValueError, match="Gemma2ForCausalLM made its logits without its head"):
        read.take(torch.zeros(1))
    assert head_parameters(causal_model("GPTJ").lm_head)[1] is not None


@pytest.mark.parametrize(("family", "scale"), [("Granite", 4.0), ("Cohere", 4.0), ("FalconH1", 3.0), ("MiniCPM3", 1.0)])
def test_what_scales_the_logits_is_read(causal_model, family, scale):
    assert Headless(causal_model(family)).scale == scale


def lora(model, targets, **options):
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"use_rslora": True, "lora_alpha": 3}], ids=str)
def test_lora_on_the_head(causal_model, options):
    model = lora(causal_model("GPTJ"), ["lm_head", "q_proj"], **options)
    gradients = agree(model)
    on_the_head = [g for name, g in gradients.items() if "lm_head.lora_" in name]
    assert len(on_the_head) == (3 if "lora_bias" in options else 2)
    assert all(g.abs().max() > 0 for g in on_the_head)


def test_adapters_off_merged_several_and_beside_the_head(causal_model):
    model = lora(causal_model("Llama"), ["lm_head", "q_proj"])
    plain = weight_of(model)
    with model.disable_adapter():
        assert torch.equal(weight_of(model), model.get_base_model().lm_head.base_layer.weight)
    config = peft.LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    assert not torch.equal(weight_of(model), plain)
    agree(model)
    model.merge_adapter()
    torch.testing.assert_close(logits_by_head(model), model(input_ids=IDS).logits, rtol=1e-12, atol=1e-12)
    with model.disable_adapter(), pytest.raises(ValueError, match="unmerge_adapter"):
        weight_of(model)
    beside = lora(causal_model("Llama"), ["q_proj"])
    assert weight_of(beside) is beside.get_base_model().lm_head.weight
    agree(beside)


def test_a_head_that_is_saved_whole(causal_model):
    model = lora(causal_model("Llama"), ["q_proj"], modules_to_save=["lm_head"])
    gradients = agree(model)
    assert any("lm_head.modules_to_save" in name and g.abs().max() > 0 for name, g in gradients.items())
    with model.disable_adapter():
        assert weight_of(model) is model.get_base_model().lm_head.original_module.weight


def test_wrapped_models(causal_model, tmp_path):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.fsdp import fully_shard

    model = causal_model("Llama")
    assert weight_of(torch.compile(model)) is model.lm_head.weight
    init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert weight_of(wrapped) is model.lm_head.weight
        sharded = causal_model("Llama")
        want = sharded.lm_head.weight.detach().clone()
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(sharded, mesh=mesh)
        read = weight_of(sharded)
        assert type(sharded.lm_head.weight.data).__name__ == "DTensor"
        assert type(read) is torch.Tensor
        assert torch.equal(read, want)
        read.sum().backward()
        assert torch.equal(sharded.lm_head.weight.grad.full_tensor(), torch.ones_like(want))
    finally:
        destroy_process_group()


def without_head(model):
    return model.model


def with_another_layer(model):
    model.extra = nn.Linear(2, 2)
    return model


def with_a_deeper_head(model):
    model.lm_head = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 67))
    model.get_output_embeddings = lambda: model.lm_head[1]
    return model


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_another_linear(model):
    model.lm_head = Doubled(16, 67)
    return model


def with_config(**keys):
    def change(model):
        for key, value in keys.items():
            setattr(model.config, key, value)
        return model

    return change


REFUSED = {
    "model must be a causal language model with an output head; got LlamaModel": without_head,
    r"the head of LlamaForCausalLM is not known: .* got Linear and \['extra'\]": with_another_layer,
    r"the head of LlamaForCausalLM is not known: .* got Linear and \['lm_head'\]": with_a_deeper_head,
    r"the head must be a torch\.nn\.Linear; got Doubled": with_another_linear,
    "its configuration has output_logit_multiplier=3": with_config(output_logit_multiplier=3.0),
    "must have one scale of its logits": with_config(logit_scale=2.0, logits_scaling=2.0),
    "logit_scale of a llama's configuration must be a number above 0; got 'inv": with_config(logit_scale="inv"),
    "drops logits beyond unpadded_vocab_size=60": with_config(unpadded_vocab_size=60),
    "must be plain LoRA; got Dora": lambda model: lora(model, ["lm_head"], use_dora=True),
    "must have lora_dropout=0": lambda model: lora(model, ["lm_head"], lora_dropout=0.1).train(),
    "the head's adapter must be LoRA; got": lambda model: peft.get_peft_model(
        model, peft.LoHaConfig(target_modules=["lm_head"], r=2)
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_known_is_refused(causal_model, message):
    model = REFUSED[message](causal_model("Llama"))
    with pytest.raises(ValueError, match=message):
        Headless(unwrapped(model))


SCALES = {
    "HyperCLOVAXConfig": ({"logits_scaling": 2.0}, (2.0, None)),
    "GraniteMoeHybridConfig": ({"logits_scaling": 2.0}, (0.5, None)),
    "MiniCPM3Config": ({"hidden_size": 640, "dim_model_base": 80}, (1.0, None)),  # in front of its head
    "RecurrentGemmaConfig": ({"logits_soft_cap": 30.0}, (1.0, 30.0)),
    "xLSTMConfig": ({"output_logit_soft_cap": 15.0}, (1.0, 15.0)),
    "Gemma3Config": ({"text_config": {"final_logit_softcapping": 30.0}}, (1.0, 30.0)),
    "MptConfig": ({"logit_scale": 0.5}, (1.0, None)),
    "LlamaConfig": ({}, (1.0, None)),
}


@pytest.mark.parametrize("name", SCALES)
def test_scales_by_name(name):
    """Every name that is known, against the formula of its model's code."""
    if not hasattr(transformers, name):
        pytest.skip(f"needs a transformers with {name}, which {transformers.__version__} has not")
    options, want = SCALES[name]
    assert logit_transform(getattr(transformers, name)(**options)) == want
