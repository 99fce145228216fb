"""Fused loss under transformers' models: the same loss and gradients as theirs, undone without a trace."""

import copy
import inspect
import math

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
peft = pytest.importorskip("peft", reason="needs peft (the extra `train`)")

import fastalign as fa  # noqa: E402
from fastalign.integrations.transformers import apply_fused_loss, fused_lm_loss  # noqa: E402

DENSE = ["Llama", "Qwen2", "GPT2", "Gemma2", "Mistral", "Phi3", "GPTNeoX"]
FAMILIES = [*DENSE, "Granite", "Cohere", "FalconH1", "GPTJ", "Mixtral", "MiniCPM3"]
IDS = torch.arange(14).reshape(2, 7) + 3
LABELS = IDS.masked_fill(torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 1, 0]]).bool(), -100)


def step(model, **inputs):
    """(loss, gradients by name) of one training step."""
    model.zero_grad()
    inputs = {"input_ids": IDS, "labels": LABELS} | inputs
    output = model(**inputs)
    output.loss.backward()
    return output.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def agree(got, want, tolerance):
    """Losses, and every gradient by norm; a tolerance is relative."""
    assert abs(float(got[0]) - float(want[0])) <= tolerance * abs(float(want[0]))
    assert got[1].keys() == want[1].keys()
    for name, theirs in want[1].items():
        error = float((got[1][name].double() - theirs.double()).norm())
        assert error <= tolerance * float(theirs.double().norm()) + 1e-7 * tolerance, name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_models_own(causal_model, family, tied):
    # transformers' loss takes float32 logits: in float64 models the difference is that rounding.
    model = causal_model(family, tied)
    model = model if family == "Mixtral" else model.double()  # its experts know no float64
    for inputs in ({}, {"num_items_in_batch": 5}, {"num_items_in_batch": torch.tensor([5])}):
        want = step(model, **inputs)
        with apply_fused_loss(model):
            agree(step(model, **inputs), want, 1e-5)
    assert model(input_ids=IDS).logits.shape == (2, 7, 67)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Cohere"])
def test_no_further_from_float64_than_the_models_own(causal_model, family, dtype):
    model = causal_model(family)
    exact = step(model.double())
    model.to(dtype)
    theirs = step(model)
    with apply_fused_loss(model):
        ours = step(model)
    for name, want in exact[1].items():
        scale = float(want.norm())
        error, own = (float((run[1][name].double() - want).norm()) / scale for run in (ours, theirs))
        # Rounding of the body's own steps differs from run to run of other inputs: half as much again, and a margin.
        assert error <= 1.5 * own + 2e-6, name
    assert abs(float(ours[0] - exact[0])) <= 1.5 * abs(float(theirs[0] - exact[0])) + 1e-6 * float(exact[0])


def test_logits_when_they_are_asked_for(causal_model):
    model = causal_model("Llama")
    want = model(input_ids=IDS, labels=LABELS)
    with apply_fused_loss(model):
        fused = model(input_ids=IDS, labels=LABELS)
        assert "logits" not in fused
        assert fused.logits is None
        assert model(input_ids=IDS).logits.shape == (2, 7, 67)
        asked = model(input_ids=IDS, labels=LABELS, return_logits=True)
        assert torch.equal(asked.logits, want.logits)
        torch.testing.assert_close(asked.loss, want.loss)
        with torch.no_grad():
            assert torch.equal(model(input_ids=IDS, labels=LABELS).logits, want.logits)
            assert "logits" not in model(input_ids=IDS, labels=LABELS, return_logits=False)
        assert len(model(input_ids=IDS, labels=LABELS, return_dict=False, use_cache=False)) == 1
    with apply_fused_loss(model, return_logits=True):
        assert torch.equal(model(input_ids=IDS, labels=LABELS).logits, want.logits)


