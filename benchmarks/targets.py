"""What was promised of each suite, beside what a run found.

A figure that is not there is neither reached nor missed, and of a quick run, whose sizes are too
small, none is judged. A figure that is not a number counts as missed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from .records import (
    BARE,
    BARE_CHUNKS,
    BOTH,
    DENSE,
    DENSE_PERPLEXITY,
    FILTERED,
    FOLD,
    FOLD_OPERATIONS,
    FOLD_SIZE,
    FORWARD,
    IN_HBM,
    IN_L2,
    NTP,
    OUR_NTP,
    OUR_SFTMIX,
    PAIR_ROWS,
    ROW_CHUNKS,
    SCORE,
    SCORE_FORWARD,
    SCORE_LOOP,
    STEP,
    STEP_SIZE,
    STREAMING,
    THEIR_NTP,
    TORCH,
    VOCAB_TILES,
    Record,
    Report,
    copy_beside,
    figure,
    find,
    first,
    headline,
    over_formula,
    rate,
    ratio,
    same,
)

TOO_SMALL = "sizes too small"
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Target(NamedTuple):
    """One promise; ``reached`` is None where a figure is missing or must not be judged."""

    says: str
    value: float | None
    limit: float
    reached: bool | None
    note: str = ""

    @property
    def verdict(self) -> str:
        """Return the verdict in words."""
        if self.reached is None:
            return "not measured" if self.value is None else "not judged"
        return "reached" if self.reached else "MISSED"


def at_most(says: str, value: float | None, limit: float, note: str = "") -> Target:
    """Return a promise that a value is no more than its limit."""
    return Target(says, value, limit, None if value is None else value <= limit, note)


def at_least(says: str, value: float | None, limit: float, note: str = "") -> Target:
    """Return a promise that a value is no less than its limit."""
    return Target(says, value, limit, None if value is None else value >= limit, note)


def worst_at_most(says: str, found: Mapping[str, float], limit: float) -> Target:
    """Return a promise about the largest of some values, with its name; NaN is worse than any."""
    name = max(found, key=lambda one: (math.isnan(found[one]), found[one]), default=None)
    return at_most(says, None if name is None else found[name], limit, name or "")


def not_judged(found: Iterable[Target], quick: bool) -> list[Target]:
    """Return the promises, without verdicts where the run was quick."""
    return [one._replace(reached=None, note=TOO_SMALL) if quick else one for one in found]


Found = Callable[[Report], tuple[float | None, str]]  # a value and a note beside it


class Promise(NamedTuple):
    """What is promised of every report of a suite."""

    says: str
    found: Found
    limit: float
    least: bool = False  # the limit is the least, not the most

    def judge(self, report: Report) -> Target:
        """Return the promise beside what the report has."""
        value, note = self.found(report)
        return (at_least if self.least else at_most)(self.says, value, self.limit, note)


def by(one: tuple[str, ...], other: tuple[str, ...], name: str = "median", note: str = "") -> Found:
    """Return what finds a figure of one record by another's, both of the headline case.

    A record is named by measure and provider, one of losses by its task too.
    """

    def found(report: Report) -> tuple[float | None, str]:
        pair = []
        for measure, who, *task in (one, other):
            fields = {"task": task[0]} if task else {}
            case = headline(report, measure)
            pair.append(figure(first(report, measure, who=who, case=case, **fields), name))
        return ratio(*pair), note

    return found


def beside_best_peer(task: str) -> Found:
    """Return what finds our time of a task by that of the fastest peer on NTP.

    It is the fastest of the headline case that is neither ours nor the bare products.
    """

    def found(report: Report) -> tuple[float | None, str]:
        seconds = {
            record["who"]: record["median"]
            for record in find(report, STEP, case=headline(report), task=NTP, ours=False)
            if record["who"] != BARE and math.isfinite(record["median"])
        }
        peer = min(seconds, key=seconds.__getitem__, default=None)
        if peer is None:
            return None, "no peer measured"
        ours, theirs = (STEP, ROW_CHUNKS, task), (STEP, peer, task)
        return by(ours, theirs, note=f"best peer: {peer}")(report)

    return found


def filtered(report: Report) -> tuple[float | None, str]:
    """Return the filtered schedule's time by that of row_chunks, on trained-like inputs."""
    case = headline(report, inputs="trained-like")
    pair = (first(report, STEP, task=BOTH, who=who, case=case) for who in (FILTERED, ROW_CHUNKS))
    return ratio(*map(figure, pair)), ""


