"""`sftmix split`: rewrite the halves of a scored run, or make levels of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sftmix.manifest import read_manifest
from sftmix.partition import read_partition, split, summary, write_partition
from sftmix.runs import lock_run, open_run, write_json


def main(words: Sequence[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="sftmix split",
        description="Rewrite the `subset` column of RUN/confidence.parquet.",
    )
    parser.add_argument("run", help="Folder written by `sftmix score`")
    parser.add_argument(
        "--by",
        default="confidence",
        metavar="confidence|random|reversed|quantiles:K",
        help="halves at the median of the confidence [paper]; random halves; the median's, with "
        "their names swapped; K levels of equal numbers, see `sftmix train --pairing` [ours] "
        "(default: confidence)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of random halves [ours] (default: 0)")
    arguments = parser.parse_args(words)
    run = open_run(arguments.run, resume=True)
    path = Path(run) / "confidence.parquet"
    with lock_run(run):
        partition = split(read_partition(path), arguments.by, arguments.seed)
        write_partition(path, partition)
        record(run, arguments.by, arguments.seed)
    print(summary(partition))


def record(run: Path, by: str, seed: int) -> None:
    """Note in ``RUN/manifest.json``, where there is one, how the halves were made."""
    path = run / "manifest.json"
    if path.exists():
        write_json(path, {**read_manifest(path), "split": {"by": by, "seed": seed}})
