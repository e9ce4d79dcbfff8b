"""Measure everything of a run in the order of its length, and save it as it comes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.measure import SuiteError
from benchmarks.result_file import Results
from benchmarks.settings import Settings
from sftmix.plan.search import largest_length

from .settings import (
    CPU,
    CUDA,
    DONE,
    LARGEST,
    LOSS,
    MODES,
    STEP,
    SUITE,
    Subject,
    Task,
    model_size,
    modes_of,
    subject_of,
)
from .worker import OutOfTime, available, measure

# On the CPU: for the search, what fits in minutes; for one measurement, what the machine can give.
CPU_BUDGET = 2**29
SHARE_OF_MACHINE = 0.8
# Measurements of a search; up to 17 were needed where the answer is 10,000 times the first length.
TRIES = 20
# Facts that have to be the same of all figures of a file.
SAME = ("commit", "cpu", "gpu", "torch", "threads")
FAILED = "failed"
Record = dict[str, Any]


@dataclass
class Run:
    """The options of the command line."""

    model: str
    device: str
    out: Path
    modes: Sequence[str] = ()
    lengths: Sequence[int] = ()
    largest: bool = False
    budget: int | None = None
    seconds: float = math.inf
    quick: bool = False
    threads: int = 2
    command: str = ""
    commit: str = ""
    predicted: bool = False  # nothing is measured
    begin: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.modes = self.modes or modes_of(self.device)
        for name in self.modes:
            if self.device not in MODES[name].devices:
                raise ValueError(f"--modes: {name} is for {MODES[name].devices[0]}")
        self.lengths = sorted(self.lengths or self.subject.lengths[self.device])
        if not self.lengths:
            raise ValueError(f"--lengths: {self.model} has none on {self.device}, give some")
        if self.lengths[0] < 2:
            raise ValueError(f"--lengths: expected at least 2 tokens, got {self.lengths[0]}")
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"--budget: expected bytes, at least 1, got {self.budget}")
        self.results = self.open()

    @property
    def subject(self) -> Subject:
        """Return the model."""
        return subject_of(self.model, self.quick)

    @property
    def left(self) -> float:
        """Return the seconds that are left."""
        return self.seconds - (time.monotonic() - self.begin)

    def open(self) -> Results:
        """Return a new result file, or one of the same code and machine to go on with.

        Raises:
            ValueError: the file is of other code, or of another machine.
        """
        settings = Settings(
            self.device, self.quick, threads=self.threads, command=self.command, commit=self.commit
        )
        suite = f"{SUITE}-{self.model}" + "-predicted" * self.predicted
        results = Results(suite, settings, self.out)
        subject, facts = self.subject, results.report["facts"]
        facts["threads"] = self.threads
        results.report["settings"] = {
            "device": self.device,
            "quick": self.quick,
            "dtype": subject.dtype,
            "model": self.model,
            "size": model_size(subject),
            "lora_rank": subject.lora_rank,
            "predicted": self.predicted,
        }
        if results.file is not None and results.file.exists() and not self.predicted:
            self.go_on(results)
        return results

    def go_on(self, results: Results) -> None:
        """Take over an earlier run's records."""
        assert results.file is not None
        earlier = json.loads(results.file.read_text("utf-8"))
        old, new = ({**r["facts"], **r["settings"]} for r in (earlier, results.report))
        for name in (*SAME, *results.report["settings"]):
            if old.get(name) != new.get(name):
                raise ValueError(
                    f"{results.file}: was made with {name} = {old.get(name)!r}, now it is "
                    f"{new.get(name)!r}; give another folder as --out"
                )
        results.report["records"] = earlier["records"]
        results.report["facts"]["command"] = f"{old['command']}; {self.command}"

    def task(self, kind: str, mode: str, length: int, limit: int | None) -> Task:
        """Return one measurement of the run."""
        return Task(kind, self.model, self.device, self.quick, self.threads, length, mode, limit)


def run(wanted: Run) -> int:
    """Measure everything that is not there yet; return 1 where something failed by itself."""
    points = [(mode, length) for length in wanted.lengths for mode in wanted.modes]
    with tqdm(total=len(points), unit="point", desc=wanted.model) as bar:
        for mode, length in points:
            bar.set_postfix_str(f"{mode}, {length:,}")
            point(wanted, mode, length)
            bar.update()
    if wanted.largest:
        for mode in tqdm(wanted.modes, unit="mode", desc="largest length"):
            search(wanted, mode)
    loss(wanted)
    return int(bool(wanted.results.report["failed"]))


def steps(wanted: Run, mode: str) -> Iterator[Record]:
    """Yield the mode's steps so far."""
    for record in wanted.results.report["records"]:
        if record["measure"] == STEP and record["mode"] == mode:
            yield record


def point(wanted: Run, mode: str, length: int) -> Record | None:
    """Return the step's record, from the file if it is there; None if it cannot be measured."""
    for record in steps(wanted, mode):
        if record["length"] == length or (record["outcome"] != DONE and record["length"] < length):
            # What a shorter one has no memory for, a longer one has not either.
            return record
    try:
        return measured(wanted, mode, length, machine_limit(wanted))
    except OutOfTime as reason:
        wanted.results.miss("left_out", f"{MODES[mode].says}, {length:,}", str(reason))
    return None


def machine_limit(wanted: Run) -> int | None:
    """Return what one process may allocate, so that no measurement takes the machine down."""
    return int(SHARE_OF_MACHINE * available()) if wanted.device == CPU else wanted.budget


