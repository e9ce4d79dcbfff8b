"""`sftmix plan`: plan the memory of a training step before there is a GPU to run it on.

- `hollow`: tensors without values; `trace`: counts those of a piece of code
- `step`: the real step under such a trace; `attention`, `tiles` and `optimizer` stand for what is
  not PyTorch's own or would take long, `moments` tells where in the step the peak is
- `search`: the largest length that fits
- `planned`: the options, the switches and the advice; `table` writes them
"""

from __future__ import annotations

from sftmix.plan.step import Plan, plan_step

__all__ = ["Plan", "plan_step"]
