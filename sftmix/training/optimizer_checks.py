"""Checks of the optimizer and of the learning-rate schedule, which are made for one weight.

What a library refuses late is so refused before anything is loaded, by the option's name.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import SchedulerType, Trainer, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from sftmix.runs.failures import Naming, near

# What transformers itself gives to a schedule.
OF_SCHEDULES = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
VARIABLE = inspect.Parameter.VAR_KEYWORD

# These update weights in backward, or train other weights than they evaluate.
IN_BACKWARD = "it updates weights in backward, before the loss and the gradients are looked at"
OTHER_WEIGHTS = "it trains other weights than those to evaluate and save"


def check_one_of(name: str, value: Any, known: Iterable[str]) -> None:
    """Refuse what is not among the known words, naming the nearest.

    Raises:
        ValueError: it is not.
    """
    known = list(known)
    if value not in known:
        hint = near(str(value), known)
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}{hint}")


def check_schedule(args: Any) -> None:
    """Make the learning-rate schedule for a weight of its own and take a step.

    Raises:
        ValueError: it has no such keyword, needs one more, or cannot be made from their values.
    """
    kwargs = dict(args.lr_scheduler_kwargs or {})
    name = args.lr_scheduler_type.value
    make: Any = TYPE_TO_SCHEDULER_FUNCTION[name]
    parameters = inspect.signature(make).parameters
    own = {key: one for key, one in parameters.items() if key not in OF_SCHEDULES}
    for key in kwargs:
        check_one_of("lr_scheduler_kwargs", key, own or ["none at all"])
    for key, one in own.items():
        if one.default is inspect.Parameter.empty and key not in kwargs and one.kind != VARIABLE:
            raise ValueError(
                f"lr_scheduler_type: {name} needs {key}: --lr_scheduler_kwargs '{{\"{key}\": ...}}'"
            )
    # Some end at a rate of their own, which is held against the one that they begin with.
    if name.startswith("cosine") and "min_lr" in kwargs and args.learning_rate == 0:
        raise ValueError(f"learning_rate: expected above 0 with min_lr, got {args.learning_rate}")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    with warnings.catch_warnings(), Naming("lr_scheduler_kwargs", name):
        warnings.simplefilter("ignore")
        schedule = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=10,
            num_training_steps=1_000_000,
            scheduler_specific_kwargs=kwargs,
        )
        optimizer.step()
        if name not in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
            schedule.step()


def check_optimizer(args: Any) -> None:
    """Make the optimizer for a weight of its own.

    Raises:
        ValueError: it cannot be made from ``optim_args``, would not heed them, or updates weights
            where they are not to be updated.
        ImportError: its package is not installed.
    """
    name = args.optim.value
    for kind, why in (("lomo", IN_BACKWARD), ("layerwise", IN_BACKWARD)):
        if name.endswith(kind):
            raise ValueError(f"optim: {name} is not supported: {why}")
    if name.startswith("schedule_free"):
        raise ValueError(f"optim: {name} is not supported: {OTHER_WEIGHTS}")
    low_rank = name.startswith(("galore", "apollo"))
    if args.optim_target_modules is not None and not low_rank:
        raise ValueError(f"optim_target_modules: {name} has none; expected --optim galore_adamw")
    if low_rank and args.optim_target_modules is None:
        raise ValueError(f"optim: {name} needs --optim_target_modules, such as all-linear")
    for pair in args.optim_args.split(",") if args.optim_args else ():
        _, sign, value = pair.partition("=")
        if not sign or value.strip().lower() in ("", "nan"):
            raise ValueError(f"optim_args: expected NAME=VALUE,NAME=VALUE, got {pair!r}")
    missing = {"optim": "You need to (have|install)|pip install"}
    with Naming("optim_args" if args.optim_args else "optim", among=missing):
        chosen = optimizer_of(args)
        if isinstance(chosen[0], type) and "params" not in chosen[1]:
            chosen[0]([nn.Parameter(torch.zeros(1))], **chosen[1])
    if args.optim_args and not low_rank:
        refuse_unheeded(args, chosen)


def optimizer_of(args: Any, optim_args: str | None = None) -> tuple[Any, dict[str, Any]]:
    """Return the class and keywords that transformers chooses for a linear model."""
    model: Any = nn.Sequential(nn.Linear(2, 2))
    given = args.optim_args, args.optim_target_modules
    if args.optim_target_modules is not None:
        args.optim_target_modules = "all-linear"
    args.optim_args = given[0] if optim_args is None else optim_args
    try:
        chosen: tuple[Any, dict[str, Any]] = Trainer.get_optimizer_cls_and_kwargs(args, model)
    finally:
        args.optim_args, args.optim_target_modules = given
    return chosen


def refuse_unheeded(args: Any, chosen: tuple[Any, dict[str, Any]]) -> None:
    """Refuse a name in ``optim_args`` whose value changes nothing, whichever it is."""
    pairs = dict(pair.split("=") for pair in args.optim_args.replace(" ", "").split(","))
    for name in pairs:
        for other in ("0.3", "7", "true", "false", "float16"):
            try:
                found = optimizer_of(args, f"{name}={other}")
            except (ValueError, TypeError, AttributeError):
                break
            if found[1] != optimizer_of(args, f"{name}_=0")[1]:
                break
        else:
            raise ValueError(f"optim_args: {args.optim.value} has no {name!r}; leave it out")
