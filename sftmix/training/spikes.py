"""Spikes: steps whose loss or gradient norm lies far above that of the steps before."""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from pathlib import Path

from sftmix.runs.folders import write_json
from sftmix.runs.ranks import is_main

# Steps that a step is held beside: the last of them, and how many there have to be.
WINDOW, FEWEST = 100, 20


class Spikes:
    """Finds spikes in a training's steps; what it has seen travels with checkpoints.

    A value is one if it is above ``mean + threshold * sd`` of the up to 100 steps before it, at
    least 20, spikes among them too; ``sd`` is the sample standard deviation.

    >>> spikes = Spikes(threshold=3.0)
    >>> for step in range(20):
    ...     _ = spikes.add(loss=2.0 + step % 2, norm=1.0)
    >>> spikes.add(loss=9.0, norm=1.0)
    'loss 9 (mean 2.5, sd 0.513 of 20 steps)'
    """

    FILE = "spikes.json"

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.seen = {name: deque[float](maxlen=WINDOW) for name in ("loss", "gradient norm")}

    def add(self, *, loss: float, norm: float) -> str:
        """Take a step, and return in words what spikes in it, or nothing."""
        values = {"loss": loss, "gradient norm": norm}
        return ", ".join(filter(None, (self._spike(name, values[name]) for name in self.seen)))

    def _spike(self, name: str, value: float) -> str:
        seen, says = self.seen[name], ""
        if len(seen) >= FEWEST:
            mean, deviation = statistics.fmean(seen), statistics.stdev(seen)
            if value > mean + self.threshold * deviation:
                of = f"mean {mean:.4g}, sd {deviation:.3g} of {len(seen)} steps"
                says = f"{name} {value:.4g} ({of})"
        # fp16's scaler leaves a step out whose gradients overflow.
        if math.isfinite(value):
            seen.append(value)
        return says

    def save(self, folder: Path) -> None:
        """Put what was seen into a checkpoint."""
        if is_main():
            write_json(folder / self.FILE, {name: list(seen) for name, seen in self.seen.items()})

    def load(self, folder: Path) -> None:
        """Load what a checkpoint has; one of a training that looked for no spikes has nothing."""
        path = folder / self.FILE
        state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for name, seen in self.seen.items():
            seen.extend(state.get(name, ()))
