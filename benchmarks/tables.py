"""Markdown that every report is made of: figures in words, tables, and blocks of documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .records import Record, Report, beside, is_ours, rate, ratio, times

# The text of a record's cell; the report has what stands beside the record.
Text = Callable[[Report, Record], str]
Column = tuple[str, Text]


def cell(text: object) -> str:
    """Return text that stays inside its cell and is no markup."""
    line = " ".join(str(text).split())
    return line.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table with the first ``left`` columns left-aligned, the others right."""
    rule = [*["---"] * left, *["---:"] * (len(head) - left)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rows)) + "\n"


def records_table(
    report: Report, records: Sequence[Record], columns: Sequence[Column], left: int = 1
) -> str:
    """Return a table with a line for each record."""
    rows = [[text(report, record) for _, text in columns] for record in records]
    return table([name for name, _ in columns], rows, left)


def number(value: float | None, form: str = ".2f") -> str:
    """Return a figure in words, a dash where it was not measured."""
    return "-" if value is None else format(value, form)


def digits(value: float | None) -> str:
    """Return a figure with at least three digits."""
    return number(value, ",.0f" if value is not None and value >= 100 else ".3g")


def mib(value: float | None) -> str:
    """Return bytes as MiB."""
    return digits(None if value is None else value / 2**20)


def duration(seconds: float | None) -> str:
    """Return seconds with three digits and a unit."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    value, unit = (seconds, "s") if seconds >= 1 else (1e3 * seconds, "ms")
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def who(_: Report, record: Record) -> str:
    """Return the provider's name, ours in bold."""
    name = cell(record["who"])
    return f"**{name}**" if is_ours(record) else name


def over(other: str, shared: Sequence[str], form: str = ".2f") -> Text:
    """Return a column's text: a record's time by that of another who shares these fields."""
    return lambda report, record: number(times(record, beside(report, record, other, shared)), form)


def per_second(amount: str, unit: float) -> Text:
    """Return a column's text: an amount a second."""
    return lambda _, record: digits(ratio(rate(record, amount), unit))


def field(name: str, form: str = ".2g") -> Text:
    """Return a column's text: a number of the record."""
    return lambda _, record: number(record.get(name), form)


def text_of(name: str) -> Text:
    """Return a column's text: a field of the record as it is."""
    return lambda _, record: cell(record.get(name, "-"))


def bytes_of(name: str) -> Text:
    """Return a column's text: bytes of the record as MiB."""
    return lambda _, record: mib(record.get(name))


def cpu_text(facts: Mapping[str, Any]) -> str:
    """Return the processor and its threads."""
    return f"{facts['cpu']} ({facts['cpu_capability']}), {facts['threads']} threads"


def replace_block(text: str, block: str, begin_mark: str, end_mark: str) -> str:
    """Return the text with ``block`` between the two lines of marks, which stay.

    Raises:
        ValueError: a mark is missing, there more than once, or the second comes first.
    """
    lines = text.splitlines()
    for mark in (begin_mark, end_mark):
        if lines.count(mark) != 1:
            raise ValueError(f"expected the line {mark!r} once, found it {lines.count(mark)} times")
    if (begin := lines.index(begin_mark)) > (end := lines.index(end_mark)):
        raise ValueError(f"expected the line {begin_mark!r} before {end_mark!r}")
    return "\n".join([*lines[: begin + 1], block.strip("\n"), *lines[end:]]) + "\n"


def show(block: str, document: Path | None, begin_mark: str, end_mark: str) -> None:
    """Print the block, or put it between the marks of a document.

    Raises:
        ValueError: the document has no place for it.
    """
    if document is None:
        print(block)
        return
    text = replace_block(document.read_text("utf-8"), block, begin_mark, end_mark)
    document.write_text(text, encoding="utf-8")
