"""The doctor: each check on data or a model that has the fault, and on one that has not."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")

from transformers import AutoTokenizer, GenerationConfig, GPT2ForSequenceClassification, set_seed

from fastalign.cli import commands as cli
from fastalign.doctor.command import DoctorConfig, examine
from fastalign.trainers.data.encode import Encoder
from fastalign.trainers.data.problems import Tally, tally
from fastalign.trainers.data.tokenize import tokenize_lists, tokenize_preferences, tokenize_sft
from fastalign.trainers.policy.rollout import load_prompts

WORDS = ["good", "bad", "great", "dull", "fun", "awful"]
SOUND = [
    {
        "prompt": f"the movie number {i}" + " is" * (i % 4),
        "chosen": f" {WORDS[i % 6]}" + " and long" * (i % 2),
        "rejected": f" {WORDS[(i + 1) % 6]}" + " and dull" * ((i + 1) % 2),
    }
    for i in range(24)
]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
REPLY = {"role": "assistant", "content": "no"}
CHAT = [{"messages": [{"role": "user", "content": f"is it {w}"}, {"role": "assistant", "content": w}]} for w in WORDS]


@pytest.fixture
def look(tiny_model, tiny_tokenizer, tmp_path):
    """Findings of one check: {level: text}, on rows, after `change(model, tokenizer)`."""

    def run(check, rows, change=None, **options):
        model = tiny_model()
        tokenizer = type(tiny_tokenizer)(
            tokenizer_object=tiny_tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
        )
        if change:
            change(model, tokenizer)
        shutil.rmtree(tmp_path / "model", ignore_errors=True)  # of the last look
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DoctorConfig(model=str(tmp_path / "model"), dataset=str(data), **options)
        return {f.level: f.text for f in examine(config) if f.check == check}

    return run


def with_template(template):
    return lambda model, tokenizer: setattr(tokenizer, "chat_template", template)


SPACED = [{"prompt": r["prompt"] + " ", "chosen": r["chosen"][1:], "rejected": r["rejected"][1:]} for r in SOUND]
FAULTS = {
    "boundaries": (SPACED, "warning", "end in white space"),
    "empty completions": ([*SOUND, {"prompt": "a", "chosen": "b", "rejected": "  "}], "error", "row 24 "),
    "duplicates": ([*SOUND, SOUND[3]], "warning", "row 24 .* repeat"),
    "chosen equals rejected": ([*SOUND, {"prompt": "a", "chosen": " b", "rejected": "b"}], "error", "row 24 "),
    "length bias": ([{**r, "chosen": r["chosen"] + " and so on"} for r in SOUND], "warning", "longer one in 100%"),
    "truncation": ([*SOUND, {"prompt": "a", "chosen": " good" * 80, "rejected": "b"}], "warning", "row 24 "),
    "chat template": ([{**SOUND[0], "prompt": "<|im_start|>user hi"}], "warning", "row 0 .*chat markers"),
}


@pytest.mark.parametrize("check", FAULTS)
def test_faulty_data_is_named_and_sound_data_is_not(look, check):
    rows, level, message = FAULTS[check]
    found = look(check, rows, max_length=64)
    assert re.search(message, found.pop(level)), found
    assert not found
    assert look(check, SOUND, max_length=64) == {"ok": ""}


def test_lists_are_looked_at_too(look):
    rows = [{"prompt": "a", "completions": [" good and long", " bad", " good and long"], "rewards": [2.0, 1.0, 2.0]}]
    assert "more than once" in look("duplicates", rows)["warning"]
    rows = [{"prompt": f"a{i}", "completions": [" bad", " good and long"], "rewards": [1.0, 2.0]} for i in range(12)]
    assert "longer one in 100%" in look("length bias", rows)["warning"]
    rows = [{**row, "rewards": [i % 2, 0.5]} for i, row in enumerate(rows)]
    assert look("length bias", rows) == {"ok": ""}


def test_end_of_sequence_and_padding(look):
    assert "one token" in look("padding", SOUND)["note"]
    assert look("padding", SOUND, lambda m, t: setattr(t, "pad_token", "<s>")) == {"ok": ""}
    assert "no end-of-sequence" in look("padding", SOUND, lambda m, t: setattr(t, "eos_token", None))["error"]


def test_chat_templates(look):
    check = "chat template"
    assert look(check, CHAT, with_template(TEMPLATE)) == {"ok": ""}
    assert "no chat template" in look(check, CHAT)["error"]
    unstable = "{{ messages | length }}" + TEMPLATE
    assert "same way with and without" in look(check, CHAT, with_template(unstable))["error"]
    endless = TEMPLATE.replace("</s>", "<end>")
    assert "generation does not stop" in look(check, CHAT, with_template(endless))["error"]
    forgetful = TEMPLATE.replace("for m in messages", "for m in messages if m['role'] != 'user'")
    assert "leaves out what the user says" in look(check, CHAT, with_template(forgetful))["error"]
    twice = [{"messages": [{"role": "user", "content": "so"}, *row["messages"]]} for row in CHAT]
    assert "one role follow each other" in look(check, twice, with_template(TEMPLATE))["warning"]
    assert "do not go through" in look(check, SOUND, with_template(TEMPLATE))["note"]


@pytest.mark.parametrize("setting", [{"temperature": 0.5}, {"top_k": 3}, {"repetition_penalty": 2.0}])
def test_a_sampler_that_draws_from_another_distribution(look, setting):
    def change(model, tokenizer):
        model.generation_config = GenerationConfig(do_sample=True, **setting)

    ((name, value),) = setting.items()
    assert f"{name}={value}" in look("sampling against training", SOUND, change)["error"]


def test_a_sampler_that_draws_from_the_policy(look):
    def change(model, tokenizer):
        model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)

    assert look("sampling against training", SOUND, change) == {"ok": ""}


def test_vocabulary_and_memory(look):
    found = look("vocabulary", SOUND, lambda m, t: t.add_tokens(["<more>"]))
    assert "tokens and the model embeds" in found["error"]
    assert look("vocabulary", SOUND) == {"ok": ""}
    assert "GiB" in look("memory", SOUND)["ok"]
    found = look("memory", SOUND, per_device_train_batch_size=10**9)
    assert "lower per_device_train_batch_size" in found["error"]


LIST = {"prompt": "a", "completions": [" good", " bad"], "rewards": [1.0, 0.0]}


@pytest.mark.parametrize("rating", [None, "1.0", float("nan"), float("inf"), [1.0]])
@pytest.mark.parametrize("column", ["rewards", "ranks"])
def test_ratings_that_are_none(look, rating, column):
    """Found with their row, whatever stands there, and nothing else falls over them."""
    plain = {"prompt": "a", "completions": [" good", " bad"]}
    bad = rating if isinstance(rating, list) else [rating, 1.0]
    rows = [{**plain, column: [0.0, 1.0]}, {**plain, "prompt": "b", column: bad}]
    found = look("ratings", rows)
    assert re.search(r"row 1 \(from 0\): not one finite number", found["error"])
    assert look("length bias", rows) == {"ok": ""}


def test_lists_that_are_all_tied(look):
    tied = {**LIST, "rewards": [0.5, 0.5]}
    assert re.search("row 1 .* one rating", look("ratings", [LIST, tied])["warning"])
    assert "one rating" in look("ratings", [tied])["error"]
    assert look("ratings", [LIST]) == {"ok": ""}


@pytest.mark.parametrize("column", ["margin", "ref_chosen_logps"])
def test_columns_of_numbers(look, column):
    rows = [{**row, "ref_rejected_logps": 0.0, "ref_chosen_logps": 0.0, "margin": 1.0} for row in SOUND[:3]]
    assert look("ratings", rows) == {"ok": ""}
    rows[2][column] = float("nan")
    assert f"row 2 (from 0): column '{column}' holds no finite number" in look("ratings", rows)["error"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": None, "chosen": None, "rejected": "b"}, "'chosen' must not be empty; it is in row 24"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "'rejected' must not be empty; it is in row 24"),
    ],
)
def test_rows_that_a_trainer_refuses(look, row, message):
    assert message in look("rows", [*SOUND, row])["error"]
    assert look("rows", SOUND) == {"ok": ""}


def test_an_empty_reply_of_a_transcript(look):
    head = "\n\nHuman: is it good\n\nAssistant:"
    rows = [{"chosen": f"{head} yes", "rejected": f"{head} no"}, {"chosen": f"{head} yes", "rejected": head}]
    found = look("rows", rows)
    assert "what follows the shared beginning must not be empty; it is in row 1 (from 0)" in found["error"]


def test_lines_that_are_no_rows(look, tmp_path):
    look("rows", SOUND)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("no JSON\n")
    config = DoctorConfig(model=str(tmp_path / "model"), dataset=str(tmp_path / "rows.jsonl"))
    (finding,) = [f for f in examine(config) if f.check == "rows"]
    assert (finding.level, "JSON parse error in row 24 (from 0)" in finding.text) == ("error", True)


def test_rows_of_a_prompt_alone(look):
    rows = [{"prompt": "the movie"}, {"prompt": "a film"}, {"prompt": [{"role": "user", "content": "is it good"}]}]
    assert {*look("empty completions", rows[:2])} == {*look("rows", rows[:2])} == {"ok"}
    assert "ok" in look("sampling against training", rows[:2])
    assert look("rows", rows[2:], with_template(TEMPLATE)) == {"ok": ""}
    assert "prompt loses its beginning" in look("truncation", rows[:2], max_prompt_length=2)["warning"]


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("left", ["row 24 .* loses its end", "row 25 .* the prompt loses its beginning"]),
        ("right", ["row 24 .* loses its end", "row 25 .* left out"]),
        ("drop", ["rows 24, 25 .* left out"]),
    ],
)
def test_cut_prompts_and_replies_are_told_by_mode(look, mode, words):
    long = [
        {"prompt": "a", "chosen": " good" * 80, "rejected": "b"},
        {"prompt": "is good" * 80, "chosen": " good", "rejected": "b"},
    ]
    found = look("truncation", [*SOUND, *long], max_length=64, truncation_mode=mode)["warning"]
    assert all(re.search(each, found) for each in words), found
    assert "more than max_length 64" in look("rows", [*SOUND, *long], max_length=64, truncation_mode="raise")["error"]


def _turns(count, words, last="good"):
    """A conversation of so many replies, each after a question of so many words."""
    asked = {"role": "user", "content": "is it " + "good " * words}
    return [asked, {"role": "assistant", "content": last}] * count


SIZES = [(1, 1, "good"), (1, 90, "good"), (1, 2, "fun " * 90), (6, 12, "good"), (2, 60, "fun " * 60), (3, 1, "bad")]
LENGTHS = {
    "messages": [{"messages": _turns(*size)} for size in SIZES],
    "prompt and completion": [{"prompt": _turns(*s)[:-1], "completion": _turns(*s)[-1:]} for s in SIZES],
    "prompt and text": [{"prompt": _turns(*s)[:-1], "completion": s[2]} for s in SIZES],
    "pairs": [{"prompt": _turns(*s)[:-1], "chosen": _turns(*s)[-1:], "rejected": [REPLY]} for s in SIZES],
    "pairs that begin alike": [{"chosen": _turns(*s), "rejected": [*_turns(*s)[:-1], REPLY]} for s in SIZES],
    "lists": [{"prompt": _turns(*s)[:-1], "completions": [_turns(*s)[-1:], [REPLY]]} for s in SIZES],
    "prompts": [{"prompt": _turns(*s)[:-1]} for s in SIZES],
}
ANOTHER_END = TEMPLATE.replace("</s>", "{{ '.' if m['role'] == 'assistant' and not loop.last else '</s>' }}")


@pytest.mark.parametrize("written", [TEMPLATE, ANOTHER_END], ids=["plain", "rewriting"])
@pytest.mark.parametrize("mode", ["left", "right", "drop"])
@pytest.mark.parametrize("form", LENGTHS)
def test_shortened_chats_are_counted_as_the_trainers_count_them(look, tmp_path, form, mode, written):
    if form == "prompts" and mode == "right":
        said = look("truncation", LENGTHS[form], with_template(written), truncation_mode=mode)
        assert "must be one of left, drop, raise for rows of a prompt alone" in said["error"]
        return
    limit = {"max_prompt_length": 64} if form == "prompts" else {"max_length": 64}
    found = look("truncation", LENGTHS[form], with_template(written), truncation_mode=mode, **limit)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    with tally("dataset", told=False) as counts:
        if form == "prompts":
            given: dict[str, int] = {}
            load_prompts(LENGTHS[form], tokenizer, 64, truncation_mode=mode, counts=given)
            counts = Tally(**{name.rpartition("/")[2]: value for name, value in given.items()})
        else:
            tokenize = tokenize_lists if form == "lists" else tokenize_preferences if "pairs" in form else tokenize_sft
            tokenize(LENGTHS[form], Encoder(tokenizer, 64, truncation_mode=mode))
    told = {"prompts_cut": "the prompt loses its", "replies_cut": "a completion is longer", "dropped": "too long, and"}
    counted = {}
    for name, words in told.items():
        (listed,) = re.findall(rf"rows? ([\d, ]+) \(from 0\) of \d+: {words}", found["warning"]) or [""]
        counted[name] = len(listed.split(",")) if listed else 0
    assert counted == {name: getattr(counts, name) for name in told}
    assert sum(counted.values()) > 1


def test_prompts_alone_have_the_bound_of_the_commands_that_take_them(look):
    """512 tokens where the run says nothing, whatever max_length is; a system message that is too long is refused."""
    rows = [{"prompt": _turns(1, 20)[:1]}]
    assert look("truncation", rows, with_template(TEMPLATE), max_length=8) == {"ok": ""}
    longer = [{"prompt": _turns(1, 800)[:1]}]
    assert "the prompt loses its" in look("truncation", longer, with_template(TEMPLATE), max_length=4096)["warning"]
    system = [{"prompt": [{"role": "system", "content": "good " * 90}]}]
    assert "too long" in look("rows", system, with_template(TEMPLATE), max_prompt_length=16)["error"]


def test_a_model_without_settings_of_its_own_samples_as_it_trains(look):
    """generate keeps the 50 likeliest tokens where a model says nothing: no fault of the model's."""
    assert look("sampling against training", SOUND) == {"ok": ""}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(look, value):
    def change(model, tokenizer):
        model.transformer.h[0].mlp.c_fc.weight.data[3, 1] = value

    assert "transformer.h.0.mlp.c_fc.weight" in look("weights", SOUND, change)["error"]
    assert look("weights", SOUND) == {"ok": ""}


