"""The study's picture: differences to NTP with their intervals, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.plots import INK, OTHERS, OURS, STYLE, WIDTH

from .findings import MEASURES, PRIMARY, SPREAD, Finding, Results, findings
from .settings import BASELINE, SYSTEMS

CAPTION = (
    "Mean difference to NTP over seeds (same base model, data and seed), with its 95 % interval. "
    "Orange: significant after Holm's correction."
)


def draw(results: Sequence[Results], path: Path) -> None:
    """A row of panels for each measure, a column for each data set; the same bytes each time."""
    shown = (PRIMARY, SPREAD)
    systems = [
        name for name in SYSTEMS if name != BASELINE and any(name in one.systems for one in results)
    ]
    with matplotlib.rc_context(STYLE):
        height = 2.0 + 0.27 * len(systems) * len(shown)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        grid = figure.subplots(len(shown), len(results), sharey=True, sharex="row", squeeze=False)
        for row, measure in zip(grid, shown, strict=True):
            found = findings(results, measure)
            for axes, one in zip(row, results, strict=True):
                own = {f.system: f for f in found if f.source == one.source}
                panel(axes, systems, own)
                how = MEASURES[measure]
                axes.set_title(f"{one.name}: {how.label}")
                axes.set_xlabel(f"difference to NTP ({how.difference_unit})")
        figure.supxlabel(CAPTION, fontsize=8)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(path, format="svg", facecolor="white", metadata=nothing)


def panel(axes: Axes, systems: Sequence[str], found: dict[str, Finding]) -> None:
    """A dot for each system, and a line from end to end of its interval."""
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.grid(axis="x")
    for height, system in enumerate(systems):
        finding = found.get(system)
        if finding is None or finding.test.difference is None:
            continue
        colour = OURS if finding.significant else OTHERS
        if finding.test.interval is not None:
            axes.plot(finding.test.interval, [height] * 2, color=colour, linewidth=2)
        axes.plot(finding.test.difference, height, "o", color=colour, markersize=5)
    axes.set_yticks(range(len(systems)), [SYSTEMS[name].label for name in systems])
    axes.set_ylim(len(systems) - 0.5, -0.5)
