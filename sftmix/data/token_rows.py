"""Read examples that are tokens already.

Padding is cut off, masks become labels, and packed rows are refused. `input_ids` come with `labels`
(-100: not learnt), or with masks of 0 and 1 as TRL and others write them; with both, a token is
learnt if its label and all masks say so.
"""

from __future__ import annotations

from typing import Any

from sftmix.conventions import IGNORE_INDEX
from sftmix.data.messages import BadField, carries, kind

LOSS_MASKS = ("completion_mask", "assistant_masks", "loss_mask")
COLUMNS = ("input_ids", "labels", *LOSS_MASKS, "attention_mask", "position_ids", "token_type_ids")
# Columns of packed rows, and of rows made for another loss; one value stands for many rows.
_PACKED = "give every packed example as a row; --layout packed packs them again"
REFUSED = {
    "seq_lengths": _PACKED,
    "cu_seqlens": _PACKED,
    "seq_idx": _PACKED,
    "sequence_ids": _PACKED,
    "segment_ids": _PACKED,
    "shift_labels": "labels are not shifted here; leave 'shift_labels' out",
    "loss_weights": "tokens have no weights here, only labels; set labels to -100 where they are 0",
    "weights": "tokens have no weights here, only labels; set labels to -100 where they are 0",
}


def read_tokens(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Return the `input_ids` and `labels` to learn from.

    Raises:
        BadField: lists of another length or of other values, padding in the midst, a packed row,
            token types, or nothing to learn.
    """
    ids, lists = _lists(row)
    labels = lists.get("labels", ids)
    for name in LOSS_MASKS:
        if name in lists:
            mask = _zeros_and_ones(lists[name], name)
            labels = [
                label if keep else IGNORE_INDEX for label, keep in zip(labels, mask, strict=True)
            ]
    begin, end = _unpadded(lists.get("attention_mask"), len(ids))
    _check_positions(lists.get("position_ids"), begin, end)
    types = lists.get("token_type_ids", ())
    if any(types):
        raise BadField("'token_type_ids' are not all 0; no tokens but those of one text are read")
    for name, instead in REFUSED.items():
        if carries(row.get(name)):
            raise BadField(f"'{name}' is not read; {instead}")
    ids, labels = ids[begin:end], labels[begin:end]
    # The first token is never predicted, so a label there teaches nothing.
    if all(label == IGNORE_INDEX for label in labels[1:]):
        given = [repr(name) for name in ("labels", *LOSS_MASKS) if name in lists]
        if given != ["'labels'"]:
            raise BadField(f"nothing to learn: {' and '.join(given)} leave no token but the first")
        raise BadField(f"'labels' has nothing to learn: all are {IGNORE_INDEX} after the first")
    return ids, labels


def _lists(row: dict[str, Any]) -> tuple[list[int], dict[str, list[int]]]:
    """Return the ids and the other lists of the row, all of one length."""
    ids = _integers(row, "input_ids")
    lists = {name: _integers(row, name) for name in COLUMNS[1:] if row.get(name) is not None}
    if not lists.keys() & {"labels", *LOSS_MASKS}:
        _integers(row, "labels")  # says what is wrong with it
    for name, values in lists.items():
        if len(values) != len(ids):
            raise BadField(
                f"'input_ids' and '{name}' must be of one length, got {len(ids)} and {len(values)}"
            )
    return ids, lists


def _integers(row: dict[str, Any], name: str) -> list[int]:
    if name not in row:
        raise BadField(f"'{name}' is missing")
    value = row[name]
    if not isinstance(value, list):
        raise BadField(f"'{name}' must be a list of integers, got {kind(value)}")
    for i, item in enumerate(value):
        # A bool is an int to isinstance; in a mask it is welcome.
        if type(item) is not int and not (type(item) is bool and name.endswith(("mask", "masks"))):
            raise BadField(f"'{name}[{i}]' must be an integer, got {item!r:.60}")
    return value


def _zeros_and_ones(values: list[int], name: str, hint: str = "") -> list[int]:
    for i, value in enumerate(values):
        if value not in (0, 1):
            raise BadField(f"'{name}[{i}]' must be 0 or 1, got {value}{hint}")
    return values


def _unpadded(mask: list[int] | None, length: int) -> tuple[int, int]:
    """Return where the mask's ones begin and end: padding lies on the left and on the right."""
    if mask is None:
        return 0, length
    hint = f" (a packed row? {_PACKED})"
    _zeros_and_ones(mask, "attention_mask", hint)
    if not any(mask):
        raise BadField("'attention_mask' is 0 everywhere: the row is only padding")
    begin = mask.index(1)
    end = length - mask[::-1].index(1)
    if 0 in mask[begin:end]:
        hole = mask.index(0, begin)
        raise BadField(
            f"'attention_mask[{hole}]' is 0 between tokens that are read; expected 0 only on the "
            "left and on the right"
        )
    return begin, end


def _check_positions(positions: list[int] | None, begin: int, end: int) -> None:
    if positions is None:
        return
    for place, position in enumerate(positions[begin:end]):
        if position != place:
            again = "; it starts again, so several examples are packed in the row"
            found = f"got {position}{again if position == 0 else ''}"
            raise BadField(
                f"'position_ids[{begin + place}]' must be {place}, {found}; "
                f"{_PACKED if position == 0 else 'leave position_ids out'}"
            )
