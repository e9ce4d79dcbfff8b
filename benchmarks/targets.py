"""What was promised of each suite, beside what a run found.

A figure that is not there is neither reached nor missed, and of a quick run, whose sizes are too
small, none is judged. A figure that is not a number counts as missed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from sftmix_kernels.schedules import VocabTiles

from . import records as names
from .records import (
    BOTH,
    NTP,
    STEP,
    Record,
    Report,
    figure,
    find,
    first,
    headline,
    rate,
    ratio,
    times,
)
from .settings import BUSY, HALF, PROMPTS, SMOLLM2, Case

TOO_SMALL = "sizes too small"
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Target(NamedTuple):
    """One promise beside what was found."""

    says: str
    value: float | None
    limit: float
    least: bool = False  # the limit is the least, not the most
    note: str = ""
    judged: bool = True

    @property
    def reached(self) -> bool | None:
        """Tell whether it is kept; None where a figure is missing or must not be judged."""
        if self.value is None or not self.judged:
            return None
        return self.value >= self.limit if self.least else self.value <= self.limit

    @property
    def verdict(self) -> str:
        """Return the verdict in words."""
        if self.reached is None:
            return "not measured" if self.value is None else "not judged"
        return "reached" if self.reached else "MISSED"


def judged(found: Iterable[Target], quick: bool) -> list[Target]:
    """Return the promises, without verdicts where the run was quick."""
    return [one._replace(judged=False, note=TOO_SMALL) if quick else one for one in found]


def largest(found: Mapping[str, float]) -> tuple[float | None, str]:
    """Return the largest of some values and its name; NaN is larger than any."""
    name = max(found, key=lambda one: (math.isnan(found[one]), found[one]), default="")
    return found.get(name), name


Found = Callable[[Report], tuple[float | None, str]]  # a value and a note beside it
# What is promised of every report of a suite: its words, what finds it, the limit.
Promise = tuple[str, Found, float] | tuple[str, Found, float, bool]


def by(
    one: tuple[str, ...],
    other: tuple[str, ...],
    name: str = "median",
    note: str = "",
    at: Case | None = None,
) -> Found:
    """Return what finds a figure of one record by another's, both of one case: the headline.

    A record is named by measure and provider, one of losses by its task too.
    """

    def found(report: Report) -> tuple[float | None, str]:
        pair = []
        for measure, who, *task in (one, other):
            fields = {"task": task[0]} if task else {}
            case = headline(report, measure) if at is None else at.name
            pair.append(first(report, measure, who=who, case=case, **fields))
        if name == "median":
            return times(*pair), note
        return ratio(*(figure(record, name) for record in pair)), note

    return found


def by_best_peer(task: str, at: Case | None = None) -> Found:
    """Return what finds our time of a task by that of the fastest peer on NTP.

    It is the fastest of a case, the headline, that is neither ours nor the bare products.
    """

    def found(report: Report) -> tuple[float | None, str]:
        case = headline(report) if at is None else at.name
        seconds = {
            record["who"]: record["median"]
            for record in find(report, STEP, case=case, task=NTP, ours=False)
            if record["who"] != names.BARE and math.isfinite(record["median"])
        }
        peer = min(seconds, key=seconds.__getitem__, default=None)
        if peer is None:
            return None, "no peer measured"
        ours, note = (STEP, names.ROW_CHUNKS, task), f"best peer: {peer}"
        return by(ours, (STEP, peer, task), note=note, at=at)(report)

    return found


def perplexity_by_bare(report: Report) -> tuple[float | None, str]:
    """Return the time of streaming perplexity by that of the fastest bare product.

    The product of all logits in one call is held to as well: ours in chunks that leave SMs idle
    must not hide behind a product in the same chunks.
    """
    case = headline(report, "perplexity")
    seconds = {
        who: time
        for who in (names.BARE_CALL, names.BARE_CHUNKS)
        if (time := figure(first(report, "perplexity", who=who, case=case))) is not None
    }
    bare = min(seconds, key=seconds.__getitem__, default="")
    ours = figure(first(report, "perplexity", who=names.STREAMING, case=case))
    return ratio(ours, seconds.get(bare)), bare


def forward_share(report: Report) -> tuple[float | None, str]:
    """Return the lowest rate of vocab_tiles without gradients, by that of the product."""
    case = headline(report, names.FORWARD)
    product = rate(first(report, names.FORWARD, case=case, who=names.BARE), "operations")
    found = {
        record["task"]: share
        for record in find(report, names.FORWARD, case=case, who=names.VOCAB_TILES)
        if (share := ratio(rate(record, "operations"), product)) is not None
    }
    # NaN is neither lower nor higher than anything: it must not hide behind another task.
    task = min(found, key=lambda name: (not math.isnan(found[name]), found[name]), default="")
    return found.get(task), f"the slowest: {task}" if task else ""


def by_copy(note: str = "", **fields: str) -> Found:
    """Return what finds a record's bytes a second by those of the copy beside it."""

    def found(report: Report) -> tuple[float | None, str]:
        record = first(report, **fields)
        copy = record and names.copy_beside(report, record)
        return ratio(rate(record, "bytes"), rate(copy, "bytes")), note

    return found


