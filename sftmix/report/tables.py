"""Make the tables: runs beside each other, the paper's figures, what differs, and recipes."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftmix.methods import METHODS, title_of
from sftmix.report.comparison import LEVEL, Comparison, compare
from sftmix.report.page import Table
from sftmix.report.paper import ROWS, PaperRow
from sftmix.report.runs import (
    Group,
    Run,
    baseline_of,
    confounders,
    differing,
    shown,
)


@dataclass(frozen=True)
class Measure:
    """A column of the comparison: how its figures are named and shown."""

    key: str
    title: str
    form: str
    tested: bool = True  # whether its difference to NTP says something about the method


MEASURES = (
    Measure("eval_loss", "held-out loss", ".4f"),
    Measure("eval_mean_token_accuracy", "held-out token accuracy", ".4f"),
    Measure("confidence_std", "std. dev. of confidence", ".3f"),
    Measure("ntp_loss", "training NTP loss", ".4f"),
)
TRAINING = (
    Measure("loss", "training loss", ".4f", tested=False),
    Measure("mixup_loss", "Mixup loss", ".4f", tested=False),
    Measure("entropy", "entropy", ".4f", tested=False),
    Measure("mean_token_accuracy", "token accuracy", ".4f", tested=False),
    Measure("tokens_per_second", "tokens/s", ",.0f", tested=False),
    Measure("trained_tokens_per_second", "tokens with loss/s", ",.0f", tested=False),
    Measure("mfu", "MFU", ".1%", tested=False),
    Measure("peak_memory_gib", "peak memory (GiB)", ".3f", tested=False),
)
# Entries of the recipe that are no options: training found them in its files.
FOUND = (
    *("data_hash", "num_examples", "template_hash", "template_date", "partition", "world_size"),
    *("model_hash", "commit", "tokenizer_hash", "eval_data_hash", "sources"),
)

Values = Mapping[str, Mapping[int, float]]  # by measure, then by seed


def measures_of(values: Sequence[Values]) -> list[Measure]:
    """Return the measures that any row has, those of evaluations last."""
    known = {measure.key for measure in MEASURES + TRAINING}
    own = [measure for measure in MEASURES if any(row.get(measure.key) for row in values)]
    names = dict.fromkeys(key for row in values for key in row if key not in known)
    return own + [
        Measure(name, name, ".2f") for name in names if any(row.get(name) for row in values)
    ]


def values_of(group: Group, more: Values | None = None) -> dict[str, Mapping[int, float]]:
    """Return all figures of a row by measure and seed; `more` adds the report's own."""
    keys = dict.fromkeys(key for run in group.runs for key in run.measures)
    return {**{key: group.values(key) for key in keys}, **(more or {})}


def results_table(groups: Sequence[Group], values: Sequence[Values]) -> Table:
    """Return mean and standard deviation over seeds, a row for each recipe."""
    measures = measures_of(values)
    rows = [
        [
            group.name,
            _seeds(group),
            *(_spread(row.get(measure.key), measure) for measure in measures),
        ]
        for group, row in zip(groups, values, strict=True)
    ]
    notes = [
        "Mean ± sample standard deviation over seeds; each row's runs differ only in their seed.",
        "Losses in nats per token. Held-out: NTP over the response tokens of the held-out data. "
        "Training: only the NTP term, of the last log line.",
    ]
    if any(row.get("confidence_std") for row in values):
        notes.append(
            "Confidence: minus the perplexity of a training example under the finished model, one "
            "scoring; its standard deviation is over the sampled examples."
        )
    columns = ["method", "runs (seeds)", *(measure.title for measure in measures)]
    return Table(columns, rows, "Results", notes)


def training_table(groups: Sequence[Group], values: Sequence[Values]) -> Table:
    """Return the figures that training logged, a row for each recipe."""
    measures = [one for one in TRAINING if any(row.get(one.key) for row in values)]
    rows = [
        [group.name, *(_spread(row.get(measure.key), measure) for measure in measures)]
        for group, row in zip(groups, values, strict=True)
    ]
    notes = (
        "Losses of the last log line: total training loss (not comparable between methods) and the "
        "unweighted Mixup term, nats per position.",
        "Entropy (nats) and token accuracy of the last log line: means over the tokens with loss.",
        "Tokens/s, tokens with loss/s and MFU: medians over the log lines. Tokens/s counts prompts "
        "too; all three swing with what else the machine does.",
        "Peak memory: allocated on the GPU, or of the whole process on a CPU.",
    )
    return Table(["method", *(measure.title for measure in measures)], rows, "Training", notes)


def _seeds(group: Group) -> str:
    seeds = sorted({run.seed for run in group.runs if run.finished})
    unfinished = sum(not run.finished for run in group.runs)
    text = f"{len(seeds)} ({', '.join(map(str, seeds))})" if seeds else "0"
    return f"{text} + {unfinished} unfinished" if unfinished else text


