"""Plan the memory of a training step, before there is a GPU to run it on (`sftmix plan`)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from sftmix.plan.planned import Planned

# The exit code, which differs from that of a wrong option.
DOES_NOT_FIT = 3

# Their imports take longer than the first answer (11 s of 12, loaded core): the bar counts them.
LIBRARIES = ("torch", "transformers", "transformers.trainer", "sftmix.plan.planned")

# The dataclasses of the options, once `main` has imported them.
ARGUMENTS: tuple[type[Any], ...] = ()


def main(words: Sequence[str]) -> int:
    """Run the command; return `DOES_NOT_FIT` if the step does not fit.

    Raises:
        ValueError: what `plan_step` refuses, or a memory that is no number of bytes.
        OSError: there is no such model.
    """
    global ARGUMENTS
    quiet = "--disable_tqdm" in words
    for name in tqdm(LIBRARIES, "libraries", unit="library", leave=False, disable=quiet):
        importlib.import_module(name)
    from sftmix.plan.planned import PlanArguments, PlanConfig, Planned

    ARGUMENTS = PlanArguments, PlanConfig
    return tell(Planned(words))


def tell(planned: Planned) -> int:
    """Print each answer as soon as it is known; return the exit code."""
    from sftmix.plan.planned import SWITCHES, advised, memory_of, row_of
    from sftmix.plan.search import ends
    from sftmix.plan.table import first_text, length_text, switches_text

    memory = memory_of(planned)
    config = planned.read_config()
    others = [one for one in SWITCHES if planned.is_off(one)]
    quiet = planned.options.disable_tqdm
    with tqdm(total=3 + len(others), unit="answer", leave=False, disable=quiet) as bar:

        def say(text: str = "") -> None:
            bar.update()
            if text:
                tqdm.write(text)
                sys.stdout.flush()

        plan, longer = planned.plan(config, planned.length), planned.plan(config, planned.longer)
        say(first_text(planned, config, plan, longer, memory))
        fits, all_fit, advice = memory is None or plan.peak <= memory, False, ""
        if memory is not None:
            largest = planned.largest(config, memory, proven=True)
            say(length_text(planned, config, largest) + "\n")
            # Where everything fits that is searched, no switch makes more of it.
            all_fit = ends(largest, planned.search_end(config))
        rows = []
        for one in others:
            rows.append(row_of(planned, one, config, None if all_fit else memory))
            say()
        if memory is not None and not fits:
            advice = advised(planned, config, memory, rows)
        say(switches_text(planned, rows, advice))
    return 0 if fits else DOES_NOT_FIT
