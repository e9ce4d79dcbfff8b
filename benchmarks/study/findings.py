"""Compare every system with NTP, over seeds, with a correction for many tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from sftmix.report.comparison import LEVEL, Comparison, compare

from .settings import BASELINE, SYSTEMS

Record: TypeAlias = Mapping[str, Any]
# The names of data sets, in the order of the tables.
SOURCES = {
    "gsm8k": "GSM8K",
    "alpaca": "Alpaca",
    "pubmedqa": "PubMedQA",
    "demo": "the bundled data",
}
BASE = "base"  # in place of a system: the model before it is tuned


@dataclass(frozen=True)
class Measure:
    """The words of a measure; ``relative``: differences are in percent of NTP's."""

    label: str
    unit: str
    digits: int
    factor: float = 1.0
    relative: bool = False

    @property
    def difference_unit(self) -> str:
        """Return the unit of a difference to NTP."""
        return "% of NTP's" if self.relative else self.unit


PRIMARY = "held_out_loss"
LOWEST = "held_out_loss_min"
SPREAD = "confidence_std"
MEASURES = {
    PRIMARY: Measure("held-out loss", "nats/token", 4),
    "held_out_accuracy": Measure("held-out token accuracy", "%", 2, factor=100),
    "held_out_ece": Measure("calibration error", "% points", 2, factor=100),
    SPREAD: Measure("confidence, std. dev.", "", 2, relative=True),
    "confidence_iqr": Measure("confidence, interquartile range", "", 2, relative=True),
    "confidence_mean": Measure("confidence, mean", "", 2),
    "train_loss": Measure("training loss", "nats/token", 4),
    LOWEST: Measure("lowest held-out loss", "nats/token", 4),
    "epoch_of_lowest": Measure("epoch of the lowest", "", 1),
    "kept_loss": Measure("loss on rows that a grader kept", "nats/token", 4),
    "question_accuracy": Measure("accuracy on questions", "%", 1, factor=100),
    "exact_match": Measure("exact match of answers", "%", 1, factor=100),
    "answer_tokens": Measure("length of an answer", "tokens", 1),
    "answers_ended": Measure("answers that end", "%", 1, factor=100),
    "distinct_bigrams": Measure("distinct bigrams of answers", "%", 1, factor=100),
}
SMALL = tuple(MEASURES)[:7]  # of the study of small models


@dataclass(frozen=True)
class Results:
    """The records of one data set, by seed, and the search for its learning rate."""

    source: str
    records: tuple[Record, ...]
    search: Record

    @property
    def name(self) -> str:
        """Return the data set's name as it is written."""
        return SOURCES[self.source]

    @property
    def systems(self) -> tuple[str, ...]:
        """Return the systems that at least one seed has."""
        found = {name for record in self.records for name in record["systems"]}
        return tuple(name for name in SYSTEMS if name in found)

    def values(self, system: str, measure: str) -> dict[int, float]:
        """Return the measure of a system, or of `BASE`, by seed, in its unit."""
        return {
            record["seed"]: found[system][measure] * MEASURES[measure].factor
            for record in self.records
            if measure in (found := {BASE: record["base"], **record["systems"]}).get(system, {})
        }


@dataclass(frozen=True)
class Finding:
    """A system beside NTP on a data set."""

    source: str
    system: str
    test: Comparison  # the difference that is tested, in the measure's difference unit
    corrected: float | None  # Holm's p-value; None where there was no test

    @property
    def significant(self) -> bool:
        """Tell whether the difference is significant after the correction."""
        return self.corrected is not None and self.corrected < 1 - LEVEL


def read(folder: Path) -> list[Results]:
    """Return the results of a folder, one for each data set.

    Raises:
        ValueError: none are there, or those of a data set were made with different settings.
    """
    records = [json.loads(file.read_text("utf-8")) for file in sorted(folder.glob("*.json"))]
    found = []
    for source in SOURCES:
        own = [record for record in records if record["data"] == source]
        runs = sorted((r for r in own if r.get("systems")), key=lambda record: record["seed"])
        searches = [record for record in own if "losses" in record]
        if not runs:
            continue
        for name in ("sizes", "examples", "learning_rate"):
            if any(record[name] != runs[0][name] for record in runs):
                raise ValueError(f"{folder}: the results of {source} differ in {name}")
        if len(searches) != 1:
            raise ValueError(f"{folder}: expected one search of {source}, got {len(searches)}")
        found.append(Results(source, tuple(runs), searches[0]))
    if not found:
        raise ValueError(f"{folder}: there are no results")
    return found


def findings(
    results: Sequence[Results], measure: str, baseline: str = BASELINE, systems: Sequence[str] = ()
) -> list[Finding]:
    """Return systems (all by default) of every data set beside the baseline.

    A system that was not measured so is left out. The correction is over all that are returned.
    """
    found = []
    for one in results:
        of_baseline = one.values(baseline, measure)
        for system in one.systems:
            values, beside = one.values(system, measure), of_baseline
            if system == baseline or not values or (systems and system not in systems):
                continue
            if MEASURES[measure].relative:
                common = values.keys() & of_baseline.keys()
                values = {seed: 100 * (values[seed] / of_baseline[seed] - 1) for seed in common}
                beside = dict.fromkeys(common, 0.0)
            found.append(Finding(one.source, system, compare(values, beside), None))
    tested = [one for one in found if one.test.p_value is not None]
    corrected = iter(holm([one.test.p_value or 0.0 for one in tested]))
    return [replace(one, corrected=next(corrected)) if one in tested else one for one in found]


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values of m tests after Holm's correction, in their order.

    With p sorted, p'_(i) = max over j <= i of min(1, (m - j + 1) p_(j)). All that are below a level
    hold together at that level, whichever of the differences are real. Source: Holm 1979, A simple
    sequentially rejective multiple test procedure.

    Raises:
        ValueError: a p-value outside of [0, 1].
    """
    for p_value in p_values:
        if not 0 <= p_value <= 1:
            raise ValueError(f"p_values: expected 0 .. 1, got {p_value}")
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected
