"""Rows whose cells are of several kinds, as datasets that give them back as they were.

datasets stores such cells as JSON, and takes a text that could be JSON for JSON: beside a list, the text "007" would
come back as the number 7, and a reply that is JSON as the mapping that it describes.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
from datasets import Dataset

_JSON = getattr(datasets, "Json", None)
_MIXED: dict[str, Any] = (
    {"on_mixed_types": "use_json"} if "on_mixed_types" in inspect.signature(Dataset.from_list).parameters else {}
)
"""Keeps structs of different keys apart, where the installed datasets can; else keys that a row lacks become None."""


def from_rows(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """A dataset of these, with the columns of all of them: one that a row lacks is None there."""
    names = dict.fromkeys(name for row in rows for name in row)
    whole = [{name: row.get(name) for name in names} for row in rows]
    found = Dataset.from_list(whole, **_MIXED)
    if not has_json(found.features):
        return found
    return Dataset.from_list([_written_out(row, found.features) for row in whole], features=found.features)


def has_json(feature: Any) -> bool:
    """Whether cells, or something inside them, are stored as JSON."""
    if isinstance(feature, Mapping):
        return any(map(has_json, feature.values()))
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return (_JSON is not None and isinstance(feature, _JSON)) or (inner is not None and has_json(inner))


def _written_out(value: Any, feature: Any) -> Any:
    """The value with JSON written out where it is stored as such."""
    if value is None or not has_json(feature):
        return value
    if isinstance(feature, Mapping):
        return {name: _written_out(value.get(name), inner) for name, inner in feature.items()}
    if _JSON is not None and isinstance(feature, _JSON):
        return json.dumps(value)
    inner = feature[0] if isinstance(feature, list) else feature.feature
    return [_written_out(each, inner) for each in value]
