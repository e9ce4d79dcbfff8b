"""The models, the ways to train them, the sizes of a run, and the names of its records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from benchmarks.bench_step import MODELS, QUICK, ModelSize
from benchmarks.records import OUR_SFTMIX, THEIR_NTP, THEIR_SFTMIX
from sftmix.training.config import CHECKPOINTING, LEAN_TILE_TOKENS

CPU, CUDA = "cpu", "cuda"
# What is measured, and how a measurement ends.
SUITE = "long_sequence"
STEP, LOSS, LARGEST, PREDICTION = "step", "loss", "largest", "prediction"
DONE, NO_MEMORY = "done", "out of memory"
# Of a `ModelSize`, what is not the model's.
OF_BATCH = ("batch", "length", "turns")


class Subject(NamedTuple):
    """A model with random weights, and which of its weights are trained."""

    says: str
    size: ModelSize
    dtype: Literal["float32", "bfloat16"]
    lora_rank: int | None  # None: all weights
    lengths: Mapping[str, tuple[int, ...]]  # by device

    @property
    def model_size(self) -> dict[str, Any]:
        """Return the fields of its size that the model's configuration takes."""
        return {n: v for n, v in self.size._asdict().items() if n not in OF_BATCH}


LONG = (16384, 32768, 65536, 131072)
SUBJECTS = {
    "toy": Subject(
        "Llama of 4 layers of 256, V 8,192, all weights trained",
        ModelSize(8192, 256, 688, 4, 4, 4, False, batch=2, length=0),
        "float32",
        None,
        {CPU: (1024, 2048, 4096, 8192, 16384), CUDA: LONG},
    ),
    "8B": Subject(
        "of Llama-3.1-8B's shape, LoRA of rank 16",
        MODELS[CUDA]["8B"],
        "bfloat16",
        16,
        {CPU: (), CUDA: LONG},
    ),
}
# A quick run only shows that all of it works.
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
        """Tell whether the trainer is this repository's."""
        return self.trainer == OUR_SFTMIX


CHECKPOINTED = {CHECKPOINTING: True}
SEQUENTIAL = {**CHECKPOINTED, "layout": "sequential"}
LEAN = {"memory": "lean"}
MODES = {
    "dense": Mode("dense SFTMix", THEIR_SFTMIX, {}),
    "dense-checkpointed": Mode(
        "dense SFTMix, activation checkpointing", THEIR_SFTMIX, CHECKPOINTED
    ),
    "dense-ntp": Mode("dense NTP", THEIR_NTP, {}),
    "dense-ntp-checkpointed": Mode("dense NTP, activation checkpointing", THEIR_NTP, CHECKPOINTED),
    "plain": Mode("sftmix", OUR_SFTMIX, {}),
    "checkpointed": Mode("sftmix, activation checkpointing", OUR_SFTMIX, CHECKPOINTED),
    "sequential": Mode("+ sequential", OUR_SFTMIX, SEQUENTIAL),
    "tiled": Mode("+ tiled MLP", OUR_SFTMIX, {**SEQUENTIAL, "mlp_tile_tokens": LEAN_TILE_TOKENS}),
    "lean": Mode("lean", OUR_SFTMIX, LEAN),
    "lean-ntp": Mode("lean, NTP alone", OUR_SFTMIX, {**LEAN, "method": "ntp"}),
    # On the CPU activations lie in the host's memory anyway.
    "lean-offload": Mode(
        "lean + activation_offload", OUR_SFTMIX, {**LEAN, "activation_offload": True}, (CUDA,)
    ),
    "lean-tiles": Mode(
        "lean + vocab_tiles", OUR_SFTMIX, {**LEAN, "loss_schedule": "vocab_tiles"}, (CUDA,)
    ),
}


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
    # On the CPU what may be allocated besides what is there before the model.
    limit_bytes: int | None = None

    @property
    def subject(self) -> Subject:
        """Return the model, or of a quick run a tiny one in its place."""
        return QUICK_SUBJECT if self.quick else SUBJECTS[self.model]
