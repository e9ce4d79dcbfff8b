"""Which examples are paired, with which lam, and which of their tokens are mixed."""

from __future__ import annotations

import doctest
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sftmix.pairs import collator, partition
from sftmix.pairs.collator import PairedCollator
from sftmix.pairs.pools import Pool
from sftmix.pairs.sampling import PairedExamples, PairedSampler, ShuffledSampler, filler
from tests.sftmix import tiny

CONFIDENT, UNCONFIDENT = [4, 9, 2, 7, 0], [1, 3, 5]


def sampler(seed: int = 0, alpha: float = 0.5) -> PairedSampler:
    return paired_sampler(CONFIDENT, UNCONFIDENT, alpha=alpha, seed=seed)


def paired_sampler(
    confident: Sequence[int], unconfident: Sequence[int], *, alpha: float = 0.5, seed: int = 0
) -> PairedSampler:
    pool = Pool(np.asarray(confident), np.asarray(unconfident))
    return PairedSampler([pool], alpha=alpha, seed=seed)


def epoch(sampler: Any, number: int) -> list[Any]:
    sampler.set_epoch(number)
    return list(sampler)


# The sampler


@pytest.mark.parametrize("smaller_first", [False, True])
def test_every_example_comes_and_halves_alternate(smaller_first: bool) -> None:
    halves = (UNCONFIDENT, CONFIDENT) if smaller_first else (CONFIDENT, UNCONFIDENT)
    paired = paired_sampler(*halves, seed=3)
    for number in range(4):
        drawn = epoch(paired, number)
        assert len(drawn) == len(paired) == 2 * len(CONFIDENT)
        firsts, seconds = Counter(row for row, _ in drawn[::2]), Counter(r for r, _ in drawn[1::2])
        assert set(firsts) == set(halves[0])
        assert set(seconds) == set(halves[1])
        # The larger half once each; the smaller one again and again, but evenly.
        assert {max(c.values()) - min(c.values()) for c in (firsts, seconds)} == {0, 1}


def test_equal_halves_are_seen_exactly_once() -> None:
    drawn = list(paired_sampler(range(0, 10), range(10, 20), seed=1))
    assert sorted(row for row, _ in drawn) == list(range(20))
    assert all(row < 10 for row, _ in drawn[::2])


def test_a_pair_has_one_lam() -> None:
    drawn = list(sampler())
    assert [lam for _, lam in drawn[::2]] == [lam for _, lam in drawn[1::2]]
    assert len({lam for _, lam in drawn}) == len(CONFIDENT)


