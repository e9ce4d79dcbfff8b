"""The options of a run, and the sizes that it measures."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

TRAINED, RANDOM = "trained-like", "random"
# Hidden size and vocabulary of heads that people train, and a small one for two cores.
HEADS = {
    "small": (512, 32000),
    "SmolLM2-135M": (576, 49152),
    "Llama-3.2-1B": (2048, 128256),
    "Gemma-2-2B": (2304, 256000),
    "Mistral-7B": (4096, 32768),
    "Llama-3.1-8B": (4096, 128256),
    "Qwen2.5-14B": (5120, 152064),
}
# No multiple of any block.
QUICK = "tiny"
QUICK_HEAD = (64, 1003)


class Case(NamedTuple):
    """One head and one batch."""

    head: str
    rows: int  # N tokens
    inputs: str = TRAINED
    # Everyone takes part, forward too; else who never holds all logits, on NTP and NTP + Mixup.
    full: bool = True
    # Another process computes all the while on the same cores; dense PyTorch takes part too.
    busy: bool = False
    dtype: str | None = None  # of hidden states and weights, where it is not the device's
    # The first half of the rows are of prompts, which have no label.
    prompts: bool = False

    @property
    def sizes(self) -> tuple[int, int]:
        """Return hidden size and vocabulary."""
        return HEADS.get(self.head, QUICK_HEAD)

    @property
    def size(self) -> str:
        """Return head and rows in words."""
        return f"{self.head}, N = {self.rows}"

    @property
    def name(self) -> str:
        """Return head, rows, inputs, and what else is unusual, in words."""
        return ", ".join(
            [self.size, self.inputs]
            + ["beside a busy process"] * self.busy
            + [self.dtype] * (self.dtype is not None)
            + ["half of them prompts"] * self.prompts
        )


SMALL, SMOLLM2 = Case("small", 2048), Case("SmolLM2-135M", 256, full=False)
BUSY = SMALL._replace(full=False, busy=True)
PROMPTS = SMALL._replace(full=False, prompts=True)
# Few rows: without instructions for it, a product in bfloat16 takes up to 250 times as long.
HALF = Case("small", 128, full=False, dtype="bfloat16")
CPU_CASES = (SMALL, SMOLLM2, SMOLLM2._replace(inputs=RANDOM), BUSY, HALF)


@dataclass(frozen=True)
class Settings:
    """Options of the command line."""

    device: str = "cpu"
    quick: bool = False
    peers: bool = True
    grid: bool = True
    short: bool = False  # only what decides
    keep: bool = False  # add to a result file that is there
    seconds: float = 10**6  # no measurement is begun after these
    data: Path | None = None
    examples: int = 250
    model: Path | None = None
    threads: int = 2
    command: str = ""
    commit: str = ""
    begin: float = field(default_factory=time.monotonic, compare=False)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of hidden states and weights."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    @property
    def dtype_name(self) -> str:
        """Return the dtype as records have it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def repeats(self) -> int:
        """Return the rounds of a measurement."""
        if self.quick:
            return 3
        return 9 if self.device == "cpu" else 15

    @property
    def left(self) -> float:
        """Return the seconds that are left."""
        return self.seconds - (time.monotonic() - self.begin)

    @property
    def out_of_time(self) -> bool:
        """Tell whether the time is over; asked before every case, provider and round."""
        return self.left < 0

    def sizes(
        self, rows: int, hidden_size: int, vocab_size: int, dtype: str | None = None
    ) -> dict[str, Any]:
        """Return sizes and dtype as records have them."""
        names = {"rows": rows, "hidden_size": hidden_size, "vocab_size": vocab_size}
        return {**names, "dtype": dtype or self.dtype_name}

    def cases(self) -> list[Case]:
        """Return the headline, then the same with other inputs, then other heads."""
        if self.quick:
            return [Case(QUICK, 256)]
        if self.device == "cpu":
            return list(CPU_CASES)
        first = [Case("Llama-3.1-8B", 8192), Case("Llama-3.1-8B", 8192, RANDOM)]
        if self.short:
            return first[:1]
        heads = [name for name in HEADS if name not in ("small", "SmolLM2-135M")]
        grid = [Case(name, rows, full=False) for rows in (2048, 8192, 32768) for name in heads]
        return first + [case for case in grid if self.grid]

    def facts(self) -> dict[str, Any]:
        """Return what a reader of the results has to know."""
        return {
            "device": self.device,
            "quick": self.quick,
            "peers": self.peers,
            "grid": self.grid,
            "short": self.short,
            "dtype": self.dtype_name,
            "repeats": self.repeats,
        }
