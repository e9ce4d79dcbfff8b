"""Measure what the fused loss holds besides gradients and some numbers a row: a chunk of logits.

Legend: N rows of hidden, D hidden size, V vocabulary, w bytes of a number.
"""

from __future__ import annotations

from typing import Any

import torch

from sftmix.training.config import SFTMixConfig
from sftmix_kernels import RowChunks, fused_sftmix_loss
from sftmix_kernels.peaks import BOTH, Shape, chunk_bytes, cpu_chunk_bytes, kept_bytes
from tools.peak_memory import peak_extra_bytes

from .settings import MODES, Task


def schedule_of(mode: str) -> RowChunks:
    """Return the mode's schedule; `row_chunks`, whose chunk is the same forward and backward."""
    options = SFTMixConfig(output_dir="", use_cpu=True, **MODES[mode].options)
    plan = options.loss_plan
    return plan if isinstance(plan, RowChunks) else RowChunks()


ROWS = (4096, 16384, 65536)
QUICK_ROWS = (64, 128, 256)


def loss_workspaces(task: Task) -> dict[str, Any]:
    """Return the workspace at growing numbers of rows."""
    rows = QUICK_ROWS if task.quick else ROWS
    return {"workspaces": [loss_workspace(task, count) for count in rows]}


def loss_workspace(task: Task, rows: int) -> dict[str, Any]:
    """Return the peak of ``NTP + mu * Mixup`` minus what grows with N and the head's gradient.

    The op makes its gradients in its forward, so that nothing else runs here:

        workspace = peak - (4 V D + w N D + 60 N)
    """
    size, dtype = task.subject.size, getattr(torch, task.subject.dtype)
    schedule = schedule_of(task.mode)
    generator = torch.Generator(task.device).manual_seed(0)
    make: dict[str, Any] = {"generator": generator, "device": task.device}
    hidden = torch.randn(rows, size.hidden_size, **make).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(size.vocab_size, size.hidden_size, **make)).to(dtype)
    labels = torch.randint(size.vocab_size, (rows,), **make)
    order = torch.arange(rows, device=task.device)
    lam = torch.full((rows // 2,), 0.3, device=task.device)
    weight.requires_grad_()

    def forward() -> object:
        head = (hidden, weight, labels)
        return fused_sftmix_loss(*head, *order.chunk(2), lam, mu=0.2, schedule=schedule)

    shape = Shape(rows, size.hidden_size, size.vocab_size, dtype.itemsize)
    peak = peak_extra_bytes(forward, task.device)
    formula = cpu_chunk_bytes if task.device == "cpu" else chunk_bytes
    return {
        "rows": rows,
        "loss_peak_bytes": peak,
        "workspace_bytes": peak - kept_bytes(BOTH, schedule, shape),
        "formula_bytes": formula(BOTH, schedule, shape),
    }
