"""Draw reports as SVG, the same bytes for the same figures.

White behind, so that they can be read on dark pages too; text is drawn as outlines, so that it
has the same width wherever fonts differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from . import records as names
from .records import Record, Report, find, headline
from .report import sizes
from .tables import cpu_text, duration
from .targets import step_name

# One colour for ours, shades of grey-blue for all others: told apart by lightness too.
OURS, OTHERS, INK, GRID = "#d55e00", "#8fa3b5", "#24292f", "#e4e8ec"
# Of ours by schedule, from dark to light; a schedule that is not named is drawn like the first.
SHADES = {names.ROW_CHUNKS: OURS, names.VOCAB_TILES: "#9c4300", names.FILTERED: "#f0a060"}
STYLE: Any = {
    "svg.fonttype": "path",
    "svg.hashsalt": "sftmix",
    "text.parse_math": False,  # a `$` in a name is a dollar
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
# Of a sweep: the field along the axis, the one held fast, the axis' name.
SWEEPS = {"N": ("rows", "vocab_size", "N, tokens"), "V": ("vocab_size", "rows", "V, vocabulary")}
SYMBOLS = {"rows": "N", "vocab_size": "V"}
# From a line's end to its name.
LEADER = {
    "arrowstyle": "-",
    "color": "#b0b8c0",
    "linewidth": 0.7,
    "shrinkA": 1,
    "shrinkB": 3,
    "relpos": (0, 0.5),
}
TITLE: Any = {"x": 0.01, "ha": "left", "fontsize": 10.5}
WIDTH = 8.0  # inches; 768 pixels on a page


def write_pictures(reports: Sequence[Report], folder: Path) -> list[Path]:
    """Write those pictures whose figures were measured, and return their paths.

    Of several reports of a suite the newest counts, and a quick one only where there is no other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for device in ("cpu", "cuda"):
        for suite, draw in PICTURES.items():
            report = names.newest(reports, suite, device, quick=True)
            if report is not None:
                written += write_svg(folder / f"{device}-{suite}.svg", partial(draw, report))
    return written


def write_svg(path: Path, draw: Callable[[], Figure | None]) -> list[Path]:
    """Draw in our style and write the file; return its path, none where there is no figure."""
    with matplotlib.rc_context(STYLE):
        figure = draw()
        if figure is None:
            return []
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(path, format="svg", facecolor="white", metadata=nothing)
    return [path]


def place(report: Report) -> str:
    """Return the machine and its software, for a title."""
    facts = report["facts"]
    quick = "QUICK RUN, sizes too small: " if report["settings"]["quick"] else ""
    return f"{quick}{facts.get('gpu', cpu_text(facts))}, torch {facts['torch']}"


def finite(records: Sequence[Record], name: str = "median") -> list[Record]:
    """Return the records whose figure can be drawn."""
    return [r for r in records if r.get(name) is not None and math.isfinite(r[name])]


class Bar(NamedTuple):
    """One bar, its whisker, and what is written at its end."""

    name: str
    value: float
    low: float
    high: float
    says: str
    colour: str


def bar_of(record: Record, unit: float, reference: float | None) -> Bar:
    """Return a bar of a record's time in units, with the seconds and the quotient at its end."""
    value, low, high = (record[name] / unit for name in ("median", "q1", "q3"))
    times = f"  {record['median'] / reference:.2f}x" if reference else ""
    says = duration(record["median"]) + times
    return Bar(record["who"], value, low, high, says, OURS if names.is_ours(record) else OTHERS)


def loss_picture(report: Report) -> Figure | None:
    """Draw the headline case: a group of bars for each task, a line for the bare products."""
    case = headline(report)
    records = finite(find(report, names.STEP, case=case))
    bare = next((r["median"] for r in records if r["who"] == names.BARE), None)
    records = [r for r in names.by_time(records) if r["who"] != names.BARE]
    if not records:
        return None
    unit, name = (1.0, "seconds") if records[-1]["median"] >= 1 else (1e-3, "milliseconds")
    groups = {
        title: [bar_of(r, unit, bare) for r in records if r["task"] == task]
        for task, title in ((names.BOTH, names.BOTH), (names.NTP, f"{names.NTP} alone"))
    }
    line = None
    if bare is not None:
        line = (bare / unit, f"{names.BARE} of NTP: {duration(bare)} = 1x")
    title = (
        f"Forward + backward: {sizes(records[0])}, {report['settings']['dtype']}\n{place(report)}"
    )
    return bars(groups, line, title, f"{name}, median and quartiles")


