"""A report of runs as one self-contained HTML file: a table, loss curves, confidence.

Pictures are inline SVG; their ink is a CSS variable, so that they follow light and dark mode.
Legend: S examples, C scorings.
"""

from __future__ import annotations

import importlib.util
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from sftmix.partition import CONFIDENT, UNCONFIDENT, Partition
from sftmix.runs import atomic_write

if TYPE_CHECKING:  # an optional extra
    from matplotlib.axes import Axes

# Colours that stand out on white and on near-black alike (told apart by colour-blind readers too).
COLOURS = ("#3b82c4", "#d9772b", "#2a9d6f", "#b565a7")
HALF_COLOURS = {CONFIDENT: COLOURS[0], UNCONFIDENT: COLOURS[1]}
_INK, _GRID = "#010203", "#040506"  # replaced by CSS variables in the SVG
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: searchable, and small
    "text.parse_math": False,  # a `$` in a name is a dollar
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _GRID,
    "legend.frameon": False,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


@dataclass(frozen=True)
class Table:
    """Cells as they are shown; the first column names the row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        """The table in plain text, the first column to the left and the others to the right."""
        lines = [self.columns, *self.rows]
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )


@dataclass(frozen=True)
class RunLog:
    """A training run: its name, and ``log_history`` of its ``trainer_state.json``."""

    name: str
    log: Sequence[Mapping[str, Any]]

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps, and values of ``key`` at those of the steps that logged it."""
        lines = [line for line in self.log if key in line]
        return [line["step"] for line in lines], [line[key] for line in lines]


@dataclass(frozen=True)
class Picture:
    """One figure of the report; ``alt`` says in words what it shows."""

    title: str
    caption: str
    alt: str
    svg: Markup


