"""The confidence partition: which examples a reference model is sure of, kept as a file.

A reference model is scored at C checkpoints of one epoch. With `nll_sum[s, c]` the summed negative
log-likelihood, in nats, of the response tokens of example s given its prompt:

    perplexity[s, c] = exp(nll_sum[s, c] / num_tokens[s])        per token
    confidence[s]    = -(1/C) * sum_c perplexity[s, c]           SFTMix, arXiv 2410.05248
    variability[s]   = sqrt((1/C) * sum_c (perplexity[s, c] + confidence[s])^2)

Variability is the spread of Dataset Cartography (Swayamdipta et al. 2020, arXiv 2009.10795), taken
over perplexities. The median of the confidence splits the examples into a confident and an
unconfident half; K quantiles, which are ours, into levels of which the first is the most confident.
Letters: S examples, C checkpoints, K levels.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from sftmix.runs.folders import atomic_write

CONFIDENT = "confident"
UNCONFIDENT = "unconfident"
LEVEL = "level {}"  # from 1, the most confident
HALVES = ("confidence", "random", "reversed")

_SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("content_hash", pa.string()),
        ("num_tokens", pa.int64()),
        ("nll_sum", pa.list_(pa.float64())),
        ("perplexity", pa.list_(pa.float64())),
        ("confidence", pa.float64()),
        ("variability", pa.float64()),
        ("subset", pa.string()),
    ]
)


@dataclass(frozen=True, eq=False)
class Partition:
    """A table with one row for each example; the module says the formulas."""

    id: NDArray[np.int64]  # (S,), each once
    content_hash: NDArray[np.str_]  # (S,), tells whether the data changed after scoring
    num_tokens: NDArray[np.int64]  # (S,), response tokens, at least 1
    nll_sum: NDArray[np.float64]  # (S, C), nats
    perplexity: NDArray[np.float64]  # (S, C), per token; inf where exp overflows
    confidence: NDArray[np.float64]  # (S,), -inf where a perplexity is inf
    variability: NDArray[np.float64]  # (S,), inf where a perplexity is inf
    subset: NDArray[np.str_]  # (S,), "confident", "unconfident"; or "level 1" ... "level K"

    def __len__(self) -> int:
        return len(self.id)


def from_scores(
    id: ArrayLike,  # (S,) integers
    content_hash: Sequence[str] | NDArray[np.str_],  # (S,)
    num_tokens: ArrayLike,  # (S,) integers
    nll_sum: ArrayLike,  # (S, C), nats
) -> Partition:
    """Return the partition at the median, with the confidence that the scores give.

    >>> nll = [[1.0, 0.5], [8.0, 6.0], [3.0, 2.0]]  # two scorings of three examples
    >>> partition = from_scores([0, 1, 2], ["a", "b", "c"], [2, 2, 2], nll)
    >>> partition.confidence.round(2).tolist()
    [-1.47, -37.34, -3.6]
    >>> partition.subset.tolist()
    ['confident', 'unconfident', 'confident']

    Raises:
        TypeError: `id` or `num_tokens` are not integers that fit int64, or `content_hash` are not
            strings.
        ValueError: shapes that do not fit together, no example, no checkpoint, a repeated id, an
            example without response tokens, or a `nll_sum` that is NaN or -inf.
    """
    ids = _integers("id", id)
    tokens = _integers("num_tokens", num_tokens)
    hashes = _strings("content_hash", content_hash)
    nll = np.asarray(nll_sum, dtype=np.float64)
    if nll.ndim != 2 or nll.shape[1] < 1:
        raise ValueError(f"nll_sum: expected shape (S, C) with C >= 1, got {nll.shape}")
    if len(ids) == 0:
        raise ValueError("id: expected at least one example, got none")
    for name, array in (("content_hash", hashes), ("num_tokens", tokens), ("nll_sum", nll)):
        if len(array) != len(ids):
            raise ValueError(f"{name}: expected {len(ids)} examples as in id, got {len(array)}")
    _require_unique("id", ids)
    _require(tokens >= 1, ids, "num_tokens: expected at least 1", tokens)
    # A NaN is the minimum of its row, and not greater than anything.
    _require(nll.min(axis=1) > -np.inf, ids, "nll_sum: expected numbers", nll)
    # An overflow to inf is an answer here: the model gives the response no probability.
    with np.errstate(over="ignore", invalid="ignore"):
        perplexity = np.exp(nll / tokens[:, None])
        confidence = -perplexity.mean(axis=1)
        variability = perplexity.std(axis=1)
    variability[np.isinf(perplexity).any(axis=1)] = np.inf
    subset = split_subsets(ids, confidence, by="confidence")
    return Partition(ids, hashes, tokens, nll, perplexity, confidence, variability, subset)


def split_subsets(
    id: NDArray[np.int64],  # (S,)
    confidence: NDArray[np.float64],  # (S,)
    *,
    by: str,
    seed: int = 0,
) -> NDArray[np.str_]:
    """Return the half of every example, (S,): "confident" or "unconfident"; or its level.

    confidence: the ceil(S/2) most confident examples are confident; equal ones go by smaller id.
    reversed: the same two halves with their names swapped, so with odd S the smaller one is
        called confident.
    random: ceil(S/2) examples drawn by `seed`; the draw belongs to the id, so the order of the
        examples does not matter. `seed` has no effect on the others.
    quantiles:K: K levels, "level 1" the most confident, ordered as the halves are; the first
        S mod K have one example more than the others.

    Raises:
        ValueError: a NaN confidence, an unknown `by`, a K below 2 or above S / 2, or a `seed`
            outside 0 .. 2^64-1.
    """
    num_levels = _num_levels(by, len(id))
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected 0 .. 2^64-1, got {seed}")
    _require(~np.isnan(confidence), id, "confidence: expected a number", confidence)
    if by == "random":
        # Raw Philox words: numpy keeps them the same in every version, unlike permutation().
        draws = np.empty(len(id), dtype=np.uint64)
        draws[np.argsort(id)] = np.random.Philox(key=seed).random_raw(len(id))
        order = np.lexsort((id, draws))
    else:
        order = np.lexsort((id, -confidence))
    if num_levels:
        subset = np.empty(len(id), dtype=f"U{len(LEVEL.format(num_levels))}")
        for number, rows in enumerate(np.array_split(order, num_levels), start=1):
            subset[rows] = LEVEL.format(number)
        return subset
    first_half = np.zeros(len(id), dtype=bool)
    first_half[order[: (len(id) + 1) // 2]] = True
    return np.where(first_half != (by == "reversed"), CONFIDENT, UNCONFIDENT)


def _num_levels(by: str, num_examples: int) -> int:
    """Return K of "quantiles:K", 0 for halves."""
    if by in HALVES:
        return 0
    quantiles = re.fullmatch(r"quantiles:(\d+)", by)
    if not quantiles:
        raise ValueError(f"by: expected {', '.join(HALVES)} or quantiles:K, got {by!r}")
    number = int(quantiles[1])
    if not 2 <= number <= num_examples // 2:
        raise ValueError(
            f"by: expected quantiles:K with K from 2 to half of {num_examples} examples, got {by!r}"
        )
    return number


def levels(partition: Partition) -> NDArray[np.int64]:
    """Return the level of every example, (S,), 1 the most confident: of two halves 1 or 2."""
    halves = {CONFIDENT: 1, UNCONFIDENT: 2}
    found = [
        halves[name] if name in halves else int(name.removeprefix(LEVEL.format("")))
        for name in partition.subset.tolist()
    ]
    return np.array(found, dtype=np.int64)


def subset_names(partition: Partition) -> list[str]:
    """Return the names of the partition's halves or levels, the most confident first."""
    found = [re.fullmatch(r"level (\d+)", name) for name in set(partition.subset.tolist())]
    last = max((int(name[1]) for name in found if name), default=0)
    if not last:
        return [CONFIDENT, UNCONFIDENT]
    return [LEVEL.format(number) for number in range(1, min(last, len(partition.id)) + 1)]


