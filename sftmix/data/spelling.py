"""Read names and values as they are meant: names with other capitals or blanks, values as text."""

from __future__ import annotations

import functools
import re


@functools.lru_cache(maxsize=4096)
def bare(name: str) -> str:
    """Return a name in small letters, without blanks, dashes and underscores."""
    return re.sub(r"[\s_-]+", "", name).lower()


@functools.lru_cache(maxsize=64)
def spellings(names: frozenset[str]) -> dict[str, str]:
    """Return each name by what all its spellings have in common, as `bare` returns it."""
    return {bare(name): name for name in names}


def unquoted(value: object) -> object:
    """Return the number, true or false that a text is, as cells of CSV are; else the value."""
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    if text in ("true", "false"):
        return text == "true"
    try:
        return float(text)
    except ValueError:
        return value