def step_picture(report: Report) -> Figure | None:
    """Draw bars for each model: a step by the time of NTP in the same trainer."""
    groups = {}
    for ntp in finite(find(report, "step", who=names.OUR_NTP)):
        records = names.by_time(finite(find(report, "step", **names.same(ntp, names.STEP_SIZE))))
        unit = ntp["median"]
        groups[step_name(ntp)] = [bar_of(r, unit, unit) for r in records]
    if not groups:
        return None
    title = f"Training steps, {report['settings']['dtype']}\n{place(report)}"
    line = (1.0, f"{names.OUR_NTP} = 1x")
    return bars(groups, line, title, "time of a step, median and quartiles")


def bars(
    groups: Mapping[str, Sequence[Bar]], line: tuple[float, str] | None, title: str, label: str
) -> Figure:
    """Draw horizontal bars under the bold name of their group, and a dashed line with its name."""
    groups = {name: group for name, group in groups.items() if group}
    rows = sum(len(group) + 1.2 for group in groups.values())
    figure = Figure(figsize=(WIDTH, 1.2 + 0.24 * rows), layout="constrained")
    axes = figure.add_subplot()
    # Room for what is written at the end of the longest.
    width = 1.25 * max(bar.high for group in groups.values() for bar in group)
    axes.set_xlim(0, width)
    if line is not None:
        axes.axvline(line[0], color=INK, linestyle="--", linewidth=1, zorder=0.9)
        # On the side where there is more room.
        away, side = (5, "left") if line[0] < width / 2 else (-5, "right")
        beside: dict[str, Any] = {"xytext": (away, 0), "textcoords": "offset points", "fontsize": 9}
        axes.annotate(line[1], (line[0], 0), va="center", ha=side, **beside)
    y, ticks = 0.0, []
    for name, group in groups.items():
        ticks.append((y, name, "bold"))
        for bar in group:
            y += 1
            ticks.append((y, bar.name, "normal"))
            draw_bar(axes, bar, y)
        y += 1.2
    axes.set_ylim(y - 0.4, -0.8)
    axes.set_yticks([at for at, _, _ in ticks], [text for _, text, _ in ticks])
    for tick, (_, _, weight) in zip(axes.get_yticklabels(), ticks, strict=True):
        tick.set_fontweight(weight)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(label)
    figure.suptitle(title, **TITLE)
    return figure


def draw_bar(axes: Axes, bar: Bar, y: float) -> None:
    """Draw the bar, its whisker, and its words."""
    axes.barh(y, bar.value, height=0.72, color=bar.colour, linewidth=0)
    # A quartile can lie on the wrong side of the median by rounding.
    whisker = [[max(0.0, bar.value - bar.low)], [max(0.0, bar.high - bar.value)]]
    axes.errorbar(bar.value, y, xerr=whisker, color=INK, linewidth=1, capsize=2)
    # The dashed line must not strike through what is written.
    back = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    beside: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "fontsize": 9}
    axes.annotate(bar.says, (max(bar.value, bar.high), y), va="center", bbox=back, **beside)


def memory_picture(report: Report) -> Figure | None:
    """Draw extra memory against N and against V, and beside ours the formula, dotted."""
    records = [r for r in finite(find(report, "memory"), "peak_bytes") if r["peak_bytes"] > 0]
    tasks = [record["task"] for record in records]
    task = names.BOTH if names.BOTH in tasks else next(iter(tasks), None)
    records = [record for record in records if record["task"] == task]
    panels = [
        memory_panel(records, *SWEEPS[sweep])
        for sweep in SWEEPS
        if any(record["sweep"] == sweep for record in records)
    ]
    title = f"Extra memory of forward + backward, {task}; dotted: the formula\n{place(report)}"
    return lines(panels, title, 0.7 + 3.1 * len(panels)) if panels else None