def float32_fold(report: Report) -> tuple[float | None, str]:
    """Return the compiled fold's time by that of PyTorch operations with the same options."""
    fold = first(report, "fold", who=names.FOLD, dtype="float32")
    plain = fold and names.beside(report, fold, names.FOLD_OPERATIONS, names.FOLD_SIZE)
    return times(fold, plain), ""


def objective_promises(most: float) -> list[Promise]:
    """Return that each objective costs at most so much of NTP alone."""
    ntp = names.OUR_OBJECTIVES[NTP]
    return [
        (f"{who} / {ntp}", by((names.OBJECTIVE, who), (names.OBJECTIVE, ntp)), most)
        for who in names.OUR_OBJECTIVES.values()
        if who != ntp
    ]


def scoring_by_forward(report: Report) -> tuple[float | None, str]:
    """Return the time of scoring by the faster forward, of the model where that is largest."""
    cases = dict.fromkeys(record.get("case") for record in find(report, "scoring"))
    found = {
        case or "": value
        for case in cases
        if (value := names.by_best_forward(report, case)) is not None
    }
    return largest(found)


OURS, OUR_NTP = (STEP, names.ROW_CHUNKS, BOTH), (STEP, names.ROW_CHUNKS, NTP)
BARE, TORCH = (STEP, names.BARE, NTP), (STEP, names.TORCH, NTP)
DENSE, TILES = (STEP, names.DENSE, BOTH), (STEP, names.VOCAB_TILES, BOTH)
PERPLEXITY = ("perplexity", names.STREAMING)
CHUNKS, DENSE_LOGITS = ("perplexity", names.BARE_CHUNKS), ("perplexity", names.DENSE_PERPLEXITY)
SCORING = ("scoring", names.SCORE)
READS = "bytes a second: a fold reads each logit, a copy in HBM reads and writes it"
PRICE = "SFTMix at the price of NTP"
SHARE = "share of copy bandwidth"
DFT, DENSE_DFT = (
    (names.OBJECTIVE, who) for who in (names.OUR_OBJECTIVES[names.DFT], names.DENSE_DFT)
)
HALF_FOLD = {"measure": "fold", "who": names.FOLD, "dtype": "bfloat16"}
PAIR_ROWS = {"measure": "row kernel", "who": names.PAIR_ROWS}
LEAST = True
PROMISES: dict[tuple[str, str], tuple[Promise, ...]] = {
    ("cpu", "loss"): (
        (f"{NTP} / {names.BARE}", by(OUR_NTP, BARE), 1.10),
        (f"{NTP} / best peer", by_best_peer(NTP), 1.0),
        (f"{BOTH} / {names.BARE}", by(OURS, BARE), 1.15),
        (f"{BOTH} / {names.DENSE}", by(OURS, DENSE), 0.50),
        (f"{BOTH} / {NTP} of ours", by(OURS, OUR_NTP), 1.25),
        (f"{BOTH} / {names.TORCH}, {NTP} alone", by(OURS, TORCH), 0.65),
        (f"{BOTH} / {names.DENSE}, extra memory", by(OURS, DENSE, "peak_bytes"), 0.30),
        (
            f"{BOTH} / {names.TORCH}, {NTP} alone, extra memory",
            by(OURS, TORCH, "peak_bytes"),
            1.0,
        ),
        (f"{BUSY.name}: {BOTH} / {names.BARE}", by(OURS, BARE, at=BUSY), 1.5),
        (f"{BUSY.name}: {BOTH} / {names.DENSE}", by(OURS, DENSE, at=BUSY), 0.8),
        (f"{SMOLLM2.name}: {NTP} / {names.BARE}", by(OUR_NTP, BARE, at=SMOLLM2), 1.25),
        (f"{SMOLLM2.name}: {NTP} / best peer", by_best_peer(NTP, at=SMOLLM2), 1.0),
        (f"{SMOLLM2.name}: {BOTH} / {names.BARE}", by(OURS, BARE, at=SMOLLM2), 1.35),
        (f"{HALF.name}: {BOTH} / {names.BARE}", by(OURS, BARE, at=HALF), 1.25),
    ),
    ("cpu", "objectives"): (
        *objective_promises(1.05),
        (f"{DFT[1]} / {DENSE_DFT[1]}", by(DFT, DENSE_DFT), 0.60),
        (f"{DFT[1]} / {DENSE_DFT[1]}, extra memory", by(DFT, DENSE_DFT, "peak_bytes"), 0.30),
        (f"{PROMPTS.name}: {DFT[1]} / {DENSE_DFT[1]}", by(DFT, DENSE_DFT, at=PROMPTS), 0.60),
    ),
    ("cuda", "objectives"): (*objective_promises(1.03),),
    ("cuda", "loss"): (
        (f"{BOTH} / {names.BARE}", by(OURS, BARE), 1.05),
        (f"{NTP} / best peer on {NTP}", by_best_peer(NTP), 1.0),
        (f"{BOTH} / {BOTH} of that peer", by_best_peer(BOTH), 0.67),
        (f"{BOTH} / {NTP} of ours", by(OURS, OUR_NTP, note=PRICE), 1.10),
        (f"{names.PAIR_ROWS}, {SHARE}", by_copy(**PAIR_ROWS), 0.85, LEAST),
        ("forward of vocab_tiles, share of the product's rate", forward_share, 0.60, LEAST),
        ("exact vocab_tiles / row_chunks", by(TILES, OURS), 1.6),
        (
            "filtered vocab_tiles / row_chunks, trained-like inputs",
            by((STEP, names.FILTERED, BOTH), OURS),
            1.0,
        ),
    ),
    ("cpu", "perplexity"): (
        (f"{names.STREAMING} / {names.BARE_CHUNKS}", by(PERPLEXITY, CHUNKS), 1.05),
        (
            f"{names.STREAMING} / {names.DENSE_PERPLEXITY}, extra memory",
            by(PERPLEXITY, DENSE_LOGITS, "peak_bytes"),
            0.1,
        ),
        (f"{names.FOLD} / {names.FOLD_OPERATIONS}, float32", float32_fold, 1 / 3),
        (f"{names.SCORE} / best forward with logits, the worst", scoring_by_forward, 1.05),
        (f"{names.SCORE} / {names.SCORE_LOOP}", by(SCORING, ("scoring", names.SCORE_LOOP)), 1.0),
    ),
    ("cuda", "perplexity"): (
        (f"{names.STREAMING} / best bare product", perplexity_by_bare, 1.05),
        *(
            (
                f"{names.FOLD}, {place}, {SHARE}",
                by_copy(READS, place=place, **HALF_FOLD),
                0.85,
                LEAST,
            )
            for place in (names.IN_HBM, names.IN_L2)
        ),
    ),
}


