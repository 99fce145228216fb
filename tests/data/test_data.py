"""Rows, tokens and batches: nothing merges over the boundary, nothing is emptied, labels sit where they belong."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
datasets = pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

import fastalign as fa  # noqa: E402
from fastalign.models.logits import model_logits  # noqa: E402
from fastalign.trainers.data.collate import PreferenceCollator, SFTCollator, pad  # noqa: E402
from fastalign.trainers.data.encode import Encoder  # noqa: E402
from fastalign.trainers.data.files import load_rows  # noqa: E402
from fastalign.trainers.data.sampler import UpdateSampler  # noqa: E402
from fastalign.trainers.data.tokenize import tokenize_preferences, tokenize_sft  # noqa: E402
from fastalign.utils.batch import IGNORE  # noqa: E402


@pytest.fixture(scope="module")
def metaspace_tokenizer():
    """Like SentencePiece: a space before every text, also before a completion tokenised alone."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    bpe.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["</s>"], initial_alphabet=["\n"], show_progress=False)
    bpe.train_from_iterator(["the movie was ie mov"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")


def test_no_token_crosses_the_boundary(tiny_tokenizer):
    joined = tiny_tokenizer("the movie", add_special_tokens=False)["input_ids"]
    alone = tiny_tokenizer("the mov", add_special_tokens=False)["input_ids"]
    assert joined[: len(alone)] != alone, "the case needs a tokenizer that merges here"
    prompt_ids, (ids,) = Encoder(tiny_tokenizer, 64)("the mov", ["ie is good"])
    assert prompt_ids == [tiny_tokenizer.bos_token_id, *alone]
    assert tiny_tokenizer.decode(ids[:-1]) == "ie is good"
    assert ids[-1] == tiny_tokenizer.eos_token_id


def test_joint_tokenisation_is_kept_where_nothing_merges(tiny_tokenizer):
    prompt_ids, (ids,) = Encoder(tiny_tokenizer, 64)("the movie", [" is good"])
    assert prompt_ids + ids[:-1] == tiny_tokenizer("the movie is good")["input_ids"]


def test_no_space_is_invented_inside_a_word(metaspace_tokenizer):
    prompt_ids, (ids,) = Encoder(metaspace_tokenizer, 64)("the mov", ["ie was"])
    assert metaspace_tokenizer.decode(prompt_ids + ids[:-1]) == "the movie was"


def test_eos_is_appended_once_and_only_on_request(tiny_tokenizer):
    eos = tiny_tokenizer.eos_token_id
    for text in (" good", " good</s>"):
        assert Encoder(tiny_tokenizer, 64)("the", [text])[1][0].count(eos) == 1
    assert eos not in Encoder(tiny_tokenizer, 64, append_eos=False)("the", [" good"])[1][0]


def test_append_eos_needs_an_eos(metaspace_tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=metaspace_tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="append_eos"):
        Encoder(bare, 64)


class TestTruncation:
    PROMPT = "the movie is good and the movie is bad"

    def test_prompt_loses_its_beginning_before_the_completion_loses_anything(self, tiny_tokenizer):
        whole_prompt, (whole,) = Encoder(tiny_tokenizer, 500)(self.PROMPT, [" great fun"])
        prompt_ids, (ids,) = Encoder(tiny_tokenizer, len(whole) + 4)(self.PROMPT, [" great fun"])
        assert ids == whole
        assert prompt_ids == [tiny_tokenizer.bos_token_id, *whole_prompt[-3:]]

    def test_max_prompt_length(self, tiny_tokenizer):
        prompt_ids, _ = Encoder(tiny_tokenizer, 500, max_prompt_length=3)(self.PROMPT, [" fun"])
        assert len(prompt_ids) == 3
        assert prompt_ids[0] == tiny_tokenizer.bos_token_id

    def test_long_completion_keeps_its_start_and_has_no_false_end(self, tiny_tokenizer):
        text = " great fun" * 20
        whole = Encoder(tiny_tokenizer, 500)("the", [text])[1][0]
        prompt_ids, (ids,) = Encoder(tiny_tokenizer, 8)(self.PROMPT, [text])
        assert len(prompt_ids) + len(ids) == 8
        assert ids == whole[: len(ids)]
        assert tiny_tokenizer.eos_token_id not in ids

    def test_both_completions_keep_one_prompt(self, tiny_tokenizer):
        prompt_ids, (short, long) = Encoder(tiny_tokenizer, 16)(self.PROMPT, [" fun", " a dull film , awful and long"])
        assert short[-1] == long[-1] == tiny_tokenizer.eos_token_id
        assert len(prompt_ids) + len(long) <= 16

    @settings(max_examples=60, deadline=None)
    @given(prompt=st.text(max_size=30), text=st.text(min_size=1, max_size=30), length=st.integers(3, 20))
    def test_never_too_long_and_never_empty(self, tiny_tokenizer, prompt, text, length):
        prompt_ids, (ids,) = Encoder(tiny_tokenizer, length)(prompt, [text])
        assert len(prompt_ids) >= 1
        assert len(ids) >= 1
        assert len(prompt_ids) + len(ids) <= length


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=5),
    side=st.sampled_from(["left", "right"]),
)
def test_labels_are_the_next_tokens_of_the_completion(lengths, side):
    """Ids are counted so that every one is different; the padding id is also the last real one, as where pad == eos."""
    sequences, count = [], 1
    for prompt, completion in lengths:
        ids = list(range(count, count + prompt + completion))
        sequences.append((ids[:prompt], ids[prompt:]))
        count += len(ids)
    batch = pad(sequences, pad_token_id=count - 1, padding_side=side)
    for row, (prompt, completion) in enumerate(sequences):
        real = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][real].tolist() == [*prompt, *completion]
        assert batch["position_ids"][row][real].tolist() == list(range(len(prompt) + len(completion)))
        scored = batch["labels"][row] != IGNORE
        assert batch["labels"][row][scored].tolist() == (completion if prompt else completion[1:])
        assert torch.equal(batch["input_ids"][row].roll(-1)[scored], batch["labels"][row][scored])


