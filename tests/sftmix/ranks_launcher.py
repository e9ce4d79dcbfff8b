"""Launch the ranks of `test_ranks`.

python -m tests.sftmix.ranks_launcher FOLDER WORDS does so as torchrun does, but forks them where
everything is imported: those of `sftmix WORDS`, of which one crashes, those of the same resumed,
and those of all cases.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sftmix import cli
from sftmix.runs.checkpoints import list_checkpoints
from sftmix.runs.ranks import rank
from tests.sftmix.crash import crashing
from tests.sftmix.ranks_worker import CASES, OF_RANKS, RANKS


def crash(folder: Path, words: list[str]) -> None:
    """Run the command of which one rank fails; the error goes into a file of the rank's own.

    The launcher tells of one rank, and that may be the other, whose partner is gone.
    """
    try:
        crashing(words)
    except Exception as error:
        (folder / f"crashed{os.environ['RANK']}.txt").write_text(repr(error))
        raise


def resuming(folder: Path, words: list[str]) -> None:
    """Resume the command; what it prints goes into a file."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = cli.main([*words, "--resume", "true"])
    found = {"code": code, "printed": printed.getvalue()}
    (folder / f"command{os.environ['RANK']}.json").write_text(json.dumps(found))


def run_rank(folder: Path) -> None:
    """All cases in one of the ranks; what it found goes into a file."""
    dist.init_process_group("gloo")
    found = {name: case(folder / name) for name, case in CASES.items()}
    found |= {name: case(folder / name) for name, case in OF_RANKS.items()}
    torch.save(found, folder / f"rank{rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


def launch(function: Callable[..., object], *arguments: Any) -> None:
    """Run a function in all ranks, by what torchrun runs; one that fails ends the others."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=RANKS,
        run_id=function.__name__,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    elastic_launch(config, function)(*arguments)


def main() -> None:
    """Launch the ranks of each: the command that crashes, the same resumed, and the cases."""
    folder, words = Path(sys.argv[1]), json.loads(sys.argv[2])
    # Each training begins with a full collection, which would go through (and copy) what all share.
    gc.collect()
    gc.freeze()
    ended = False
    try:
        launch(crash, folder, words)
    except ChildFailedError:
        ended = True
    checkpoints = list_checkpoints(Path(words[words.index("--output") + 1]))
    crashed = {"ended": ended, "checkpoints": [path.name for path in checkpoints]}
    (folder / "crashed.json").write_text(json.dumps(crashed))
    launch(resuming, folder, words)
    launch(run_rank, folder)


if __name__ == "__main__":
    main()
