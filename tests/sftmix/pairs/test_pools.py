"""Halves, levels and ranks: which examples are paired with which."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from sftmix.pairs.collator import PairedCollator
from sftmix.pairs.partition import Partition, from_scores, split
from sftmix.pairs.pools import JITTER, Pool, chosen, pools_of
from sftmix.pairs.sampling import PairedSampler
from tests.sftmix import tiny


def partition(number: int, by: str = "confidence") -> Partition:
    """Examples in an order that is none of confidence; row i has the rank ``ranks(number)[i]``."""
    nll = ranks(number)[:, None] / number + 0.1
    scored = from_scores(np.arange(number), [f"{i}" for i in range(number)], [1] * number, nll)
    return split(scored, by)


def ranks(number: int) -> np.ndarray:
    """0 is the most confident."""
    return np.random.default_rng(3).permutation(number)


def drawn_ranks(found: list[Pool], number: int, epoch: int = 0) -> np.ndarray:
    """Ranks of both partners and whether they are mixed, (P, 3)."""
    sampler = PairedSampler(found, alpha=0.5, seed=1)
    sampler.set_epoch(epoch)
    rows, lams = zip(*sampler, strict=True)
    place = ranks(number)[list(rows)]
    return np.stack([place[::2], place[1::2], ~np.isnan(lams[::2])], 1)


@pytest.mark.parametrize("pairing", ["outer", "neighbours"])
def test_two_levels_are_the_halves(pairing: str) -> None:
    by_levels = pools_of(partition(11, "quantiles:2"), pairing)
    for given in (partition(11), (partition(11).subset == "confident").tolist()):
        (pool,) = pools_of(given, pairing)
        assert pool.confident.tolist() == by_levels[0].confident.tolist()
        assert pool.unconfident.tolist() == by_levels[0].unconfident.tolist()
        assert (pool.mixed, pool.ranked) == (True, False)


def test_levels_of_quantiles() -> None:
    found = partition(14, "quantiles:4")
    for name, low, high in (("1", 0, 4), ("2", 4, 8), ("3", 8, 11), ("4", 11, 14)):
        assert sorted(ranks(14)[found.subset == f"level {name}"]) == list(range(low, high))


@pytest.mark.parametrize(
    ("pairing", "partners"), [("outer", {(0, 3), (1, 2)}), ("neighbours", {(0, 1), (2, 3)})]
)
def test_four_levels(pairing: str, partners: set[tuple[int, int]]) -> None:
    pairs = drawn_ranks(pools_of(partition(40, "quantiles:4"), pairing), 40)
    assert {(c // 10, u // 10) for c, u, _ in pairs} == partners
    assert sorted(pairs[:, :2].flatten()) == list(range(40))
    assert pairs[:, 2].all()


def test_the_middle_level_is_in_every_epoch_and_not_mixed() -> None:
    pairs = drawn_ranks(pools_of(partition(33, "quantiles:3"), "outer"), 33)
    level = pairs[:, :2] // 11
    assert (level[pairs[:, 2] == 1] == [0, 2]).all()
    assert (level[pairs[:, 2] == 0] == [1, 1]).all()
    seen = Counter(pairs[:, :2].flatten().tolist())
    # An odd level has one example a second time.
    assert set(seen) == set(range(33))
    assert sum(seen.values()) == 34
    # The more confident partner comes first.
    assert (pairs[:, 0] < pairs[:, 1]).all()


def test_pairs_that_are_not_mixed_have_no_mixed_tokens() -> None:
    examples = [{**row, "lam": (np.nan, 0.3)[i // 2]} for i, row in enumerate(tiny.examples(4))]
    batch = PairedCollator(0)(examples)
    both = PairedCollator(0)([{**row, "lam": 0.3} for row in tiny.examples(4)])
    assert batch["rows"].tolist() == both["rows"].tolist()
    owners = batch["owner"][batch["pair_c"]]
    assert set(owners.tolist()) == {2}
    assert not batch["lam"].isnan().any()
    second = both["owner"][both["pair_c"]] == 2
    assert batch["pair_u"].tolist() == both["pair_u"][second].tolist()


def test_ranks_are_paired_half_of_the_data_apart() -> None:
    found = pools_of(partition(400), "rank")
    epochs = [drawn_ranks(found, 400, number) for number in (0, 1)]
    for pairs in epochs:
        assert sorted(pairs[:, :2].flatten()) == list(range(400))
        distance = pairs[:, 1] - pairs[:, 0]
        # Each side is up to JITTER of its 200 off its place, in its own jitter and in the other's.
        assert np.abs(distance - 200).max() <= 4 * JITTER * 200
        # In no order: batches are no slices of the confidence.
        assert np.abs(np.corrcoef(np.arange(200), pairs[:, 0])[0, 1]) < 0.2
    partners = [set(map(tuple, pairs[:, :2].tolist())) for pairs in epochs]
    assert len(partners[0] & partners[1]) < 50


def test_ranks_of_halves_that_are_not_equal() -> None:
    """As where rows were left out after scoring."""
    for confident, unconfident in ((200, 120), (120, 200), (100, 101)):
        first, second = np.arange(confident), np.arange(unconfident)
        c, u = Pool(first, second, ranked=True).draw(np.random.Generator(np.random.Philox(0)))
        assert len(c) == len(u) == max(confident, unconfident)
        assert set(c) == set(first)
        assert set(u) == set(second)
        # Shares of their halves; each side is up to twice JITTER off.
        assert np.abs(c / confident - u / unconfident).max() <= 4 * JITTER + 0.01


def test_any_partners_are_paired_otherwise() -> None:
    pairs = drawn_ranks(pools_of(partition(400), "outer"), 400)
    assert np.abs(pairs[:, 1] - pairs[:, 0] - 200).max() > 150


@pytest.mark.parametrize(
    ("by", "pairing", "message"),
    [
        (
            "quantiles:3",
            "neighbours",
            "pairing: 'neighbours' needs an even number of levels, got 3",
        ),
        ("quantiles:4", "rank", "pairing: 'rank' needs a partition file of two halves, got 4"),
        ("confidence", "inner", "pairing: expected outer, neighbours, rank; got 'inner'"),
    ],
)
def test_pairings_that_levels_do_not_have(by: str, pairing: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pools_of(partition(12, by), pairing)


def test_ranks_need_the_confidence() -> None:
    with pytest.raises(ValueError, match="without the confidence"):
        pools_of([True, False], "rank")


@pytest.mark.parametrize("by", ["quantiles:1", "quantiles:7", "quantiles:x", "quantiles:-2"])
def test_a_wrong_number_of_levels(by: str) -> None:
    with pytest.raises(ValueError, match=f"by: expected .*'{by}'"):
        partition(12, by)


@pytest.mark.parametrize("confident", [[True] * 3, [False] * 3])
def test_an_empty_half_is_refused(confident: list[bool]) -> None:
    with pytest.raises(ValueError, match="partition: expected examples on both sides"):
        pools_of(confident, "outer")


def test_a_level_that_is_gone_is_refused() -> None:
    some = partition(12, "quantiles:4")
    rows = np.flatnonzero(some.subset != "level 2")
    with pytest.raises(ValueError, match=r"both sides .*got 0 confident and 3 unconfident"):
        pools_of(chosen(some, rows), "outer")


def test_fewer_rows_than_levels_are_refused() -> None:
    some = partition(8, "quantiles:4")
    rows = np.flatnonzero(some.subset == "level 4")
    with pytest.raises(ValueError, match=r"both sides .*got 0 confident and 2 unconfident"):
        pools_of(chosen(some, rows), "outer")


def test_chosen_rows() -> None:
    assert np.asarray(chosen([True, False, True], [2, 1])).tolist() == [True, False]
    found = chosen(partition(6), [4, 0])
    assert isinstance(found, Partition)
    assert found.id.tolist() == [4, 0]
