"""Show what Mixup did with the data: the pairs that a run drew, their lam, and truncation's loss.

A pair's responses are mixed up to the end of the shorter one: of two responses of n and m tokens,
`|n - m|` tokens are left out. Legend: E examples drawn (two for each pair), P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sftmix.data.examples import data_hash
from sftmix.pairs.partition import Partition
from sftmix.report.drawing import COLOURS, INK, Picture, draw, legend_above, subset_colours
from sftmix.report.runs import Run

if TYPE_CHECKING:  # an optional extra
    from matplotlib.axes import Axes

    from sftmix.pairs.sampling import PairedSampler

LENGTH_BINS = 8


@dataclass(frozen=True, eq=False)
class Drawn:
    """The pairs of a run in the order of training (c, u, c, u, ...); lam is NaN if not mixed."""

    partition: Partition
    rows: NDArray[np.int64]  # (E,) of the partition
    lam: NDArray[np.float64]  # (E / 2,)
    steps: NDArray[np.int64]  # (E,) the optimizer step, from 1, that each was drawn in

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Response tokens of each example drawn: (E,)."""
        return self.partition.num_tokens[self.rows]

    @property
    def mixed_tokens(self) -> NDArray[np.int64]:
        """The number of those tokens that are mixed: (E,)."""
        return np.repeat(self.tokens.reshape(-1, 2).min(axis=1) * ~np.isnan(self.lam), 2)

    @property
    def unmixed_fraction(self) -> float:
        """Share of the response tokens that are not mixed, as training logs it."""
        return 1 - float(self.mixed_tokens.sum() / self.tokens.sum())


def paired_sampler(run: Run, partition: Partition) -> PairedSampler:
    """Return the sampler that drew a run's pairs, for a partition in the order of its data."""
    from sftmix.pairs.pools import pools_of
    from sftmix.pairs.sampling import PairedSampler

    pools = pools_of(partition, run.recipe.get("pairing", "outer"))
    in_batch = run.recipe.get("lambda_scope") == "batch"
    return PairedSampler(
        pools,
        alpha=float(run.recipe["alpha"]),
        seed=run.seed,
        pairs_per_lam=step_size(run) // 2 if in_batch else 1,
    )


def step_size(run: Run) -> int:
    """Return the examples of an optimizer step over all ranks."""
    return batch_size(run) * int(run.recipe.get("gradient_accumulation_steps") or 1)


def batch_size(run: Run) -> int:
    """Return the examples of a micro-batch over all ranks."""
    return int(run.recipe["per_device_train_batch_size"]) * int(run.recipe.get("world_size") or 1)


def drawn_pairs(run: Run, partition: Partition) -> Drawn:
    """Draw the pairs of the steps that a run has logged again from its seed.

    Raises:
        ValueError: the run has logged nothing, or the partition is in another order than the data.
    """
    if not run.steps:
        raise ValueError(f"{run.name} has logged no step")
    if data_hash(partition.content_hash.tolist()) != run.recipe.get("data_hash"):
        raise ValueError(f"the partition lists the examples of {run.name} in another order")
    sampler = paired_sampler(run, partition)
    rows: list[int] = []
    lam: list[float] = []
    steps: list[int] = []
    for step, keys in steps_of(sampler, run):
        if step > run.steps:
            break
        rows += [row for row, _ in keys]
        lam += [share for _, share in keys[::2]]
        steps += [step] * len(keys)
    return Drawn(partition, np.array(rows), np.array(lam), np.array(steps))