def test_end_of_sequence_is_a_target_where_it_also_pads(tiny_tokenizer):
    assert tiny_tokenizer.pad_token_id == tiny_tokenizer.eos_token_id
    rows = tokenize_sft(
        [{"prompt": "the movie", "completion": t} for t in (" is good", " is good and great fun")],
        Encoder(tiny_tokenizer, 64),
    )
    labels = SFTCollator(tiny_tokenizer.pad_token_id)(list(rows))["labels"]
    assert (labels == tiny_tokenizer.eos_token_id).sum(1).tolist() == [1, 1]


def test_padding_side_and_amount_change_no_log_probability(tiny_tokenizer, tiny_model):
    model = tiny_model().eval()
    encode = Encoder(tiny_tokenizer, 64)
    texts = [("the movie", " is good"), ("a", " dull film , awful and long")]
    sequences = [(ids, tails[0]) for ids, tails in (encode(p, [c]) for p, c in texts)]

    def logps(rows, side):
        batch = pad(rows, tiny_tokenizer.pad_token_id, side)
        with torch.no_grad():
            return fa.sequence_logps(model_logits(model, batch), batch["labels"])

    alone = torch.cat([logps([row], "right") for row in sequences])
    for side in ("right", "left"):
        torch.testing.assert_close(logps(sequences, side), alone, rtol=1e-5, atol=1e-5)


def test_preference_batch_holds_chosen_then_rejected(tiny_tokenizer):
    rows = [
        {
            "prompt": "the",
            "chosen": f" good{i}",
            "rejected": f" bad{i}",
            "ref_chosen_logps": -i,
            "ref_rejected_logps": -9.0,
        }
        for i in range(3)
    ]
    batch = PreferenceCollator(1)(list(tokenize_preferences(rows, Encoder(tiny_tokenizer, 64))))
    texts = [
        tiny_tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert texts == [f"the good{i}" for i in range(3)] + [f"the bad{i}" for i in range(3)]
    assert batch["ref_chosen_logps"].tolist() == [0, -1, -2]


def test_sampler_sorts_inside_updates_that_stay_random():
    lengths = [(7 * i) % 23 for i in range(50)]
    sampler = UpdateSampler(lengths, update_size=8, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == list(range(50))
    updates = [orders[0][i : i + 8] for i in range(0, 50, 8)]
    assert all([lengths[i] for i in u] == sorted((lengths[i] for i in u), reverse=True) for u in updates)
    shuffled = torch.randperm(50, generator=torch.Generator().manual_seed(3)).tolist()
    assert [set(u) for u in updates] == [set(shuffled[i : i + 8]) for i in range(0, 50, 8)]


@pytest.mark.parametrize("empty", ["", "  ", None])
def test_empty_completion_is_refused_with_its_row(tiny_tokenizer, empty):
    encode = Encoder(tiny_tokenizer, 64)
    with pytest.raises(ValueError, match=r"'completion' must not be empty.*row 1"):
        tokenize_sft([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": empty}], encode)
    with pytest.raises(ValueError, match=r"'rejected' must not be empty.*row 0"):
        tokenize_preferences([{"prompt": "a", "chosen": "b", "rejected": empty}], encode)


def test_column_of_another_type_is_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match=r"'completion' must hold text; row 0 .* int"):
        tokenize_sft([{"prompt": "a", "completion": 3}], Encoder(tiny_tokenizer, 64))


class TestFiles:
    ROWS = ({"prompt": "", "completion": "x, y", "other": 1}, {"prompt": "p", "completion": "z", "other": 2})

    @pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
    def test_formats(self, tmp_path, monkeypatch, suffix):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        path = tmp_path / f"rows.{suffix}"
        source = datasets.Dataset.from_list(list(self.ROWS))
        write = {"csv": source.to_csv, "parquet": source.to_parquet}.get(suffix)
        if write:
            write(path)
        elif suffix == "json":
            path.write_text(json.dumps(self.ROWS))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in self.ROWS))
        rows = load_rows(str(path), required=("prompt", "completion"))
        assert rows.column_names == ["prompt", "completion"]
        assert rows["completion"] == ["x, y", "z"]
        assert rows[0]["prompt"] in ("", None)

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("rows.xlsx", "ending in"),
            ("absent.jsonl", "there is no"),
            ([], "at least one row"),
            ([{"prompt": "a", "text": "b"}], "lacks completion and has prompt, text"),
        ],
    )
    def test_bad_sources(self, source, message):
        with pytest.raises(ValueError, match=message):
            load_rows(source, required=("prompt", "completion"))

    def test_half_of_the_reference_is_refused(self, tiny_tokenizer):
        with pytest.raises(ValueError, match="all of the columns"):
            tokenize_preferences(
                [{"prompt": "a", "chosen": "b", "rejected": "c", "ref_chosen_logps": 0.0}], Encoder(tiny_tokenizer, 64)
            )
