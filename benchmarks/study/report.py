"""The study's tables as Markdown, and its block in a document, from result files.

python -m benchmarks.study report DIR [--document FILE]
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.readme import replace_block
from benchmarks.report import table
from sftmix.report.comparison import Comparison

from .findings import (
    MEASURES,
    PRIMARY,
    SPREAD,
    Finding,
    Measure,
    Results,
    findings,
    read,
    source_name,
)
from .settings import BASELINE, SYSTEMS

BEGIN = (
    "<!-- study: begin (python -m benchmarks.study report benchmarks/study/results"
    " --document docs/study.md) -->"
)
END = "<!-- study: end -->"
PICTURE = "study.svg"
ALT = (
    "Dots with 95 % intervals: difference of each system to NTP in held-out loss, and in the "
    "standard deviation of confidence, on each data set"
)


def main(words: Sequence[str]) -> None:
    """Print the block, draw the picture, renew the document's block."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study report", allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="DIR", help="with result files")
    parser.add_argument("--document", type=Path, metavar="FILE", help="whose block to renew")
    options = parser.parse_args(words)
    write(options.folder, options.document)


def write(folder: Path, document: Path | None = None) -> None:
    """See `main`.

    Raises:
        ValueError: there are no results, or they do not belong together.
    """
    from .picture import draw  # it needs matplotlib

    results = read(folder)
    draw(results, folder / PICTURE)
    block = markdown(results, PICTURE)
    if document is None:
        print(block)
        return
    place = os.path.relpath(folder / PICTURE, document.parent)
    text = document.read_text("utf-8")
    block = markdown(results, Path(place).as_posix())
    document.write_text(replace_block(text, block, BEGIN, END), encoding="utf-8")


def markdown(results: Sequence[Results], picture: str) -> str:
    """Everything that the results say."""
    found = {measure: findings(results, measure) for measure in MEASURES}
    parts = [origin(results), headline(found), verdict(found[PRIMARY]), f"![{ALT}]({picture})\n"]
    parts += ["### Held-out loss, the primary measure\n"]
    parts += [comparison_table(one, PRIMARY, found[PRIMARY]) for one in results]
    parts += ["### Spread of confidence\n"]
    parts += [comparison_table(one, SPREAD, found[SPREAD]) for one in results]
    parts += ["### All measures\n", MEANS]
    parts += [means_table(one, found) for one in results]
    parts += ["### The learning rate\n", search_table(results)]
    return "\n".join(parts)


MEANS = (
    "Mean ± sample standard deviation over seeds; bold where the difference to NTP is significant "
    "after Holm's correction over all comparisons of that measure.\n"
)


def origin(results: Sequence[Results]) -> str:
    """What was run, on what, by which code."""
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


def headline(found: Mapping[str, Sequence[Finding]]) -> str:
    """SFTMix beside NTP in loss and in spread of confidence, a line each."""
    lines = []
    for measure in (PRIMARY, SPREAD):
        how, said = MEASURES[measure], []
        for one in found[measure]:
            if one.system == "sftmix":
                difference, interval, _ = tested(one.test, how)
                real = "significant" if one.significant else "not significant"
                said.append(f"{source_name(one.source)} {difference} ({interval}; {real})")
        lines.append(
            f"- SFTMix beside NTP, {how.label} ({how.difference_unit}, 95 % interval): "
            f"{', '.join(said)}."
        )
    return "\n".join(lines) + "\n"


def verdict(found: Sequence[Finding]) -> str:
    """How many differences of the primary measure are significant, and which."""
    tests = [one for one in found if one.corrected is not None]
    real = [one for one in tests if one.significant]
    raw = [one for one in tests if one.test.significant]
    text = (
        f"Of {len(tests)} comparisons with NTP in {MEASURES[PRIMARY].label}, {len(raw)} have "
        f"p < 0.05, and {len(real)} after Holm's correction"
    )
    said = [
        f"{SYSTEMS[one.system].label} on {source_name(one.source)} is "
        f"{'worse' if (one.test.difference or 0) > 0 else 'better'} by "
        f"{abs(one.test.difference or 0):.4f} {MEASURES[PRIMARY].unit}"
        for one in real
    ]
    return f"{text}: {'; '.join(said)}.\n" if said else f"{text}.\n"