def memory_panel(records: Sequence[Record], field: str, fixed: str, label: str) -> Panel:
    """Return a line for each provider.

    All points are of the same hidden size, dtype and other side, those of the first record, which
    both sweeps have in common.
    """
    size = names.same(records[0], (fixed, "hidden_size", "dtype"))
    records = [r for r in records if names.same(r, tuple(size)) == size]
    found = []
    for who in dict.fromkeys(record["who"] for record in records):
        line = sorted((r for r in records if r["who"] == who), key=lambda r: r[field])
        note = " (interpreted)" if any(r.get("interpreted") for r in line) else ""
        colour = SHADES.get(who, OURS) if names.is_ours(line[0]) else OTHERS
        peaks = {r[field]: r["peak_bytes"] / 2**20 for r in line}
        formula = {r[field]: r["formula_bytes"] / 2**20 for r in line if r.get("formula_bytes")}
        ink = INK if colour == OTHERS else colour
        found.append(Line(who + note, colour, ink, peaks, formula))
    held = f"D = {size['hidden_size']}, {SYMBOLS[fixed]} = {size[fixed]:,}, {size['dtype']}"
    return Panel(f"{label}; {held}", "extra memory, MiB", found, (1.0, 3.0))


class Line(NamedTuple):
    """One line of measured points with its name at the end, and one of a formula beside it."""

    name: str
    colour: str
    ink: str  # of its name
    measured: Mapping[int, float]
    formula: Mapping[int, float] | None
    style: Mapping[str, Any] = {"linestyle": ":", "color": INK, "linewidth": 1.6}  # of the formula


class Panel(NamedTuple):
    """Axes with the names below and beside them, and the multiples of 10 to the n on the latter."""

    below: str
    beside: str
    lines: Sequence[Line]
    subs: tuple[float, ...]


def lines(panels: Sequence[Panel], title: str, height: float) -> Figure:
    """Draw panels one below the other."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    for number, panel in enumerate(panels, 1):
        draw_panel(figure.add_subplot(len(panels), 1, number), panel)
    figure.suptitle(title, **TITLE)
    return figure


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Draw the lines on logarithmic axes, with a tick below for each of their points."""
    shown = [line.measured or line.formula or {} for line in panel.lines]
    ticks = sorted({x for points in shown for x in points})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(True)
    axes.set_xticks(ticks, [f"{value:,}" for value in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=panel.subs))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.set_xlabel(panel.below)
    axes.set_ylabel(panel.beside)
    for line in panel.lines:
        of_points = {"color": line.colour, "marker": "o", "markersize": 4}
        for points, style in ((line.measured or None, of_points), (line.formula, line.style)):
            if points is not None:
                axes.plot(sorted(points), [points[x] for x in sorted(points)], **style)
    name_ends(axes, [(max(points), points[max(points)]) for points in shown], panel.lines)


def name_ends(axes: Axes, ends: Sequence[tuple[int, float]], lines: Sequence[Line]) -> None:
    """Write names right of the axes at the height of their lines' ends, apart from each other."""
    low, high = map(math.log, axes.get_ylim())
    named = sorted(zip(ends, lines, strict=True), key=lambda one: one[0][1])
    heights = apart([(math.log(y) - low) / (high - low) for (_, y), _ in named])
    for (end, line), height in zip(named, heights, strict=True):
        axes.annotate(
            f"{line.name}: {end[1]:,.3g}",
            end,
            xytext=(1.03, height),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=line.ink,
            arrowprops=LEADER,
        )


def apart(heights: Sequence[float], gap: float = 0.085) -> list[float]:
    """Return ascending heights with neighbours closer than ``gap`` pushed apart."""
    found = list(heights)
    for _ in range(200):
        for i in range(len(found) - 1):
            push = max(0.0, gap - (found[i + 1] - found[i])) / 2
            found[i] -= push
            found[i + 1] += push
    return found


PICTURES: dict[str, Callable[[Report], Figure | None]] = {
    "loss": loss_picture,
    "memory": memory_picture,
    "step": step_picture,
}
