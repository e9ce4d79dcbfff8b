"""Print examples as the model reads them, and one summary of what was read.

On a terminal learnt tokens are in colour, one token green and the next cyan; where there are no
colours, learnt text stands between ⟦ and ⟧.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
from rich.cells import set_cell_size
from rich.console import Console
from rich.text import Text

from sftmix.conventions import IGNORE_INDEX
from sftmix.data.summary import Reading
from sftmix.recipe.first_batch import Pair, lam_of
from sftmix.runs.failures import escaped, printable
from sftmix.templates.view import Token, View

# A run of learnt or of other tokens shows so many at its beginning and end, and an example so many
# runs: its first and last ones fit a screen of 80 columns.
HEAD, TAIL = 80, 40
RUNS_SHOWN = 6
# A long word of one token (a line of dashes, say) shows so many characters on either side.
CHARACTERS = 40
NAMES_SHOWN = 20
PERCENTILES = (5, 50, 95)
MEETINGS = 4  # of a pair's mixed tokens
CELLS = 16  # columns for the text of a token
SUBJECT = 12  # columns of the names of a summary's lines

Kind = Literal["read", "learnt", "cut", "note"]
STYLES = {"learnt": ("green", "cyan"), "read": ("",), "cut": ("red",)}
LEGEND = {
    True: "Learnt tokens are green and cyan in turn, special tokens inverse, cut tokens red.",
    False: "⟦Learnt tokens⟧ stand in double brackets. ↵ is a line break that the model reads.",
}


class Run(NamedTuple):
    """Tokens of one kind that follow each other, or a note in place of such as are not shown."""

    kind: Kind
    tokens: Sequence[Token] = ()
    note: str = ""


def runs_of(view: View) -> list[Run]:
    """Return all tokens of an example: what is read, what is learnt, and what is cut off."""
    runs: list[Run] = []
    places = enumerate(view.tokens)
    for kind, group in itertools.groupby(places, lambda one: _kind(view, *one)):
        tokens = [token for _, token in group]
        if kind == "cut":
            runs.append(Run("note", note=_cut_off(view, tokens)))
        runs.append(Run(kind, tokens))
    return runs


def _kind(view: View, place: int, token: Token) -> Kind:
    if place >= view.kept:
        return "cut"
    return "learnt" if token.learnt else "read"


def _cut_off(view: View, tokens: Sequence[Token]) -> str:
    more = "more than " if view.more else ""
    learnt = sum(token.learnt for token in tokens)
    return (
        f"✂ --max_length {view.kept} cuts off {more}{len(tokens):,} tokens, {learnt:,} to learn ✂"
    )


def elided(runs: Sequence[Run]) -> Iterator[Run]:
    """Yield the runs without the midst of long ones and of many, each with a note of how much."""
    if len(runs) > 2 * RUNS_SHOWN + 1:
        left = list(itertools.chain(*(run.tokens for run in runs[RUNS_SHOWN:-RUNS_SHOWN])))
        learnt = sum(token.learnt for token in left)
        note = f"… {len(left):,} tokens, {learnt:,} of them learnt …"
        runs = [*runs[:RUNS_SHOWN], Run("note", note=note), *runs[-RUNS_SHOWN:]]
    for run in runs:
        left_out = len(run.tokens) - HEAD - TAIL
        if left_out <= 1:
            yield run
            continue
        yield Run(run.kind, run.tokens[:HEAD])
        yield Run("note", note=f"… {left_out:,} tokens …")
        yield Run(run.kind, run.tokens[-TAIL:])


def shown(text: str, limit: int | None = CHARACTERS) -> str:
    """Return a token's text with its line breaks and control characters visible."""
    if limit is not None and len(text) > 2 * limit + 1:
        text = f"{text[:limit]}…{text[-limit:]}"
    return escaped(text).replace("\t", "⇥   ").replace("\n", "↵\n")


def title(view: View) -> str:
    """Return a line with the example's number, its place, and its counts."""
    share = view.learnt / view.kept
    cut = f", {len(view.tokens) - view.kept:,} cut off" if view.kept < len(view.tokens) else ""
    more = " at least" if cut and view.more else ""
    return (
        f"Example {view.example.id}, {printable(view.example.source)}: {view.kept:,} tokens, "
        f"{view.learnt:,} learnt ({share:.0%}){cut}{more}"
    )


