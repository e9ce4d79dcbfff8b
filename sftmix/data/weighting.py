"""Weights of examples: how `--weight` chooses them, and what a weight may be.

    (not given)      the numbers of a column `weight`; a row without it weighs 1
    column:NAME      the numbers of another column, which every row must have
    confidence:A:B   linear in the rank of confidence in `--partition`, from A for the least
                     confident example to B for the most confident one (ours)
    none             no weights

A weight multiplies the loss of an example's tokens and not the number that the loss is divided by:
docs/methods.md has the formula.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftmix.data.messages import BadField

WEIGHT = "weight"  # the column that is read by default, and that trainers read
MOST = float(np.finfo(np.float32).max)  # batches hold weights in float32
EXPECTED = "expected column:NAME, confidence:A:B or none"


@dataclass(frozen=True)
class WeightColumn:
    """Weights that are a column of the data; where it is not `required`, a row may lack it."""

    name: str = WEIGHT
    required: bool = False

    def weight_of(self, row: Mapping[str, Any]) -> float:
        """Return the weight of a row; NaN if it has none.

        Raises:
            BadField: it lacks the required column, or the value is no weight.
        """
        if self.name not in row:
            if self.required:
                raise BadField(f"'{self.name}' is missing")
            return math.nan
        value = row[self.name]
        if not is_weight(value):
            raise BadField(
                f"'{self.name}' must be a weight, a finite number of at least 0, got {value!r:.60}"
            )
        return float(value)


@dataclass(frozen=True)
class ByConfidence:
    """Weights that are linear in the rank of confidence, from `least` to `most`."""

    least: float
    most: float

    def of(self, confidence: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return the weights of examples of that confidence, (S,).

        Equal confidences have one weight, that of their mean rank.

        >>> ByConfidence(0.5, 1.5).of(np.array([-3.0, -1.0, -9.0])).tolist()
        [1.0, 1.5, 0.5]
        """
        _, group, counts = np.unique(confidence, return_inverse=True, return_counts=True)
        rank = (np.cumsum(counts) - (counts + 1) / 2)[group]
        share = rank / max(len(confidence) - 1, 1)
        return (self.least + (self.most - self.least) * share).astype(np.float32)


def is_weight(value: Any) -> bool:
    """Tell whether a value is a number, finite in float32 and not negative."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MOST


def parse_weight(text: str | None) -> WeightColumn | ByConfidence | None:
    """Return the weights that `--weight` chooses; None means that there are none.

    Raises:
        ValueError: it is none of the forms of this module's docstring.
    """
    if text is None:
        return WeightColumn()
    if text == "none":
        return None
    kind, _, rest = text.partition(":")
    if kind == "column" and rest:
        return WeightColumn(rest, required=True)
    if kind == "confidence" and (found := re.fullmatch(r"([^:]+):([^:]+)", rest)):
        try:
            least, most = map(float, found.groups())
        except ValueError:
            raise ValueError(f"weight: {EXPECTED} with numbers A and B, got {text!r}") from None
        if not (is_weight(least) and is_weight(most)) or least == most == 0:
            raise ValueError(
                f"weight: expected finite numbers of at least 0, not both 0, got {text!r}"
            )
        return ByConfidence(least, most)
    raise ValueError(f"weight: {EXPECTED}, got {text!r}")


def described(weights: NDArray[Any]) -> str:
    """Return the range and mean of weights as text.

    >>> described(np.array([0.0, 0.5, 2.0], dtype=np.float32))
    '0 to 2, mean 0.8333; 1 of 3 weigh 0'
    """
    zeros = int((weights == 0).sum())
    text = f"{weights.min():g} to {weights.max():g}, mean {weights.mean(dtype=np.float64):.4g}"
    return text + (f"; {zeros:,} of {len(weights):,} weigh 0" if zeros else "")
