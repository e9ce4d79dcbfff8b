"""The models, the ways to train them, and the sizes of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from benchmarks.step_methods import DENSE, DENSE_NTP, MODELS, OURS, QUICK, ModelSize
from sftmix.training.config import CHECKPOINTING, LEAN_TILE_TOKENS


class Subject(NamedTuple):
    """A model with random weights and what of it is trained."""

    says: str
    size: ModelSize
    dtype: Literal["float32", "bfloat16"]
    lora_rank: int | None  # None: all weights
    lengths: Mapping[str, tuple[int, ...]]  # by device


CPU, CUDA = "cpu", "cuda"
TOY = ModelSize(8192, 256, 688, 4, 4, 4, False, batch=2, length=0)
SUBJECTS = {
    "toy": Subject(
        "Llama of 4 layers of 256, V 8,192, all weights trained",
        TOY,
        "float32",
        None,
        {CPU: (1024, 2048, 4096, 8192, 16384), CUDA: (16384, 32768, 65536, 131072)},
    ),
    "1B": Subject(
        "of Llama-3.2-1B's shape, LoRA of rank 16",
        MODELS[CUDA]["1B"],
        "bfloat16",
        16,
        {CPU: (256, 512), CUDA: (16384, 32768, 65536, 131072)},
    ),
    "8B": Subject(
        "of Llama-3.1-8B's shape, LoRA of rank 16",
        MODELS[CUDA]["8B"],
        "bfloat16",
        16,
        {CPU: (), CUDA: (16384, 32768, 65536, 131072)},
    ),
}
# Whether all of it works.
QUICK_TOKENS = 64
QUICK_SUBJECT = Subject("tiny", QUICK, "float32", 4, {CPU: (QUICK_TOKENS,), CUDA: (QUICK_TOKENS,)})


class Mode(NamedTuple):
    """A way to train: whose trainer, and its options."""

    says: str
    trainer: str
    options: Mapping[str, Any]
    devices: tuple[str, ...] = (CPU, CUDA)

    @property
    def ours(self) -> bool:
        """Whether it is this repository's trainer."""
        return self.trainer == OURS


CHECKPOINTED = {CHECKPOINTING: True}
SEQUENTIAL = {**CHECKPOINTED, "layout": "sequential"}
LEAN = {"memory": "lean"}
MODES = {
    "dense": Mode("dense SFTMix", DENSE, {}),
    "dense-checkpointed": Mode("dense SFTMix, activation checkpointing", DENSE, CHECKPOINTED),
    "dense-ntp": Mode("dense NTP", DENSE_NTP, {}),
    "dense-ntp-checkpointed": Mode("dense NTP, activation checkpointing", DENSE_NTP, CHECKPOINTED),
    "plain": Mode("sftmix", OURS, {}),
    "checkpointed": Mode("sftmix, activation checkpointing", OURS, CHECKPOINTED),
    "sequential": Mode("+ sequential", OURS, SEQUENTIAL),
    "tiled": Mode("+ tiled MLP", OURS, {**SEQUENTIAL, "mlp_tile_tokens": LEAN_TILE_TOKENS}),
    "lean": Mode("lean", OURS, LEAN),
    "lean-ntp": Mode("lean, NTP alone", OURS, {**LEAN, "method": "ntp"}),
    # On the CPU activations lie in the host's memory anyway.
    "lean-offload": Mode(
        "lean + activation_offload", OURS, {**LEAN, "activation_offload": True}, (CUDA,)
    ),
    "lean-tiles": Mode(
        "lean + vocab_tiles", OURS, {**LEAN, "loss_schedule": "vocab_tiles"}, (CUDA,)
    ),
}


def modes_of(device: str) -> tuple[str, ...]:
    """Those that mean something there."""
    return tuple(name for name, mode in MODES.items() if device in mode.devices)


def subject_of(model: str, quick: bool) -> Subject:
    """The model, or with ``quick`` a tiny one in its place."""
    return QUICK_SUBJECT if quick else SUBJECTS[model]


@dataclass(frozen=True)
class Task:
    """One measurement, which a process of its own makes."""

    kind: str  # "step", or "loss" of several numbers of rows
    model: str
    device: str
    quick: bool
    threads: int
    length: int = 0  # tokens of each of the two sequences
    mode: str = "lean"
    # On the CPU what may be allocated besides what is there before the model; on CUDA in all.
    limit_bytes: int | None = None

    @property
    def subject(self) -> Subject:
        return subject_of(self.model, self.quick)