class Screen:
    """Print to the terminal, or to a file in 80 columns without colours."""

    def __init__(self) -> None:
        self.console = Console(
            file=sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=True
        )
        self.coloured = self.console.color_system is not None and not self.console.no_color

    @property
    def legend(self) -> str:
        """A line that says how tokens are shown."""
        return LEGEND[self.coloured]

    def line(self, text: str, style: str = "") -> None:
        """Print a line; the terminal wraps it."""
        self.console.print(Text(text, style if self.coloured else ""))

    def heading(self, text: str) -> None:
        """Print a heading after an empty line."""
        self.line("")
        self.line(text, "bold")

    def block(self, text: Text, indent: str = "  ") -> None:
        """Print a text in lines of the terminal's width, indented."""
        for line in text.wrap(self.console, max(self.console.width - len(indent), 20)):
            shown_line = Text(indent) + line
            shown_line.rstrip()
            self.console.print(shown_line)

    def example(self, view: View) -> None:
        """Print an example."""
        self.heading(title(view))
        text = Text()
        for run in elided(runs_of(view)):
            self._add(text, run)
        text.rstrip()  # the last line ends with a mark of its break
        self.block(text)

    def summary(self, name: str, lines: Sequence[tuple[str, str]]) -> None:
        """Print what was read under an option."""
        self.heading(f"Summary of --{name}")
        for subject, text in lines:
            # A file's lines stay whole, for tools that search it.
            width = self.console.width - SUBJECT - 2
            whole = not self.console.is_terminal or width < SUBJECT
            parts = (
                [text] if whole else [str(part) for part in Text(text).wrap(self.console, width)]
            )
            for name, part in zip([subject, *[""] * len(parts)], parts, strict=False):
                self.line(f"  {name:<{SUBJECT}}{part}".rstrip())

    def pairs(
        self, note: str, pairs: Sequence[Pair], place: Callable[[int], str], number: int
    ) -> None:
        """Print a note and a batch's pairs, the first `number` with some of their meetings.

        `place` returns the address and half of an example by its row.
        """
        self.heading("Pairs of the first batch")
        self.block(Text(note))
        for n, pair in enumerate(pairs):
            one, other = map(place, pair.examples)
            mixed = len(pair.meetings)
            self.line(
                f"  {lam_of(pair)}: {one}, {pair.lengths[0]:,} tokens to learn\n"
                f"    with {other}, {pair.lengths[1]:,}; {mixed:,} of each are mixed"
            )
            for rows, texts in pair.meetings[: MEETINGS if n < number else 0]:
                first, second = (
                    f"row {row:<6}{set_cell_size(shown(repr(text)), CELLS)}"
                    for row, text in zip(rows, texts, strict=True)
                )
                self.line(f"      {first}  with  {second}".rstrip())

    def _add(self, text: Text, run: Run) -> None:
        if run.kind == "note":
            text.append("" if text.plain.endswith("\n") else "\n")
            text.append(f"{run.note}\n", "dim" if self.coloured else "")
        elif self.coloured:
            for token, style in zip(run.tokens, itertools.cycle(STYLES[run.kind]), strict=False):
                text.append(shown(token.text), f"{style} {'reverse' * token.special}".strip())
        else:
            plain = "".join(shown(one.text) for one in run.tokens)
            text.append(f"⟦{plain}⟧" if run.kind == "learnt" else plain)


@dataclass(frozen=True)
class Lengths:
    """The tokens of examples after the cut at `max_length`."""

    tokens: int
    learnt: int
    percentiles: tuple[int, ...]  # of the tokens of an example, at `PERCENTILES`
    longest: int

    @classmethod
    def of(cls, dataset: datasets.Dataset) -> Lengths:
        """Count the tokens of a data set, and the labels that are learnt: not the first token's."""
        lengths, learnt = [], 0
        for table in dataset.with_format("arrow").iter(batch_size=4096):
            column = table["labels"].combine_chunks()
            counts = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
            labels = column.flatten().to_numpy(zero_copy_only=False)
            first = labels[np.cumsum(counts) - counts]
            learnt += int((labels != IGNORE_INDEX).sum() - (first != IGNORE_INDEX).sum())
            lengths.append(counts)
        found = np.concatenate(lengths)
        at = np.percentile(found, PERCENTILES, method="inverted_cdf").astype(int).tolist()
        return cls(int(found.sum()), learnt, tuple(at), int(found.max()))

    def numbers(self) -> dict[str, Any]:
        """Return the counts by name."""
        at = {
            f"p{share}": number for share, number in zip(PERCENTILES, self.percentiles, strict=True)
        }
        return {"all": self.tokens, "learnt": self.learnt, **at, "longest": self.longest}


def numbers_of(reading: Reading, lengths: Lengths) -> dict[str, Any]:
    """Return what `summary` says as plain JSON, for the manifest."""
    return {**reading.numbers(), "cut": reading.cut, "tokens": lengths.numbers()}


def summary(
    reading: Reading, examples: int, lengths: Lengths, max_length: int
) -> list[tuple[str, str]]:
    """Return what was read in lines, each with its subject.

    What did not happen (nothing was refused, say) has no line.
    """
    lines = [("read", f"{reading.rows.total():,} rows: {_named(reading.rows.items())}")]
    if reading.mixture:
        lines.append(("mixture", printable(reading.mixture.removeprefix("mixture of "))))
    if reading.weights:
        lines.append(("weights", printable(reading.weights)))
    if reading.refused:
        kinds = reading.top_reasons()
        count = sum(one.count for one in reading.refused.values())
        lines.append(("refused", f"{count:,} rows, which are left out"))
        lines += [("", f"{one.count:,} like {printable(one.first)}") for one in kinds]
        others = len(reading.refused) - len(kinds)
        rest = count - sum(one.count for one in kinds)
        lines += [("", f"{rest:,} for {others} other reasons")] if others else []
    if reading.forgiven:
        lines.append(("forgiven", _named(reading.forgiven.most_common())))
    if found := reading.duplicates_line():
        lines.append(("duplicates", printable(found)))
    if reading.unused:
        lines.append(("not used", _named(reading.unused.most_common())))
    at = [
        f"{share} %: {number:,}"
        for share, number in zip(PERCENTILES, lengths.percentiles, strict=True)
    ]
    lines.append(
        (
            "tokens",
            f"{lengths.tokens:,} in {examples:,} examples; {', '.join(at)}; longest: "
            f"{lengths.longest:,}",
        )
    )
    if reading.cut:
        share = f"{reading.cut:,} of {reading.kept:,} examples ({reading.cut / reading.kept:.1%})"
        lines.append(("cut", f"{share} lose their end at --max_length {max_length}"))
    lines.append(("learnt", f"{lengths.learnt:,} tokens ({lengths.learnt / lengths.tokens:.1%})"))
    return lines


def _named(counts: Iterable[tuple[str, int]]) -> str:
    """Return names with their counts, the first of them."""
    named = [f"{name!r} {count:,}" for name, count in counts]
    left = len(named) - NAMES_SHOWN
    return printable(", ".join([*named[:NAMES_SHOWN], *[f"and {left} more"] * (left > 0)]))
