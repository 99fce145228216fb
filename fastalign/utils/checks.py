"""Checks of single values that a command or a configuration is given."""

from __future__ import annotations


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_positive(name: str, value: float) -> None:
    """ValueError unless the number is above 0."""
    if not value > 0:
        raise ValueError(f"{name} must be above 0; got {value}")
