"""What result files of long sequences say: targets, tables and pictures of `docs/memory.md`.

python -m benchmarks.long_sequence plot DIR [--document FILE]
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.records import Record, ratio
from benchmarks.tables import cell, cpu_text, number, show, table
from benchmarks.targets import Target, judged, largest

from .settings import (
    CPU,
    CUDA,
    DONE,
    LARGEST,
    LOSS,
    MODES,
    PREDICTION,
    STEP,
    SUBJECTS,
    SUITE,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEGIN = (
    "<!-- long sequences: begin (python -m benchmarks.long_sequence plot"
    " benchmarks/long_sequence/results --document docs/memory.md) -->"
)
END = "<!-- long sequences: end -->"
NO_GPU = "Nothing has been measured on a GPU yet.\n"
PREDICTED = (
    "**Predicted, not measured**, by `sftmix plan`: what tensors of the step on one pair hold, "
    "without the device's context and the allocator's fragments.\n"
)
PROMISED, STRETCH = 131072, 300_000
JUDGED = 16384  # tokens of each sequence, on the CPU
# Ours from light to dark by what is turned on; all others are grey, told apart by their names.
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


@dataclass(frozen=True)
class Results:
    """The figures of one model on one device; only predictions where nothing was measured."""

    model: str
    device: str
    measured: Mapping[str, Any] | None
    predicted: Mapping[str, Any] | None

    @property
    def title(self) -> str:
        """Return it in words."""
        return f"{self.model} on {'a GPU' if self.device == CUDA else 'the CPU'}"

    @property
    def quick(self) -> bool:
        """Tell whether the figures mean nothing."""
        return any(one["settings"]["quick"] for one in (self.measured, self.predicted) if one)

    def records(self, measure: str, mode: str | None = None) -> list[Record]:
        """Return the records of one measure, of one mode or of all, in the file's order."""
        source = self.predicted if measure == PREDICTION else self.measured
        return [
            record
            for record in (source["records"] if source else ())
            if record["measure"] == measure and mode in (None, record["mode"])
        ]

    def steps(self, mode: str) -> dict[int, Record]:
        """Return the steps that ran to the end, by length."""
        return {r["length"]: r for r in self.records(STEP, mode) if r["outcome"] == DONE}

    def failing(self, mode: str) -> int | None:
        """Return the shortest length that had no memory."""
        gone = (r["length"] for r in self.records(STEP, mode) if r["outcome"] != DONE)
        return min(gone, default=None)

    def predictions(self, mode: str) -> dict[int, int]:
        """Return predicted bytes at the peak, by length."""
        return {r["length"]: r["peak_bytes"] for r in self.records(PREDICTION, mode)}

    def largest(self, mode: str) -> Record | None:
        """Return the record of a search that found both bounds."""
        return next((r for r in self.records(LARGEST, mode) if r["closed"]), None)


def read(folder: Path) -> list[Results]:
    """Return a folder's results by device and model; quick ones only if there are no others."""
    files = sorted(folder.glob(f"*-{SUITE}-*.json"))
    found = [json.loads(file.read_text("utf-8")) for file in files]
    found = [one for one in found if not one["settings"]["quick"]] or found
    results: dict[tuple[str, str], dict[bool, Mapping[str, Any]]] = {}
    for one in found:
        key = one["settings"]["model"], one["settings"]["device"]
        results.setdefault(key, {}).setdefault(one["settings"]["predicted"], one)
    return [Results(*key, own.get(False), own.get(True)) for key, own in results.items()]


