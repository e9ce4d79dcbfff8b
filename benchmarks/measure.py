"""What every benchmark measures alike: time side by side, memory, and the machine."""

from __future__ import annotations

import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch


class Seconds(NamedTuple):
    """Median and quartiles of one provider's repeats."""

    median: float
    low: float
    high: float


def interleaved_seconds(
    steps: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, Seconds]:
    """Time of each step, after one warm-up, taking turns so that a slow minute hits all alike."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            samples[name].append(time.perf_counter() - start)
    return {name: summary(values) for name, values in samples.items()}


def summary(values: list[float]) -> Seconds:
    """Median and quartiles; of fewer than two values, the value itself."""
    if len(values) < 2:
        return Seconds(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Seconds(median, low, high)


def peak_extra_bytes(step: Callable[[], object]) -> int:
    """Highest sum of tensor bytes alive at once that ``step`` allocated, on the CPU.

    Counts every allocation of PyTorch's CPU allocator, inside of registered ops too. Scratch
    memory that a BLAS library takes for itself is not counted, for any provider.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = step()
    del kept
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in results.events()
        if event.name() == "[memory]"
    )
    alive = peak = 0
    for _, change in changes:
        alive += change
        peak = max(peak, alive)
    return peak


def facts() -> dict[str, str | int]:
    """Machine, versions, commit and date, so that a figure can be held beside another."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "machine": platform.platform(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def git_commit() -> str:
    """Commit of the working tree, with ``-dirty`` where it has changes; empty outside of git."""
    here = Path(__file__).resolve().parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