def test_rows_beyond_the_models_positions(look, tiny_model):
    count = tiny_model().config.max_position_embeddings
    rows = [*SOUND, {"prompt": "a", "chosen": " good" * (count + 5), "rejected": "b"}]
    found = look("positions", rows, max_length=10 * count)["error"]
    assert f"has learned {count} positions" in found
    assert look("positions", rows, max_length=count) == {"ok": ""}


class TestRewardModel:
    CHECK = "reward model in batches"

    @pytest.fixture
    def reward(self, look, tiny_model, tiny_tokenizer, tmp_path):
        def run(pad_in_model, pad_token):
            set_seed(0)
            config = tiny_model().config
            config.num_labels, config.pad_token_id = 1, pad_in_model
            model = GPT2ForSequenceClassification(config)
            with torch.no_grad():
                model.score.weight.normal_()
            model.save_pretrained(tmp_path / "reward")
            tokenizer = type(tiny_tokenizer)(
                tokenizer_object=tiny_tokenizer.backend_tokenizer,
                bos_token="<s>",
                eos_token="</s>",
                pad_token=pad_token,
            )
            tokenizer.save_pretrained(tmp_path / "reward")
            return look(self.CHECK, SOUND, reward_model=str(tmp_path / "reward"))

        return run

    def test_padding_that_the_model_does_not_know(self, reward):
        assert "depends on the batch" in reward(5, "<s>")["error"]
        assert "cannot score a batch" in reward(None, "<s>")["error"]

    def test_padding_that_is_the_end_of_sequence(self, reward):
        assert "one token before the end" in reward(1, "</s>")["warning"]

    def test_sound_reward_model(self, reward):
        assert reward(0, "<s>") == {"ok": ""}


def test_command_exits_with_1_for_errors(look, tmp_path, capsys):
    look("duplicates", SOUND)
    argv = ["doctor", "--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "rows.jsonl")]
    sound = cli.main([*argv, "--max_length", "64"])
    shown = capsys.readouterr().out
    assert "empty completions" in shown
    assert sound == int("error" in [line.split()[0] for line in shown.splitlines() if line.strip()])
    look("empty completions", FAULTS["empty completions"][0])
    assert cli.main(argv) == 1
    assert cli.main(["doctor", "--model", "x"]) == 2
