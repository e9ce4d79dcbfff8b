"""Write profile.txt: where the time of one step of each schedule goes, kernel by kernel."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench_loss import OURS, SCHEDULES, step
from benchmarks.inputs import Inputs, make_inputs
from benchmarks.records import BOTH, FILTERED, NTP
from benchmarks.settings import Settings

# Lines of each table.
LINES = 25


def main() -> int:
    """Return exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args()
    settings = Settings(options.device, quick=options.device == "cpu", short=True)
    (case,) = settings.cases()
    x = make_inputs(case.rows // 2, *case.sizes, settings.dtype, settings.device, trained=True)
    with (options.out / "profile.txt").open("w", encoding="utf-8") as file:
        for who, schedule in SCHEDULES.items():
            if who == FILTERED or (who != "sftmix, row_chunks" and options.device == "cpu"):
                continue
            for task in (BOTH, NTP):
                table = profiled(partial(OURS[task], schedule=schedule), x)
                print(f"{who}, {task}, {case.name}\n{table}", file=file, flush=True)
    print(options.out / "profile.txt")
    return 0


def profiled(loss: partial[torch.Tensor], x: Inputs) -> str:
    """Return the table of one step, after one that compiles and fills caches."""
    step(loss, x)
    activities, order = [ProfilerActivity.CPU], "self_cpu_time_total"
    if x.hidden.is_cuda:
        torch.cuda.synchronize()
        activities, order = [*activities, ProfilerActivity.CUDA], "self_cuda_time_total"
    with profile(activities=activities) as found:
        step(loss, x)
        if x.hidden.is_cuda:
            torch.cuda.synchronize()
    return str(found.key_averages().table(sort_by=order, row_limit=LINES, max_name_column_width=70))


if __name__ == "__main__":
    sys.exit(main())
