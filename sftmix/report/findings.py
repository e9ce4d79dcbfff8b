"""Collect what a report shows of runs: partitions, and scores before and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sftmix.pairs.partition import Partition
from sftmix.report import confidence, tables
from sftmix.report.drawing import LeftOut, attempt
from sftmix.report.runs import Group, Run, find_partition, grouped

if TYPE_CHECKING:  # brings torch
    from sftmix.report.measured import Measured


@dataclass
class Findings:
    """The runs in rows, and what was found or measured for them."""

    runs: Sequence[Run]
    groups: Sequence[Group]
    partitions: dict[str, Partition | LeftOut] = field(default_factory=dict)  # by run
    before: dict[str, Measured | LeftOut] = field(default_factory=dict)  # by group
    after: dict[str, dict[int, Measured]] = field(default_factory=dict)  # by group, then seed
    failures: list[LeftOut] = field(default_factory=list)

    def partition(self, group: Group) -> Partition:
        """Return the group's partition.

        A group that was trained without one gets that of another run on the same data.
        """
        own = self.partitions[group.runs[0].name]
        if isinstance(own, Partition):
            return own
        for run in self.runs if group.recipe.get("partition") is None else ():
            other = self.partitions[run.name]
            alike = run.recipe.get("data_hash") == group.recipe.get("data_hash")
            if alike and isinstance(other, Partition):
                return other
        raise ValueError(own.reason)

    def values(self, group: Group) -> dict[str, Mapping[int, float]]:
        """Return all figures of a group, by measure and seed."""
        spreads = {
            seed: confidence.spread(one.scores) for seed, one in self.after[group.name].items()
        }
        finite = {seed: value for seed, value in spreads.items() if np.isfinite(value)}
        return tables.values_of(group, {"confidence_std": finite} if finite else None)


def find(runs: Sequence[Run], examples: int | None) -> Findings:
    """Look for partitions, and score `examples` examples of each group; None takes all."""
    findings = Findings(runs, grouped(runs))
    for run in runs:
        title = f"The partition of {run.name}"
        findings.partitions[run.name] = attempt(title, find_partition, run, runs)
    for group in findings.groups:
        findings.after[group.name] = {}
        if examples == 0:
            nothing = LeftOut("Scoring", "--examples 0 asks for none")
            findings.before[group.name] = nothing
            findings.failures = [nothing]
        else:
            _measure(findings, group, examples)
    return findings


def _measure(findings: Findings, group: Group, examples: int | None) -> None:
    from sftmix.report.measured import measured, sample_examples  # brings torch

    run = group.runs[0]
    known = attempt("", findings.partition, group)
    partition = None if isinstance(known, LeftOut) else known
    title = f"Scoring of {group.name}"
    sample = attempt(title, sample_examples, run, partition, examples)
    if isinstance(sample, LeftOut):
        findings.before[group.name] = sample
        findings.failures.append(sample)
        return
    others = [other for other in findings.runs if other is not run]
    before = attempt(
        f"Scoring of {group.name} before training", measured, run, "before", sample, others
    )
    findings.before[group.name] = before
    if isinstance(before, LeftOut):
        findings.failures.append(before)
    for run in group.runs:
        after = attempt(f"Scoring of {run.name}", measured, run, "after", sample)
        if isinstance(after, LeftOut):
            findings.failures.append(after)
        else:
            findings.after[group.name].setdefault(run.seed, after)
