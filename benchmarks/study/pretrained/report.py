"""Write the study's tables and pictures, and its block in a document, from its runs' files.

python -m benchmarks.study report [DIR] [--document FILE]
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.study.findings import (
    LOWEST,
    MEASURES,
    PRIMARY,
    SOURCES,
    SPREAD,
    Finding,
    Results,
    findings,
)
from benchmarks.study.report import (
    MEANS,
    comparison_table,
    headline,
    means_table,
    picture,
    real,
    tested,
    verdict,
)
from benchmarks.study.settings import BASELINE, SYSTEMS
from benchmarks.tables import show, table
from sftmix.report.comparison import compare

from .plan import MU, OTHER, RATE, Plan
from .settings import BASE, BY_OTHER, DATA, NEGLIGIBLE, REGIMES, SEARCH_SEED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEGIN = (
    "<!-- {0}: begin (python -m benchmarks.study report --study {0} --document docs/study.md) -->"
)
END = "<!-- {0}: end -->"
CURVES, DIFFERENCES = "curves.svg", "differences.svg"
# Whose difference to NTP is drawn by epoch, and how.
DRAWN = {
    "sftmix": "#d55e00",
    "sftmix-random": "#0072b2",
    "equal": "#009e73",
    BY_OTHER: "#009e73",
}
# Grey systems that end far above would leave no room for the others.
NOTE = (
    "Bands: NTP's standard deviation; differences' 95 % intervals. Cut: what lies above the base "
    "and all coloured lines."
)
RANDOM = "sftmix-random"
ANSWERS = ("exact_match", "answer_tokens", "answers_ended", "distinct_bigrams")
HEADLINE = (PRIMARY, LOWEST, SPREAD, "confidence_iqr")


def write(folder: Path, study: str, document: Path | None = None) -> None:
    """Draw the pictures, if there are any, and print the study's block or renew the document's.

    Raises:
        ValueError: results do not belong together.
    """
    records = read(folder)
    results = joined(records)
    pictures = []
    if results and REGIMES[study].max_new_tokens is None:
        from benchmarks.figures import write_svg  # it needs matplotlib

        shown = (PRIMARY, LOWEST)
        for name, draw in (
            (CURVES, partial(curves, results)),
            (DIFFERENCES, partial(picture, results, shown, NEGLIGIBLE)),
        ):
            write_svg(folder / name, draw)
            beside = folder if document is None else document.parent
            pictures.append(Path(os.path.relpath(folder / name, beside)).as_posix())
    said = markdown(records, results, pictures, study)
    show(said, document, BEGIN.format(study), END.format(study))


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the records of all runs of a folder.

    Raises:
        ValueError: they were made with different sizes, or those of a data set with different
            learning rates.
    """
    records = [json.loads(file.read_text("utf-8")) for file in sorted(folder.glob("*.json"))]
    rates: dict[str, float] = {}
    for record in records:
        if record["sizes"] != records[0]["sizes"]:
            raise ValueError(f"{folder}: the results differ in their sizes")
        for name, words in (("lora_rank", "the rank of LoRA"), ("max_new_tokens", "their answers")):
            if record.get(name) != records[0].get(name):
                raise ValueError(f"{folder}: the results differ in {words}")
        searched = record["what"].startswith(RATE)
        if "learning_rate" in record and not searched and record["what"] != OTHER:
            rate = record["learning_rate"]
            if rates.setdefault(record["data"], rate) != rate:
                raise ValueError(
                    f"{folder}: the results of {record['data']} differ in their learning rate"
                )
    return records


def joined(records: Sequence[Mapping[str, Any]]) -> list[Results]:
    """Return the systems' records by data set and seed; of data sets that have NTP with a seed."""
    found = []
    for data in dict.fromkeys((*DATA, *(record["data"] for record in records))):
        own = [record for record in records if record["data"] == data]
        searched = [record for record in own if record["seed"] == SEARCH_SEED]
        losses = {
            record["what"].partition("-")[2]: record["measures"][LOWEST]
            for record in searched
            if record["what"].startswith(RATE)
        }
        seeds = sorted({r["seed"] for r in own if r["what"] == BASELINE})
        if seeds:
            search = {"seed": SEARCH_SEED, "losses": losses}
            found.append(Results(data, tuple(of_seed(own, seed) for seed in seeds), search))
    return found


