"""Which examples may be paired with which: two halves, or more levels of confidence.

The paper has two halves (arXiv 2410.05248) and leaves more levels open; the rest is ours. Level 1
is the most confident of K. Letters: S examples, K levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from sftmix.pairs.partition import Partition, levels, take

Rows: TypeAlias = NDArray[np.int64]
# Of each example whether it is in the confident half, (S,), or the examples' partition.
Confident: TypeAlias = Sequence[bool] | NDArray[Any] | Partition
Pairing = Literal["outer", "neighbours", "rank"]

# How far ranks are jittered, as a share of a half: partners change from epoch to epoch, while the
# distance of their ranks stays within a tenth of the half.
JITTER = 0.05


def halves(confident: Any, number: int) -> NDArray[np.bool_]:
    """Return which of so many examples are in the confident half, (S,).

    Raises:
        ValueError: another number of values, or one that is neither true nor false.
    """
    values = np.asarray(confident)
    if values.shape != (number,):
        raise ValueError(
            f"confident: expected one value for each of {number} training examples, "
            f"got shape {values.shape}"
        )
    if not np.isin(values, (0, 1)).all():
        raise ValueError(
            "confident: expected a boolean for each training example, got "
            f"{next(one for one in values.tolist() if one not in (0, 1))!r}"
        )
    return values.astype(bool)


def chosen(confident: Confident, rows: Sequence[int]) -> Confident:
    """Return ``confident`` for the examples in ``rows``, in that order."""
    places = np.asarray(rows, dtype=np.int64)
    if isinstance(confident, Partition):
        return take(confident, places)
    return np.asarray(confident, dtype=bool)[places]


@dataclass(frozen=True, eq=False)
class Pool:
    """Two sides of examples; a pair takes one of each, the more confident one first.

    ``ranked``: both sides are ordered by confidence, and examples of about equal rank are paired;
    otherwise any two. Examples of a pool that is not ``mixed`` are in batches without Mixup.
    """

    confident: Rows
    unconfident: Rows
    mixed: bool = True
    ranked: bool = False

    @property
    def num_pairs(self) -> int:
        """Return the number of pairs of an epoch, in which every example comes at least once."""
        return max(len(self.confident), len(self.unconfident))

    def draw(self, random: np.random.Generator) -> tuple[Rows, Rows]:
        """Return an epoch's pairs, both sides (num_pairs,).

        A smaller side starts again when used up; a ranked one is stretched, so that partners keep
        their ranks' shares.
        """
        draw = self._stretched if self.ranked else self._repeated
        return draw(self.confident, random), draw(self.unconfident, random)

    def _repeated(self, rows: Rows, random: np.random.Generator) -> Rows:
        return np.resize(random.permutation(rows), self.num_pairs)

    def _stretched(self, rows: Rows, random: np.random.Generator) -> Rows:
        places = np.arange(self.num_pairs) * len(rows) // self.num_pairs
        return _jittered(rows, random)[places]


def _jittered(rows: Rows, random: np.random.Generator) -> Rows:
    reach = JITTER * len(rows)
    ranks = np.arange(len(rows)) + random.uniform(-reach, reach, len(rows))
    return rows[np.argsort(ranks)]


def pools_of(confident: Confident, pairing: str) -> list[Pool]:
    """Return the pools of examples whose half, (S,) booleans, or level is known.

    outer: level 1 with level K, 2 with K - 1, and so on inwards; the middle level of an odd K is
        not mixed. Of two halves: one with the other, the paper's.
    neighbours: level 1 with 2, 3 with 4, and so on.
    rank: of two halves, the most confident example of one with about the most confident of the
        other, and so on down, so that partners are half of the data apart in rank.

    Raises:
        ValueError: an unknown ``pairing``, or one that these levels do not have.
    """
    if isinstance(confident, Partition):
        level, confidence = levels(confident), confident.confidence
    else:
        level, confidence = np.where(np.asarray(confident, dtype=bool), 1, 2), None
    rows = [np.flatnonzero(level == number) for number in range(1, level.max(initial=2) + 1)]
    if pairing == "rank":
        if confidence is None or len(rows) != 2:
            raise ValueError(
                f"pairing: 'rank' needs a partition file of two halves, got {len(rows)} levels"
                f"{' without the confidence' if confidence is None else ''}"
            )
        rows = [side[np.lexsort((side, -confidence[side]))] for side in rows]
        pools = [Pool(rows[0], rows[1], ranked=True)]
    elif pairing == "neighbours":
        if len(rows) % 2:
            raise ValueError(
                f"pairing: 'neighbours' needs an even number of levels, got {len(rows)}"
            )
        pools = [Pool(rows[i], rows[i + 1]) for i in range(0, len(rows), 2)]
    elif pairing == "outer":
        half = len(rows) // 2
        pools = [Pool(rows[i], rows[-1 - i]) for i in range(half)]
        if len(rows) % 2 and confidence is not None:
            middle = rows[half][np.lexsort((rows[half], -confidence[rows[half]]))]
            upper, lower = np.array_split(middle, 2)
            pools.append(Pool(upper, lower, mixed=False))
    else:
        raise ValueError(f"pairing: expected {', '.join(get_args(Pairing))}; got {pairing!r}")
    for pool in pools:
        if not len(pool.confident) or not len(pool.unconfident):
            raise ValueError(
                "partition: expected examples on both sides of every pair, got "
                f"{len(pool.confident)} confident and {len(pool.unconfident)} unconfident; score "
                "at least two examples"
            )
    return pools
