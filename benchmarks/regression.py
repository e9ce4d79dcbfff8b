"""Hold a run's ratios beside those of a baseline, to see what became slower.

Seconds differ from machine to machine, and on a shared one from hour to hour; the ratio of two
providers that took turns in one run depends on both much less. Nothing here fails: it prints, and a
reader judges.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from typing import NamedTuple

from . import records as names
from .records import Record, Report, beside, find

# How much larger than the baseline's a ratio must be, besides lying outside of both intervals.
MARGIN = 1.25
AS_BEFORE, SLOWER, FASTER, NEW, GONE = "as before", "slower", "faster", "new", "gone"

# Facts of the machine: where one of these differs, ratios may differ without a change of the code.
PLACES = ("gpu", "cpu", "cpu_capability", "threads", "torch", "triton")

# Measure; whose time (None: all of ours); by whose; what both share; what else names the ratio.
# `BARE` is of the task NTP, whatever the task beside it.
RULES: tuple[tuple[str, str | None, str, tuple[str, ...], tuple[str, ...]], ...] = (
    (names.STEP, None, names.BARE, ("case",), ("task",)),
    (names.STEP, None, names.DENSE, ("case", "task"), ()),
    (names.FORWARD, None, names.BARE, ("case",), ("task",)),
    (names.OBJECTIVE, None, names.OUR_OBJECTIVES[names.NTP], ("case",), ()),
    (names.OBJECTIVE, names.OUR_OBJECTIVES[names.DFT], names.DENSE_DFT, ("case",), ()),
    (names.WATCHING, names.OUR_NTP, names.UNWATCHED, names.STEP_SIZE, ()),
    ("row kernel", None, names.COPY, names.LOGITS_SIZE, ()),
    ("perplexity", names.STREAMING, names.BARE_CHUNKS, ("case",), ()),
    ("perplexity", names.STREAMING, names.DENSE_PERPLEXITY, ("case",), ()),
    ("fold", None, names.FOLD_OPERATIONS, names.FOLD_SIZE, ()),
    ("fold", None, names.COPY, names.COPY_SIZE, ("kind",)),
    ("scoring", names.SCORE, names.SCORE_FORWARD, ("data", "case"), ()),
    ("scoring", names.SCORE, names.SCORE_LOOP, ("data", "case"), ()),
    ("step", names.OUR_SFTMIX, names.OUR_NTP, names.STEP_SIZE, ()),
    ("step", names.OUR_NTP, names.THEIR_NTP, names.STEP_SIZE, ()),
)


class Interval(NamedTuple):
    """A ratio of times: the median of rounds and its quartiles, or what those of both allow."""

    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.middle:.3f}"
        return f"{self.middle:.3f} ({self.low:.3f}-{self.high:.3f})"


class Line(NamedTuple):
    """One ratio of two runs; None where a run does not have it."""

    says: str
    now: Interval | None
    before: Interval | None

    @property
    def verdict(self) -> str:
        """Return slower or faster only where both the quartiles and `MARGIN` say so."""
        if self.before is None:
            return NEW
        if self.now is None:
            return GONE
        if self.now.low > self.before.high and self.now.middle > MARGIN * self.before.middle:
            return SLOWER
        if self.now.high < self.before.low and MARGIN * self.now.middle < self.before.middle:
            return FASTER
        return AS_BEFORE


def interval(one: Record, other: Record) -> Interval:
    """Return the ratio of two records' times, round by round if kept; NaN where a time is 0."""
    by_rounds = names.quotients(one, other)
    if len(by_rounds) > 1:
        return Interval(*statistics.quantiles(by_rounds, n=4, method="inclusive"))
    ends = (("q1", "q3"), ("median", "median"), ("q3", "q1"))
    return Interval(*(one[a] / other[b] if other[b] else math.nan for a, b in ends))


def ratios(report: Report) -> dict[str, Interval]:
    """Return ours by what stands beside it in the same run, without what is not a number.

    They are all ratios of `RULES` whose two records are there, and peak memory by the formula. That
    has no quartiles; "slower" then says that it takes more.
    """
    found = {
        f"memory, {name}: peak / formula": Interval(value, value, value)
        for name, value in names.over_formula(report).items()
    }
    for measure, who, reference, shared, named in RULES:
        for record in find(report, measure):
            chosen = names.is_ours(record) if who is None else record["who"] == who
            other = beside(report, record, reference, shared)
            if chosen and other is not None and record["who"] != reference:
                where = ", ".join(str(record.get(name, "-")) for name in (*shared, *named))
                says = f"{measure}, {where}: {record['who']} / {reference}"
                found[says] = interval(record, other)
    return {says: value for says, value in found.items() if all(map(math.isfinite, value))}


def compare(run: Report, baseline: Report) -> list[Line]:
    """Return every ratio of either run, in the order of the run, then those that are gone.

    Raises:
        ValueError: the reports are of different suites or devices, or only one of them is quick.
    """
    kinds = [
        (report["suite"], report["settings"]["device"], report["settings"]["quick"])
        for report in (run, baseline)
    ]
    if kinds[0] != kinds[1]:
        raise ValueError(
            "expected two reports of the same (suite, device, quick), "
            f"got {kinds[0]} and the baseline's {kinds[1]}"
        )
    now, before = ratios(run), ratios(baseline)
    return [Line(says, now.get(says), before.get(says)) for says in {**now, **before}]


def print_comparison(run: Report, baseline: Report) -> None:
    """Print what differs between the machines, and what `compare` gives."""
    now, before = run["facts"], baseline["facts"]
    for name in PLACES:
        if before.get(name) != now.get(name):
            was, found = before.get(name, "-"), now.get(name, "-")
            print(f"  note: {name}: {was} in the baseline, {found} now")
    lines = compare(run, baseline)
    for line in lines:
        pair = ("-" if value is None else str(value) for value in (line.now, line.before))
        print("  {:9}  {:>24}  before {:>24}  {}".format(line.verdict, *pair, line.says))
    counts = Counter(line.verdict for line in lines)
    words = (AS_BEFORE, SLOWER, FASTER, NEW, GONE)
    print("  " + ", ".join(f"{counts[word]} {word}" for word in words))
