"""The partition's arithmetic, its split, its file and its match with the data."""

from dataclasses import fields, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftmix.pairs.partition import (
    Partition,
    from_scores,
    levels,
    match,
    read_partition,
    split,
    split_subsets,
    summary,
    write_partition,
)

HASHES = ["a" * 64, "b" * 64, "c" * 64, "d" * 64, "e" * 64]


def example():
    """Five examples of which the last is hopeless; confidences fall with the id."""
    tokens = np.array([1, 2, 4, 8, 16])
    mean_nll = np.array([[0.1, 0.1], [0.5, 0.3], [1.0, 2.0], [3.0, 2.0], [800.0, 1.0]])
    return from_scores([10, 11, 12, 13, 14], HASHES, tokens, mean_nll * tokens[:, None])


def assert_equal(left, right):
    for field in fields(left):
        np.testing.assert_array_equal(getattr(left, field.name), getattr(right, field.name))


def confidences():
    """Ids in any order and confidences with many ties, infinite ones among them."""
    values = st.sampled_from([-np.inf, -1e300, -7.5, -1.0, -0.0, 0.0])
    return (
        st.integers(1, 40)
        .flatmap(
            lambda n: st.tuples(
                st.lists(st.integers(-(2**63), 2**63 - 1), min_size=n, max_size=n, unique=True),
                st.lists(values, min_size=n, max_size=n),
            )
        )
        .map(lambda pair: (np.array(pair[0], dtype=np.int64), np.array(pair[1])))
    )


# from_scores


def test_formulas():
    partition = example()
    perplexity = np.exp([[0.1, 0.1], [0.5, 0.3], [1.0, 2.0], [3.0, 2.0]])
    np.testing.assert_allclose(partition.perplexity[:4], perplexity, rtol=1e-15)
    np.testing.assert_allclose(partition.confidence[:4], -perplexity.mean(1), rtol=1e-15)
    spread = np.abs(perplexity[:, 0] - perplexity[:, 1]) / 2  # population std of two values
    np.testing.assert_allclose(partition.variability[:4], spread, rtol=1e-14, atol=1e-16)
    assert partition.subset.tolist() == ["confident"] * 3 + ["unconfident"] * 2


def test_infinite_perplexity_is_an_answer():
    partition = example()
    assert partition.perplexity[4].tolist() == [np.inf, np.exp(1.0)]
    assert partition.confidence[4] == -np.inf
    assert partition.variability[4] == np.inf
    all_infinite = from_scores([1], ["h"], [1], [[np.inf, 1e6]])
    assert all_infinite.variability[0] == np.inf
    finite_but_huge = from_scores([1], ["h"], [1], [[709.0, 709.5, 1.0]])
    assert not np.isnan(finite_but_huge.variability).any()


def test_dtypes_are_fixed():
    partition = from_scores(
        np.array([1, 2], np.int32), ("x", "y"), np.array([1, 2], np.uint8), np.ones((2, 1), "f4")
    )
    dtypes = {field.name: getattr(partition, field.name).dtype.kind for field in fields(partition)}
    assert "".join(dtypes.values()) == "iUiffffU"
    assert partition.id.dtype == partition.num_tokens.dtype == np.int64
    assert partition.nll_sum.dtype == np.float64


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"id": [1, 1]}, ValueError, "id: expected each id once, got 1"),
        ({"id": [1.0, 2.0]}, TypeError, "id: expected integers"),
        ({"id": [True, False]}, TypeError, "id: expected integers"),
        ({"id": np.array([1, 2], np.uint64)}, TypeError, "fit int64"),
        ({"id": [[1, 2]]}, ValueError, "id: expected shape"),
        ({"id": [], "content_hash": [], "num_tokens": []}, ValueError, "at least one example"),
        ({"content_hash": ["x"]}, ValueError, "content_hash: expected 2"),
        ({"content_hash": ["x", 7]}, TypeError, "content_hash: expected strings, got int"),
        ({"num_tokens": [3]}, ValueError, "num_tokens: expected 2"),
        ({"num_tokens": [3, 0]}, ValueError, "at least 1, got 0 for example 2"),
        ({"num_tokens": [3, 1.5]}, TypeError, "num_tokens: expected integers"),
        ({"nll_sum": [1.0, 2.0]}, ValueError, "nll_sum: expected shape"),
        ({"nll_sum": [[], []]}, ValueError, "C >= 1"),
        ({"nll_sum": [[1.0]]}, ValueError, "nll_sum: expected 2"),
        ({"nll_sum": [[1.0], [np.nan]]}, ValueError, "nan.* for example 2"),
        ({"nll_sum": [[1.0], [-np.inf]]}, ValueError, "inf.* for example 2"),
    ],
)
def test_wrong_scores_are_refused(changed, error, message):
    right = {"id": [1, 2], "content_hash": ["x", "y"], "num_tokens": [3, 4]}
    right["nll_sum"] = [[1.0], [2.0]]
    with pytest.raises(error, match=message):
        from_scores(**(right | changed))


