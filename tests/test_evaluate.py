"""`fastalign eval` and `fastalign sample`: figures that are what they say, and rows that can be trained on."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")
pytest.importorskip("sklearn", reason="needs scikit-learn (the extra `train`)")

from transformers import AutoTokenizer, GPT2ForSequenceClassification, set_seed

from fastalign.cli import commands as cli
from fastalign.evaluation.evaluate import EvalConfig, evaluate
from fastalign.evaluation.sample import read_prompts
from fastalign.evaluation.sampling import sample
from fastalign.evaluation.scorers import load_judge
from fastalign.models.sampling import Sampling
from fastalign.trainers.data.encode import Encoder
from fastalign.trainers.data.tokenize import tokenize_lists

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
    for spec in ("nothing", "json:nothing", str(place / "absent")):
        with pytest.raises(ValueError, match="reward must be gold"):
            load_judge(spec)
    with pytest.raises(ValueError, match="must return 3 finite numbers"):
        load_judge("operator:eq")(prompts, ends)


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
