"""Long sequences in little memory: peak, tokens a second and largest length of every way to train.

python -m benchmarks.long_sequence run --model toy --device cpu --out runs/long --largest
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

from .settings import MODES, SUBJECTS

PROG = "python -m benchmarks.long_sequence"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROG,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="measure; goes on with what DIR has", allow_abbrev=False)
    run.set_defaults(call=run_all)
    run.add_argument("--model", choices=tuple(SUBJECTS), required=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run.add_argument("--device", choices=("cpu", "cuda"), default=device)
    run.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the result file")
    run.add_argument(
        "--modes",
        nargs="+",
        choices=tuple(MODES),
        default=(),
        metavar="MODE",
        help=f"of {', '.join(MODES)}; default: all of the device",
    )
    run.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        default=(),
        metavar="L",
        help="tokens of each of the two sequences; default: the model's",
    )
    run.add_argument("--largest", action="store_true", help="search the largest length too")
    run.add_argument(
        "--budget",
        type=int,
        metavar="BYTES",
        help="for the largest length; default: the device's, on the CPU 512 MiB of growth",
    )
    run.add_argument(
        "--seconds", type=float, default=math.inf, help="end by then; what was not reached is said"
    )
    run.add_argument("--quick", action="store_true", help="a tiny model: whether all of it works")
    run.add_argument("--threads", type=int, default=2, help="of the CPU")
    run.add_argument("--commit", default="", help="of the code, where it is no git checkout")
    plot = commands.add_parser("plot", help="tables and pictures", allow_abbrev=False)
    plot.set_defaults(call=plot_all)
    plot.add_argument("folder", type=Path, metavar="DIR", help="with result files")
    plot.add_argument("--document", type=Path, metavar="FILE", help="whose block to renew")
    return parser


def run_all(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Exit status 2 for wrong input, 1 where a measurement failed by something else than memory."""
    from .runs import Run, run

    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: there is no CUDA device", file=sys.stderr)
        return 2
    try:
        wanted = Run(
            options.model,
            options.device,
            options.out,
            options.modes,
            options.lengths,
            options.largest,
            options.budget,
            options.seconds,
            options.quick,
            options.threads,
            shlex.join([*PROG.split(), *words]),
            options.commit,
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return run(wanted)


def plot_all(options: argparse.Namespace, _: Sequence[str]) -> int:
    from .report import write

    write(options.folder, options.document)
    return 0


def main(words: Sequence[str]) -> int:
    """Exit status."""
    options = make_parser().parse_args(words)
    return int(options.call(options, words))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