# split


@given(confidences())
def test_median_split(drawn):
    ids, confidence = drawn
    confident = split_subsets(ids, confidence, by="confidence") == "confident"
    assert confident.sum() == (len(ids) + 1) // 2
    ranked = sorted(zip(-confidence, ids, confident, strict=True))
    assert [c for *_, c in ranked] == sorted(confident, reverse=True)


@given(confidences(), st.randoms(use_true_random=False), st.integers(0, 2**64 - 1))
def test_split_does_not_depend_on_the_order_of_the_examples(drawn, random, seed):
    ids, confidence = drawn
    order = list(range(len(ids)))
    random.shuffle(order)
    for by in ("confidence", "reversed", "random"):
        subset = split_subsets(ids, confidence, by=by, seed=seed)
        shuffled = split_subsets(ids[order], confidence[order], by=by, seed=seed)
        assert (shuffled == subset[order]).all()


@given(confidences())
def test_reversed_swaps_the_names(drawn):
    ids, confidence = drawn
    straight = split_subsets(ids, confidence, by="confidence")
    assert (straight != split_subsets(ids, confidence, by="reversed")).all()


@given(confidences(), st.integers(0, 2**64 - 1))
def test_random_halves_ignore_the_confidence(drawn, seed):
    ids, confidence = drawn
    subset = split_subsets(ids, confidence, by="random", seed=seed)
    assert np.count_nonzero(subset == "confident") == (len(ids) + 1) // 2
    assert (subset == split_subsets(ids, confidence[::-1], by="random", seed=seed)).all()


def test_random_split_is_fixed_for_ever():
    subset = split_subsets(np.arange(8), np.zeros(8), by="random", seed=3)
    assert "".join(name[0] for name in subset) == "uccuuccu"


def test_random_split_follows_the_seed_and_is_even():
    ids = np.arange(200)
    draws = [split_subsets(ids, -ids / 7, by="random", seed=s) == "confident" for s in range(400)]
    assert len({draw.tobytes() for draw in draws}) == 400
    # Each example falls into the confident half 200 times of 400, give or take 10 (one sigma).
    assert np.abs(np.mean(draws, axis=0) - 0.5).max() < 5 * 10 / 400


@given(confidences(), st.integers(2, 9))
def test_quantiles_are_even_and_ordered(drawn, number):
    ids, confidence = drawn
    if number > len(ids) // 2:
        with pytest.raises(ValueError, match="by: expected quantiles:K with K from 2 to half of"):
            split_subsets(ids, confidence, by=f"quantiles:{number}")
        return
    subset = split_subsets(ids, confidence, by=f"quantiles:{number}")
    ranked = sorted(zip(-confidence, ids, subset, strict=True))
    counts = [len(ids) // number + (place < len(ids) % number) for place in range(number)]
    expected = [f"level {place + 1}" for place in range(number) for _ in range(counts[place])]
    assert [name for *_, name in ranked] == expected


def test_levels_by_number():
    halves = example()
    assert levels(halves).tolist() == [1, 1, 1, 2, 2]
    assert levels(split(halves, "reversed")).tolist() == [2, 2, 2, 1, 1]
    assert levels(split(halves, "quantiles:2")).tolist() == [1, 1, 1, 2, 2]


def test_levels_round_trip_and_are_summed_up(tmp_path):
    path = tmp_path / "confidence.parquet"
    partition = from_scores(
        range(30), [f"{i}" for i in range(30)], [1] * 30, [[i] for i in range(30)]
    )
    written = split(partition, "quantiles:11")
    write_partition(path, written)
    assert_equal(read_partition(path), written)
    lines = summary(written).splitlines()
    assert [line[:8].strip() for line in lines[1:12]] == [f"level {i}" for i in range(1, 12)]
    assert [line.split()[2] for line in lines[1:12]] == ["3"] * 8 + ["2"] * 3


@pytest.mark.parametrize("names", [["level 1", "confident"], ["level 0", "level 1"], ["level 9"]])
def test_subsets_of_no_split_are_refused(tmp_path, names):
    path = tmp_path / "confidence.parquet"
    partition = example()
    subset = np.array([*names, *["level 1"] * (5 - len(names))])
    write_partition(path, replace(partition, subset=subset))
    with pytest.raises(
        ValueError, match="column subset: expected 'confident' or 'unconfident', or"
    ):
        read_partition(path)


def test_split_keeps_everything_else():
    partition = example()
    assert_equal(split(split(partition, "random", seed=1), "confidence"), partition)
    assert split(partition, "reversed").subset.tolist() == ["unconfident"] * 3 + ["confident"] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "median"}, "by: expected confidence, .*'median'"),
        ({"by": "random", "seed": -1}, "seed: expected"),
        ({"by": "random", "seed": 2**64}, "seed: expected"),
    ],
)
def test_wrong_split_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        split(example(), **arguments)