def step_name(record: Record) -> str:
    """Return a training step's model and batch in words."""
    return f"{record['model']}, {record['batch']} x {record['length']}"


def step_targets(report: Report) -> list[Target]:
    """Return two promises of time and one of memory for each model and size of batch."""
    sizes = {step_name(r): names.same(r, names.STEP_SIZE) for r in find(report, "step")}
    found = []
    for name, size in sizes.items():
        sftmix, ntp, theirs = (
            first(report, "step", who=who, **size)
            for who in (names.OUR_SFTMIX, names.OUR_NTP, names.THEIR_NTP)
        )
        peaks = ratio(figure(ntp, "peak_bytes"), figure(theirs, "peak_bytes"))
        found += [
            Target(f"{name}: sftmix / ntp, of ours", times(sftmix, ntp), 1.05),
            Target(f"{name}: ntp of ours / {names.THEIR_NTP}", times(ntp, theirs), 1.0),
            Target(f"{name}: peak of ours / {names.THEIR_NTP}", peaks, 1.0),
        ]
    return found


def watching_targets(report: Report) -> list[Target]:
    """Return a promise about each model's step: to find entropy and accuracy costs next to
    nothing."""
    return [
        Target(
            f"{step_name(record)}: with entropy and accuracy / without",
            times(record, names.beside(report, record, names.UNWATCHED, names.STEP_SIZE)),
            1.01,
        )
        for record in find(report, names.WATCHING, who=names.OUR_NTP)
    ]


def memory_targets(report: Report) -> list[Target]:
    """Return promises about the largest quotient by the formula, and on CUDA the workspace."""
    worst, name = largest(names.over_formula(report))
    found = [Target("peak memory / formula, the worst", worst, 1.05, note=name)]
    if report["settings"]["device"] == "cuda":
        # Gradients are there twice when backward ends: unscaled, dW in float32, and handed out.
        over = {}
        for record in find(report, "memory", who=names.VOCAB_TILES):
            rows, columns, peak = (record[n] for n in ("rows", "vocab_size", "peak_bytes"))
            size = ELEMENT_BYTES[record["dtype"]]
            gradients = record["hidden_size"] * (2 * size * rows + (size + 4) * columns)
            if peak is not None:
                name = f"{record['task']}, N = {rows}, V = {columns}"
                # Handing them out can take more than the workspace, which then hides behind it: 0.
                over[name] = peak if math.isnan(peak) else max(0.0, (peak - gradients) / 2**20)
        worst, name = largest(over)
        says = "vocab_tiles, peak over its gradients, MiB, the worst"
        found.append(Target(says, worst, VocabTiles().max_bytes / 2**20, note=name))
    return found


def targets(report: Report) -> list[Target]:
    """Return all promises of the report's suite on its device; none where nothing was promised."""
    settings, suite = report["settings"], report["suite"]
    found = []
    for says, find_value, limit, *least in PROMISES.get((settings["device"], suite), ()):
        value, note = find_value(report)
        found.append(Target(says, value, limit, bool(least), note))
    of_records = {
        "step": step_targets,
        "memory": memory_targets,
        "objectives": watching_targets,
    }
    found += of_records.get(suite, lambda _: [])(report)
    return judged(found, settings["quick"])