def _spread(values: Mapping[int, float] | None, measure: Measure) -> str:
    if not values:
        return "-"
    found = compare(values, {})
    mean = format(found.mean, measure.form)
    return mean if found.std is None else f"{mean} ± {format(found.std, measure.form)}"


def differences_table(groups: Sequence[Group], values: Sequence[Values]) -> Table | None:
    """Return each tested figure's difference to NTP; None without a row to compare."""
    by_group = {id(group): row for group, row in zip(groups, values, strict=True)}
    rows = []
    for group in groups:
        baseline = baseline_of(group, groups)
        if baseline is None:
            continue
        mine, theirs = by_group[id(group)], by_group[id(baseline)]
        for measure in (measure for measure in measures_of(values) if measure.tested):
            if mine.get(measure.key) and theirs.get(measure.key):
                found = compare(mine[measure.key], theirs[measure.key])
                start = _mean_of_common(theirs[measure.key], mine[measure.key])
                rows.append([f"{group.name}: {measure.title}", *_difference(found, measure, start)])
    if not rows:
        return None
    notes = (
        f"Paired by seed over the seeds that both have (n); the interval is at "
        f"{100 * LEVEL:.0f} %, p of a two-sided paired t-test; significant below {1 - LEVEL:.2g}. "
        "One test for each line: of twenty lines without any effect one is expected to look "
        "significant.",
    )
    columns = ("figure", "verdict", "difference", f"{100 * LEVEL:.0f} % interval", "p", "n")
    return Table(columns, rows, "Difference to NTP", notes)


def _mean_of_common(values: Mapping[int, float], others: Mapping[int, float]) -> float:
    common = [value for seed, value in values.items() if seed in others]
    return sum(common) / len(common) if common else 0.0


def _difference(found: Comparison, measure: Measure, start: float) -> list[str]:
    """Return a comparison's cells; `start` is the baseline's mean over the common seeds."""
    form = "+" + measure.form
    difference = "-" if found.difference is None else format(found.difference, form)
    if found.difference is not None and start:
        difference += f" ({100 * found.difference / start:+.1f} %)"
    interval = "-"
    if found.interval is not None:
        interval = " to ".join(format(end, form) for end in found.interval)
    p_value = "-" if found.p_value is None else f"{found.p_value:.2g}"
    return [verdict(found), difference, interval, p_value, str(found.paired_n)]


def verdict(found: Comparison) -> str:
    """Return the result of a comparison in words."""
    if found.paired_n == 0:
        return "no common seed"
    if found.paired_n == 1:
        return "one seed: says nothing"
    if found.significant is None:
        return "no difference" if not found.difference else "the same in every seed: not tested"
    return "significant" if found.significant else "no significant difference"


def warnings(groups: Sequence[Group]) -> list[str]:
    """Return sentences on what makes the comparison unfair."""
    found = _few_seeds(groups)
    for group in groups:
        found += _of_runs(group)
        baseline = baseline_of(group, groups)
        if baseline is None and group.method != "ntp":
            found.append(
                f"{group.name}: no NTP run on the same data from the same model to compare with."
            )
        elif baseline is not None and (others := confounders(group, baseline)):
            found.append(
                f"{group.name} is compared with {baseline.name}, from which it also differs in "
                f"{', '.join(others)}: a difference is not only the method's."
            )
    if len({json.dumps(held_out(run)) for group in groups for run in group.runs}) > 1:
        found.append("The runs do not all name the same held-out data; see what differs.")
    return found


def _few_seeds(groups: Sequence[Group]) -> list[str]:
    """Return one sentence for all rows of one seed, and one for those of two."""
    meaning = {
        1: "one seed (n = 1). A difference of one run may be chance; train with other "
        "--seed values.",
        2: "two seeds (n = 2). A test of two differences has one degree of freedom, and its "
        "verdict is easily wrong.",
    }
    names: dict[int, list[str]] = {number: [] for number in meaning}
    for group in groups:
        number = len({run.seed for run in group.runs if run.finished})
        if number in names:
            names[number].append(group.name)
    return [f"{'; '.join(names[n])}: {text}" for n, text in meaning.items() if names[n]]


def _of_runs(group: Group) -> list[str]:
    found = []
    seeds = [run.seed for run in group.runs if run.finished]
    if len(set(seeds)) < len(seeds):
        found.append(f"{group.name}: several runs have the same recipe and seed; the first counts.")
    for run in group.runs:
        if not run.finished:
            found.append(
                f"{run.name} is not finished (last logged step {run.steps}): its curves are "
                "shown, and no figure of it counts."
            )
        if run.limits:
            some = ", ".join(f"{name} (the first {n})" for name, n in run.limits.items())
            found.append(f"{run.name} was not asked all questions of {some}.")
    return found


