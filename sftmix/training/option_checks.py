"""Checks of transformers' own options before anything is loaded: each message names the option.

`transformers` finds some wrong values late or never, and several options mean nothing to a trainer
that makes no logits, draws its own batches and updates only after it has looked at the loss.
`tests/sftmix/training/test_option_checks.py` sorts all fields of `TrainingArguments` into heeded,
refused and without effect, so that a field that a newer version brings is noticed.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import transformers.integrations as integrations
from accelerate.utils import GradientAccumulationPlugin
from transformers import SchedulerType
from transformers.debug_utils import DebugOption
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import FSDPOption, HubStrategy, IntervalStrategy, SaveStrategy
from transformers.training_args import OptimizerNames, trainer_log_levels

from sftmix.runs.failures import Naming
from sftmix.training.optimizer_checks import check_one_of, check_optimizer, check_schedule

logger = logging.getLogger(__name__)

# Options that this trainer's loss, sampler and evaluation would not heed: their defaults, and why.
NO_LOGITS = "evaluation makes no logits and predicts nothing"
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "train_sampling_strategy": (("random",), "pairs and order are drawn by --seed"),
    "data_seed": ((None,), "pairs and order are drawn by --seed"),
    "auto_find_batch_size": ((False,), "another batch size is another training"),
    "save_only_model": (
        (False,),
        "a run could not go on from such a checkpoint; save_total_limit=1 keeps one at a time",
    ),
    "average_tokens_across_devices": ((True,), "the loss is a mean over all devices"),
    "prediction_loss_only": ((False,), NO_LOGITS),
    "bf16_full_eval": ((False,), "evaluation computes as training does"),
    "fp16_full_eval": ((False,), "evaluation computes as training does"),
    "do_predict": ((False,), NO_LOGITS),
    "include_for_metrics": (([], None), NO_LOGITS),
    "batch_eval_metrics": ((False,), NO_LOGITS),
    "eval_do_concat_batches": ((True,), NO_LOGITS),
    "eval_use_gather_object": ((False,), NO_LOGITS),
    "label_names": ((None, ["labels"]), "the labels are those of `labels`"),
    "dataloader_in_order": ((True,), "batches out of order would not be those of the seed"),
    "deepspeed": ((None, ""), "its checkpoints hold pickles that run code; use FSDP2, --fsdp"),
    "use_liger_kernel": (
        (False,),
        "it replaces the forward that the loss goes through, which makes no logits either",
    ),
}
# Options that change no result here; who sets one is told so.
WITHOUT_EFFECT = {
    "per_device_eval_batch_size": "evaluation batches hold up to 8,192 tokens, on a CPU 1,024",
    "eval_accumulation_steps": NO_LOGITS,
}

# The least value of a number; None is let through.
AT_LEAST: dict[str, float] = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "adam_beta1": 0,
    "adam_beta2": 0,
    "adam_epsilon": 0,
    "max_grad_norm": 0,
    "warmup_steps": 0,
    "eval_delay": 0,
    "save_total_limit": 1,
    "seed": 0,
    "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": 1,
    "torch_empty_cache_steps": 1,
    "ddp_timeout": 1,
    "ddp_bucket_cap_mb": 1,
    "row_length": 2,
    "power_k": 0,
    "eaft_alpha": 0,
    "label_smoothing_factor": 0,
}
ABOVE: dict[str, float] = {"neftune_noise_alpha": 0, "gem_beta": 0}
BELOW: dict[str, float] = {
    **{"adam_beta1": 1, "adam_beta2": 1, "label_smoothing_factor": 1},
    "seed": 2**32,
    # The loss takes them in float32.
    **dict.fromkeys(("power_k", "eaft_alpha", "gem_beta", "neftune_noise_alpha"), 1e30),
    # Beyond what any machine does; larger numbers overflow in libraries, which name nothing.
    **{"per_device_train_batch_size": 2**24, "per_device_eval_batch_size": 2**24},
    **{"gradient_accumulation_steps": 2**31, "row_length": 2**31},
}
WHOLE = {
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("save_total_limit", "seed", "dataloader_num_workers", "dataloader_prefetch_factor"),
    *("max_steps", "row_length"),
}
FINITE = ("num_train_epochs", "max_steps")

# The frequency of something, and the option that has to be "steps" for it to count.
INTERVALS = {
    "logging_steps": "logging_strategy",
    "eval_steps": "eval_strategy",
    "save_steps": "save_strategy",
}

NAMES: dict[str, Collection[str]] = {
    "lr_scheduler_type": [one.value for one in SchedulerType],
    "optim": [one.value for one in OptimizerNames],
    "eval_strategy": [one.value for one in IntervalStrategy],
    "logging_strategy": [one.value for one in IntervalStrategy],
    "save_strategy": [one.value for one in SaveStrategy],
    "hub_strategy": [one.value for one in HubStrategy],
    "log_level": list(trainer_log_levels),
    "log_level_replica": list(trainer_log_levels),
    "include_num_input_tokens_seen": ("all", "non_padding", "no"),
    "dataloader_multiprocessing_context": ("fork", "spawn", "forkserver"),
    "ddp_backend": ("nccl", "gloo", "mpi", "xccl", "hccl", "cncl", "mccl", "hcxx"),
}
# Files or JSON, as transformers reads them.
MAPPINGS: tuple[str, ...] = (
    *("lr_scheduler_kwargs", "accelerator_config", "fsdp_config"),
    *("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
)
# What is read of a mapping, by how its option's name ends.
KEYS: dict[str, tuple[str, ...]] = {
    # What torch.utils.checkpoint takes, and transformers beside it.
    "checkpointing_kwargs": (
        *("use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug"),
        *("early_stop", "every_n_layers"),
    ),
    "accelerator_config": tuple(field.name for field in dataclasses.fields(AcceleratorConfig)),
    # FSDP2's, with or without fsdp_ before them, and what transformers itself puts beside them.
    "fsdp_config": (
        *("version", "reshard_after_forward", "cpu_offload", "auto_wrap_policy", "min_num_params"),
        *("transformer_layer_cls_to_wrap", "cpu_ram_efficient_loading", "state_dict_type"),
        *("activation_checkpointing", "xla", "xla_fsdp_v2", "xla_fsdp_grad_ckpt"),
    ),
}
# Keys of mappings that are true or false.
FLAGS = {
    *("use_reentrant", "preserve_rng_state", "debug", "early_stop", "split_batches"),
    *("dispatch_batches", "even_batches", "use_seedable_sampler", "non_blocking"),
    *("use_configured_state", "adjust_scheduler", "sync_with_dataloader", "sync_each_batch"),
}
YES_OR_NO = ("yes", "no", "on", "off")

# Each reporter's check in transformers, and what pip calls its package.
REPORTERS = {
    "azure_ml": ("azureml", "azureml-core"),
    "clearml": ("clearml", "clearml"),
    "codecarbon": ("codecarbon", "codecarbon"),
    "comet_ml": ("comet", "comet-ml"),
    "dagshub": ("dagshub", "dagshub mlflow"),
    "dvclive": ("dvclive", "dvclive"),
    "flyte": ("flytekit", "flytekit"),
    "mlflow": ("mlflow", "mlflow"),
    "neptune": ("neptune", "neptune"),
    "swanlab": ("swanlab", "swanlab"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "trackio": ("trackio", "trackio"),
    "wandb": ("wandb", "wandb"),
}


def check_options(args: Any) -> None:
    """Check what can be checked before transformers reads the options.

    Raises:
        ValueError: a value that is out of range, unknown, or would not be heeded.
        ImportError: a reporter's package is not installed.
    """
    check_numbers(args)
    check_names(args)
    for name, (allowed, why) in UNSUPPORTED.items():
        value = getattr(args, name, allowed[0])
        if value not in allowed:
            raise ValueError(f"{name}: not supported here, got {value!r}: {why}; leave it out")
    for name in MAPPINGS:
        check_mapping(name, getattr(args, name, None))
    check_loading(args)
    check_reporters(args.report_to)
    check_together(args)


def check_settled(args: Any, defaults: Mapping[str, Any]) -> None:
    """Check what can be told only once transformers has read the options, by name in ``defaults``.

    Raises:
        ValueError: fp16 on the CPU, or an optimizer or a schedule that cannot be made.
        ImportError: the optimizer's package is not installed.
    """
    if args.fp16 and args.device.type == "cpu":
        raise ValueError(
            "fp16: not supported on the CPU, where it would have no effect; use --bf16 true"
        )
    if args.torch_compile:
        check_compile(args)
    check_accumulation(args.accelerator_config.gradient_accumulation_kwargs or {})
    check_schedule(args)
    check_optimizer(args)
    for name, why in WITHOUT_EFFECT.items():
        if getattr(args, name, None) != defaults[name]:
            logger.warning("%s=%s has no effect: %s", name, getattr(args, name), why)
    if args.learning_rate == 0:
        logger.warning("learning_rate is 0: the weights stay as they are")


def check_numbers(args: Any) -> None:
    """Check that numbers are numbers, finite, whole where they count something, and in range."""
    for name in dict.fromkeys((*AT_LEAST, *ABOVE, *FINITE, *INTERVALS)):
        if getattr(args, name, None) is not None:
            check_number(name, getattr(args, name))
    steps = {name: getattr(args, name) for name, by in INTERVALS.items() if counts(args, by)}
    for name, value in {**steps, "warmup_steps": args.warmup_steps or None}.items():
        if value is not None and (value <= 0 or (value > 1 and value % 1)):
            raise ValueError(
                f"{name}: expected a whole number of steps, or a share of all below 1, got {value}"
            )


def counts(args: Any, strategy: str) -> bool:
    """Return whether something happens every so many steps."""
    return bool(getattr(args, strategy) == "steps")


def check_number(name: str, value: Any) -> None:
    """Check one number.

    Raises:
        ValueError: it is none, or is out of its range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise ValueError(f"{name}: expected a number, got {value!r}")
    # An infinite limit is how the norm is logged without being cut.
    unlimited = name == "max_grad_norm" and value == math.inf
    if not math.isfinite(value) and not unlimited:
        raise ValueError(f"{name}: expected a finite number, got {value}")
    if name in WHOLE and value != int(value):
        raise ValueError(f"{name}: expected a whole number, got {value}")
    below = BELOW.get(name)
    end = "" if below is None else f" and below {below}"
    is_high = below is not None and value >= below
    if name in ABOVE and (value <= ABOVE[name] or is_high):
        raise ValueError(f"{name}: expected a number above {ABOVE[name]}{end}, got {value}")
    least = AT_LEAST.get(name, -math.inf)
    if value < least or is_high:
        raise ValueError(f"{name}: expected at least {least}{end}, got {value}")


