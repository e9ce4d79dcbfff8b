"""Rows of tokens that another trainer prepared."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np

from sftmix.conventions import IGNORE_INDEX


def has_targets(prepared: datasets.Dataset) -> np.ndarray[Any, Any]:
    """Return which rows have a label after their first token, which nothing predicts: (S,)."""
    column = prepared.with_format("arrow")[:]["labels"].combine_chunks()
    lengths = np.asarray(column.value_lengths())
    rows = np.repeat(np.arange(len(lengths)), lengths)
    first = np.cumsum(lengths)[lengths > 0] - lengths[lengths > 0]
    learnt = np.asarray(column.flatten()) != IGNORE_INDEX
    learnt[first] = False
    counts: np.ndarray[Any, Any] = np.bincount(rows[learnt], minlength=len(lengths))
    return counts > 0


def named_rows(rows: np.ndarray[Any, Any]) -> str:
    """Return a few row numbers for an error message."""
    return ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
