"""Well-known forms of data, each through every kind of trainer that it can feed, and what is told of the rest."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import ClassVar

import pytest

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")

from fastalign.evaluation.evaluate import own_completions
from fastalign.evaluation.sample import read_prompts
from fastalign.trainers.data.encode import Encoder
from fastalign.trainers.data.files import read_rows
from fastalign.trainers.data.problems import tally
from fastalign.trainers.data.targets import as_completions, as_lists, as_pairs, as_prompts
from fastalign.trainers.data.tokenize import tokenize_lists, tokenize_preferences, tokenize_sft
from fastalign.trainers.policy.rollout import load_prompts

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASK, GOOD, BAD = (
    {"role": "user", "content": "is it good"},
    {"role": "assistant", "content": "it is great"},
    {"role": "assistant", "content": "it is awful"},
)
SHARE = [{"from": "human", "value": "is it good"}, {"from": "gpt", "value": "it is great"}]
HH = "\n\nHuman: is it good\n\nAssistant: yes\n\nHuman: why\n\nAssistant:"


@pytest.fixture
def encode(tiny_tokenizer):
    """An encoder whose tokenizer has a chat template."""
    tokenizer = type(tiny_tokenizer)(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    return Encoder(tokenizer, 200)


def texts(encode, ids):
    """What token ids say, at any depth of lists."""
    if ids and isinstance(ids[0], list):
        return [texts(encode, each) for each in ids]
    return encode.tokenizer.decode(ids)


class TestShareGPT:
    @pytest.mark.parametrize("column", ["conversations", "conversation", "messages"])
    def test_conversations(self, encode, column):
        rows = [{column: SHARE, "system": "be fun"}, {column: SHARE, "system": ""}]
        told = tokenize_sft(rows, encode)
        same = [{"messages": [*extra, ASK, GOOD]} for extra in ([{"role": "system", "content": "be fun"}], [])]
        assert list(told) == list(tokenize_sft(same, encode))

    def test_conversations_of_role_and_content(self, encode):
        assert list(tokenize_sft([{"conversations": [ASK, GOOD]}], encode)) == list(
            tokenize_sft([{"messages": [ASK, GOOD]}], encode)
        )

    def test_pairs_and_prompts(self, encode):
        row = {"conversations": SHARE[:1], "chosen": SHARE[1], "rejected": {"from": "gpt", "value": "it is awful"}}
        ours = {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}
        assert read_rows([row])[0] == ours
        for tokenize in (tokenize_preferences, tokenize_lists):
            assert list(tokenize([row], encode)) == list(tokenize([ours], encode))
        assert as_prompts(read_rows([{"conversations": SHARE}]))[0] == {"prompt": [ASK]}
        (prompt,) = load_prompts([{"conversations": SHARE}], encode.tokenizer, 99)
        assert prompt.text == "<user>is it good</s><assistant>"

    @pytest.mark.parametrize(
        ("cell", "message"),
        [
            ([{"from": "narrator", "value": "x"}], "row 1 .*speakers human, .*; got 'narrator'"),
            ("a text", "row 1 .*'conversations' must hold a list of messages; got str"),
        ],
    )
    def test_what_is_none_is_refused_with_its_row(self, encode, cell, message):
        with pytest.raises(ValueError, match=message):
            tokenize_sft([{"conversations": SHARE}, {"conversations": cell}], encode)


class TestAlpaca:
    ROWS: ClassVar = [
        {"instruction": "sum up", "input": "a film", "output": " good"},
        {"instruction": "hi", "input": "", "output": " hello"},
    ]

    def test_instruction_and_input_are_the_prompt(self, encode):
        rows = read_rows(self.ROWS)
        assert list(rows) == [
            {"prompt": "sum up\n\na film\n", "completion": " good"},
            {"prompt": "hi\n", "completion": " hello"},
        ]
        assert [texts(encode, r["completion_ids"]) for r in tokenize_sft(self.ROWS, encode)] == [
            " good</s>",
            " hello</s>",
        ]
        assert read_prompts(self.ROWS, 0) == ["sum up\n\na film\n", "hi\n"]

    def test_history_is_refused_not_dropped(self, encode):
        with pytest.raises(ValueError, match=r"row 0 .*'history' must be empty"):
            tokenize_sft([{**self.ROWS[0], "history": [["a", "b"]]}], encode)


class TestTranscripts:
    def test_the_prompt_ends_where_the_last_reply_begins(self, encode):
        """Replies that begin alike do not give their beginning away to the prompt."""
        row = tokenize_preferences([{"chosen": f"{HH} it is so good", "rejected": f"{HH} it is so bad"}], encode)[0]
        assert texts(encode, row["prompt_ids"]) == f"<s>{HH}"
        assert texts(encode, [row["chosen_ids"], row["rejected_ids"]]) == [" it is so good</s>", " it is so bad</s>"]

    def test_same_replies_have_their_prompt_too(self):
        assert read_rows([{"chosen": f"{HH} a", "rejected": f"{HH} a"}])[0]["prompt"] == HH

    @pytest.mark.parametrize(
        ("chosen", "rejected", "message"),
        [
            (f"{HH} a", f"{HH}", r"what follows the shared beginning must not be empty; it is in row 0 "),
            (f"{HH} a", f"{HH} b\n\nHuman: and\n\nAssistant: c", "row 0 .*differ in the assistant's last turn alone"),
            (f"{HH} a", f"{HH.replace('yes', 'no')} a", "row 0 .*differ in the assistant's last turn alone"),
        ],
    )
    def test_other_transcripts_are_refused_with_their_row(self, encode, chosen, rejected, message):
        with pytest.raises(ValueError, match=message):
            tokenize_preferences([{"chosen": chosen, "rejected": rejected}], encode)

    def test_prompts_for_sampling_and_evaluation(self, encode):
        rows = [{"chosen": f"{HH} good", "rejected": f"{HH} bad"}]
        assert read_prompts(rows, 0) == [HH]
        assert own_completions(rows, 0)[0] == {"prompt": HH, "completion": " good"}
        assert load_prompts(rows, encode.tokenizer, 99)[0].text == HH


class TestUltraFeedback:
    ROW: ClassVar = {
        "prompt": "is it good",
        "prompt_id": "x",
        "chosen": [ASK, GOOD],
        "rejected": [ASK, BAD],
        "messages": [ASK, GOOD],
        "score_chosen": 8.0,
        "score_rejected": 2.0,
    }

    def test_every_trainer_and_evaluation(self, encode):
        ours = {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}
        for tokenize in (tokenize_preferences, tokenize_lists):
            assert list(tokenize([self.ROW], encode)) == list(tokenize([ours], encode))
        assert list(tokenize_sft([self.ROW], encode)) == list(tokenize_sft([{"messages": [ASK, GOOD]}], encode))
        assert read_prompts([self.ROW], 0) == [[ASK]]
        assert own_completions([self.ROW], 0)[0] == {"prompt": [ASK], "completion": [GOOD]}
        assert load_prompts([self.ROW], encode.tokenizer, 99)[0].text == "<user>is it good</s><assistant>"


class TestLists:
    NECTAR: ClassVar = {
        "prompt": f"{HH}",
        "answers": [{"answer": " b", "model": "m", "rank": 2.0}, {"answer": " a", "model": "n", "rank": 1.0}],
    }

    def test_nectar(self, encode):
        row = tokenize_lists([self.NECTAR], encode)[0]
        assert texts(encode, row["completions_ids"]) == [" a</s>", " b</s>"]
        pair = tokenize_preferences([self.NECTAR], encode)[0]
        assert texts(encode, [pair["chosen_ids"], pair["rejected_ids"]]) == [" a</s>", " b</s>"]
        assert texts(encode, tokenize_sft([self.NECTAR], encode)[0]["completion_ids"]) == " a</s>"

    def test_nectar_without_ranks_is_refused(self, encode):
        with pytest.raises(ValueError, match=r"row 0 .*'answers' must hold .* an answer and its rank"):
            tokenize_lists([{"prompt": "a", "answers": [{"answer": "b", "rank": None}]}], encode)

    @pytest.mark.parametrize("order", [{"rewards": [0.0, 2.0, 1.0]}, {"ranks": [2, 0, 1]}])
    def test_pairs_of_lists_are_best_and_worst_and_ties_are_told(self, encode, order):
        tie = {name: [1.0] * 3 for name in order}
        rows = [{"prompt": "a", "completions": [" x", " y", " z"], **each} for each in (order, tie)]
        with tally("dataset") as counts:
            pairs = tokenize_preferences(rows, encode)
        assert [texts(encode, [p["chosen_ids"], p["rejected_ids"]]) for p in pairs] == [[" y</s>", " x</s>"]]
        assert "of 2 lists 1 have no two ranks and make no pair" in counts.said
        with pytest.raises(ValueError, match="needs one whose completions differ in rank"):
            as_pairs(read_rows([rows[1]]))

    def test_helpsteer(self, encode, capsys):
        rows = [
            {"prompt": p, "response": f" {r}", "helpfulness": h}
            for p, r, h in zip("aabbc", "vwxyz", "41221", strict=True)
        ]
        lists = tokenize_lists(rows, encode)
        assert texts(encode, lists[0]["completions_ids"]) == [" v</s>", " w</s>"]
        assert lists[0]["rewards"] == [4.0, 1.0]
        assert len(lists) == 1
        assert "of 3 prompts 2 have no two completions that differ in helpfulness" in capsys.readouterr().err
        assert len(tokenize_preferences(rows, encode)) == 1
        assert len(tokenize_sft(rows, encode)) == 5
        with pytest.raises(ValueError, match=r"row 1 .*'helpfulness' must hold a finite number; got 'no'"):
            as_lists(read_rows([rows[0], {**rows[1], "helpfulness": "no"}]))

    def test_faulty_lists_are_named_or_left_out(self, encode):
        good = {"prompt": "a", "completions": [" x", " y"], "rewards": [0.0, 1.0]}
        faulty = ({**good, "rewards": [0.0]}, {**good, "rewards": [0.0, float("nan")]}, {**good, "completions": []})
        for row in faulty:
            with pytest.raises(ValueError, match=r"row 1 \(from 0\)"):
                tokenize_preferences([good, row], encode)
        with tally("dataset") as counts:
            assert len(tokenize_preferences([good, *faulty], replace(encode, skip_bad_rows=True))) == 1
        assert counts.skipped == 3

    def test_helpsteer_3(self, encode):
        rows = [
            {"context": [ASK], "response1": "it is great", "response2": "it is awful", "overall_preference": k}
            for k in (-2, 3, 0)
        ]
        pairs = tokenize_preferences(rows, encode)
        said = [texts(encode, [p["chosen_ids"], p["rejected_ids"]]) for p in pairs]
        assert said == [["it is great</s>", "it is awful</s>"], ["it is awful</s>", "it is great</s>"]]
        assert len(tokenize_lists(rows, encode)) == 3


class TestKTO:
    ROWS: ClassVar = [
        {"prompt": "a", "completion": " x", "label": True},
        {"prompt": "b", "completion": " y", "label": False},
        {"prompt": "a", "completion": " z", "label": False},
    ]

    @pytest.mark.parametrize("kind", [bool, str, int, float])
    def test_only_good_ones_are_imitated_and_it_is_told(self, encode, capsys, kind):
        rows = [{**row, "label": kind(row["label"])} for row in self.ROWS]
        assert [texts(encode, r["completion_ids"]) for r in tokenize_sft(rows, encode)] == [" x</s>"]
        assert "of 3 rows the 1 whose label is true are trained on" in capsys.readouterr().err

    def test_pairs_and_lists_by_prompt(self, encode, capsys):
        pair = tokenize_preferences(self.ROWS, encode)
        assert [texts(encode, [p["chosen_ids"], p["rejected_ids"]]) for p in pair] == [[" x</s>", " z</s>"]]
        assert "of 2 prompts 1 have no two completions that differ in label" in capsys.readouterr().err
        assert tokenize_lists(self.ROWS, encode)[0]["rewards"] == [1.0, 0.0]

    def test_what_cannot_be_is_refused(self, encode):
        with pytest.raises(ValueError, match=r"row 1 .*'label' must hold true or false; got '\?'"):
            as_completions(read_rows([{**row, "label": label} for row, label in zip(self.ROWS, "1?0", strict=True)]))
        with pytest.raises(ValueError, match="a row whose label is true"):
            tokenize_sft(self.ROWS[1:], encode)
        with pytest.raises(ValueError, match="two of one prompt that differ in label; none do"):
            tokenize_preferences(self.ROWS[:2], encode)


def test_own_forms_are_left_as_they_are(encode):
    rows = [
        {"prompt": "a", "completion": "b"},
        {"text": "a"},
        {"messages": [ASK, GOOD]},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "a", "completions": ["b", "c"], "rewards": [1.0, 2.0]},
        {"prompt": "a", "response": "r", "completion": "c"},
    ]
    for row in rows:
        assert read_rows([row])[0] == row
        assert read_rows(read_rows([row]))[0] == row


def test_a_second_reading_changes_nothing(encode, tmp_path):
    """Trainers read what was read before."""
    path = tmp_path / "rows.jsonl"
    for row in (TestUltraFeedback.ROW, TestLists.NECTAR, TestAlpaca.ROWS[0], {"conversations": SHARE}):
        path.write_text(json.dumps(row) + "\n")
        once = read_rows(str(path))
        assert list(read_rows(once)) == list(once)
