"""Plan the memory of a training step, before there is a GPU to run it on (`sftmix plan`)."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from sftmix.plan.planned import (
    SWITCHES,
    Alternative,
    PlanArguments,
    PlanConfig,
    Planned,
    advised,
    memory_of,
    row_of,
)
from sftmix.plan.search import ends
from sftmix.plan.table import plan_text

# The exit code, which differs from that of a wrong option.
DOES_NOT_FIT = 3


ARGUMENTS = (PlanArguments, PlanConfig)


def main(words: Sequence[str]) -> int:
    """Run the command; return `DOES_NOT_FIT` if the step does not fit.

    Raises:
        ValueError: what `plan_step` refuses, or a memory that is no number of bytes.
        OSError: there is no such model.
    """
    planned = Planned(words)
    memory = memory_of(planned)
    config = planned.read_config()
    others = [one for one in SWITCHES if planned.is_off(one)]
    plan = planned.plan(config, planned.length)
    rows: list[Alternative] = []
    with tqdm(
        total=1 + len(others), unit="plan", leave=False, disable=planned.options.disable_tqdm
    ) as bar:
        longer = planned.plan(config, planned.longer)
        largest = None if memory is None else planned.largest(config, memory, proven=True)
        bar.update()
        # Where everything fits that is searched, no switch makes more of it.
        all_fits = largest is not None and ends(largest, planned.search_end(config))
        for one in others:
            rows.append(row_of(planned, one, config, None if all_fits else memory))
            bar.update()
    fits = memory is None or plan.peak <= memory
    advice = "" if memory is None or fits else advised(planned, config, memory, rows)
    print(plan_text(planned, config, plan, longer, memory, largest, rows, advice))
    return 0 if fits else DOES_NOT_FIT