@pytest.mark.parametrize("by", ["confidence", "random", "reversed"])
def test_nan_confidence_is_refused(by):
    with pytest.raises(ValueError, match="confidence: expected a number, got nan for example 5"):
        split_subsets(np.array([4, 5]), np.array([-1.0, np.nan]), by=by)


# the file


@given(
    st.lists(st.lists(st.floats(0, 1e4), min_size=3, max_size=3), min_size=1, max_size=8),
    st.integers(-(2**63), 2**63 - 9),
)
def test_file_round_trip(tmp_path_factory, nll, first):
    ids = [first + i for i in range(len(nll))]
    hashes = [f"ä{i}" for i in ids]
    partition = from_scores(ids, hashes, [i + 1 for i in range(len(nll))], nll)
    path = tmp_path_factory.mktemp("partition") / "confidence.parquet"
    write_partition(path, partition)
    again = read_partition(path)
    assert_equal(again, partition)
    for field in fields(partition):
        old, new = getattr(partition, field.name), getattr(again, field.name)
        assert new.dtype.kind == old.dtype.kind


def test_file_has_exactly_the_columns_it_should(tmp_path):
    write_partition(tmp_path / "p", example())
    schema = pq.read_schema(tmp_path / "p")
    assert {name: str(schema.field(name).type) for name in schema.names} == {
        "id": "int64",
        "content_hash": "string",
        "num_tokens": "int64",
        "nll_sum": "list<element: double>",
        "perplexity": "list<element: double>",
        "confidence": "double",
        "variability": "double",
        "subset": "string",
    }


def test_file_written_twice_has_the_same_bytes(tmp_path):
    write_partition(tmp_path / "p", example())
    write_partition(tmp_path / "q", example())
    assert (tmp_path / "p").read_bytes() == (tmp_path / "q").read_bytes()


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.parquet"):
        read_partition(tmp_path / "none.parquet")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_file_is_refused(tmp_path, share):
    path = tmp_path / "p"
    write_partition(path, example())
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=f"{path}: cannot be read"):
        read_partition(path)


def test_flipped_bits_never_change_a_value(tmp_path):
    path = tmp_path / "p"
    write_partition(path, example())
    data = path.read_bytes()
    refused = 0
    pages = range(4, len(data) - pq.read_metadata(path).serialized_size - 8, 5)
    for place in pages:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        try:
            assert_equal(read_partition(path), example())
        except ValueError:
            refused += 1
    assert refused > len(pages) / 2


def _with_column(table, name, column):
    return table.set_column(table.column_names.index(name), name, column)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.drop_columns(["perplexity"]), "expected the columns"),
        (lambda t: t.append_column("more", t["id"]), "expected the columns"),
        (lambda t: t.select(t.column_names[::-1]), "expected the columns"),
        (lambda t: _with_column(t, "id", t["id"].cast("int32")), "column id: .* got int32"),
        (lambda t: _with_column(t, "confidence", pa.array(["x"] * 5)), "column confidence: .*"),
        (
            lambda t: _with_column(t, "confidence", pa.array([None] * 5, pa.float64())),
            "column confidence: 5 empty",
        ),
        (
            lambda t: _with_column(t, "confidence", pa.array([-1.0, np.nan, -1.0, -1.0, -1.0])),
            "column confidence: expected a number, got nan for example 11",
        ),
        (
            lambda t: _with_column(t, "nll_sum", pa.array([[1.0], [1.0, 2.0], [], [], []])),
            "column nll_sum: expected lists of one length",
        ),
        (
            lambda t: _with_column(t, "nll_sum", pa.array([[1.0]] * 4 + [[None]])),
            "column nll_sum: .* without empty",
        ),
        (lambda t: _with_column(t, "nll_sum", pa.array([[1.0]] * 5)), "one value per checkpoint"),
        (lambda t: _with_column(t, "subset", pa.array(["sure"] * 5)), "got sure for example 10"),
        (lambda t: _with_column(t, "num_tokens", pa.array([0] * 5)), "at least 1, got 0"),
        (lambda t: _with_column(t, "id", pa.array([3] * 5)), "got 3 more than once"),
        (lambda t: t.slice(0, 0), "at least one example"),
    ],
)
def test_wrong_table_is_refused(tmp_path, edit, message):
    path = tmp_path / "p"
    write_partition(path, example())
    pq.write_table(edit(pq.read_table(path)), path)
    with pytest.raises(ValueError, match=rf"{path}: .*{message}"):
        read_partition(path)


