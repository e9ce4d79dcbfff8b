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
    if isinstance(value, dict):
        return {name: redacted(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(one) for one in value]
    if not isinstance(value, str):
        return value
    text = IN_QUERY.sub(rf"\1{HIDDEN}", IN_URL.sub(HIDDEN, value))
    text = TOKENS.sub(HIDDEN, text)
    for name, secret in os.environ.items():
        if len(secret) >= SHORTEST and SECRET_NAMES.search(name):
            text = text.replace(secret, HIDDEN)
    return text
