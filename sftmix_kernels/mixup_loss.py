"""Mixup without NTP: interpolate, project, soft cross-entropy with two targets.

Legend: R positions, K rows of one chunk, T hidden states mixed in a row (2; 1 is the plain
cross-entropy), D hidden size, V vocabulary.

``m = f(W (lam h_c + (1 - lam) h_u) + b)``, ``loss = LSE(m) - lam m[y_c] - (1 - lam) m[y_u]``.
Where only Mixup is wanted, mixing first costs one row of logits for a pair instead of two.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import (
    autocast,
    check_divisor,
    check_ids,
    check_label_values,
    check_reduction,
    check_same,
    checked_lam,
)
from .gradients import Gradients, first_order_only, input_gradients
from .reference import both, label_weight, weighted_loss
from .row_chunks.chunks import chunk_sizes, counted_rows, logits_workspace, mixed_rows, project
from .row_chunks.losses import cache_blocks, load_rows, soft_cross_entropy_, store_rows_
from .schedules import Schedule, VocabTiles, resolve_schedule, runs_triton
from .terms import divided_sum, loss_divisor
from .transform import LogitTransform
from .vocab_parallel.losses import add_over_ranks_, sharded_losses_
from .vocab_parallel.shard import Head, VocabShard, checked_head
from .vocab_tiles.rows import TileOptions, TileRows


@torch.library.custom_op("sftmix_kernels::mixup_rows", mutates_args=())
def mixup_rows(
    hidden_c: Tensor,  # (R, D)
    hidden_u: Tensor | None,  # (R, D); None for one hidden state and target
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (R, T) int64 in [0, V)
    share: Tensor,  # (R, T) float32, summing to 1 over T
    row_weight: Tensor,  # (R,) float32; a row of weight 0 is left out
    logit_scale: float,
    softcap: float | None,
    chunk_rows: int,
    needs_gradient: list[bool],  # of hidden, weight, bias
    first_token: int = 0,
    group: str | None = None,  # over which the vocabulary is shared out
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return weighted row losses (R,), and the gradients of their sum with respect to the mixed
    rows (R, D), weight (V, D) and bias (V,), the last two in float32; empty where not needed. With
    a group, weight and bias are this rank's, and the first gradient is float32 too."""
    transform = LogitTransform(logit_scale, softcap, has_bias=bias is not None)
    loss = torch.zeros_like(row_weight)
    with torch.autocast(weight.device.type, enabled=False):
        rows = counted_rows(row_weight)
        gradients = Gradients(
            hidden_c, weight, needs_gradient, rows.numel(), partial=group is not None
        )
        sizes = chunk_sizes(rows.numel(), chunk_rows)
        workspace = logits_workspace(weight, max(sizes, default=0))
        if hidden_u is not None and runs_triton(weight):
            # Once, and not for every chunk.
            hidden_c, hidden_u = hidden_c.contiguous(), hidden_u.contiguous()
        losses_ = chunk_losses_
        if group is not None:
            losses_ = partial(sharded_losses_, start=first_token, group=group)
        for chunk in rows.split(sizes):
            mixed = mixed_rows(hidden_c, hidden_u, share, chunk, row_weight)
            logits = project(mixed, weight, bias, workspace)
            loss[chunk] = losses_(
                logits,
                targets[chunk],
                share[chunk],
                row_weight[chunk],
                transform,
                gradients.needed,
            )
            gradients.add_chunk(logits, mixed, weight, chunk)
        add_over_ranks_(gradients.hidden, group)
    return loss, gradients.hidden, gradients.weight, gradients.bias


@mixup_rows.register_fake
def _(hidden, _u, weight, _b, _t, _s, row_weight, _scale, _cap, _rows, needs, _first=0, group=None):  # type: ignore[no-untyped-def]
    gradients = Gradients(hidden, weight, needs, 0, partial=group is not None)
    return torch.empty_like(row_weight), gradients.hidden, gradients.weight, gradients.bias


