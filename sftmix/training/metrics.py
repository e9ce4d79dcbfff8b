"""What training logs, summed between two log lines and kept in checkpoints.

A resumed run logs the same numbers as an unbroken one, because the sums of an unfinished window
travel with the checkpoint, and so does the time that they took.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from sftmix.runs.folders import write_json
from sftmix.runs.ranks import is_main, summed

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
        self.begin()

    def begin(self) -> None:
        """Forget everything: training starts now, at step 0."""
        self.begun = time.perf_counter()
        self.seconds = 0.0  # trained, over all the processes of a run that was resumed
        self.reset(0)

    def add(self, values: dict[str, Tensor | float]) -> None:
        """Add one micro-batch; fields that are not given stay as they are."""
        self.sums += torch.stack([self._scalar(values.get(field, 0.0)) for field in FIELDS])
        self.seconds = time.perf_counter() - self.begun

    def _scalar(self, value: Tensor | float) -> Tensor:
        # A number becomes a tensor by a fill: a copy from the host would wait for the device.
        if isinstance(value, Tensor):
            return value.detach().double()
        return torch.full_like(self.sums[0], value)

    def report(
        self,
        sums: Tensor,
        step: int,
        *,
        paired: bool,
        mixed: bool,
        ntp: bool = True,
        router: bool = False,
    ) -> dict[str, float]:
        """Return the log line of a window that ends at ``step``, from its sums over all ranks.

        The terms are those that the method has: ``ntp``, ``mixed``, and a ``router``'s.
        """
        total = dict(zip(FIELDS, sums.tolist(), strict=True))
        steps = step - self.first_step
        tokens = total["tokens_confident"] + total["tokens_unconfident"]
        logs = {"loss": total["loss"] / steps}
        if ntp:
            logs["ntp_loss"] = total["ntp_loss"] / steps
        if mixed:
            pairs = total["mixed_pairs"]
            logs["mixup_loss"] = total["mixup_loss"] / steps
            logs["truncated_fraction"] = 1 - 2 * pairs / tokens
            logs["lam_mean"] = total["lam"] / max(pairs, 1)
        if router:
            logs["router_loss"] = total["router_loss"] / steps
        if paired and ntp:
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
        """Put the sums over all ranks into a checkpoint; every rank has to call this."""
        state = {
            "first_step": self.first_step,
            "sums": summed(self.sums).tolist(),
            "window_seconds": time.perf_counter() - self.started,
            "seconds": self.seconds,
        }
        if is_main():
            write_json(folder / self.FILE, state)

    def load(self, folder: Path) -> None:
        """Load a checkpoint's sums, which the first rank takes."""
        state = json.loads((folder / self.FILE).read_text(encoding="utf-8"))
        self.first_step = state["first_step"]
        self.sums.copy_(torch.tensor(state["sums"], dtype=torch.float64) * is_main())
        self.started = time.perf_counter() - state["window_seconds"]
        self.seconds = state["seconds"]
        self.begun = time.perf_counter() - self.seconds


class RunTensorBoard(TensorBoardCallback):
    """TensorBoard in the run's own folder, the same one however often the run is resumed.

    What a killed process logged after its last checkpoint is logged again; readers are told to
    drop the first of both. ``TENSORBOARD_LOGGING_DIR``, which transformers reads, comes first.
    """

    def __init__(self, run: Path) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.logging_dir = self.logging_dir or str(run / "tensorboard")

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Open the writer at the step that training starts from."""
        if state.is_world_process_zero and self.tb_writer is None:
            step = state.global_step + 1
            self.tb_writer = self._SummaryWriter(self.logging_dir, purge_step=step)
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]


def peak_memory(device: torch.device) -> float:
    """Return the most bytes so far: allocated on the GPU, or resident in the process on a CPU."""
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
