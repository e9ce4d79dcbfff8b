"""The two compiled ops under `streaming.py`: logits into token states, states into sums.

Legend: R tokens, K tokens of one block, N vocabulary entries of one chunk, S examples.

Each token has a state: the maximum ``m`` of the logits seen so far, the sum ``s`` of
``exp(a - m)`` over them, and the logit ``t`` of its label. `fold_logits` merges a chunk with
maximum ``m'`` and sum ``s'`` into it,

    M = max(m, m'),    s = s exp(m - M) + s' exp(m' - M)

and `add_token_losses` adds the losses ``log s - (t - m)`` to their examples, in float64.
``csrc/online_softmax.h`` has this maths, ``online_softmax_cpu.cpp`` and ``_kernels.cuh`` the loops
around it. Each op stands below in PyTorch operations, which say what it means and run where it was
not compiled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..extension import build_info, warn_of_pytorch_operations
from ..transform import LogitTransform

# Losses are rounded to multiples of 2^-32 nats, less than a hundredth of what float32 logits are
# rounded by: sums below 2^21 nats are then exact in float64, and their order does not matter.
LOSS_STEPS = 2.0**32

torch.library.define(
    "sftmix_kernels::fold_logits",
    "(Tensor logits, Tensor? bias, Tensor labels, int start, float logit_scale, float? softcap, "
    "Tensor(a!) state) -> ()",
)
torch.library.define(
    "sftmix_kernels::add_token_losses",
    "(Tensor state, Tensor labels, int ignore_index, Tensor sample_ids, Tensor order, "
    "Tensor(a!) nll_sum, Tensor(b!) num_tokens) -> ()",
)
# Loading the extension registers the compiled kernels.
build_info()


def new_state(num_rows: int, like: Tensor) -> Tensor:  # (3, R) float32: m, s, t
    """Return the states of tokens that have seen no logits.

    A label that no chunk holds leaves t, and so the loss, NaN.
    """
    state = like.new_empty(3, num_rows, dtype=torch.float32)
    for values, start in zip(state, (-torch.inf, 0.0, torch.nan), strict=True):
        values.fill_(start)
    return state


def fold_logits(
    logits: Tensor,  # (K, N) raw logits of vocabulary entries [start, start + N)
    bias: Tensor | None,  # (N,)
    labels: Tensor,  # (K,) int64
    start: int,
    logit_scale: float,
    softcap: float | None,
    state: Tensor,  # (3, K) float32; updated
) -> None:
    """Merge a chunk of logits into the states of its tokens."""
    warn_of_pytorch_operations()
    logits = logits.float() if bias is None else logits.float() + bias.float()
    if logit_scale != 1.0 or softcap is not None:
        logits = logits.clone()
        LogitTransform(logit_scale, softcap, bias is not None).apply_(logits, needs_slope=False)
    peak, total, target = state
    new_peak = torch.maximum(peak, logits.amax(-1))
    # Where nothing but -inf was seen, -inf - -inf would be NaN.
    base = new_peak.masked_fill(new_peak == -torch.inf, 0.0)
    column = (labels - start).unsqueeze(-1)
    inside = (column >= 0) & (column < logits.shape[1])
    found = logits.gather(-1, column.clamp(0, logits.shape[1] - 1))
    target.copy_(torch.where(inside, found, target.unsqueeze(-1)).squeeze(-1))
    total *= (peak - base).exp()
    total += (logits - base.unsqueeze(-1)).exp_().sum(-1)
    peak.copy_(new_peak)


torch.library.impl("sftmix_kernels::fold_logits", "default", fold_logits)


def add_token_losses(
    state: Tensor,  # (3, R) float32
    labels: Tensor,  # (R,) int64
    ignore_index: int,
    sample_ids: Tensor,  # (R,) int64; one outside [0, S) adds nothing
    order: Tensor,  # (R,) int64: tokens sorted by example
    nll_sum: Tensor,  # (S,) float64; updated
    num_tokens: Tensor,  # (S,) int64; updated
) -> None:
    """Add the losses of tokens whose label is not ``ignore_index``, and their number."""
    warn_of_pytorch_operations()
    counted = labels != ignore_index
    counted &= (sample_ids >= 0) & (sample_ids < nll_sum.shape[0])
    order = order[counted[order]]
    peak, total, target = state[:, order].double()
    losses = ((total.log() - (target - peak)) * LOSS_STEPS).round() / LOSS_STEPS
    nll_sum.index_put_((sample_ids[order],), losses, accumulate=True)
    num_tokens.index_put_((sample_ids[order],), torch.ones_like(order), accumulate=True)


torch.library.impl("sftmix_kernels::add_token_losses", "default", add_token_losses)


def nothing(*_: Any) -> None:
    """Return nothing, as both ops do: all that a trace has to know of them beside the schema."""


torch.library.register_fake("sftmix_kernels::fold_logits", nothing)
torch.library.register_fake("sftmix_kernels::add_token_losses", nothing)
