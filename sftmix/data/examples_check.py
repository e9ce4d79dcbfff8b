"""Check tokenised examples against the model before its first forward pass.

A token beyond the model's embeddings, a label beyond its head or a sequence beyond its table of
positions raises an IndexError on the CPU and a device-side assert on a GPU, once its batch comes;
an example without a target gives a loss of NaN. Scanning a million examples of 500 tokens takes
about 7 s on one core in Arrow's memory (`datasets.Dataset`), 30 s behind a shuffle, and 80 s in
lists of Python numbers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from sftmix.conventions import IGNORE_INDEX
from sftmix.data.token_rows import COLUMNS as TOKEN_COLUMNS
from sftmix.data.token_rows import LOSS_MASKS, REFUSED

logger = logging.getLogger(__name__)

COLUMNS = ("input_ids", "labels")
# The collator reads no column beside them, so these may hold only the usual values.
BESIDE = TOKEN_COLUMNS[2:]
# Rows scanned together: some megabytes.
SCAN_ROWS = 10_000
# The last part of the name of a table that holds one row for each position: wpe, embed_positions,
# position_embeddings, positions_embed. Rotary and ALiBi positions are computed and have no end.
_POSITIONS = re.compile(r"wpe|(\w+_)?positions?(_\w+)?")
_BUFFERS = ("embed_positions", "pos_encoding")  # of GPT-J and CodeGen, and of CTRL

Integers = NDArray[np.int64]


class Limits(NamedTuple):
    """The ids, labels and tokens in a sequence that a model can read; None means no limit."""

    ids: int | None
    labels: int | None
    positions: int | None


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the largest id that the tokenizer can give; its vocabulary may have gaps."""
    return max(tokenizer.get_vocab().values())


def model_limits(model: Any) -> Limits:
    """Return the numbers of rows of a model's embeddings, head and table of positions."""
    return Limits(
        _rows(model.get_input_embeddings()),
        _rows(model.get_output_embeddings()),
        num_positions(model),
    )


