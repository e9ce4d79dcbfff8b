"""Measure everything of a run in the order of its length, and save it as it comes."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from tqdm import tqdm
from transformers import LlamaConfig

from benchmarks.measure import SuiteError
from benchmarks.result_file import OutOfTime, Results
from benchmarks.settings import Settings
from sftmix import SFTMixConfig
from sftmix.plan import plan_step
from sftmix.plan.search import largest_length
from sftmix.recipe.arguments import RunArguments

from .settings import (
    CPU,
    CUDA,
    DONE,
    LARGEST,
    LOSS,
    MODES,
    PREDICTION,
    QUICK_SUBJECT,
    STEP,
    SUBJECTS,
    SUITE,
    Task,
)
from .worker import available, measure

# On the CPU: for the search, what fits in minutes; for one measurement, what the machine can give.
CPU_BUDGET = 2**29
SHARE_OF_MACHINE = 0.8
# Measurements of a search; up to 17 were needed where the answer is 10,000 times the first length.
TRIES = 20
# Facts that have to be the same of all figures of a file.
SAME = ("commit", "cpu", "gpu", "torch", "threads")
Record = dict[str, Any]


class Run:
    """What the command line asks for, and the result file.

    Raises:
        ValueError: an option is wrong; or there is a file of other code, or of another machine.
    """

    def __init__(self, options: Namespace, command: str) -> None:
        self.model, self.device, self.quick = options.model, options.device, options.quick
        self.subject = QUICK_SUBJECT if self.quick else SUBJECTS[self.model]
        self.modes = options.modes or [n for n, m in MODES.items() if self.device in m.devices]
        self.lengths = sorted(options.lengths or self.subject.lengths[self.device])
        self.largest: bool = options.largest
        for name in self.modes:
            if self.device not in MODES[name].devices:
                raise ValueError(f"--modes: {name} is for {MODES[name].devices[0]}")
        if not self.lengths:
            raise ValueError(f"--lengths: {self.model} has none on {self.device}, give some")
        if self.lengths[0] < 2:
            raise ValueError(f"--lengths: expected at least 2 tokens, got {self.lengths[0]}")
        self.settings = Settings(
            self.device,
            self.quick,
            seconds=options.seconds,
            threads=options.threads,
            command=command,
            commit=options.commit,
        )
        suite = f"{SUITE}-{self.model}" + "-predicted" * options.predicted
        self.results = Results(suite, self.settings, options.out)
        self.report = self.results.report
        self.report["facts"]["threads"] = options.threads
        self.report["settings"] = {
            "device": self.device,
            "quick": self.quick,
            "dtype": self.subject.dtype,
            "model": self.model,
            "size": self.subject.model_size,
            "lora_rank": self.subject.lora_rank,
            "predicted": options.predicted,
        }
        if not options.predicted:
            self.go_on()

    def go_on(self) -> None:
        """Take over an earlier run's records, if there is one."""
        file = self.results.file
        if file is None or not file.exists():
            return
        earlier = json.loads(file.read_text("utf-8"))
        old, new = ({**r["facts"], **r["settings"]} for r in (earlier, self.report))
        for name in (*SAME, *self.report["settings"]):
            if old.get(name) != new.get(name):
                raise ValueError(
                    f"{file}: was made with {name} = {old.get(name)!r}, now it is "
                    f"{new.get(name)!r}; give another folder as --out"
                )
        self.report["records"] = earlier["records"]
        self.report["facts"]["command"] = f"{old['command']}; {new['command']}"

    def find(self, measure: str, mode: str) -> list[Record]:
        """Return a measure's records of a mode so far."""
        records = self.report["records"]
        return [r for r in records if (r["measure"], r["mode"]) == (measure, mode)]

    def machine_limit(self) -> int | None:
        """Return what one process may allocate, so that no measurement takes the machine down."""
        return int(SHARE_OF_MACHINE * available()) if self.device == CPU else None

    def measured(self, kind: str, mode: str, length: int, limit: int | None) -> Record:
        """Return what a process measured.

        Raises:
            OutOfTime: it was not done in time.
            SuiteError: it failed by something else than memory.
        """
        threads = self.settings.threads
        task = Task(kind, self.model, self.device, self.quick, threads, length, mode, limit)
        return measure(task, self.settings.left)


def run(wanted: Run) -> int:
    """Measure everything that is not there yet; return 1 where something failed by itself."""
    points = [(mode, length) for length in wanted.lengths for mode in wanted.modes]
    for mode, length in tqdm(points, unit="point", desc=wanted.model):
        # What a shorter one has no memory for, a longer one has not either.
        known = any(
            r["length"] == length or (r["outcome"] != DONE and r["length"] < length)
            for r in wanted.find(STEP, mode)
        )
        if not known:
            work = partial(step, wanted, mode, length, wanted.machine_limit())
            wanted.results.attempt(f"{MODES[mode].says}, {length:,}", work, ours=True)
    if wanted.largest:
        for mode in tqdm(wanted.modes, unit="mode", desc="largest length"):
            search(wanted, mode)
    if not wanted.find(LOSS, "lean"):
        wanted.results.attempt("loss alone", partial(loss, wanted), ours=True)
    return int(bool(wanted.report["failed"]))