def require_matplotlib() -> None:
    """Check that pictures can be drawn, before a long run ends in finding out.

    Raises:
        ImportError: matplotlib is not installed, saying how to install it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("pictures need matplotlib: pip install 'sftmix[plots]'")


def write_report(
    path: Path,
    *,
    title: str,
    paragraphs: Sequence[str],
    table: Table,
    table_notes: Sequence[str],
    runs: Sequence[RunLog],
    partition: Partition,
    groups: Sequence[str] | None,  # (S,), a name for the group of each example, or None
    commands: Sequence[str],
) -> None:
    """Write the report, atomically; all text is escaped.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: ``groups`` is not one name for each example of ``partition``.
        OSError: the file cannot be written.
    """
    require_matplotlib()
    if groups is not None and len(groups) != len(partition.id):
        raise ValueError(
            f"groups: expected one name for each of {len(partition.id)} examples, got {len(groups)}"
        )
    pictures = [loss_picture(runs), halves_picture(runs), mixup_picture(runs)]
    pictures += [histogram_picture(partition), map_picture(partition)]
    if groups is not None:
        pictures.append(groups_picture(partition, groups))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    html = environment.get_template("report_template.html").render(
        title=title,
        paragraphs=paragraphs,
        table=table,
        table_notes=table_notes,
        pictures=[picture for picture in pictures if picture is not None],
        commands=commands,
    )
    atomic_write(path, lambda file: file.write_text(html, encoding="utf-8"))


def draw(name: str, plot: Callable[[Axes], None], height: float = 3.1) -> Markup:
    """One figure as an inline SVG; ``name`` keeps its ids apart from those of other figures."""
    import matplotlib  # an optional extra
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        # Narrow, so that ten points are still ten on a phone.
        figure = Figure(figsize=(4.8, height), layout="constrained")
        plot(figure.add_subplot())
        file = io.StringIO()
        nothing: Any = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "var(--ink)").replace(_GRID, "var(--grid)")
    # Groups are numbered alike in every figure and nothing refers to them.
    return Markup(re.sub(r'<g id="[^"]*"', "<g", svg))


def _lines(axes: Axes, series: Sequence[tuple[str, RunLog, str, str, str]], label: str) -> None:
    for i, (name, run, key, colour, style) in enumerate(series):
        steps, values = run.curve(key)
        # The lines below are the wider ones, so that curves that coincide are both seen.
        width = 1.4 + 2 * (1 - (i + 1) / len(series))
        axes.plot(steps, values, style, color=colour, label=name, linewidth=width)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(label)
    if series:
        axes.legend()


def _coloured(runs: Sequence[RunLog], key: str) -> list[tuple[RunLog, str]]:
    """Runs that logged ``key``, each with the colour that it has in every picture."""
    return [
        (run, COLOURS[i % len(COLOURS)]) for i, run in enumerate(runs) if len(run.curve(key)[0])
    ]


def loss_picture(runs: Sequence[RunLog]) -> Picture | None:
    """The NTP term of all runs; None where none has logged it."""
    found = _coloured(runs, "ntp_loss")
    if not found:
        return None
    series = [(run.name, run, "ntp_loss", colour, "-") for run, colour in found]
    ends = "; ".join(f"{run.name} ends at {run.curve('ntp_loss')[1][-1]:.3f}" for run, _ in found)
    return Picture(
        "Next-token loss while training",
        "The NTP term alone, without the Mixup term, so that runs compare: the mean over the "
        "response tokens of the steps since the point before. Lower is a closer fit to the "
        "training data, which says nothing about new data.",
        f"Line chart of the NTP training loss against optimizer steps. {ends}.",
        draw("ntp", lambda axes: _lines(axes, series, "NTP loss (nats per token)")),
    )


def halves_picture(runs: Sequence[RunLog]) -> Picture | None:
    """The NTP term of both halves of the data; None where none has logged it."""
    found = _coloured(runs, "ntp_loss_confident")
    if not found:
        return None
    series = [
        (f"{run.name}, {half}", run, f"ntp_loss_{half}", colour, style)
        for run, colour in found
        for half, style in ((CONFIDENT, "-"), (UNCONFIDENT, ":"))
    ]
    return Picture(
        "The two halves while training",
        "The same loss, for the tokens of the confident half (solid) and of the unconfident half "
        "(dotted). Every batch holds equally many examples of both.",
        "Line chart of the NTP training loss of the confident and the unconfident half against "
        "optimizer steps.",
        draw("halves", lambda axes: _lines(axes, series, "NTP loss (nats per token)")),
    )


def mixup_picture(runs: Sequence[RunLog]) -> Picture | None:
    """The Mixup term, of the runs that have one; None where none has."""
    found = _coloured(runs, "mixup_loss")
    if not found:
        return None
    series = [(run.name, run, "mixup_loss", colour, "-") for run, colour in found]
    return Picture(
        "Mixup term while training",
        "The loss on interpolated pairs, before it is weighted by mu. It is no measure of fit by "
        "itself: each target is a mixture of two tokens, which cannot be predicted with certainty.",
        "Line chart of the Mixup loss against optimizer steps.",
        draw("mixup", lambda axes: _lines(axes, series, "Mixup loss (nats per position)")),
    )


def shown_range(perplexity: NDArray[np.float64]) -> tuple[float, int]:
    """A limit for perplexity axes, and how many values lie beyond it (infinite ones count).

    The limit is twice the 99th percentile of the finite values, or the largest where smaller.
    """
    finite = perplexity[np.isfinite(perplexity)]
    if not len(finite):
        return 10.0, len(perplexity)
    limit = min(2 * float(np.quantile(finite, 0.99)), float(finite.max()))
    # A range of no width cannot be drawn.
    limit = max(limit, 1.1)
    return limit, int(np.count_nonzero(~(perplexity <= limit)))


def outside_note(number: int, total: int, limit: float) -> str:
    """A sentence on the examples beyond an axis' end."""
    if not number:
        return f"All {total:,} examples are shown."
    return f"{number:,} of {total:,} examples lie below -{limit:.3g} and are not shown."


