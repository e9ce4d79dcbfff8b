"""Rewrite the halves of a scored run, or make levels of them (`sftmix split`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sftmix.conventions import MANIFEST, PARTITION
from sftmix.pairs.partition import read_partition, split, summary, write_partition
from sftmix.runs.failures import Naming, OneMessage
from sftmix.runs.folders import lock_run, open_run, read_manifest, write_json

OPTIONS = ("by", "seed")


def main(words: Sequence[str]) -> None:
    """Run the command."""
    parser = OneMessage(
        prog="sftmix split",
        description="Rewrite the `subset` column of RUN/confidence.parquet.",
    )
    parser.add_argument("run", metavar="RUN", help="Folder written by `sftmix score`")
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
    path = Path(arguments.run) / PARTITION
    if not path.is_file():
        raise ValueError(
            f"RUN: expected a folder that `sftmix score` wrote, got {arguments.run!r}, which has "
            "no confidence.parquet"
        )
    run = open_run(arguments.run, resume=True, name="RUN")
    with lock_run(run, name="RUN"):
        with Naming("RUN"):
            kept = run / MANIFEST
            manifest = read_manifest(kept) if kept.exists() else None
            partition = read_partition(path)
        partition = split(partition, arguments.by, arguments.seed)
        write_partition(path, partition)
        if manifest is not None:
            noted = {"by": arguments.by, "seed": arguments.seed}
            write_json(kept, {**manifest, "split": noted})
    print(summary(partition))
    print(f"wrote {path}")
