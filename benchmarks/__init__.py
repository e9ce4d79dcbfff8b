"""Benchmarks: `python -m benchmarks run SUITE` measures, `python -m benchmarks plot DIR` shows.

- `suites.py` names the benchmarks of each suite; `bench_NAME.py` times or weighs one of them, the
  losses of `providers.py` and `peers.py`, perplexity of `perplexity_providers.py`, training steps
  of `step_methods.py`.
- `result_file.py` writes records; `records.py` has their names and finds them again.
- `report.py`, `readme.py` and `targets.py` say what they mean, through `tables.py` and `plots.py`;
  `regression.py` compares two runs.
- `long_sequence/`, `study/` and `half_precision/` measure what takes processes and hours, and have
  command lines and results of their own.
"""

import os

# PyTorch's profiler, which counts bytes here, would write lines about itself between the tables.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
