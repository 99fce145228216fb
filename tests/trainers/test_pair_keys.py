"""Pairwise losses under TRL's names: each `loss_type`, several with weights, and what is none of pairs."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")

from fastalign.losses import dpo_loss
from fastalign.trainers.common import arguments
from fastalign.trainers.dpo import DPOConfig

G = torch.Generator().manual_seed(0)
LOGPS = [-20 * torch.rand(6, generator=G, dtype=torch.float64) for _ in range(4)]
SIZES = {name: torch.randint(3, 9, (6,), generator=G) for name in ("chosen_lengths", "rejected_lengths")}


def made(**options):
    return DPOConfig(output_dir="runs", use_cpu=True, report_to="none", **options)


def test_every_loss_type_of_trl_is_one_here():
    trl = pytest.importorskip("trl", reason="needs TRL (the extra `dev`)")
    source = inspect.getsource(trl.DPOTrainer._compute_loss)
    names = re.findall(r'loss_type == "(\w+)"', source)
    assert len(names) == 15
    smoothing = {"exo_pair": {"label_smoothing": 1e-3}, "robust": {"label_smoothing": 0.1}}
    for name in names:
        made(loss_type=name, **smoothing.get(name, {}))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kto_pair", "is of single completions, not of pairs: `fastalign kto` trains it"),
        ("apo_zero_unpaired", "is of single completions, not of pairs"),
        ("bco", "is of single completions, and not among ours; bco_pair"),
        ("tpo-l", "is of triples, with a gold completion of each prompt: `fastalign tpo`"),
        ("sigmoid_nrom", "loss_type must be one of"),
    ],
)
def test_what_is_no_loss_of_pairs_is_answered(name, message):
    with pytest.raises(ValueError, match=message):
        made(loss_type=name)
    with pytest.raises(ValueError, match=message):
        dpo_loss(*LOGPS[:2], loss_type=[name])


def test_weights_go_with_the_names_in_their_order():
    """MPO as TRL's documentation writes it, and our own spelling of it."""
    theirs = made(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0])
    ours = made(loss_type={"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0})
    assert theirs.loss().options.key == ours.loss().options.key
    argv = ["--output_dir", "runs", "--loss_type", "sigmoid,bco_pair,sft", "--loss_weights", "0.8,0.2,1"]
    assert arguments.parse(DPOConfig, argv, command="dpo").loss().options.key == ours.loss().options.key
    both = dpo_loss(*LOGPS, **SIZES, loss_type=theirs.weighted_types())
    parts = [dpo_loss(*LOGPS, **SIZES, loss_type=name).loss for name in ("sigmoid", "bco_pair")]
    nll = dpo_loss(*LOGPS[:2], **SIZES, loss_type="sft").loss
    torch.testing.assert_close(both.loss, 0.8 * parts[0] + 0.2 * parts[1] + nll)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights must be a number for each variant"),
        ({"loss_type": ["sft", "sft"], "loss_weights": [1.0, 1.0]}, "loss_weights must be a number for each variant"),
        ({"loss_type": {"sigmoid": 1.0}, "loss_weights": [1.0]}, "loss_weights must be left out where loss_type has"),
    ],
)
def test_weights_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        made(**options)
