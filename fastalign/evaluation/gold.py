"""The gold reward of controlled sentiment, fitted on human ratings, and an independent scorer to check it against.

Only the gold reward labels pairs. The rule-based scorer was made by other means (a lexicon), so a gain that it sees too
is not one that the policy found in the gold reward's blind spots.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline

from ..trainers.data.reviews import Review, scorer_files

Scorer = Callable[[Sequence[str]], np.ndarray]


class Fit(NamedTuple):
    """How well a scorer agrees with the mean human rating of held-out texts."""

    pearson: float
    sign_accuracy: float
    texts: int


def fit_gold(reviews: Sequence[Review]) -> Scorer:
    """TF-IDF of words and word pairs, then ridge regression on the mean human rating; scores are on its scale."""
    pipeline = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True), Ridge(alpha=1.0))
    pipeline.fit([r.text for r in reviews], np.array([r.rating for r in reviews]))
    return lambda texts: np.asarray(pipeline.predict(list(texts)))


def load_independent() -> Scorer:
    """Compound score, in [-1, 1], of the rule-based VADER (Hutto and Gilbert 2014)."""
    with tempfile.TemporaryDirectory() as folder:
        path = scorer_files(Path(folder))
        spec = importlib.util.spec_from_file_location("_fastalign_vader", path)
        if spec is None or spec.loader is None:
            raise ImportError(f"the scorer cannot be imported from {path}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        analyzer = module.SentimentIntensityAnalyzer()  # reads its lexicons here, so the folder may go
    return lambda texts: np.array([analyzer.polarity_scores(text)["compound"] for text in texts])


def agreement(scorer: Scorer, reviews: Sequence[Review]) -> Fit:
    """Pearson correlation and sign accuracy against the human ratings (texts rated exactly 0 have no sign)."""
    ratings = np.array([r.rating for r in reviews])
    scores = scorer([r.text for r in reviews])
    signed = ratings != 0
    right = np.sign(scores[signed]) == np.sign(ratings[signed])
    return Fit(float(np.corrcoef(scores, ratings)[0, 1]), float(right.mean()), len(ratings))
