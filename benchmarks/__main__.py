"""``python -m benchmarks [SUITE] [options]``: run all suites or one; ``--json FILE`` keeps it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from . import bench_sftmix_loss
from .measure import facts

SUITES = {"sftmix_loss": bench_sftmix_loss}


def main(arguments: list[str] | None = None) -> None:
    """Run, print, and write down."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suite", nargs="?", choices=SUITES, help="by default all")
    parser.add_argument("--pairs", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    for name in ("pairs", "hidden_size", "vocab_size", "repeats", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1")
    torch.set_num_threads(options.threads)
    settings = {
        name: value for name, value in vars(options).items() if name not in ("suite", "json")
    }
    report: dict[str, object] = {"facts": facts(), "settings": settings}
    for name, suite in SUITES.items():
        if options.suite in (None, name):
            print(f"{name}: {suite.__doc__}\n{settings}")
            report[name] = suite.run(
                options.pairs, options.hidden_size, options.vocab_size, options.repeats
            )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
