"""Every chat template that TRL ships: what is trained of a conversation is the assistant's part and nothing else.

The expected text is made here from two plain renderings (with and without the reply), from endings written out by hand
for the templates that open or end turns in two ways, and for those that mark the assistant's part themselves from
transformers' own mask.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")
jinja2 = pytest.importorskip("jinja2", reason="needs jinja2 (the extra `train`)")
pytest.importorskip("trl", reason="needs trl, whose chat templates are tried")

from fastalign.trainers.data.collate import PreferenceCollator, SFTCollator  # noqa: E402
from fastalign.trainers.data.encode import Encoder  # noqa: E402
from fastalign.trainers.data.tokenize import tokenize_preferences, tokenize_sft  # noqa: E402
from fastalign.utils.batch import IGNORE  # noqa: E402

SPEC = importlib.util.find_spec("trl")
FOLDER = Path(SPEC.origin or "").parent / "chat_templates"
TEMPLATES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
MARKING = sorted(p.stem for p in FOLDER.glob("*.jinja") if "endgeneration" in p.read_text(encoding="utf-8"))

USERS = [{"role": "user", "content": text} for text in ("is the film good", "and the plot", "would you see it")]
REPLIES = [
    {"role": "assistant", "content": text} for text in ("the film is great", "dull and long", "no , it is awful")
]
BAD = {"role": "assistant", "content": "go away"}
REASONING = "they asked , so think"

DEEPSEEK_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"
MARKERS = r"<[|\uff5c][^\s<>'\"{}]+[|\uff5c]>|</?think>"

BY_HAND = {
    "deepseek": ("", DEEPSEEK_END),
    "gptoss": ("<|channel|>final<|message|>", "<|return|>"),
    "glm4moe": ("\n<think></think>\n", ""),
    "nemotron_3": ("</think>", "<|im_end|>"),
    "lfm2": ("", "<|im_end|>"),
    "qwen3_5_think": ("\n</think>\n\n", "<|im_end|>"),
    "qwen3_5_nothink": ("", "<|im_end|>"),
    "qwen3_6": ("\n</think>\n\n", "<|im_end|>"),
    "qwen3_training": ("<think>\n\n</think>\n\n", "<|im_end|>"),
}
"""Beginning of a template's name → what a reply without reasoning is trained with, before and after it."""


def tokenizer_with(tiny_tokenizer, name):
    """A tokenizer with that template, its markers tokens of their own, and its end of a turn the end of sequence."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    if "eos_token" not in tokenizer.chat_template:
        markers = sorted(set(re.findall(MARKERS, tokenizer.chat_template)))
        tokenizer.add_special_tokens({"additional_special_tokens": markers})
        ends = re.findall(MARKERS, written(tokenizer, [USERS[0], REPLIES[0]]).partition("great")[2])
        tokenizer.eos_token = ends[-1] if ends else tokenizer.eos_token
    return tokenizer


def alike(one, other):
    """What both begin with."""
    return next((one[:i] for i, pair in enumerate(zip(one, other, strict=False)) if len(set(pair)) == 2), one)


def as_parts(messages):
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


def written(tokenizer, messages, reply_follows=False, **options):
    """What the template writes; as parts, if it knows no other contents."""
    for form in (messages, as_parts(messages)):
        try:
            text = tokenizer.apply_chat_template(form, tokenize=False, add_generation_prompt=reply_follows, **options)
        except Exception:
            continue
        if messages[0]["content"] in text:
            return text
    raise AssertionError("the template writes neither texts nor parts")


def expected(tokenizer, messages, **options):
    """(what stands before the last reply, what is trained of it), from the two renderings."""
    before = written(tokenizer, messages[:-1], True, **options)
    whole = written(tokenizer, messages, **options)
    context = before if whole.startswith(before) else alike(before, whole)
    trained = whole[len(context) :]
    end = trained.rpartition(messages[-1]["content"])[2]
    if end.strip():
        return context, trained.rstrip()
    return context, trained + tokenizer.eos_token


def decode(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def trained(tokenizer, rows):
    """The labels' text of every row, each run of trained tokens on its own."""
    out = []
    for row in rows:
        labels = SFTCollator(0)([row])["labels"][0].tolist()
        runs = "".join("x" if label != IGNORE else " " for label in labels)
        out.append([decode(tokenizer, labels[m.start() : m.end()]) for m in re.finditer("x+", runs)])
    return out


def without_bos(tokenizer, text):
    return text.removeprefix(tokenizer.bos_token)


def test_trl_ships_what_the_tests_are_about():
    assert len(TEMPLATES) >= 41
    for family in ("deepseekv3", "deepseek_r1_distill", "qwen3", "phi3", "gptoss", "glm4moe", "lfm2_2_5"):
        assert family in TEMPLATES


