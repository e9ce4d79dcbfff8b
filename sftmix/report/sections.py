"""Make the sections of the page, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from sftmix.pairs.partition import Partition, partition_hash
from sftmix.report import confidence, curves, mixing, representations, tables
from sftmix.report.drawing import LeftOut, Picture, attempt, colour
from sftmix.report.findings import Findings
from sftmix.report.page import Section, Table
from sftmix.report.runs import Group, Run

if TYPE_CHECKING:  # brings torch
    from sftmix.report.measured import Measured

RESULTS = "Results"
WATCHED = ("entropy", "mean_token_accuracy")
Parts = list[Picture | LeftOut]


def sections(findings: Findings) -> list[Section]:
    """Return all sections, without those that these runs have nothing for."""
    of_groups = [
        curves_section,
        confidence_section,
        partitions_section,
        representations_section,
        mixing_section,
    ]
    made = [make(findings) for make in of_groups]
    kept = [section for section in made if section.tables or section.parts]
    return [results_section(findings), *kept, recipes_section(findings)]


def results_section(findings: Findings) -> Section:
    """Return the comparison, the tests, the paper's figures, and what differs."""
    groups = findings.groups
    if not groups:
        return Section(RESULTS, ["No run of sftmix train was given: there is nothing to compare."])
    values = [findings.values(group) for group in groups]
    found = [
        tables.results_table(groups, values),
        tables.differences_table(groups, values),
        tables.paper_table(groups, values),
        tables.training_table(groups, values),
        tables.differences_in_recipe(groups),
    ]
    paragraphs = []
    if not any(row.get("eval_loss") for row in values):
        paragraphs.append("No finished run has a held-out loss: give sftmix train --eval_data.")
    if found[2] is None:
        paragraphs.append("The paper reports no figures of these models, methods and data.")
    if not any(run.metrics for run in findings.runs):
        paragraphs.append(
            "No run has an evaluation.json: sftmix evaluate --model RUN writes one, whose metrics "
            "come into these tables."
        )
    warnings = tables.warnings(groups)
    return Section(RESULTS, paragraphs, warnings, [table for table in found if table])


def curves_section(findings: Findings) -> Section:
    """Return the section of losses, entropy and accuracy while training."""
    groups = findings.groups

    def term(key: str) -> Picture | LeftOut:
        return attempt(curves.TERMS[key][0], curves.term_picture, groups, key)

    parts: Parts = []
    if groups:
        halves = attempt("The two halves while training", curves.halves_picture, groups)
        parts = [term("ntp_loss"), halves, term("loss"), term("mixup_loss")]
    # A single evaluation, that at the end, is in the tables.
    if any(len({*run.curve("eval_loss")[0]}) > 1 for group in groups for run in group.runs):
        parts.insert(0, term("eval_loss"))
    # Runs of earlier versions have not logged what is watched.
    runs = findings.runs if groups else ()
    parts += [term(key) for key in WATCHED if any(run.curve(key)[0] for run in runs)]
    return Section("While training", parts=parts)


def confidence_section(findings: Findings) -> Section:
    """Return confidence before and after, a picture for each model and data that rows share."""
    starts: dict[object, list[Group]] = {}
    for group in findings.groups:
        starts.setdefault(group.start, []).append(group)
    colours = {group.name: colour(i) for i, group in enumerate(findings.groups)}
    parts: Parts = []
    rows: list[list[str]] = []
    for groups in starts.values():
        model = tables.last_part(groups[0].recipe["model"])
        name = f" ({model})" if len(starts) > 1 else ""
        before = findings.before[groups[0].name]
        start = None if isinstance(before, LeftOut) else before.scores
        after = {
            group.name: [one.scores for one in findings.after[group.name].values()]
            for group in groups
        }
        rows += _confidence_rows(start, after, name)
        if start is not None or any(after.values()):
            title = f"Confidence before and after training{name}"
            picture = attempt(title, confidence.change_picture, start, after, colours)
            parts.append(replace(picture, title=title))
    parts += dict.fromkeys(findings.failures)
    columns = ("model", "mean", "standard deviation", "change", "infinite, left out")
    notes = (
        "Minus the perplexity of training examples, one scoring; over seeds mean ± standard "
        "deviation. Change: of the standard deviation, from before training. The paper reports "
        "that SFTMix lowers the standard deviation of confidence by 7 %: see its difference to NTP "
        "above.",
    )
    table = Table(columns, rows, "Confidence of the sampled training examples", notes)
    found = [table] if rows else []
    by_source = sources_table(findings)
    return Section(
        "Confidence before and after training",
        tables=[*found, by_source] if by_source else found,
        parts=parts,
    )


