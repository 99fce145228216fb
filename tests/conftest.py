"""Fixtures shared by several test files: a tokenizer and a language model small enough to train in a second, a made-up
corpus, and a GPU that is simulated."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import random
import shutil
import sys
import tarfile
from pathlib import Path

import pytest

# Workers of `pytest -n` share the cores: one thread each, before torch counts them. Tests of threads set their own.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Byte-level BPE with <s> in front of every text, and </s> both to end texts and to pad."""
    pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
    from fastalign.demo.models import train_tokenizer

    texts = ["the movie is good", "the movie is bad", "a great film and great fun", "a dull film , awful and long"]
    return train_tokenizer(texts * 3, vocab_size=300)


@pytest.fixture
def tiny_model(tiny_tokenizer):
    """A function that makes the same GPT-2 of about ten thousand weights again and again."""
    from fastalign.demo.models import small_model

    return lambda: small_model(len(tiny_tokenizer), hidden_size=16, layers=1, seed=0)


def _module_from(path: Path, name: str):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def extreme_rows():
    """Checks that each backend's tests call."""
    return _module_from(Path(__file__).with_name("extreme_rows.py"), "extreme_rows_under_test")


@pytest.fixture(scope="session")
def cuda_simulator():
    """The CUDA backend on CPU tensors: the real launch code, its kernels run by a PTX simulator."""
    pytest.importorskip("ptxsim", reason="needs ptxsim, a PTX simulator")
    pytest.importorskip("pybind11", reason="needs pybind11")
    nvcc, compiler = shutil.which("nvcc"), shutil.which("g++")
    if nvcc is None or compiler is None:
        pytest.skip(f"needs {'nvcc' if nvcc is None else 'g++'}")
    path = Path(__file__).resolve().parents[1] / "bench" / "gpu/cuda_simulator.py"
    return _module_from(path, "cuda_simulator_under_test").Simulator(nvcc, "sm_90a")


def _backends():
    """(name, instruction set): plain PyTorch, the CPU's kernels by every set there is, CUDA's in the simulator."""
    from fastalign._backends import cpu_isas

    return [("eager", None), *(("cpu", isa) for isa in cpu_isas()), ("cuda", None)]


@pytest.fixture(params=_backends(), ids=lambda b: b[1] or b[0])
def backend(request):
    """Each backend in its turn; a test module's SIMULATION are options of the simulator."""
    import fastalign

    name, isa = request.param
    with contextlib.ExitStack() as stack:
        if name == "cuda":
            simulator = request.getfixturevalue("cuda_simulator")
            stack.enter_context(simulator(**getattr(request.module, "SIMULATION", {})))
            stack.enter_context(simulator.raising())
        else:
            stack.enter_context(fastalign.use_backend(name, isa=isa))
        yield name


_SCORER = """
class SentimentIntensityAnalyzer:
    def polarity_scores(self, text):
        return {"compound": (text.count("good") - text.count("bad")) / (1 + len(text.split()))}
"""


@pytest.fixture(scope="session")
def made_up_rows() -> list[tuple[float, str]]:
    """400 reviews with their mean ratings, whose words say whether they are good."""
    draw = random.Random(0)
    tones = {2.0: ["good", "great", "fun"], -2.0: ["bad", "dull", "awful"]}
    rows = []
    for i in range(400):
        rating = draw.choice(list(tones))
        words = [draw.choice(["the film", "a movie", "this story", "the plot"]), "by", f"N{i % 37}", "is"]
        for _ in range(draw.randint(2, 6)):
            words += [draw.choice(tones[rating]), draw.choice(["and", "with", ","])]
        rows.append((rating + draw.random(), " ".join(words[:-1])))
    return rows


