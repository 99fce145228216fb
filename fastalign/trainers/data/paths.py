"""What a source's text names: a file, several, those of a pattern or a folder, with their splits; or a hub's name."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping
from pathlib import Path

from .problems import note
from .read import endings, kind_of

_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in a file's name, or in the name of a folder around it, that say what split it belongs to."""

_SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}")
"""One part of a split that was written in several: its name is the split's."""

_ASIDE = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
_NO_DATA = (".md", ".py", ".yaml", ".yml", ".lock", "")


def expand(source: str) -> tuple[list[str], str | None] | None:
    """(files, split asked for) that a text names; None for what may be a folder or a hub's name.

    Args:
        source: a path, `path:split`, a pattern with * ? or [], or several of these with commas between. A path that
            exists is taken as it stands.

    Raises:
        ValueError: nothing there, an unknown kind of file, or several sources of which one is no file.
    """
    path = os.path.expanduser(source)
    if not os.path.exists(path) and "," in path:
        parts = [part.strip() for part in path.split(",") if part.strip()]
        found = [(part, expand(part)) for part in parts]
        for part, each in found:
            if each is None or each[1] is not None:
                raise ValueError(f"dataset of several sources must name files; got {part!r} among them")
        return [file for _, each in found if each for file in each[0]], None
    if not os.path.exists(path) and glob.has_magic(path):
        files = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
        if not files:
            raise ValueError(f"dataset must be a pattern that files match; none match {source!r}")
        for file in files:
            check_file(file)
        return files, None
    path, split = split_of(path)
    return None if not check_file(path) else ([path], split)


def split_of(path: str) -> tuple[str, str | None]:
    """(path, split) of `path:split`; a path that exists is taken whole."""
    head, colon, tail = path.rpartition(":")
    return (head, tail) if colon and tail.isidentifier() and not os.path.exists(path) else (path, None)


def check_file(path: str) -> bool:
    """Whether this is a file that can be read; False for a folder or what may be a hub's name. ValueError otherwise."""
    if os.path.isdir(path):
        return False
    ending, packed = kind_of(path)
    if ending:
        if not os.path.isfile(path):
            raise ValueError(f"dataset must be an existing file; there is no {path!r}")
        return True
    last = os.path.splitext(path)[1].lower()
    named = last and not last[1:].isdigit()  # a hub's names may end in versions: owner/pairs-v0.2
    if os.path.exists(path) or named or packed or path.startswith((".", "/")) or path.count("/") > 1:
        raise ValueError(f"dataset must be a folder, or a file ending in {endings()}; got {path!r}")
    return False


def folder_splits(folder: str) -> Mapping[str, list[str]]:
    """Split → files of a folder, and of the folders in it. Where no file names a split, all of them are train.

    Raises:
        ValueError: no file that can be read; or some of them name a split and others do not, which are listed.
    """
    files, other = [], []
    for path in sorted(Path(folder).rglob("*")):
        inside = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in inside.parts) or path.name in _ASIDE:
            continue
        if kind_of(path.name)[0]:
            files.append(inside)
        elif path.suffix.lower() not in _NO_DATA:
            other.append(str(inside))
    if not files:
        raise ValueError(f"dataset folder must hold files ending in {endings()}; {folder!r} has none")
    if other:
        note(f"dataset folder {folder!r}: not read, being of no known kind: {_some(other)}")
    splits: dict[str | None, list[str]] = {}
    for inside in files:
        splits.setdefault(_split_name(inside), []).append(str(inside))
    if None in splits and len(splits) > 1:
        loose = splits.pop(None)
        named = ", ".join(f"{_some(names)} {name}" for name, names in splits.items() if name)
        raise ValueError(
            f"dataset folder {folder!r} must have no file without a split where others name theirs ({named}); "
            f"{_some(loose)} name none, or several: rename them, or give the files themselves, "
            f"{os.path.join(folder, loose[0])!r}"
        )
    return {name or "train": [os.path.join(folder, n) for n in names] for name, names in splits.items()}


def _split_name(inside: Path) -> str | None:
    """The split that a file's name, or else that of the nearest folder around it, says; None if it says none or two."""
    shard = _SHARD.match(inside.name)
    if shard:
        return shard[1]
    for part in (kind_stem(inside.name), *reversed(inside.parent.parts)):
        words = set(re.split(r"[^a-z]+", part.lower()))
        found = [split for split, known in _WORDS.items() if words & set(known)]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def kind_stem(name: str) -> str:
    """A file's name without its endings."""
    stem, packed = os.path.splitext(name)[0], kind_of(name)[1]
    return os.path.splitext(stem)[0] if packed else stem


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
