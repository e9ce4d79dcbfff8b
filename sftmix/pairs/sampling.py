"""Which examples sit in a batch together: an epoch's order, its pairs and their lam.

Pairs and lam depend only on (seed, epoch), so that neither a resumed run nor another number of
processes changes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from sftmix.conventions import IGNORE_INDEX
from sftmix.pairs.pools import Pool


class PairedSampler(Sampler[tuple[int, float]]):
    """Yields ``(row, lam)`` of c, u, c, u, ...: every example at least once in an epoch.

    The pairs of all pools are drawn anew each epoch and come in random order, with one lam for
    every ``pairs_per_lam`` of them in a row. Where a pool is not mixed, lam is NaN.
    """

    def __init__(
        self, pools: Sequence[Pool], *, alpha: float, seed: int, pairs_per_lam: int = 1
    ) -> None:
        if not (np.isfinite(alpha) and alpha > 0):
            raise ValueError(f"alpha: expected a finite number above 0, got {alpha}")
        self.pools, self.alpha, self.seed = list(pools), alpha, seed
        self.pairs_per_lam, self.epoch = pairs_per_lam, 0

    def __len__(self) -> int:
        return 2 * sum(pool.num_pairs for pool in self.pools)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration draws."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, float]]:
        random = np.random.Generator(np.random.Philox(key=[self.seed, self.epoch]))
        sides = [pool.draw(random) for pool in self.pools]
        mixed = np.repeat([pool.mixed for pool in self.pools], [len(c) for c, _ in sides])
        order = random.permutation(len(mixed))
        confident, unconfident = (np.concatenate(side)[order] for side in zip(*sides, strict=True))
        draws = random.beta(self.alpha, self.alpha, size=-(-len(order) // self.pairs_per_lam))
        lam = np.repeat(draws, self.pairs_per_lam)[: len(order)]
        lam[~mixed[order]] = np.nan
        for c, u, one in zip(confident.tolist(), unconfident.tolist(), lam.tolist(), strict=True):
            yield c, one
            yield u, one


class ShuffledSampler(Sampler[int]):
    """Yields every example once in an epoch, in an order that depends only on (seed, epoch)."""

    def __init__(self, num_examples: int, *, seed: int) -> None:
        self.num_examples, self.seed, self.epoch = num_examples, seed, 0

    def __len__(self) -> int:
        return self.num_examples

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration draws."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = np.random.Generator(np.random.Philox(key=[self.seed, self.epoch]))
        yield from random.permutation(self.num_examples).tolist()


class PairedExamples(Dataset[dict[str, Any]]):
    """Looks examples up by a `PairedSampler`'s ``(row, lam)``."""

    def __init__(self, examples: Sequence[dict[str, Any]]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, key: tuple[int, float]) -> dict[str, Any]:
        row, lam = key
        return {**self.examples[row], "lam": lam}


class FilledSampler(Sampler[Any]):
    """Yields another sampler's keys, filled up to whole batches of all ranks.

    The last batch of an epoch is not whole where the data do not divide. Fillers carry no loss, but
    a rank that has nothing else still makes its forward and backward, which the others wait for.
    """

    def __init__(self, sampler: Any, multiple: int, filler: Any) -> None:
        self.sampler, self.multiple, self.filler = sampler, multiple, filler

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.multiple) * self.multiple

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration draws."""
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        yield from self.sampler
        for _ in range(len(self) - len(self.sampler)):
            yield self.filler


class FilledExamples(Dataset[dict[str, Any]]):
    """Looks examples up by their row, and a filler by None."""

    def __init__(self, examples: Sequence[dict[str, Any]]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, row: int | None) -> dict[str, Any]:
        return filler() if row is None else self.examples[row]


def filler() -> dict[str, Any]:
    """Return an example without loss, marked so that `PairedCollator` takes it."""
    return {"id": -1, "input_ids": [0, 0], "labels": [IGNORE_INDEX] * 2, "filler": True}
