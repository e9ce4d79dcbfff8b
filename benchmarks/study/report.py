"""Write tables and picture of the study of small models, and its block in a document.

python -m benchmarks.study small report DIR [--document FILE]
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.tables import show, table
from sftmix.report.comparison import Comparison

from .findings import (
    BASE,
    MEASURES,
    PRIMARY,
    SMALL,
    SOURCES,
    SPREAD,
    Finding,
    Measure,
    Results,
    findings,
    read,
)
from .settings import BASELINE, SYSTEMS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEGIN = (
    "<!-- study: begin (python -m benchmarks.study small report benchmarks/study/results"
    " --document docs/study_small.md) -->"
)
END = "<!-- study: end -->"
PICTURE = "study.svg"
ALT = (
    "Dots with 95 % intervals: difference of each system to NTP in held-out loss, and in the "
    "standard deviation of confidence, on each data set"
)
CAPTION = (
    "Mean difference to NTP over seeds (same base model, data and seed), with its 95 % interval. "
    "Orange: significant after Holm's correction."
)


MEANS = (
    "Mean ± sample standard deviation over seeds; bold where the difference to NTP is significant "
    "after Holm's correction over all comparisons of that measure.\n"
)


def write(folder: Path, document: Path | None = None) -> None:
    """Draw the picture, and print the block or renew the document's.

    Raises:
        ValueError: there are no results, or they do not belong together.
    """
    from benchmarks.figures import write_svg  # it needs matplotlib

    results = read(folder)
    write_svg(folder / PICTURE, partial(picture, results))
    beside = folder if document is None else document.parent
    place = Path(os.path.relpath(folder / PICTURE, beside)).as_posix()
    show(markdown(results, place), document, BEGIN, END)


def markdown(results: Sequence[Results], picture: str) -> str:
    """Return everything that the results say."""
    found = {measure: findings(results, measure) for measure in SMALL}
    parts = [origin(results), headline(found), verdict(found[PRIMARY]), f"![{ALT}]({picture})\n"]
    parts += ["### Held-out loss, the primary measure\n"]
    parts += [comparison_table(one, PRIMARY, found[PRIMARY]) for one in results]
    parts += ["### Spread of confidence\n"]
    parts += [comparison_table(one, SPREAD, found[SPREAD]) for one in results]
    parts += ["### All measures\n", MEANS]
    parts += [means_table(one, found) for one in results]
    parts += ["### The learning rate\n", search_table(results)]
    return "\n".join(parts)


def origin(results: Sequence[Results]) -> str:
    """Return what was run, on what, by which code."""
    first = results[0].records[0]
    sizes, facts = first["sizes"], first["facts"]
    commits = sorted({r["facts"]["commit"] for one in results for r in one.records})
    seeds = "; ".join(
        f"{one.name}, {len(one.records)} seeds, learning rate {one.records[0]['learning_rate']:g}"
        for one in results
    )
    model = (
        f"Llama of {sizes['num_layers']} layers of {sizes['hidden_size']}, a vocabulary of at most "
        f"{sizes['vocab_size']:,}, at most {sizes['max_length']} tokens; "
        f"{sizes['base_steps']} steps of {sizes['batch_size']} examples for the base model; "
        f"{sizes['train_examples']} examples scored {sizes['num_scorings']} times and tuned on for "
        f"{sizes['epochs']} epochs; {sizes['held_out_examples']} held out"
    )
    commit = f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
    machine = (
        f"{facts['cpu']} ({facts['cpu_capability']}), {facts['torch_threads']} thread, "
        f"torch {facts['torch']}, transformers {facts['transformers']}, {commit}"
    )
    return f"{seeds}. {model}. {machine}.\n"


def headline(
    found: Mapping[str, Sequence[Finding]], measures: Sequence[str] = (PRIMARY, SPREAD)
) -> str:
    """Return SFTMix beside NTP, a line for each measure: loss and spread of confidence."""
    lines = []
    for measure in measures:
        how, said = MEASURES[measure], []
        for one in found[measure]:
            if one.system == "sftmix":
                difference, interval, _ = tested(one.test, how)
                said.append(f"{SOURCES[one.source]} {difference} ({interval}; {real(one)})")
        lines.append(
            f"- SFTMix beside NTP, {how.label} ({how.difference_unit}, 95 % interval): "
            f"{', '.join(said)}."
        )
    return "\n".join(lines) + "\n"


def real(one: Finding) -> str:
    """Say whether a difference is significant after the correction."""
    if one.corrected is None:
        return "not tested"
    return "significant" if one.significant else "not significant"


def verdict(found: Sequence[Finding]) -> str:
    """Return how many differences of the primary measure are significant, and which."""
    tests = [one for one in found if one.corrected is not None]
    large = [one for one in tests if one.significant]
    how = MEASURES[PRIMARY]
    text = (
        f"Of {len(tests)} comparisons with NTP in {how.label}, p < 0.05 in "
        f"{sum(bool(one.test.significant) for one in tests)}, and in {len(large)} after Holm's "
        "correction"
    )
    said = []
    for one in large:
        off = one.test.difference or 0.0
        said.append(
            f"{label(one.system)} on {SOURCES[one.source]} is {'worse' if off > 0 else 'better'} "
            f"by {abs(off):.4f} {how.unit}"
        )
    return ": ".join(filter(None, (text, "; ".join(said)))) + ".\n"


def comparison_table(one: Results, measure: str, found: Sequence[Finding]) -> str:
    """Return a table of every system of a data set beside NTP."""
    how = MEASURES[measure]
    unit = f" ({how.unit})" if how.unit else ""
    head = [f"{one.name}", f"{how.label}{unit}", "seeds", f"difference ({how.difference_unit})"]
    head += ["95 % interval", "p", "p, Holm"]
    own = {finding.system: finding for finding in found if finding.source == one.source}
    lines = []
    for system in (BASE, *one.systems):
        values, said = one.values(system, measure), ["-"] * 4
        if not values:
            continue
        if system in own:
            said = [*tested(own[system].test, how), p_text(own[system].corrected)]
        lines.append([label(system), spread(values, how), str(len(values)), *said])
    return table(head, lines)


def label(system: str) -> str:
    """Return a system's name as it is written."""
    return "base, not tuned" if system == BASE else SYSTEMS[system].label


