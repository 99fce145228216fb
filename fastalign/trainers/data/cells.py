"""Single cells of rows, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .chat import check_messages, is_chat


def cell(row: Mapping[str, Any], column: str, index: int, *, may_be_empty: bool) -> Any:
    """A prompt or completion: checked text, or checked messages."""
    value = row[column]
    if is_chat(value):
        check_messages(value, f"column {column!r}, row {index} (from 0),")
        return value
    return text_of(row, column, index, may_be_empty=may_be_empty)


def text_of(row: Mapping[str, Any], column: str, index: int, *, may_be_empty: bool) -> str:
    """The text of one cell. ValueError naming column and row (from 0) if it is not text, or empty and may not be.

    An empty cell of a CSV file arrives as None and counts as empty text.
    """
    return checked_text(row[column], f"column {column!r}", index, may_be_empty=may_be_empty)


def checked_text(value: Any, where: str, index: int, *, may_be_empty: bool) -> str:
    """`text_of` for a value that was already taken from its row; `where` names its column."""
    text = "" if value is None else value
    if not isinstance(text, str):
        raise ValueError(f"{where} must hold text; row {index} (from 0) has a {type(text).__name__}")
    if not may_be_empty and not text.strip():
        raise ValueError(f"{where} must not be empty; it is in row {index} (from 0)")
    return text