def step(
    wanted: Run, mode: str, length: int, limit: int | None, *, searched: bool = False
) -> Record:
    """Measure a step, save it and return its record.

    Raises:
        OutOfTime, SuiteError: as of `Run.measured`.
    """
    found = wanted.measured(STEP, mode, length, limit)
    fields = {"mode": mode, "length": length, "limit_bytes": limit, "searched": searched}
    wanted.results.add(measure=STEP, **fields, **found)
    says = found["outcome"]
    if says == DONE:
        rate = found["tokens"] / found["seconds"]
        says = f"{found['peak_bytes'] / 2**20:,.0f} MiB, {rate:,.0f} tokens/s"
    tqdm.write(f"{MODES[mode].says}, {length:,}: {says}")
    return found


def search(wanted: Run, mode: str) -> None:
    """Find the largest length in the device's memory, starting from the points that are there.

    No record is written where nothing was found to fail.
    """
    if wanted.find(LARGEST, mode):
        return
    steps = wanted.find(STEP, mode)
    peaks = {r["length"]: r["peak_bytes"] for r in steps if r["outcome"] == DONE}
    limit: int | None
    # More than is counted, for threads.
    budget, limit = CPU_BUDGET, CPU_BUDGET + 2**28
    if wanted.device == CUDA:
        budget, limit = int(wanted.report["facts"]["gpu_bytes"]), None
        # The limit of a point was the same; on the CPU it was the machine's.
        for gone in [r["length"] for r in steps if r["outcome"] != DONE]:
            peaks[gone] = beyond(peaks, gone, budget)

    def peak_of(length: int) -> int:
        record = step(wanted, mode, length, limit, searched=True)
        peaks[length] = record.get("peak_bytes") or beyond(peaks, length, budget)
        return peaks[length]

    name = f"largest length, {MODES[mode].says}"
    try:
        note = searched(peak_of, peaks, budget, wanted.lengths[0])
    except SuiteError as reason:
        return wanted.results.miss("failed", name, str(reason))
    fits, fails = bounds(peaks, budget)
    if note:
        wanted.results.miss("left_out", name, note)
    if fails is not None or not note:
        fields = {"mode": mode, "budget_bytes": budget, "length": fits, "fails": fails}
        wanted.results.add(measure=LARGEST, **fields, closed=not note)
        tqdm.write(f"{name}: {fits:,}")


def searched(peak_of: Callable[[int], int], peaks: dict[int, int], budget: int, start: int) -> str:
    """Measure until both bounds are in ``peaks``, which `peak_of` adds to; return what hindered it.

    ``start`` is the length to begin with where fewer than two are known.
    """
    left = iter(range(TRIES))

    def measured(length: int) -> int:
        if next(left, None) is None:
            raise OutOfTime(f"{TRIES} measurements were not enough")
        return peak_of(length)

    try:
        while len(peaks) < 2:
            measured(start * 2 ** len(peaks))
        largest_length(measured, budget, peaks)
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


def loss(wanted: Run) -> None:
    """Measure the fused loss without a model, at lean's chunk.

    Raises:
        SuiteError: it takes more memory than there is.
    """
    found = wanted.measured(LOSS, "lean", 0, wanted.machine_limit())
    if found["outcome"] != DONE:
        raise SuiteError(found["outcome"])
    for one in found["workspaces"]:
        wanted.results.add(measure=LOSS, mode="lean", **one)


def predict(wanted: Run) -> int:
    """Write what `sftmix plan` says of our modes; nothing is measured here."""
    subject = wanted.subject
    arguments = RunArguments(
        model="", data=[], output="", dtype=subject.dtype, lora_rank=subject.lora_rank
    )
    points = [(m, n) for m in wanted.modes if MODES[m].ours for n in wanted.lengths]
    for mode, length in tqdm(points, unit="plan", desc=wanted.model):
        options: dict[str, Any] = {"output_dir": "", "use_cpu": True, **MODES[mode].options}
        config = SFTMixConfig(**options, per_device_train_batch_size=2)
        model = LlamaConfig(**subject.model_size)
        plan = plan_step(model, arguments, config, length, on_cpu=wanted.device == CPU)
        wanted.results.add(
            measure=PREDICTION,
            mode=mode,
            length=length,
            peak_bytes=plan.peak,
            host_bytes=plan.host,
            moment=plan.moment,
            parts=plan.parts,
        )
    return 0