def subset_counts(partition: Partition) -> dict[str, int]:
    """Return how many examples each half or level has, the most confident first."""
    return {name: int((partition.subset == name).sum()) for name in subset_names(partition)}


def split(partition: Partition, by: str, seed: int = 0) -> Partition:
    """Return the partition with its halves or levels drawn anew, as `split_subsets` says.

    Raises:
        ValueError: as `split_subsets` does.
    """
    subset = split_subsets(partition.id, partition.confidence, by=by, seed=seed)
    return replace(partition, subset=subset)


def write_partition(path: Path, partition: Partition) -> None:
    """Write the partition as a parquet file, atomically, with a checksum on every page.

    Raises:
        OSError: the file cannot be written.
    """
    columns = [_column(getattr(partition, field.name), field.type) for field in _SCHEMA]
    table = pa.Table.from_arrays(columns, schema=_SCHEMA)
    atomic_write(path, lambda file: pq.write_table(table, file, write_page_checksum=True))


def read_partition(path: Path) -> Partition:
    """Read a partition that `write_partition` wrote.

    Raises:
        ValueError: the file is missing, cut off or damaged; its columns or their types are other
            than those written; or a value breaks what `Partition` promises.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: cannot be read as a partition: {error}") from error
    if table.column_names != _SCHEMA.names:
        raise ValueError(f"{path}: expected the columns {_SCHEMA.names}, got {table.column_names}")
    for field in _SCHEMA:
        column = table.column(field.name)
        if column.type != field.type:
            raise ValueError(
                f"{path}: column {field.name}: expected {field.type}, got {column.type}"
            )
        if column.null_count:
            raise ValueError(f"{path}: column {field.name}: {column.null_count} empty values")
    try:
        return _checked(Partition(**{name: _array(table, name) for name in _SCHEMA.names}))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def match(
    partition: Partition,
    ids: ArrayLike,  # (S,) integers
    content_hashes: Sequence[str] | NDArray[np.str_],  # (S,)
) -> Partition:
    """Return the partition in the order of a data set's examples.

    The data must be what was scored: the same ids with the same content, no more and no fewer.

    Raises:
        TypeError: as `from_scores` does for ids and hashes.
        ValueError: another number of ids than of hashes, a repeated id, or data that changed after
            scoring; the first example that differs is named.
    """
    wanted = _integers("ids", ids)
    hashes = _strings("content_hashes", content_hashes)
    if len(wanted) != len(hashes):
        raise ValueError(f"content_hashes: expected {len(wanted)} as in ids, got {len(hashes)}")
    _require_unique("ids", wanted)
    order = np.argsort(partition.id)
    rows = order[np.searchsorted(partition.id, wanted, sorter=order).clip(max=len(order) - 1)]
    known = partition.id[rows] == wanted
    if known.all():
        _refuse_another_order(partition, hashes, partition.content_hash[rows] == hashes)
    for i in np.flatnonzero(~known | (partition.content_hash[rows] != hashes))[:1]:
        scored = partition.content_hash[rows[i]][:12] if known[i] else "absent"
        raise _changed(int(wanted[i]), hashes[i][:12], scored)
    for row in np.flatnonzero(~np.isin(partition.id, wanted))[:1]:
        raise _changed(int(partition.id[row]), "absent", partition.content_hash[row][:12])
    return take(partition, rows)


def take(partition: Partition, rows: NDArray[np.int64]) -> Partition:
    """Return the examples in ``rows`` of the partition, in that order."""
    columns = {field.name: getattr(partition, field.name)[rows] for field in fields(Partition)}
    return Partition(**columns)


def partition_hash(partition: Partition) -> str:
    """Return SHA-256 over what training reads: ids, content, subsets and confidence in order."""
    columns = (partition.id, partition.content_hash, partition.subset, partition.confidence)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    lines = "\n".join(" ".join(map(str, row)) for row in rows)
    return hashlib.sha256(lines.encode("utf-8")).hexdigest()


def summary(partition: Partition) -> str:
    """Return a small plain-text table of the halves or levels, one line each.

    Median, mean and standard deviation are those of the confidence; the latter two are taken over
    its finite values. `infinite` counts the perplexities, of S * C, that are inf.
    """
    lines = [
        f"{'subset':<12}{'examples':>10}{'tokens':>13}{'median':>14}{'mean':>14}{'std':>14}"
        f"{'infinite':>10}"
    ]
    for name in subset_names(partition):
        rows = partition.subset == name
        confidence = partition.confidence[rows]
        finite = confidence[np.isfinite(confidence)]
        median = f"{np.median(confidence):.5g}" if len(confidence) else "-"
        with np.errstate(over="ignore"):  # squares of finite perplexities may pass 1e308
            moments = (finite.mean(), finite.std()) if len(finite) else ()
        mean, std = (f"{moment:.5g}" for moment in moments) if moments else ("-", "-")
        infinite = np.count_nonzero(np.isinf(partition.perplexity[rows]))
        lines.append(
            f"{name:<12}{len(confidence):>10}{partition.num_tokens[rows].sum():>13}"
            f"{median:>14}{mean:>14}{std:>14}{infinite:>10}"
        )
    lines.append(
        f"confidence = minus the mean perplexity of C = {partition.nll_sum.shape[1]} scorings"
    )
    return "\n".join(lines) + "\n"


def _integers(name: str, values: ArrayLike) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name}: expected shape (S,), got {array.shape}")
    fits = array.dtype.kind in "iu" and np.can_cast(array.dtype, np.int64)
    if array.size and not fits:
        raise TypeError(f"{name}: expected integers that fit int64, got {array.dtype}")
    return array.astype(np.int64)


def _strings(name: str, values: Sequence[str] | NDArray[np.str_]) -> NDArray[np.str_]:
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"{name}: expected strings, got {type(value).__name__}")
    return np.array(values, dtype=np.str_)


def _require_unique(name: str, ids: NDArray[np.int64]) -> None:
    ordered = np.sort(ids)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if repeated.size:
        raise ValueError(f"{name}: expected each id once, got {repeated[0]} more than once")


def _require(
    holds: NDArray[np.bool_], id: NDArray[np.int64], expected: str, values: NDArray[Any]
) -> None:
    for row in np.flatnonzero(~holds)[:1]:
        raise ValueError(f"{expected}, got {values[row]} for example {id[row]}")


def _refuse_another_order(
    partition: Partition, hashes: NDArray[np.str_], same: NDArray[np.bool_]
) -> None:
    """Refuse known ids of which some have the contents of others, and none is new."""
    if same.all() or not np.array_equal(np.sort(hashes), np.sort(partition.content_hash)):
        return
    raise ValueError(
        f"partition: the data were put into another order after scoring: {np.sum(~same)} of "
        f"{len(same)} examples have the content of others; give them in the order that was scored, "
        "or score them as they are now (SFTMixTrainer finds them in any order by the columns id "
        "and content_hash, which `tokenize_examples` makes)"
    )


def _changed(id: int, data_hash: str, scored_hash: str) -> ValueError:
    missing = "absent" in (data_hash, scored_hash)
    hint = "; with bad rows skipped, max_length, the tokenizer and --weight decide which are left"
    return ValueError(
        f"partition: the data changed after scoring: example {id} has the content hash {data_hash} "
        f"in the data and {scored_hash} in the partition; score the data again"
        f"{hint if missing else ''}"
    )


def _column(array: NDArray[Any], type: pa.DataType) -> pa.Array:
    if array.ndim == 1:
        return pa.array(array, type=type)
    rows, checkpoints = array.shape
    offsets = np.arange(rows + 1, dtype=np.int32) * np.int32(checkpoints)
    return pa.ListArray.from_arrays(offsets, pa.array(array.reshape(-1)), type=type)


def _array(table: pa.Table, name: str) -> NDArray[Any]:
    column = table.column(name).combine_chunks()
    type = _SCHEMA.field(name).type
    if pa.types.is_string(type):
        return np.array(column.to_pylist(), dtype=np.str_)
    if not pa.types.is_list(type):
        return np.asarray(column.to_numpy())
    values = column.flatten()
    lengths = set(column.value_lengths().unique().to_pylist())
    if len(lengths) > 1 or values.null_count:
        raise ValueError(f"column {name}: expected lists of one length without empty values")
    return np.asarray(values.to_numpy()).reshape(len(column), max(lengths, default=0))


def _checked(partition: Partition) -> Partition:
    ids = partition.id
    if len(ids) == 0:
        raise ValueError("expected at least one example, got none")
    _require_unique("column id", ids)
    _require(
        partition.num_tokens >= 1,
        ids,
        "column num_tokens: expected at least 1",
        partition.num_tokens,
    )
    _require(
        ~np.isnan(partition.confidence),
        ids,
        "column confidence: expected a number",
        partition.confidence,
    )
    _require(
        np.isin(partition.subset, subset_names(partition)),
        ids,
        f"column subset: expected {CONFIDENT!r} or {UNCONFIDENT!r}, or 'level 1' to 'level K'",
        partition.subset,
    )
    if partition.nll_sum.shape[1] < 1 or partition.nll_sum.shape != partition.perplexity.shape:
        raise ValueError(
            f"columns nll_sum and perplexity: expected one value per checkpoint in both, got "
            f"shapes {partition.nll_sum.shape} and {partition.perplexity.shape}"
        )
    return partition