@pytest.mark.parametrize("name", TEMPLATES)
def test_one_turn(tiny_tokenizer, name):
    tokenizer = tokenizer_with(tiny_tokenizer, name)
    messages = [USERS[0], REPLIES[0]]
    (row,) = tokenize_sft([{"messages": messages}], Encoder(tokenizer, 10**4))
    context, reply = expected(tokenizer, messages)
    assert trained(tokenizer, [row]) == [[reply]]
    assert without_bos(tokenizer, decode(tokenizer, row["prompt_ids"])) == without_bos(tokenizer, context)
    for family, (opening, closing) in BY_HAND.items():
        if name.startswith(family) and not ("deepseek" in family and name.endswith("_training") and "r1" not in name):
            eos = "" if closing else tokenizer.eos_token
            assert reply == f"{opening}{REPLIES[0]['content']}{closing}{eos}"
    columns = {"prompt": messages[:1], "completion": messages[1:]}
    (other,) = tokenize_sft([columns], Encoder(tokenizer, 10**4))
    assert (other["prompt_ids"], other["completion_ids"]) == (row["prompt_ids"], row["completion_ids"])


@pytest.mark.parametrize("name", TEMPLATES)
def test_several_turns(tiny_tokenizer, name):
    """Every reply is trained once, after the context that generation has there."""
    tokenizer = tokenizer_with(tiny_tokenizer, name)
    messages = [m for pair in zip(USERS, REPLIES, strict=True) for m in pair]
    rows = list(tokenize_sft([{"messages": messages}], Encoder(tokenizer, 10**4)))
    runs = [run for row in trained(tokenizer, rows) for run in row]
    wanted = [expected(tokenizer, messages[: 2 * i + 2]) for i in range(3)]
    assert len(runs) == 3
    for i, (run, (_, reply)) in enumerate(zip(runs, wanted, strict=True)):
        if i < 2 and len(rows) == 1:  # the end of the whole conversation is not the end of a turn
            reply = reply.removesuffix(tokenizer.eos_token).rstrip() or reply
            run = run.removesuffix(tokenizer.eos_token).rstrip()
        assert run == reply
        assert REPLIES[i]["content"] in run
        assert not any(m["content"] in run for m in (*USERS, *REPLIES) if m is not REPLIES[i])
    whole = [without_bos(tokenizer, decode(tokenizer, row["prompt_ids"] + row["completion_ids"])) for row in rows]
    for i, (context, _) in enumerate(wanted):
        assert any(text.startswith(without_bos(tokenizer, context)) for text in whole), f"reply {i}"
    rewritten = name in ("qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "gptoss", "gptoss_training")
    assert len(rows) == (3 if rewritten else 1)


@pytest.mark.parametrize("name", TEMPLATES)
def test_pairs(tiny_tokenizer, name):
    tokenizer = tokenizer_with(tiny_tokenizer, name)
    prompt = [USERS[0], REPLIES[0], USERS[1]]
    row = {"prompt": prompt, "chosen": [REPLIES[1]], "rejected": [BAD]}
    (found,) = tokenize_preferences([row], Encoder(tokenizer, 10**4))
    labels = PreferenceCollator(0)([found])["labels"]
    for side, reply in zip(labels, (REPLIES[1], BAD), strict=True):
        context, wanted = expected(tokenizer, [*prompt, reply])
        assert decode(tokenizer, side[side != IGNORE].tolist()) == wanted
        assert without_bos(tokenizer, decode(tokenizer, found["prompt_ids"])) == without_bos(tokenizer, context)


@pytest.mark.parametrize(
    "name", [name for name in TEMPLATES if "generation %}" in (FOLDER / f"{name}.jinja").read_text()]
)
def test_what_a_template_marks_itself(tiny_tokenizer, name):
    """Against transformers' mask of the `generation` blocks: the same, but for an opening that generation is given and
    white space behind the end."""
    tokenizer = tokenizer_with(tiny_tokenizer, name)
    messages = [USERS[0], REPLIES[0]]
    try:
        in_text = REPLIES[0]["content"] in tokenizer.apply_chat_template(messages, tokenize=False)
    except jinja2.UndefinedError:
        in_text = False
    form = messages if in_text else as_parts(messages)
    marked = tokenizer.apply_chat_template(form, return_dict=True, return_assistant_tokens_mask=True)
    block = decode(tokenizer, [i for i, m in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if m])
    (row,) = tokenize_sft([{"messages": messages}], Encoder(tokenizer, 10**4))
    ((run,),) = trained(tokenizer, [row])
    closing = block.rpartition(REPLIES[0]["content"])[2]
    run = run if closing.strip() else run.removesuffix(tokenizer.eos_token)
    opening = block.rstrip().removesuffix(run.rstrip())
    assert block.rstrip() == opening + run.rstrip()
    assert decode(tokenizer, row["prompt_ids"]).endswith(opening)


THINKING = {
    "qwen3": ("<think>\n", "\n</think>\n\n"),
    "qwen3_5_think": ("", "\n</think>\n\n"),
    "qwen3_6": ("", "\n</think>\n\n"),
    "glm4moe": ("\n<think>", "</think>\n"),
    "lfm2_2_5": ("<think>", "</think>"),
    "lfm2_2_5_vl": ("<think>", "</think>"),
    "nemotron_3_nano": ("", "\n</think>\n"),
    "nemotron_3_ultra": ("", "</think>"),
    "gptoss": ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
}
"""Template → what stands before the reasoning (where generation does not begin with it), and behind it."""


@pytest.mark.parametrize("name", sorted(set(THINKING) & set(TEMPLATES)))
def test_reasoning_is_trained_on_in_every_turn(tiny_tokenizer, name):
    """Although these templates leave it out of earlier turns."""
    tokenizer = tokenizer_with(tiny_tokenizer, name)
    thoughts = [f"{REASONING} {i}" for i in range(2)]
    replies = [{**reply, "reasoning_content": text} for reply, text in zip(REPLIES, thoughts, strict=False)]
    messages = [USERS[0], replies[0], USERS[1], replies[1]]
    rows = list(tokenize_sft([{"messages": messages}], Encoder(tokenizer, 10**4)))
    opening, between = THINKING[name]
    closing = BY_HAND["gptoss" if name == "gptoss" else "glm4moe" if name == "glm4moe" else "lfm2"][1]
    assert trained(tokenizer, rows) == [
        [f"{opening}{text}{between}{reply['content']}{closing or tokenizer.eos_token}"]
        for reply, text in zip(replies, thoughts, strict=True)
    ]
    second = decode(tokenizer, rows[1]["prompt_ids"])
    assert replies[0]["content"] in second
    assert thoughts[0] not in second  # as in generation


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "deepseekv3"])
def test_reasoning_in_the_content_goes_on_from_the_opening(tiny_tokenizer, name):
    """These templates open the reasoning and, of a reply, write only what stands behind it."""
    tokenizer = tokenizer_with(tiny_tokenizer, name)
    content = f"<think>\n{REASONING}\n</think>\n\n{REPLIES[1]['content']}"
    messages = [USERS[0], {"role": "assistant", "content": content}]
    (row,) = tokenize_sft([{"messages": messages}], Encoder(tokenizer, 10**4))
    assert decode(tokenizer, row["prompt_ids"]).endswith("<think>\n")
    wanted = content.removeprefix("<think>\n") + DEEPSEEK_END
    assert trained(tokenizer, [row]) == [[wanted]]
    pair = {"prompt": messages[:1], "chosen": messages[1:], "rejected": [BAD]}
    (found,) = tokenize_preferences([pair], Encoder(tokenizer, 10**4))
    assert decode(tokenizer, found["chosen_ids"]) == "<think>\n" + wanted  # what the two share ends before it
    assert decode(tokenizer, found["rejected_ids"]) == "go away" + DEEPSEEK_END


