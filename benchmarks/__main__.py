"""``python -m benchmarks [SUITE] [options]``: run all suites or one; ``--json FILE`` keeps it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from . import bench_sftmix_loss, bench_step
from .measure import facts

# Of each suite: its module and the options that its `run` takes.
SUITES = {
    "sftmix_loss": (bench_sftmix_loss, ("pairs", "hidden_size", "vocab_size", "repeats")),
    "step": (bench_step, ("batch", "length", "step_repeats")),
}
OPTIONS = {
    "pairs": 2048,
    "hidden_size": 512,
    "vocab_size": 32000,
    "repeats": 5,
    "batch": 16,
    "length": 128,
    "step_repeats": 30,
    "threads": 2,
}


def main(arguments: list[str] | None = None) -> None:
    """Run, print, and write down."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suite", nargs="?", choices=SUITES, help="by default all")
    for name, default in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    for name in OPTIONS:
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1")
    torch.set_num_threads(options.threads)
    report: dict[str, object] = {"facts": facts()}
    for name, (suite, takes) in SUITES.items():
        if options.suite in (None, name):
            settings = {option: getattr(options, option) for option in takes}
            print(f"{name}: {suite.__doc__}\n{settings}")
            report[name] = {"settings": settings, **suite.run(*settings.values())}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