def num_positions(model: nn.Module) -> int | None:
    """Return how many positions a model has a table for; None if it computes them."""
    tables = [
        module.num_embeddings - _first_position(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and _POSITIONS.fullmatch(name.rpartition(".")[2])
    ]
    tables += [
        buffer.shape[0]
        for name, buffer in model.named_buffers()
        if name.rpartition(".")[2] in _BUFFERS and buffer.dim() == 2
    ]
    return min(tables, default=None)


def positions_made_for(model: Any) -> int | None:
    """Return how many positions a model's config names; None where it names none."""
    config = getattr(model, "config", None)
    return getattr(config and config.get_text_config(), "max_position_embeddings", None)


def check_command(
    model: Any, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> None:
    """Refuse a tokenizer with ids that the model lacks, and a `max_length` beyond its positions.

    Raises:
        ValueError: naming the flags.
    """
    limits = model_limits(model)
    largest = largest_id(tokenizer)
    if limits.ids is not None and largest >= limits.ids:
        raise ValueError(
            f"model: expected a tokenizer with ids below {limits.ids:,}, the rows of the model's "
            f"embeddings, got {tokenizer.convert_ids_to_tokens(largest)!r} with {largest:,}; "
            "call model.resize_token_embeddings and save the model, or take its own tokenizer"
        )
    if max_length is not None and limits.positions is not None and max_length > limits.positions:
        raise ValueError(
            f"max_length: expected at most {limits.positions:,}, the positions that the model "
            f"has a table for, got {max_length:,}; give --max_length {limits.positions}"
        )


def require_rows(**data: Any) -> None:
    """Refuse data sets whose examples cannot be counted and looked up; a dict holds several.

    Raises:
        TypeError: a stream, or another object without a length or without rows; several data sets
            to train on.
    """
    for argument, dataset in data.items():
        if dataset is None:
            continue
        if argument == "train_dataset" and isinstance(dataset, dict):
            raise TypeError(
                f"{argument}: expected one data set, got {type(dataset).__name__} of "
                f"{', '.join(map(str, dataset))}; pass one of them"
            )
        for name, part in _parts(argument, dataset):
            streams = isinstance(part, datasets.IterableDataset | IterableDataset)
            if streams or not (hasattr(part, "__len__") and hasattr(part, "__getitem__")):
                raise TypeError(
                    f"{name}: expected a datasets.Dataset or a list, whose rows can be counted and "
                    f"looked up, got {type(part).__name__}; of a stream, "
                    "datasets.Dataset.from_list(list(stream.take(n))) makes one"
                )


def check_examples(model: Any, **data: Any) -> None:
    """Check every example of the data sets, which are named by their arguments.

    Raises:
        TypeError: as `require_rows`.
        ValueError: no rows, a missing column, ids that are no integers, or a row that the model
            cannot read or learn from: its number, the position in it and the value.
    """
    require_rows(**data)
    limits = model_limits(model)
    made_for = positions_made_for(model)
    for argument, dataset in data.items():
        if dataset is None:
            continue
        for name, part in _parts(argument, dataset):
            if len(part) == 0:
                raise ValueError(f"{name}: expected at least one row, got none")
            longest = 0
            for start, columns in _scanned(part, name, with_ids=True):
                _check_rows(name, start, columns, limits)
                _check_beside(name, start, columns)
                longest = max(longest, int(columns["input_ids"].lengths.max()))
            if made_for is not None and longest > made_for:
                logger.warning(
                    "%s: the longest example has %d tokens, and the model was made for %d "
                    "(max_position_embeddings); give a smaller max_length, or scale its positions",
                    *(name, longest, made_for),
                )


def check_beside(dataset: datasets.Dataset, name: str) -> None:
    """Check that no column beside tokens and labels says what is not read: packing, or a mask.

    Raises:
        ValueError: naming the column, and the row where it is a mask beside labels.
    """
    _refuse_columns(dataset.column_names, f"{name}: ")
    if "labels" in dataset.column_names:
        for start, columns in _scanned(dataset, name):
            _check_beside(name, start, columns)


class _Column(NamedTuple):
    """Lists of integers, one after another, and how many each row has."""

    values: Integers
    lengths: Integers

    def place(self, index: int, start: int) -> tuple[int, int]:
        """Return the example, counted from `start`, and the position in it of a value."""
        ends = np.cumsum(self.lengths)
        row = int(np.searchsorted(ends, index, side="right"))
        return start + row, index - int(ends[row] - self.lengths[row])


def _parts(argument: str, dataset: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(dataset, dict):
        yield from ((f"{argument}[{name!r}]", part) for name, part in dataset.items())
    else:
        yield argument, dataset


def _scanned(
    dataset: Any, name: str, *, with_ids: bool = False
) -> Iterator[tuple[int, dict[str, _Column]]]:
    """Yield blocks of examples as arrays, each with the number of its first example.

    Raises:
        ValueError: columns that are missing or refused, or, where asked for, ids.
    """
    # A transform, or another format, gives other rows than Arrow has.
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] is None:
        _require_columns(dataset.column_names, f"{name}: ")
        keys = [key for key in (*COLUMNS, *BESIDE) if key in dataset.column_names]
        if with_ids and "id" in dataset.column_names:
            _check_ids(name, 0, dataset["id"][:])
        tables = dataset.select_columns(keys).with_format("arrow").iter(SCAN_ROWS)
        for block, table in enumerate(tables):
            yield (
                block * SCAN_ROWS,
                {key: _arrow_column(table[key], name, key) for key in keys},
            )
        return
    named = False  # whether rows have ids
    for start in range(0, len(dataset), SCAN_ROWS):
        rows = [dataset[i] for i in range(start, min(start + SCAN_ROWS, len(dataset)))]
        for i, row in enumerate(rows):
            _require_columns(row, f"{name}: row {start + i}: ")
        keys = [key for key in BESIDE if any(row.get(key) is not None for row in rows)]
        for i, row in enumerate(rows):
            missing = [key for key in keys if row.get(key) is None]
            if missing:
                raise ValueError(
                    f"{name}: row {start + i}: expected {missing[0]}, which other rows have"
                )
        before, named = named, named or (with_ids and any("id" in row for row in rows))
        if named and start and not before:
            _check_ids(name, 0, [None])
        if named:
            _check_ids(name, start, [row.get("id") for row in rows])
        yield (
            start,
            {
                key: _column([row[key] for row in rows], start, name, key)
                for key in (*COLUMNS, *keys)
            },
        )


def _require_columns(columns: Any, place: str) -> None:
    missing = [name for name in COLUMNS if name not in columns]
    if missing:
        raise ValueError(
            f"{place}expected the columns input_ids and labels (-100: not learnt), got "
            f"{sorted(columns)} without {' and '.join(missing)}; `tokenize_examples` makes them "
            "from text, and where all tokens are learnt, labels are a copy of input_ids"
        )
    _refuse_columns(columns, place)


def _refuse_columns(columns: Any, place: str) -> None:
    for key, way in REFUSED.items():
        if key in columns:
            raise ValueError(f"{place}expected no column {key!r}, which is not read; {way}")


def _kinds(key: str) -> str:
    """Return the NumPy kinds that a column may have: integers, and bools in a mask."""
    return "iu" if key in COLUMNS else "iub"


def _arrow_column(column: Any, name: str, key: str) -> _Column:
    place = f"{name}: {key}"
    joined = column.combine_chunks()
    if not hasattr(joined, "value_lengths"):
        raise ValueError(f"{place}: expected lists of integers, got values of {joined.type}")
    if joined.null_count:
        raise ValueError(
            f"{place}: expected lists of integers, got null in {joined.null_count} rows"
        )
    lengths = np.asarray(joined.value_lengths()).astype(np.int64)
    values = np.asarray(joined.flatten())
    if values.dtype.kind not in _kinds(key) and len(values):
        raise ValueError(f"{place}: expected lists of integers, got values of {joined.type}")
    return _Column(values, lengths)


def _column(rows: Sequence[Any], start: int, name: str, key: str) -> _Column:
    arrays = [np.asarray(row) for row in rows]
    for i, array in enumerate(arrays):
        if array.ndim != 1 or (array.dtype.kind not in _kinds(key) and array.size):
            raise ValueError(
                f"{name}: row {start + i}: expected {key} as one list of integers, got "
                f"{rows[i]!r:.60}"
            )
    lengths = np.array([len(array) for array in arrays], dtype=np.int64)
    return _Column(np.concatenate(arrays).astype(np.int64), lengths)


def _check_ids(name: str, start: int, ids: Sequence[Any]) -> None:
    """Refuse ids that batches cannot carry; where one row has an id, all have."""
    for i, value in enumerate(ids):
        if type(value) is int:
            continue
        found = np.asarray(value)
        if found.ndim or found.dtype.kind not in "iu":
            raise ValueError(
                f"{name}: row {start + i}: expected id, where there is one, to be an integer, by "
                f"which messages name the row, got {value!r:.60}; leave the column out, or rename "
                "it"
            )


def _check_beside(name: str, start: int, columns: dict[str, _Column]) -> None:
    labels = columns["labels"]
    begins = np.cumsum(labels.lengths) - labels.lengths
    for key in BESIDE:
        if key not in columns:
            continue
        column = columns[key]
        if len(unlike := np.flatnonzero(column.lengths != labels.lengths)):
            row = start + int(unlike[0])
            raise ValueError(f"{name}: row {row}: expected one of {key} for each of input_ids")
        if key == "position_ids":
            usual = np.arange(len(column.values)) - np.repeat(begins, labels.lengths)
            wrong, way = column.values != usual, REFUSED["seq_lengths"]
        elif key in LOSS_MASKS:
            wrong = (column.values == 0) & (labels.values != IGNORE_INDEX)
            way = f"set the label to {IGNORE_INDEX} there"
        else:
            wrong = column.values != (key == "attention_mask")
            way = "cut padding off" if key == "attention_mask" else f"leave {key} out"
        if wrong.any():
            row, position = column.place(int(wrong.argmax()), start)
            raise ValueError(
                f"{name}: row {row}: {key}[{position}] is {int(column.values[wrong.argmax()])}, "
                f"which is not read, as only input_ids and labels are; {way}"
            )


def _check_rows(name: str, start: int, columns: dict[str, _Column], limits: Limits) -> None:
    ids, labels = columns["input_ids"], columns["labels"]
    if len(unlike := np.flatnonzero(ids.lengths != labels.lengths)):
        row = unlike[0]
        raise ValueError(
            f"{name}: row {start + row}: expected a label for each of {ids.lengths[row]} "
            f"input_ids, got {labels.lengths[row]}"
        )
    _check_values(name, "input_ids", ids, start, limits.ids)
    _check_values(name, "labels", labels, start, limits.labels)
    most = limits.positions
    if most is not None and len(long := np.flatnonzero(ids.lengths > most)):
        row = long[0]
        raise ValueError(
            f"{name}: row {start + row}: expected at most {most:,} tokens, the positions that the "
            f"model has a table for, got {ids.lengths[row]:,}; cut the rows at max_length={most}"
        )
    learnt = labels.values != IGNORE_INDEX
    begins = np.cumsum(labels.lengths) - labels.lengths
    learnt[begins[labels.lengths > 0]] = False  # the first token is never predicted
    sums = np.concatenate([[0], np.cumsum(learnt)])
    if len(empty := np.flatnonzero(sums[begins + labels.lengths] == sums[begins])):
        raise ValueError(
            f"{name}: row {start + empty[0]}: expected a label other than {IGNORE_INDEX} after "
            f"the first token, got none in {labels.lengths[empty[0]]} tokens; leave such rows out"
        )


def _check_values(name: str, key: str, column: _Column, start: int, most: int | None) -> None:
    values = column.values
    # The smallest and largest value are fast to find, and almost always enough.
    if not len(values) or (values.min() >= 0 and (most is None or values.max() < most)):
        return
    outside = (values < 0) & (values != (IGNORE_INDEX if key == "labels" else 0))
    if most is not None:
        outside |= values >= most
    if not outside.any():
        return
    index = int(outside.argmax())
    row, position = column.place(index, start)
    where = "embeddings" if key == "input_ids" else "head"
    allowed = (
        f"0 to {most - 1:,}, the model's {where}" if most is not None else "no negative number"
    )
    also = f", or {IGNORE_INDEX}" if key == "labels" else ""
    raise ValueError(
        f"{name}: row {row}: expected {key}[{position}] to be {allowed}{also}, got "
        f"{int(column.values[index])}; is the tokenizer the model's own?"
    )


def _rows(module: Any) -> int | None:
    """Return the number of rows of an embedding or head, also if ranks hold parts of it."""
    weight = getattr(module, "weight", None)
    # PEFT's copies of tied heads report another module's sizes; ZeRO-3 leaves a weight empty.
    if weight is not None and weight.dim() == 2 and weight.is_floating_point():
        return int(weight.shape[0])
    for name in ("num_embeddings", "out_features"):
        if isinstance(number := getattr(module, name, None), int):
            return number
    return None


def _first_position(table: nn.Embedding) -> int:
    """Return the row of a table that the first position reads, after an offset or padding's row."""
    offset = int(getattr(table, "offset", 0))
    return offset if table.padding_idx is None else offset + table.padding_idx + 1
