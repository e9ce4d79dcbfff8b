"""Print the formats of data that are read (`sftmix data --formats`)."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence

from sftmix.data.columns import RESPONSES, SIDES
from sftmix.data.formats import FORMATS
from sftmix.runs.failures import OneMessage

OPTIONS = ("formats",)
WIDTH = 100


def main(words: Sequence[str]) -> None:
    """Run the command."""
    parser = OneMessage(prog="sftmix data", description="What is known about data.")
    parser.add_argument(
        "--formats",
        action="store_true",
        help="Print the formats that are read, each with its columns and an example",
    )
    arguments = parser.parse_args(words)
    if not arguments.formats:
        raise ValueError("formats: expected --formats, which prints the formats that are read")
    print(table())


def table() -> str:
    """Return the formats, each with its columns, an example and how it is read."""
    parts = []
    for one in FORMATS:
        lines = [one.columns(), json.dumps(one.example), one.says]
        parts.append("\n".join([one.name, *(_wrapped(line, "  ") for line in lines)]))
    sides = "\n".join(f"  {name:<10} {text}" for name, text in SIDES.items())
    response = _wrapped(f"RESPONSE is {' or '.join(RESPONSES)}.", "")
    others = f"Columns with other names: --columns NAME=COLUMN,... with NAME one of\n{sides}"
    return "\n\n".join([*parts, response, others])


def _wrapped(text: str, indent: str) -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent or "  ", break_on_hyphens=False
    )
