"""Study whether SFTMix helps: small models over seeds, on one core; goes on where it stopped.

python -m benchmarks.study small --gsm8k-train FILE --gsm8k-test FILE --alpaca FILE
python -m benchmarks.study small report benchmarks/study/results
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .report import write
from .settings import FIRST, QUICK, SEEDS, SMALL, Sizes

RESULTS = Path(__file__).resolve().parent / "results"


def main(words: Sequence[str]) -> None:
    """Run the study, or with the first word ``report`` write tables and a picture of it."""
    if words[:1] == ["report"]:
        parser = argparse.ArgumentParser(
            "python -m benchmarks.study small report", allow_abbrev=False
        )
        parser.add_argument("folder", type=Path, metavar="DIR", help="with result files")
        parser.add_argument("--document", type=Path, metavar="FILE", help="whose block to renew")
        options = parser.parse_args(words[1:])
        return write(options.folder, options.document)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study small",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--gsm8k-train", type=Path, metavar="FILE")
    parser.add_argument("--gsm8k-test", type=Path, metavar="FILE", help="held out")
    parser.add_argument("--alpaca", type=Path, metavar="FILE", help="instruction, input, output")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: %(default)s")
    parser.add_argument(
        "--systems",
        nargs="+",
        choices=SMALL,
        default=FIRST,
        metavar="NAME",
        help=f"of {', '.join(SMALL)}; default: the first {len(FIRST)}",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="for the results")
    parser.add_argument("--quick", action="store_true", help="whether it works, on bundled data")
    options = parser.parse_args(words)
    if (options.gsm8k_train is None) != (options.gsm8k_test is None):
        parser.error("--gsm8k-train and --gsm8k-test: give both")
    if not (options.quick or options.gsm8k_train or options.alpaca):
        parser.error("give --gsm8k-train and --gsm8k-test, or --alpaca, or --quick")
    if options.quick and options.out == RESULTS:
        parser.error("--quick: give --out, its numbers are no results")
    from .parts import alpaca, demo, gsm8k  # `report` needs none of it
    from .runs import study

    sources = [demo()] if options.quick else []
    if options.gsm8k_train:
        sources.append(gsm8k(options.gsm8k_train, options.gsm8k_test))
    if options.alpaca:
        sources.append(alpaca(options.alpaca))
    sizes = QUICK if options.quick else Sizes()
    for source in sources:
        study(source, options.seeds, options.systems, sizes, options.out)
    write(options.out)
