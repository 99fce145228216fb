"""Completions of several messages: calls of tools, their results, further turns. All that the assistant says is trained
on, as one completion, and nothing else."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")

from chat_rows import REPLY, TOOLS, USER, WHOLE, call, decode, make_encoder

import fastalign as fa
from fastalign.models.logits import model_logits
from fastalign.trainers.common.callbacks import LOG_NAME, read_log
from fastalign.trainers.data.collate import ListCollator, PreferenceCollator, SFTCollator
from fastalign.trainers.data.tokenize import tokenize_lists, tokenize_preferences, tokenize_sft
from fastalign.trainers.dpo import DPOConfig, DPOTrainer
from fastalign.utils.batch import IGNORE


@pytest.fixture
def encoder():
    """A function that makes an encoder with a template."""
    return make_encoder


RESULTS = [{"role": "tool", "content": "a film"}, {"role": "tool", "content": "dull and long"}]
BAD = {"role": "assistant", "content": "it is bad"}
ENDS = {
    "calls": ([call(at="a film"), RESULTS[0], REPLY], [call(at="fun"), RESULTS[1], BAD]),
    "one is longer": ([call(at="a film"), RESULTS[0], call(at="b"), RESULTS[1], REPLY], [BAD]),
    "results": ([call(at="a film"), RESULTS[0], REPLY], [call(at="a film"), RESULTS[1], BAD]),
    "turns of the user": ([REPLY, USER, BAD], [BAD, {"role": "user", "content": "so long"}, REPLY]),
    "a reply of no weight": ([REPLY, USER, {**BAD, "weight": 0}, USER, BAD], [BAD, USER, REPLY]),
}


@pytest.mark.parametrize("form", ["prompt", "none", "list"])
@pytest.mark.parametrize("name", ENDS)
def test_each_side_is_what_fine_tuning_on_it_trains(encoder, name, form):
    encode = encoder()
    sides, before = ENDS[name], [USER, REPLY, USER]
    row = {"prompt": before, "chosen": sides[0], "rejected": sides[1]}
    if form == "none":
        row = {"chosen": [*before, *sides[0]], "rejected": [*before, *sides[1]]}
    if form == "list":
        row = {"prompt": before, "completions": list(sides)}
        batch = ListCollator(0)(list(tokenize_lists([{**row, "tools": TOOLS}], encode)))
    else:
        batch = PreferenceCollator(0)(list(tokenize_preferences([{**row, "tools": TOOLS}], encode)))
    wanted = [{"prompt": before, "completion": side, "tools": TOOLS} for side in sides]
    whole = SFTCollator(0)(list(tokenize_sft(wanted, encode)))
    assert torch.equal(batch["input_ids"], whole["input_ids"])
    assert torch.equal(batch["labels"], whole["labels"])
    for labels, side in zip(batch["labels"], sides, strict=True):
        text = decode(encode, labels[labels != IGNORE].tolist())
        assert "[" not in text  # no turn of anybody else, nor the opening of one
        assert text.count("</s>") == sum(m["role"] == "assistant" and m.get("weight") != 0 for m in side)


def test_whole_texts(encoder):
    encode, (left, right) = encoder(), ENDS["calls"]
    (row,) = tokenize_preferences([{"chosen": [USER, *left], "rejected": [USER, *right]}], encode)
    assert decode(encode, row["prompt_ids"]) == "<s>[user]is it good</s>[assistant]"
    text = 'solook{"at": "a film"}</s>[tool]a film</s>[assistant]it is great</s>'
    assert decode(encode, row["chosen_ids"]) == text
    own = [i for i, mine in zip(row["chosen_ids"], row["chosen_own"], strict=True) if mine]
    assert decode(encode, own) == 'solook{"at": "a film"}</s>it is great</s>'


def test_dpo_sums_the_assistants_tokens_alone(encoder, tiny_model, tmp_path):
    """In the policy's sums and in the reference's."""
    encode, rows = encoder(), []
    for chosen, rejected in (ENDS["calls"], ENDS["results"]):
        rows.append({"prompt": [USER], "chosen": chosen, "rejected": rejected})
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=1, logging_steps=1, report_to="none")
    DPOTrainer(tiny_model(), args, rows, None, encode.tokenizer).train()
    log = read_log(str(tmp_path / LOG_NAME))[0]
    assert log["loss"] == pytest.approx(math.log(2), abs=1e-6)
    whole = [{"prompt": [USER], "completion": row["chosen"]} for row in rows]
    batch = SFTCollator(0)(list(tokenize_sft(whole, encode)))
    with torch.no_grad():
        logps = fa.token_logps(model_logits(tiny_model().eval(), batch), batch["labels"])
    assert log["logps/chosen"] == pytest.approx(float(logps.sum(-1).mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([call(at="a"), RESULTS[0]], "begin, after what they share, and end with a reply of the assistant"),
        ([RESULTS[0], REPLY], "begin, after what they share, and end with a reply of the assistant"),
        ([{**BAD, "weight": 0}, USER, REPLY], "must begin and end with a reply of the assistant"),
    ],
)
def test_what_is_no_trajectory_is_refused(encoder, ends, message):
    row = {"prompt": [USER], "chosen": ends, "rejected": [BAD]}
    with pytest.raises(ValueError, match=rf"row 0 .*{message}"):
        tokenize_preferences([row], encoder())


def test_a_template_that_writes_earlier_replies_anew_is_refused(encoder):
    another_end = "{{ '</s>' if loop.last or m.role != 'assistant' else '.' }}{% endfor %}"
    row = {"prompt": [USER], "chosen": [REPLY, USER, BAD], "rejected": [BAD]}
    with pytest.raises(ValueError, match=r"row 0 .*anew .*is no one sequence: give a row for each reply, or anothe"):
        tokenize_preferences([row], encoder(WHOLE.replace("</s>{% endfor %}", another_end)))


def test_sampled_replies_and_judges_take_one_message(encoder):
    with pytest.raises(ValueError, match="must be one reply of the assistant"):
        encoder()([USER], [[call(at="b"), RESULTS[0], REPLY]])


def test_references_that_are_kept_on_disk_are_those_of_the_mask(encoder, tiny_model, tmp_path):
    """The same token ids, of which another run trains on fewer."""
    encode, found = encoder(), []
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    for weight in (1, 0):
        chosen = [REPLY, USER, {**BAD, "weight": weight}, USER, REPLY]
        row = {"prompt": [USER], "chosen": chosen, "rejected": [BAD]}
        trainer = DPOTrainer(tiny_model(), args, [row], None, encode.tokenizer)
        found.append((trainer.train_dataset["chosen_ids"][0], trainer.train_dataset["ref_chosen_logps"][0]))
    assert found[0][0] == found[1][0]
    assert found[0][1] < found[1][1] - 1
