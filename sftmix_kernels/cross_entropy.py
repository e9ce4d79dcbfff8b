"""Next-token prediction: the rows of `mixup_loss.py` with one hidden state and one target each.

- Formula: `reference.py`.
- Kernels: `row_chunks/kernels.py`; `vocab_tiles/forward.py`, `vocab_tiles/backward.py`. On the CPU:
  `csrc/row_chunks.h`, behind `row_chunks/cpu.py`.
- Proof: `tests/sftmix_kernels/test_cross_entropy.py`; of the kernels
  `tests/sftmix_kernels/row_chunks/test_row_chunks.py`,
  `tests/sftmix_kernels/vocab_tiles/test_vocab_tiles.py`.
- Time: `benchmarks/bench_loss.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import autocast, check_divisor, check_ids, check_label_values, check_reduction
from .mixup_loss import reduced_loss
from .schedules import Schedule, resolve_schedule
from .terms import label_terms
from .vocab_parallel.shard import VocabShard, checked_head


def fused_cross_entropy(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (...) int64, already shifted
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    divisor: float | Tensor | None = None,
    schedule: Schedule = "auto",
    vocab_parallel: VocabShard | None = None,
    validate: bool = False,
) -> Tensor:
    """Return the cross-entropy of the LM head's logits, without ever holding all of them.

    ``a = f(W h + b)`` with ``f(x) = softcap * tanh(logit_scale * x / softcap)``, and
    ``loss = LSE(a) - a[y]`` in nats. Arguments, errors and the empty case are those of
    `fused_mixup_loss`; ``labels[t]`` is the token that ``hidden[t]`` predicts.

    Returns:
        A float32 scalar, or labels' shape for ``reduction="none"``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, and what came.
    """
    hidden, weight, bias = autocast(hidden, weight, bias)  # type: ignore[assignment]
    head = checked_head(hidden, weight, bias, logit_scale, softcap, vocab_parallel, schedule)
    check_reduction(reduction)
    check_divisor("divisor", divisor)
    check_ids("labels", labels, hidden)
    if validate:
        check_label_values("labels", labels, head.vocab_size, ignore_index)
    targets, counts = label_terms(labels, None, head.vocab_size, ignore_index)
    return reduced_loss(
        hidden,
        None,
        head,
        targets,
        torch.empty_like(counts).unsqueeze(-1),  # one target has all: it is not read
        counts,
        reduction,
        divisor,
        resolve_schedule(schedule, hidden, head.widest),
    )
