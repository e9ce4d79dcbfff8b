"""What result files say: peaks, speeds, largest lengths, and what was promised of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.targets import TOO_SMALL, Target, at_least, at_most, ratio

from .runs import LARGEST, LOSS, PREDICTION, STEP, SUITE
from .settings import CPU, CUDA, MODES
from .worker import DONE

Record = Mapping[str, Any]
PROMISED, STRETCH = 131072, 300_000
JUDGED = 16384  # tokens of each sequence, on the CPU


@dataclass(frozen=True)
class Results:
    """The figures of one model on one device; of predictions alone where nothing was measured."""

    model: str
    device: str
    measured: Mapping[str, Any] | None
    predicted: Mapping[str, Any] | None

    @property
    def quick(self) -> bool:
        """Whether the figures mean nothing."""
        return any(one["settings"]["quick"] for one in (self.measured, self.predicted) if one)

    def records(self, measure: str) -> list[Record]:
        """Of one measure, in the file's order."""
        source = self.predicted if measure == PREDICTION else self.measured
        return [r for r in source["records"] if r["measure"] == measure] if source else []

    def steps(self, mode: str) -> dict[int, Record]:
        """By length, those that ran to the end."""
        return {
            r["length"]: r for r in self.records(STEP) if r["mode"] == mode and r["outcome"] == DONE
        }

    def failing(self, mode: str) -> int | None:
        """The shortest length that had no memory."""
        found = (
            r["length"] for r in self.records(STEP) if r["mode"] == mode and r["outcome"] != DONE
        )
        return min(found, default=None)

    def predictions(self, mode: str) -> dict[int, int]:
        """Bytes at the peak, by length."""
        found = (r for r in self.records(PREDICTION) if r["mode"] == mode)
        return {r["length"]: r["peak_bytes"] for r in found}

    def largest(self, mode: str) -> Record | None:
        """The search's record, which has both bounds."""
        found = (r for r in self.records(LARGEST) if r["mode"] == mode and r["closed"])
        return next(found, None)

    def longest(self, mode: str) -> int | None:
        """The longest that ran."""
        return max(self.steps(mode), default=None)

    def over_prediction(self) -> dict[str, float]:
        """How far a measured peak is from its prediction, as a share, by mode and length."""
        return {
            f"{MODES[mode].says}, {length:,} tokens": abs(predicted / step["peak_bytes"] - 1)
            for mode in MODES
            for length, predicted in self.predictions(mode).items()
            if (step := self.steps(mode).get(length)) is not None
        }


def read(folder: Path) -> list[Results]:
    """All of a folder, one for each device and model; quick runs where there are no others."""
    files = sorted(folder.glob(f"*-{SUITE}-*.json"))
    found = [json.loads(file.read_text("utf-8")) for file in files]
    found = [one for one in found if not one["settings"]["quick"]] or found
    names = dict.fromkeys((r["settings"]["device"], r["settings"]["model"]) for r in found)
    results = []
    for device, model in names:
        own = [
            r for r in found if (r["settings"]["device"], r["settings"]["model"]) == (device, model)
        ]
        measured = (r for r in own if not r["settings"]["predicted"])
        predicted = (r for r in own if r["settings"]["predicted"])
        results.append(Results(model, device, next(measured, None), next(predicted, None)))
    return results


def targets(results: Results) -> list[Target]:
    """All promises; those that are not measured say so."""
    found = []
    if (results.device, results.model) == (CUDA, "8B"):
        found += cuda_targets(results)
    if (results.device, results.model) == (CPU, "toy"):
        found += cpu_targets(results)
    found += common_targets(results)
    if results.quick:
        found = [one._replace(reached=None, note=TOO_SMALL) for one in found]
    return found


def cuda_targets(results: Results) -> list[Target]:
    """Of the 8B-shaped model."""
    longest = results.longest("lean")
    says = "lean, tokens of each sequence without offload"
    return [
        at_least(says, longest, PROMISED),
        *(
            at_most(f"{MODES[mode].says} fails at, tokens", results.failing(mode), PROMISED // 4)
            for mode in ("dense", "dense-checkpointed")
        ),
        at_least(f"{says}, stretch", longest, STRETCH),
    ]


def cpu_targets(results: Results) -> list[Target]:
    """Of the toy."""
    lean, dense = (
        (results.steps(mode).get(JUDGED) or {}).get("process_bytes") for mode in ("lean", "dense")
    )
    says = f"lean / {MODES['dense'].says}, the process' peak at {JUDGED:,} tokens"
    return [at_most(says, ratio(lean, dense), 0.25)]


def common_targets(results: Results) -> list[Target]:
    """Of every model."""
    lengths: list[float | None] = []
    for mode in ("lean", "lean-ntp"):
        record = results.largest(mode)
        lengths.append(None if record is None else record["length"])
    losses = sorted(results.records(LOSS), key=lambda record: record["rows"])
    spaces = [record["workspace_bytes"] for record in losses]
    errors = {
        f"{r['rows']:,} rows": abs(r["formula_bytes"] / r["workspace_bytes"] - 1) for r in losses
    }
    growth = ratio(spaces[-1], spaces[0]) if len(spaces) > 1 else None
    rows = f"{losses[0]['rows']:,} to {losses[-1]['rows']:,} rows" if losses else ""
    return [
        at_least("largest length, lean / lean of NTP alone", ratio(*lengths), 0.98),
        at_most("the loss's workspace, most rows / fewest", growth, 1.05, rows),
        worst("the loss's workspace, off its formula by", errors, 0.10),
        worst("the step's peak, off its prediction by", results.over_prediction(), 0.15),
    ]


def worst(says: str, errors: Mapping[str, float], limit: float) -> Target:
    """The largest of some errors, with its name."""
    name = max(errors, key=lambda one: errors[one], default=None)
    return at_most(says, None if name is None else errors[name], limit, name or "")


def lengths_of(records: Iterable[Record]) -> list[int]:
    """All lengths of some records, but for those that a search alone went to."""
    return sorted({record["length"] for record in records if not record.get("searched")})