def steps_of(sampler: PairedSampler, run: Run) -> Iterator[tuple[int, list[tuple[int, float]]]]:
    """Yield the keys of each optimizer step over all ranks, epoch after epoch without end.

    A rank's batch is its share of consecutive keys; the accumulation window in which an epoch ends
    is a step of its own. With several ranks the last batch is filled up with examples without loss.
    """
    batch, size = batch_size(run), step_size(run)
    step, epoch = 0, 0
    while True:
        sampler.set_epoch(epoch)
        keys = list(sampler)
        if run.recipe.get("dataloader_drop_last"):
            keys = keys[: len(keys) // batch * batch]
        if not keys:
            raise ValueError(f"the data make no batch of {batch} examples")
        for first in range(0, len(keys), size):
            step += 1
            yield step, keys[first : first + size]
        epoch += 1


def lam_picture(name: str, drawn: Sequence[Drawn], alpha: float) -> Picture:
    """Draw the lam of all pairs beside the density that they come from."""
    lam = np.concatenate([one.lam for one in drawn])
    lam = lam[~np.isnan(lam)]
    edges = np.linspace(0, 1, 41)
    # The density has poles at 0 and 1 where alpha < 1; the bins have not.
    grid = np.linspace(0.004, 0.996, 400)
    density = beta_density(grid, alpha)

    def plot(axes: Axes) -> None:
        counts, _, _ = axes.hist(
            lam, bins=list(edges), density=True, color=COLOURS[0], alpha=0.75, label="pairs drawn"
        )
        axes.plot(grid, density, color=INK, linestyle="--", label=f"Beta({alpha:g}, {alpha:g})")
        axes.set_ylim(0, 1.15 * float(np.max(counts)))
        axes.set_xlim(0, 1)
        axes.set_xlabel("lam (share of the confident example)")
        axes.set_ylabel("density (per unit of lam)")
        legend_above(axes, columns=2)

    return Picture(
        f"Mixing shares: {name}",
        f"lam of the {len(lam):,} pairs that were drawn and mixed, mean {lam.mean():.3f}, beside "
        "its distribution (dashed). Near 0 and 1 a mixture is almost one of its two examples.",
        f"Histogram of {len(lam):,} lam beside the density of Beta({alpha:g}, {alpha:g}).",
        draw(f"lam {name}", plot),
    )


def beta_density(x: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """Return the density of Beta(alpha, alpha)."""
    log_norm = math.lgamma(2 * alpha) - 2 * math.lgamma(alpha)
    return np.exp(log_norm + (alpha - 1) * (np.log(x) + np.log1p(-x)))


@dataclass(frozen=True, eq=False)
class Truncation:
    """The response tokens drawn and mixed, by half or level (rows) and by length (columns)."""

    subsets: Sequence[str]
    edges: NDArray[np.float64]  # of the lengths, one more than columns
    tokens: NDArray[np.int64]
    mixed: NDArray[np.int64]

    @property
    def lost(self) -> NDArray[np.float64]:
        """Share of the tokens that are not mixed; NaN if none was drawn."""
        with np.errstate(invalid="ignore"):
            return 1 - self.mixed / self.tokens


def truncation(drawn: Sequence[Drawn]) -> Truncation:
    """Count the mixed tokens by subset and length, in bins of about equally many examples."""
    tokens = np.concatenate([one.tokens for one in drawn])
    mixed = np.concatenate([one.mixed_tokens for one in drawn])
    subset = np.concatenate([one.partition.subset[one.rows] for one in drawn])
    quantiles = np.quantile(tokens, np.linspace(0, 1, LENGTH_BINS + 1)[1:-1], method="nearest")
    edges = np.unique([1, *(quantiles + 1), tokens.max() + 1]).astype(np.float64)
    subsets = list(subset_colours(subset.tolist()))
    counts = [
        [
            np.histogram(tokens[owned], edges, weights=weights[owned])[0].astype(np.int64)
            for weights in (tokens, mixed)
        ]
        for name in subsets
        for owned in [subset == name]
    ]
    return Truncation(
        subsets,
        edges,
        np.array([found[0] for found in counts]),
        np.array([found[1] for found in counts]),
    )


def truncation_picture(name: str, drawn: Sequence[Drawn], logged: float | None) -> Picture:
    """Draw the share of response tokens that were not mixed, by half or level and by length."""
    found = truncation(drawn)
    colours = subset_colours(found.subsets)
    lost = 100 * found.lost
    places = np.arange(lost.shape[1])
    width = 0.84 / len(found.subsets)
    labels = [
        f"{first:.0f}" if last - first == 1 else f"{first:.0f}-{last - 1:.0f}"
        for first, last in zip(found.edges[:-1], found.edges[1:], strict=True)
    ]

    def plot(axes: Axes) -> None:
        for number, subset in enumerate(found.subsets):
            offset = (number - (len(found.subsets) - 1) / 2) * width
            values = np.nan_to_num(lost[number])
            axes.bar(places + offset, values, width, color=colours[subset], label=subset)
        axes.grid(False, axis="x")
        axes.set_xticks(places, labels, rotation=45, ha="right")
        axes.set_ylim(0, 100)
        axes.set_xlabel("length of the response (tokens)")
        axes.set_ylabel("response tokens not mixed (%)")
        legend_above(axes, columns=3)

    share = 100 * (1 - found.mixed.sum() / found.tokens.sum())
    by_subset = ", ".join(
        f"{subset} {100 * (1 - mixed.sum() / tokens.sum()):.1f} %"
        for subset, mixed, tokens in zip(found.subsets, found.mixed, found.tokens, strict=True)
    )
    check = "" if logged is None else f" Training logged a mean of {100 * logged:.1f} %."
    return Picture(
        f"Truncation losses: {name}",
        f"A pair is mixed up to its shorter response. Of all response tokens drawn {share:.1f} % "
        f"were not mixed ({by_subset}), counted over the pairs of the logged steps.{check} They "
        "still carry the NTP term, if the method has one.",
        f"Bar chart of the share of response tokens that were not mixed by length of the response: "
        f"{by_subset}.",
        draw(f"truncation {name}", plot, height=3.4),
    )
