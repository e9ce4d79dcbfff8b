"""Call the losses of others, each as ``loss(hidden, weight, labels)``: the mean over hard labels.

Each maker imports the package it needs; ImportError says what is missing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .records import TORCH
from .result_file import FAILURES

COMPILES = "compiles for long: not in this suite, and not in quick runs"
HardLabelLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, labels

LIGER, LIGER_ROWS = "Liger-Kernel", "Liger-Kernel, 4096 rows"
CCE, CCE_EXACT = "cut-cross-entropy", "cut-cross-entropy, no filter"
CCE_COMPILED = "cut-cross-entropy, torch_compile"
QUACK = "QuACK"


def torch_chunked(reduction: str = "mean") -> HardLabelLoss:
    """Return PyTorch's own loss in chunks of rows; its mean, or with "none" that of each row."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"torch {torch.__version__} has no LinearCrossEntropyOptions")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda h, w, y: F.linear_cross_entropy(h, w, y, reduction=reduction, options=options)


def liger(rows: int | None = None, sums: torch.dtype | None = None) -> HardLabelLoss:
    """Return it as it comes, or with chunks of at least ``rows`` rows and dW summed in ``sums``."""
    # Named here and not at the top: nothing of ours needs the package.
    functional = importlib.import_module("liger_kernel.transformers.functional")
    call = functional.liger_fused_linear_cross_entropy
    if rows is None:
        return lambda h, w, y: call(h, w, y)

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        # It rounds rows / ceil(V / (budget D)) up to a power of two.
        chunks = max(1, hidden.shape[0] // rows)
        budget = -(-weight.shape[0] // (chunks * hidden.shape[1]))
        return call(hidden, weight, labels, accum_dtype=sums, chunk_mem_const=budget)

    return loss


def cut_cross_entropy(impl: str = "cce", filter_eps: str | None = "high") -> HardLabelLoss:
    """Return it as it comes, with a filter of 2^-12 in bfloat16; exact with None; or in PyTorch."""
    call = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda h, w, y: call(h, w, y, filter_eps=filter_eps, impl=impl)


def quack() -> HardLabelLoss:
    """Return it as it comes."""
    call = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda h, w, y: call(h, w, y)


class Peer(NamedTuple):
    """The loss of another package, where it runs, and whether it skips what is small."""

    who: str
    make: Callable[[], HardLabelLoss]
    devices: tuple[str, ...] = ("cuda",)
    filters: bool = False
    compiles: bool = False  # with torch.compile, at its first calls


# Liger-Kernel's, QuACK's, and cut-cross-entropy's own loss are kernels for GPUs; the last has a
# PyTorch path beside them, which is dense PyTorch under `torch.compile`.
PEERS = (
    Peer(TORCH, torch_chunked, ("cpu", "cuda")),
    Peer(LIGER, liger),
    Peer(LIGER_ROWS, lambda: liger(4096)),
    Peer(f"{LIGER_ROWS}, float32 dW", lambda: liger(4096, torch.float32)),
    Peer(CCE, cut_cross_entropy, filters=True),
    Peer(CCE_EXACT, lambda: cut_cross_entropy(filter_eps=None)),
    Peer(CCE_COMPILED, lambda: cut_cross_entropy("torch_compile"), ("cpu",), compiles=True),
    Peer(QUACK, quack),
)


def find_peers(
    device: str, compiled: bool = True
) -> tuple[dict[Peer, HardLabelLoss], dict[str, str]]:
    """Return those that are installed and made for the device, and why one is left out."""
    found, left_out = {}, {}
    for peer in PEERS:
        if device not in peer.devices:
            left_out[peer.who] = f"made only for {' and '.join(peer.devices)}"
            continue
        if peer.compiles and not compiled:
            left_out[peer.who] = COMPILES
            continue
        try:
            found[peer] = peer.make()
        except FAILURES as reason:
            left_out[peer.who] = f"{type(reason).__name__}: {reason}"
    return found, left_out
