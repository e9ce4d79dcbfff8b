"""Measure time side by side, and describe the machine."""

from __future__ import annotations

import datetime
import platform
import random
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

Key = TypeVar("Key")
# Who takes so many times as long as the fastest sits out, after so many rounds.
SLOW, SLOW_ROUNDS = 4, 4
# The packages whose versions a figure depends on.
PACKAGES = (
    "numpy",
    "transformers",
    "accelerate",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
)
SMI_FIELDS = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"


class SuiteError(RuntimeError):
    """Something that a suite needs is missing, or what it would time is wrong."""


def interleaved_samples(
    steps: Mapping[Key, Callable[[], object]],
    repeats: int,
    device: str = "cpu",
    prepare: Callable[[], object] | None = None,
    says: str = "",
    warm: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> dict[Key, list[float]]:
    """Return the seconds of each step; steps take turns, so that a slow minute hits all alike.

    Each round has an order of its own, the same in every run: what a step leaves behind, as memory
    to be given back, is not always the same one's to bear. Who is slow (`SLOW`) takes part in the
    first rounds only, to leave time for more of the others.

    Args:
        repeats: rounds; one without times goes before, unless ``warm``.
        device: on CUDA a time is that between two events.
        prepare: runs before every step, outside of its time; on CUDA by default `L2Scrub`.
        says: names the progress bar; none without it.
        stop: is asked after each round whether to end here; what was measured is kept.
    """
    samples: dict[Key, list[float]] = {name: [] for name in steps}
    if prepare is None and device != "cpu":
        prepare = L2Scrub()
    first = 0 if warm else -1
    for number in tqdm(range(first, repeats), desc=says, unit="round", disable=not says):
        # Read only after the round: waiting for each step would leave the device idle before the
        # next, whose launch would then count as its time.
        pending, enough = {}, number >= SLOW_ROUNDS
        fastest = min(min(found) for found in samples.values()) if enough else 0.0
        for name in random.Random(number).sample(list(steps), len(steps)):
            if enough and min(samples[name]) > SLOW * fastest:
                continue
            if prepare:
                prepare()
            pending[name] = started(steps[name], device)
        for name, seconds in pending.items():
            spent = seconds()
            if number >= 0:
                samples[name].append(spent)
        if number >= 0 and stop():
            break
    return samples


def started(step: Callable[[], object], device: str) -> Callable[[], float]:
    """Start a step; return what waits for it and gives its seconds."""
    if device == "cpu":
        start = time.perf_counter()
        step()
        spent = time.perf_counter() - start
        return lambda: spent
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()

    def seconds() -> float:
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return seconds


class L2Scrub:
    """Overwrite 512 MiB, more than any L2 holds, so that no step finds its inputs there.

    It also keeps the device busy while the host launches what is to be timed.
    """

    def __init__(self) -> None:
        self.buffer = torch.empty(2**29, dtype=torch.int8, device="cuda")

    def __call__(self) -> None:
        self.buffer.zero_()


def facts() -> dict[str, Any]:
    """Return machine, versions, commit and date, so that a figure can be held beside another."""
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "machine": platform.platform(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "packages": {name: found for name in PACKAGES if (found := version(name))},
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        smi = ("nvidia-smi", "--format=csv,noheader", "--id=0")
        found |= {
            "gpu": properties.name,
            "gpu_bytes": properties.total_memory,
            "gpu_processors": properties.multi_processor_count,
            "cuda": torch.version.cuda or "",
            "driver": said(*smi, "--query-gpu=driver_version"),
            "nvidia_smi": said(*smi, f"--query-gpu={SMI_FIELDS}"),
        }
    return found


def version(package: str) -> str:
    """Return the package's version, empty where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def git_commit() -> str:
    """Return the working tree's commit, ``-dirty`` if it has changes; empty outside of git."""
    return said("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def said(*command: str) -> str:
    """Return what a command prints; empty without the command, or where it takes long."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            command, cwd=here, capture_output=True, text=True, check=False, timeout=30
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def cpu_name() -> str:
    """Return the processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
