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

from .runs import Run, run
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
    commands = parser.add_subparsers(required=True)
    measure = commands.add_parser(
        "run", help="measure; goes on with what DIR has", allow_abbrev=False
    )
    measure.set_defaults(call=measure_all)
    add_sizes(measure)
    measure.add_argument("--largest", action="store_true", help="search the largest length too")
    measure.add_argument(
        "--budget",
        type=int,
        metavar="BYTES",
        help="for the largest length; default: the device's, on the CPU 512 MiB of growth",
    )
    measure.add_argument(
        "--seconds", type=float, default=math.inf, help="end by then; what was not reached is said"
    )
    measure.add_argument("--threads", type=int, default=2, help="of the CPU")
    plan = commands.add_parser(
        "predict", help="what `sftmix plan` says of our modes; needs no GPU", allow_abbrev=False
    )
    plan.set_defaults(call=predict_all, predicted=True)
    add_sizes(plan)
    plot = commands.add_parser("plot", help="tables and pictures", allow_abbrev=False)
    plot.set_defaults(call=plot_all)
    plot.add_argument("folder", type=Path, metavar="DIR", help="with result files")
    plot.add_argument("--document", type=Path, metavar="FILE", help="whose block to renew")
    return parser


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Add the options that measurements and predictions share."""
    parser.add_argument("--model", choices=tuple(SUBJECTS), required=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="for the result file"
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=tuple(MODES),
        default=(),
        metavar="MODE",
        help=f"of {', '.join(MODES)}; default: all of the device",
    )
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        default=(),
        metavar="L",
        help="tokens of each of the two sequences; default: the model's",
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model: whether all works")
    parser.add_argument("--commit", default="", help="of the code, where it is no git checkout")


def wanted_run(options: argparse.Namespace, words: Sequence[str]) -> Run:
    """Return the options as a `Run`."""
    given = {name: value for name, value in vars(options).items() if name != "call"}
    return Run(**given, command=shlex.join([*PROG.split(), *words]))


def measure_all(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Measure; return 1 where a measurement failed by something else than memory."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected cpu, this machine has no CUDA device")
    return run(wanted_run(options, words))


def predict_all(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Predict, which needs no GPU."""
    from .predict import predict

    return predict(wanted_run(options, words))


def plot_all(options: argparse.Namespace, _: Sequence[str]) -> int:
    """Write tables and pictures."""
    from .report import write

    write(options.folder, options.document)
    return 0


def main(words: Sequence[str]) -> int:
    """Run a command and return its exit status: 2 for wrong input."""
    options = make_parser().parse_args(words)
    try:
        return int(options.call(options, words))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
