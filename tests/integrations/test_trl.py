"""Under TRL's trainers: the same losses as with TRL's own functions, patched whole or not at all."""

import contextlib
import math
import sys

import pytest
import torch

trl = pytest.importorskip("trl", reason="needs TRL (the extra `dev`)")
datasets = pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")

from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS  # noqa: E402
from trl.trainer import utils  # noqa: E402

from fastalign.integrations import trl as fused  # noqa: E402

N, H, V = 11, 16, 203
THEIRS = {name: getattr(utils, name) for name in fused._REPLACED if hasattr(utils, name)}
CHUNKED = utils._ChunkedLogProbFunction


class ByDefinition:
    """TRL's function in torch's own operations, for TRL 1.15, whose own runs on GPUs alone."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk, softcap=None, scale=1.0, outputs=OPTIONAL_OUTPUTS):
        logits = torch.nn.functional.linear(hidden, weight, bias)
        logits = scale * logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature
        all_logps = torch.log_softmax(logits, -1)
        found = {
            "entropy": lambda: -(all_logps.exp() * all_logps).sum(-1),
            "log_sum_sq_probs": lambda: torch.logsumexp(2 * all_logps.detach(), -1),
            "mean_logits": lambda: logits.detach().mean(-1),
            "is_top1": lambda: logits.argmax(-1) == targets,
        }
        logps = all_logps.gather(-1, targets[:, None]).squeeze(-1)
        return logps, *(found[name]() if name in outputs else None for name in OPTIONAL_OUTPUTS)


def runs_here(function):
    with contextlib.suppress(RuntimeError):
        return bool(function.apply(torch.zeros(1, 2), torch.zeros(3, 2), None, torch.tensor([1]), 1.0, 2))
    return False


PEER = CHUNKED if runs_here(CHUNKED) else ByDefinition


# ----------------------------------------------------------------------------------------------------- single functions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outputs", [(), ("log_probs", "entropy", "is_top1"), OPTIONAL_OUTPUTS], ids=len)
@pytest.mark.parametrize("scale", [(None, 1.0), (4.0, 1.5)], ids=["plain", "scaled"])
def test_the_chunked_function(dtype, outputs, scale):
    g = torch.Generator().manual_seed(0)
    # Inputs that the dtype holds, so that what is exact is exact of them.
    hidden, weight, bias = (torch.randn(*size, generator=g).to(dtype).float() for size in ((N, H), (V, H), (V,)))
    targets = (hidden @ weight.T + bias).argmax(-1)
    targets[::2] = torch.randint(0, V, (6,), generator=g)

    def run(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)]
        results = function.apply(*leaves, targets, 0.9, 64, *scale, outputs)
        loss = results[0].sum() if results[1] is None else results[0].sum() + 0.3 * results[1].sum()
        return results, torch.autograd.grad(loss, leaves)

    (exact, exact_grads), (theirs, their_grads), (ours, grads) = (
        run(fused.ChunkedLogProbFunction, torch.float64), run(PEER, dtype), run(fused.ChunkedLogProbFunction, dtype)
    )  # fmt: skip
    for got, peer, want in zip((*ours, *grads), (*theirs, *their_grads), (*exact, *exact_grads), strict=True):
        assert (got is None) == (peer is None)
        if got is None:
            continue
        assert (got.dtype, got.shape, got.requires_grad) == (peer.dtype, peer.shape, peer.requires_grad)
        if got.dtype == torch.bool:
            assert torch.equal(got, peer)
        else:
            error, own = ((t.double() - want).norm() for t in (got, peer))
            # Both round the same logits and gradients to 16 bits, in GEMMs of other shapes.
            assert error <= 1.5 * own + 2e-6 * want.norm()


def test_without_tokens_and_refusals():
    hidden, weight = torch.zeros(0, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    results = fused.ChunkedLogProbFunction.apply(hidden, weight, None, none, 1.0, 64)
    assert all(t.shape == (0,) for t in results)
    results[0].sum().backward()
    assert (weight.grad == 0).all()
    with pytest.raises(ValueError, match=r"outputs must be among log_probs, entropy.*got 'varentropy'"):
        fused.ChunkedLogProbFunction.apply(hidden, weight, None, none, 1.0, 64, outputs=("varentropy",))
    weight.ds_id = 0
    with pytest.raises(ValueError, match="ZeRO-3 is not supported"):
        fused.ChunkedLogProbFunction.apply(hidden, weight, None, none, 1.0, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_functions_of_logits(dtype):
    g = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(3, 5, V, generator=g)).to(dtype)
    index, several = torch.randint(0, V, (3, 5), generator=g), torch.randint(0, V, (3, 5, 4), generator=g)
    mask = torch.ones(3, 5, dtype=torch.int64)
    mask[1, 2:] = 0
    calls = {
        "selective_log_softmax": [(index,), (several,), (index, 0.7), (index, 1.0, mask), (index[0],)],
        "entropy_from_logits": [(), (2,)],
        "selective_log_softmax_and_entropy": [(index,), (index, False), (index, True, 0.7, mask)],
    }
    for name, variants in calls.items():
        for arguments in variants:
            of = (
                logits[0]
                if arguments and isinstance(arguments[0], torch.Tensor) and arguments[0].dim() == 1
                else logits
            )

            def run(function, dtype, arguments=arguments, of=of):
                leaf = of.to(dtype).requires_grad_()
                results = function(leaf, *arguments)
                results = results if isinstance(results, tuple) else (results,)
                flags = [t.requires_grad for t in results]
                loss = sum(t.double().square().sum() for t in results)
                return flags, (*results, torch.autograd.grad(loss, leaf)[0])

            flags, exact = run(THEIRS[name], torch.float64)
            _, theirs = run(THEIRS[name], dtype)
            same, ours = run(getattr(fused, name), dtype)
            assert flags == same
            for got, peer, want in zip(ours, theirs, exact, strict=True):
                assert got.shape == peer.shape
                error, own = (float((t.double() - want).norm()) for t in (got, peer))
                assert error <= own + 1e-6 * float(want.norm()), (name, arguments)


# ---------------------------------------------------------------------------------------------------- patch and unpatch
def in_place():
    """Every place in TRL's modules that holds one of its functions or one of ours."""
    held = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "trl" and module is not None:
            for key, value in vars(module).items():
                if any(value is f for f in (*THEIRS.values(), CHUNKED, *fused._REPLACED.values())):
                    held[name, key] = value
    return held


