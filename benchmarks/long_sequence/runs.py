"""All measurements of a run, in the order of their length, saved as they come."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.measure import SuiteError
from benchmarks.result_file import Results
from benchmarks.settings import Settings

from .search import Bounds, largest
from .settings import CPU, CUDA, MODES, Subject, Task, modes_of, subject_of
from .worker import DONE, OutOfTime, available, measure

STEP, LOSS, LARGEST, PREDICTION = "step", "loss", "largest", "prediction"
SUITE = "long_sequence"
# On the CPU: for the search, what fits in minutes; for one measurement, what the machine can give.
CPU_BUDGET = 2**29
SHARE_OF_MACHINE = 0.8
# Facts that have to be the same of all figures of a file.
SAME = ("commit", "cpu", "gpu", "torch", "threads")
# Of a `ModelSize`, what is not the model's.
OF_BATCH = ("batch", "length", "turns")
FAILED = "failed"
Record = dict[str, Any]


@dataclass
class Run:
    """What the command line says."""

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
                raise ValueError(f"modes: {name} is for {MODES[name].devices[0]}")
        self.lengths = sorted(self.lengths or self.subject.lengths[self.device])
        if not self.lengths:
            raise ValueError(f"lengths: {self.model} has none on {self.device}, give some")
        if self.lengths[0] < 2:
            raise ValueError(f"lengths: expected at least 2 tokens, got {self.lengths[0]}")
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"budget: expected bytes, at least 1, got {self.budget}")
        self.results = self.open()

    @property
    def subject(self) -> Subject:
        return subject_of(self.model, self.quick)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.monotonic() - self.begin)

    def open(self) -> Results:
        """A new file, or one of the same code and machine that is to be gone on with.

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
            "size": {n: v for n, v in subject.size._asdict().items() if n not in OF_BATCH},
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
                    f"{new.get(name)!r}; take another folder"
                )
        results.report["records"] = earlier["records"]
        results.report["facts"]["command"] = f"{old['command']}; {self.command}"

    def task(self, kind: str, mode: str, length: int, limit: int | None) -> Task:
        return Task(kind, self.model, self.device, self.quick, self.threads, length, mode, limit)


def run(wanted: Run) -> int:
    """Measure everything that is not there yet; 1 where something failed by itself."""
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
    """The mode's steps so far."""
    for record in wanted.results.report["records"]:
        if record["measure"] == STEP and record["mode"] == mode:
            yield record


def point(wanted: Run, mode: str, length: int) -> Record | None:
    """The step's record, from the file where it is there; None where it cannot be measured."""
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
    """So that no measurement takes the machine down."""
    return int(SHARE_OF_MACHINE * available()) if wanted.device == CPU else wanted.budget


def measured(
    wanted: Run, mode: str, length: int, limit: int | None, *, searched: bool = False
) -> Record:
    """Measure a step and save it.

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
    """A line of progress."""
    if record["outcome"] != DONE:
        return str(record["outcome"])
    rate = record["tokens"] / record["seconds"]
    return f"{record['peak_bytes'] / 2**20:,.0f} MiB, {rate:,.0f} tokens/s"


def budget_of(wanted: Run) -> int:
    """Bytes that the largest length may take; on CUDA the device's."""
    if wanted.budget is not None:
        return wanted.budget
    if wanted.device == CUDA:
        return int(wanted.results.report["facts"]["gpu_bytes"])
    return CPU_BUDGET


def search(wanted: Run, mode: str) -> None:
    """The largest length in the budget, from the points that are there, and a record of it."""
    budget = budget_of(wanted)
    known = any(
        (r["measure"], r.get("mode"), r.get("budget_bytes")) == (LARGEST, mode, budget)
        for r in wanted.results.report["records"]
    )
    if known:
        return
    peaks = {r["length"]: r["peak_bytes"] for r in steps(wanted, mode) if r["outcome"] == DONE}
    fails = None
    if wanted.device == CUDA:
        # The limit of a point was the same; on the CPU it was the machine's.
        gone = [r["length"] for r in steps(wanted, mode) if r["outcome"] != DONE]
        fails = min(gone, default=None)

    def peak_at(length: int) -> float | None:
        record = measured(wanted, mode, length, limit_of(wanted, budget), searched=True)
        if record["outcome"] == FAILED:
            raise OutOfTime(FAILED)
        return record.get("peak_bytes")

    write(wanted, mode, budget, largest(peak_at, peaks, fails, budget, wanted.lengths[0]))


def limit_of(wanted: Run, budget: int) -> int | None:
    """What the process may allocate: on the CPU more than is counted, as threads reserve some."""
    return wanted.budget if wanted.device == CUDA else budget + 2**28


def write(wanted: Run, mode: str, budget: int, bounds: Bounds) -> None:
    """The record; without one where time ran out before anything was known."""
    name = f"largest length, {MODES[mode].says}"
    if bounds.note:
        wanted.results.miss("left_out", name, bounds.note)
        if bounds.fails is None:
            return
    wanted.results.add(
        measure=LARGEST,
        mode=mode,
        budget_bytes=budget,
        length=bounds.fits,
        fails=bounds.fails,
        closed=not bounds.note,
    )
    tqdm.write(f"{name}: {bounds.fits:,}")


def loss(wanted: Run) -> None:
    """The fused loss alone, at lean's chunk."""
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
