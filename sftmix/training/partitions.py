"""From scores and data to ``confident``, which tells the trainer the half of each example."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import datasets
import numpy as np

from sftmix.data.examples import content_hash
from sftmix.pairs.partition import Partition, from_scores, match, read_partition
from sftmix.pairs.pools import Confident
from sftmix.runs.failures import Naming
from sftmix_kernels import StreamingPerplexity

Examples: TypeAlias = Sequence[dict[str, Any]] | datasets.Dataset
# By which a partition knows its examples; `tokenize_examples` makes both.
IDENTITY = {"id", "content_hash"}


def partition_of(
    scores: StreamingPerplexity,  # of S examples, C checkpoints
    dataset: Examples,  # (S,), in the order of the scores
) -> Partition:
    """Return the partition at the median of the confidence: the trainer's ``confident``.

    Confidence is minus the mean perplexity over checkpoints (arXiv 2410.05248). `sftmix.score`
    trains a reference model and scores the data with it; this is for scores of your own.

    Example:
        Three examples, the second of them with two response tokens, scored once:

        >>> import torch
        >>> rows = [{"input_ids": [5, 6], "labels": [-100, 6]}]
        >>> rows += [{"input_ids": [5, 7, 8], "labels": [-100, 7, 8]}]
        >>> rows += [{"input_ids": [5, 9], "labels": [-100, 9]}]
        >>> scores = StreamingPerplexity(num_samples=3, device="cpu")
        >>> scores.add(torch.tensor([2.0, 0.5, 0.7, 1.0]), torch.tensor([0, 1, 1, 2]))  # nats
        >>> scores.end_checkpoint()
        >>> partition_of(scores, rows).subset.tolist()
        ['unconfident', 'confident', 'confident']

    Raises:
        ValueError: no checkpoint was ended, another number of examples than of scores, an example
            without a token, or a score that is NaN.
    """
    ids, hashes = identities(dataset)
    with Naming("scores"):
        return from_scores(
            ids, hashes, scores.num_tokens.cpu().numpy(), scores.nll_sum.cpu().numpy()
        )


def matched(confident: Confident | str | Path, dataset: Examples) -> Confident:
    """Return ``confident`` in the order of a data set; booleans have it already.

    A partition, or the path of its file, is matched by ids and content hashes.

    Raises:
        ValueError: no partition is in the file, or it is of other examples.
    """
    if isinstance(confident, str | Path):
        with Naming("confident"):
            confident = read_partition(Path(confident))
    if not isinstance(confident, Partition):
        return confident
    with Naming("confident", other="partition"):
        return match(confident, *identities(dataset))


def identities(dataset: Examples) -> tuple[list[int], list[str]]:
    """Return ids and content hashes of examples, (S,) each.

    They are those of the columns ``id`` and ``content_hash``. Where one of these is missing, an
    example is known by its row number and by the hash of its tokens and labels, as `sftmix score`
    knows a row of a file that holds tokens.

    Raises:
        ValueError: an id is there more than once, as where two data sets were joined.
    """
    if len(dataset) and dataset[0].keys() >= IDENTITY:
        ids, hashes = (column(dataset, name) for name in ("id", "content_hash"))
        for one, number in Counter(ids).most_common(1):
            if number > 1:
                raise ValueError(
                    f"id: expected another one in each row, got {one} in {number} rows; where data "
                    "sets were joined, leave the columns id and content_hash out, or number the "
                    "rows anew"
                )
        return ids, hashes
    found = [
        content_hash({name: np.asarray(value).tolist() for name, value in row.items()})
        for row in tokens(dataset)
    ]
    return list(range(len(found))), found


def column(dataset: Examples, name: str) -> list[Any]:
    """Return a column, from Arrow where no transform changes what it holds."""
    if is_plain(dataset):
        return list(dataset.with_format(None)[name][:])
    return [dataset[row][name] for row in range(len(dataset))]


def tokens(dataset: Examples) -> Iterator[dict[str, Any]]:
    """Yield tokens and labels of each row."""
    names = ["input_ids", "labels"]
    if is_plain(dataset):
        yield from dataset.with_format(None).select_columns(names)
        return
    for number in range(len(dataset)):
        row = dataset[number]
        yield {name: row[name] for name in names}


def is_plain(dataset: Examples) -> TypeGuard[datasets.Dataset]:
    """Say whether Arrow holds the rows, which no transform makes."""
    return isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom"
