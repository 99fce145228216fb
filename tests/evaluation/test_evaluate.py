"""`fastalign eval` and `fastalign sample`: figures that are what they say, and rows that can be trained on."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")
pytest.importorskip("sklearn", reason="needs scikit-learn (the extra `train`)")

from transformers import AutoTokenizer, GPT2ForSequenceClassification, set_seed

from fastalign.cli import commands as cli
from fastalign.evaluation.evaluate import EvalConfig, evaluate, told_apart
from fastalign.evaluation.sample import read_prompts
from fastalign.evaluation.sampling import sample
from fastalign.evaluation.scorers import load_judge
from fastalign.models.sampling import Sampling
from fastalign.trainers.data.encode import Encoder
from fastalign.trainers.data.files import read_rows
from fastalign.trainers.data.tokenize import tokenize_lists
from fastalign.trainers.policy.rewards import FunctionReward, load_function
from fastalign.trainers.policy.rollout import Episode, load_prompts

ROWS = [
    {"prompt": p, "completion": c} for p, c in (("the movie", " is good"), ("a film", " and great fun"), ("a", " b"))
]


@pytest.fixture
def place(tiny_model, tiny_tokenizer, tmp_path):
    """A folder with two models, `one` and `two` (which ends nearly every text at once), and rows."""
    for name in ("one", "two"):
        model = tiny_model()
        if name == "two":
            with torch.no_grad():
                model.transformer.ln_f.bias += 100 * model.transformer.wte.weight[tiny_tokenizer.eos_token_id]
                model.transformer.wte.weight[tiny_tokenizer.eos_token_id] *= 20
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def test_figures(place, monkeypatch):
    judge = lambda prompts, completions: [-float(len(c)) for c in completions]  # noqa: E731
    monkeypatch.setattr(json, "shortness", judge, raising=False)
    models = [str(place / "one"), str(place / "two")]
    config = EvalConfig(
        models=models,
        dataset=str(place / "rows.jsonl"),
        reward="json:shortness",
        max_new_tokens=8,
        samples_per_prompt=6,
    )
    result = evaluate(config)
    one, two = (result[path] for path in models)
    assert two["tokens"]["mean"] < one["tokens"]["mean"]
    assert two["ended"] > one["ended"]
    assert two["reward"]["low"] <= two["reward"]["mean"] <= two["reward"]["high"]
    assert two["reward"]["mean"] > one["reward"]["mean"]
    assert "win_rate" not in one  # it is what the others are compared with
    assert two["win_rate"]["mean"] > 0.5
    assert evaluate(config) == result


def test_perplexity_is_that_of_the_completions(place, tiny_model, tiny_tokenizer):
    total, count = 0.0, 0
    for row in ROWS:
        start = len(tiny_tokenizer(row["prompt"])["input_ids"])
        ids = tiny_tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tiny_tokenizer.eos_token_id]
        with torch.no_grad():
            logits = tiny_model().eval()(torch.tensor([ids])).logits[0]
        total += float(
            torch.nn.functional.cross_entropy(logits[start - 1 : -1], torch.tensor(ids[start:]), reduction="sum")
        )
        count += len(ids) - start
    config = EvalConfig(models=[str(place / "one")], dataset=str(place / "rows.jsonl"), max_new_tokens=2, batch_size=2)
    assert evaluate(config)[str(place / "one")]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_judges(place, tiny_model, tiny_tokenizer):
    set_seed(0)
    config = tiny_model().config
    config.num_labels, config.pad_token_id = 1, 0
    model = GPT2ForSequenceClassification(config).eval()
    with torch.no_grad():
        model.score.weight.normal_()
    model.save_pretrained(place / "reward")
    tokenizer = AutoTokenizer.from_pretrained(place / "one", pad_token="<s>")
    tokenizer.save_pretrained(place / "reward")
    prompts, ends = ["the movie"] * 3, [" is good", " is bad , awful and long", ""]
    got = load_judge(str(place / "reward"))(prompts, ends)
    for prompt, end, score in zip(prompts, [*ends[:2], " "], got, strict=True):
        ids = tokenizer(prompt + end)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            assert float(model(torch.tensor([ids])).logits) == pytest.approx(float(score), abs=1e-4)
    for spec, message in {
        "nothing": "reward must be gold",
        "json:nothing": "reward must name a function; 'json' has no function 'nothing'",
        str(place / "absent"): "reward must be gold",
        "absent.py:f": "reward names 'absent.py', which cannot be imported",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_judge(spec)
    with pytest.raises(ValueError, match="reward eq must return 3 numbers; got False"):
        load_judge("operator:eq")(prompts, ends)


REWARD = """
def right(completions, answer):
    return [float(a in c) for c, a in zip(completions, answer)]

def anything(prompts, completions, **columns):
    return [len(c) + len(a) for c, a in zip(completions, columns["answer"])]

def sometimes(completions):
    return [None for _ in completions]
