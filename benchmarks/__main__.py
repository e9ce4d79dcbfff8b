"""Benchmarks beside what a user would pick instead: `run` measures, `plot` shows.

python -m benchmarks run loss --device cpu --out runs/bench
python -m benchmarks plot runs/bench
python -m benchmarks predict --gpu H200
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from sftmix_kernels.peaks import Shape

from .predict import GPUS, text
from .settings import Case, Settings
from .suites import ALL, NAMES, SUITES, run_apart

HERE = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> int:
    """Return exit status 0, or 1 where one of ours failed or was wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = make_parser().parse_args(arguments)
    # A folder of this machine is nobody else's business, nor of use to anybody.
    shown = [Path(word).name if Path(word).is_absolute() else word for word in arguments]
    options.command = shlex.join(["python", "-m", "benchmarks", *shown])
    return int(options.call(options))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the commands."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="measure a suite, or all of them")
    run.set_defaults(call=run_suites)
    add, own = run.add_argument, Settings
    add("suite", choices=("all", *SUITES))
    add("--out", type=Path, required=True, metavar="DIR", help="for result files")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device)
    add("--quick", action="store_true", help="tiny sizes: shows that all of it works")
    add("--no-peers", action="store_false", dest="peers", help="only ours and bare products")
    add("--no-grid", action="store_false", dest="grid", help="only the first sizes")
    add("--short", action="store_true", help="on a GPU only what decides: few minutes in all")
    add("--keep", action="store_true", help="add to a result file that is there")
    add("--seconds", type=int, default=own.seconds, help="begin nothing of a suite after these")
    add("--threads", type=int, default=own.threads, help="of the CPU")
    add("--data", type=Path, metavar="FILE", help="instructions to score (default: the demo's)")
    add("--examples", type=int, default=own.examples, help="how many of them to score")
    add("--model", type=Path, metavar="DIR", help="a model to score 240 of them with, too")
    add("--commit", default="", help="of the code, where it is no git checkout")
    only = f"only this benchmark, or 'not NAME': all but this; of {', '.join(NAMES)}"
    add("-k", default="", metavar="NAME", help=only)
    plot = commands.add_parser("plot", help="tables and pictures from result files")
    plot.set_defaults(call=plot_results)
    plot.add_argument("folder", type=Path, metavar="DIR", help="with result files")
    plot.add_argument("--markdown", type=Path, metavar="FILE", help="default: DIR/RESULTS.md")
    plot.add_argument("--readme", type=Path, metavar="FILE", help="whose block of results to renew")
    predict = commands.add_parser("predict", help="what a GPU takes for each step, by arithmetic")
    predict.set_defaults(call=print_predictions)
    add, case = predict.add_argument, Case("Llama-3.1-8B", 8192)
    add("--gpu", choices=tuple(GPUS), default="H200", help="by its data sheet (default: H200)")
    add("--rows", type=positive, default=case.rows, metavar="N", help="default: 8192")
    add("--hidden", type=positive, default=case.sizes[0], metavar="D", help="default: 4096")
    add("--vocab", type=positive, default=case.sizes[1], metavar="V", help="default: 128256")
    add("--copy", type=positive, metavar="GB/s", help="of a large copy, read and written")
    add("--product", type=positive, metavar="TFLOP/s", help="of a large product in bfloat16")
    check = commands.add_parser("compare", help="ratios of a run beside those of another")
    check.set_defaults(call=compare_results)
    check.add_argument("folder", type=Path, metavar="DIR", help="with result files")
    baseline = {"metavar": "DIR", "default": HERE / "results", "help": "benchmarks/results"}
    check.add_argument("--baseline", type=Path, **baseline)
    return parser


def positive(value: str) -> int:
    """Return a whole number of at least 1.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {value!r}")
    return int(value)


def print_predictions(options: argparse.Namespace) -> int:
    """Print the steps of each schedule, and the goals."""
    gpu = GPUS[options.gpu]
    if options.copy:
        gpu = gpu._replace(copy_rate=1e9 * options.copy)
    if options.product:
        gpu = gpu._replace(product_rate=1e12 * options.product)
    print(text(gpu, Shape(options.rows, options.hidden, options.vocab, 2)))
    return 0


def run_suites(options: argparse.Namespace) -> int:
    """Run each suite in a process: one that breaks down, or the device under it, stops no other."""
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: this machine has no CUDA device", file=sys.stderr)
        return 2
    if options.k.removeprefix("not ") not in ("", *NAMES):
        print(f"-k: expected NAME or 'not NAME', got {options.k!r}; see --help", file=sys.stderr)
        return 2
    names = {one.name for one in dataclasses.fields(Settings) if one.init} - {"begin"}
    settings = Settings(**{name: getattr(options, name) for name in names})
    suites = ALL if options.suite == "all" else (options.suite,)
    failed = [suite for suite in suites if run_apart(suite, settings, options.out, options.k)]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """Return a folder's result files by name; those of quick runs where there are no others."""
    found = [json.loads(file.read_text("utf-8")) for file in sorted(folder.glob("*.json"))]
    return [report for report in found if not report["settings"]["quick"]] or found


def plot_results(options: argparse.Namespace) -> int:
    """Write the tables and pictures of a folder, and renew README's block."""
    from .figures import write_pictures
    from .readme import BEGIN, END, readme_block
    from .report import markdown
    from .tables import show

    reports = read_reports(options.folder)
    if not reports:
        print(f"{options.folder}: there is no result file; `run` writes them", file=sys.stderr)
        return 2
    pictures = write_pictures(reports, options.folder)
    target = options.markdown or options.folder / "RESULTS.md"
    target.write_text(markdown(reports), encoding="utf-8")
    for file in (*pictures, target):
        print(file)
    if options.readme:
        beside = options.readme.resolve().parent
        shown = [file.resolve().relative_to(beside) for file in pictures]
        show(readme_block(reports, shown), options.readme, BEGIN, END)
    return 0


def compare_results(options: argparse.Namespace) -> int:
    """Print the ratios of a folder's files beside those of a baseline."""
    from .regression import print_comparison

    for file in sorted(options.folder.glob("*.json")):
        baseline = options.baseline / file.name
        if not baseline.exists():
            print(f"{file.name}: there is none in {options.baseline}")
            continue
        run, other = (json.loads(one.read_text("utf-8")) for one in (file, baseline))
        print(f"{file.name}:")
        print_comparison(run, other)
    return 0


if __name__ == "__main__":
    sys.exit(main())