def of_seed(records: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Return one seed's systems in one record."""
    own = {record["what"]: record for record in records if record["seed"] == seed}
    first = own[BASELINE]
    return {
        "seed": seed,
        "learning_rate": first["learning_rate"],
        "sizes": first["sizes"],
        "facts": first["facts"],
        "base": own[BASE]["measures"] if BASE in own else {},
        "systems": {name: own[name]["measures"] for name in SYSTEMS if name in own},
        "curves": {name: own[name]["curve"] for name in SYSTEMS if name in own},
        "same_half": own.get(BY_OTHER, {}).get("same_half"),
        "mu": own.get("sftmix-mu", {}).get("options", {}).get("mu"),
    }


def markdown(
    records: Sequence[Mapping[str, Any]],
    results: Sequence[Results],
    pictures: Sequence[str],
    study: str,
) -> str:
    """Return everything that the results say."""
    parts = [progress(records, study)]
    if not results:
        return parts[0]
    parts += [origin(records)]
    if REGIMES[study].max_new_tokens is not None:
        return "\n".join([*parts, *written(records, results)])
    shown = [name for name in MEASURES if any(_has(one, name) for one in results)]
    found = {measure: findings(results, measure) for measure in shown}
    if REGIMES[study].decides:
        parts += [answers(results, found[PRIMARY])]
    parts += [headline(found, [measure for measure in HEADLINE if measure in found])]
    parts += [control(results), *filter(None, [of_other(results)])]
    parts += [overfitting(results), verdict(found[PRIMARY])]
    parts += [
        f"![Held-out loss by epoch, and its difference to NTP, on each data set]({pictures[0]})\n",
        f"![Differences of each system to NTP with 95 % intervals]({pictures[1]})\n",
    ]
    for title, measure in (
        ("Held-out loss after the last epoch, the primary measure", PRIMARY),
        ("Lowest held-out loss of a training", LOWEST),
        ("Spread of confidence", SPREAD),
    ):
        parts += [f"### {title}\n"]
        parts += [comparison_table(one, measure, found[measure]) for one in results]
    parts += ["### All measures\n", MEANS]
    parts += [means_table(one, found) for one in results]
    parts += ["### The search\n", searches(records)]
    return "\n".join(parts)


def written(records: Sequence[Mapping[str, Any]], results: Sequence[Results]) -> list[str]:
    """Return what the models' answers are like: the trainings themselves are in another study."""
    found = {measure: findings(results, measure) for measure in ANSWERS}
    return [
        headline(found, [measure for measure in ANSWERS if found[measure]]),
        responses(records),
        MEANS,
        *(means_table(one, found) for one in results),
    ]


def _has(one: Results, measure: str) -> bool:
    return any(one.values(system, measure) for system in one.systems)


def progress(records: Sequence[Mapping[str, Any]], study: str) -> str:
    """Return how many of the planned runs there are, and their sizes."""
    regime = REGIMES[study]
    sizes = regime.sizes
    how = {"lora_rank": regime.lora_rank, "max_new_tokens": regime.max_new_tokens}
    alike = json.loads(json.dumps({"sizes": asdict(sizes), **how}))
    if records and any(records[0].get(name) != value for name, value in alike.items()):
        return (
            f"{len(records)} runs of other sizes, or trained otherwise, than the study's of "
            f"{regime.model}.\n"
        )
    planned = Plan(regime.data, regime.seeds, sizes, Path(), systems=regime.systems).runs()
    there = {(record["data"], record["seed"], record["what"]) for record in records}
    done = sum((run.data, run.seed, run.what) in there for run in planned)
    lengths = ", ".join(f"{SOURCES[data]} {sizes.max_length[data]}" for data in regime.data)
    rates, mus = (
        ", ".join(f"{number:g}" for number in numbers)
        for numbers in (sizes.learning_rates, sizes.mus)
    )
    searched = "Learning rates of the search" if "," in rates else "Learning rate"
    more = ""
    if regime.max_new_tokens is not None:
        more += f" and answered in at most {regime.max_new_tokens} tokens"
    if "alpaca" in regime.data:
        more += f", {sizes.kept_examples} that a grader kept"
    if "pubmedqa" in regime.data:
        more += f", {sizes.questions} questions"
    by = f" by LoRA of rank {regime.lora_rank}" * (regime.lora_rank is not None)
    return (
        f"{regime.model}, {done} of {len(planned)} runs. {len(regime.seeds)} seeds; for each "
        f"{sizes.train_examples} examples to train on for {sizes.epochs} epochs in batches of "
        f"{sizes.batch_size}, {sizes.held_out_examples} held out{more}; at most so many tokens in "
        f"an example: {lengths}; {sizes.trained_layers} layers are trained{by}. {searched}: "
        f"{rates}{'; mus: ' * bool(mus)}{mus}.\n"
    )


def origin(records: Sequence[Mapping[str, Any]]) -> str:
    """Return on what the runs were made, by which code, and in what time."""
    facts = records[0]["facts"]
    commits = sorted({record["facts"]["commit"] for record in records})
    hours = sum(record["cpu_seconds"] for record in records) / 3600
    machines = sorted({record["facts"]["cpu"] for record in records})
    return (
        f"{' and '.join(machines)} ({facts['cpu_capability']}), {facts['torch_threads']} thread "
        f"a run, {hours:.1f} core-hours; torch {facts['torch']}, transformers "
        f"{facts['transformers']}, commit{'s' * (len(commits) > 1)} {', '.join(commits)}.\n"
    )


def control(results: Sequence[Results]) -> str:
    """Return SFTMix beside SFTMix over random halves: what the confidence is worth."""
    found = findings(results, PRIMARY, RANDOM, ("sftmix",))
    said = [_said(results, one) for one in found if one.test.difference is not None]
    if not said:
        return ""
    return (
        "- SFTMix beside SFTMix over random halves, held-out loss (nats/token, 95 % interval): "
        f"{', '.join(said)}.\n"
    )


def of_other(results: Sequence[Results]) -> str:
    """Return SFTMix over the halves of another model beside its own, and how far they agree."""
    found = findings(results, PRIMARY, "sftmix", (BY_OTHER,))
    said = [_said(results, one) for one in found if one.test.difference is not None]
    if not said:
        return ""
    shares = []
    for one in results:
        own = [of["same_half"] for of in one.records if of["same_half"] is not None]
        shares += [f"{one.name} {100 * statistics.fmean(own):.0f} %"] if own else []
    return (
        "- SFTMix over SmolLM2's halves beside SFTMix over the model's own, held-out loss "
        f"(nats/token, 95 % interval): {', '.join(said)}. Of the examples as many are in the same "
        f"half by both models (by chance: 50 %): {', '.join(shares)}.\n"
    )


def responses(records: Sequence[Mapping[str, Any]]) -> str:
    """Return what the held-out examples' own responses are like, beside which answers stand."""
    said: list[str] = []
    for data in SOURCES:
        own = [r["responses"] for r in records if r["data"] == data and "responses" in r]
        if own:
            of = {name: statistics.fmean(one[name] for one in own) for name in own[0]}
            said.append(
                f"{SOURCES[data]} {of['answer_tokens']:.1f} tokens and "
                f"{100 * of['distinct_bigrams']:.1f} % distinct bigrams"
            )
    return f"- The held-out examples' own responses: {', '.join(said)}.\n"


def _said(results: Sequence[Results], one: Finding) -> str:
    (name,) = (of.name for of in results if of.source == one.source)
    difference, interval, _ = tested(one.test, MEASURES[PRIMARY])
    return f"{name} {difference} ({interval}; {real(one)})"


def answers(results: Sequence[Results], found: Sequence[Finding]) -> str:
    """Return the answers to the study's two questions, by its own rules."""
    beside_ntp = [one for one in found if one.system == "sftmix"]
    lines = []
    for question, beside, tests in (
        ("A gain", "NTP", beside_ntp),
        ("Confidence helps", "random halves", findings(results, PRIMARY, RANDOM, ("sftmix",))),
    ):
        signs = [(one.test.difference or 0.0) < 0 for one in tests if one.significant]
        below, above = sum(signs), len(signs) - sum(signs)
        # What is above counts against a gain alone: so the rules were fixed.
        holds = "yes" if below >= 2 and not (above and tests is beside_ntp) else "no"
        lines.append(
            f"- **{question}: {holds}.** SFTMix ends significantly below {beside} on {below} and "
            f"significantly above it on {above} of {len(tests)} data sets."
        )
    small = [
        SOURCES[one.source]
        for one in beside_ntp
        if one.test.difference is not None and abs(one.test.difference) < NEGLIGIBLE
    ]
    if small:
        lines.append(f"- Its difference to NTP is negligible on {', '.join(small)}.")
    return "\n".join(lines) + "\n"


def overfitting(results: Sequence[Results]) -> str:
    """Return how far NTP's loss rises after its lowest, on each data set."""
    said = []
    for one in results:
        last, lowest = one.values(BASELINE, PRIMARY), one.values(BASELINE, LOWEST)
        rise = statistics.fmean(last[seed] - lowest[seed] for seed in last)
        said.append(f"{one.name} {rise:.4f}")
    return (
        "- NTP's held-out loss after the last epoch minus its lowest (nats/token, mean over "
        f"seeds): {', '.join(said)}.\n"
    )


def searches(records: Sequence[Mapping[str, Any]]) -> str:
    """Return tables of the losses that learning rates and mus were chosen by."""
    parts = []
    for kind, measure, head in (
        (RATE, LOWEST, "lowest loss of NTP by learning rate (nats/token)"),
        (MU, PRIMARY, "last loss of SFTMix by mu (nats/token)"),
    ):
        losses: dict[str, dict[float, float]] = {}
        for record in records:
            if record["seed"] == SEARCH_SEED and record["what"].startswith(f"{kind}-"):
                number = float(record["what"].partition("-")[2])
                losses.setdefault(record["data"], {})[number] = record["measures"][measure]
        if not losses:
            continue
        numbers = sorted({number for own in losses.values() for number in own})
        lines = []
        for data in (name for name in SOURCES if name in losses):
            own = losses[data]
            best = min(own, key=own.__getitem__)
            cells = [f"{own[n]:.4f}" if n in own else "-" for n in numbers]
            cells[numbers.index(best)] = f"**{cells[numbers.index(best)]}**"
            lines.append([SOURCES[data], *cells])
        parts.append(table([head, *(f"{number:g}" for number in numbers)], lines))
    return "\n".join(parts)


def curves(results: Sequence[Results]) -> Figure:
    """Draw the loss by epoch, and below its difference to NTP, a column for each data set."""
    from benchmarks import figures

    figure = figures.Figure(figsize=(figures.WIDTH, 5.6), layout="constrained")
    grid = figure.subplots(2, len(results), sharex=True, squeeze=False)
    for column, one in enumerate(results):
        draw_losses(grid[0][column], one)
        draw_differences(grid[1][column], one)
        grid[0][column].set_title(one.name)
        grid[1][column].set_xlabel("epoch")
    grid[0][0].set_ylabel("held-out loss (nats/token)")
    grid[1][0].set_ylabel("difference to NTP")
    handles, labels = grid[0][0].get_legend_handles_labels()
    legend: dict[str, Any] = {"ncols": 4, "frameon": False, "fontsize": 8}
    legend |= {"title": NOTE, "title_fontsize": 8}
    figure.legend(handles, labels, loc="outside lower center", **legend)
    return figure


def points(one: Results, system: str) -> dict[int, dict[float, float]]:
    """Return a system's held-out loss by seed and epoch; the base's at 0."""
    found = {}
    for record in one.records:
        if system in record["curves"]:
            start = {0.0: record["base"][PRIMARY]} if record["base"] else {}
            curve = {point["epoch"]: point[PRIMARY] for point in record["curves"][system]}
            found[record["seed"]] = start | curve
    return found


def draw_losses(axes: Axes, one: Results) -> None:
    """Draw each system's mean over seeds; NTP's with its standard deviation as a band."""
    from benchmarks import figures

    styles, highest = {BASELINE: figures.INK, **DRAWN}, 0.0
    for system in one.systems:
        by_seed = list(points(one, system).values())
        epochs = sorted(set.intersection(*(set(curve) for curve in by_seed)))
        means = [statistics.fmean(curve[epoch] for curve in by_seed) for epoch in epochs]
        colour = styles.get(system, figures.OTHERS)
        axes.plot(epochs, means, color=colour, linewidth=1.8 if system in styles else 0.9)
        axes.lines[-1].set_label(SYSTEMS[system].label)
        if system in styles:
            highest = max(highest, *means)
        if system == BASELINE and len(by_seed) > 1:
            spreads = [statistics.stdev(curve[epoch] for curve in by_seed) for epoch in epochs]
            low, high = ([m + s * d for m, d in zip(means, spreads, strict=True)] for s in (-1, 1))
            axes.fill_between(epochs, low, high, color=colour, alpha=0.12, linewidth=0)
    if base := one.values(BASE, PRIMARY):
        bottom, top = axes.get_ylim()[0], max(highest, statistics.fmean(base.values()))
        axes.set_ylim(bottom, top + 0.1 * (top - bottom))
    axes.grid(axis="y")


def draw_differences(axes: Axes, one: Results) -> None:
    """Draw the mean difference to NTP by epoch with its 95 % interval."""
    from benchmarks import figures

    axes.axhline(0, color=figures.INK, linewidth=0.8)
    baseline = points(one, BASELINE)
    for system, colour in DRAWN.items():
        own = points(one, system)
        common = own.keys() & baseline.keys()
        if not common:
            continue
        epochs = sorted({e for seed in common for e in own[seed] if e > 0})
        tests = [
            compare(*({seed: of[seed][e] for seed in common} for of in (own, baseline)))
            for e in epochs
        ]
        axes.plot(epochs, [test.difference or 0.0 for test in tests], color=colour, linewidth=1.8)
        if all(test.interval is not None for test in tests):
            ends = [test.interval for test in tests]
            axes.fill_between(
                epochs, *zip(*ends, strict=True), color=colour, alpha=0.15, linewidth=0
            )
    axes.grid(axis="y")