"""


class TestRewardFunctions:
    """One form for `grpo`, `ppo` and `eval`: a file's function, by the names of its parameters, columns among them."""

    @pytest.fixture
    def options(self, place):
        (place / "reward.py").write_text(REWARD)
        rows = [{**row, "answer": row["completion"][:2]} for row in ROWS]
        (place / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        keys = {"models": [str(place / "one"), str(place / "two")], "dataset": str(place / "answers.jsonl")}
        return {**keys, "max_new_tokens": 4, "samples_per_prompt": 2}

    @pytest.mark.parametrize("name", ["right", "anything"])
    def test_eval_takes_what_grpo_takes(self, place, options, tiny_tokenizer, name):
        spec = f"{place}/reward.py:{name}"
        found = evaluate(EvalConfig(**options, reward=spec, against="completion"))
        assert all("win_rate" in figures and "reward" in figures for figures in found.values())
        judged = evaluate(EvalConfig(**options, judge=spec))
        assert "win_rate" in judged[options["models"][1]]
        reward = FunctionReward(load_function(spec))
        prompts = load_prompts(options["dataset"], tiny_tokenizer, 64, reward.columns, optional=reward.optional)
        scores = reward([Episode(p, [1], " is good", True) for p in prompts])
        judge = load_judge(spec)
        texts = [row["prompt"] for row in ROWS]
        judge.bind(texts, read_rows(options["dataset"]))
        assert judge(texts, [" is good"] * 3).tolist() == scores.tolist()

    @pytest.mark.parametrize(
        ("name", "dataset", "message"),
        [
            ("right", "rows.jsonl", "reward needs the columns answer; dataset has completion"),
            ("sometimes", "answers.jsonl", "must return a number for every completion that is compared; number 0"),
            ("right", "twice.jsonl", r"row 1 \(from 0\) has the prompt of an earlier one, and other columns"),
        ],
    )
    def test_what_a_function_cannot_judge_is_named(self, place, options, name, dataset, message):
        twice = [{"prompt": "a", "completion": "b", "answer": answer} for answer in "xy"]
        (place / "twice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in twice))
        options = {**options, "dataset": str(place / dataset)}
        with pytest.raises(ValueError, match=message):
            evaluate(EvalConfig(**options, reward=f"{place}/reward.py:{name}"))


def test_models_of_one_name_are_told_apart(place, capsys):
    for name in ("first", "second"):
        shutil.copytree(place / "one", place / name / "final")
    models = f"{place}/first/final,{place}/second/final"
    keys = ["--max_new_tokens", "4", "--samples_per_prompt", "1", "--dataset", str(place / "rows.jsonl")]
    assert cli.main(["eval", "--models", models, *keys]) == 0
    shown = capsys.readouterr().out
    assert "first/final" in shown
    assert "second/final" in shown
    assert told_apart(["runs/a/final", "runs/b/final/", "other"]) == ["a/final", "b/final", "other"]
    assert told_apart(["runs/a", "runs/b"]) == ["a", "b"]
    assert told_apart(["a", "x/a"]) == ["a", "x/a"]


def test_samples_are_printed_as_text(place, capsys):
    keys = ["--max_new_tokens", "2", "--model", str(place / "one")]
    assert cli.main(["sample", "--prompt", "\u4f60\u597d caf\u00e9", *keys]) == 0
    out = capsys.readouterr().out
    assert '"prompt": "\u4f60\u597d caf\u00e9"' in out
    assert "\\u" not in out.partition('"completions"')[0]


def test_commands(place, capsys):
    rows, out = str(place / "rows.jsonl"), place / "samples.jsonl"
    keys = ["--max_new_tokens", "6", "--seed", "3"]
    argv = ["sample", "--model", str(place / "one"), "--dataset", rows, "--samples_per_prompt", "3", *keys]
    assert cli.main([*argv, "--output", str(out)]) == 0
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in written] == [row["prompt"] for row in ROWS]
    assert all(len(row["completions"]) == len(row["finished"]) == 3 for row in written)
    capsys.readouterr()
    assert cli.main(["sample", "--model", str(place / "one"), "--prompt", "the", "--temperature", "0", *keys]) == 0
    first = capsys.readouterr().out
    assert cli.main(["sample", "--model", str(place / "one"), "--prompt", "the", "--temperature", "0", *keys[:2]]) == 0
    assert capsys.readouterr().out == first
    figures = place / "figures.json"
    argv = ["eval", "--models", f"{place / 'one'},{place / 'two'}", "--dataset", rows, "--output", str(figures)]
    assert cli.main([*argv, "--samples_per_prompt", "2", *keys]) == 0
    shown = capsys.readouterr().out
    assert "perplexity" in shown
    assert "win_rate" not in shown
    assert set(json.loads(figures.read_text())) == {str(place / "one"), str(place / "two")}
    assert cli.main(["sample", "--model", "x"]) == 2
    assert cli.main(["eval", "--models", "x"]) == 2


def test_sampled_rows_become_lists(place, tiny_model, tiny_tokenizer):
    set_seed(0)
    drawn = sample(tiny_model(), tiny_tokenizer, ["the movie"], per_prompt=3, how=Sampling(5, 8))
    rows = [{"prompt": "the movie", "completions": [s.text or "." for s in drawn[0]], "rewards": [1.0, 3.0, 2.0]}]
    assert tokenize_lists(rows, Encoder(tiny_tokenizer, 64))[0]["rewards"] == [3.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"max_new_tokens": 0}, "max_new_tokens")],
)
def test_bad_sampling_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**{"max_new_tokens": 4, "batch_size": 4, **options})


def test_bad_prompts_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": 3}\n')
    with pytest.raises(ValueError, match=r"row 0 \(from 0\) has 3"):
        read_prompts(str(path), 0)
    path.write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="needs the column prompt"):
        read_prompts(str(path), 0)
