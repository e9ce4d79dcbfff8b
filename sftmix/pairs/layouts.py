"""Where the tokens of a batch lie.

- ``padded``: an example a row, padded on the right, with an attention mask.
- ``padding_free``: all examples one after another in one row.
- ``packed``: several rows of a common length, each holding whole examples one after another.
- ``sequential``: as padding-free, but the backbone reads the examples one by one (`one_by_one.py`),
  each as if it were alone: without padding, mask or positions.

Packed and padding-free rows have no attention mask: ``position_ids`` start again at 0 with each
example, from which transformers' attention masks tell where one ends. An architecture that does not
ask for them lets an example read the one before it; `check_layout` finds that out.

Legend: B examples, T tokens of all examples, R rows of L slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

LayoutName = Literal["padded", "padding_free", "packed", "sequential"]
LAYOUTS: tuple[LayoutName, ...] = get_args(LayoutName)


class Slots(NamedTuple):
    """Where each token lies in the R * L slots of a batch, and which of its example it is."""

    flat: Integers  # (T,)
    positions: Integers  # (T,)
    shape: tuple[int, int]  # R, L

    def fill(self, values: Integers | int, padding: int) -> Integers:
        """Return ``values`` (T,) in their slots (R, L), and ``padding`` in the others."""
        grid = np.full(self.shape, padding)
        grid.reshape(-1)[self.flat] = values
        return grid


@dataclass(frozen=True)
class Layout:
    """How a batch is laid out.

    ``row_length``: the most tokens of a packed row; by default, and wherever that takes no more
    slots, rows are as long as the longest example: attention costs less in short rows.

    Raises:
        ValueError: the name is none of `LAYOUTS`, or a length does not fit the layout.
    """

    name: str = "padded"
    pad_to_multiple_of: int = 1
    row_length: int | None = None

    def __post_init__(self) -> None:
        if self.name not in LAYOUTS:
            raise ValueError(f"layout: expected {', '.join(LAYOUTS)}; got {self.name!r}")
        if self.pad_to_multiple_of < 1:
            raise ValueError(
                f"pad_to_multiple_of: expected at least 1, got {self.pad_to_multiple_of}"
            )
        if self.row_length is None:
            return
        if self.name != "packed":
            raise ValueError(f"row_length: only layout='packed' has it, got {self.name!r}")
        if self.row_length < 1 or self.row_length % self.pad_to_multiple_of:
            raise ValueError(
                f"row_length: expected a positive multiple of pad_to_multiple_of "
                f"({self.pad_to_multiple_of}), got {self.row_length}"
            )

    def place(self, lengths: Integers) -> Slots:
        """Return the slots of examples of those lengths (B,).

        Raises:
            ValueError: an example is longer than ``row_length``.
        """
        longest = int(lengths.max())
        if self.name == "padded":
            rows, offsets = np.arange(len(lengths)), np.zeros_like(lengths)
        elif self.name in ("padding_free", "sequential"):
            rows, offsets = np.zeros_like(lengths), np.cumsum(lengths) - lengths
        else:
            rows, offsets = self.pack(lengths, longest)
        shape = int(rows.max()) + 1, self.rounded(int((offsets + lengths).max()))
        positions = spans(np.zeros_like(lengths), lengths)
        return Slots(spans(rows * shape[1] + offsets, lengths), positions, shape)

    def pack(self, lengths: Integers, longest: int) -> tuple[Integers, Integers]:
        """Return row and offset of each example, in short or long rows: the fewer slots."""
        limit = self.row_length or longest
        if longest > limit:
            raise ValueError(
                f"row_length: expected at least the longest example's {longest} tokens, got {limit}"
            )
        packings = [first_fit(lengths, self.rounded(longest))]
        if limit > self.rounded(longest):
            fitted = first_fit(lengths, limit)
            packings.append(level(lengths, int(fitted[0].max()) + 1, limit) or fitted)
        return min(packings, key=lambda packing: self.num_slots(lengths, *packing))

    def num_slots(self, lengths: Integers, rows: Integers, offsets: Integers) -> int:
        """Return the number of slots, R * L, of a packing."""
        return (int(rows.max()) + 1) * self.rounded(int((offsets + lengths).max()))

    def rounded(self, length: int) -> int:
        """Return the length, up to a multiple of ``pad_to_multiple_of``, but not for sequential."""
        if self.name == "sequential":
            return length
        return -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of

    def inputs(self, tokens: Integers, slots: Slots, pad_token_id: int) -> dict[str, Integers]:
        """Return what the model reads, (R, L): ``input_ids``, and the layout's mask or positions.

        Padding without a mask has position 0 throughout, which makes each slot a segment of its
        own, and no position is beyond the longest example's.
        """
        inputs = {"input_ids": slots.fill(tokens, pad_token_id)}
        if self.name == "padded":
            return {**inputs, "attention_mask": slots.fill(1, 0)}
        if self.name == "sequential":
            return inputs
        return {**inputs, "position_ids": slots.fill(slots.positions, 0)}


def spans(starts: Integers, lengths: Integers) -> Integers:
    """Return ``start, start + 1, ...`` for each start, ``length`` numbers of it, joined."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1])


def first_fit(lengths: Integers, room: int) -> tuple[Integers, Integers]:
    """Return row and offset of each example: longest first, in the first row with room."""

    def choose(used: list[int], length: int) -> int:
        fitting = (row for row, taken in enumerate(used) if taken + length <= room)
        row = next(fitting, len(used))
        if row == len(used):
            used.append(0)
        return row

    return in_rows(lengths, [], choose)


def level(lengths: Integers, num_rows: int, room: int) -> tuple[Integers, Integers] | None:
    """Return row and offset of each example: the longest first, each in the emptiest row.

    As few slots are left over at the end of rows as can be; None where a row has no room for it.
    """
    rows, offsets = in_rows(lengths, [0] * num_rows, lambda used, _: used.index(min(used)))
    return (rows, offsets) if (offsets + lengths).max() <= room else None


def in_rows(
    lengths: Integers, used: list[int], choose: Callable[[list[int], int], int]
) -> tuple[Integers, Integers]:
    """Return row and offset of each example; ``choose(tokens in rows, length)`` picks a row."""
    rows, offsets = np.zeros_like(lengths), np.zeros_like(lengths)
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        row = choose(used, length)
        rows[example], offsets[example] = row, used[row]
        used[row] += length
    return rows, offsets
