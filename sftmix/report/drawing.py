"""Draw pictures as inline SVG whose ink is a CSS variable, to follow light and dark mode."""

from __future__ import annotations

import importlib.util
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from markupsafe import Markup

from sftmix.pairs.partition import CONFIDENT, UNCONFIDENT

if TYPE_CHECKING:  # an optional extra
    from matplotlib.axes import Axes

# Legend rows that fit into a figure, and the height in inches that each further row adds.
ROWS_OF_LEGEND, ROW_OF_LEGEND = 4, 0.18

P = ParamSpec("P")
T = TypeVar("T")

# Colours that stand out on white and near-black, and that colour-blind readers tell apart.
COLOURS = ("#3b82c4", "#d9772b", "#2a9d6f", "#b565a7", "#8a8f98", "#c4a000")
INK, _GRID = "#010203", "#040506"  # replaced by CSS variables in the SVG
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: searchable, and small
    "text.parse_math": False,  # a `$` in a name is a dollar
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _GRID,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Picture:
    """A figure of the report; `alt` says in words what it shows."""

    title: str
    caption: str
    alt: str
    svg: Markup


@dataclass(frozen=True)
class LeftOut:
    """A part that could not be made, and why."""

    title: str
    reason: str


def attempt(title: str, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | LeftOut:
    """Return what `make` makes, or why it cannot, which becomes a sentence in the report.

    The errors are those that the command line prints without a traceback.
    """
    try:
        return make(*args, **kwargs)
    except (ValueError, OSError, ImportError) as error:
        return LeftOut(title, str(error))


def require_plots() -> None:
    """Check that pictures can be drawn, before a long run ends in finding out.

    Raises:
        ImportError: a package is not installed, saying how to install it.
    """
    for module, name in (("matplotlib", "matplotlib"), ("sklearn", "scikit-learn")):
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"pictures need {name}: pip install {name}")


def draw(name: str, plot: Callable[[Axes], None], height: float = 3.1) -> Markup:
    """Return a figure as inline SVG; `name` keeps its ids apart from those of other figures."""
    import matplotlib  # an optional extra
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        # The figure is narrow: its text of ten points keeps its size on a phone.
        figure = Figure(figsize=(4.8, height), layout="constrained")
        plot(figure.add_subplot())
        file = io.StringIO()
        nothing: Any = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "var(--ink)").replace(_GRID, "var(--grid)")
    # Groups are numbered alike in every figure and nothing refers to them.
    return Markup(re.sub(r'<g id="[^"]*"', "<g", svg))


def legend_above(axes: Axes, columns: int = 1, **options: Any) -> None:
    """Put a legend above the axes, where it hides nothing; many rows make the figure higher."""
    legend = axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        borderaxespad=0.2,
        columnspacing=1.2,
        handlelength=1.6,
        **options,
    )
    rows = math.ceil(len(legend.get_texts()) / columns)
    if rows > ROWS_OF_LEGEND:
        figure: Any = axes.get_figure(root=True)
        height = figure.get_figheight() + ROW_OF_LEGEND * (rows - ROWS_OF_LEGEND)
        figure.set_figheight(height)


def colour(number: int) -> str:
    """Return the colour of a row of the comparison in every picture."""
    return COLOURS[number % len(COLOURS)]


def subset_colours(names: Sequence[str]) -> dict[str, str]:
    """Return a colour for each half or level, the most confident first, from blue to orange."""
    found = set(names)
    if found <= {CONFIDENT, UNCONFIDENT}:
        return {CONFIDENT: COLOURS[0], UNCONFIDENT: COLOURS[1]}
    ordered = sorted(found, key=lambda name: [int(digits) for digits in re.findall(r"\d+", name)])
    last = max(len(ordered) - 1, 1)
    return {name: _between(number / last) for number, name in enumerate(ordered)}


def _between(share: float) -> str:
    first, second = (bytes.fromhex(colour[1:]) for colour in COLOURS[:2])
    mixed = (round(a + share * (b - a)) for a, b in zip(first, second, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)
