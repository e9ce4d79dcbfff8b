"""Benchmarks: `python -m benchmarks run SUITE` measures, `python -m benchmarks plot DIR` shows.

- `suites.py` names the benchmarks of each suite. Each is a file `bench_NAME.py`, which has what is
  timed and what it is timed beside (losses of other packages: `peers.py`); `measure.py` has the
  loop that times, `errors.py` checks losses before.
- `result_file.py` writes records; `records.py` has their names and finds them again.
- `report.py`, `readme.py` and `targets.py` say what they mean, through `tables.py` and
  `figures.py`; `regression.py` compares two runs.
- `long_sequence/`, `study/` and `half_precision/` measure what takes processes and hours, and have
  command lines and results of their own.
"""

import os

# PyTorch's profiler, which counts bytes here, would write lines about itself between the tables.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
