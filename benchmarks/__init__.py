"""Benchmarks: `python -m benchmarks run SUITE` measures, `python -m benchmarks plot DIR` shows."""

import os

# PyTorch's profiler, which counts bytes here, would write lines about itself between the tables.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