def test_logits_are_never_whole(causal_model):
    model = causal_model("Llama")
    widest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (67,) and result.shape != (16, 67):  # W.T
                widest.append(result.numel() // 67)
            return result

    with apply_fused_loss(model, chunk_bytes=67 * 4 * 2), Watch():
        step(model)
    assert max(widest) <= 2


def test_removed_without_a_trace(causal_model):
    model = causal_model("Gemma2")
    before, forward, loss = dict(model.__dict__), model.forward, model.loss_function
    handle = apply_fused_loss(model)
    assert inspect.signature(model.forward) == inspect.signature(forward)
    with pytest.raises(ValueError, match="has a fused loss already"):
        apply_fused_loss(model)
    step(model)
    handle.remove()
    handle.remove()
    assert model.__dict__ == before
    assert "forward" not in model.lm_head.__dict__
    assert model.forward == forward
    assert model.loss_function is loss


def test_removed_beneath_what_was_put_around_it(causal_model):
    from accelerate.utils import convert_outputs_to_fp32

    model = causal_model("Llama")
    want, loss = step(model), model.loss_function
    handle = apply_fused_loss(model)
    model.forward = convert_outputs_to_fp32(model.forward)  # as accelerate does for mixed precision
    assert "logits" not in model(input_ids=IDS, labels=LABELS)
    handle.remove()
    handle.remove()
    assert model(input_ids=IDS, labels=LABELS).logits.shape[:2] == IDS.shape
    assert "forward" not in model.lm_head.__dict__
    assert model.loss_function is loss
    agree(step(model), want, 0.0)


def test_a_copy_has_its_own(causal_model):
    model = causal_model("Llama")
    with apply_fused_loss(model):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.lm_head.weight.zero_()
        assert float(twin(input_ids=IDS, labels=LABELS).loss) == pytest.approx(math.log(67), rel=1e-6)
        assert step(twin)[1]["lm_head.weight"].norm() > 0
        assert model.lm_head.weight.grad is None


LORA = {
    "on the head": {"target_modules": ["lm_head", "q_proj"]},
    "beside it": {"target_modules": ["q_proj"]},
    "head saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", LORA)
def test_peft(causal_model, kind):
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **LORA[kind])
    model = peft.get_peft_model(causal_model("Llama"), config)
    want = step(model)
    with apply_fused_loss(model):
        got = step(model)
        with model.disable_adapter():
            off = model(input_ids=IDS, labels=LABELS).loss
    agree(got, want, 2e-5)
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=IDS, labels=LABELS).loss, off)


@pytest.mark.parametrize("own_unit", [False, True], ids=["with the model", "head a unit of its own"])
def test_sharded_weights(causal_model, tmp_path, own_unit):
    from torch.distributed import destroy_process_group, device_mesh, init_process_group
    from torch.distributed.fsdp import fully_shard

    want = step(causal_model("Llama"))
    init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        model, mesh = causal_model("Llama"), device_mesh.init_device_mesh("cpu", (1,))
        for part in (*((model.lm_head,) if own_unit else ()), model):
            fully_shard(part, mesh=mesh)
        with apply_fused_loss(model):
            for _ in range(2):  # the second time without the first call's check
                loss, gradients = step(model)
                agree((loss, {name: g.full_tensor() for name, g in gradients.items()}), want, 1e-5)
    finally:
        destroy_process_group()


def test_prompt_tuning(causal_model):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(causal_model("Llama"), config)
    want = step(model)
    with apply_fused_loss(model):
        agree(step(model), want, 1e-5)


def test_autocast_and_shifted_labels_and_a_compiled_model(causal_model):
    model = causal_model("Llama")
    shifted = torch.nn.functional.pad(LABELS, (0, 1), value=-100)[:, 1:]
    want = step(model)
    with torch.autocast("cpu", torch.bfloat16):
        rough = step(model)
    with apply_fused_loss(model):
        agree(step(model, shift_labels=shifted), want, 1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            agree(step(model), rough, 2e-2)
    compiled = torch.compile(model, backend="eager")
    with apply_fused_loss(compiled):
        loss = compiled(input_ids=IDS, labels=LABELS).loss
        torch.testing.assert_close(loss.detach(), want[0])


def test_the_trainer_counts_items_over_accumulated_batches(causal_model, tmp_path):
    rows = [{"input_ids": IDS[i % 2], "labels": LABELS[(i + 1) % 2]} for i in range(8)]

    def losses(fused):
        model = causal_model("Llama")
        args = transformers.TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=1, gradient_accumulation_steps=2, use_cpu=True,
            learning_rate=1e-2, logging_steps=1, report_to=[], disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, args, train_dataset=rows, eval_dataset=rows, compute_metrics=lambda p: {"n": p.predictions.shape[-1]}
        )
        if fused:
            apply_fused_loss(model)
        trainer.train()
        assert trainer.evaluate()["eval_n"] == 67
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    assert losses(True) == pytest.approx(losses(False), rel=1e-5)


def test_a_models_loss_function(causal_model):
    model = causal_model("GPT2")
    want = step(model)
    model.loss_function = fused_lm_loss
    agree(step(model), want, 1e-5)
    agree(step(model, num_items_in_batch=7), (want[0] * 9 / 7, {k: v * 9 / 7 for k, v in want[1].items()}), 1e-5)
    hidden = model.transformer(IDS).last_hidden_state
    head = fa.Head(hidden, model.lm_head.weight)
    torch.testing.assert_close(fused_lm_loss(head, LABELS, 67), want[0])
    nothing = fused_lm_loss(head, torch.full_like(LABELS, -100))
    nothing.backward()
    assert float(nothing) == 0.0
    with pytest.raises(ValueError, match="vocab_size must be that of the logits, 67; got 66"):
        fused_lm_loss(head, LABELS, 66)


@pytest.mark.parametrize("shape", ["batch", "row", "unshifted"])
@pytest.mark.parametrize("given", [{}, {"num_items_in_batch": 7}, {"softcap": 0.5}])
def test_a_loss_whose_gradient_is_formed_with_it(shape, given):
    """The plan `objective`: the same loss and gradients as from the logits, a part of the batch at a time."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 5, 8, generator=g), torch.randn(67, 8, generator=g)
    labels = torch.randint(0, 67, (3, 5), generator=g).masked_fill(torch.rand(3, 5, generator=g) < 0.3, -100)
    if shape == "row":
        hidden, labels = hidden[0], labels[0]
    more = {**given, **({"shift_labels": labels} if shape == "unshifted" else {})}
    found = []
    for plan in ("keep", "objective"):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        head = fa.Head(*leaves, plan=plan, chunk_bytes=None if plan == "keep" else 4 * 67 * 4)
        loss = fused_lm_loss(head, labels, 67, **more)
        found.append((loss, *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*found)
    with torch.no_grad():
        head = fa.Head(hidden, weight, plan="objective")
        torch.testing.assert_close(fused_lm_loss(head, labels, 67, **more), found[0][0])
    nothing = fused_lm_loss(fa.Head(*leaves, plan="objective"), torch.full_like(labels, -100))
    assert float(nothing) == 0.0
    assert not any(gradient.any() for gradient in torch.autograd.grad(nothing, leaves))


def test_a_model_with_that_plan(causal_model):
    model = causal_model("Llama")
    want = step(model)
    with apply_fused_loss(model, plan="objective"):
        agree(step(model), want, 1e-5)


class Rescaled(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = 2 * self.lm_head(self.model(input_ids).last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


class Inline(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=logits.mean(), logits=logits)


class LateUse(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        loss = self.loss_function(logits, labels, self.vocab_size) + logits.mean()
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


def test_what_would_be_wrong_is_refused(causal_model):
    config = causal_model("Llama").config
    with (
        apply_fused_loss(rescaled := Rescaled(config)),
        pytest.raises(ValueError, match=r"not 1\.0 times those"),
    ):
        step(rescaled)
    assert "forward" not in rescaled.lm_head.__dict__
    with apply_fused_loss(inline := Inline(config)), pytest.raises(ValueError, match="without its loss_function"):
        step(inline)
    with apply_fused_loss(late := LateUse(config)):
        assert step(late)[0].isnan()
    model = causal_model("Llama")
    model.loss_function = nn.functional.cross_entropy
    with pytest.raises(ValueError, match="the loss of LlamaForCausalLM must be ForCausalLMLoss"):
        apply_fused_loss(model)
    model = causal_model("Llama")
    model.config.z_loss_coefficient = 0.1
    with pytest.raises(ValueError, match=r"adds a loss of its logits: z_loss_coefficient=0\.1"):
        apply_fused_loss(model)
    with pytest.raises(ValueError, match="with an output head; got LlamaModel"):
        apply_fused_loss(model.model)