def forward_share(report: Report) -> tuple[float | None, str]:
    """Return the lowest rate of vocab_tiles without gradients, by that of the product."""
    case = headline(report, FORWARD)
    product = rate(first(report, FORWARD, case=case, who=BARE), "operations")
    shares = {
        record["task"]: ratio(rate(record, "operations"), product)
        for record in find(report, FORWARD, case=case, who=VOCAB_TILES)
    }
    known = {task: share for task, share in shares.items() if share is not None}
    # NaN is neither lower nor higher than anything: it must not hide behind another task.
    task = min(known, key=lambda name: (not math.isnan(known[name]), known[name]), default=None)
    return (None, "") if task is None else (known[task], f"the slowest: {task}")


def copy_share(note: str = "", **fields: Any) -> Found:
    """Return what finds a record's bytes a second by those of the copy beside it."""

    def found(report: Report) -> tuple[float | None, str]:
        record = first(report, **fields)
        copy = record and copy_beside(report, record)
        return ratio(rate(record, "bytes"), rate(copy, "bytes")), note

    return found


def float32_fold(report: Report) -> tuple[float | None, str]:
    """Return the compiled fold's time by that of PyTorch operations with the same options."""
    fold = first(report, "fold", who=FOLD, dtype="float32")
    plain = fold and first(report, "fold", who=FOLD_OPERATIONS, **same(fold, FOLD_SIZE))
    return ratio(figure(fold), figure(plain)), ""


LOSS, OUR_NTP_LOSS = (STEP, ROW_CHUNKS, BOTH), (STEP, ROW_CHUNKS, NTP)
DENSE_LOSS, OURS = (STEP, DENSE, BOTH), ("perplexity", STREAMING)
CHUNKS, DENSE_LOGITS = ("perplexity", BARE_CHUNKS), ("perplexity", DENSE_PERPLEXITY)
SCORING, PEAK = ("scoring", SCORE), "peak_bytes"
READS = "bytes a second: a fold reads each logit, a copy in HBM reads and writes it"
PRICE = "SFTMix at the price of NTP"
SHARE, HALF = "share of copy bandwidth", {"measure": "fold", "who": FOLD, "dtype": "bfloat16"}
PROMISES: dict[tuple[str, str], tuple[Promise, ...]] = {
    ("cpu", "loss"): (
        Promise(f"{BOTH} / {DENSE}", by(LOSS, DENSE_LOSS), 0.80),
        Promise(f"{BOTH} / {DENSE}, extra memory", by(LOSS, DENSE_LOSS, PEAK), 0.30),
        Promise(f"{BOTH} / {TORCH}, {NTP} alone", by(LOSS, (STEP, TORCH, NTP)), 0.65),
        Promise(f"{BOTH} / {NTP} of ours", by(LOSS, OUR_NTP_LOSS), 1.25),
    ),
    ("cuda", "loss"): (
        Promise(f"{BOTH} / {BARE}", by(LOSS, (STEP, BARE, NTP)), 1.05),
        Promise(f"{NTP} / best peer on {NTP}", beside_best_peer(NTP), 1.0),
        Promise(f"{BOTH} / {BOTH} of that peer", beside_best_peer(BOTH), 0.67),
        Promise(f"{BOTH} / {NTP} of ours", by(LOSS, OUR_NTP_LOSS, note=PRICE), 1.10),
        Promise(
            f"{PAIR_ROWS}, {SHARE}", copy_share(measure="row kernel", who=PAIR_ROWS), 0.85, True
        ),
        Promise("forward of vocab_tiles, share of the product's rate", forward_share, 0.60, True),
        Promise("exact vocab_tiles / row_chunks", by((STEP, VOCAB_TILES, BOTH), LOSS), 1.6),
        Promise("filtered vocab_tiles / row_chunks, trained-like inputs", filtered, 1.0),
    ),
    ("cpu", "perplexity"): (
        Promise(f"{STREAMING} / {BARE_CHUNKS}", by(OURS, CHUNKS), 1.20),
        Promise(f"{STREAMING} / {DENSE_PERPLEXITY}", by(OURS, DENSE_LOGITS), 0.50),
        Promise(
            f"{STREAMING} / {DENSE_PERPLEXITY}, extra memory", by(OURS, DENSE_LOGITS, PEAK), 0.1
        ),
        Promise(f"{FOLD} / {FOLD_OPERATIONS}, float32", float32_fold, 1 / 3),
        Promise(f"{SCORE} / {SCORE_FORWARD}", by(SCORING, ("scoring", SCORE_FORWARD)), 1.10),
        Promise(f"{SCORE} / {SCORE_LOOP}", by(SCORING, ("scoring", SCORE_LOOP)), 1.0),
    ),
    ("cuda", "perplexity"): (
        Promise(f"{STREAMING} / {BARE_CHUNKS}", by(OURS, CHUNKS), 1.05),
        Promise(f"{FOLD}, {IN_HBM}, {SHARE}", copy_share(READS, place=IN_HBM, **HALF), 0.85, True),
        Promise(f"{FOLD}, {IN_L2}, {SHARE}", copy_share(READS, place=IN_L2, **HALF), 0.85, True),
    ),
}


