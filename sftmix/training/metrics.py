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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from sftmix.runs.folders import write_json
from sftmix.runs.ranks import is_main, summed
from sftmix.training.loss import BatchLoss
from sftmix.training.utilisation import Utilisation

HALVES = ("confident", "unconfident")
# The first four are sums over steps of a step's mean, the others over tokens, pairs or batches.
# Without a partition every token counts to the confident half.
FIELDS = (
    "loss",
    "ntp_loss",
    "mixup_loss",
    "router_loss",
    "nll_confident",
    "nll_unconfident",
    "tokens_confident",  # response tokens
    "tokens_unconfident",
    "mixed_pairs",
    "lam",
    "input_tokens",
    # A checkpoint of earlier versions ends here.
    "trained_confident",  # tokens with loss: response tokens whose example has a weight
    "trained_unconfident",
    "watched_confident",  # those of them whose entropy and most likely token the loss finds
    "watched_unconfident",
    "entropy_confident",
    "entropy_unconfident",
    "top_confident",  # tokens whose label is the most likely one
    "top_unconfident",
    "squared_lengths",  # of examples, in tokens
)
# Of a log line: name, sum and divisor by half. The whole of the first is a mean over steps.
MEANS = (
    ("ntp_loss", "nll", "trained"),
    ("entropy", "entropy", "watched"),
    ("mean_token_accuracy", "top", "watched"),
)
# Names of a log line that depend on the machine: of a resumed run they are not the same.
MEASURED = (
    *("tokens_per_second", "trained_tokens_per_second", "mfu", "peak_memory_gib"),
    *("eval_runtime", "eval_samples_per_second", "eval_steps_per_second"),
)


class LossWindow:
    """Sums of one logging window on the device, in float64, in `FIELDS`' order."""

    FILE = "loss_window.json"

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(FIELDS), dtype=torch.float64, device=device)
        self.nothing = torch.zeros_like(self.sums[0])
        self.begin()

    def begin(self) -> None:
        """Forget everything: training starts now, at step 0."""
        self.begun = time.perf_counter()
        self.seconds = 0.0  # trained, over all the processes of a run that was resumed
        self.reset(0, 0)

    def add(self, values: dict[str, Tensor | float]) -> None:
        """Add one micro-batch; fields that are not given stay as they are."""
        with torch.no_grad():
            # Some are float64, and so is what they are stacked to.
            self.sums += torch.stack([self._scalar(values.get(field)) for field in FIELDS])
        self.seconds = time.perf_counter() - self.begun

    def _scalar(self, value: Tensor | float | None) -> Tensor:
        # A number becomes a tensor by a fill: a copy from the host would wait for the device.
        if isinstance(value, Tensor):
            return value
        return self.nothing if value is None else torch.full_like(self.nothing, value)

    def report(
        self,
        sums: Tensor,
        step: int,
        *,
        paired: bool,
        mixed: bool,
        ntp: bool = True,
        router: bool = False,
        utilisation: Utilisation | None = None,
    ) -> dict[str, float]:
        """Return the log line of a window that ends at ``step``, from its sums over all ranks.

        The terms are those that the method has: ``ntp``, ``mixed``, and a ``router``'s.
        """
        total = dict(zip(FIELDS, sums.tolist(), strict=True))
        steps, pairs = step - self.first_step, total["mixed_pairs"]
        logs = {"loss": total["loss"] / steps}
        if ntp:
            logs["ntp_loss"] = total["ntp_loss"] / steps
        if mixed:
            tokens = total["tokens_confident"] + total["tokens_unconfident"]
            logs["mixup_loss"] = total["mixup_loss"] / steps
            logs["unmixed_fraction"] = 1 - 2 * pairs / tokens
            logs["lam_mean"] = total["lam"] / max(pairs, 1)
        if router:
            logs["router_loss"] = total["router_loss"] / steps
        if ntp:
            logs |= means_of_tokens(total, paired=paired)
        trained = total["trained_confident"] + total["trained_unconfident"] if ntp else 2 * pairs
        seconds = time.perf_counter() - self.started
        logs["num_tokens"] = self.num_tokens + int(total["input_tokens"])
        logs["tokens_per_second"] = total["input_tokens"] / seconds
        logs["trained_tokens_per_second"] = trained / seconds
        if utilisation is not None:
            work = (total["input_tokens"], trained if ntp else pairs, total["squared_lengths"])
            logs["mfu"] = utilisation.share(*work, seconds)
        logs["peak_memory_gib"] = peak_memory(sums.device) / 2**30
        return logs

    def reset(self, step: int, num_tokens: int) -> None:
        """Start the next window, after ``step`` and so many input tokens of the whole run."""
        self.sums.zero_()
        self.first_step, self.num_tokens = step, num_tokens
        self.started = time.perf_counter()

    def save(self, folder: Path) -> None:
        """Put the sums over all ranks into a checkpoint; every rank has to call this."""
        state = {
            "first_step": self.first_step,
            "num_tokens": self.num_tokens,
            "sums": summed(self.sums).tolist(),
            "window_seconds": time.perf_counter() - self.started,
            "seconds": self.seconds,
        }
        if is_main():
            write_json(folder / self.FILE, state)

    def load(self, folder: Path) -> None:
        """Load a checkpoint's sums, which the first rank takes.

        One of an earlier version lacks the last fields: all its response tokens have loss, and
        entropy, accuracy and ``num_tokens`` are of the tokens that follow.
        """
        state = json.loads((folder / self.FILE).read_text(encoding="utf-8"))
        total = dict(zip(FIELDS, state["sums"], strict=False))
        earlier = {f"trained_{half}": total[f"tokens_{half}"] for half in HALVES}
        sums = [({**earlier, **total}).get(field, 0.0) for field in FIELDS]
        self.first_step, self.num_tokens = state["first_step"], state.get("num_tokens", 0)
        self.sums.copy_(torch.tensor(sums, dtype=torch.float64) * is_main())
        self.started = time.perf_counter() - state["window_seconds"]
        self.seconds = state["seconds"]
        self.begun = time.perf_counter() - self.seconds


