"""The studies of reward hacking, transfer and labelers on the made-up corpus; their figures by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("sklearn", reason="needs scikit-learn (the extra `train`)")
pytest.importorskip("matplotlib", reason="needs matplotlib (the extra `train`)")
pytest.importorskip("rich", reason="needs rich (the extra `train`)")

from fastalign.cli import commands as cli
from fastalign.evaluation.policy import Measured
from fastalign.evaluation.sampling import Sample
from fastalign.study import hacking, labelers, transfer
from fastalign.study.methods import METHODS
from fastalign.study.setup import Setup
from fastalign.trainers.data.reviews import DOMAINS, Review

SMALL = {
    **{"vocab_size": 320, "hidden_size": 32, "layers": 1, "held_out": 80, "max_new_tokens": 20, "sft_rows": 320},
    **{"sft_epochs": 6.0, "sft_learning_rate": 1e-2, "prompts": 60, "min_gap": 0.05, "eval_prompts": 24},
    **{"evaluations": 1, "best_of": 2, "preference_updates": 16, "preference_batch_size": 16},
    **{"preference_learning_rate": 3e-3, "policy_steps": 1, "policy_batch_size": 8, "policy_learning_rate": 1e-3},
    **{"seeds": 1, "processes": 1},
}


def measured(texts, gold, proxy):
    samples = [[Sample([0], [1], text, True) for text in each] for each in texts]
    return Measured({"finished": 1.0}, samples, [], {"gold": np.array(gold), "proxy": np.array(proxy)})


def test_changes_by_hand():
    before = measured([["a b", "a b c"], ["a", "a b c d"]], [[0.0, 1.0], [1.0, 1.0]], [[0.0] * 2] * 2)
    after = measured([["a b c", "a b c"], ["a b", "a b c d"]], [[1.0, 0.0], [2.0, 1.0]], [[3.0, 3.0], [2.0, 4.0]])
    found = hacking.compare(before, after)
    assert found["words_change"]["mean"] == 0.5
    assert found["gold_change"]["mean"] == 0.25
    assert found["win_rate"]["mean"] == 0.625  # a win, a loss, a win and a tie
    assert found["win_rate_matched"]["mean"] == 0.25  # of those of equal length, a loss and a tie
    assert found["learned_length"] == pytest.approx(1.0)
    assert hacking.compare(before, before)["learned_length"] == 0.0


def test_hacking_and_transfer_end_to_end(made_up_corpus, monkeypatch):
    """Labelers who like length make DPO's outputs grow, and DPO-R's less; the frontier's cells are used again."""
    for name, method in METHODS.items():
        monkeypatch.setitem(METHODS, name, method._replace(quick=method.quick[:1]))
    monkeypatch.setattr(hacking.HackingConfig, "alphas", (0.0, 1.0))
    out = made_up_corpus / "study"
    config = hacking.HackingConfig(output_dir=str(out), length_bonus=0.3, beta=0.5, nll_weight=0.02, **SMALL)
    found = hacking.run_hacking(config)
    plain, penalised = (found["summary"][alpha] for alpha in ("0", "1"))
    assert plain["longer_chosen"]["mean"] > 0.7
    assert plain["words_change"]["low"] > 0
    assert penalised["words_from_dpo"]["mean"] < 0
    assert penalised["words_change"]["high"] < plain["words_change"]["low"]
    rows = hacking.length_biased(Setup(out, config, 0), 1e6)
    assert all(len(row["chosen"].split()) >= len(row["rejected"].split()) for row in rows)
    for name in ("hacking.png", "hacking.html", "hacking.json"):
        assert (out / name).stat().st_size > 1000
    kept = json.loads((out / "hacking.json").read_text(), parse_constant=pytest.fail)  # no NaN, which is not JSON
    assert kept["summary"]["0"]["words_change"] == plain["words_change"]
    assert kept["summary"]["0"]["finished"]["se"] is None

    moved = transfer.run_transfer(transfer.TransferConfig(output_dir=str(out), **SMALL))
    assert set(moved["summary"]) == {"dpo", "ppo-gold"}
    movies = moved["summary"]["dpo"]["movies"]
    assert set(moved["summary"]["dpo"]) == set(DOMAINS)
    assert movies["gold"]["mean"] - movies["gold_change"]["mean"] == pytest.approx(
        moved["cells"][f"transfer/dpo-{METHODS['dpo'].quick[0]:g}-0"]["domains"]["movies"]["before"]["gold"]["mean"]
    )
    assert (out / "transfer.html").stat().st_size > 1000


def test_labelers(made_up_rows, monkeypatch, tmp_path, capsys):
    """People who mostly agree: the scorer learns what they all like, and holds for those it never saw."""
    pytest.importorskip("krippendorff", reason="needs krippendorff (the extra `eval`)")
    draw = np.random.default_rng(0)
    texts = [
        Review(rating, text, tuple(int(x) for x in np.round(rating + draw.normal(size=6))), i // 30)
        for i, (rating, text) in enumerate(dict.fromkeys(made_up_rows))
    ]
    monkeypatch.setattr(labelers, "load_reviews", lambda domain="movies": texts)
    argv = ["study", "labelers", "--output_dir", str(tmp_path), "--folds", "3", "--held_out_items", "0.3"]
    assert cli.main(argv) == 0
    found = json.loads((tmp_path / "labelers.json").read_text())
    assert set(found["domains"]) == set(DOMAINS)
    assert found["domains"]["movies"]["ratings"] == 6 * len(texts)
    assert 0.6 < found["domains"]["movies"]["interval"] < 1
    assert 0.7 < found["pairwise_agreement"]["mean"] < 1
    assert found["new_labelers"]["low"] > 0.6
    assert "Krippendorff" in capsys.readouterr().out
    with pytest.raises(ValueError, match="held_out_items below 1"):
        labelers.LabelersConfig(held_out_items=1.0)
