"""What a report reads of a run's folder, and which runs differ in their seed alone."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sftmix.conventions import CONFIGS, EVALUATION, MANIFEST, PARTITION, TRAINER_STATE
from sftmix.methods import METHODS, OPTIONS, title_of
from sftmix.pairs.partition import Partition, partition_hash, read_partition

# Of a manifest, not of the recipe.
NOT_RECIPE = ("versions", "files", "split", "reading", "parts")
# What a method brings with it: two methods differ in these as well.
OF_METHOD = {"method", "partition", *OPTIONS}
# What data were made with: they are the same where their hash is.
OF_DATA = {
    *("data", "weights", "sources", "data_split", "select", "on_bad_row"),
    *("columns", "train_on", "encoding", "streaming"),
}
# Likewise where a model lay.
OF_MODEL = {"model", "revision", "commit"}


@dataclass(frozen=True, eq=False)
class Run:
    """A run of `sftmix train` or `sftmix score`."""

    folder: Path
    name: str
    recipe: Mapping[str, Any]
    versions: Mapping[str, str]
    files: Mapping[str, Any]  # where its partition and held-out data were
    log: Sequence[Mapping[str, Any]]
    metrics: Mapping[str, float]  # of evaluation.json, in percent
    finished: bool
    # Of the metrics of the first questions alone: how many.
    limits: Mapping[str, int] = field(default_factory=dict)

    @property
    def scored(self) -> bool:
        """Whether this is a reference model, trained to score the data."""
        return "num_scorings" in self.recipe

    @property
    def seed(self) -> int:
        """Of pairs, lam and order."""
        return int(self.recipe["seed"])

    @property
    def steps(self) -> int:
        """Optimizer steps done, as far as the log says."""
        return max((int(line["step"]) for line in self.log if "loss" in line), default=0)

    @cached_property
    def measures(self) -> dict[str, float]:
        """Finite figures of a finished run: see `tables.MEASURES`; those in percent come last."""
        values: dict[str, list[float]] = {}
        for line in self.log:
            for key, value in line.items():
                if isinstance(value, int | float):
                    values.setdefault(key, []).append(float(value))
        last = {key: values[key][-1] for key in LAST if key in values}
        last |= {key: statistics.median(values[key]) for key in RATES if key in values}
        if "peak_memory_gib" in values:
            last["peak_memory_gib"] = max(values["peak_memory_gib"])
        last |= self.metrics
        return {key: value for key, value in last.items() if math.isfinite(value)}

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps, and values of ``key`` at those of the steps that logged it."""
        lines = [line for line in self.log if key in line]
        return [line["step"] for line in lines], [line[key] for line in lines]

    def place(self, name: str) -> Path:
        """A path of the manifest, from the folder that it was relative to if it is there."""
        then = Path(self.files.get("folder", "")) / name
        return then if then.exists() else Path(name)