def check_names(args: Any) -> None:
    """Check the options that are one of several words."""
    for name, known in NAMES.items():
        value = getattr(args, name, None)
        # transformers has enumerations for some; True and False are old spellings of one.
        if value is not None and not isinstance(value, bool):
            check_one_of(name, getattr(value, "value", value), known)
    for name, kind in (("debug", DebugOption), ("fsdp", FSDPOption)):
        value = getattr(args, name)
        for word in value.split() if isinstance(value, str) else ():
            check_one_of(name, word, [one.value for one in kind])


def check_mapping(name: str, value: Any) -> None:
    """Check an option that is a mapping, JSON of one, or a file with one.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(value, str) and value:
        where = ""
        if not value.lstrip().startswith("{"):
            if name.endswith("kwargs") or not os.path.isfile(value):
                file = "" if name.endswith("kwargs") else " or the path of a file of it"
                raise ValueError(f"{name}: expected JSON such as {{...}}{file}, got {value!r}")
            where = f" in {value}"
            with open(value, encoding="utf-8") as file_of_it:
                value = file_of_it.read()
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{name}: expected JSON{where}, got {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{name}: expected a mapping{where}, got {value!r}")
    if isinstance(value, dict):
        known = next((keys for end, keys in KEYS.items() if name.endswith(end)), None)
        for key in value if known else ():
            check_one_of(name, key.removeprefix("fsdp_"), known or ())
        check_values(name, value)


def check_values(name: str, mapping: Mapping[str, Any]) -> None:
    """Check the values of a mapping, and of those in it.

    transformers takes any text but "false" for true, and YAML 1.1's "no" is text.

    Raises:
        ValueError: a number is NaN, or something else stands for true or false.
    """
    for key, value in mapping.items():
        if isinstance(value, dict):
            check_values(name, value)
        elif isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{name}: {key}: expected a number, got {value}")
        elif value is not None and not isinstance(value, bool):
            text = str(value).lower()
            if text in YES_OR_NO or (key in FLAGS and text not in ("true", "false")):
                raise ValueError(f"{name}: {key}: expected true or false, got {value!r}")


def check_loading(args: Any) -> None:
    """Check options of the data loader that need its processes."""
    if args.dataloader_num_workers == 0:
        for name in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
            if getattr(args, name):
                raise ValueError(
                    f"{name}: expected --dataloader_num_workers above 0 with it, "
                    f"got {getattr(args, name)} and 0 of them"
                )


def check_together(args: Any) -> None:
    """Check options that need another one.

    Raises:
        ValueError: the other one is not there.
    """
    by_metric = args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
    for name, given in (
        ("load_best_model_at_end", args.load_best_model_at_end),
        ("lr_scheduler_type", args.lr_scheduler_type if by_metric else None),
        ("save_strategy", args.save_strategy if args.save_strategy == "best" else None),
    ):
        if given and args.eval_strategy == "no":
            given = getattr(given, "value", given)
            raise ValueError(f"{name}: {given} needs --eval_strategy epoch or steps, got 'no'")
    if args.fp16 and args.bf16:
        raise ValueError("fp16: expected one of --fp16 and --bf16, got both")
    if args.fsdp_config and not args.fsdp:
        logger.warning("fsdp_config has no effect without --fsdp")


def check_reporters(names: Any) -> None:
    """Check that every reporter is known and installed.

    Raises:
        ValueError: one is unknown, or "none" or "all" is one of several.
        ImportError: one is not installed.
    """
    names = [names] if isinstance(names, str) else list(names or ())
    for name in names:
        if name in ("none", "all") and len(names) == 1:
            continue
        check_one_of("report_to", name, sorted(INTEGRATION_TO_CALLBACK))
        if name in REPORTERS:
            check, package = REPORTERS[name]
            available = getattr(integrations, f"is_{check}_available", None)
            if available is not None and not available():
                raise ImportError(f"report_to: {name} is not installed: pip install {package}")


def check_compile(args: Any) -> None:
    """Check the names that torch.compile is given."""
    # They take a second to import, and few runs compile.
    import torch._dynamo
    import torch._inductor

    backends = torch._dynamo.list_backends(exclude_tags=())
    check_one_of("torch_compile_backend", args.torch_compile_backend, backends)
    if args.torch_compile_mode is not None:
        modes = torch._inductor.list_mode_options()
        check_one_of("torch_compile_mode", args.torch_compile_mode, modes)


def check_accumulation(kwargs: Mapping[str, Any]) -> None:
    """Check what accelerate is told of accumulation.

    Raises:
        ValueError: it has no such keyword, or the number of steps is given there.
    """
    if "num_steps" in kwargs:
        raise ValueError(
            "accelerator_config: expected the number as --gradient_accumulation_steps, got "
            f"num_steps={kwargs['num_steps']} in gradient_accumulation_kwargs"
        )
    with Naming("accelerator_config"):
        GradientAccumulationPlugin(num_steps=1, **kwargs)
