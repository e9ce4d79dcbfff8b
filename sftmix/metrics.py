"""What training logs, summed between two log lines and kept in checkpoints.

A resumed run logs the same numbers as an unbroken one, because the sums of an unfinished window
travel with the checkpoint.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from sftmix.runs import write_json

FIELDS = (
    "loss",  # the first four are sums over steps of a step's mean
    "ntp_loss",
    "mixup_loss",
    "router_loss",
    "nll_confident",  # the rest are sums over tokens or pairs
    "nll_unconfident",
    "tokens_confident",
    "tokens_unconfident",
    "mixed_pairs",
    "lam",
    "input_tokens",
)


class LossWindow:
    """Sums of one logging window on the device, in float64, in `FIELDS`' order."""

    FILE = "loss_window.json"

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(FIELDS), dtype=torch.float64, device=device)
        self.first_step = 0
        self.started = time.perf_counter()

    def add(self, values: dict[str, Tensor | float]) -> None:
        """Add one micro-batch; fields that are not given stay as they are."""
        self.sums += torch.stack([self._scalar(values.get(field, 0.0)) for field in FIELDS])

    def _scalar(self, value: Tensor | float) -> Tensor:
        # A number becomes a tensor by a fill: a copy from the host would wait for the device.
        if isinstance(value, Tensor):
            return value.detach().double()
        return torch.full_like(self.sums[0], value)

    def report(
        self, sums: Tensor, step: int, *, paired: bool, mixed: bool, router: bool = False
    ) -> dict[str, float]:
        """The log line of a window that ends at ``step``, from its sums over all ranks."""
        total = dict(zip(FIELDS, sums.tolist(), strict=True))
        steps = step - self.first_step
        tokens = total["tokens_confident"] + total["tokens_unconfident"]
        logs = {"loss": total["loss"] / steps, "ntp_loss": total["ntp_loss"] / steps}
        if mixed:
            pairs = total["mixed_pairs"]
            logs["mixup_loss"] = total["mixup_loss"] / steps
            logs["truncated_fraction"] = 1 - 2 * pairs / tokens
            logs["lam_mean"] = total["lam"] / max(pairs, 1)
        if router:
            logs["router_loss"] = total["router_loss"] / steps
        if paired:
            logs["ntp_loss_confident"] = total["nll_confident"] / total["tokens_confident"]
            logs["ntp_loss_unconfident"] = total["nll_unconfident"] / total["tokens_unconfident"]
        logs["tokens_per_second"] = total["input_tokens"] / (time.perf_counter() - self.started)
        logs["peak_memory_gib"] = peak_memory(sums.device) / 2**30
        return logs

    def reset(self, step: int) -> None:
        """Start the next window, after ``step``."""
        self.sums.zero_()
        self.first_step = step
        self.started = time.perf_counter()

    def save(self, folder: Path) -> None:
        """Put the sums into a checkpoint."""
        write_json(folder / self.FILE, {"first_step": self.first_step, "sums": self.sums.tolist()})

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint's sums."""
        state = json.loads((folder / self.FILE).read_text(encoding="utf-8"))
        self.first_step = state["first_step"]
        self.sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))


def peak_memory(device: torch.device) -> float:
    """Bytes at the highest: allocated on the GPU, resident in the process on the CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    # Not ru_maxrss where there is another: Linux lets a child begin with its parent's.
    status = Path("/proc/self/status")
    if status.exists():
        peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
        if peak:
            return float(peak[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
