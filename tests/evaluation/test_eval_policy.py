"""The figures of a policy: KL by every estimator, perplexity, variety, best-of-n, bootstrap intervals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")
pytest.importorskip("sklearn", reason="needs scikit-learn (the extra `train`)")

from fastalign.demo.models import small_model
from fastalign.evaluation import policy as policy_figures
from fastalign.evaluation.best_of_n import best_of_n, best_of_n_kl
from fastalign.evaluation.diversity import self_bleu
from fastalign.evaluation.estimates import bootstrap, estimate
from fastalign.evaluation.perplexity import alignment_tax, likelihood
from fastalign.evaluation.sampling import Sample, compare_policies
from fastalign.models.sampling import Sampling

LETTERS, LENGTH = 4, 3


@pytest.fixture(scope="module")
def worlds():
    """Two models over four tokens, far apart, and every text of three tokens."""
    models = []
    for seed in (1, 2):
        model = small_model(LETTERS, hidden_size=16, layers=1, seed=seed).eval()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.mul_(10)
        models.append(model)
    texts = [Sample([0], list(ids), "", False) for ids in itertools.product(range(LETTERS), repeat=LENGTH)]
    return (*models, texts)


@torch.no_grad()
def log_probs(model, texts, temperature):
    """Log-probability of each text, in float64."""
    ids = torch.tensor([s.prompt_ids + s.ids for s in texts])
    logps = (model(ids).logits[:, :-1].double() / temperature).log_softmax(-1)
    return logps.gather(-1, ids[:, 1:, None]).sum((1, 2)).numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_estimator_has_the_exact_kl_for_its_mean(worlds, temperature):
    """All 64 texts, weighed by their probability: no sampling, so equal up to rounding."""
    policy, reference, texts = worlds
    logp, ref = (log_probs(m, texts, temperature) for m in (policy, reference))
    exact = float((np.exp(logp) * (logp - ref)).sum())
    assert exact > 0.3  # the models are far enough apart for the test to say something
    found = compare_policies(policy, reference, texts, 0, temperature=temperature)
    for values in (found.logp_ratio, found.kl, found.k3):
        assert float((np.exp(logp) * values.double().numpy()).sum()) == pytest.approx(exact, rel=2e-5)
    assert found.tokens.tolist() == [LENGTH] * len(texts)


def test_sampled_estimates_agree_with_the_exact_kl_within_their_error(worlds):
    policy, reference, texts = worlds
    logp, ref = (log_probs(m, texts, 1.0) for m in (policy, reference))
    probabilities = np.exp(logp) / np.exp(logp).sum()
    exact = float((probabilities * (logp - ref)).sum())
    found = compare_policies(policy, reference, texts, 0)
    drawn = np.random.default_rng(0).choice(len(texts), size=(300, 1000), p=probabilities)
    for values in (found.logp_ratio, found.kl, found.k3):
        estimates = [estimate(values.numpy()[row]) for row in drawn]
        covered = np.mean([e.low <= exact <= e.high for e in estimates])
        # 300 intervals of 95 %: four standard deviations of that share are 0.05.
        assert covered == pytest.approx(0.95, abs=0.05)
    k1, exact_kl = (estimate(values.numpy()[drawn[0]]).se for values in (found.logp_ratio, found.kl))
    assert exact_kl < k1


def test_models_are_compared_in_evaluation_mode_and_left_as_they_were(tiny_tokenizer):
    model = small_model(len(tiny_tokenizer), hidden_size=16, layers=1, seed=0, dropout=0.5).train()
    found = compare_policies(model, model, [Sample([0], [5, 6, 7], "", False)], 1)
    assert float(found.kl) == pytest.approx(0, abs=1e-6)
    assert model.training


def test_measure_is_repeatable_and_refuses_truncated_draws(tiny_model, tiny_tokenizer):
    policy, reference = tiny_model(), tiny_model()
    with torch.no_grad():
        policy.lm_head.weight.mul_(8)
    length = {"length": lambda texts: np.array([float(len(t)) for t in texts])}
    options = {"per_prompt": 3, "how": Sampling(6, 8), "seed": 4}
    found = policy_figures.measure(policy, reference, tiny_tokenizer, ["the movie", "a"], length, **options)
    again = policy_figures.measure(policy, reference, tiny_tokenizer, ["the movie", "a"], length, **options)
    assert found.figures == again.figures
    assert found.scores["length"].shape == (2, 3)
    assert found.texts[3].startswith("a")
    assert found.figures["length"]["mean"] == pytest.approx(np.mean([len(t) for t in found.texts]))
    tokens = sum(len(s.ids) for each in found.samples for s in each)
    assert found.figures["kl_token"] * tokens == pytest.approx(found.figures["kl"]["mean"] * 6, rel=1e-5)
    for how in (Sampling(6, 8, top_k=3), Sampling(6, 8, top_p=0.9)):
        with pytest.raises(ValueError, match="top_k must be 0 and top_p 1"):
            policy_figures.measure(policy, reference, tiny_tokenizer, ["a"], length, per_prompt=1, how=how, seed=0)


def test_likelihood_and_the_alignment_tax(tiny_model, tiny_tokenizer):
    rows = [{"prompt": "", "completion": t} for t in ("the movie is good", "a dull film", "great fun and awful")]
    before, after = tiny_model().train(), tiny_model()
    with torch.no_grad():
        after.lm_head.weight.mul_(20)
    found = {name: likelihood(m, tiny_tokenizer, rows, batch_size=2) for name, m in (("b", before), ("a", after))}
    ids = tiny_tokenizer(rows[1]["completion"])["input_ids"] + [tiny_tokenizer.eos_token_id]
    with torch.no_grad():
        logits = before.eval()(torch.tensor([ids])).logits[0, :-1]
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
    assert found["b"].nats[1] == pytest.approx(float(nll), rel=1e-5)
    assert found["b"].tokens[1] == len(ids) - 1
    assert found["b"].perplexity == pytest.approx(math.exp(found["b"].nats.sum() / found["b"].tokens.sum()))
    tax = alignment_tax(found["b"], found["a"])
    assert tax.mean > 0
    assert alignment_tax(found["a"], found["b"]).mean == pytest.approx(-tax.mean)
    shorter = likelihood(before, tiny_tokenizer, rows[:2])
    with pytest.raises(ValueError, match="same texts"):
        alignment_tax(found["b"], shorter)


def test_self_bleu():
    pytest.importorskip("sacrebleu", reason="needs sacrebleu (the extra `eval`)")
    same = ["the movie is a great deal of fun"] * 3
    other = ["one two three four five", "six seven eight nine ten", "a b c d e"]
    assert self_bleu(same) == pytest.approx(1.0)
    assert self_bleu(other) < 0.05
    # Of two texts with two words in three alike: precisions 2/3 and 1/2 (and, smoothed, 1/2 of 1 for three words).
    assert self_bleu(["a b c", "a b d"], order=2) == pytest.approx(math.sqrt(2 / 3 * 1 / 2))
    assert self_bleu(other * 50, limit=20, seed=1) == self_bleu(other * 50, limit=20, seed=1)
    with pytest.raises(ValueError, match="at least two"):
        self_bleu(["one"])


class TestBestOfN:
    def test_is_the_mean_over_all_subsets(self):
        draw = np.random.default_rng(0)
        proxy, gold = draw.normal(size=(2, 5, 6))
        for n in (1, 2, 4, 6):
            expected = [
                np.mean([g[max(s, key=lambda i: p[i])] for s in map(list, itertools.combinations(range(6), n))])
                for p, g in zip(proxy, gold, strict=True)
            ]
            np.testing.assert_allclose(best_of_n(proxy, gold, n), expected)
        np.testing.assert_allclose(best_of_n(gold, gold, 6), gold.max(1))

    def test_kl_bound(self):
        assert best_of_n_kl(1) == 0
        assert best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)
        # Uniform scores on k texts without ties: KL of best-of-n to uniform, by the definition, in the limit of many.
        k, n = 20_000, 3
        best = np.diff((np.arange(k + 1) / k) ** n)
        assert best_of_n_kl(n) == pytest.approx(float((best * np.log(best * k)).sum()), abs=1e-3)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="at least 1 and at most 2; got 3"):
            best_of_n(np.zeros((1, 2)), np.zeros((1, 2)), 3)
        with pytest.raises(ValueError, match="alike"):
            best_of_n(np.zeros((1, 2)), np.zeros((1, 3)), 1)


class TestBootstrap:
    def test_interval_covers_the_mean_nearly_as_often_as_it_says(self):
        draws = (np.random.default_rng(0).random((300, 60)) < 0.7).astype(float)
        covered = np.mean([e.low <= 0.7 <= e.high for e in (bootstrap(d, resamples=500) for d in draws)])
        # The percentile interval of 60 units falls a little short; three standard deviations of 300 trials are 0.04.
        assert 0.89 <= covered <= 0.99

    def test_stays_within_the_outcomes_and_keeps_samples_of_a_prompt_together(self):
        wins = np.array([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
        found = bootstrap(wins)
        assert 0 <= found.low <= found.mean == 0.875 <= found.high <= 1
        assert found == bootstrap(wins.mean(1))
        assert math.isnan(bootstrap(np.array([1.0])).low)


def test_models_are_as_before_after_an_exception(tiny_model):
    """Every part of them: what was frozen in evaluation mode within a model that trains stays so."""
    policy, reference = tiny_model().train(), tiny_model().eval()
    policy.transformer.h[0].eval()
    before = [m.training for model in (policy, reference) for m in model.modules()]
    with pytest.raises(IndexError):
        compare_policies(policy, reference, [Sample([10**6], [1], "", True)], 0)
    assert [m.training for model in (policy, reference) for m in model.modules()] == before