def means_of_tokens(total: Mapping[str, float], *, paired: bool) -> dict[str, float]:
    """Return the means over a window's tokens with loss, by half too where there are halves.

    What no token has is left out: entropy where the loss does not find it, or a half whose examples
    all have weight 0.
    """
    found: dict[str, float] = {}
    for name, field, counted in MEANS:
        sums = {half: (total[f"{field}_{half}"], total[f"{counted}_{half}"]) for half in HALVES}
        whole = {name: tuple(map(sum, zip(*sums.values(), strict=True)))}
        of_halves = {f"{name}_{half}": sums[half] for half in HALVES if paired}
        means = of_halves if name == "ntp_loss" else {**whole, **of_halves}
        found |= {key: value / number for key, (value, number) in means.items() if number}
    return found


def micro_batch(
    inputs: Mapping[str, Tensor], loss: BatchLoss, *, paired: bool
) -> dict[str, Tensor | float]:
    """Return what a micro-batch adds to a `LossWindow`, none of which the host waits for."""
    owner = inputs["owner"]  # (N,)
    unconfident = owner % 2 == 1 if paired else torch.zeros_like(owner, dtype=torch.bool)
    halves = torch.stack([~unconfident, unconfident])  # (2, N)
    trained = torch.ones_like(unconfident)
    if "weight" in inputs:
        trained = (inputs["weight"] != 0)[owner]
    of_tokens = {
        "trained": trained,
        "watched": None if loss.entropy is None else trained,
        "nll": loss.row_ntp,
        "entropy": loss.entropy,
        "top": loss.is_top,
    }
    found = {name: numbers for name, numbers in of_tokens.items() if numbers is not None}
    table = torch.stack([numbers.double() for numbers in found.values()])  # (F, N)
    sums = (table.unsqueeze(1) * (halves & trained)).sum(-1)
    sums = torch.cat([sums, halves.sum(-1).unsqueeze(0)])
    names = [f"{name}_{half}" for name in (*found, "tokens") for half in HALVES]
    values: dict[str, Tensor | float] = dict(zip(names, sums.flatten().unbind(), strict=True))
    terms = {"loss": loss.loss, "ntp_loss": loss.ntp, "mixup_loss": loss.mixup}
    terms["router_loss"] = loss.router
    values |= {name: term for name, term in terms.items() if term is not None}
    values["input_tokens"] = inputs["lengths"].sum()
    values["squared_lengths"] = inputs["lengths"].square().sum()
    if "pair_c" in inputs:
        values["mixed_pairs"] = float(inputs["pair_c"].numel())
        values["lam"] = inputs["lam"].sum()
    return values


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
