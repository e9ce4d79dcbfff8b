"""The names that suites write into result files, and how a report finds its records there.

A report is what a suite wrote as JSON; a record is one of its figures, a flat dictionary.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sftmix_kernels.peaks import BOTH, MIXUP, NTP

Report = Mapping[str, Any]
Record = Mapping[str, Any]

# Losses: what is timed, and who computes it.
STEP, FORWARD = "forward + backward", "forward"
TASKS = (NTP, MIXUP, BOTH)
ROW_CHUNKS, VOCAB_TILES = "sftmix, row_chunks", "sftmix, vocab_tiles"
FILTERED = "sftmix, vocab_tiles, filter 2^-12"
DENSE, COMPILED = "dense PyTorch", "torch.compile of dense"
TORCH = "torch linear_cross_entropy, chunked"
BARE = "bare matrix products"
# Objectives of NTP, by what `fused_cross_entropy` is asked for, and DFT as others compute it.
OBJECTIVE = "objective"
DFT, POWER, THRESHOLD = "DFT", "-p^k, k = 2", "threshold, tau = 0.1"
EAFT, GEM, SMOOTHED = "EAFT", "GEM, beta = 0.7", "label smoothing, 0.1"
WEIGHTED, WATCHED = "row weights", "stats"
OBJECTIVES = (NTP, DFT, POWER, THRESHOLD, EAFT, GEM, SMOOTHED, WEIGHTED, WATCHED)
OUR_OBJECTIVES = {name: f"sftmix, {name}" for name in OBJECTIVES}
DENSE_DFT = "dense DFT, as in LLaMA-Factory"
# Row kernels and ceilings.
COPY, PRODUCT = "copy", "matrix product"
PAIR_ROWS, SOFT_ROWS = "pair_rows_", "soft_rows_"
PAIR_ROWS_OPERATIONS = "pair_rows_, PyTorch operations"
# Perplexity, its fold and scoring.
STREAMING, DENSE_PERPLEXITY = "streaming_perplexity", "dense cross_entropy"
BARE_CHUNKS, BARE_CALL = "bare product, same chunks", "bare product, one call"
OPERATIONS, TORCH_PERPLEXITY = "PyTorch operations, same chunks", "linear_cross_entropy, chunked"
FOLD, FOLD_OPERATIONS = "fold_logits", "PyTorch operations"
FOLD_SOFTCAP = f"{FOLD} with softcap"
IN_CACHE, IN_L2 = "chunk in cache", "chunk in L2"
IN_HBM, IN_HBM_CHUNK = "all logits in HBM", "chunk in HBM"
SCORE, SCORE_FORWARD = "score_examples", "forward with logits, same batches"
SCORE_EQUAL = "forward with logits, equal lengths"
SCORE_BACKBONE = "forward without head, same batches"
SCORE_LOOP, SCORE_MEANS = "obvious loop, losses of examples", "obvious loop, mean of a batch"
# Training steps.
OUR_SFTMIX, OUR_NTP = "SFTMixTrainer, sftmix", "SFTMixTrainer, ntp"
OUR_TILES = "SFTMixTrainer, sftmix, vocab_tiles"
THEIR_SFTMIX, THEIR_NTP = "transformers.Trainer, dense sftmix", "transformers.Trainer, ntp"
LIGER_NTP = "Liger-Kernel, ntp"
# Of those, one that logs entropy and accuracy and one that does not.
WATCHING, UNWATCHED = "watching", "SFTMixTrainer, ntp, without entropy and accuracy"

# What tells one training step, or one size of logits, from another.
STEP_SIZE = ("model", "batch", "length")
LOGITS_SIZE = ("rows", "vocab_size", "dtype")
COPY_SIZE = ("place", "dtype", "rows", "columns")
FOLD_SIZE = (*COPY_SIZE, "kind")  # with which options; a copy has none


def find(report: Report, measure: str, **fields: object) -> list[Record]:
    """Return a measure's records whose fields have these values, in the file's order."""
    wanted = {"measure": measure, **fields}
    return [
        record
        for record in report["records"]
        if all(record.get(name) == value for name, value in wanted.items())
    ]


def first(report: Report, measure: str, **fields: object) -> Record | None:
    """Return the first record that `find` finds, None where there is none."""
    return next(iter(find(report, measure, **fields)), None)


def values(report: Report, measure: str, name: str) -> list[Any]:
    """Return each value of a field once, in the file's order."""
    return list(dict.fromkeys(record.get(name) for record in find(report, measure)))