# match


def test_match_follows_the_order_of_the_data():
    order = [4, 2, 0, 3, 1]
    found = match(example(), [10 + i for i in order], [HASHES[i] for i in order])
    assert (found.subset == "confident").tolist() == [False, True, True, False, True]
    for column in fields(Partition):
        assert (getattr(found, column.name) == getattr(example(), column.name)[order]).all()


@given(st.permutations(range(9)), st.permutations(range(9)))
def test_match_finds_every_example(scored, wanted):
    partition = from_scores(
        [7 * i for i in scored], [f"hash {i}" for i in scored], [1] * 9, [[i] for i in scored]
    )
    found = match(partition, [7 * i for i in wanted], [f"hash {i}" for i in wanted])
    assert (found.subset == "confident").tolist() == [i < 5 for i in wanted]
    assert found.nll_sum[:, 0].tolist() == list(wanted)


@pytest.mark.parametrize(
    ("ids", "hashes", "message"),
    [
        ([10, 11, 12, 13, 14], [*HASHES[:3], "f" * 64, "0" * 64], "example 13 .* f{12} .* d{12} "),
        ([10, 11, 12, 13, 9], HASHES, "example 9 .* e{12} in the data and absent .*tokenizer"),
        ([10, 11, 12, 13, 99], HASHES, "example 99 .* e{12} in the data and absent"),
        ([10, 11, 12, 13, 14, 15], [*HASHES, "f" * 64], "example 15 .* f{12} in the data and ab"),
        ([10, 12, 13, 14], [HASHES[0], *HASHES[2:]], "example 11 .* absent in the data and b{12} "),
        ([], [], "example 10 .* absent in the data"),
        ([10, 11, 11, 13, 14], HASHES, "ids: expected each id once, got 11"),
        ([10, 11], HASHES, "content_hashes: expected 2 as in ids, got 5"),
    ],
)
def test_data_that_changed_is_refused(ids, hashes, message):
    with pytest.raises(ValueError, match=message):
        match(example(), ids, hashes)


def test_match_refuses_other_types():
    with pytest.raises(TypeError, match="ids: expected integers"):
        match(example(), ["10"], HASHES[:1])
    with pytest.raises(TypeError, match="content_hashes: expected strings"):
        match(example(), [10], [b"x"])


# summary


def test_summary():
    lines = summary(example()).splitlines()
    assert lines[0].split()[:3] == ["subset", "examples", "tokens"]
    assert lines[1].split()[:3] == ["confident", "3", "7"]
    assert lines[2].split() == ["unconfident", "2", "24", "-inf", "-13.737", "0", "1"]
    assert lines[3].endswith("C = 2 scorings")


def test_summary_of_one_example():
    lines = summary(from_scores([1], ["h"], [2], [[1.0]])).splitlines()
    assert lines[1].split() == ["confident", "1", "2", "-1.6487", "-1.6487", "0", "0"]
    assert lines[2].split() == ["unconfident", "0", "0", "-", "-", "-", "0"]


def test_summary_of_infinite_halves():
    partition = from_scores([1, 2], ["h", "k"], [1, 1], [[np.inf], [np.inf]])
    assert summary(partition).splitlines()[2].split()[3:] == ["-inf", "-", "-", "1"]


def test_summary_keeps_its_columns_apart():
    nll = [[600.0], [601.0], [700.0], [709.0]]
    lines = summary(from_scores([1, 2, 3, 4], HASHES[:4], [1] * 4, nll)).splitlines()
    assert [len(line.split()) for line in lines[:3]] == [7, 7, 7]