def chunk_losses_(
    logits: Tensor,  # (K, V) raw logits; gradients afterwards
    targets: Tensor,  # (K, T)
    share: Tensor,  # (K, T)
    row_weight: Tensor,  # (K,)
    transform: LogitTransform,
    needs_gradient: bool,
) -> Tensor:  # (K,)
    """Return the weighted losses of one chunk; turn its logits into gradients in place."""
    if runs_triton(logits):
        from .row_chunks.kernels import soft_rows_

        both_shares = None if share.shape[1] == 1 else share
        return soft_rows_(logits, targets, both_shares, row_weight, transform, needs_gradient)
    loss = torch.empty_like(row_weight)
    for block in cache_blocks(0, loss.numel(), logits):
        raw = load_rows(logits, block)
        loss[block] = soft_cross_entropy_(
            raw, targets[block], share[block], row_weight[block], transform, needs_gradient
        )
        store_rows_(logits, block, raw)
    return weighted_loss(row_weight, loss)


class Options(NamedTuple):
    """What the op needs to know besides tensors."""

    logit_scale: float
    softcap: float | None
    chunk_rows: int
    needs_gradient: list[bool]
    first_token: int
    group: str | None

    @classmethod
    def of(cls, head: Head, chunk_rows: int, inputs: tuple[Tensor | None, ...]) -> Options:
        """Return the options of a call with these hidden, weight and bias."""
        needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in inputs]
        return cls(head.logit_scale, head.softcap, chunk_rows, needs, head.start, head.group)


class ReducedRows(torch.autograd.Function):
    """``sum(row losses) / divisor``; gradients are made in forward and scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_c: Tensor,
        hidden_u: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        share: Tensor,
        row_weight: Tensor,
        divisor: Tensor,
        options: Options,
    ) -> Tensor:
        loss, *gradients = mixup_rows(
            hidden_c, hidden_u, weight, bias, targets, share, row_weight, *options
        )
        ctx.save_for_backward(share, divisor, *gradients)
        ctx.dtype = weight.dtype
        return divided_sum(loss, divisor)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        share, divisor, *gradients = ctx.saved_tensors
        scale = upstream / divisor
        return input_gradients(gradients, share, scale, ctx.needs_input_grad, ctx.dtype)


class UnreducedRows(torch.autograd.Function):
    """The row losses; backward runs the op again, with the upstream gradient as row weight."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_c: Tensor,
        hidden_u: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        share: Tensor,
        row_weight: Tensor,
        options: Options,
    ) -> Tensor:
        tensors = (hidden_c, hidden_u, weight, bias, targets, share, row_weight)
        ctx.save_for_backward(*tensors)
        ctx.options = options
        loss, *_ = mixup_rows(*tensors, *options._replace(needs_gradient=[False] * 3))
        return loss  # type: ignore[no-any-return]

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_c, hidden_u, weight, bias, targets, share, row_weight = ctx.saved_tensors
        row_weight = weighted_loss(row_weight, upstream)
        _, *gradients = mixup_rows(
            hidden_c, hidden_u, weight, bias, targets, share, row_weight, *ctx.options
        )
        one = upstream.new_ones(())
        return input_gradients(gradients, share, one, ctx.needs_input_grad, weight.dtype)


def reduced_loss(
    hidden_c: Tensor,  # (..., D)
    hidden_u: Tensor | None,
    head: Head,
    targets: Tensor,  # (..., T)
    share: Tensor,  # (..., T)
    row_weight: Tensor,  # (...)
    reduction: str,
    divisor: float | Tensor | None,
    schedule: int | VocabTiles,
) -> Tensor:
    """Flatten, run and reduce, for Mixup as for the plain cross-entropy."""
    weight, bias = head.weight, head.bias
    size, terms = weight.shape[1], targets.shape[-1]
    tensors = (
        hidden_c.reshape(-1, size),
        None if hidden_u is None else hidden_u.reshape(-1, size),
        weight,
        bias,
        targets.reshape(-1, terms).clamp(0, head.vocab_size - 1),
        share.reshape(-1, terms),
        row_weight.reshape(-1),
    )
    total = loss_divisor(1.0 if reduction == "sum" else divisor, row_weight)
    if isinstance(schedule, VocabTiles):
        tiles = TileOptions(head.logit_scale, head.softcap, schedule.filter_eps, schedule.max_bytes)
        rows = TileRows.apply(*tensors, tiles)  # type: ignore[no-untyped-call]
        if reduction == "none":
            return rows.reshape(row_weight.shape)  # type: ignore[no-any-return]
        return divided_sum(rows, total)
    # The mixed rows need a gradient where either of the two hidden states does.
    either = hidden_u if hidden_u is not None and hidden_u.requires_grad else hidden_c
    options = Options.of(head, schedule, (either, weight, bias))
    if reduction == "none":
        return UnreducedRows.apply(*tensors, options).reshape(row_weight.shape)  # type: ignore[no-any-return, no-untyped-call]
    return ReducedRows.apply(*tensors, total, options)  # type: ignore[no-any-return, no-untyped-call]


