"""Draw confidence: of a partition, and before and after training.

Legend: S examples, C scorings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sftmix.pairs.partition import CONFIDENT, Partition
from sftmix.report.drawing import (
    COLOURS,
    INK,
    Picture,
    draw,
    legend_above,
    subset_colours,
)

if TYPE_CHECKING:  # an optional extra
    from matplotlib.axes import Axes


def shown_range(perplexity: NDArray[np.float64]) -> tuple[float, int]:
    """Return a limit for perplexity axes, and how many values (infinite ones too) lie beyond it.

    The limit is twice the 99th percentile of the finite values, or the largest value if that is
    smaller.
    """
    finite = perplexity[np.isfinite(perplexity)]
    if not len(finite):
        return 10.0, len(perplexity)
    limit = min(2 * float(np.quantile(finite, 0.99)), float(finite.max()))
    # A range of no width cannot be drawn.
    limit = max(limit, 1.1)
    return limit, int(np.count_nonzero(~(perplexity <= limit)))


def outside_note(number: int, total: int, limit: float) -> str:
    """Return a sentence on the examples beyond an axis' end."""
    if not number:
        return f"All {total:,} examples are shown."
    return f"{number:,} of {total:,} examples lie below -{limit:.3g} and are not shown."


def _confidence_axis(axis: Any, limit: float) -> None:
    """Make an axis of values up to -1 logarithmic in the perplexity, the surest at the far end."""
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


def histogram_picture(partition: Partition, name: str = "") -> Picture:
    """Draw how many examples have which confidence, and where the median lies."""
    confidence = partition.confidence
    limit, outside = shown_range(-confidence)
    median = float(np.median(confidence))
    bins = -np.geomspace(limit, 1.0, 41)

    def plot(axes: Axes) -> None:
        axes.set_xscale("symlog", linthresh=1)
        for subset, colour in subset_colours(partition.subset.tolist()).items():
            values = confidence[partition.subset == subset]
            axes.hist(
                values[values >= -limit], bins=list(bins), color=colour, alpha=0.75, label=subset
            )
        if median >= -limit:
            axes.axvline(median, color=INK, linestyle="--", label=f"median {median:.3g}")
        axes.set_xlim(-limit, -1)
        _confidence_axis(axes.xaxis, limit)
        axes.set_xlabel("confidence (minus perplexity, log scale)")
        axes.set_ylabel("examples")
        legend_above(axes, columns=3)

    scorings = partition.nll_sum.shape[1]
    return Picture(
        "Confidence of the training examples",
        f"Confidence is minus the perplexity of the response, a mean of {scorings} scoring(s) "
        "during the reference model's epoch; -1 is certainty. The dashed line is the median. "
        f"{outside_note(outside, len(confidence), limit)}",
        f"Histogram of the confidence of {len(confidence):,} examples, median {median:.3g}.",
        draw(f"histogram {name}", plot),
    )


def map_picture(partition: Partition, name: str = "") -> Picture:
    """Draw confidence against its spread over the scorings, coloured by half."""
    limit, outside = shown_range(-partition.confidence)

    def plot(axes: Axes) -> None:
        for subset, colour in subset_colours(partition.subset.tolist()).items():
            rows = (partition.subset == subset) & (partition.confidence >= -limit)
            axes.scatter(
                partition.variability[rows],
                partition.confidence[rows],
                s=5,
                color=colour,
                alpha=0.6,
                linewidths=0,
                label=subset,
                rasterized=True,  # the file's size does not grow with the data
            )
        # A few scorings can agree exactly, so the axis needs a zero.
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(_plain)
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(-limit, -1)
        _confidence_axis(axes.yaxis, limit)
        axes.set_xlabel("variability (std. dev. of perplexity, log scale)")
        axes.set_ylabel("confidence (minus perplexity, log scale)")
        legend_above(axes, columns=3, markerscale=3)

    return Picture(
        "Map of the training examples",
        "One dot per example: how sure the reference model is of it, and how much its perplexity "
        "moved between the scorings. Top left: learnt early. Further right: learnt on the way, or "
        f"not settled. {outside_note(outside, len(partition.id), limit)}",
        f"Scatter plot of confidence against variability of {len(partition.id):,} examples, "
        "coloured by half or level.",
        draw(f"map {name}", plot, height=3.6),
    )


