"""Count what reading data found: rows by file, refused rows by reason, duplicates, unused columns.

Reasons that differ only in numbers and in values are one kind of reason:

>>> kind_of("'messages[3].role' must be one of system, user, got 'usr'")
"'messages[N].role' must be one of system, user, got '...'"
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sftmix.data.formats import Form
from sftmix.data.rows import BadRowError, Row

_QUOTED = re.compile(r"(?<!\w)'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")
_NUMBER = re.compile(r"0x[0-9a-f]+|-?\d[\d,._]*(?:e[+-]?\d+)?")


@dataclass
class Refused:
    """The refused rows of one kind of reason: how many, and the first with its address."""

    count: int
    first: str  # "file:line: reason"


@dataclass
class Reading:
    """What was found while data were read. `rows` counts refused rows, too."""

    rows: Counter[str] = field(default_factory=Counter)  # by file, in the order of reading
    refused: dict[str, Refused] = field(default_factory=dict)  # by `kind_of` the reason
    forgiven: Counter[str] = field(default_factory=Counter)  # by what was mended
    unused: Counter[str] = field(default_factory=Counter)  # rows by column or field
    duplicates: int = 0  # examples whose content an earlier one has
    first_duplicate: tuple[str, str] | None = None  # it, and the earlier one
    kept: int = 0  # examples that were tokenised, none of them copied
    cut: int = 0  # examples of these longer than `max_length`, which lose their end
    mixture: str = ""  # how often each source's examples come, where `--weights` says so
    weights: str = ""  # what the examples of a column of weights weigh
    # Of each file that was read: its name, what reads its rows again, and their format.
    files: list[tuple[str, Callable[[], Iterator[Row]], Form]] = field(default_factory=list)
    # Of each file or name of the data: its first id, and the one after its last.
    sources: list[tuple[str, int, int]] = field(default_factory=list)

    def refuse(self, error: BadRowError) -> None:
        """Count a refused row under its kind of reason."""
        kind = kind_of(error.reason)
        if kind in self.refused:
            self.refused[kind].count += 1
        else:
            self.refused[kind] = Refused(1, str(error))

    def add(self, part: Reading) -> None:
        """Add what was found in a file."""
        for mine, its in (
            (self.rows, part.rows),
            (self.forgiven, part.forgiven),
            (self.unused, part.unused),
        ):
            mine.update(its)
        for kind, refused in part.refused.items():
            if kind in self.refused:
                self.refused[kind].count += refused.count
            else:
                self.refused[kind] = refused

    def duplicates_line(self) -> str | None:
        """Return one line that counts and names exact duplicates, which stay; None without any."""
        if self.first_duplicate is None:
            return None
        later, earlier = self.first_duplicate
        return (
            f"{self.duplicates:,} of {self.rows.total():,} rows have the content of an earlier "
            f"one, and are learnt again: the first is {later}, with that of {earlier}"
        )

    def top_reasons(self, number: int = 5) -> list[Refused]:
        """Return the most frequent kinds of refused rows; of equal ones the earlier comes first."""
        return sorted(self.refused.values(), key=lambda one: -one.count)[:number]

    def numbers(self) -> dict[str, Any]:
        """Return the counts as plain JSON, without any text of the rows' values."""
        return {
            "rows": dict(self.rows),
            "refused": sum(one.count for one in self.refused.values()),
            "forgiven": dict(self.forgiven),
            "unused": dict(self.unused),
            "duplicates": self.duplicates,
        }


def kind_of(reason: str) -> str:
    """Return the reason with "N" for its numbers and '...' for its values.

    The first text in quotes is the name of a column or field if the reason begins with it, and
    stays; all others are taken as values.
    """

    def shown(match: re.Match[str]) -> str:
        return match[0] if match.start() == 0 else "'...'"

    return _NUMBER.sub("N", _QUOTED.sub(shown, reason))
