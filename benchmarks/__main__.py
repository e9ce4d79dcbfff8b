"""``python -m benchmarks [SUITE] [options]``: run all suites or one; ``--json FILE`` keeps it.

The suite ``gpu`` needs a CUDA device, or ``--device cpu --quick`` to try it out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from .measure import SuiteError, facts

# Of each suite: its module, and the options that its `run` takes. Only the suites that run are
# imported: the others' dependencies may not be there.
SUITES = {
    "sftmix_loss": ("bench_sftmix_loss", ("pairs", "hidden_size", "vocab_size", "repeats")),
    "perplexity": ("bench_perplexity", ("tokens", "hidden_size", "vocab_size", "repeats")),
    "step": ("bench_step", ("batch", "length", "step_repeats")),
    "scoring": ("bench_scoring", ("data", "rows", "scoring_repeats")),
}
GPU = "gpu"
OPTIONS = {
    "pairs": 2048,
    "hidden_size": 512,
    "vocab_size": 32000,
    "repeats": 5,
    "tokens": 4096,
    "batch": 16,
    "length": 128,
    "step_repeats": 30,
    "rows": 2000,
    "scoring_repeats": 5,
    "threads": 2,
}


def main(arguments: list[str] | None = None) -> None:
    """Run, print, and write down; exit status 1 where a suite or an op of ours failed."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    for name in (*OPTIONS, "seconds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1")
    without_gpu = options.device == "cuda" and not torch.cuda.is_available()
    if options.suite == GPU and without_gpu:
        parser.error("gpu: there is no CUDA device; --device cpu --quick tries the suite out")
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {"facts": facts()}
    if options.commit:
        report["facts"]["commit"] = options.commit
    done = [run_suite(name, report, options) for name in SUITES if options.suite in (None, name)]
    if options.suite is None and without_gpu:
        print("gpu: skipped, there is no CUDA device")
    elif options.suite in (None, GPU):
        done.append(run_gpu(report, options))
    if not all(done):
        sys.exit(1)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suite", nargs="?", choices=(*SUITES, GPU), help="by default all")
    for name, default in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument(
        "--data", metavar="FILE", help="instructions to score (default: the demo's)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--commit", help="of the code, where it is no git checkout")
    gpu = parser.add_argument_group("gpu")
    gpu.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    gpu.add_argument("--quick", action="store_true", help="tiny sizes, to try the suite out")
    gpu.add_argument("--no-peers", action="store_false", dest="peers", help="ours alone")
    gpu.add_argument("--grid", action="store_true", help="sizes of real models too")
    gpu.add_argument("--tune", action="store_true", help="search constants and workspaces too")
    gpu.add_argument("--only", choices=("loss", "perplexity"), help="by default both")
    gpu.add_argument("--seconds", type=int, default=480, help="begin no section after these")
    gpu.add_argument("--markdown", type=Path, metavar="FILE", help="tables")
    return parser


def run_suite(name: str, report: dict[str, Any], options: argparse.Namespace) -> bool:
    """One of `SUITES`, printed and written down; whether it could run."""
    module, takes = SUITES[name]
    suite = importlib.import_module(f".{module}", __package__)
    settings = {option: getattr(options, option) for option in takes}
    print(f"{name}: {suite.__doc__}\n{settings}", flush=True)
    try:
        result = suite.run(*settings.values())
    except SuiteError as error:
        print(f"{name}: FAILED: {error}", file=sys.stderr, flush=True)
        result = {"failed": str(error)}
    # Of a file only its name: where it lies differs from machine to machine.
    kept = {k: Path(v).name if k == "data" and v else v for k, v in settings.items()}
    report[name] = {"settings": kept, **result}
    save(report, options.json)
    return "failed" not in report[name]


def run_gpu(report: dict[str, Any], options: argparse.Namespace) -> bool:
    """The suite ``gpu``, written down section by section; whether all of ours ran and was right."""
    from . import bench_gpu, gpu_report

    names = ("device", "peers", "grid", "tune", "only", "seconds")
    settings = bench_gpu.Settings(**{name: getattr(options, name) for name in names})
    print(f"{GPU}: {bench_gpu.__doc__}")

    def keep(result: dict[str, Any]) -> None:
        save(report | {GPU: result}, options.json)
        if options.markdown:
            options.markdown.write_text(gpu_report.markdown(report["facts"], result))

    return bench_gpu.run(settings.quick() if options.quick else settings, keep)


def save(report: dict[str, Any], file: Path | None) -> None:
    if file:
        file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
