"""Write README's block of results: the headline of each suite, and the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from . import records as names
from .records import Record, Report, beside, by_time, figure, find, first, headline, times
from .report import EXTRA_MEMORY, sizes
from .tables import cell, cpu_text, duration, mib, number, over, records_table, table, who
from .targets import step_name, targets

BEGIN = "<!-- results: begin (python -m benchmarks plot) -->"
END = "<!-- results: end -->"
NO_GPU = "Nothing has been measured on a GPU yet."
# What a picture shows, by the end of its name, for whom it is read aloud to.
ALT = {
    "loss": "Bars: time of forward and backward by provider, beside the bare matrix products",
    "memory": "Lines: extra memory against the number of tokens and the size of the vocabulary",
    "step": "Bars: time of a training step by model and trainer",
}


def readme_loss(report: Report) -> str:
    """Return the headline case: a line for each of ours and for each peer's fastest variant."""
    case = headline(report)
    bare = first(report, names.STEP, case=case, who=names.BARE)
    both, ntp = (
        {r["who"]: r for r in by_time(find(report, names.STEP, case=case, task=task))}
        for task in (names.BOTH, names.NTP)
    )
    ntp.pop(names.BARE, None)
    chosen: dict[str, Record] = {}
    for record in [*both.values(), *ntp.values()]:
        # Variants are named after a comma; all of ours are shown.
        name = record["who"] if names.is_ours(record) else record["who"].split(",")[0]
        chosen.setdefault(name, record)
    rows = [
        [
            who(report, r),
            *timed(both.get(r["who"]), both.get(names.DENSE)),
            *timed(ntp.get(r["who"]), bare),
        ]
        for r in chosen.values()
    ]
    rows += [[names.BARE, "-", "-", "-", *timed(bare, bare)]] if bare else []
    head = ["forward + backward", names.BOTH, "/ dense", "extra MiB"]
    head += [f"{names.NTP} alone", "/ bare", "extra MiB"]
    return f"{readme_facts(report, names.STEP)}\n\n{table(head, rows)}"


def timed(record: Record | None, other: Record | None) -> list[str]:
    """Return time, the quotient by the other's time, and extra memory."""
    quotient = number(times(record, other))
    return [duration(figure(record)), quotient, mib(figure(record, "peak_bytes"))]


def readme_facts(report: Report, measure: str) -> str:
    """Return sizes, machine, dtype and commit, to stand over a table."""
    facts, size = report["facts"], sizes(find(report, measure)[0])
    gpu_or_cpu = facts.get("gpu", cpu_text(facts))
    driver = f"driver {facts['driver']}" if facts.get("driver") else ""
    words = [gpu_or_cpu, driver, f"torch {facts['torch']}", f"triton {facts['triton']}"]
    words = [*filter(None, words), report["settings"]["dtype"], facts["date"][:10]]
    words += [f"commit {facts['commit']}", "medians, ratios by round"]
    return cell("; ".join([size, *words])) + ":"


def readme_perplexity(report: Report) -> str:
    """Return the headline of perplexity."""
    records = find(report, "perplexity", case=headline(report, "perplexity"))
    columns = [
        ("perplexity, no gradients", who),
        ("median", lambda _, record: duration(record["median"])),
        ("/ dense", over(names.DENSE_PERPLEXITY, ("case",))),
        EXTRA_MEMORY,
    ]
    rows = records_table(report, by_time(records), columns)
    return f"{readme_facts(report, 'perplexity')}\n\n{rows}"


def readme_steps(report: Report) -> str:
    """Return a sentence on each model's step: SFTMix by our NTP, and by another trainer's."""
    said = []
    for ours in find(report, "step", who=names.OUR_SFTMIX):
        ntp = beside(report, ours, names.OUR_NTP, names.STEP_SIZE)
        if ntp is not None:
            both = f"{duration(ours['median'])} and {duration(ntp['median'])}"
            theirs = times(ours, beside(report, ours, names.THEIR_NTP, names.STEP_SIZE))
            than = f", {theirs:.2f} of `{names.THEIR_NTP}`" if theirs else ""
            share = number(times(ours, ntp))
            said.append(f"{share} of an NTP step for {cell(step_name(ours))} ({both}){than}")
    device = report["settings"]["device"].upper()
    return f"{device}: a whole SFTMix training step takes {'; '.join(said)}.\n" if said else ""


def readme_targets(reports: Sequence[Report]) -> str:
    """Return how many targets were reached, and all that were not."""
    judged = [
        (report, target)
        for report in reports
        if not report["settings"]["quick"]
        for target in targets(report)
        if target.reached is not None
    ]
    missed = [
        f"{cell(target.says)} ({report['settings']['device'].upper()}): {number(target.value)}, "
        f"wanted {target.limit:.3g}"
        for report, target in judged
        if not target.reached
    ]
    if not judged:
        return ""
    reached = f"{len(judged) - len(missed)} of {len(judged)} targets are reached"
    return f"{reached}{'; missed: ' + '; '.join(missed) if missed else ''}.\n"


README_PARTS = {"loss": readme_loss, "step": readme_steps, "perplexity": readme_perplexity}


def readme_block(reports: Sequence[Report], pictures: Sequence[str | PurePath]) -> str:
    """Return README's block, with nothing of quick runs; pictures are paths beside README."""
    parts = []
    for device in ("cpu", "cuda"):
        for suite, text in README_PARTS.items():
            measure = names.STEP if suite == "loss" else suite
            report = names.newest(reports, suite, device, quick=False)
            if report is not None and find(report, measure):
                parts += [text(report)]
            elif (device, suite) == ("cuda", "loss"):
                parts += [NO_GPU + "\n"]
    parts += [readme_targets(reports)]
    for picture in pictures:
        path = PurePath(picture)
        device, _, what = path.stem.partition("-")
        parts += [f"![{ALT.get(what, what)}, {device.upper()}]({path.as_posix()})\n"]
    return "\n".join(part for part in parts if part)
