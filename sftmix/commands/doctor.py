"""Print what is installed and what would run (`sftmix doctor`)."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from sftmix.recipe.manifest import versions
from sftmix.runs.failures import OneMessage, printable
from sftmix_kernels import RowChunks
from sftmix_kernels.extension import build_info

# Packages by their names for import and for pip.
OPTIONAL = {
    **{name: name for name in ("triton", "peft", "trl", "lm_eval", "matplotlib", "tensorboard")},
    **{"sklearn": "scikit-learn", "wandb": "wandb", "bitsandbytes": "bitsandbytes"},
    **{"torchao": "torchao", "deepspeed": "deepspeed", "flash_attn": "flash-attn"},
}
# Environment variables that a run depends on; none of these holds a secret.
SETTINGS = (
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "ATEN_CPU_CAPABILITY", "PYTORCH_ALLOC_CONF"),
    *("HF_HOME", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"),
    *("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP", "NCCL_DEBUG", "TOKENIZERS_PARALLELISM"),
)


def main(words: Sequence[str]) -> None:
    """Run the command."""
    parser = OneMessage(prog="sftmix doctor", description="What is installed and what would run.")
    parser.parse_args(words)
    for title, rows in report().items():
        print(title)
        for name, value in rows.items():
            print(f"  {name:<16} {printable(value) or 'none'}")
    print("\nFor a bug report, add the command with --traceback and what it printed.")


def report() -> dict[str, dict[str, str]]:
    """Return sections of names and values, in the order they are printed."""
    optional = {name: installed(name, package) for name, package in OPTIONAL.items()}
    settings = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    built = build_info()
    extension = {"": "not built; losses run on PyTorch operations"} if built is None else built
    return {
        "versions": versions(),
        "optional": optional,
        "machine": {
            "system": platform.platform(),
            "python": sys.executable,
            "memory": f"{memory() / 2**30:.1f} GiB",
            "instructions": torch.backends.cpu.get_cpu_capability(),
        },
        "environment": settings or {"": "nothing that matters is set"},
        "device": device(),
        "loss kernels": loss_kernels(),
        "extension": extension,
    }


def installed(name: str, package: str) -> str:
    """Return a package's version, or "not installed"."""
    if importlib.util.find_spec(name) is None:
        return "not installed"
    try:
        return version(package)
    except PackageNotFoundError:
        return "installed"


def memory() -> int:
    """Return the host's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device() -> dict[str, str]:
    """Describe the device that training takes by default."""
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
    """Describe the schedule of `auto`, and its chunk for a vocabulary of 128,256 in bfloat16."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = torch.empty(0, dtype=torch.bfloat16, device=where)
    return {
        "schedule": f"row_chunks, {'Triton kernels' if hidden.is_cuda else 'PyTorch operations'}",
        "chunk": f"{RowChunks().rows_for(hidden, 128256)} rows at V = 128256, bfloat16",
    }
