"""Draw the pairs of a training's first batch, and say which of their tokens are mixed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import datasets
import numpy as np

from sftmix.conventions import IGNORE_INDEX
from sftmix.pairs.collator import PairedCollator
from sftmix.pairs.pools import Confident, pools_of
from sftmix.pairs.sampling import PairedExamples, PairedSampler
from sftmix.training.config import SFTMixConfig


class Meeting(NamedTuple):
    """Two rows of hidden states that are mixed, and the token that each of them predicts."""

    rows: tuple[int, int]
    texts: tuple[str, str]


@dataclass(frozen=True)
class Pair:
    """Two examples of a batch, the more confident one first."""

    lam: float  # the first one's share; NaN if the pair is not mixed
    examples: tuple[int, int]  # rows of the data set and of the partition
    lengths: tuple[int, int]  # in tokens to learn
    meetings: Sequence[Meeting]

    @property
    def left_over(self) -> int:
        """The tokens to learn that meet none, since the other response is shorter."""
        return sum(self.lengths) - 2 * len(self.meetings)


def first_batch(
    config: SFTMixConfig,
    dataset: datasets.Dataset,
    confident: Confident,
    collator: PairedCollator,
    texts_of: Callable[[list[int]], Sequence[str]],
) -> tuple[list[Pair], tuple[int, int]]:
    """Return the pairs that the first process trains on first, and the rows and slots of the batch.

    Args:
        config: of the training, whose seed, batch and options of pairs count.
        dataset: the examples as tokens.
        confident: their partition, in the same order, or which of them are in the confident half.
        collator: the trainer's.
        texts_of: returns the texts of an example's tokens.

    Raises:
        ValueError: there are fewer examples than a batch has, or as `pools_of` does.
    """
    size = config.train_batch_size
    if len(dataset) < size:
        raise ValueError(
            f"per_device_train_batch_size: expected at most the {len(dataset)} examples that there "
            f"are, got {size}"
        )
    step = size * config.gradient_accumulation_steps // 2
    sampler = PairedSampler(
        pools_of(confident, config.pairing),
        alpha=config.alpha,
        seed=config.seed,
        pairs_per_lam=step if config.lambda_scope == "batch" else 1,
    )
    keys = list(itertools.islice(sampler, size))
    looked_up = PairedExamples(dataset)
    batch = collator([looked_up[key] for key in keys])
    learnt = [_learnt_texts(dataset[row], texts_of) for row, _ in keys]
    texts = list(itertools.chain.from_iterable(learnt))
    rows, owner = batch["rows"].tolist(), batch["owner"].tolist()
    met: list[list[Meeting]] = [[] for _ in keys[::2]]
    for c, u in zip(batch["pair_c"].tolist(), batch["pair_u"].tolist(), strict=True):
        met[owner[c] // 2].append(Meeting((rows[c], rows[u]), (texts[c], texts[u])))
    lengths = list(map(len, learnt))
    pairs = [
        Pair(lam, (c, u), (lengths[2 * n], lengths[2 * n + 1]), met[n])
        for n, ((c, lam), (u, _)) in enumerate(zip(keys[::2], keys[1::2], strict=True))
    ]
    return pairs, tuple(batch["input_ids"].shape)


def _learnt_texts(
    example: dict[str, list[int]], texts_of: Callable[[list[int]], Sequence[str]]
) -> list[str]:
    """Return the texts of the tokens to learn, in the order of the collator's targets."""
    learnt = np.array(example["labels"][1:]) != IGNORE_INDEX
    return list(itertools.compress(texts_of(example["input_ids"])[1:], learnt))


def lam_of(pair: Pair) -> str:
    """Return a pair's lam as text."""
    return "not mixed" if math.isnan(pair.lam) else f"lam {pair.lam:.4f}"
