"""Fixtures shared by several test files: a tokenizer and a language model small enough to train in a second."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Byte-level BPE with <s> in front of every text, and </s> both to end texts and to pad."""
    pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
    from fastalign.trainers.demo_models import train_tokenizer

    texts = ["the movie is good", "the movie is bad", "a great film and great fun", "a dull film , awful and long"]
    return train_tokenizer(texts * 3, vocab_size=300)


@pytest.fixture
def tiny_model(tiny_tokenizer):
    """A function that makes the same GPT-2 of about ten thousand weights again and again."""
    from fastalign.trainers.demo_models import small_model

    return lambda: small_model(len(tiny_tokenizer), hidden_size=16, layers=1, seed=0)


@pytest.fixture(autouse=True)
def own_reference_cache(tmp_path, monkeypatch):
    """Log-probabilities of references that a test computes are neither found in nor left in the user's cache."""
    monkeypatch.setenv("FASTALIGN_REFERENCE_CACHE", str(tmp_path / "reference"))