def groups_picture(
    partition: Partition,
    groups: Sequence[str],  # (S,), a name for the group of each example
) -> Picture:
    """Draw the share of each group's examples that are in the confident half.

    Raises:
        ValueError: `groups` is not one name for each example of `partition`.
    """
    if len(groups) != len(partition.id):
        raise ValueError(
            f"groups: expected one name for each of {len(partition.id)} examples, got {len(groups)}"
        )
    names = np.asarray(groups, dtype=np.str_)
    sure = partition.subset == CONFIDENT
    shares = {str(name): 100 * float(sure[names == name].mean()) for name in np.unique(names)}
    ordered = sorted(shares, key=lambda name: (shares[name], name))

    def plot(axes: Axes) -> None:
        bars = axes.barh(ordered, [shares[name] for name in ordered], color=COLOURS[0])
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
        axes.axvline(50, color=INK, linestyle="--", linewidth=1)
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


def spread(partition: Partition) -> float:
    """Return the standard deviation of the finite confidences; NaN if there are none."""
    finite = partition.confidence[np.isfinite(partition.confidence)]
    return float(finite.std()) if len(finite) else math.nan


def change_picture(
    before: Partition | None, after: Mapping[str, Sequence[Partition]], colours: Mapping[str, str]
) -> Picture:
    """Draw the confidence of the same examples before training (if known) and after each run.

    Raises:
        ValueError: nothing was scored.
    """
    scored: list[tuple[str, Sequence[Partition], str]] = []
    if before is not None:
        scored = [("before training", [before], INK)]
    scored += [(name, parts, colours[name]) for name, parts in after.items() if parts]
    if not scored:
        raise ValueError("no model was scored")
    confidences = [
        (name, np.concatenate([part.confidence for part in parts]), shade)
        for name, parts, shade in scored
    ]
    everything = np.concatenate([values for _, values, _ in confidences])
    limit, outside = shown_range(-everything)
    bins = list(-np.geomspace(limit, 1.0, 31))

    def plot(axes: Axes) -> None:
        axes.set_xscale("symlog", linthresh=1)
        for number, (name, values, shade) in enumerate(confidences):
            kept = values[values >= -limit]
            axes.hist(
                kept,
                bins=bins,
                weights=np.full(len(kept), 100 / len(values)),
                histtype="step",
                color=shade,
                linewidth=1.3 + 0.7 * min(len(confidences) - number - 1, 4) * (shade != INK),
                linestyle="--" if shade == INK else "-",
                label=name,
            )
        axes.set_xlim(-limit, -1)
        _confidence_axis(axes.xaxis, limit)
        axes.set_xlabel("confidence (minus perplexity, log scale)")
        axes.set_ylabel("share of examples (%)")
        legend_above(axes, 1 if max(len(name) for name, *_ in confidences) > 22 else 2)

    spreads = ", ".join(
        f"{name} {np.mean([spread(part) for part in parts]):.4g}" for name, parts, _ in scored
    )
    number = len(scored[0][1][0].id)
    return Picture(
        "Confidence before and after training",
        f"The same {number:,} training examples, scored once under the model that training began "
        "from and once under each finished model (all seeds of a row together). Standard "
        f"deviations of the finite values, mean over seeds: {spreads}. "
        f"{outside_note(outside, len(everything), limit)}",
        f"Histograms of confidence before and after training; standard deviations: {spreads}.",
        draw("change " + " ".join(after), plot, height=3.1 + 0.09 * len(scored)),
    )
