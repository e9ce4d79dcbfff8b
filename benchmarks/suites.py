"""Run a suite: its benchmarks one after another, in a process of its own."""

from __future__ import annotations

import dataclasses
import importlib
import multiprocessing
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .settings import Settings

# The benchmarks of each suite, in the order in which they run: each a file bench_NAME.py.
SUITES = {
    "loss": ("ceilings", "row_chunks", "loss"),
    "objectives": ("objectives", "watching"),
    "perplexity": ("perplexity", "online_softmax", "scoring"),
    "step": ("step",),
    "memory": ("memory",),
    "tune": ("launches", "blocks"),
}
NAMES = tuple(name for names in SUITES.values() for name in names)
# The search for constants is for those who change kernels.
ALL = tuple(suite for suite in SUITES if suite != "tune")
# Trainers and tokenizers need it; a machine without it has all other benchmarks.
NEEDS = dict.fromkeys(("scoring", "step", "watching"), "datasets")


def run_apart(suite: str, settings: Settings, out: Path, only: str) -> int | None:
    """Run a suite in a process of its own and return its exit status."""
    process = multiprocessing.get_context("spawn").Process(
        target=run_suite, args=(suite, settings, out, only)
    )
    process.start()
    process.join()
    return process.exitcode


def run_suite(suite: str, settings: Settings, out: Path, only: str) -> None:
    """Run the benchmarks of a suite and exit, with status 1 where one of ours failed."""
    if (suite, settings.device) == ("memory", "cpu"):
        # Kernels get the memory in Triton's interpreter that they get on a GPU. Triton reads this
        # when it is imported, which nothing has done yet.
        os.environ["TRITON_INTERPRET"] = "1"
    from .result_file import Results

    settings = dataclasses.replace(settings, begin=time.monotonic())
    torch.set_num_threads(settings.threads)
    results = Results(suite, settings, out)
    before = set(results.report["failed"])
    for name in SUITES[suite]:
        if only and (name == only.removeprefix("not ")) == only.startswith("not "):
            continue
        results.attempt(name, partial(measure, name, settings, results), ours=True)
    sys.exit(int(bool(results.report["failed"].keys() - before)))


def measure(name: str, settings: Settings, results: Any) -> None:
    """Run one benchmark, whose file is imported only now: no other needs what it needs."""
    try:
        importlib.import_module(NEEDS.get(name, "torch"))
    except ImportError:
        results.miss("left_out", name, f"{NEEDS[name]} is not installed")
        return
    importlib.import_module(f"benchmarks.bench_{name}").measure(settings, results)
