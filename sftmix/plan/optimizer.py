"""Plan the optimizer's memory: run the real one on tensors without values, or use a formula.

An optimizer that cannot run on such tensors, or that may not be installed, is counted by what its
source allocates for each trained parameter of n numbers:

- `adamw_torch_8bit` (torchao's `AdamW8bit`): two states of n bytes, a float32 scale for each
  256 numbers and a table of 256 float32 each; below 4096 numbers, or where 256 does not divide n,
  two states of the parameter's dtype. Its step is compiled and leaves no temporary, rounding at
  random included. `adamw_torch_4bit`: half the bytes, and tables of 16.
- `adamw_bnb_8bit`, `adamw_8bit`, `paged_adamw_8bit` (bitsandbytes' `AdamW`): the same with
  any rest of 256, two tables for all, and float32 states below 4096 numbers and for embeddings,
  which `transformers.Trainer` asks for. Paged states may lie on the host; here they count.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import get_parameter_names

BLOCK, SMALLEST = 256, 4096

REAL = ("adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adagrad", "rmsprop")
TORCHAO = {"adamw_torch_8bit": 8, "adamw_torch_4bit": 4}  # bits of a state's number
FEW_BITS = (*TORCHAO, "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit")


class FewBits:
    """The states of an AdamW of few bits, held as tensors; its step allocates nothing."""

    def __init__(self, model: nn.Module, name: str) -> None:
        embeddings = {
            id(parameter)
            for module in model.modules()
            if isinstance(module, nn.Embedding)
            for parameter in module.parameters()
        }
        bits = TORCHAO.get(name)
        self.states = [
            bnb_states(p, id(p) in embeddings) if bits is None else ao_states(p, bits)
            for p in trained(model)
            for _ in range(2)
        ]

    def step(self) -> None:
        """Update nothing."""


def ao_states(parameter: Tensor, bits: int) -> list[Tensor]:
    """Return one of torchao's two states: codes, scales and their table."""
    count = parameter.numel()
    if count < SMALLEST or count % BLOCK:
        return [torch.empty_like(parameter)]
    codes = parameter.new_empty(count * bits // 8, dtype=torch.uint8)
    return [codes, parameter.new_empty(count // BLOCK + 2**bits, dtype=torch.float32)]


def bnb_states(parameter: Tensor, is_embedding: bool) -> list[Tensor]:
    """Return one of bitsandbytes' two states: codes and scales, or float32."""
    count = parameter.numel()
    if count < SMALLEST or is_embedding:
        return [torch.empty_like(parameter, dtype=torch.float32)]
    codes = torch.empty_like(parameter, dtype=torch.uint8)
    return [codes, parameter.new_empty(-(-count // BLOCK), dtype=torch.float32)]


def trained(model: nn.Module) -> Iterable[nn.Parameter]:
    """Return the parameters that get gradients."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def planned_optimizer(model: nn.Module, options: TrainingArguments, *, on_cpu: bool) -> Any:
    """Return the optimizer of `transformers.Trainer`, or one whose `step` allocates the same.

    Raises:
        ValueError: an optimizer that is none of those in this file.
    """
    name = str(getattr(options.optim, "value", options.optim))
    if name in FEW_BITS:
        return FewBits(model, name)
    if name not in REAL:
        known = ", ".join((*REAL, *FEW_BITS))
        raise ValueError(f"optim: expected one that the plan knows, {known}; got {name!r}")
    cls, settings = Trainer.get_optimizer_cls_and_kwargs(options)
    if not on_cpu and name != "adafactor" and not settings.get("fused"):
        # PyTorch chooses this on a GPU, and updates all parameters at once.
        settings["foreach"] = True
    decayed = set(get_parameter_names(model, [nn.LayerNorm]))
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[path in decayed and parameter.dim() > 1].append(parameter)
    return cls(
        [
            {"params": parameters, "weight_decay": options.weight_decay if decay else 0.0}
            for decay, parameters in groups.items()
        ],
        **settings,
    )
