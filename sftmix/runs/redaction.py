"""Keep secrets out of every file and off the screen: tokens, keys, passwords in URLs."""

from __future__ import annotations

import os
import re
from typing import Any

HIDDEN = "***"
# A URL's user:password@ or token@; secrets that a query names; tokens known by their form.
IN_URL = re.compile(r"(?<=://)[^/\s'\"@]+(?=@)")
IN_QUERY = re.compile(
    r"(?i)(?<=[?&;])((?:[\w.-]*(?:token|key|secret|password|signature|credential)|sig|pwd)=)"
    r"[^&\s'\"#]+"
)
TOKENS = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|glpat-)[A-Za-z0-9_-]{16,}")
# Environment variables that hold the keys of reporters and hubs.
SECRET_NAMES = re.compile(r"(?i)(?:token|api_?key|secret|password|access_?key)s?$")
SHORTEST = 8


def redacted(value: Any) -> Any:
    """Return a value (text, or lists and mappings of it) with its secrets replaced by `***`.

    >>> redacted("https://me:word@host/rows.jsonl?token=abc")
    'https://***@host/rows.jsonl?token=***'
    """
    return without(value, environment_secrets())


def without(value: Any, secrets: list[str]) -> Any:
    """Return a value with these secrets and those known by their form replaced."""
    if isinstance(value, dict):
        return {without(name, secrets): without(one, secrets) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [without(one, secrets) for one in value]
    if not isinstance(value, str):
        return value
    parts, end = [], 0
    for begin, behind in secrets_in(value, secrets):
        parts += [value[end:begin], HIDDEN]
        end = behind
    return "".join([*parts, value[end:]])


def environment_secrets() -> list[str]:
    """Return the values of environment variables that are named as secrets are."""
    named = ((name, value) for name, value in os.environ.items() if len(value) >= SHORTEST)
    return [value for name, value in named if SECRET_NAMES.search(name)]


def secrets_in(text: str, secrets: list[str] | None = None) -> list[tuple[int, int]]:
    """Return where each secret of a text begins and ends, in order.

    `secrets`: those that are known, by default those of the environment.
    """
    found = [match.span() for pattern in (IN_URL, TOKENS) for match in pattern.finditer(text)]
    found += [(match.end(1), match.end()) for match in IN_QUERY.finditer(text)]
    for secret in environment_secrets() if secrets is None else secrets:
        found += [match.span() for match in re.finditer(re.escape(secret), text)]
    apart: list[tuple[int, int]] = []
    for begin, end in sorted(found):
        if apart and begin < apart[-1][1]:
            apart[-1] = apart[-1][0], max(end, apart[-1][1])
        else:
            apart.append((begin, end))
    return apart