def _confidence_axis(axis: Any, limit: float) -> None:
    """Values are at most -1: logarithmic in the perplexity, the surest at the far end."""
    from matplotlib.ticker import FixedLocator, NullLocator

    ticks = [
        digit * 10.0**power
        for power in range(math.ceil(math.log10(limit)) + 1)
        for digit in ((1, 2, 5) if limit < 200 else (1,))
    ]
    axis.set_major_locator(FixedLocator([-tick for tick in ticks if tick <= limit]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(_plain)


def _plain(value: float, _position: float | None) -> str:
    return f"{value:g}"


def histogram_picture(partition: Partition) -> Picture:
    """How many examples have which confidence, and where the median lies."""
    confidence = partition.confidence
    limit, outside = shown_range(-confidence)
    median = float(np.median(confidence))
    bins = -np.geomspace(limit, 1.0, 41)

    def plot(axes: Axes) -> None:
        axes.set_xscale("symlog", linthresh=1)
        for half, colour in HALF_COLOURS.items():
            values = confidence[partition.subset == half]
            axes.hist(
                values[values >= -limit], bins=list(bins), color=colour, alpha=0.75, label=half
            )
        if median >= -limit:
            axes.axvline(median, color=_INK, linestyle="--", label=f"median {median:.3g}")
        axes.set_xlim(-limit, -1)
        _confidence_axis(axes.xaxis, limit)
        axes.set_xlabel("confidence (minus perplexity, log scale)")
        axes.set_ylabel("examples")
        axes.legend()

    scorings = partition.nll_sum.shape[1]
    return Picture(
        "Confidence of the training examples",
        f"Confidence is minus the perplexity of the response, a mean of {scorings} scoring(s) "
        "during the reference model's epoch; -1 is certainty. The dashed line is the median, "
        f"where the halves part. {outside_note(outside, len(confidence), limit)}",
        f"Histogram of the confidence of {len(confidence):,} examples, median {median:.3g}.",
        draw("histogram", plot),
    )


def map_picture(partition: Partition) -> Picture:
    """Confidence against its spread over the scorings, coloured by half."""
    limit, outside = shown_range(-partition.confidence)

    def plot(axes: Axes) -> None:
        for half, colour in HALF_COLOURS.items():
            rows = (partition.subset == half) & (partition.confidence >= -limit)
            axes.scatter(
                partition.variability[rows],
                partition.confidence[rows],
                s=5,
                color=colour,
                alpha=0.6,
                linewidths=0,
                label=half,
                rasterized=True,  # the file's size does not grow with the data
            )
        # Few scorings can agree exactly, so zero must have a place.
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(_plain)
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(-limit, -1)
        _confidence_axis(axes.yaxis, limit)
        axes.set_xlabel("variability (std. dev. of perplexity, log scale)")
        axes.set_ylabel("confidence (minus perplexity, log scale)")
        axes.legend(markerscale=3)

    return Picture(
        "Map of the training examples",
        "One dot per example: how sure the reference model is of it, and how much its perplexity "
        "moved between the scorings. Top left: learnt early. Further right: learnt on the way, or "
        f"not settled. {outside_note(outside, len(partition.id), limit)}",
        "Scatter plot of confidence against variability, coloured by half.",
        draw("map", plot, height=3.6),
    )


def groups_picture(partition: Partition, groups: Sequence[str]) -> Picture:
    """The share of each group's examples that are in the confident half."""
    names = np.asarray(groups, dtype=np.str_)
    sure = partition.subset == CONFIDENT
    shares = {str(name): 100 * float(sure[names == name].mean()) for name in np.unique(names)}
    ordered = sorted(shares, key=lambda name: (shares[name], name))

    def plot(axes: Axes) -> None:
        bars = axes.barh(ordered, [shares[name] for name in ordered], color=COLOURS[0])
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
        axes.axvline(50, color=_INK, linestyle="--", linewidth=1)
        axes.grid(False, axis="y")
        axes.set_xlim(0, 108)  # room for the numbers
        axes.set_xlabel("examples in the confident half (%)")
        axes.set_ylabel("group of examples")

    return Picture(
        "Which examples the model is sure of",
        "For each group of the data, the share of its examples in the confident half; by chance "
        "it would be 50 % (dashed).",
        "Bar chart of the share of examples in the confident half: "
        + ", ".join(f"{name} {shares[name]:.0f} %" for name in reversed(ordered))
        + ".",
        draw("groups", plot, height=1 + 0.22 * len(ordered)),
    )