def sources_table(findings: Findings) -> Table | None:
    """Return the loss of the scored examples by file or name of the data; None for a single one."""
    starts = {group.start for group in findings.groups}
    rows: dict[tuple[object, str], list[str]] = {}
    for place, group in enumerate(findings.groups):
        before = findings.before[group.name]
        start = [] if isinstance(before, LeftOut) else [before.scores]
        after = [one.scores for one in findings.after[group.name].values()]
        model = f" ({tables.last_part(group.recipe['model'])})" if len(starts) > 1 else ""
        for source, ranges in (group.recipe.get("sources") or {}).items():
            empty = [f"{source}{model}", _losses(start, ranges), *["-"] * len(findings.groups)]
            row = rows.setdefault((group.start, source), empty)
            row[2 + place] = _losses(after, ranges)
    if not rows:
        return None
    columns = ("source", "before training", *(group.name for group in findings.groups))
    note = (
        "Next-token loss of the sampled training examples, a mean over their response tokens; over "
        "seeds mean ± standard deviation. A copy of a mixture counts as an example of its source."
    )
    return Table(columns, list(rows.values()), "Loss by source", (note,))


def _losses(scores: Sequence[Partition], ranges: Sequence[Sequence[int]]) -> str:
    found = (loss_within(one, ranges) for one in scores)
    return _several([loss for loss in found if loss is not None])


def loss_within(scores: Partition, ranges: Sequence[Sequence[int]]) -> float | None:
    """Return the mean loss of a token of the examples with ids in some ranges; None without any."""
    inside = np.zeros(len(scores), dtype=bool)
    for first, end in ranges:
        inside |= (first <= scores.id) & (scores.id < end)
    if not inside.any():
        return None
    return float(scores.nll_sum[inside, -1].sum() / scores.num_tokens[inside].sum())


def _confidence_rows(
    before: Partition | None, after: Mapping[str, Sequence[Partition]], name: str
) -> list[list[str]]:
    models = {label: parts for label, parts in after.items() if parts}
    start = None
    if before is not None:
        start = confidence.spread(before)
        models = {f"before training{name}": [before], **models}
    rows = []
    for label, parts in models.items():
        spreads = [confidence.spread(one) for one in parts]
        finite = [one.confidence[np.isfinite(one.confidence)] for one in parts]
        means = [float(values.mean()) for values in finite if len(values)]
        change = "-"
        if start and label in after:
            change = f"{100 * (float(np.mean(spreads)) / start - 1):+.1f} %"
        outside = sum(len(one.id) for one in parts) - sum(map(len, finite))
        rows.append([label, _several(means), _several(spreads), change, str(outside)])
    return rows


def _several(values: Sequence[float]) -> str:
    if not values:
        return "-"
    text = f"{np.mean(values):.4g}"
    return f"{text} ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else text


