"""See that the compiled extension is there for a device; build it in place where it is not."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.bench_perplexity import require_compiled
from benchmarks.measure import SuiteError, facts
from sftmix_kernels.extension import build_info

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Return exit status 0 where the extension is there in the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    device = parser.parse_args().device
    print(facts())
    try:
        require_compiled(device)
    except (SuiteError, ImportError) as why:
        print(f"building: {why}")
        environment = dict(os.environ)
        if device == "cuda":
            # For this chip alone: 6 s of nvcc in place of 60.
            major, minor = torch.cuda.get_device_capability()
            environment["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        return subprocess.run(build, cwd=ROOT, env=environment, check=False).returncode
    print(build_info())
    return 0


if __name__ == "__main__":
    sys.exit(main())