def fused_mixup_loss(
    hidden_c: Tensor,  # (..., D)
    hidden_u: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels_c: Tensor,  # (...) int64
    labels_u: Tensor,  # (...) int64
    lam: float | Tensor,  # shape: a prefix of labels' shape
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
    """Return the Mixup loss of pairs of hidden states, without ever holding all of their logits.

    ``m = f(W (lam h_c + (1 - lam) h_u) + b)`` with ``f(x) = softcap * tanh(logit_scale * x /
    softcap)``, and ``loss = LSE(m) - lam m[y_c] - (1 - lam) m[y_u]`` in nats
    (arXiv 2410.05248). Drop-in for the same thing composed of dense PyTorch operations
    (`sftmix_kernels.reference.mixup_loss`), which holds (..., V) logits.

    Example:
        Two pairs of tokens, of which the second has no label for ``u`` and does not count:

        >>> hidden_c, hidden_u = torch.eye(3)[:2], torch.eye(3)[1:]
        >>> weight = torch.arange(12.0).reshape(4, 3) / 4  # V = 4 tokens
        >>> labels_c, labels_u = torch.tensor([3, 1]), torch.tensor([2, -100])
        >>> fused_mixup_loss(hidden_c, hidden_u, weight, labels_c, labels_u, 0.75)
        tensor(0.7758)

    Args:
        hidden_c, hidden_u: what the LM head reads; float32, bfloat16 or float16.
        weight, bias: the LM head, in hidden's dtype.
        labels_c, labels_u: a position counts only where both are valid. ``ignore_index`` leaves it
            out; a label outside ``[0, V)`` makes the position's loss and gradients NaN.
        lam: share of ``c``, in ``[0, 1]``. Not differentiated.
        reduction: ``"mean"`` over the positions that count, ``"sum"``, or ``"none"``.
        divisor: replaces the count of positions in ``"mean"`` (a global count over ranks, say); a
            tensor of 0 counts as 1.
        schedule: ``"auto"``, ``"row_chunks"``, ``"vocab_tiles"``, or `RowChunks` or `VocabTiles`
            with other numbers.
        vocab_parallel: which tokens' rows weight and bias hold, where the head is shared out over
            ranks (`VocabShard`): labels are global, and hidden, labels, lam, the options and what
            needs a gradient are the same on every rank of the group. The loss is then the same on
            every rank too; so are hidden's gradients, whole: reduce neither again. Of weight and
            bias each rank gets its own. ``row_chunks`` only.
        validate: also check the values of labels and lam, which waits for the device.

    Returns:
        A float32 scalar, or labels' shape for ``"none"``. Nothing to average: 0, with gradients 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, and what came.
    """
    hidden_c, hidden_u, weight, bias = autocast(hidden_c, hidden_u, weight, bias)  # type: ignore[assignment]
    head = checked_head(
        hidden_c, weight, bias, logit_scale, softcap, vocab_parallel, schedule, name="hidden_c"
    )
    check_reduction(reduction)
    check_divisor("divisor", divisor)
    check_same("hidden_u", hidden_u, "hidden_c", hidden_c)
    if hidden_u.shape != hidden_c.shape:
        raise ValueError(
            f"hidden_u: expected hidden_c's shape {tuple(hidden_c.shape)}, "
            f"got {tuple(hidden_u.shape)}"
        )
    vocab_size = head.vocab_size
    for name, labels in (("labels_c", labels_c), ("labels_u", labels_u)):
        check_ids(name, labels, hidden_c)
        if validate:
            check_label_values(name, labels, vocab_size, ignore_index)
    share_c = checked_lam(lam, labels_c, validate=validate)
    counts = both(
        label_weight(labels_c, vocab_size, ignore_index),
        label_weight(labels_u, vocab_size, ignore_index),
    )
    return reduced_loss(
        hidden_c,
        hidden_u,
        head,
        torch.stack((labels_c, labels_u), dim=-1),
        torch.stack((share_c, 1.0 - share_c), dim=-1),
        counts,
        reduction,
        divisor,
        resolve_schedule(schedule, hidden_c, head.widest),
    )
