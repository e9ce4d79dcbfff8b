"""Run one measurement in a process of its own, so that no other adds to its peak.

`measure` starts the process; `main` runs in it and writes one line of JSON.

On the CPU the peak is what the system counts, the process's highest resident set (VmHWM), and its
growth since before the model was built. glibc keeps freed blocks below a threshold that grows up
to 32 MiB; `ENVIRONMENT` fixes the threshold at 64 KiB, for all modes alike, so that the memory of a
freed tensor goes back to the system and the peak is what tensors hold (toy, 4,096 tokens: growth by
272 MiB instead of 718 in lean, 867 instead of 1,117 in plain).
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import SuiteError
from benchmarks.result_file import OutOfTime

from .settings import CPU, DONE, LOSS, NO_MEMORY, QUICK_SUBJECT, QUICK_TOKENS, STEP, Task

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**16),
    "MALLOC_TRIM_THRESHOLD_": str(2**16),
    "MALLOC_TOP_PAD_": "0",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "TOKENIZERS_PARALLELISM": "false",
}
# What PyTorch's CPU allocator says, and CUDA of pinned memory; they have no exception of their own.
WITHOUT_MEMORY = ("can't allocate memory", "CUDA error: out of memory")
KILLED = 137  # by the system, for the memory that it took


def measure(task: Task, seconds: float) -> dict[str, Any]:
    """Return a task's record: its ``outcome`` and, where that is `DONE`, figures.

    Raises:
        OutOfTime: it was not done after ``seconds``.
        SuiteError: the process failed by something else than memory.
    """
    if seconds <= 0:
        raise OutOfTime("not begun")
    command = [sys.executable, "-m", "benchmarks.long_sequence.worker", json.dumps(asdict(task))]
    env = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(task.threads)}
    timeout = None if seconds == math.inf else seconds
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired as expired:
        raise OutOfTime(f"not done after {seconds:.0f} s") from expired
    if done.returncode in (-9, KILLED):
        return {"outcome": NO_MEMORY, "says": "killed by the system"}
    if done.returncode:
        raise SuiteError(f"exit status {done.returncode}: {done.stderr.strip()[-400:]}")
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


def main(words: list[str]) -> None:
    """Measure the task of the one argument."""
    print(json.dumps(run(Task(**json.loads(words[0])))))


def run(task: Task) -> dict[str, Any]:
    """Return the task's figures, measured in this process."""
    # Imported first: none of it is the model's.
    import resource

    from .loss import loss_workspaces
    from .step import train_pair

    torch.set_num_threads(task.threads)
    if task.device == CPU and task.kind == STEP:
        # A tiny model's step loads what libraries load at their first call: it is not the model's.
        with tempfile.TemporaryDirectory() as folder:
            train_pair(QUICK_SUBJECT, task.mode, QUICK_TOKENS, task.device, folder)
    before = memory("VmRSS")
    if task.limit_bytes is not None:
        most = memory("VmData") + task.limit_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    start = time.perf_counter()
    try:
        if task.kind == LOSS:
            found = loss_workspaces(task)
        else:
            with tempfile.TemporaryDirectory() as folder:
                found = train_pair(task.subject, task.mode, task.length, task.device, folder)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return {"outcome": NO_MEMORY, "says": str(error).splitlines()[0][:200]}
    host = memory("VmHWM")
    if task.device == CPU and task.kind == STEP:
        found["peak_bytes"] = host - before
    return {
        "outcome": DONE,
        **found,
        "process_bytes": host,
        "before_bytes": before,
        "process_seconds": time.perf_counter() - start,
    }


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception of a training step says that memory is used up."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(words in str(error) for words in WITHOUT_MEMORY)


def memory(name: str, file: Path = Path("/proc/self/status")) -> int:
    """Return a figure of this process, or of another file of /proc, in bytes.

    Raises:
        SuiteError: the system has no such file; only Linux does.
    """
    if not file.exists():
        raise SuiteError(f"{file}: not found; peaks of processes are read there, on Linux alone")
    line = next(line for line in file.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def available() -> int:
    """Return what this machine can still give, in bytes."""
    return memory("MemAvailable", Path("/proc/meminfo"))


if __name__ == "__main__":
    main(sys.argv[1:])
