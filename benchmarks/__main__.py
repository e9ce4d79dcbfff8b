"""Benchmarks beside what a user would pick instead: `run` measures, `plot` shows.

python -m benchmarks run loss --device cpu --out runs/bench
python -m benchmarks plot runs/bench
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .settings import Settings

HERE = Path(__file__).resolve().parent
# Of each suite: its files, in the order in which they run.
SUITES = {
    "loss": ("bench_row_chunks", "bench_sftmix_loss", "bench_cross_entropy", "bench_mixup_loss"),
    "perplexity": ("bench_perplexity", "bench_online_softmax", "bench_scoring"),
    "step": ("bench_step",),
    "memory": ("bench_memory",),
    "tune": ("bench_tuning",),
}
# The search for constants is for those who change kernels.
ALL = tuple(suite for suite in SUITES if suite != "tune")


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0, or 1 where one of ours failed or was wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = make_parser().parse_args(arguments)
    return int(options.call(options, arguments))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="measure a suite, or all of them")
    run.set_defaults(call=run_suites)
    run.add_argument("suite", choices=("all", *SUITES))
    run.add_argument("--out", type=Path, required=True, metavar="DIR", help="for result files")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run.add_argument("--device", choices=("cpu", "cuda"), default=device)
    run.add_argument("--quick", action="store_true", help="tiny sizes: whether all of it works")
    run.add_argument("--no-peers", action="store_true", help="ours and bare products alone")
    run.add_argument("--no-grid", action="store_true", help="the first sizes alone")
    run.add_argument("--seconds", type=int, help="begin no measurement of a suite after these")
    run.add_argument("--threads", type=int, default=Settings.threads, help="of the CPU")
    run.add_argument(
        "--data", type=Path, metavar="FILE", help="instructions to score (default: the demo's)"
    )
    run.add_argument("--examples", type=int, default=Settings.examples, help="of them to score")
    run.add_argument("--commit", help="of the code, where it is no git checkout")
    run.add_argument("-k", metavar="EXPRESSION", help="benchmarks by name, as in pytest")
    plot = commands.add_parser("plot", help="tables and pictures from result files")
    plot.set_defaults(call=plot_results)
    plot.add_argument("folder", type=Path, metavar="DIR", help="with result files")
    plot.add_argument("--markdown", type=Path, metavar="FILE", help="default: DIR/RESULTS.md")
    plot.add_argument("--readme", type=Path, metavar="FILE", help="whose block of results to renew")
    check = commands.add_parser("compare", help="ratios of a run beside those of another")
    check.set_defaults(call=compare_results)
    check.add_argument("folder", type=Path, metavar="DIR", help="with result files")
    check.add_argument(
        "--baseline",
        type=Path,
        metavar="DIR",
        default=HERE / "results",
        help="default: benchmarks/results",
    )
    return parser


def run_suites(options: argparse.Namespace, arguments: list[str]) -> int:
    """A process for each suite: one that breaks down, or the device under it, leaves the others."""
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: there is no CUDA device", file=sys.stderr)
        return 2
    suites = ALL if options.suite == "all" else (options.suite,)
    command = shlex.join(["python", "-m", "benchmarks", *arguments])
    failed = []
    for suite in suites:
        call = [sys.executable, "-m", "pytest", *pytest_arguments(suite, options, command)]
        # Kernels get the memory in Triton's interpreter that they get on a GPU.
        interpret = (
            {"TRITON_INTERPRET": "1"} if (suite, options.device) == ("memory", "cpu") else {}
        )
        env = {**os.environ, **interpret}
        if subprocess.run(call, cwd=HERE.parent, env=env, check=False).returncode:
            failed.append(suite)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def pytest_arguments(suite: str, options: argparse.Namespace, command: str) -> list[str]:
    """Those of a suite; settings of this repository's own tests do not hold."""
    given = [f"--suite={suite}", f"--device={options.device}", f"--command={command}"]
    for name in ("seconds", "threads", "examples", "commit"):
        value = getattr(options, name)
        given += [] if value is None else [f"--{name}={value}"]
    for name in ("data", "out"):
        path = getattr(options, name)
        given += [] if path is None else [f"--{name}={path.resolve()}"]
    given += ["--quick"] * options.quick + ["--no-peers"] * options.no_peers
    given += ["--no-grid"] * options.no_grid + (["-k", options.k] if options.k else [])
    return [
        *(str(HERE / f"{name}.py") for name in SUITES[suite]),
        *given,
        *("-c", str(HERE / "pytest.ini"), "--rootdir", str(HERE.parent)),
    ]


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """All result files of a folder, by name; those of quick runs where there are no others."""
    found = [json.loads(file.read_text("utf-8")) for file in sorted(folder.glob("*.json"))]
    return [report for report in found if not report["settings"]["quick"]] or found


def plot_results(options: argparse.Namespace, _: list[str]) -> int:
    from .plots import write_pictures
    from .readme import readme_block, replace_block
    from .report import markdown

    reports = read_reports(options.folder)
    if not reports:
        print(f"{options.folder}: there is no result file", file=sys.stderr)
        return 2
    pictures = write_pictures(reports, options.folder)
    target = options.markdown or options.folder / "RESULTS.md"
    target.write_text(markdown(reports), encoding="utf-8")
    for file in (*pictures, target):
        print(file)
    if options.readme:
        text = options.readme.read_text("utf-8")
        shown = [file.resolve().relative_to(options.readme.resolve().parent) for file in pictures]
        options.readme.write_text(
            replace_block(text, readme_block(reports, shown)), encoding="utf-8"
        )
    return 0


def compare_results(options: argparse.Namespace, _: list[str]) -> int:
    from .regression import compare, differences, print_comparison

    baseline = {file.name: file for file in options.baseline.glob("*.json")}
    for file in sorted(options.folder.glob("*.json")):
        if file.name not in baseline:
            print(f"{file.name}: there is none in {options.baseline}")
            continue
        run, other = (json.loads(one.read_text("utf-8")) for one in (file, baseline[file.name]))
        print(f"{file.name}:")
        print_comparison(compare(run, other), differences(run, other))
    return 0


if __name__ == "__main__":
    sys.exit(main())
