"""Movie-review snippets with human ratings (Hutto and Gilbert 2014): 10,605 rows, each rated by about 15 people.

They come with the source distribution of vaderSentiment, in an archive inside the archive; nothing of it is copied
into this package.
"""

from __future__ import annotations

import ast
import io
import random
import tarfile
from pathlib import Path
from typing import NamedTuple

from .fetch import VADER, fetch

_INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
_RATED = "movieReviewSnippets_GroundTruth.txt"
_RATERS = "movieReviewSnippets_anonDataRatings.txt"
_SCORER = ("vaderSentiment.py", "vader_lexicon.txt", "emoji_utf8_lexicon.txt")


class Review(NamedTuple):
    """One snippet: its mean rating from -4 to +4, its text with white space made uniform, and every rater's rating."""

    rating: float
    text: str
    ratings: tuple[int, ...]


def load_reviews() -> list[Review]:
    """All unique snippets, in the corpus's order. FetchError if the corpus is not here and cannot be fetched."""
    with _open(fetch(VADER)) as outer:
        archive = io.BytesIO(_member(outer, _INNER))
    with tarfile.open(fileobj=archive, mode="r:gz") as inner:
        rated, raters = (_member(inner, name).decode("utf-8") for name in (_RATED, _RATERS))
    every = {}
    for line in raters.splitlines():
        number, _, _, ratings = line.split("\t")
        every[number] = tuple(ast.literal_eval(ratings))
    reviews: dict[str, Review] = {}
    for line in rated.splitlines():
        number, rating, text = line.split("\t")
        text = " ".join(text.replace("''", '"').split())
        reviews.setdefault(text, Review(float(rating), text, every.get(number, ())))
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
