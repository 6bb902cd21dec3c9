"""The error of everything that reads weights."""

from __future__ import annotations


class WeightsError(ValueError):
    """Weights that cannot be found, read or used; the message says what was expected and what was got."""


def first_line(error: BaseException) -> str:
    """What `error` says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__
