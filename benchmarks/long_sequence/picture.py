"""Pictures of long sequences: peaks against length, and the largest lengths, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks.plots import INK, OTHERS, STYLE, WIDTH, Bar, bars, name_ends, place

from .findings import Results
from .runs import LARGEST
from .settings import MODES

# Of ours from light to dark by what is turned on; dense ways are told apart by their ends' names.
COLOURS = {
    "plain": "#f6c28b",
    "checkpointed": "#f0a060",
    "sequential": "#e5822f",
    "tiled": "#d55e00",
    "lean": "#9c4300",
    "lean-ntp": "#5c2800",
    "lean-offload": "#c2185b",
    "lean-tiles": "#6a1b9a",
}


def draw(results: Sequence[Results], folder: Path) -> list[Path]:
    """Write the pictures whose figures are there; their paths. The same bytes each time."""
    written = []
    with matplotlib.rc_context(STYLE):
        for one in results:
            name = f"{one.device}-{one.model}"
            figures = {name: peak_picture(one), f"{name}-largest": largest_picture(one)}
            for stem, figure in figures.items():
                if figure is not None:
                    path = folder / f"{stem}.svg"
                    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
                    figure.savefig(path, format="svg", facecolor="white", metadata=nothing)
                    written.append(path)
    return written


def colour_of(mode: str) -> str:
    return COLOURS.get(mode, OTHERS)


def peak_picture(results: Results) -> Figure | None:
    """A line for each mode: measured points, predicted dashes."""
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(True)
    ends: list[tuple[float, float, str, str]] = []
    lengths: set[int] = set()
    for mode, way in MODES.items():
        colour = colour_of(mode)
        steps = sorted(results.steps(mode).items())
        predicted = sorted(results.predictions(mode).items())
        if steps:
            sizes = [record["peak_bytes"] / 2**30 for _, record in steps]
            axes.plot([n for n, _ in steps], sizes, "o-", color=colour, markersize=4)
        if predicted:
            sizes = [size / 2**30 for _, size in predicted]
            axes.plot([n for n, _ in predicted], sizes, "--", color=colour, linewidth=1.2)
        shown = steps or predicted
        if shown:
            lengths.update(length for length, _ in shown)
            ends.append((shown[-1][0], sizes_end(results, mode), way.says, INK))
    if not ends:
        return None
    axes.set_xticks(sorted(lengths), [f"{value:,}" for value in sorted(lengths)])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.set_xlabel("tokens of each of two sequences")
    axes.set_ylabel("peak of a step, GiB; dashed: predicted")
    name_ends(axes, [(x, y, f"{says}: {y:,.3g}", colour) for x, y, says, colour in ends])
    figure.suptitle(heading(results, "Peak memory of a training step"), **TITLE)
    return figure


TITLE = {"x": 0.01, "ha": "left", "fontsize": 10.5}


def sizes_end(results: Results, mode: str) -> float:
    """GiB at the right end of a mode's line."""
    steps, predicted = results.steps(mode), results.predictions(mode)
    if steps:
        return float(steps[max(steps)]["peak_bytes"]) / 2**30
    return predicted[max(predicted)] / 2**30


def heading(results: Results, what: str) -> str:
    """Two lines: what is shown, and of which model on which machine."""
    if results.measured:
        return f"{what}, {results.model}\n{place(results.measured)}"
    return f"{what}, {results.model}\nPREDICTED, nothing was measured"


def largest_picture(results: Results) -> Figure | None:
    """Bars of the largest length that fits."""
    found = []
    for record in results.records(LARGEST):
        mode, length = record["mode"], record["length"]
        says = f"{length:,}" if record["closed"] else f"at least {length:,}"
        found.append(Bar(MODES[mode].says, length, length, length, says, colour_of(mode)))
    if not found:
        return None
    budget = results.records(LARGEST)[0]["budget_bytes"]
    groups = {f"{budget / 2**20:,.0f} MiB": found}
    title = heading(results, "Largest length")
    return bars(groups, None, title, "tokens of each of two sequences")
