"""Several processes ("ranks"): what they agree on, and what one of them does for all.

Everything here uses the default process group, which `accelerate launch` and torchrun set up; in a
single process nothing is sent. A launcher ends all ranks when one of them fails.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset, Sampler
from transformers.training_args import ParallelMode

from sftmix.config import CHECKPOINTING
from sftmix.failures import USER_ERRORS
from sftmix.pairing import IGNORE_INDEX
from sftmix.runs import lock_run, open_run, remove_leftovers

Result = TypeVar("Result")


class RankError(RuntimeError):
    """Another rank failed, and says why itself."""


def num_ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if num_ranks() > 1 else 0


def is_main() -> bool:
    """Whether this process writes and prints."""
    return rank() == 0


def summed(tensor: Tensor) -> Tensor:
    """The sum over all ranks, as a new tensor."""
    total = tensor.clone()
    if num_ranks() > 1:
        dist.all_reduce(total)
    return total


def joined_ranks(tensor: Tensor) -> Tensor:
    """The tensors of all ranks, of one shape, one after another; without gradients."""
    if num_ranks() == 1:
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(num_ranks())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def gathered(value: Any) -> list[Any]:
    """A value of every rank, in order."""
    values = [value]
    if num_ranks() > 1:
        values *= num_ranks()
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What a user can mend ends all ranks: the first that failed raises its error.

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
    """What ``action`` returns, for all ranks; the main process alone runs it.

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
    """The folder of a run, opened, locked and swept by the main process alone.

    Raises:
        ValueError: see `open_run` and `lock_run`.
    """
    with contextlib.ExitStack() as lock:

        def claim() -> Path:
            run = open_run(output, resume=resume, name="output")
            lock.enter_context(lock_run(run, name="output"))
            remove_leftovers(run)
            return run

        yield on_main(claim)
    if num_ranks() > 1:
        dist.destroy_process_group()


def refuse_differences(values: Mapping[str, Any]) -> None:
    """Compare what decides a run's results with the other ranks'.

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
    """Hash of an array's values."""
    return hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()


def tokens_hash(examples: Any) -> str:
    """Hash of every example's ``input_ids`` and ``labels``, and of how many there are."""
    digest = hashlib.blake2b(str(len(examples)).encode(), digest_size=16)
    for name in ("input_ids", "labels"):
        for array in _arrays(examples, name):
            digest.update(array.astype(np.int64).tobytes())
    return digest.hexdigest()


def _arrays(examples: Any, name: str) -> Iterator[np.ndarray[Any, Any]]:
    """A column's values; of a data set in Arrow's format without making Python numbers."""
    if not isinstance(examples, datasets.Dataset):
        for row in range(len(examples)):
            yield np.asarray(examples[row][name])
    elif name in examples.column_names:
        for table in examples.with_format("arrow").iter(batch_size=4096):
            column = table[name].combine_chunks()
            yield column.flatten().to_numpy(zero_copy_only=False)
            yield column.value_lengths().to_numpy(zero_copy_only=False)


def weights_hash(model: nn.Module) -> str:
    """Hash of the names, shapes and first 64 values of all parameters that are not shards."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            continue
        first = parameter.detach().flatten()[:64].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {first.tolist()}".encode())
    return digest.hexdigest()


class FilledSampler(Sampler[Any]):
    """Another sampler's keys, filled up to whole batches of all ranks.

    The last batch of an epoch is not whole where the data do not divide. Fillers carry no loss, but
    a rank that has nothing else still makes its forward and backward, which the others wait for.
    """

    def __init__(self, sampler: Any, multiple: int, filler: Any) -> None:
        self.sampler, self.multiple, self.filler = sampler, multiple, filler

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.multiple) * self.multiple

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration draws."""
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        yield from self.sampler
        for _ in range(len(self) - len(self.sampler)):
            yield self.filler


class FilledExamples(Dataset[dict[str, Any]]):
    """Examples by their row, and a filler by None."""

    def __init__(self, examples: Sequence[dict[str, Any]]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, row: int | None) -> dict[str, Any]:
        return filler() if row is None else self.examples[row]


