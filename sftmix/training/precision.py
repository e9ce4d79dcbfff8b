"""Updates of half-precision weights: what rounding would lose of them is said before training.

A bfloat16 number has 8 significant bits (float16: 11), so that the numbers beside ``w`` are at
least ``|w| / 256`` away. An optimizer that writes ``w - d`` to the nearest one leaves ``w`` as it
was wherever ``d`` is below half of that, step after step. Three ways keep small updates: float32
weights, a sum of what was lost so far (Kahan's), and rounding up or down at random, which is right
on average.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from sftmix.runs.ranks import is_main, summed

logger = logging.getLogger(__name__)

WAYS_OUT = (
    "Ways out: --dtype float32 --bf16 true (float32 weights, bfloat16 products); --dtype bfloat16 "
    "--optim adamw_torch_8bit --optim_args bf16_stochastic_round=True (rounded at random, which is "
    "right on average; pip install torchao); or --lora_rank 16 (the model stays, its updates are "
    "float32). docs/memory.md has bytes and losses of each"
)


class HalfPrecisionUpdates(TrainerCallback):
    """Warns of updates that rounding would lose; keys random rounding by the seed and the step.

    The process' own random numbers would not do under DDP, where all ranks have to round alike:
    dropout and noise draw more of them on the rank whose sequences are longer.
    """

    def __init__(self) -> None:
        self.keyed = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log a warning where half-precision weights would be rounded to the nearest number."""
        message = lost_updates(kwargs["optimizer"])
        if message is not None and is_main():
            logger.warning("%s", message)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the step's own random numbers, where weights are rounded with them."""
        if rounds_at_random(kwargs["optimizer"]):
            devices = [args.device] if args.device.type == "cuda" else []
            self.keyed.enter_context(torch.random.fork_rng(devices))
            key = np.random.SeedSequence([args.seed, state.global_step])
            torch.manual_seed(int(key.generate_state(1)[0]))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the random numbers of before the step."""
        self.keyed.close()


def lost_updates(optimizer: Any) -> str | None:
    """Return in words what rounding to nearest would lose; None if small updates are kept.

    AdamW moves a weight by about the learning rate. The estimate counts the weights that stay as
    they are when the highest rate is added to them.
    """
    rounded = list(rounded_weights(optimizer))
    if not rounded:
        return None
    counts = torch.zeros(2, dtype=torch.int64, device=held(rounded[0][0]).device)
    for weight, rate in rounded:
        counts[0] += (held(weight) + rate == held(weight)).sum()
        counts[1] += held(weight).numel()
    same, total = summed(counts).tolist()
    dtypes = {str(weight.dtype).removeprefix("torch.") for weight, _ in rounded}
    return (
        f"dtype: {sum(weight.numel() for weight, _ in rounded):,} trained weights are "
        f"{' and '.join(sorted(dtypes))}, and {type(unwrapped(optimizer)).__name__} rounds them to "
        f"the nearest such number: {same / total:.1%} would stay as they are in a step of the "
        f"learning rate, {max(rate for _, rate in rounded):g}. {WAYS_OUT}"
    )


def rounded_weights(optimizer: Any) -> Iterator[tuple[Tensor, float]]:
    """Return half-precision weights that are rounded to nearest, and their highest rate."""
    for group in optimizer.param_groups:
        rate = float(group.get("initial_lr", group["lr"]))  # a schedule may begin at 0
        for weight in group["params"]:
            half = weight.is_floating_point() and torch.finfo(weight.dtype).bits == 16
            if half and not keeps_updates(optimizer, group, weight.dtype):
                yield weight.detach(), rate


def keeps_updates(optimizer: Any, group: Mapping[str, Any], dtype: torch.dtype) -> bool:
    """Return whether the optimizer keeps what is too small for the dtype, if only on average."""
    # optimi's optimizers, None where it is their own choice, and torchdistx' AdamW.
    summing = (group.get("kahan_sum", False), group.get("use_kahan_summation", False))
    return (
        any(one is not False for one in summing)
        or (rounds_at_random(optimizer) and dtype == torch.bfloat16)
        # Apex' and Transformer Engine's optimizers.
        or bool(getattr(unwrapped(optimizer), "master_weights", False))
    )


def rounds_at_random(optimizer: Any) -> bool:
    """Return whether it is an optimizer of torchao's that rounds bfloat16 weights at random."""
    return bool(getattr(unwrapped(optimizer), "bf16_stochastic_round", False))


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer inside accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)


def held(weight: Tensor) -> Tensor:
    """Return what this rank holds of a weight that may be sharded."""
    return weight.to_local() if isinstance(weight, DTensor) else weight