def _archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def made_up_corpus(made_up_rows, tmp_path, monkeypatch) -> Path:
    """A cache with a source distribution of the real one's form, and a pip that may not be called."""
    for package in ("transformers", "sklearn", "rich"):
        pytest.importorskip(package, reason=f"needs {package} (the extra `train`)")
    from fastalign.trainers.data import fetch, reviews

    rows = made_up_rows
    rated = "\r\n".join(f"{i}\t{rating}\t{text}" for i, (rating, text) in enumerate(rows, 1))
    raters = "\r\n".join(f"{i}\t{rating}\t0.5\t[1, 2, {i % 4}]" for i, (rating, _) in enumerate(rows, 1))
    parts = {reviews._RATED: rated.encode(), reviews._RATERS: b"\xef\xbb\xbf" + raters.encode()}
    inner = _archive({"hutto/" + n.format(d): x for n, x in parts.items() for d in reviews.DOMAINS.values()})
    outer = {"v/" + reviews._INNER: inner, "v/vaderSentiment/vaderSentiment.py": _SCORER.encode()}
    outer |= {f"v/vaderSentiment/{name}": b"" for name in reviews._SCORER[1:]}
    data = _archive(outer)
    package = fetch.VADER
    monkeypatch.setattr(
        reviews, "VADER", fetch.Pinned(package.name, "0", "corpus.tar.gz", hashlib.sha256(data).hexdigest())
    )
    monkeypatch.setenv("FASTALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "run_pip", lambda *_: pytest.fail("pip was called"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "corpus.tar.gz").write_bytes(data)
    return tmp_path


@pytest.fixture
def make(tiny_model, tiny_tokenizer, tmp_path):
    """A policy trainer on the tiny model, a few steps long: make(options), PPO unless told otherwise."""
    from fastalign.trainers.ppo import PPOConfig, PPOTrainer

    prompts = [{"prompt": text} for text in ("the movie", "a film", "the", "a great", "fun and", "long", "is", "a")]
    options = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "disable_tqdm": True, "response_length": 6}
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_mini_batches": 2}
    options |= {"num_ppo_epochs": 2, "learning_rate": 1e-2, "total_episodes": 16}

    def lengths(completions):
        return [len(text) % 7 - 3.0 for text in completions]

    def build(trainer=PPOTrainer, config=PPOConfig, *, reward=lengths, eval_rows=None, **extra):
        args = config(**{**options, **extra})
        return trainer(tiny_model(), args, prompts, eval_rows, tiny_tokenizer, reward=reward)

    return build


@pytest.fixture(autouse=True)
def own_reference_cache(tmp_path, monkeypatch):
    """Log-probabilities of references that a test computes are neither found in nor left in the user's cache."""
    monkeypatch.setenv("FASTALIGN_REFERENCE_CACHE", str(tmp_path / "reference"))


@pytest.fixture(scope="session")
def causal_model():
    """A function that makes one of transformers' causal language models, tiny: (family, tied head?) -> model."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
    import torch

    common = {"vocab_size": 67, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
    common |= {"bos_token_id": 1, "eos_token_id": 2}
    dense = {**common, "intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 32}
    mixers = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 4}
    families = {
        "GPT2": {"vocab_size": 67, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
        "Gemma2": {**dense, "head_dim": 8, "final_logit_softcapping": 0.3},
        "GPTNeoX": {**common, "intermediate_size": 24, "max_position_embeddings": 32},
        "Granite": {**dense, "logits_scaling": 0.25},
        "Cohere": {**dense, "logit_scale": 4.0},
        "FalconH1": {**dense, **mixers, "lm_head_multiplier": 3.0},
        "GPTJ": {"vocab_size": 67, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "n_positions": 32},
        "MiniCPM3": {**dense, "num_key_value_heads": 2, "dim_model_base": 4, "kv_lora_rank": 4, "q_lora_rank": 4}
        | {"qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4},
        "Mixtral": {**dense, "num_local_experts": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5},
    }
    dropouts = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}

    def make(family, tied=False):
        if not hasattr(transformers, f"{family}Config"):
            pytest.skip(f"needs a transformers with {family}, which {transformers.__version__} has not")
        options = families.get(family, dense) | (dropouts if family.startswith("GPT") else {})
        config = getattr(transformers, f"{family}Config")(**options, tie_word_embeddings=tied)
        torch.manual_seed(0)
        name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
        model = getattr(transformers, name)(config)
        with torch.no_grad():  # initial weights are so small that every token is alike
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture(scope="session")
def as_the_reference():
    """A function that holds loss and gradients of a reference's case to its float64 formula."""
    import torch

    from fastalign.reference import cast

    def check(case, sizes, dtype, tolerance):
        inputs = cast(case.inputs(sizes, torch.Generator().manual_seed(5)), dtype)
        results = []
        for compute in (case.fused, case.reference):
            given = {n: t.clone().requires_grad_() if n in case.leaves else t for n, t in inputs.items()}
            loss = compute(**given)
            results.append([loss.detach().double(), *torch.autograd.grad(loss, [given[n] for n in case.leaves])])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=tolerance, atol=tolerance)

    return check


@pytest.fixture
def programs(monkeypatch):
    """How losses ran: `programs.ran` is what the compiled calls returned, `programs.off()` a block without them."""
    from fastalign.ops.fused_loss import FusedLoss

    class Programs:
        def __init__(self):
            self.ran = []

        @contextlib.contextmanager
        def off(self):
            with monkeypatch.context() as patch:
                for name in ("of_logits", "of_statistics"):
                    patch.setattr(FusedLoss, name, lambda *_, **__: None)
                yield

    found, real = Programs(), FusedLoss.of_logits
    monkeypatch.setattr(FusedLoss, "of_logits", lambda *a, **k: found.ran.append(real(*a, **k)) or found.ran[-1])
    return found


@pytest.fixture(scope="session")
def own_formula():
    """A loss of one token that uses all that such a loss may."""
    return _module_from(Path(__file__).with_name("own_formula.py"), "own_formula").OWN_FORMULA