def tested(test: Comparison, how: Measure) -> list[str]:
    """Return difference, interval and p-value in words."""
    digits = 1 if how.relative else how.digits
    difference = "-" if test.difference is None else f"{test.difference:+.{digits}f}"
    interval = "-"
    if test.interval is not None:
        interval = " to ".join(f"{end:+.{digits}f}" for end in test.interval)
    return [difference, interval, p_text(test.p_value)]


def p_text(p_value: float | None) -> str:
    """Return a p-value with two digits; of a small one only that it is small."""
    if p_value is None:
        return "-"
    return "< 0.001" if p_value < 0.001 else f"{p_value:.{3 if p_value < 0.1 else 2}f}"


def spread(values: Mapping[int, float], how: Measure) -> str:
    """Return mean ± sample standard deviation, a dash where there is nothing."""
    numbers = list(values.values())
    if not numbers:
        return "-"
    mean = f"{statistics.fmean(numbers):.{how.digits}f}"
    return f"{mean} ± {statistics.stdev(numbers):.{how.digits}f}" if len(numbers) > 1 else mean


def means_table(one: Results, found: Mapping[str, Sequence[Finding]]) -> str:
    """Return a table of the measures of a data set's systems, those that it has."""
    has = [name for name in found if any(one.values(s, name) for s in (BASE, *one.systems))]
    hows = [MEASURES[name] for name in has]
    head = [how.label + (f" ({how.unit})" if how.unit else "") for how in hows]
    lines = []
    for system in (BASE, *one.systems):
        cells = [label(system)]
        for name, how in zip(has, hows, strict=True):
            own = [f for f in found[name] if (f.source, f.system) == (one.source, system)]
            text = spread(one.values(system, name), how)
            cells.append(f"**{text}**" if any(f.significant for f in own) else text)
        lines.append(cells)
    return table([one.name, *head], lines)


def search_table(results: Sequence[Results]) -> str:
    """Return a table of the losses that the learning rates were chosen by."""
    rates = sorted({float(rate) for one in results for rate in one.search["losses"]})
    lines = []
    for one in results:
        losses = {float(rate): f"{loss:.4f}" for rate, loss in one.search["losses"].items()}
        chosen = one.records[0]["learning_rate"]
        losses[chosen] = f"**{losses[chosen]}**"
        name = f"{one.name}, seed {one.search['seed']}"
        lines.append([name, *(losses.get(rate, "-") for rate in rates)])
    return table(["loss of NTP (nats/token)", *(f"{rate:g}" for rate in rates)], lines)


def picture(
    results: Sequence[Results],
    shown: Sequence[str] = (PRIMARY, SPREAD),
    negligible: float | None = None,
) -> Figure:
    """Draw a line of panels for each measure, a column for each data set.

    With a negligible difference the axis is linear up to it, where it is shaded, and then
    logarithmic.
    """
    from benchmarks import figures

    systems = [
        name for name in SYSTEMS if name != BASELINE and any(name in one.systems for one in results)
    ]
    size = (figures.WIDTH, 2.0 + 0.27 * len(systems) * len(shown))
    figure = figures.Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(shown), len(results), sharey=True, sharex="row", squeeze=False)
    for line, measure in zip(grid, shown, strict=True):
        found = findings(results, measure)
        for axes, one in zip(line, results, strict=True):
            panel(axes, systems, {f.system: f for f in found if f.source == one.source})
            how = MEASURES[measure]
            if negligible is not None:
                axes.set_xscale("symlog", linthresh=negligible)
                axes.set_xticks(
                    [-negligible, 0, negligible, 0.1, 1], [f"-{negligible}", "0", "", "0.1", "1"]
                )
                axes.axvspan(-negligible, negligible, color=figures.OTHERS, alpha=0.15, linewidth=0)
            axes.set_title(f"{one.name}\n{how.label}")
            axes.set_xlabel(f"difference to NTP\n({how.difference_unit})")
    shaded = "" if negligible is None else f"\nShaded: below {negligible}, negligible."
    figure.supxlabel(CAPTION + shaded, fontsize=8)
    return figure


def panel(axes: Axes, systems: Sequence[str], found: Mapping[str, Finding]) -> None:
    """Draw a dot for each system, and a line from end to end of its interval."""
    from benchmarks import figures

    axes.axvline(0, color=figures.INK, linewidth=0.8)
    axes.grid(axis="x")
    for height, system in enumerate(systems):
        finding = found.get(system)
        if finding is None or finding.test.difference is None:
            continue
        colour = figures.OURS if finding.significant else figures.OTHERS
        if finding.test.interval is not None:
            axes.plot(finding.test.interval, [height] * 2, color=colour, linewidth=2)
        axes.plot(finding.test.difference, height, "o", color=colour, markersize=5)
    axes.set_yticks(range(len(systems)), [SYSTEMS[name].label for name in systems])
    axes.set_ylim(len(systems) - 0.5, -0.5)
