"""Movie-review snippets with human ratings (Hutto and Gilbert 2014): 10,605 rows, each rated by about 15 people.

Other domains of the same corpus, rated the same way: sentences of Amazon reviews, tweets, and sentences of news
editorials. All come with the source distribution of vaderSentiment, in an archive inside the archive; nothing of it is
copied into this package.
"""

from __future__ import annotations

import ast
import io
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...utils.checks import check_choice
from .fetch import VADER, fetch

_INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
_RATED, _RATERS = "{}_GroundTruth.txt", "{}_anonDataRatings.txt"
_SCORER = ("vaderSentiment.py", "vader_lexicon.txt", "emoji_utf8_lexicon.txt")


DOMAINS = {
    "movies": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "tweets": "tweets",
    "news": "nytEditorialSnippets",
}
"""Domain → how the corpus names its files."""

_BATCH = 30


class Review(NamedTuple):
    """One snippet: its mean rating from -4 to +4, its text with white space made uniform, and every rater's rating.

    The corpus names no raters, but its movie reviews were rated in batches of 30 snippets, each by people of its own,
    whose ratings stand in one order: place j of every snippet of a batch is one person. (The places' mean deviations
    from the snippets' means vary nine times as much as they do with each snippet's ratings shuffled.) Of the other
    domains no such order is known; their `batch` is None.
    """

    rating: float
    text: str
    ratings: tuple[int, ...]
    batch: int | None = 0

    def labelers(self) -> list[tuple[str, int]]:
        """(rater, rating) of everyone who rated it. ValueError where it is not known who they are."""
        if self.batch is None:
            raise ValueError("domain must be movies: of the other domains it is not known who gave which rating")
        return [(f"{self.batch}-{place}", rating) for place, rating in enumerate(self.ratings)]


def load_reviews(domain: str = "movies") -> list[Review]:
    """All unique texts of a domain, in the corpus's order. FetchError if the corpus cannot be found or fetched."""
    check_choice("domain", domain, tuple(DOMAINS))
    names = [name.format(DOMAINS[domain]) for name in (_RATED, _RATERS)]
    with _open(fetch(VADER)) as outer:
        archive = io.BytesIO(_member(outer, _INNER))
    with tarfile.open(fileobj=archive, mode="r:gz") as inner:
        rated, raters = (_member(inner, name).decode("utf-8-sig") for name in names)
    every = {}
    for line in raters.splitlines():
        number, _, _, ratings = line.split("\t")
        every[number] = tuple(ast.literal_eval(ratings))
    reviews: dict[str, Review] = {}
    for line in rated.splitlines():
        number, rating, text = line.split("\t")
        text = " ".join(text.replace("''", '"').split())
        batch = (int(number) - 1) // _BATCH if domain == "movies" else None
        reviews.setdefault(text, Review(float(rating), text, every.get(number, ()), batch))
    return list(reviews.values())


def split_reviews(reviews: list[Review], held_out: int, seed: int) -> tuple[list[Review], list[Review]]:
    """(train, held-out) in a random order fixed by the seed."""
    order = random.Random(seed).sample(range(len(reviews)), len(reviews))
    shuffled = [reviews[i] for i in order]
    return shuffled[held_out:], shuffled[:held_out]


def opening(text: str, words: int) -> str:
    """The first words of a text."""
    return " ".join(text.split(" ")[:words])


def scorer_files(folder: Path) -> Path:
    """Unpacks the rule-based scorer of the same distribution into the folder; returns the path of its module."""
    folder.mkdir(parents=True, exist_ok=True)
    with _open(fetch(VADER)) as outer:
        for name in _SCORER:
            (folder / name).write_bytes(_member(outer, f"vaderSentiment/{name}"))
    return folder / _SCORER[0]


def _open(path: Path) -> tarfile.TarFile:
    return tarfile.open(path, mode="r:gz")


def _member(archive: tarfile.TarFile, ending: str) -> bytes:
    """Content of the member whose path ends so. Members are read, never unpacked to paths of the archive's choosing."""
    for member in archive:
        if member.name.endswith("/" + ending) and member.isfile():
            file = archive.extractfile(member)
            if file is not None:
                return file.read()
    raise ValueError(f"the archive has no file {ending!r}")


# ------------------------------------------------------------------------------------------------- rows for trainers
def ranked_reviews(reviews: Sequence[Review], size: int, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` ranked lists of `size` whole reviews, with their mean ratings as rewards.

    Reviews are dealt out until all were used, then shuffled and dealt out again: no comparison comes twice by design.
    """
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        dealt = draw.sample(list(reviews), len(reviews))
        rows += [_ranked(dealt[i : i + size]) for i in range(0, len(dealt) - size + 1, size)]
    return rows[:count]


def review_pairs(reviews: Sequence[Review], count: int, seed: int) -> list[dict[str, Any]]:
    """`count` pairs of different mean rating, drawn at random."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        one, other = draw.sample(list(reviews), 2)
        if one.rating > other.rating:
            rows.append({"prompt": "", "chosen": one.text, "rejected": other.text})
    return rows


def labeler_lists(reviews: Sequence[Review], size: int, seed: int) -> list[dict[str, Any]]:
    """One list of at most `size` reviews for every rater, with that rater's own ratings as rewards.

    Raters whose reviews here are fewer than two, or all rated alike, are left out.
    """
    draw = random.Random(seed)
    rated: dict[str, list[tuple[str, int]]] = {}
    for review in reviews:
        for name, rating in review.labelers():
            rated.setdefault(name, []).append((review.text, rating))
    rows = []
    for name, entries in rated.items():
        chosen = draw.sample(entries, min(size, len(entries)))
        if len({rating for _, rating in chosen}) > 1:
            texts, ratings = zip(*chosen, strict=True)
            rows.append(
                {"prompt": "", "completions": list(texts), "rewards": [float(r) for r in ratings], "labeler": name}
            )
    return rows


def _ranked(reviews: Sequence[Review]) -> dict[str, Any]:
    return {"prompt": "", "completions": [r.text for r in reviews], "rewards": [r.rating for r in reviews]}
