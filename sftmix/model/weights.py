"""Loaded weights are those of the files, all of them, and numbers."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

SHOWN = 5
# As aminmax takes; what is smaller (float8) is made larger first.
COMPARABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def refuse_other_tensors(model: str, info: Mapping[str, Any]) -> None:
    """Refuse a model whose files lack tensors, hold others, or hold some of another shape.

    ``info``: what `from_pretrained` returns with ``output_loading_info``. Tied weights and what the
    model's class declares as ignorable are not among it.

    Raises:
        OSError: naming tensors and how many there are.
    """
    wrong = [
        f"{name} of shape {tuple(found)}, the model has {tuple(expected)}"
        for name, found, expected in sorted(info.get("mismatched_keys", ()))
    ]
    for kind, names in (
        ("are missing", sorted(info.get("missing_keys", ()))),
        ("are of another shape", wrong),
        ("are not the model's", sorted(info.get("unexpected_keys", ()))),
    ):
        if names:
            way_out = "give it weights that belong to its config, or save or download it anew"
            raise OSError(
                f"model: {len(names)} tensors {kind} in the weights of {model}: {_named(names)}; "
                f"{way_out}"
            )


def refuse_not_finite(model: str, module: nn.Module) -> None:
    """Refuse weights that are NaN or infinite: one look at each, 2.4 GB/s on one core.

    Raises:
        OSError: naming tensors and how many there are.
    """
    seen: set[int] = set()
    names = []
    for name, tensor in module.state_dict().items():
        # Tied weights are there twice. FSDP loads on the first rank of a machine alone.
        if tensor.is_meta or not tensor.numel() or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        if tensor.is_floating_point() and not _is_finite(tensor):
            names.append(name)
    if names:
        raise OSError(
            f"model: {len(names)} tensors of {model} hold NaN or infinities: {_named(names)}; "
            "the model is damaged: take one that was saved before"
        )


@contextlib.contextmanager
def without_message(logger: str, part: str) -> Iterator[None]:
    """Keep back what a library logs inside with ``part`` in it, where an error of ours says it."""

    def is_other(record: logging.LogRecord) -> bool:
        return part not in record.getMessage()

    named = logging.getLogger(logger)
    named.addFilter(is_other)
    try:
        yield
    finally:
        named.removeFilter(is_other)


def _is_finite(tensor: Tensor) -> bool:
    numbers = tensor if tensor.dtype in COMPARABLE else tensor.float()
    # Either of them is NaN where one number is; isfinite takes 20 times as long.
    smallest, largest = torch.aminmax(numbers)
    return bool(smallest.isfinite() and largest.isfinite())


def _named(names: Collection[str]) -> str:
    shown = list(names)[:SHOWN]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(shown) + more
