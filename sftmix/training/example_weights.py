"""The column `weight` of a data set to train on, and what is refused of it."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from sftmix.data.weighting import WEIGHT, is_weight
from sftmix.methods import METHODS, method_of


def weights_of(dataset: Any, name: str = "train_dataset") -> NDArray[np.float32] | None:
    """Return the column `weight` of a data set, (S,), or None if its first row has none.

    The data set may be None or empty.

    Raises:
        ValueError: the value of a row is no weight; the message has its number.
    """
    if dataset is None or not len(dataset) or WEIGHT not in dataset[0]:
        return None
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom":
        values = dataset.with_format(None)[WEIGHT][:]
    else:
        values = [dataset[row].get(WEIGHT) for row in range(len(dataset))]
        # Numbers of NumPy and of torch.
        values = [value.item() if hasattr(value, "item") else value for value in values]
    for row, value in enumerate(values):
        if not is_weight(value):
            raise ValueError(
                f"{name}: row {row}: expected {WEIGHT} to be a finite number of at least 0, got "
                f"{value!r:.60}"
            )
    return np.array(values, dtype=np.float32)


def training_weights(dataset: Any, method: str) -> NDArray[np.float32] | None:
    """Return the weights of the examples to train on, (S,), or None if they have none.

    Raises:
        ValueError: as `weights_of`; all weights are 0; or the method does not use weights.
    """
    weights = weights_of(dataset)
    if weights is None:
        return None
    if not method_of(method).weighs:
        able = ", ".join(name for name, one in METHODS.items() if one.weighs)
        raise ValueError(
            f"{WEIGHT}: the loss of --method {method} has no weights of examples, expected one of "
            f"{able}; or leave the column out (--weight none)"
        )
    if not weights.any():
        raise ValueError(
            f"{WEIGHT}: expected a weight above 0, got 0 for all {len(weights)} examples; leave "
            f"the column out (--weight none)"
        )
    return weights
