"""Measure long sequences: peak, tokens a second and largest length of every way to train.

python -m benchmarks.long_sequence run --model toy --device cpu --out runs/long --largest
python -m benchmarks.long_sequence predict --model 8B --device cuda --out runs/long
python -m benchmarks.long_sequence plot runs/long
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .report import write
from .settings import MODES, SUBJECTS

PROG = "python -m benchmarks.long_sequence"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the three commands."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, dest="name")
    for name, says in (
        ("run", "measure; goes on with what DIR has"),
        ("predict", "what `sftmix plan` says of our modes; needs no GPU"),
    ):
        one = commands.add_parser(name, help=says, allow_abbrev=False)
        one.set_defaults(largest=False, seconds=math.inf, threads=2, predicted=True)
        one.add_argument("--model", choices=tuple(SUBJECTS), required=True)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        one.add_argument("--device", choices=("cpu", "cuda"), default=device)
        one.add_argument(
            "--out", type=Path, required=True, metavar="DIR", help="for the result file"
        )
        one.add_argument(
            "--modes",
            nargs="+",
            choices=tuple(MODES),
            metavar="MODE",
            help=f"of {', '.join(MODES)}; default: all of the device",
        )
        one.add_argument(
            "--lengths",
            nargs="+",
            type=int,
            metavar="L",
            help="tokens of each of the two sequences; default: the model's",
        )
        one.add_argument("--quick", action="store_true", help="a tiny model: whether all works")
        one.add_argument("--commit", default="", help="of the code, where it is no git checkout")
    measure = commands.choices["run"]
    measure.set_defaults(predicted=False)
    largest = "search the largest length, too: on the CPU in 512 MiB"
    measure.add_argument("--largest", action="store_true", help=largest)
    measure.add_argument(
        "--seconds", type=float, default=math.inf, help="end by then; what was not reached is said"
    )
    measure.add_argument("--threads", type=int, default=2, help="of the CPU")
    plot = commands.add_parser("plot", help="tables and pictures", allow_abbrev=False)
    plot.add_argument("folder", type=Path, metavar="DIR", help="with result files")
    plot.add_argument("--document", type=Path, metavar="FILE", help="whose block to renew")
    return parser


def main(words: Sequence[str]) -> int:
    """Run a command and return its exit status: 2 for wrong input, 1 where a measurement failed."""
    options = make_parser().parse_args(words)
    if options.name == "plot":
        write(options.folder, options.document)
        return 0
    from .runs import Run, predict, run  # `plot` needs none of it

    try:
        if (options.name, options.device) == ("run", "cuda") and not torch.cuda.is_available():
            raise ValueError("--device: expected cpu, this machine has no CUDA device")
        wanted = Run(options, shlex.join([*PROG.split(), *words]))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return (predict if options.predicted else run)(wanted)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