# Of runs that compare: they begin from the same model, on the same tokens.
SAME = ("tokenizer_hash", "data_hash", "template_hash", "template_date", "max_length")
LAST = (
    *("eval_loss", "eval_mean_token_accuracy"),
    *("loss", "ntp_loss", "mixup_loss", "entropy", "mean_token_accuracy"),
)
RATES = ("tokens_per_second", "trained_tokens_per_second", "mfu")


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in seed alone: a row of the comparison."""

    name: str
    runs: Sequence[Run]  # a finished one first, where there is one

    @property
    def recipe(self) -> Mapping[str, Any]:
        """That of its first run."""
        return self.runs[0].recipe

    @property
    def method(self) -> str:
        """As `--method`."""
        return str(self.recipe["method"])

    @property
    def mixed(self) -> bool:
        """Whether its method mixes pairs, as far as this version knows it."""
        return self.method in METHODS and METHODS[self.method].mixed

    @property
    def start(self) -> tuple[Any, ...]:
        """What a row's examples are scored with before training: equal for equal scores."""
        model = self.recipe.get("model_hash") or self.recipe.get("model")
        return (model, *(self.recipe.get(field) for field in SAME))

    def values(self, measure: str) -> dict[int, float]:
        """A figure by seed, of the finished runs that have it; of one seed the first run's."""
        found: dict[int, float] = {}
        for run in self.runs:
            if run.finished and measure in run.measures:
                found.setdefault(run.seed, run.measures[measure])
        return found


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Runs in the order given, named after their folders.

    Raises:
        ValueError: a folder is no run or was given twice, or a file of it is damaged.
    """
    paths = [Path(folder) for folder in folders]
    last = [path.resolve().name for path in paths]
    for path in paths:
        if sum(path.resolve() == other.resolve() for other in paths) > 1:
            raise ValueError(f"RUN: {path} was given more than once")
    return [
        read_run(path, name if last.count(name) == 1 else str(path))
        for path, name in zip(paths, last, strict=True)
    ]


def read_run(folder: Path, name: str | None = None) -> Run:
    """A run, finished or not.

    Raises:
        ValueError: the folder is no run, or a file of it is damaged.
    """
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"RUN: {folder} is no run of sftmix: it has no {MANIFEST}")
    manifest = _mapping(folder / MANIFEST)
    for key, kind in (("method", str), ("seed", int), ("model", str), ("data", list)):
        if not isinstance(manifest.get(key), kind):
            raise ValueError(
                f"{folder / MANIFEST}: expected {key} of type {kind.__name__}, "
                f"got {manifest.get(key)!r}"
            )
    state = _state(folder)
    metrics, limits = _evaluation(folder / EVALUATION)
    finished = (folder / TRAINER_STATE).exists() and any(
        (folder / config).exists() for config in CONFIGS
    )
    return Run(
        folder,
        name or folder.resolve().name,
        {key: value for key, value in manifest.items() if key not in NOT_RECIPE},
        manifest.get("versions") or {},
        manifest.get("files") or {},
        _mapping(state).get("log_history", []) if state else [],
        metrics,
        finished or ("num_scorings" in manifest and (folder / PARTITION).exists()),
        limits,
    )


def _state(folder: Path) -> Path | None:
    """The trainer's state: of a finished run, or in the newest checkpoint."""
    numbers = {
        int(found[1]): path
        for path in folder.glob(f"checkpoint-*/{TRAINER_STATE}")
        if (found := re.fullmatch(r"checkpoint-(\d+)", path.parent.name))
    }
    if (folder / TRAINER_STATE).exists():
        return folder / TRAINER_STATE
    return numbers[max(numbers)] if numbers else None