def measured(
    wanted: Run, mode: str, length: int, limit: int | None, *, searched: bool = False
) -> Record:
    """Measure a step, save it and return its record.

    Raises:
        OutOfTime: there was none left.
    """
    name = f"{MODES[mode].says}, {length:,}"
    try:
        found = measure(wanted.task(STEP, mode, length, limit), wanted.left)
    except SuiteError as reason:
        wanted.results.miss("failed", name, str(reason))
        found = {"outcome": FAILED}
    fields = {"mode": mode, "length": length, "limit_bytes": limit, "searched": searched}
    record = {"measure": STEP, **fields, **found}
    if found["outcome"] != FAILED:
        wanted.results.add(**record)
    tqdm.write(f"{name}: {says(record)}")
    return record


def says(record: Record) -> str:
    """Return a line of progress."""
    if record["outcome"] != DONE:
        return str(record["outcome"])
    rate = record["tokens"] / record["seconds"]
    return f"{record['peak_bytes'] / 2**20:,.0f} MiB, {rate:,.0f} tokens/s"


def budget_of(wanted: Run) -> int:
    """Return the bytes that the largest length may take; on CUDA the device's."""
    if wanted.budget is not None:
        return wanted.budget
    if wanted.device == CUDA:
        return int(wanted.results.report["facts"]["gpu_bytes"])
    return CPU_BUDGET


def search(wanted: Run, mode: str) -> None:
    """Find the largest length in the budget, starting from the points that are there."""
    budget = budget_of(wanted)
    if any(
        (r["measure"], r.get("mode"), r.get("budget_bytes")) == (LARGEST, mode, budget)
        for r in wanted.results.report["records"]
    ):
        return
    peaks = {r["length"]: r["peak_bytes"] for r in steps(wanted, mode) if r["outcome"] == DONE}
    if wanted.device == CUDA:
        # The limit of a point was the same; on the CPU it was the machine's.
        for gone in [r["length"] for r in steps(wanted, mode) if r["outcome"] != DONE]:
            peaks[gone] = beyond(peaks, gone, budget)
    left = iter(range(TRIES))

    def peak_of(length: int) -> int:
        if next(left, None) is None:
            raise OutOfTime(f"{TRIES} measurements were not enough")
        limit = limit_of(wanted, budget)
        try:
            record = measured(wanted, mode, length, limit, searched=True)
        except OutOfTime as reason:
            raise OutOfTime(f"{length:,}: {reason}") from reason
        if record["outcome"] == FAILED:
            raise OutOfTime(f"{length:,}: {FAILED}")
        peaks[length] = record.get("peak_bytes") or beyond(peaks, length, budget)
        return peaks[length]

    write(wanted, mode, budget, peaks, searched(peak_of, peaks, budget, wanted.lengths[0]))


def searched(peak_of: Callable[[int], int], peaks: dict[int, int], budget: int, start: int) -> str:
    """Measure until both bounds are in ``peaks``, which `peak_of` adds to; return what hindered it.

    ``start`` is the length to begin with where fewer than two are known.
    """
    try:
        while len(peaks) < 2:
            peak_of(start * 2 ** len(peaks))
        largest_length(peak_of, budget, peaks)
    except OutOfTime as reason:
        return str(reason)
    return ""


def beyond(peaks: Mapping[int, int], length: int, budget: int) -> int:
    """Return a peak to search on with for a length that ran out of memory.

    It lies on the line through the two longest that fit, and is over the budget.
    """
    fitting = sorted(n for n, peak in peaks.items() if peak <= budget)[-2:]
    if len(fitting) < 2:
        return budget + budget * length // 1024
    low, high = fitting
    slope = (peaks[high] - peaks[low]) / (high - low)
    return max(int(peaks[high] + slope * (length - high)), budget + budget // 100)


def bounds(peaks: Mapping[int, int], budget: int) -> tuple[int, int | None]:
    """Return the longest length that fits below the shortest that does not, and that one."""
    fails = min((n for n, peak in peaks.items() if peak > budget), default=None)
    fitting = (n for n, p in peaks.items() if p <= budget and (fails is None or n < fails))
    return max(fitting, default=0), fails


def limit_of(wanted: Run, budget: int) -> int | None:
    """Return what the process may allocate: on the CPU more than is counted, for threads."""
    return wanted.budget if wanted.device == CUDA else budget + 2**28


def write(wanted: Run, mode: str, budget: int, peaks: Mapping[int, int], note: str) -> None:
    """Add the search's record; without one where time ran out before anything was known."""
    name, (fits, fails) = f"largest length, {MODES[mode].says}", bounds(peaks, budget)
    if note:
        wanted.results.miss("left_out", name, note)
        if fails is None:
            return
    fields = {"mode": mode, "budget_bytes": budget, "length": fits, "fails": fails}
    wanted.results.add(measure=LARGEST, **fields, closed=not note)
    tqdm.write(f"{name}: {fits:,}")


def loss(wanted: Run) -> None:
    """Measure the fused loss without a model, at lean's chunk."""
    if any(record["measure"] == LOSS for record in wanted.results.report["records"]):
        return
    name = "loss alone"
    try:
        found = measure(wanted.task(LOSS, "lean", 0, machine_limit(wanted)), wanted.left)
    except OutOfTime as reason:
        return wanted.results.miss("left_out", name, str(reason))
    except SuiteError as reason:
        return wanted.results.miss("failed", name, str(reason))
    if found["outcome"] != DONE:
        return wanted.results.miss("left_out", name, found["outcome"])
    for one in found["workspaces"]:
        wanted.results.add(measure=LOSS, mode="lean", **one)