def held_out(run: Run) -> list[Any] | None:
    """Return the files of a run's held-out data and their split; None if it has none."""
    files = run.files.get("eval_data")
    return files and [*files, run.files.get("eval_split", "train")]


def differences_in_recipe(groups: Sequence[Group]) -> Table | None:
    """Return the fields in which the rows' recipes differ; None if there are none."""
    recipes = [{**group.recipe, "held-out data": held_out(group.runs[0])} for group in groups]
    fields = [field for field in differing(recipes) if field != "seed"]
    if not fields:
        return None
    rows = [[field, *(shown(recipe.get(field)) for recipe in recipes)] for field in fields]
    columns = ["field", *(group.name for group in groups)]
    return Table(columns, rows, "What differs between the recipes", ("Besides the seed.",))


def recipe_tables(groups: Sequence[Group]) -> list[Table]:
    """Return the whole recipe and the versions of each row."""
    tables = []
    for group in groups:
        fields = [(name, shown(value)) for name, value in group.recipe.items() if name != "seed"]
        versions = [(f"version of {name}", str(v)) for name, v in group.runs[0].versions.items()]
        seeds = ("seed", ", ".join(str(run.seed) for run in group.runs))
        tables.append(Table(("field", "value"), [seeds, *fields, *versions], group.name))
    return tables


def command(run: Run, width: int = 88) -> str:
    """Return a run's command with every option of its recipe, broken into lines."""
    options = {
        "model": run.recipe["model"],
        "data": run.recipe["data"],
        "output": str(run.folder),
        "partition": run.files.get("partition"),
        "eval_data": run.files.get("eval_data"),
        "eval_split": run.files.get("eval_split"),
        **{name: value for name, value in run.recipe.items() if name not in FOUND},
    }
    ranks = int(run.recipe.get("world_size") or 1)
    launcher = f"torchrun --nproc_per_node {ranks}" if ranks > 1 else "python"
    lines = [f"{launcher} -m sftmix {'score' if run.scored else 'train'}"]
    for name, value in options.items():
        if value is None or value == {}:
            continue
        values = value if isinstance(value, list) else [value]
        flag = shlex.join([f"--{name}", *map(_word, values)])
        if len(lines[-1]) + 1 + len(flag) > width:
            lines.append(f"  {flag}")
        else:
            lines[-1] += f" {flag}"
    return " \\\n".join(lines)


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | bool) else str(value)


# The paper's figures beside ours.


def paper_table(groups: Sequence[Group], values: Sequence[Values]) -> Table | None:
    """Return the paper's figures for our models, methods and data; None if there are none."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for group, row in zip(groups, values, strict=True):
        for paper in paper_rows(group):
            for name, figure in paper.figures.items():
                label = f"{title_of(paper.method)}, {last_part(paper.model)}: {name}"
                ours = _spread(row.get(name), Measure(name, name, ".2f"))
                name = f"{group.name} (LoRA)" if group.recipe.get("lora_rank") else group.name
                rows[label, paper.data, name] = [label, paper.data, f"{figure:g}", ours, name]
    if not rows:
        return None
    notes = (
        "MT-Bench from 1 to 10, all others in percent; the paper reports one figure for each.",
        'A "-" is not measured yet. MedQA, PubMedQA and MedMCQA: sftmix evaluate --model RUN. '
        "MT-Bench and AlpacaEval need a judge: sftmix generate writes the answers; put the judge's "
        'figures into RUN/evaluation.json as {"metrics": {"MT-Bench": ...}}.',
    )
    columns = ("figure", "paper's data", "paper", "ours", "our row")
    return Table(columns, list(rows.values()), "The paper's figures beside ours", notes)


def paper_rows(group: Group) -> list[PaperRow]:
    """Return the paper's rows for a row's model, method and data, if it mixes and selects alike."""
    recipe = group.recipe
    method = METHODS.get(group.method)
    known = method.papers_options if method else {}
    changed = any(recipe.get(name, value) != value for name, value in known.items())
    if recipe.get("select") or changed:
        return []
    model, names = last_part(group.recipe["model"]).lower(), group.recipe["data"]
    stems = {_stem(row.data) for row in ROWS}
    # A file counts by its own name, a data set also by its owner's.
    files = (".json", ".jsonl", ".parquet")
    told = [last_part(name) if name.endswith(files) else name for name in names]
    text = re.sub(r"[^a-z0-9]", "", " ".join(told).lower())
    # "medalpaca" holds "alpaca" too.
    ours = max((stem for stem in stems if stem in text), key=len, default=None)
    return [
        row
        for row in ROWS
        if last_part(row.model).lower() == model
        and row.method == group.method
        and _stem(row.data) == ours
    ]


def _stem(data: str) -> str:
    return data.partition("-")[0].lower()


def last_part(name: str) -> str:
    """Return the last part of a path or of a hub name."""
    return Path(name).name