def test_patched_whole_twice_and_back():
    before = in_place()
    assert len(before) >= 6
    fused.unpatch()
    fused.patch()
    fused.patch()
    try:
        during = in_place()
        assert during.keys() == before.keys()
        assert all(any(value is f for f in fused._REPLACED.values()) for value in during.values())
    finally:
        fused.unpatch()
    assert in_place() == before
    fused.unpatch()
    with fused.patched():
        assert utils.selective_log_softmax is fused.selective_log_softmax
    assert in_place() == before


def no_such_module(monkeypatch):
    """As in TRL 1.14, where each trainer has a head of its own."""
    monkeypatch.setitem(sys.modules, "trl.kernels.chunked_logprob", None)


def other_arguments(monkeypatch):
    monkeypatch.setattr(utils, "entropy_from_logits", lambda logits: logits)


def missing(monkeypatch):
    monkeypatch.delattr(utils, "selective_log_softmax_and_entropy")


def replaced(monkeypatch):
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", object())


REFUSED = {
    r"has no trl\.kernels\.chunked_logprob \(.*\); 1\.15 and later have it": no_such_module,
    r"entropy_from_logits must take \['logits', 'chunk_size'\]; it takes \['logits'\]": other_arguments,
    "has no selective_log_softmax_and_entropy": missing,
    "has been replaced by other code already": replaced,
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_known_is_refused_and_nothing_changed(monkeypatch, message):
    REFUSED[message](monkeypatch)
    before = in_place()
    with pytest.raises(ValueError, match=message):
        fused.patch()
    assert in_place() == before
    fused.unpatch()
    assert in_place() == before


def test_a_later_version_with_the_same_functions_is_served_with_a_warning(monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    before = in_place()
    with pytest.warns(UserWarning, match=r"TRL 1\.17\.0 was not tested; .* of 1\.15 and 1\.16 take"), fused.patched():
        assert utils.selective_log_softmax is fused.selective_log_softmax
    assert in_place() == before


# --------------------------------------------------------------------------------------------------------- the trainers
PROMPTS = ["the movie is", "a film", "a great", "dull and"]
PAIRS = [{"prompt": p, "chosen": " good", "rejected": " bad and long"} for p in PROMPTS]
TEXTS = [{"prompt": p, "completion": " good fun"} for p in PROMPTS]
UNPAIRED = [{"prompt": p, "completion": " good", "label": i % 2 == 0} for i, p in enumerate(PROMPTS)]
ONLY = [{"prompt": p} for p in PROMPTS]
GENERATE = {"num_generations": 2, "max_completion_length": 5, "beta": 0.1}


def length(completions, **_):
    return [float(len(text) % 5) for text in completions]


TRAINERS = {
    "SFT": (TEXTS, {}, {}),
    "SFT-dft": (TEXTS, {"loss_type": "dft"}, {}),
    "DPO": (PAIRS, {"use_weighting": True}, {}),
    "KTO": (UNPAIRED, {}, {}),
    "GRPO": (ONLY, GENERATE, {"reward_funcs": length}),
    "RLOO": (ONLY, GENERATE, {"reward_funcs": length}),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_the_same_steps_with_and_without(name, tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    rows, options, arguments = TRAINERS[name]
    kind = name.partition("-")[0]
    tiny_model().save_pretrained(tmp_path / "model")  # TRL loads the reference from where the model came from

    def run():
        torch.manual_seed(0)
        config = getattr(trl, f"{kind}Config")(
            str(tmp_path / "run"), max_steps=20, per_device_train_batch_size=2, learning_rate=0.1, logging_steps=1,
            optim="sgd", use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no", seed=3,
            **options,
        )  # fmt: skip
        trainer = getattr(trl, f"{kind}Trainer")(
            model=str(tmp_path / "model"), args=config, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tiny_tokenizer, **arguments,
        )  # fmt: skip
        trainer.train()
        return [row for row in trainer.state.log_history if "loss" in row]

    with monkeypatch.context() as own:
        own.setattr(utils, "_ChunkedLogProbFunction", PEER)
        want = run()
    calls = []

    class Counted(fused.ChunkedLogProbFunction):
        @staticmethod
        def apply(*given, **named):
            calls.append(1)
            return fused.ChunkedLogProbFunction.apply(*given, **named)

    with fused.patched():
        utils._ChunkedLogProbFunction, ours = Counted, utils._ChunkedLogProbFunction
        try:
            got = run()
        finally:
            utils._ChunkedLogProbFunction = ours
    assert len(want) == len(got) == 20
    assert len(calls) >= 20
    # Steps of plain SGD pass differences of gradients on as they are. Adam divides by the gradient's own size: where a
    # gradient is 0 but for rounding (a group of equal rewards), it makes a full step in a random direction of it.
    # Every logged number is a float32 sum of at most about a thousand terms, whose roundings walk at random 32 eps far,
    # relative to the terms: for losses and the like log-probabilities of about log V, for gradients those of single
    # completions, which cancel in a group (RLOO's norms are 0.05 to 50). What a step of 0.1, its gradient clipped to 1,
    # makes of that is smaller still.
    walk = 32 * torch.finfo(torch.float32).eps
    for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "rewards/margins", "logits/chosen", "kl"):
        values = [float(row[key]) for row in want if key in row]
        terms = max(map(abs, values), default=0.0)
        if key != "grad_norm":
            terms = max(terms, math.log(len(tiny_tokenizer)))
        assert [float(row[key]) for row in got if key in row] == pytest.approx(values, rel=0, abs=walk * terms), key
