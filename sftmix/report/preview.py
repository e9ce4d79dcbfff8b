"""Write what `sftmix preview` shows as a page: whole examples, the summary, and the pairs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from markupsafe import Markup

from sftmix.recipe.first_batch import Pair, lam_of
from sftmix.recipe.preview import Run, runs_of, shown, title
from sftmix.report.page import Page, Section, Table
from sftmix.templates.view import Token, View

LEGEND = (
    "Learnt tokens are green and underlined, special tokens are framed, and tokens that "
    "--max_length cuts off are struck through. ↵ is a line break that the model reads. The number "
    "of a token appears under the pointer."
)
MEETINGS = 200  # of a pair on the page


def page(
    name: str,
    views: Sequence[View],
    notes: Sequence[str],
    lines: Sequence[tuple[str, str]],
    note: str,
    pairs: Sequence[Pair],
    place: Callable[[int], str],
) -> Page:
    """Return the page.

    Args:
        name: of the data, for the title.
        views: the examples.
        notes: each example's weight and what of its row is not used, as text; it may be empty.
        lines: the summary.
        note: a sentence about the pairs, or why there are none.
        pairs: those of the first batch.
        place: returns the address and half of an example by its row.
    """
    examples = [
        Section(title(one), [text] if text else [], blocks=[block(one)])
        for one, text in zip(views, notes, strict=True)
    ]
    read = Section("What was read", tables=[Table(("what", "found"), lines, title="Summary")])
    mixed = Section(
        "Pairs of the first batch", [note], folded=[_table(one, place) for one in pairs]
    )
    return Page(f"Preview of {name}", [LEGEND], [*examples, read, mixed])


def block(view: View) -> Markup:
    """Return all tokens of an example, each in an element of its own; their text is escaped."""
    runs = Markup("").join(itertools.chain.from_iterable(map(_run, runs_of(view))))
    return Markup('<div class="tokens">{}</div>').format(runs)


def _run(run: Run) -> list[Markup]:
    if run.kind == "note":
        return [Markup('<span class="note">{}</span>').format(run.note)]
    return [_token(run.kind, number, token) for number, token in enumerate(run.tokens)]


def _token(kind: str, number: int, token: Token) -> Markup:
    names = [kind, *["odd"] * (number % 2), *["special"] * token.special]
    text = shown(token.text, limit=None)
    return Markup('<span class="{}" title="{}">{}</span>').format(" ".join(names), token.id, text)


def _table(pair: Pair, place: Callable[[int], str]) -> Table:
    one, other = map(place, pair.examples)
    rows = [
        (
            str(number),
            *(f"row {row}: {shown(repr(text))}" for row, text in zip(*meeting, strict=True)),
        )
        for number, meeting in enumerate(pair.meetings[:MEETINGS], start=1)
    ]
    left = len(pair.meetings) - len(rows)
    return Table(
        ("n", one, other),
        rows,
        title=f"{lam_of(pair)}: {one} with {other}",
        notes=[f"and {left:,} tokens more"] if left else [],
    )
