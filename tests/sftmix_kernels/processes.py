"""Ranks of a test: forks of one process that has imported torch, which takes 3 s of a core."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.multiprocessing as mp


def start_ranks(function: Callable[[int, str], None], folder: Path) -> None:
    """Call ``function(rank, folder)`` in two processes and wait for both."""
    mp.set_forkserver_preload(["torch.distributed", "sftmix_kernels", "pytest", "hypothesis"])
    mp.start_processes(function, (str(folder),), nprocs=2, start_method="forkserver")