CALL = {"type": "function", "id": "call12345", "function": {"name": "weather", "arguments": {"city": "paris"}}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "tells the weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}},
        },
    }
]
CALLS = ("qwen2_5", "qwen3", "qwen3_5_think", "llama3_1", "gptoss", "glm4moe", "lfm2_2_5", "nemotron_3_nano", "gemma4")


@pytest.mark.parametrize("name", sorted(set(CALLS) & set(TEMPLATES)))
def test_calls_of_tools_are_trained_on_and_their_results_are_not(tiny_tokenizer, name):
    tokenizer = tokenizer_with(tiny_tokenizer, name)
    encode = Encoder(tokenizer, 10**4)
    result = {"role": "tool", "name": "weather", "tool_call_id": "call12345", "content": "sunny and fun"}
    messages = [USERS[0], {"role": "assistant", "tool_calls": [CALL]}, result, REPLIES[0]]
    rows = list(tokenize_sft([{"messages": messages, "tools": TOOLS}], encode))
    first, second = (run for row in trained(tokenizer, rows) for run in row)
    assert "weather" in first
    assert "paris" in first
    assert REPLIES[0]["content"] in second
    assert not any(text in first + second for text in ("sunny", "tells the weather", USERS[0]["content"]))
    assert all("tells the weather" in decode(tokenizer, row["prompt_ids"]) for row in rows)
    assert "sunny" in decode(tokenizer, rows[-1]["prompt_ids"] + rows[-1]["completion_ids"])
    other = {**CALL, "function": {"name": "weather", "arguments": {"city": "rome"}}}
    sides = {"chosen": [messages[1]], "rejected": [{"role": "assistant", "tool_calls": [other]}]}
    (pair,) = tokenize_preferences([{"prompt": messages[:1], **sides, "tools": TOOLS}], encode)
    chosen, rejected = (decode(tokenizer, pair[f"{side}_ids"]) for side in ("chosen", "rejected"))
    assert chosen.replace("paris", "rome") == rejected != chosen


