"""Which runs there are, in which order, and which is next.

A run is one process' work of some minutes and one JSON file. Runs of one data set and seed:

    prepare     tokens, and what the lower layers give for them           (kept in --cache)
    rate-R      NTP with the learning rate R, on the search's seed
    reference   one epoch that scores the training examples               (kept in --cache)
    other       the same by another model, whose halves a system uses     (likewise)
    mu-M        SFTMix with mu = M, on the search's seed
    base, ntp, sftmix, ...    the systems, on the seeds of the study
"""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.study.settings import SYSTEMS
from sftmix.runs.folders import lock_run

from .settings import ANOTHER_MU, BASE, BY_OTHER, SEARCH_SEED, TRAINED, Sizes

PREPARE, REFERENCE, OTHER, RATE, MU = "prepare", "reference", "other", "rate", "mu"
LOCKS = "locks"
# CPU seconds of a run of which none is done yet, to begin with.
SECONDS = {PREPARE: 150.0, REFERENCE: 110.0, OTHER: 110.0, BASE: 30.0}
OTHERWISE = 180.0


@dataclass(frozen=True)
class Run:
    """One run: a data set, a seed, and what is done."""

    data: str
    seed: int
    what: str  # prepare, reference, other, rate-R, mu-M or a system

    @property
    def name(self) -> str:
        """Return the name of its file."""
        return f"{self.data}-{'search' if self.seed == SEARCH_SEED else self.seed}-{self.what}"

    @property
    def kind(self) -> str:
        """Return ``what`` without a number."""
        return self.what if self.what in SYSTEMS else self.what.partition("-")[0]

    @property
    def number(self) -> float:
        """Return the R or M of a run of the search."""
        return float(self.what.partition("-")[2])


@dataclass(frozen=True)
class Plan:
    """All runs of some data sets and seeds, and where they are kept."""

    data: tuple[str, ...]
    seeds: tuple[int, ...]
    sizes: Sizes
    out: Path
    cache: Path | None = None  # None: only looked at
    systems: tuple[str, ...] = TRAINED

    def searched(self, data: str, kind: str) -> list[Run]:
        """Return the runs of the search for a rate or a mu."""
        numbers = self.sizes.learning_rates if kind == RATE else self.sizes.mus
        return [Run(data, SEARCH_SEED, f"{kind}-{number:g}") for number in numbers]

    def runs(self) -> list[Run]:
        """Return all runs: the search, then seed by seed, so that systems have equally many."""
        found = []
        for data in self.data:
            found += [Run(data, SEARCH_SEED, PREPARE), *self.searched(data, RATE)]
            found += [Run(data, SEARCH_SEED, REFERENCE), *self.searched(data, MU)]
        scorings = (REFERENCE, OTHER) if BY_OTHER in self.systems else (REFERENCE,)
        for seed in self.seeds:
            for data in self.data:
                found += [
                    Run(data, seed, what) for what in (PREPARE, *scorings, BASE, *self.systems)
                ]
        return found

    def needs(self, run: Run) -> list[Run]:
        """Return the runs without which a run cannot be made."""
        prepared = Run(run.data, run.seed, PREPARE)
        if run.what == PREPARE:
            return []
        if run.kind in (RATE, BASE):
            return [prepared]
        rates = self.searched(run.data, RATE)
        if run.what in (REFERENCE, OTHER):
            return [prepared, *rates]
        mus = self.searched(run.data, MU) if run.what == ANOTHER_MU else []
        other = [Run(run.data, run.seed, OTHER)] if run.what == BY_OTHER else []
        return [prepared, *rates, Run(run.data, run.seed, REFERENCE), *other, *mus]

    def file(self, run: Run) -> Path:
        """Return the path of a run's result."""
        return self.out / f"{run.name}.json"

    def kept(self, run: Run) -> Path | None:
        """Return the path of what a run leaves in the cache, None if nothing."""
        ending = {PREPARE: "safetensors", REFERENCE: "parquet", OTHER: "parquet"}.get(run.what)
        if ending is None or self.cache is None:
            return None
        return self.cache / f"{run.name}.{ending}"

    def done(self, run: Run) -> bool:
        """Tell whether a run is finished, and what it left in the cache still there."""
        kept = self.kept(run)
        return self.file(run).exists() and (kept is None or kept.exists())

    def record(self, run: Run) -> dict[str, Any]:
        """Return a finished run's result."""
        record: dict[str, Any] = json.loads(self.file(run).read_text(encoding="utf-8"))
        return record

    def wanted(self, run: Run) -> bool:
        """Tell whether a run is yet to be made.

        One that only fills the cache is not, once all that need it are done.
        """
        if self.done(run):
            return False
        if not self.file(run).exists():
            return True
        return any(run in self.needs(other) and self.wanted(other) for other in self.runs())

    def ready(self) -> list[Run]:
        """Return the runs that can be made now, the next first: within a seed the longest."""
        left = [run for run in self.runs() if self.wanted(run)]
        able = [run for run in left if all(map(self.done, self.needs(run)))]
        turns = {SEARCH_SEED: -1, **{seed: turn for turn, seed in enumerate(self.seeds)}}
        seconds = self.seconds()
        return sorted(able, key=lambda run: (turns[run.seed], -seconds(run)))

    def seconds(self) -> Callable[[Run], float]:
        """Return a function that estimates a run's CPU seconds by those that are done."""
        known: dict[tuple[str, str], list[float]] = {}
        for run in self.runs():
            if self.file(run).exists():
                known.setdefault((run.data, run.kind), []).append(self.record(run)["cpu_seconds"])

        def estimate(run: Run) -> float:
            same = known.get((run.data, run.kind))
            alike = [s for (_, kind), values in known.items() if kind == run.kind for s in values]
            if same or alike:
                return statistics.fmean(same or alike)
            return SECONDS.get(run.what, OTHERWISE)

        return estimate

    @contextlib.contextmanager
    def claimed(self, run: Run) -> Iterator[bool]:
        """Hold a run's lock; hand out whether nobody else holds it or has made the run meanwhile.

        The system drops the lock of a process that ends, however it ends.
        """
        folder = self.out / LOCKS / run.name
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lock_run(folder))
            except ValueError:
                yield False
                return
            yield self.wanted(run)

    def status(self, processes: int = 2) -> str:
        """Return how much is done and what is left, in words, a line for each data set."""
        estimate, runs = self.seconds(), self.runs()
        left = [run for run in runs if not self.file(run).exists()]
        lines = []
        for data in self.data:
            own = [run for run in runs if run.data == data]
            done = [run for run in own if run not in left]
            lines.append(f"{data:<10}{len(done):>4} of {len(own)} runs done")
        running = [run.name for run in left if self._is_held(run)]
        seconds = sum(map(estimate, left))
        spent = sum(self.record(run)["cpu_seconds"] for run in runs if run not in left)
        lines.append(f"running: {', '.join(running) or 'none'}")
        lines.append(
            f"{len(left)} left: {seconds / 3600:.1f} core-hours, {seconds / 3600 / processes:.1f} "
            f"h on {processes} free cores; {spent / 3600:.1f} core-hours spent"
        )
        return "\n".join(lines)

    def _is_held(self, run: Run) -> bool:
        folder = self.out / LOCKS / run.name
        if not folder.exists():
            return False
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lock_run(folder))
            except ValueError:
                return True
        return False
