"""The block of `docs/memory.md`: tables and pictures from result files.

python -m benchmarks.long_sequence plot DIR [--document FILE]
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.readme import replace_block
from benchmarks.report import cell, number, table
from benchmarks.targets import cpu_text

from .findings import Record, Results, lengths_of, read, targets
from .runs import LARGEST, LOSS, PREDICTION, STEP
from .settings import CPU, CUDA, MODES, SUBJECTS

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


def write(folder: Path, document: Path | None = None) -> list[Path]:
    """Print the block or renew the document's, and draw the pictures; their paths.

    Raises:
        ValueError: the document has no place for them.
    """
    from .picture import draw  # it needs matplotlib

    results = read(folder)
    pictures = draw(results, folder)
    if document is None:
        print(markdown(results, [picture.name for picture in pictures]))
        return pictures
    places = [Path(os.path.relpath(picture, document.parent)).as_posix() for picture in pictures]
    text = document.read_text("utf-8")
    block = markdown(results, places)
    document.write_text(replace_block(text, block, BEGIN, END), encoding="utf-8")
    return pictures


def markdown(results: Sequence[Results], pictures: Sequence[str]) -> str:
    """Everything that the results say; pictures are paths beside the document."""
    parts = []
    if not any(one.device == CUDA and one.measured for one in results):
        parts.append(NO_GPU)
    for one in results:
        parts += [f"### {title(one)}\n"]
        parts += section(one)
        name = f"{one.device}-{one.model}"
        parts += [
            f"![{alt(Path(picture).stem)}]({picture})\n"
            for picture in pictures
            if Path(picture).stem in (name, f"{name}-largest")
        ]
    known = {(one.device, one.model) for one in results if one.measured}
    # What was promised of a GPU is said before there is one.
    promised = [one for one in results if one.measured]
    if (CUDA, "8B") not in known:
        promised.append(Results("8B", CUDA, None, None))
    return "\n".join([*parts, "### Targets\n", target_table(promised)])


def alt(stem: str) -> str:
    """A picture's words."""
    device, _, what = stem.partition("-")
    model, _, largest = what.partition("-")
    shown = "Bars: largest length" if largest else "Lines: peak memory against length"
    return f"{shown} by mode, {model}, {device.upper()}"


def title(results: Results) -> str:
    return f"{results.model} on {'a GPU' if results.device == CUDA else 'the CPU'}"


def section(results: Results) -> list[str]:
    """The tables of one model on one device."""
    parts = [origin(results)]
    if results.measured:
        parts += [peak_table(results), speed_table(results)]
        if any(r["measure"] == LOSS for r in results.measured["records"]):
            parts.append(loss_table(results))
        if results.records(LARGEST):
            parts.append(largest_table(results))
    if results.records(PREDICTION):
        parts += [PREDICTED, predicted_table(results)]
    missing = (
        {**results.measured["left_out"], **results.measured["failed"]} if results.measured else {}
    )
    if missing:
        parts.append(
            "Not measured: "
            + "; ".join(f"{cell(n)}: {cell(w)}" for n, w in missing.items())
            + ".\n"
        )
    return parts


def origin(results: Results) -> str:
    """What was trained, on what, by which code."""
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
    records: Sequence[Record], head: str, value: Callable[[str, int], str], modes: Sequence[str]
) -> str:
    """A row for each mode, a column for each of the records' lengths."""
    lengths = lengths_of(records)
    rows = [[MODES[mode].says, *(value(mode, length) for length in lengths)] for mode in modes]
    return table([head, *(f"{length:,}" for length in lengths)], rows)


def measured_modes(results: Results) -> list[str]:
    """In the table's order."""
    found = {record["mode"] for record in results.records(STEP)}
    return [mode for mode in MODES if mode in found]


def peak_table(results: Results) -> str:
    """Bytes by mode and length."""

    def value(mode: str, length: int) -> str:
        step = results.steps(mode).get(length)
        if step is not None:
            return f"{step['peak_bytes'] / 2**20:,.0f}"
        failing = results.failing(mode)
        return "no memory" if failing is not None and failing <= length else "-"

    head = "peak, MiB; tokens of each of two sequences:"
    before = ""
    if results.device == CPU:
        most = max(record.get("before_bytes", 0) for record in results.records(STEP))
        before = f"Growth of the process, which has {most / 2**20:,.0f} MiB before the model.\n\n"
    return before + grid(results.records(STEP), head, value, measured_modes(results))


def speed_table(results: Results) -> str:
    """Tokens a second."""

    def value(mode: str, length: int) -> str:
        step = results.steps(mode).get(length)
        return "-" if step is None else f"{step['tokens'] / step['seconds']:,.0f}"

    return grid(results.records(STEP), "tokens/s", value, measured_modes(results))


def predicted_table(results: Results) -> str:
    """Predicted bytes, and by how much of the measured they differ where there are any."""

    def value(mode: str, length: int) -> str:
        predicted = results.predictions(mode).get(length)
        if predicted is None:
            return "-"
        step = results.steps(mode).get(length)
        beside = f" ({predicted / step['peak_bytes'] - 1:+.0%})" if step else ""
        return f"{predicted / 2**20:,.0f}{beside}"

    found = {record["mode"] for record in results.records(PREDICTION)}
    modes = [mode for mode in MODES if mode in found]
    return grid(results.records(PREDICTION), "predicted peak, MiB", value, modes)


def loss_table(results: Results) -> str:
    """The fused loss alone."""
    rows = [
        [
            f"{record['rows']:,}",
            *(
                f"{record[name] / 2**20:,.1f}"
                for name in ("loss_peak_bytes", "workspace_bytes", "formula_bytes")
            ),
        ]
        for record in results.records(LOSS)
    ]
    head = ["the loss alone, lean: rows", "peak, MiB", "without gradients and numbers of rows"]
    return table([*head, "formula"], rows)


def largest_table(results: Results) -> str:
    """Both bounds of the searches."""
    rows = []
    for record in results.records(LARGEST):
        fails = "-" if record["fails"] is None else f"{record['fails']:,}"
        fits = f"{record['length']:,}" if record["closed"] else f"at least {record['length']:,}"
        rows.append([MODES[record["mode"]].says, fits, fails])
    budget = results.records(LARGEST)[0]["budget_bytes"]
    return table([f"in {budget / 2**20:,.0f} MiB", "largest length", "fails"], rows)


def target_table(results: Sequence[Results]) -> str:
    """What was promised."""
    rows = []
    for one in results:
        for target in targets(one):
            value = target.value
            said = "-" if value is None else f"{value:,.0f}" if value >= 64 else number(value)
            wanted = f"{target.limit:,.0f}" if target.limit >= 64 else f"{target.limit:.3g}"
            note = f" ({cell(target.note)})" if target.note else ""
            rows.append([title(one), cell(target.says) + note, said, wanted, target.verdict])
    return table(["model", "target", "found", "wanted", "verdict"], rows, left=2)
