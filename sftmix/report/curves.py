"""Draw what is watched while training, with a colour for each row of the comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sftmix.pairs.partition import CONFIDENT, UNCONFIDENT
from sftmix.report.drawing import Picture, colour, draw, legend_above
from sftmix.report.runs import Group

if TYPE_CHECKING:  # an optional extra
    from matplotlib.axes import Axes

Curve = tuple[list[int], list[float]]  # steps, values
Line = tuple[str, list[Curve], str, str]  # name, of each seed, colour, style
SEVERAL = "Thin lines are single seeds, thick ones their mean where all have logged."
TERMS = {
    "loss": (
        "Training loss",
        "Total training loss, a mean over the steps since the point before. It is not comparable "
        "between methods, each of which minimises a sum of its own.",
        "loss (nats)",
    ),
    "ntp_loss": (
        "Next-token loss while training",
        "The NTP term without the Mixup term, which makes runs comparable: the mean over the "
        "response tokens of the steps since the point before. Lower is a closer fit to the "
        "training data, which says nothing about new data.",
        "NTP loss (nats per token)",
    ),
    "mixup_loss": (
        "Mixup term while training",
        "The loss on interpolated pairs, before it is weighted by mu. It is no measure of fit by "
        "itself: each target is a mixture of two tokens, which cannot be predicted with certainty.",
        "Mixup loss (nats per position)",
    ),
    "entropy": (
        "Entropy while training",
        "The entropy of the model's predictions, a mean over the tokens with loss of the steps "
        "since the point before. It falls as the model grows sure, whether it is right or not.",
        "entropy (nats per token)",
    ),
    "mean_token_accuracy": (
        "Token accuracy while training",
        "The share of tokens with loss whose label is the most likely token, of the steps since "
        "the point before.",
        "accuracy (share of tokens)",
    ),
    "eval_loss": (
        "Held-out loss while training",
        "The NTP loss of the data of --eval_data, at each evaluation: a mean over their response "
        "tokens. Where it rises while the training loss falls, the model overfits.",
        "held-out loss (nats per token)",
    ),
}


def term_picture(groups: Sequence[Group], key: str) -> Picture:
    """Draw one term of the loss, entropy or accuracy, for the rows that have it.

    Raises:
        ValueError: no run has logged it.
    """
    title, caption, unit = TERMS[key]
    lines = [
        (group.name, [run.curve(key) for run in group.runs], colour(number), "-")
        for number, group in enumerate(groups)
    ]
    return _picture(key, title, caption, unit, lines)


def halves_picture(groups: Sequence[Group]) -> Picture:
    """Draw the NTP term of both halves of the data.

    Raises:
        ValueError: no run has logged it.
    """
    lines = [
        (
            f"{group.name}, {half}",
            [run.curve(f"ntp_loss_{half}") for run in group.runs],
            colour(number),
            style,
        )
        for number, group in enumerate(groups)
        for half, style in ((CONFIDENT, "-"), (UNCONFIDENT, ":"))
    ]
    return _picture(
        "halves",
        "The two halves while training",
        "The NTP loss of the tokens of the confident side of the pairs (solid) and of the "
        "unconfident one (dotted). Every batch holds equally many examples of both.",
        "NTP loss (nats per token)",
        lines,
    )


def _picture(
    name: str,
    title: str,
    caption: str,
    unit: str,
    lines: Sequence[Line],
) -> Picture:
    lines = [
        (label, logged, colour, style)
        for label, curves, colour, style in lines
        if (logged := [curve for curve in curves if curve[0]])
    ]
    if not lines:
        raise ValueError("no run has logged it")

    columns = 1 if max(len(line[0]) for line in lines) > 22 else 2

    def plot(axes: Axes) -> None:
        for number, line in enumerate(lines):
            # The lines below are wider, which shows both of two curves that coincide.
            _draw(axes, *line, width=1.4 + 2 * (1 - (number + 1) / len(lines)))
        axes.set_xlabel("optimizer steps")
        axes.set_ylabel(unit)
        legend_above(axes, columns)

    ends = "; ".join(f"{label} ends at {_last(mean(curves)):.4g}" for label, curves, *_ in lines)
    several = any(len(curves) > 1 for _, curves, *_ in lines)
    return Picture(
        title,
        f"{caption} {SEVERAL}" if several else caption,
        f"Line chart of {unit} against optimizer steps: {ends}.",
        draw(name, plot, height=2.9 + 0.18 * math.ceil(len(lines) / columns)),
    )


def _draw(
    axes: Axes, label: str, curves: Sequence[Curve], colour: str, style: str, width: float
) -> None:
    marker = "o" if all(len(steps) == 1 for steps, _ in curves) else None
    if len(curves) > 1:
        for steps, values in curves:
            axes.plot(steps, values, style, color=colour, linewidth=0.7, alpha=0.5)
    steps, values = mean(curves)
    axes.plot(steps, values, style, color=colour, label=label, linewidth=width, marker=marker)


def mean(curves: Sequence[Curve]) -> Curve:
    """Return the mean at the steps that all curves have; without a common step, the first curve."""
    common = sorted(set.intersection(*(set(steps) for steps, _ in curves)))
    if not common:
        return curves[0]
    tables = [dict(zip(steps, values, strict=True)) for steps, values in curves]
    return common, [float(np.mean([table[step] for table in tables])) for step in common]


def _last(curve: Curve) -> float:
    finite = [value for value in curve[1] if math.isfinite(value)]
    return finite[-1] if finite else math.nan