def targets(results: Results) -> list[Target]:
    """Return all promises; those that are not measured say so."""
    found = []
    if (results.device, results.model) == (CUDA, "8B"):
        longest = max(results.steps("lean"), default=None)
        says = "lean, tokens of each sequence without offload"
        found.append(Target(says, longest, PROMISED, least=True))
        for mode in ("dense", "dense-checkpointed"):
            fails = f"{MODES[mode].says} fails at, tokens"
            found.append(Target(fails, results.failing(mode), PROMISED // 4))
        found.append(Target(f"{says}, stretch", longest, STRETCH, least=True))
    if (results.device, results.model) == (CPU, "toy"):
        lean, dense = (results.steps(mode).get(JUDGED, {}) for mode in ("lean", "dense"))
        share = ratio(lean.get("process_bytes"), dense.get("process_bytes"))
        says = f"lean / {MODES['dense'].says}, the process' peak at {JUDGED:,} tokens"
        found.append(Target(says, share, 0.25))
    return judged(found + common_targets(results), results.quick)


def common_targets(results: Results) -> list[Target]:
    """Return the promises of every model."""
    both, alone = (results.largest(mode) or {} for mode in ("lean", "lean-ntp"))
    lengths = ratio(both.get("length"), alone.get("length"))
    losses = sorted(results.records(LOSS), key=lambda record: record["rows"])
    spaces = [record["workspace_bytes"] for record in losses]
    growth = ratio(spaces[-1], spaces[0]) if len(spaces) > 1 else None
    rows = f"{losses[0]['rows']:,} to {losses[-1]['rows']:,} rows" if losses else ""
    off_formula, where = largest(
        {f"{r['rows']:,} rows": off(r["formula_bytes"], r["workspace_bytes"]) for r in losses}
    )
    off_prediction, when = largest(
        {
            f"{MODES[mode].says}, {length:,} tokens": off(predicted, step["peak_bytes"])
            for mode in MODES
            for length, predicted in results.predictions(mode).items()
            if (step := results.steps(mode).get(length)) is not None
        }
    )
    return [
        Target("largest length, lean / lean of NTP alone", lengths, 0.98, least=True),
        Target("the loss's workspace, most rows / fewest", growth, 1.05, note=rows),
        Target("the loss's workspace, off its formula by", off_formula, 0.10, note=where),
        Target("the step's peak, off its prediction by", off_prediction, 0.15, note=when),
    ]


def off(formula: float, measured: float) -> float:
    """Return how far a formula is from what was measured, as a share of it."""
    return abs(formula / measured - 1)


def write(folder: Path, document: Path | None = None) -> list[Path]:
    """Print the block or renew the document's, draw the pictures, and return their paths.

    Raises:
        ValueError: the document has no place for them.
    """
    from benchmarks.figures import write_svg  # it needs matplotlib

    results, pictures = read(folder), list[Path]()
    for one in results:
        name = f"{one.device}-{one.model}"
        pictures += write_svg(folder / f"{name}.svg", partial(peak_picture, one))
        pictures += write_svg(folder / f"{name}-largest.svg", partial(largest_picture, one))
    beside = folder if document is None else document.parent
    places = [Path(os.path.relpath(picture, beside)).as_posix() for picture in pictures]
    show(markdown(results, places), document, BEGIN, END)
    return pictures


def markdown(results: Sequence[Results], pictures: Sequence[str]) -> str:
    """Return everything that the results say; pictures are paths beside the document."""
    parts = []
    if not any(one.device == CUDA and one.measured for one in results):
        parts.append(NO_GPU)
    for one in results:
        parts += [f"### {one.title}\n", *section(one)]
        name = f"{one.device}-{one.model}"
        alts = {
            name: "Lines: peak memory against length",
            f"{name}-largest": "Bars: largest length",
        }
        parts += [
            f"![{alts[stem]} by mode, {one.model}, {one.device.upper()}]({picture})\n"
            for picture in pictures
            if (stem := Path(picture).stem) in alts
        ]
    promised = [one for one in results if one.measured]
    # What was promised of a GPU is said before there is one.
    if (CUDA, "8B") not in {(one.device, one.model) for one in promised}:
        promised.append(Results("8B", CUDA, None, None))
    return "\n".join([*parts, "### Targets\n", target_table(promised)])


def section(results: Results) -> list[str]:
    """Return the tables of one model on one device."""
    parts = [origin(results)]
    if results.measured:
        parts += [peak_table(results), grid(results, STEP, "tokens/s", speed)]
        parts += [loss_table(results)] if results.records(LOSS) else []
        parts += [largest_table(results)] if results.records(LARGEST) else []
    if results.records(PREDICTION):
        parts += [PREDICTED, grid(results, PREDICTION, "predicted peak, MiB", prediction)]
    if results.measured:
        missing = {**results.measured["left_out"], **results.measured["failed"]}
        said = "; ".join(f"{cell(name)}: {cell(why)}" for name, why in missing.items())
        parts += [f"Not measured: {said}.\n"] if missing else []
    return parts


def origin(results: Results) -> str:
    """Return what was trained, on what, by which code."""
    source = results.measured or results.predicted
    assert source is not None
    facts, dtype = source["facts"], source["settings"]["dtype"]
    words = ["QUICK RUN, a tiny model"] if results.quick else []
    words += [SUBJECTS[results.model].says, dtype]
    if results.measured:
        words += [
            f"{facts['gpu']}, driver {facts['driver']}" if "gpu" in facts else cpu_text(facts)
        ]
        words += [f"torch {facts['torch']}", f"transformers {facts['packages']['transformers']}"]
    words += [facts["date"][:10], f"commit {facts['commit']}"]
    return cell("; ".join(words)) + ".\n"


def grid(
    results: Results, measure: str, head: str, value: Callable[[Results, str, int], str]
) -> str:
    """Return a table with a line for each mode and a column for each length of a measure.

    Lengths that only a search went to are left out.
    """
    records = results.records(measure)
    lengths = sorted({r["length"] for r in records if not r.get("searched")})
    lines = [
        [way.says, *(value(results, mode, length) for length in lengths)]
        for mode, way in MODES.items()
        if any(record["mode"] == mode for record in records)
    ]
    return table([head, *(f"{length:,}" for length in lengths)], lines)


def peak_table(results: Results) -> str:
    """Return bytes by mode and length."""
    before = ""
    if results.device == CPU:
        most = max(record.get("before_bytes", 0) for record in results.records(STEP))
        before = f"Growth of the process, which has {most / 2**20:,.0f} MiB before the model.\n\n"
    return before + grid(results, STEP, "peak, MiB; tokens of each of two sequences:", peak)


def peak(results: Results, mode: str, length: int) -> str:
    """Return a step's peak, or that there was no memory for it."""
    step = results.steps(mode).get(length)
    if step is not None:
        return f"{step['peak_bytes'] / 2**20:,.0f}"
    failing = results.failing(mode)
    return "no memory" if failing is not None and failing <= length else "-"


def speed(results: Results, mode: str, length: int) -> str:
    """Return tokens a second."""
    step = results.steps(mode).get(length)
    return "-" if step is None else f"{step['tokens'] / step['seconds']:,.0f}"


def prediction(results: Results, mode: str, length: int) -> str:
    """Return predicted bytes, and by how much they differ from measured ones."""
    predicted = results.predictions(mode).get(length)
    if predicted is None:
        return "-"
    step = results.steps(mode).get(length)
    beside = f" ({predicted / step['peak_bytes'] - 1:+.0%})" if step else ""
    return f"{predicted / 2**20:,.0f}{beside}"


def loss_table(results: Results) -> str:
    """Return the memory of the fused loss without a model."""
    names = ("loss_peak_bytes", "workspace_bytes", "formula_bytes")
    lines = [
        [f"{record['rows']:,}", *(f"{record[name] / 2**20:,.1f}" for name in names)]
        for record in results.records(LOSS)
    ]
    head = ["the loss alone, lean: rows", "peak, MiB", "without gradients and numbers of rows"]
    return table([*head, "formula"], lines)


def fits(record: Record) -> str:
    """Return the longest length that a search saw to fit."""
    return f"{record['length']:,}" if record["closed"] else f"at least {record['length']:,}"


def largest_table(results: Results) -> str:
    """Return both bounds of the searches."""
    found = results.records(LARGEST)
    lines = [
        [MODES[r["mode"]].says, fits(r), "-" if r["fails"] is None else f"{r['fails']:,}"]
        for r in found
    ]
    head = f"in {found[0]['budget_bytes'] / 2**20:,.0f} MiB"
    return table([head, "largest length", "fails"], lines)


def target_table(results: Sequence[Results]) -> str:
    """Return what was promised, and what was found."""
    lines = []
    for one in results:
        for target in targets(one):
            value = target.value
            said = "-" if value is None else f"{value:,.0f}" if value >= 64 else number(value)
            wanted = f"{target.limit:,.0f}" if target.limit >= 64 else f"{target.limit:.3g}"
            note = f" ({cell(target.note)})" if target.note else ""
            lines.append([one.title, cell(target.says) + note, said, wanted, target.verdict])
    return table(["model", "target", "found", "wanted", "verdict"], lines, left=2)


def heading(results: Results, what: str) -> str:
    """Return a picture's two lines: what is shown, of which model on which machine."""
    from benchmarks.figures import place

    where = place(results.measured) if results.measured else "PREDICTED, nothing was measured"
    return f"{what}, {results.model}\n{where}"


def peak_picture(results: Results) -> Figure | None:
    """Draw a line for each mode: measured points, predicted dashes."""
    from benchmarks import figures

    lines = []
    for mode, way in MODES.items():
        measured = {n: record["peak_bytes"] / 2**30 for n, record in results.steps(mode).items()}
        predicted = {n: size / 2**30 for n, size in results.predictions(mode).items()}
        colour = COLOURS.get(mode, figures.OTHERS)
        dashed = {"linestyle": "--", "color": colour, "linewidth": 1.2}
        if measured or predicted:
            own = (measured, predicted or None, dashed)
            lines.append(figures.Line(way.says, colour, figures.INK, *own))
    if not lines:
        return None
    names = ("tokens of each of two sequences", "peak of a step, GiB; dashed: predicted")
    title = heading(results, "Peak memory of a training step")
    return figures.lines([figures.Panel(*names, lines, (1.0, 2.0, 5.0))], title, 5.6)


def largest_picture(results: Results) -> Figure | None:
    """Draw bars of the largest length that fits."""
    from benchmarks import figures

    found = results.records(LARGEST)
    if not found:
        return None
    bars = []
    for record in found:
        length, colour = record["length"], COLOURS.get(record["mode"], figures.OTHERS)
        name = MODES[record["mode"]].says
        bars.append(figures.Bar(name, length, length, length, fits(record), colour))
    groups = {f"{found[0]['budget_bytes'] / 2**20:,.0f} MiB": bars}
    title = heading(results, "Largest length")
    return figures.bars(groups, None, title, "tokens of each of two sequences")