def same(record: Record, names: Sequence[str]) -> dict[str, Any]:
    """Return some fields of a record, to `find` another that shares them."""
    return {name: record.get(name) for name in names}


def beside(report: Report, record: Record, who: str, shared: Sequence[str]) -> Record | None:
    """Return the provider's record that shares the measure and some fields of a record."""
    return first(report, record["measure"], who=who, **same(record, shared))


def figure(record: Record | None, name: str = "median") -> float | None:
    """Return a number of a record that may not be there."""
    return None if record is None else record.get(name)


def ratio(one: float | None, other: float | None) -> float | None:
    """Return the quotient: None where a number is missing, NaN where the divisor is 0."""
    if one is None or other is None:
        return None
    return one / other if other else math.nan


def quotients(one: Record, other: Record) -> list[float]:
    """Return one's seconds by another's, round by round, as far as both took part.

    A slow minute is in both of a round's times, and so in neither quotient: on a shared machine
    their median tells a percent, which a quotient of medians does not.
    """
    pairs = zip(one.get("seconds", ()), other.get("seconds", ()), strict=False)
    return [ratio(*pair) or 0.0 for pair in pairs]


def times(one: Record | None, other: Record | None) -> float | None:
    """Return one's time by another's: the median over rounds, of medians where none were kept."""
    if one is None or other is None:
        return None
    by_rounds = quotients(one, other)
    return statistics.median(by_rounds) if by_rounds else ratio(figure(one), figure(other))


def rate(record: Record | None, amount: str) -> float | None:
    """Return operations or bytes a second."""
    return ratio(figure(record, amount), figure(record))


def by_best_forward(report: Report, case: str | None) -> float | None:
    """Return the time of scoring a case by the faster forward with logits of the same examples."""
    ours = first(report, "scoring", who=SCORE, case=case)
    found = [
        times(ours, first(report, "scoring", who=who, case=case))
        for who in (SCORE_FORWARD, SCORE_EQUAL)
    ]
    return max((value for value in found if value is not None), default=None)


def is_ours(record: Record) -> bool:
    """Tell whether the provider is this repository's; a ceiling is nobody's."""
    return bool(record.get("ours")) and record["who"] not in (COPY, BARE, BARE_CHUNKS, BARE_CALL)


def by_time(records: Sequence[Record]) -> list[Record]:
    """Return the records, fastest first; a time that is not a number comes last."""
    return sorted(records, key=lambda record: (math.isnan(record["median"]), record["median"]))


def headline(report: Report, measure: str = STEP, **fields: object) -> str | None:
    """Return the case that stands for all: the first in the file."""
    record = first(report, measure, **fields)
    return None if record is None else record.get("case")


def copy_beside(report: Report, record: Record) -> Record | None:
    """Return the copy that a row kernel or a fold is held to, of the same dtype.

    A row kernel's copy has the kernel's size. A fold's copy lies in HBM, or where there is none in
    the fold's place.
    """
    if record["measure"] != "fold":
        return beside(report, record, COPY, LOGITS_SIZE)
    copies = find(report, "fold", who=COPY, dtype=record["dtype"])
    places = {copy.get("place"): copy for copy in copies}
    return places.get(IN_HBM, places.get(record["place"]))


def over_formula(report: Report) -> dict[str, float]:
    """Return peak memory by the formula's, for each measurement that has a formula."""
    return {
        f"{record['who']}, {record['task']}, N = {record['rows']}, D = {record['hidden_size']}, "
        f"V = {record['vocab_size']}, {record['dtype']}"
        + (", interpreted" if record.get("interpreted") else ""): quotient
        for record in find(report, "memory")
        if (quotient := ratio(record.get("peak_bytes"), record.get("formula_bytes"))) is not None
    }


def newest(reports: Sequence[Report], suite: str, device: str, quick: bool) -> Report | None:
    """Return the newest report of a suite on a device; of tiny sizes only if ``quick``."""
    found = [
        report
        for report in reports
        if report["suite"] == suite
        and report["settings"]["device"] == device
        and (quick or not report["settings"]["quick"])
    ]
    return max(
        found, key=lambda r: (not r["settings"]["quick"], r["facts"].get("date", "")), default=None
    )