def _mapping(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected names and values, got {type(found).__name__}")
    return found


def _evaluation(path: Path) -> tuple[dict[str, float], dict[str, int]]:
    """Metrics, and how many questions those are of that were not asked all."""
    content = _mapping(path) if path.exists() else {"metrics": {}}
    metrics, details = content.get("metrics"), content.get("details")
    if not isinstance(metrics, dict) or not all(
        isinstance(value, int | float) for value in metrics.values()
    ):
        raise ValueError(f"{path}: expected metrics, a number for each name, got {metrics!r}")
    known = details if isinstance(details, dict) else {}
    limits = {
        name: one["limit"]
        for name, one in known.items()
        if isinstance(one, dict) and one.get("limit")
    }
    return {name: float(value) for name, value in metrics.items()}, limits


def identity(run: Run) -> str:
    """What runs of one row share: the recipe without the seed, that of the partition, too.

    Data and model are the same where their hash is, wherever they lay and however they were
    selected.
    """
    return json.dumps({**_without_seed(run.recipe), "partition": scoring_of(run)}, sort_keys=True)


def scoring_of(run: Run) -> Any:
    """How a run's partition was scored and split but for the seeds, or else its hash.

    The manifest beside the partition says how, while that is the one that the run had.
    """
    wanted, noted = run.recipe.get("partition"), run.files.get("partition")
    path = run.place(noted) if wanted and noted else None
    if path is None or not path.is_file() or not path.with_name(MANIFEST).is_file():
        return wanted
    try:
        if partition_hash(read_partition(path)) != wanted:
            return wanted
        found = _mapping(path.with_name(MANIFEST))
    except ValueError:
        return wanted  # damaged, as `find_partition` says
    split = {"by": "confidence", **(found.get("split") or {})}
    recipe = {key: value for key, value in found.items() if key not in NOT_RECIPE}
    return {**_without_seed(recipe), "split": _without_seed(split)}


def _without_seed(recipe: Mapping[str, Any]) -> dict[str, Any]:
    left_out = {"seed", *(OF_DATA if recipe.get("data_hash") else ())}
    left_out |= OF_MODEL if recipe.get("model_hash") else set()
    return {key: value for key, value in recipe.items() if key not in left_out}


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Trained runs by recipe, NTP first, otherwise in the order given; each with its own name."""
    by_recipe: dict[str, list[Run]] = {}
    for run in runs:
        if not run.scored:
            by_recipe.setdefault(identity(run), []).append(run)
    parts = [sorted(part, key=lambda run: not run.finished) for part in by_recipe.values()]
    parts.sort(key=lambda part: part[0].recipe["method"] != "ntp")
    return [Group(name, part) for name, part in zip(_names(parts), parts, strict=True)]


def _names(parts: Sequence[Sequence[Run]]) -> list[str]:
    """The method, and what tells it from other rows of the same method."""
    names = []
    for part in parts:
        method = part[0].recipe["method"]
        alike = [other[0].recipe for other in parts if other[0].recipe["method"] == method]
        fields = [field for field in differing(alike) if field not in ("seed", "data")]
        texts = [f"{field} {shown(part[0].recipe.get(field))}" for field in fields]
        if len(texts) > 2:
            others = f" and {len(part) - 1} more" if len(part) > 1 else ""
            texts = [f"{part[0].name}{others}"]
        names.append(", ".join([title_of(method), *texts]))
    return names


def differing(recipes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Fields in which recipes differ, in their order."""
    fields = dict.fromkeys(field for recipe in recipes for field in recipe)
    return [
        field
        for field in fields
        if len({json.dumps(recipe.get(field), sort_keys=True) for recipe in recipes}) > 1
    ]


def shown(value: Any) -> str:
    """A recipe's value as text; of a long hash its beginning."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return f"{value[:8]}..." if re.fullmatch(r"[0-9a-f]{64}", value) else value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def baseline_of(group: Group, groups: Sequence[Group]) -> Group | None:
    """The NTP row on the same data from the same model with the most alike recipe, if any."""
    same = [
        other
        for other in groups
        if other.method == "ntp" and other is not group and other.start == group.start
    ]
    if group.method == "ntp" or not same:
        return None
    return min(same, key=lambda other: len(confounders(group, other)))


def confounders(group: Group, baseline: Group) -> list[str]:
    """Fields besides those of the method in which two rows differ."""
    fields = differing([group.recipe, baseline.recipe])
    return [field for field in fields if field not in OF_METHOD | OF_DATA | {"seed"}]


def find_partition(run: Run, runs: Sequence[Run]) -> Partition:
    """The partition that a run was scored into or trained with, also where another run holds it.

    Raises:
        ValueError: the run has none, it is not found, or the file has changed since.
    """
    if run.scored:
        if not (run.folder / PARTITION).exists():
            raise ValueError(f"{run.name} has not finished scoring: there is no {PARTITION}")
        return read_partition(run.folder / PARTITION)
    wanted = run.recipe.get("partition")
    if wanted is None:
        raise ValueError(f"{run.name} was trained without a partition")
    noted = run.files.get("partition")
    own = [run.place(noted)] if noted else []
    paths = own + [other.folder / PARTITION for other in runs if other.scored]
    for path in paths:
        if path.is_file():
            partition = read_partition(path)
            if partition_hash(partition) == wanted:
                return partition
    if own and own[0].is_file():
        raise ValueError(
            f"{run.name} was trained with another partition than {own[0]} is now: it was scored or "
            "split anew"
        )
    raise ValueError(
        f"the partition of {run.name} was not found{f' at {noted}' if noted else ''}; "
        "give its run of sftmix score as a RUN too"
    )