def step_name(record: Record) -> str:
    """Return a training step's model and batch in words."""
    return f"{record['model']}, {record['batch']} x {record['length']}"


def step_targets(report: Report) -> list[Target]:
    """Return two promises of time and one of memory for each model and size of batch."""
    sizes = {step_name(r): same(r, STEP_SIZE) for r in find(report, "step")}
    found = []
    for name, size in sizes.items():
        records = [
            first(report, "step", who=who, **size) for who in (OUR_SFTMIX, OUR_NTP, THEIR_NTP)
        ]
        sftmix, ntp, theirs = map(figure, records)
        peaks = [figure(record, "peak_bytes") for record in records[1:]]
        found += [
            at_most(f"{name}: sftmix / ntp, of ours", ratio(sftmix, ntp), 1.05),
            at_most(f"{name}: ntp of ours / {THEIR_NTP}", ratio(ntp, theirs), 1.0),
            at_most(f"{name}: peak of ours / {THEIR_NTP}", ratio(*peaks), 1.0),
        ]
    return found


def memory_targets(report: Report) -> list[Target]:
    """Return promises about the largest quotient by the formula, and on CUDA the workspace."""
    found = [worst_at_most("peak memory / formula, the worst", over_formula(report), 1.05)]
    if report["settings"]["device"] == "cuda":
        # Gradients are there twice when backward ends: unscaled, dW in float32, and handed out.
        over = {}
        for record in find(report, "memory", who=VOCAB_TILES):
            rows, columns, peak = (record[n] for n in ("rows", "vocab_size", "peak_bytes"))
            size = ELEMENT_BYTES[record["dtype"]]
            gradients = record["hidden_size"] * (2 * size * rows + (size + 4) * columns)
            if peak is not None:
                name = f"{record['task']}, N = {rows}, V = {columns}"
                # Handing them out can take more than the workspace, which then hides behind it: 0.
                over[name] = peak if math.isnan(peak) else max(0.0, (peak - gradients) / 2**20)
        found.append(
            worst_at_most("vocab_tiles, peak over its gradients, MiB, the worst", over, 64)
        )
    return found


def targets(report: Report) -> list[Target]:
    """Return all promises of the report's suite on its device; none where nothing was promised."""
    settings, suite = report["settings"], report["suite"]
    promises = PROMISES.get((settings["device"], suite), ())
    found = [promise.judge(report) for promise in promises]
    found += {"step": step_targets, "memory": memory_targets}.get(suite, lambda _: [])(report)
    return not_judged(found, settings["quick"])