def test_seed_and_epoch_alone_decide() -> None:
    first = sampler(seed=5)
    epochs = [epoch(first, number) for number in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    torch.manual_seed(99)
    np.random.seed(99)
    again = sampler(seed=5)
    assert [epoch(again, number) for number in (2, 0, 1)] == [epochs[2], epochs[0], epochs[1]]
    assert epoch(sampler(seed=6), 0) != epochs[0]
    assert epoch(first, 1) == epochs[1]


def test_partners_change_from_epoch_to_epoch() -> None:
    paired = paired_sampler(range(50), range(50, 100))

    def partners(number: int) -> set[tuple[int, int]]:
        rows = [row for row, _ in epoch(paired, number)]
        return set(zip(rows[::2], rows[1::2], strict=True))

    # Two random matchings of 50 share one pair on average, and 10 with probability below 1e-6.
    assert len(partners(0) & partners(1)) < 10


def test_lam_is_beta_distributed() -> None:
    """Kolmogorov-Smirnov against Beta(1/2, 1/2), whose distribution is 2/pi asin(sqrt(x))."""
    number = 20_000
    paired = paired_sampler(range(number), range(number, 2 * number))
    lam = np.sort([share for _, share in list(paired)[::2]])
    assert lam[0] >= 0
    assert lam[-1] <= 1
    expected = 2 / np.pi * np.arcsin(np.sqrt(lam))
    steps = np.arange(number + 1) / number
    distance = max((steps[1:] - expected).max(), (expected - steps[:-1]).max())
    # P(distance > 1.95 / sqrt(n)) is 0.001 for the right distribution; the seed is fixed.
    assert distance < 1.95 / np.sqrt(number)
    # The uniform distribution, alpha = 1, is 0.105 away, seven times the bound.
    assert np.abs(steps[1:] - lam).max() > 0.1


def test_alpha_is_used() -> None:
    def spread(alpha: float) -> float:
        paired = paired_sampler(range(5000), range(5000), alpha=alpha)
        return float(np.var([lam for _, lam in paired]))

    # Beta(a, a) has the variance 1 / (4 (2 a + 1)).
    for alpha in (0.5, 1.0, 4.0):
        assert spread(alpha) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_a_wrong_alpha_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha: expected"):
        sampler(alpha=alpha)


def test_shuffling_without_pairs() -> None:
    shuffled = ShuffledSampler(11, seed=4)
    epochs = [epoch(shuffled, number) for number in range(3)]
    assert len(shuffled) == 11
    assert all(sorted(rows) == list(range(11)) for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epoch(ShuffledSampler(11, seed=4), 2) == epochs[2]


def test_examples_get_their_lam() -> None:
    data = tiny.examples(3)
    paired = PairedExamples(data)
    assert len(paired) == 3
    assert paired[(2, 0.25)] == {**data[2], "lam": 0.25}
    assert "lam" not in data[2]


# The collator


def test_the_examples_of_the_docstrings() -> None:
    for module, lines in ((collator, 6), (partition, 4)):
        assert doctest.testmod(module) == (0, lines)


def expected_batch(batch: list[dict[str, Any]], length: int) -> dict[str, list[Any]]:
    """Written as the method says it, a token at a time."""
    names = ("rows", "targets", "owner", "pair_c", "pair_u", "lam")
    plan: dict[str, list[Any]] = {name: [] for name in names}
    responses = []
    for place, example in enumerate(batch):
        response = []
        for position in range(1, len(example["labels"])):
            if example["labels"][position] != -100:
                response.append(len(plan["rows"]))
                plan["rows"].append(place * length + position - 1)
                plan["targets"].append(example["labels"][position])
                plan["owner"].append(place)
        responses.append(response)
    for c in range(0, len(batch) - 1, 2):
        for n in range(min(len(responses[c]), len(responses[c + 1]))):
            plan["pair_c"].append(responses[c][n])
            plan["pair_u"].append(responses[c + 1][n])
            plan["lam"].append(np.float32(batch[c]["lam"]))
    return plan


def some_example() -> st.SearchStrategy[dict[str, Any]]:
    """Labels anywhere, with gaps as multi-turn conversations have them; one after the first."""

    def made(kept: list[bool], sure: int) -> dict[str, Any]:
        kept[1 + sure % (len(kept) - 1)] = True
        tokens = [3 + i for i in range(len(kept))]
        labels = [t if k else -100 for t, k in zip(tokens, kept, strict=True)]
        return tiny.named(tokens, labels)

    kept = st.lists(st.booleans(), min_size=2, max_size=9)
    return st.builds(made, kept, st.integers(0, 7))


@given(
    st.lists(st.tuples(some_example(), some_example(), st.floats(0, 1)), min_size=1, max_size=3),
    st.sampled_from([1, 4]),
)
def test_the_plan_is_that_of_a_slow_loop(pairs: list[Any], multiple: int) -> None:
    batch = [{**example, "lam": lam} for c, u, lam in pairs for example in (c, u)]
    found = PairedCollator(0, pad_to_multiple_of=multiple)(batch)
    longest = max(len(example["labels"]) for example in batch)
    length = next(n for n in range(longest, longest + multiple) if n % multiple == 0)
    assert found["labels"].shape == (len(batch), length)
    for name, values in expected_batch(batch, length).items():
        assert found[name].tolist() == values, name
        assert found[name].dtype == (torch.float32 if name == "lam" else torch.int64)


def test_padding() -> None:
    batch = [
        {"id": 7, **tiny.named([5, 6, 7], [-100, 6, 7])},
        {"id": 3, **tiny.named([8, 0], [-100, 0])},
    ]
    found = PairedCollator(9, pad_to_multiple_of=4)(batch)
    assert found["input_ids"].tolist() == [[5, 6, 7, 9], [8, 0, 9, 9]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert found["labels"].tolist() == [[-100, 6, 7, -100], [-100, 0, -100, -100]]
    assert found["ids"].tolist() == [7, 3]
    assert found["rows"].tolist() == [0, 1, 4]
    assert not {"pair_c", "pair_u", "lam"} & found.keys()


def test_turns_are_counted_through_the_gaps() -> None:
    two_turns = tiny.named([3, 4, 5, 6, 7, 8, 9], [-100, 4, -100, -100, 7, 8, -100])
    one_turn = tiny.named([3, 4, 5, 6], [-100, -100, 5, 6])
    found = PairedCollator(0)([{**two_turns, "lam": 0.75}, {**one_turn, "lam": 0.75}])
    # Responses 4, 7, 8 and 5, 6: rows 0, 3, 4 and 7 + 1, 7 + 2; the third token is not mixed.
    assert found["pair_c"].tolist() == [0, 1]
    assert found["pair_u"].tolist() == [3, 4]
    assert found["lam"].tolist() == [0.75, 0.75]
    assert found["rows"].tolist() == [0, 3, 4, 8, 9]


def test_a_label_on_the_first_token_is_never_predicted() -> None:
    found = PairedCollator(0)([tiny.named([3, 4], [3, 4]), tiny.named([5, 6, 7], [5, -100, 7])])
    assert found["rows"].tolist() == [0, 4]
    assert found["targets"].tolist() == [4, 7]


def test_an_odd_batch_of_pairs_is_refused() -> None:
    batch = [{**row, "lam": 0.5} for row in tiny.examples(3)]
    with pytest.raises(ValueError, match=r"an even number, got 3; use an even"):
        PairedCollator(0)(batch)


def test_an_example_without_a_response_is_named() -> None:
    batch = [{"id": 1, **tiny.named([3, 4], [-100, 4])}, {"id": 2, **tiny.named([3, 4], [3, -100])}]
    with pytest.raises(ValueError, match="example 2: no response token to learn"):
        PairedCollator(0)(batch)


def test_labels_of_another_length_are_refused() -> None:
    batch = [{"id": 1, **tiny.named([3, 4], [-100, 4])}, {"id": 2, **tiny.named([3, 4], [4])}]
    with pytest.raises(ValueError, match=r"example 2: expected 2 labels, .* got 1"):
        PairedCollator(0)(batch)


@pytest.mark.parametrize("layout", ["padded", "packed", "padding_free", "sequential"])
def test_a_pair_with_an_example_of_weight_0_is_not_mixed(layout: str) -> None:
    rows = [{**row, "lam": 0.5} for row in tiny.examples(6)]
    weights = [0.5, 2.0, 1.0, 0.0, 0.0, 1.0]
    plain, found = (
        PairedCollator(0, layout=layout)(
            [{**row, **more} for row, more in zip(rows, extra, strict=True)]
        )
        for extra in ([{}] * 6, [{"weight": weight} for weight in weights])
    )
    assert "weight" not in plain
    assert found["weight"].dtype == torch.float32
    assert found["weight"].tolist() == weights
    kept = plain["owner"][plain["pair_c"]] == 0
    for name in ("pair_c", "pair_u", "lam"):
        assert torch.equal(found[name], plain[name][kept])
    assert torch.equal(found["targets"], plain["targets"])


def test_weights_of_fillers_and_of_scoring() -> None:
    rows = [{**row, "weight": 2.0} for row in tiny.examples(3)]
    collator = PairedCollator(0)
    assert collator([*rows, filler()])["weight"].tolist() == [2, 2, 2, 0]
    assert "weight" not in collator([filler()])
    assert "weight" not in collator.padded()(rows)
    del rows[1]["weight"]
    with pytest.raises(ValueError, match="example 11: expected a weight, as other examples"):
        collator(rows)