@pytest.mark.parametrize("name", ["deepseekv3", "deepseekv3_training"])
@pytest.mark.parametrize("kind", ["function", None])
def test_calls_of_deepseek_are_trained_on(tiny_tokenizer, name, kind):
    """Written out by hand; of a second step its template leaves out what opens the reply, which is refused."""
    tokenizer = tokenizer_with(tiny_tokenizer, name)
    encode = Encoder(tokenizer, 10**4)
    made = {"function": CALL["function"], **({"type": kind} if kind else {})}
    result = {"role": "tool", "content": "sunny and fun"}
    messages = [USERS[0], {"role": "assistant", "tool_calls": [made]}, result, REPLIES[0]]
    called = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"  # noqa: RUF001
    called += '{"city": "paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>' + DEEPSEEK_END  # noqa: RUF001
    (row,) = tokenize_sft([{"messages": messages}], encode)
    assert trained(tokenizer, [row]) == [[called, REPLIES[0]["content"] + DEEPSEEK_END]]
    (pair,) = tokenize_preferences([{"prompt": messages[:1], "chosen": messages[1:], "rejected": [BAD]}], encode)
    own = [i for i, mine in zip(pair["chosen_ids"], pair["chosen_own"], strict=True) if mine]
    assert decode(tokenizer, own) == called + REPLIES[0]["content"] + DEEPSEEK_END
    for again in ([*messages, USERS[1], messages[1]], [*messages[:3], messages[1]]):
        with pytest.raises(ValueError, match=r"row 0 .*chat template (writes a reply without|must write a prompt)"):
            tokenize_sft([{"messages": again}], encode)


@pytest.mark.parametrize("name", sorted(set(CALLS) & set(TEMPLATES)))
def test_pairs_of_trajectories(tiny_tokenizer, name):
    """Tokens and labels of each side are those of fine-tuning on it; what the template writes anew is refused."""
    tokenizer = tokenizer_with(tiny_tokenizer, name)
    encode = Encoder(tokenizer, 10**4)
    result = {"role": "tool", "name": "weather", "tool_call_id": "call12345", "content": "sunny and fun"}
    other = {**CALL, "function": {"name": "weather", "arguments": {"city": "rome"}}}
    sides = [[{"role": "assistant", "tool_calls": [made]}, result, end]
             for made, end in ((CALL, REPLIES[0]), (other, BAD))]  # fmt: skip
    alone = [list(tokenize_sft([{"prompt": USERS[:1], "completion": side, "tools": TOOLS}], encode)) for side in sides]
    row = {"prompt": USERS[:1], "chosen": sides[0], "rejected": sides[1], "tools": TOOLS}
    if max(map(len, alone)) > 1:
        with pytest.raises(ValueError, match=r"row 0 .*writes earlier replies anew"):
            tokenize_preferences([row], encode)
        return
    batch = PreferenceCollator(0)(list(tokenize_preferences([row], encode)))
    whole = SFTCollator(0)([rows[0] for rows in alone])
    assert torch.equal(batch["input_ids"], whole["input_ids"])
    assert torch.equal(batch["labels"], whole["labels"])


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_leaves_out_is_refused(tiny_tokenizer, name):
    """Calls, tools and reasoning are in the tokens, or the row is refused."""
    tokenizer = tokenizer_with(tiny_tokenizer, name)
    rows = {
        "paris": {"messages": [USERS[0], {"role": "assistant", "content": "well", "tool_calls": [CALL]}]},
        REASONING: {"messages": [USERS[0], {**REPLIES[0], "reasoning_content": REASONING}]},
        "tells the weather": {"messages": [USERS[0], REPLIES[0]], "tools": TOOLS},
    }
    for text, row in rows.items():
        try:
            (found,) = tokenize_sft([row], Encoder(tokenizer, 10**4))
        except ValueError as error:
            kept = bool(re.search(r"row 0 .*chat template (leaves out|refuses)", str(error)))
        else:
            kept = text in decode(tokenizer, found["prompt_ids"] + found["completion_ids"])
        assert kept, text
