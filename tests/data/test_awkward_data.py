"""A corpus of awkward data, made here, through `doctor` and one training step of every command.

Each file either trains, with a finite loss and every row accounted for, or is refused in one line: no traceback, no row
that is lost untold.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import shutil
from typing import Any, NamedTuple

import pytest

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")

import pyarrow as pa
import pyarrow.parquet as pq

from fastalign.cli import commands as cli

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
COMMON = "--model m --use_cpu --disable_tqdm --max_length 48 --per_device_train_batch_size 2 --max_steps 1"
POLICY = "--model m --use_cpu --disable_tqdm --reward_fn reward.py:score --response_length 3 --max_prompt_length 48"
COMMANDS = {
    **dict.fromkeys(("sft", "pro", "reward"), f"{COMMON} --save_strategy no"),
    "dpo": f"{COMMON} --save_strategy no --reference_free",
    "kto": f"{COMMON} --save_strategy no --loss_type apo_zero_unpaired",
    "ppo": f"{POLICY} --per_device_train_batch_size 2 --total_episodes 2 --num_ppo_epochs 1",
    "grpo": f"{POLICY} --per_device_train_batch_size 2 --total_episodes 2 --num_generations 2 --kl_coef 0",
}
SFT, PAIRS, PROMPTS, ALL = ("sft",), ("dpo", "kto", "pro", "reward"), ("ppo", "grpo"), tuple(COMMANDS)


class Awkward(NamedTuple):
    """A data set: its rows or bytes (of several files: by name), what trains on it, and what is told of it."""

    content: Any
    trains: tuple[str, ...] = ()
    name: str = "rows.jsonl"
    options: str = ""
    refused: str = ""
    """What the refusal says, where every command refuses it."""
    counts: tuple[int, int, int] | None = None
    """Rows used, skipped and dropped by the first of the commands."""


def turns(*texts):
    """A conversation, the user first."""
    return [{"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")), texts)]


HH = "\n\nHuman: is it good\n\nAssistant:"
PAIR = {"prompt": "the movie", "chosen": " is good", "rejected": " is bad"}
DONE = {"prompt": "the movie", "completion": " is good"}
SHARE = [{"from": "human", "value": "is it"}, {"from": "gpt", "value": "it is"}]
ODD = ["é\u0301 \u202e🙂\u200d👩", "nul \x00 tab\t", "</s> <s> </s>", " ", "\ufeff", "a" * 300, "\u2028 line", "終わり"]
PARTS = [{**DONE, "prompt": [{"role": "user", "content": "x"}], "completion": "007"}, {**DONE, "completion": "{}"}]

CORPUS = {
    "CSV of words that mean nothing to others": Awkward(
        b"prompt,chosen,rejected\nNA,null,None\n007,1e5,nan\n12,13,14\n",
        (*PAIRS, *PROMPTS),
        "rows.csv",
        counts=(3, 0, 0),
    ),
    "CSV with quotes, breaks and a mark": Awkward(
        '\ufeffprompt,completion\r\n"a ""b""\nc",d\r\n\r\n,e\r\n'.encode(),
        (*SFT, *PROMPTS),
        "rows.csv",
        counts=(2, 0, 0),
    ),
    "CSV of another width": Awkward(b"prompt,completion\na,b,c\n", name="rows.csv", refused="has 3 cells where"),
    "tabs": Awkward(b"prompt\tcompletion\na, b\tc\n", (*SFT, *PROMPTS), "rows.tsv", counts=(1, 0, 0)),
    "a mark and blank lines": Awkward(
        b"\xef\xbb\xbf" + json.dumps(DONE).encode() + b"\r\n\r\n" + json.dumps(DONE).encode(), (*SFT, *PROMPTS)
    ),
    "packed": Awkward(gzip.compress(json.dumps([PAIR] * 3).encode()), (*PAIRS, *PROMPTS), "rows.json.gz"),
    "packed otherwise": Awkward(
        pa.compress(json.dumps(DONE).encode() + b"\n", codec="zstd", asbytes=True), (*SFT, *PROMPTS), "rows.jsonl.zst"
    ),
    "a folder of several kinds": Awkward(
        {"a.jsonl": [PAIR], "b.parquet": [PAIR], "c/d.csv": b"prompt,chosen,rejected\na,b,c\n"},
        (*PAIRS, *PROMPTS),
        "folder",
        counts=(3, 0, 0),
    ),
    "a folder with a loose file": Awkward(
        {"helpful.jsonl": [PAIR], "helpful_test.jsonl": [PAIR]}, name="loose", refused="helpful.jsonl name none"
    ),
    "transcripts": Awkward([{"chosen": f"{HH} it is good", "rejected": f"{HH} it is bad"}] * 2, (*PAIRS, *PROMPTS)),
    "transcripts, one without a reply": Awkward(
        [{"chosen": f"{HH} good", "rejected": f"{HH} bad"}, {"chosen": f"{HH} good", "rejected": HH}],
        (*PAIRS, *PROMPTS),
        options="--skip_bad_rows",
        counts=(1, 1, 0),
    ),
    "whole conversations beside their prompt": Awkward(
        [{"prompt": "is it", "chosen": turns("is it", "it is"), "rejected": turns("is it", "no"), "score_chosen": 7.5}],
        (*PAIRS, *PROMPTS),
    ),
    "ShareGPT": Awkward([{"conversations": SHARE, "system": s} for s in ("", "be fun", None)], (*SFT, *PROMPTS)),
    "Alpaca": Awkward(
        [{"instruction": "sum up", "input": i, "output": "x"} for i in ("", "a", None)], (*SFT, *PROMPTS)
    ),
    "KTO": Awkward([{**DONE, "label": True}, {**DONE, "completion": " no", "label": False}], ALL),
    "HelpSteer": Awkward(
        [{"prompt": "a", "response": r, "helpfulness": h, "verbosity": 1} for r, h in (("x", 4), ("y", 0), ("z", 2))],
        ALL,
    ),
    "Nectar": Awkward(
        [{"prompt": HH, "answers": [{"answer": a, "model": a, "rank": r} for a, r in (("x", 2.0), ("y", 1.0))]}], ALL
    ),
    "odd characters": Awkward([{"prompt": t, "completion": f"{t} end"} for t in ODD], (*SFT, *PROMPTS)),
    "odd characters in conversations": Awkward([{"messages": turns(t, f"{t} end")} for t in ODD], (*SFT, *PROMPTS)),
    "texts that look like dates": Awkward([{"prompt": "2020-01-01", "completion": "2020-01-02"}], (*SFT, *PROMPTS)),
    "texts beside messages": Awkward(PARTS, (*SFT, *PROMPTS), counts=(2, 0, 0)),
    "keys that only later rows have": Awkward(
        [DONE, {**DONE, "id": 3, "meta": {"x": 1}}, {**DONE, "meta": {"y": "z"}}], (*SFT, *PROMPTS)
    ),
    "too long for the model": Awkward(
        [DONE, {"prompt": "is " * 90, "completion": "x"}, {"prompt": "a", "completion": " good" * 90}],
        (*SFT, *PROMPTS),
        options="--truncation_mode drop",
        counts=(1, 0, 2),
    ),
    "too long, cut": Awkward(
        [DONE, {"prompt": "is " * 90, "completion": "x"}, {"prompt": "a", "completion": " good" * 90}],
        (*SFT, *PROMPTS),
        counts=(3, 0, 0),
    ),
    "faulty lines among good ones": Awkward(
        b"\n".join([json.dumps(PAIR).encode(), b'{"prompt": ', b"7", b'{"prompt": "\\ud800"}', b"caf\xe9"]),
        (*PAIRS, *PROMPTS),
        options="--skip_bad_rows",
        counts=(1, 4, 0),
    ),
    "other names": Awkward(
        [{"question": "a", "answer": "b"}], (*SFT, *PROMPTS), options="--columns question=prompt,answer=completion"
    ),
    "prompts alone": Awkward([{"prompt": "the movie"}, {"prompt": turns("is it")}][:1] * 3, PROMPTS),
    "another encoding": Awkward('{"prompt": "café"}'.encode("latin-1"), refused="not text in UTF-8"),
    "no rows": Awkward(b"", refused="at least one row"),
    "no JSON": Awkward(b"prompt: a\n", refused="JSON parse error"),
    "no packing": Awkward(b"plain", name="rows.jsonl.gz", refused="could not be read"),
    "empty replies": Awkward(
        [{**PAIR, "completion": None, "rejected": ""}], PROMPTS, refused="must not be empty; it is in row 0"
    ),
    "infinite rewards": Awkward(
        b'{"prompt": "a", "completions": ["b", "c"], "rewards": [1, NaN]}', PROMPTS, refused="'rewards'"
    ),
}


@pytest.fixture(scope="module")
def place(tiny_tokenizer, tmp_path_factory):
    """A folder with a model, its tokenizer, and a reward."""
    from fastalign.demo.models import small_model

    path = tmp_path_factory.mktemp("awkward")
    small_model(len(tiny_tokenizer), hidden_size=16, layers=1, seed=0).save_pretrained(path / "m")
    tokenizer = type(tiny_tokenizer)(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path / "m")
    (path / "reward.py").write_text("def score(completions):\n    return [float(len(c)) for c in completions]\n")
    return path


def write(path, content):
    """Rows as JSON lines (or a table, by the name), bytes as they are, several files as a folder."""
    if isinstance(content, dict):
        for name, each in content.items():
            write(path / name, each)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(content), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content))


def run(capsys, *argv):
    """(exit status, the last line of the errors) of a command, which must not end in a traceback."""
    status = cli.main(list(argv))
    said = capsys.readouterr().err.strip().splitlines()
    assert not any(line.startswith("Traceback") for line in said)
    return status, said[-1] if said else ""


@pytest.mark.parametrize("name", CORPUS)
def test_trains_or_is_refused_in_one_line(name, place, monkeypatch, capsys):
    case, data = CORPUS[name], place / "data"
    monkeypatch.chdir(place)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(place / "cache"))
    shutil.rmtree(data, ignore_errors=True)
    write(data / case.name, case.content)
    source, known = str(data / case.name), case.options.replace("--skip_bad_rows", "").split()
    status, said = run(capsys, "doctor", "--model", "m", "--dataset", source, "--max_length", "48", *known)
    assert status in (0, 1) or (status == 2 and case.refused in said and not case.trains), said
    for command, options in COMMANDS.items():
        shutil.rmtree(place / "run", ignore_errors=True)
        argv = f"{command} {options} --output_dir run {case.options}".split()
        status, said = run(capsys, *argv, "--dataset", source)
        if command not in case.trains:
            assert (status, said.startswith(f"fastalign {command}: error: ")) == (2, True), said
            assert case.refused in said
            continue
        assert status == 0, said
        metrics = json.loads((place / "run" / "metrics.json").read_text())
        assert all(math.isfinite(value) for value in metrics.values() if isinstance(value, (int, float)))
        if case.counts and command == case.trains[0]:
            found = tuple(metrics[f"data/dataset/{count}"] for count in ("rows", "skipped", "dropped"))
            assert found == case.counts