def partitions_section(findings: Findings) -> Section:
    """Return the partitions that runs were scored into or trained with, each once."""
    found: dict[str, tuple[Partition, list[Run]]] = {}
    left_out: dict[str, LeftOut] = {}
    for run in findings.runs:
        partition = findings.partitions[run.name]
        if isinstance(partition, LeftOut):
            left_out[partition.reason] = partition
        else:
            found.setdefault(partition_hash(partition), (partition, []))[1].append(run)
    parts: Parts = []
    for partition, runs in found.values():
        names = ", ".join(run.name for run in runs[:4]) + (", ..." if len(runs) > 4 else "")
        for make in (confidence.histogram_picture, confidence.map_picture):
            picture = attempt(names, make, partition, names)
            title = f"{picture.title}: {names}" if len(found) > 1 else picture.title
            parts.append(replace(picture, title=title))
    text = (
        "The reference model's confidence of every training example, while it was trained for one "
        "epoch on these data."
    )
    return Section("The partition", [text], parts=[*parts, *left_out.values()])


def representations_section(findings: Findings) -> Section:
    """Return t-SNE before training and for each row's first seed."""
    parts: Parts = []
    begun = set()
    for group in findings.groups:
        before, after = findings.before[group.name], findings.after[group.name]
        if group.start not in begun and not isinstance(before, LeftOut):
            begun.add(group.start)
            model = tables.last_part(group.recipe["model"])
            name = f"{model}, before training"
            parts.append(attempt(name, _places, findings, group, name, before))
        for seed, measured in list(after.items())[:1]:
            name = f"{group.name}, seed {seed}"
            parts.append(attempt(name, _places, findings, group, name, measured))
    text = "Where the responses lie for the model; the paper reports that the two halves separate."
    return Section("Representations of the responses", [text], parts=parts)


def _places(findings: Findings, group: Group, name: str, found: Measured) -> Picture:
    if found.representations is None:
        raise ValueError("--head logits gives no hidden states")
    places = found.places
    if places is None:
        places = representations.places_of(found.representations)
    partition = findings.partition(group)
    rows = {int(one): row for row, one in enumerate(partition.id)}
    subset = partition.subset[[rows[int(one)] for one in found.scores.id]]
    return representations.places_picture(name, found.representations, places, subset)


def mixing_section(findings: Findings) -> Section:
    """Return the pairs of the rows that have a Mixup term."""
    parts: Parts = []
    for group in (group for group in findings.groups if group.mixed):
        name = group.name
        parts.append(attempt(f"Truncation losses: {name}", _truncation, findings, group))
        parts.append(attempt(f"Mixing shares: {name}", _lam, findings, group))
    text = (
        "The pairs that training drew, drawn again from the seeds of a row's runs: those of all "
        "logged steps."
    )
    return Section("What was mixed", [text], parts=parts)


def _truncation(findings: Findings, group: Group) -> Picture:
    logged = [run.curve("unmixed_fraction")[1] for run in group.runs]
    finite = [value for values in logged for value in values if np.isfinite(value)]
    check = float(np.mean(finite)) if finite else None
    return mixing.truncation_picture(group.name, _drawn(findings, group), check)


def _lam(findings: Findings, group: Group) -> Picture:
    return mixing.lam_picture(group.name, _drawn(findings, group), float(group.recipe["alpha"]))


def _drawn(findings: Findings, group: Group) -> list[mixing.Drawn]:
    """Return the pairs of all runs of a row, each of its own partition."""
    found = []
    for run in group.runs:
        partition = findings.partitions[run.name]
        if isinstance(partition, LeftOut):
            raise ValueError(partition.reason)
        found.append(mixing.drawn_pairs(run, partition))
    return found


def recipes_section(findings: Findings) -> Section:
    """Return the commands and recipes that repeat the runs."""
    rows = [*findings.groups, *(Group(run.name, [run]) for run in findings.runs if run.scored)]
    return Section(
        "Commands, recipes and versions",
        ["The command of each row's first run, with every option of its recipe spelled out."],
        commands=[tables.command(group.runs[0]) for group in rows],
        folded=tables.recipe_tables(rows),
    )
