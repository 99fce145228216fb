"""The doctor's look at the teacher of a distillation."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")

from fastalign.demo.models import small_model
from fastalign.doctor.command import DoctorConfig, examine


@pytest.fixture
def look(tiny_model, tiny_tokenizer, tmp_path):
    """What is found of the teacher and of memory, with a teacher of so many tokens and its tokenizer."""

    def run(vocabulary, tokenizer):
        student, teacher = tmp_path / "student", tmp_path / "teacher"
        tiny_model().save_pretrained(student)
        tiny_tokenizer.save_pretrained(student)
        small_model(vocabulary, hidden_size=32, layers=2, seed=0).save_pretrained(teacher)
        tokenizer.save_pretrained(teacher)
        data = tmp_path / "rows.jsonl"
        data.write_text(json.dumps({"prompt": "the movie", "completion": " is good"}) + "\n")
        config = DoctorConfig(model=str(student), dataset=str(data), teacher_model=str(teacher))
        return {f.check: (f.level, f.text) for f in examine(config)}

    return run


def test_a_teacher_of_the_students_vocabulary(look, tiny_tokenizer):
    assert look(len(tiny_tokenizer), tiny_tokenizer)["teacher"] == ("ok", "")


def test_a_teacher_of_another_vocabulary(look, tiny_tokenizer):
    level, text = look(len(tiny_tokenizer) + 7, tiny_tokenizer)["teacher"]
    assert level == "error"
    assert f"a vocabulary of {len(tiny_tokenizer) + 7} tokens and the student one of {len(tiny_tokenizer)}" in text


def test_a_teacher_whose_tokens_have_other_ids(look, tiny_tokenizer):
    state = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    names = sorted(vocab, key=vocab.get)[-6:]
    for name, number in zip(names, [vocab[n] for n in reversed(names)], strict=True):
        vocab[name] = number
    other = type(tiny_tokenizer.backend_tokenizer).from_str(json.dumps(state))
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    level, text = look(len(tiny_tokenizer), type(tiny_tokenizer)(tokenizer_object=other, **tokens))["teacher"]
    assert level in ("warning", "error")
    assert "6 tokens have other ids for the teacher" in text