def filler() -> dict[str, Any]:
    """An example without loss, which `PairedCollator` takes because it says so."""
    return {"id": -1, "input_ids": [0, 0], "labels": [IGNORE_INDEX] * 2, "filler": True}


def check_processes(args: Any) -> None:
    """Refuse FSDP in a single process, before anything is loaded.

    Raises:
        ValueError: there is nothing to share the weights out to.
    """
    if getattr(args, "fsdp", None) and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise ValueError(
            "fsdp: expected several processes, got one; start them with `accelerate launch` or "
            "torchrun, or leave it out"
        )


def check_parallelism(args: Any, accelerator: Any, model: nn.Module) -> None:
    """Refuse ways to use several devices that the loss, the counts or the checkpoints do not know.

    Raises:
        ValueError: naming the option and the way out.
    """
    for name in ("split_batches", "dispatch_batches"):
        if getattr(args.accelerator_config, name):
            raise ValueError(f"accelerator_config: {name} parts pairs of examples; leave it off")
    if args.n_gpu > 1:
        raise ValueError("nn.DataParallel is not supported; start one process for each GPU")
    if args.save_on_each_node:
        raise ValueError("save_on_each_node: expected one folder that all nodes see; leave it off")
    if accelerator.distributed_type == DistributedType.MEGATRON_LM:
        raise ValueError("Megatron-LM is not supported; use DDP or FSDP2 (--fsdp)")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "deepspeed: not supported, its checkpoints hold pickles that run code; use FSDP2 "
            "(--fsdp)"
        )
    config = accelerator.parallelism_config
    for name, what in (("cp", "context"), ("sp", "sequence"), ("tp", "tensor")):
        if config is not None and getattr(config, f"{name}_size") > 1:
            raise ValueError(
                f"parallelism_config: {name}_size = {getattr(config, f'{name}_size')}, {what} "
                "parallelism, is not supported; use DDP or FSDP2 (--fsdp)"
            )
    _check_model(model)
    _check_reentrant(args, model)
    _check_fsdp(args, accelerator)


def loads_on_main_alone(accelerator: Any) -> bool:
    """Whether the other ranks' weights are not there before the model is sharded."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return plugin is not None and bool(plugin.cpu_ram_efficient_loading)


def sharded_weights(model: nn.Module) -> list[str]:
    """The names of the parameters of which this rank holds a part."""
    return [name for name, weight in model.named_parameters() if isinstance(weight, DTensor)]


def _check_model(model: nn.Module) -> None:
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise ValueError(
            "model: loaded with a tp_plan, whose head is sharded over the vocabulary: not "
            "supported; load the whole model and use FSDP2 (--fsdp)"
        )
    if sharded := sharded_weights(model):
        raise ValueError(
            f"model: {sharded[-1]} is a DTensor, sharded already (tensor parallelism, a head "
            "sharded over the vocabulary, fully_shard): pass the whole model, which --fsdp "
            "shards"
        )
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(devices) > 1:
        raise ValueError(
            "model: loaded with a device_map over several devices, pipeline parallelism, which is "
            "not supported; use FSDP2 (--fsdp)"
        )


def _check_reentrant(args: Any, model: nn.Module) -> None:
    options = getattr(args, f"{CHECKPOINTING}_kwargs", None)
    reentrant = args.checkpoints_activations and bool((options or {}).get("use_reentrant"))
    if reentrant and args.world_size > 1 and hasattr(model, "peft_config"):
        raise ValueError(
            f"{CHECKPOINTING}_kwargs: expected use_reentrant false, which is the default, for an "
            "adapter on several devices, got true: DDP would see its gradients twice"
        )


def _check_fsdp(args: Any, accelerator: Any) -> None:
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        if args.fsdp:
            raise ValueError(
                f"fsdp: accelerate does not shard on {args.device.type} in {args.world_size} "
                "processes started as these; on GPUs use `accelerate launch` or torchrun"
            )
        return
    if plugin.fsdp_version != 2:
        raise ValueError("fsdp_config: expected version 2, got 1, which is not supported")
    if plugin.state_dict_type.name != "FULL_STATE_DICT":
        raise ValueError(
            f"fsdp_config: expected state_dict_type FULL_STATE_DICT, got "
            f"{plugin.state_dict_type.name}, whose checkpoints hold pickles that run code"
        )
