"""Labelers: InstructGPT's table, agreement measures against published worked examples, held-out labelers."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("scipy", reason="needs scipy (the extra `train`)")

from fastalign.evaluation.agreement import (
    Rating,
    fleiss_kappa,
    held_out_labelers,
    krippendorff_alpha,
    pairwise_agreement,
)
from fastalign.evaluation.labelers import FLAGS, LabelRow, read_labels, summarise, write_labels

# Fleiss 1971's form: 10 subjects, 14 raters, 5 categories (a worked example with kappa 0.210 in many textbooks).
FLEISS = np.array(
    [
        *([0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1]),
        *([7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]),
    ]
)
# Krippendorff 2011, example C: four observers, twelve units, missing data.
KRIPPENDORFF = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""


class TestAgreement:
    def test_fleiss_kappa_worked_example(self):
        assert fleiss_kappa(FLEISS) == pytest.approx(0.210, abs=5e-4)
        assert fleiss_kappa(np.array([[3, 0], [0, 3]])) == 1
        # Two raters who always differ: observed 0, expected 1/2.
        assert fleiss_kappa(np.array([[1, 1], [1, 1]])) == -1

    def test_krippendorff_alpha_worked_example(self):
        pytest.importorskip("krippendorff", reason="needs krippendorff (the extra `eval`)")
        rows = [line.split() for line in KRIPPENDORFF.split("\n") if line]
        items = [[float(x) for x in column if x != "."] for column in zip(*rows, strict=True)]
        for level, value in {"nominal": 0.743, "ordinal": 0.815, "interval": 0.849, "ratio": 0.797}.items():
            assert krippendorff_alpha(items, level=level) == pytest.approx(value, abs=6e-4)

    def test_undefined_agreement_is_refused(self):
        with pytest.raises(ValueError, match="same number of raters"):
            fleiss_kappa(np.array([[1, 1], [2, 1]]))
        with pytest.raises(ValueError, match="two categories"):
            fleiss_kappa(np.array([[2, 0], [2, 0]]))
        pytest.importorskip("krippendorff", reason="needs krippendorff (the extra `eval`)")
        with pytest.raises(ValueError, match="two different ratings"):
            krippendorff_alpha([[1, 1], [1], [2]])

    def test_pairwise_agreement(self):
        values = {"a": (1, 2, 3), "b": (1, 2, 3), "c": (3, 2, 2)}
        ratings = [Rating(str(i), name, x) for name, row in values.items() for i, x in enumerate(row)]
        # a and b agree on 3 of 3; either agrees with c on 0 of 2 (c's tie drops out): means 1/2, 1/2 and 0.
        assert pairwise_agreement(ratings).mean == pytest.approx(1 / 3)
        with pytest.raises(ValueError, match="two people"):
            pairwise_agreement(ratings[:3])


class TestHeldOutLabelers:
    def people(self, own_taste):
        """40 people rate 60 items: the item's worth, noise, and as much as told what is the person's own alone."""
        draw = np.random.default_rng(0)
        worth = draw.normal(size=60)
        return [
            Rating(f"{i:02}", f"p{p}", float(worth[i] + own_taste * draw.normal()))
            for p in range(40)
            for i in range(60)
        ], worth

    def test_a_scorer_that_knows_the_worth_is_as_right_as_people_allow(self):
        ratings, worth = self.people(0.5)
        found = held_out_labelers(ratings, lambda items, values: lambda asked: worth[[int(i) for i in asked]])
        # P(sign of the worths' difference is that of the ratings'): 1/2 + atan(sd ratio) / pi with ratio 1 / 0.5.
        expected = 0.5 + np.arctan(2) / np.pi
        assert found.labelers == 40
        assert found.known.mean == pytest.approx(expected, abs=0.06)  # 12 items' worths: the pairs are not independent
        assert found.new.mean == pytest.approx(found.known.mean, abs=1e-9)  # nothing was learned from anyone

    def test_only_the_known_people_and_items_are_learned_from(self):
        ratings, _ = self.people(1.0)
        seen = []

        def fit(items, values):
            seen.append((set(items), len(values)))
            return lambda asked: np.zeros(len(asked))

        found = held_out_labelers(ratings, fit, folds=4, held_out_items=0.25)
        assert [(len(items), count) for items, count in seen] == [(45, 45 * 30)] * 4
        assert found.known.mean == found.new.mean == 0  # a scorer without an opinion is never right

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"folds must be at least 2 and at most .* 40; got 41"):
            held_out_labelers(self.people(1)[0], None, folds=41)


class TestTable:
    def test_the_table_is_there_whole(self, tmp_path):
        assert len(FLAGS) == 11
        rows = [
            LabelRow("x", "ann", 7, dict.fromkeys(FLAGS, False)),
            LabelRow("x", "bob", 5, {**dict.fromkeys(FLAGS, False), "hallucination": True}),
            LabelRow("y", "ann", None, {"hallucination": True}),
        ]
        write_labels(str(tmp_path / "labels.jsonl"), rows)
        assert read_labels(str(tmp_path / "labels.jsonl")) == rows

    def test_mistakes_are_named_with_their_row(self, tmp_path):
        for bad, message in {
            '{"item": "x", "labeler": "a", "overall_quality": 8}': "from 1 to 7; got 8",
            '{"item": "x", "labeler": "a", "rude": true}': "got 'rude'",
            '{"item": "x", "labeler": "a", "hallucination": 1}': "hallucination must be true or false; got 1",
            '{"item": "x"}': "'labeler' is missing",
            "[1]": r"row 1",
        }.items():
            (tmp_path / "labels.jsonl").write_text('{"item": "x", "labeler": "a"}\n' + bad + "\n")
            with pytest.raises(ValueError, match=r"row 1 \(from 0\).*" + message.removeprefix("row 1")):
                read_labels(str(tmp_path / "labels.jsonl"))

    def test_command(self, tmp_path, capsys):
        for package in ("krippendorff", "transformers", "sklearn", "rich"):
            pytest.importorskip(package, reason=f"needs {package} (the extra `eval`)")
        from fastalign.cli import commands as cli

        rows = [LabelRow("x", "a", 6), LabelRow("x", "b", 7), LabelRow("y", "a", 2), LabelRow("y", "b", 2)]
        write_labels(str(tmp_path / "labels.jsonl"), rows)
        assert cli.main(["study", "labelers", "--labels", str(tmp_path / "labels.jsonl")]) == 0
        shown = capsys.readouterr().out
        assert "overall_quality" in shown
        assert "4.250" in shown

    def test_summary(self):
        pytest.importorskip("krippendorff", reason="needs krippendorff (the extra `eval`)")
        notes = {"x": [(7, True), (6, True)], "y": [(2, False), (1, False)], "z": [(4, True), (4, False)]}
        rows = [
            LabelRow(item, who, quality, {"hallucination": flag})
            for item, each in notes.items()
            for who, (quality, flag) in zip("ab", each, strict=True)
        ]
        found = summarise(rows)
        assert set(found) == {"overall_quality", "hallucination"}
        assert found["overall_quality"]["mean"] == pytest.approx(4)
        assert 0.7 < found["overall_quality"]["alpha"] < 1
        # Two of three items agree, half of the ratings are true: kappa (2/3 - 1/2) / (1/2); alpha 1 - 5 * 2 / 18.
        assert found["hallucination"]["kappa"] == pytest.approx(1 / 3)
        assert found["hallucination"]["alpha"] == pytest.approx(1 - 5 * 2 / 18)
