"""The interpreter's bounds are real: each kernel with one of its sizes one too large is refused."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

from sftmix_kernels import (
    RowChunks,
    VocabTiles,
    fused_cross_entropy,
    fused_mixup_loss,
    fused_sftmix_loss,
)

from .bounds import Extent
from .budget import head_inputs, run
from .test_mixup_loss import NAMES

pytestmark = pytest.mark.interpret
R, D, V = 6, 16, 123
LABELS = torch.arange(R)
# Every row is in a pair: behind the last row of pairs there is nothing.
PAIRS = {"pair_c": torch.tensor([0, 1, 3]), "pair_u": torch.tensor([2, 5, 4]), "lam": 0.3}
ROWS, TILES, LIVE_TILES = RowChunks(), VocabTiles(), VocabTiles(filter_eps=1e-3)

# What each kernel masks its accesses by.
SIZES: dict[str, tuple[str, ...]] = {
    "soft_rows_kernel": ("width",),
    "pair_rows_kernel": ("width", "num_pairs"),
    "mixed_rows_kernel": ("hidden_size",),
    "soft_lse_kernel": ("num_rows", "hidden_size", "vocab_size"),
    "soft_combine_kernel": ("num_rows", "num_tiles"),
    "soft_gradient_kernel": ("num_rows", "hidden_size", "vocab_size"),
    "pair_lse_kernel": ("num_pairs", "hidden_size", "vocab_size"),
    "pair_combine_kernel": ("num_pairs", "num_tiles"),
    "pair_gradient_kernel": ("num_pairs", "hidden_size", "vocab_size"),
    "live_product_kernel": ("size_m", "size_n", "size_k"),
}


def call(kernel: str) -> None:
    """Run a loss, forward and backward, that launches a kernel."""
    schedule: Any = ROWS if "rows" in kernel else LIVE_TILES if "live" in kernel else TILES
    if kernel.startswith("pair"):
        run(
            lambda **t: fused_sftmix_loss(**t, labels=LABELS, schedule=schedule, **PAIRS).loss,
            head_inputs((R, D), V, torch.float16, bias=True),
        )
    elif kernel.startswith("mixed"):
        run(
            lambda **t: fused_mixup_loss(**t, labels_c=LABELS, labels_u=LABELS, lam=0.3),
            head_inputs((R, D), V, torch.float16, names=NAMES),
        )
    else:
        run(
            lambda **t: fused_cross_entropy(**t, labels=LABELS, schedule=schedule),
            head_inputs((R, D), V, torch.float16, bias=True),
        )


@pytest.mark.parametrize(
    ("kernel", "size"), [(kernel, size) for kernel, sizes in SIZES.items() for size in sizes]
)
def test_a_size_one_too_large_is_refused(
    kernel: str, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = import_module("triton.runtime.interpreter").GridExecutor
    launch, larger = executor.__call__, []

    def launch_larger(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.fn.__name__ == kernel:
            values = list(args)
            values[self.arg_names.index(size)] += 1
            args = tuple(values)
            larger.append(size)
        launch(self, *args, **kwargs)

    monkeypatch.setattr(executor, "__call__", launch_larger)
    with pytest.raises(Exception, match=f"{kernel}: a (load|store) outside of all tensors"):
        call(kernel)
    assert larger


def test_bytes_of_a_tensor_are_those_up_to_the_end_of_its_last_row() -> None:
    whole = torch.zeros(5, 8)
    start, size = whole.data_ptr(), whole.itemsize
    assert Extent.of(whole) == (start, start + 40 * size)
    assert Extent.of(whole[:3, :6]) == (start, start + 24 * size)
    assert Extent.of(whole[2:, 2:]) == (start + 18 * size, start + 40 * size)
    assert Extent.of(whole[1].expand(4, 8)) == (start + 8 * size, start + 16 * size)
    assert Extent.of(whole[0, 0]) == (start, start + size)
