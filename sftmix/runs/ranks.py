"""Let several processes ("ranks") agree, and let one of them act for all.

All functions use the default process group, which `accelerate launch` and torchrun set up; a single
process sends nothing. A launcher ends all ranks when one of them fails.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sftmix.runs.failures import REFUSALS, REFUSED, USER_ERRORS, RankError, exit_code
from sftmix.runs.folders import discard, lock_run, open_run, remove_leftovers
from sftmix.runs.redaction import redacted

Result = TypeVar("Result")


def num_ranks() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, counted from 0."""
    return dist.get_rank() if num_ranks() > 1 else 0


def is_main() -> bool:
    """Tell whether this is the process that writes and prints."""
    return rank() == 0


def say(line: str) -> None:
    """Print a line without its secrets; only the main rank prints."""
    if is_main():
        print(redacted(line), flush=True)


def summed(tensor: Tensor) -> Tensor:
    """Return the sum over all ranks as a new tensor."""
    total = tensor.clone()
    if num_ranks() > 1:
        dist.all_reduce(total)
    return total


def joined_ranks(tensor: Tensor) -> Tensor:
    """Return the tensors of all ranks (of one shape), concatenated and without gradients."""
    if num_ranks() == 1:
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(num_ranks())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def gathered(value: Any) -> list[Any]:
    """Return the values of all ranks, in order."""
    values = [value]
    if num_ranks() > 1:
        values *= num_ranks()
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def together() -> Iterator[None]:
    """End all ranks if one of them fails with a user's error; the first such rank raises it.

    Nothing inside may wait for other ranks, which may have failed.

    Raises:
        RankError: on the other ranks.
    """
    failure = None
    try:
        yield
    except USER_ERRORS as error:
        failure = error
    told = gathered(None if failure is None else str(failure))
    first = next((number for number, text in enumerate(told) if text is not None), None)
    if failure is not None and first == rank():
        raise failure
    if first is not None:
        raise RankError(f"rank {first}: {told[first]}") from failure


def on_main(action: Callable[[], Result]) -> Result:
    """Run `action` on the main process and return its result on all ranks.

    Raises:
        RankError: it failed, on the ranks that did not run it.
    """
    results: list[Any] = [None]
    with together():
        if is_main():
            results = [action()]
    if num_ranks() > 1:
        dist.broadcast_object_list(results, src=0)
    result: Result = results[0]
    return result


@contextlib.contextmanager
def opened_run(output: str, *, resume: bool) -> Iterator[Path]:
    """Open, lock and clean the folder of a run on the main process; yield it on all ranks.

    What is refused before anything is written leaves no folder behind.

    Raises:
        ValueError: see `open_run` and `lock_run`.
    """
    made: list[Path] = []
    with contextlib.ExitStack() as lock:

        def claim() -> Path:
            made.extend(one for one in (Path(output), *Path(output).parents) if not one.exists())
            run = open_run(output, resume=resume, name="output")
            lock.enter_context(lock_run(run, name="output"))
            remove_leftovers(run)
            return run

        run = on_main(claim)
        try:
            yield run
        except REFUSALS as error:
            if exit_code(error) == REFUSED:
                discard(made)
            raise
    if num_ranks() > 1:
        dist.destroy_process_group()


def refuse_differences(values: Mapping[str, Any]) -> None:
    """Compare the values that decide a run's results with those of the other ranks.

    Raises:
        ValueError: something differs, naming it; `RankError` on all ranks but the first.
    """
    everyone = gathered({name: json.dumps(value, default=str) for name, value in values.items()})

    def compare() -> None:
        for number, theirs in enumerate(everyone):
            for name in sorted(everyone[0].keys() | theirs.keys()):
                if everyone[0].get(name) != theirs.get(name):
                    raise ValueError(
                        f"{name}: expected the same on all ranks, got {everyone[0].get(name)} on "
                        f"rank 0 and {theirs.get(name)} on rank {number}"
                    )

    on_main(compare)


def array_hash(array: np.ndarray[Any, Any]) -> str:
    """Return the hash of an array's values."""
    return hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()


def tokens_hash(examples: Any) -> str:
    """Return the hash of all examples' `input_ids` and `labels` and of their number."""
    digest = hashlib.blake2b(str(len(examples)).encode(), digest_size=16)
    for name in ("input_ids", "labels"):
        for array in _arrays(examples, name):
            digest.update(array.astype(np.int64).tobytes())
    return digest.hexdigest()


def _arrays(examples: Any, name: str) -> Iterator[np.ndarray[Any, Any]]:
    """Yield a column's values; read Arrow's memory without making Python numbers."""
    if not isinstance(examples, datasets.Dataset):
        for row in range(len(examples)):
            yield np.asarray(examples[row][name])
    elif name in examples.column_names:
        for table in examples.with_format("arrow").iter(batch_size=4096):
            column = table[name].combine_chunks()
            yield column.flatten().to_numpy(zero_copy_only=False)
            yield column.value_lengths().to_numpy(zero_copy_only=False)


def weights_hash(model: nn.Module) -> str:
    """Return the hash of the name, shape and first 64 values of every unsharded parameter."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            continue
        first = parameter.detach().flatten()[:64].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {first.tolist()}".encode())
    return digest.hexdigest()
