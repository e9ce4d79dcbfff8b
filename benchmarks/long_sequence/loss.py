"""Measure what the fused loss holds besides gradients and some numbers a row: a chunk of logits.

Legend: N rows of hidden, D hidden size, V vocabulary, w bytes of a number.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.inputs import MU, make_inputs
from sftmix.training.config import SFTMixConfig
from sftmix_kernels import RowChunks, fused_sftmix_loss
from sftmix_kernels.peaks import BOTH, Shape, chunk_bytes, cpu_chunk_bytes, kept_bytes
from tools.peak_memory import peak_extra_bytes

from .settings import MODES, Task

ROWS = (4096, 16384, 65536)
QUICK_ROWS = (64, 128, 256)


def loss_workspaces(task: Task) -> dict[str, Any]:
    """Return the workspace at growing numbers of rows, under the schedule of the task's mode."""
    options = SFTMixConfig(output_dir="", use_cpu=True, **MODES[task.mode].options)
    # The chunk of `row_chunks` is the same forward and backward.
    plan = options.loss_plan
    schedule = plan if isinstance(plan, RowChunks) else RowChunks()
    rows = QUICK_ROWS if task.quick else ROWS
    return {"workspaces": [loss_workspace(task, count, schedule) for count in rows]}


def loss_workspace(task: Task, rows: int, schedule: RowChunks) -> dict[str, Any]:
    """Return the peak of ``NTP + mu * Mixup`` minus what grows with N and the head's gradient.

    The op makes its gradients in its forward, so that nothing else runs here:

        workspace = peak - (4 V D + w N D + 60 N)
    """
    size, dtype = task.subject.size, getattr(torch, task.subject.dtype)
    x = make_inputs(rows // 2, size.hidden_size, size.vocab_size, dtype, task.device)
    pairs = torch.arange(rows, device=task.device).chunk(2)

    def forward() -> object:
        head = (x.hidden, x.weight, x.labels)
        return fused_sftmix_loss(*head, *pairs, x.lam, mu=MU, schedule=schedule)

    shape = Shape(rows, size.hidden_size, size.vocab_size, dtype.itemsize)
    peak = peak_extra_bytes(forward, task.device)
    kernels = task.device != "cpu"
    formula = chunk_bytes if kernels else cpu_chunk_bytes
    return {
        "rows": rows,
        "loss_peak_bytes": peak,
        "workspace_bytes": peak - kept_bytes(BOTH, schedule, shape, kernels),
        "formula_bytes": formula(BOTH, schedule, shape),
    }
