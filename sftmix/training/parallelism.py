"""Ways to use several devices: those that the loss, the counts and the checkpoints know."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.training_args import ParallelMode

from sftmix.training.config import CHECKPOINTING
from sftmix_kernels.schedules import runs_triton


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


def check_device(args: Any) -> None:
    """Refuse the loss that only a GPU computes on anything else, before anything is loaded.

    Raises:
        ValueError: naming the option and the way out.
    """
    there = torch.empty(0, device=args.device)
    if args.loss_schedule == "vocab_tiles" and not runs_triton(there):
        raise ValueError(
            f"loss_schedule: vocab_tiles needs a CUDA device, and this run is on {args.device}; "
            "leave it out"
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
    _check_fsdp(args, accelerator, model)


def loads_on_main_alone(accelerator: Any) -> bool:
    """Return whether only the first rank has weights before the model is sharded."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return plugin is not None and bool(plugin.cpu_ram_efficient_loading)


def sharded_weights(model: nn.Module) -> list[str]:
    """Return the names of the parameters of which this rank holds a part."""
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


def _check_fsdp(args: Any, accelerator: Any, model: nn.Module) -> None:
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
    if any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8)):
        raise ValueError(
            "fsdp: not supported with weights that bitsandbytes has quantised; leave it out (DDP), "
            "or load the model without quantisation"
        )
