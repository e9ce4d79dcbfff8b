"""`sftmix doctor`: what is installed and what would run."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Sequence

import torch

from sftmix.manifest import versions
from sftmix_kernels import RowChunks
from sftmix_kernels.build import build_info

OPTIONAL = ("triton", "peft", "trl", "lm_eval", "matplotlib", "sklearn", "tensorboard")


def main(words: Sequence[str]) -> None:
    """Run the command."""
    if words:
        raise ValueError(f"doctor: expected no arguments, got {' '.join(words)}")
    for title, rows in report().items():
        print(title)
        for name, value in rows.items():
            print(f"  {name:<16} {value}")


def report() -> dict[str, dict[str, str]]:
    """Sections of names and values, in the order they are printed."""
    optional = {
        name: "installed" if importlib.util.find_spec(name) else "not installed"
        for name in OPTIONAL
    }
    built = build_info()
    extension = {"": "not built; perplexity runs on PyTorch operations"} if built is None else built
    return {
        "versions": versions(),
        "optional": optional,
        "device": device(),
        "loss kernels": loss_kernels(),
        "extension": extension,
    }


def device() -> dict[str, str]:
    """The device that training takes by default."""
    if not torch.cuda.is_available():
        return {
            "type": "cpu",
            "processor": platform.processor() or platform.machine(),
            "cores": str(os.cpu_count()),
            "threads": str(torch.get_num_threads()),
        }
    properties = torch.cuda.get_device_properties(0)
    return {
        "type": f"cuda, {torch.cuda.device_count()} visible",
        "name": properties.name,
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": str(torch.version.cuda),
    }


def loss_kernels() -> dict[str, str]:
    """The schedule that ``auto`` picks, and its chunk for a vocabulary of 128,256 in bfloat16."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = torch.empty(0, dtype=torch.bfloat16, device=where)
    return {
        "schedule": f"row_chunks, {'Triton kernels' if hidden.is_cuda else 'PyTorch operations'}",
        "chunk": f"{RowChunks().rows_for(hidden, 128256)} rows at V = 128256, bfloat16",
    }
