"""Say what a row of data is, with its place, and decide what happens to bad ones."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from sftmix.runs.failures import printable

logger = logging.getLogger(__name__)

OnBadRow = Literal["error", "skip", "mend"]

REASONS_SHOWN = 5


class BadRowError(ValueError):
    """A row that nothing can be learnt from: its `file`, `line` (from 1) and the `reason`."""

    def __init__(self, file: str, line: int, reason: str) -> None:
        super().__init__(file, line, reason)
        self.file = file
        self.line = line
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class BadRows:
    """Raise at the first bad row ("error"), or count bad rows and report them once.

    "mend" does so with those that cannot be mended.

    `refuse` takes the error of each bad row that is left out.

    Raises:
        ValueError: `on_bad_row` is neither "error", "skip" nor "mend".
    """

    def __init__(
        self, on_bad_row: OnBadRow, refuse: Callable[[BadRowError], None] | None = None
    ) -> None:
        if on_bad_row not in ("error", "skip", "mend"):
            raise ValueError(f"on_bad_row: expected 'error', 'skip' or 'mend', got {on_bad_row!r}")
        self.on_bad_row, self.refuse = on_bad_row, refuse
        self.count = 0
        self.reasons: list[str] = []

    def add(self, error: BadRowError) -> None:
        """Count a bad row, or raise it with the way out if bad rows are errors."""
        if self.on_bad_row == "error":
            reason = f"{error.reason} (--on_bad_row skip leaves such rows out)"
            raise BadRowError(error.file, error.line, reason) from error
        if self.refuse is not None:
            self.refuse(error)
        self.count += 1
        if len(self.reasons) < REASONS_SHOWN:
            self.reasons.append(str(error))

    def report(self, total: int) -> None:
        """Log one warning: how many of `total` rows were left out, and the first reasons."""
        if not self.count:
            return
        reasons = list(self.reasons)
        if self.count > len(reasons):
            reasons.append(f"and {self.count - len(reasons)} more")
        logger.warning(
            "left out %d of %d rows as bad:\n  %s",
            self.count,
            total,
            printable("\n".join(reasons)),
        )


class Row(NamedTuple):
    """One row as read: its line, and its value or what made it unreadable."""

    line: int
    value: Any = None
    problem: str | None = None


def not_utf8(error: UnicodeDecodeError) -> str:
    """Return why bytes are no UTF-8, and the way out."""
    return (
        f"not valid UTF-8: byte 0x{error.object[error.start]:02x} ({error.reason}); "
        "--encoding reads other encodings (latin-1, cp1252, utf-16)"
    )