def comparison_table(one: Results, measure: str, found: Sequence[Finding]) -> str:
    """Every system of a data set beside NTP."""
    how = MEASURES[measure]
    unit = f" ({how.unit})" if how.unit else ""
    head = [f"{one.name}", f"{how.label}{unit}", "seeds", f"difference ({how.difference_unit})"]
    head += ["95 % interval", "p", "p, Holm"]
    rows = [
        ["base, not tuned", spread(one.base(measure), how), str(len(one.records)), *["-"] * 4],
        [
            SYSTEMS[BASELINE].label,
            spread(one.values(BASELINE, measure), how),
            str(len(one.values(BASELINE, measure))),
            *["-"] * 4,
        ],
    ]
    for finding in found:
        if finding.source == one.source:
            values = one.values(finding.system, measure)
            rows.append(
                [
                    SYSTEMS[finding.system].label,
                    spread(values, how),
                    str(len(values)),
                    *tested(finding.test, how),
                    p_text(finding.corrected),
                ]
            )
    return f"{table(head, rows)}"


def tested(test: Comparison, how: Measure) -> list[str]:
    """Difference, interval and p-value."""
    digits = 1 if how.relative else how.digits
    difference = "-" if test.difference is None else f"{test.difference:+.{digits}f}"
    interval = "-"
    if test.interval is not None:
        interval = " to ".join(f"{end:+.{digits}f}" for end in test.interval)
    return [difference, interval, p_text(test.p_value)]


def p_text(p_value: float | None) -> str:
    """Two digits, and no more than that it is small where it is."""
    if p_value is None:
        return "-"
    return "< 0.001" if p_value < 0.001 else f"{p_value:.{3 if p_value < 0.1 else 2}f}"


def spread(values: Mapping[int, float], how: Measure) -> str:
    """Mean ± sample standard deviation."""
    numbers = list(values.values())
    mean = f"{statistics.fmean(numbers):.{how.digits}f}"
    return f"{mean} ± {statistics.stdev(numbers):.{how.digits}f}" if len(numbers) > 1 else mean


def means_table(one: Results, found: Mapping[str, Sequence[Finding]]) -> str:
    """All measures of a data set's systems."""
    head = [one.name]
    for how in MEASURES.values():
        head.append(f"{how.label}{f' ({how.unit})' if how.unit else ''}")
    rows = [["base, not tuned", *(spread(one.base(name), how) for name, how in MEASURES.items())]]
    for system in one.systems:
        cells = []
        for name, how in MEASURES.items():
            cell = spread(one.values(system, name), how)
            real = any(
                finding.significant
                for finding in found[name]
                if (finding.source, finding.system) == (one.source, system)
            )
            cells.append(f"**{cell}**" if real else cell)
        rows.append([SYSTEMS[system].label, *cells])
    return table(head, rows)


def search_table(results: Sequence[Results]) -> str:
    """What the learning rates were chosen by."""
    rates = sorted({float(rate) for one in results for rate in one.search["losses"]})
    rows = []
    for one in results:
        losses = {float(rate): loss for rate, loss in one.search["losses"].items()}
        chosen = one.records[0]["learning_rate"]
        cells = [f"{losses[rate]:.4f}" if rate in losses else "-" for rate in rates]
        rows.append(
            [
                f"{one.name}, seed {one.search['seed']}",
                *(
                    f"**{cell}**" if rate == chosen else cell
                    for rate, cell in zip(rates, cells, strict=True)
                ),
            ]
        )
    return table(["loss of NTP (nats/token)", *(f"{rate:g}" for rate in rates)], rows)
