"""The result file of a run: facts, records, and what is missing and why; saved as it grows."""

from __future__ import annotations

import json
import os
import statistics
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from triton import TritonError

from .measure import facts
from .settings import Settings
from .tables import duration

# What may come of a kernel, a compiler or a peer's interface: one that does not run must not take
# the others' figures along.
FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    AssertionError,
    ImportError,
    NotImplementedError,
    TritonError,
)
OUT_OF_TIME = "out of time"
Found = TypeVar("Found")


class OutOfTime(Exception):
    """A measurement was not done in the time there was."""


class Results:
    """`{device}-{suite}.json`, written whole after every record: a killed run keeps its figures.

    With ``settings.keep`` it goes on with the records of the file that is there.
    """

    def __init__(self, suite: str, settings: Settings, folder: Path | None = None) -> None:
        self.settings = settings
        quick = "-quick" if settings.quick else ""
        self.file = folder and folder / f"{settings.device}-{suite}{quick}.json"
        found = facts()
        found["commit"] = settings.commit or found["commit"]
        self.report: dict[str, Any] = {
            "suite": suite,
            "facts": {**found, "command": settings.command},
            "settings": settings.facts(),
            "records": [],
            "left_out": {},
            "failed": {},
        }
        if settings.keep and self.file and self.file.exists():
            before = json.loads(self.file.read_text("utf-8"))
            for kept in ("records", "left_out", "failed"):
                self.report[kept] = before[kept]

    def add(self, **record: Any) -> None:
        """Add one figure, a flat record."""
        self.report["records"].append(record)
        self.save()

    def add_times(self, seconds: Sequence[float], **record: Any) -> None:
        """Add one provider's times, and print them."""
        low = high = middle = statistics.median(seconds)
        if len(seconds) > 1:
            low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        times = {"median": middle, "q1": low, "q3": high, "rounds": len(seconds)}
        # Each round's too, for quotients by rounds.
        self.add(**record, **times, seconds=[round(one, 9) for one in seconds])
        names = ("measure", "case", "kind", "task", "who")
        said = ", ".join(str(record[name]) for name in names if name in record)
        print(f"{duration(middle):>9} ({duration(low)} to {duration(high)}): {said}", flush=True)

    def miss(self, kind: Literal["left_out", "failed"], name: str, reason: str) -> None:
        """Note something without a figure, and print why."""
        self.report[kind][name] = " ".join(reason.split())[:500]
        print(f"{kind.replace('_', ' ')}: {name}: {self.report[kind][name]}", flush=True)
        self.save()

    def leave_out(self, reasons: Mapping[str, str]) -> None:
        """Note everyone who takes no part."""
        for name, reason in reasons.items():
            self.miss("left_out", name, reason)

    def attempt(self, name: str, work: Callable[[], Found], ours: bool) -> Found | None:
        """Return what the work returns; None, and a note, where it fails or does not fit.

        It is not begun when the run's time is over.
        """
        if self.settings.out_of_time:
            self.miss("left_out", name, OUT_OF_TIME)
            return None
        try:
            return work()
        except OutOfTime as error:
            self.miss("left_out", name, str(error))
        except torch.OutOfMemoryError as error:
            self.miss("left_out", name, f"does not fit: {str(error).splitlines()[0]}")
        except FAILURES as error:
            reason = f"{type(error).__name__}: {error}"
            if ours:
                traceback.print_exc(file=sys.stdout)
                self.miss("failed", name, reason)
            else:
                self.miss("left_out", name, f"FAILED {reason}")
        return None

    def save(self) -> None:
        """Write the file, in one piece."""
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, self.file)
