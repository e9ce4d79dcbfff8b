"""Mixup without NTP: interpolate, project, soft cross-entropy with two targets.

Legend: R positions, K rows of one chunk or group, T hidden states mixed in a row (2; 1 is the plain
cross-entropy), D hidden size, V vocabulary, B tiles of the vocabulary.

``m = f(W (lam h_c + (1 - lam) h_u) + b)``, ``loss = LSE(m) - lam m[y_c] - (1 - lam) m[y_u]``.
Where only Mixup is wanted, mixing first costs one row of logits for a pair instead of two.

- Formula: `reference.py`.
- Kernels: `row_chunks/mixing.py`, `row_chunks/kernels.py`; `vocab_tiles/forward.py`,
  `vocab_tiles/backward.py`. On the CPU: `csrc/row_chunks.h`, behind `row_chunks/cpu.py`.
- Proof: `tests/sftmix_kernels/test_mixup_loss.py`; of the kernels
  `tests/sftmix_kernels/row_chunks/test_row_chunks.py`,
  `tests/sftmix_kernels/vocab_tiles/test_vocab_tiles.py`.
- Time: `benchmarks/bench_loss.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import (
    autocast,
    check_divisor,
    check_ids,
    check_ignore_index,
    check_label_values,
    check_reduction,
    check_same,
    checked_lam,
)
from .gates import PLAIN, Kind, Objective, objective_of_rows
from .gradients import (
    DividedBy,
    Gradients,
    divided_by,
    first_order_only,
    input_gradients,
    kept_or_made,
    on_plain_cpu,
    unit_of,
    unwritten,
)
from .reference import Reduction, both, present, weighted_loss
from .row_chunks import cpu
from .row_chunks.chunks import (
    count_of,
    counted_chunks,
    fake_results,
    logits_workspace,
    mixed_rows,
    project,
)
from .schedules import (
    BLOCK_R,
    BLOCK_V,
    Schedule,
    VocabTiles,
    keeps_gradients,
    resolve_schedule,
    runs_triton,
)
from .terms import divided_sum, filled, label_terms, loss_divisor
from .transform import LogitTransform
from .vocab_parallel.losses import add_over_ranks_, sharded_losses_
from .vocab_parallel.shard import HeadPart, VocabShard, checked_head
from .vocab_tiles.gradients import TileGradients
from .vocab_tiles.groups import dense_rows, groups, live_flags, live_of, row_group


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
    keeps: bool = False,  # G of all rows, from which backward makes dW: `keeps_gradients`
    divisor: Tensor | None = None,  # () float32, of the gradients; `DividedBy.PRODUCTS`
    old_log_probs: Tensor | None = None,  # (R,) float32, of the objective
    parameter: Tensor | None = None,  # () float32 on the host, of the objective
    kind: int = Kind.PLAIN,  # of the objective of rows with one target
    stats: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return weighted row losses (R,), and the gradients of their sum with respect to the mixed
    rows (R, D), weight (V, D) and bias (V,), the last two as `Gradients` has them; empty where not
    needed. With a group, weight and bias are this rank's, and the first gradient is float32 too.
    With ``keeps`` G (R, V) takes dW's place, and the mixed rows (R, D) follow, which are else
    empty. The rows' stats (3, R) come last, empty where not asked for."""
    transform = LogitTransform(logit_scale, softcap, has_bias=bias is not None)
    loss = unwritten(row_weight, row_weight.shape, row_weight.dtype)
    with torch.autocast(weight.device.type, enabled=False):
        chunks = counted_chunks(row_weight, chunk_rows)
        gradients = Gradients(
            hidden_c,
            weight,
            needs_gradient,
            len(chunks),
            partial=group is not None,
            scale=1.0 if divisor is None else float(divisor.reciprocal()),
            keeps=keeps,
            chunk_rows=chunk_rows,
        )
        workspace = logits_workspace(weight, max(map(count_of, chunks), default=0))
        if runs_triton(weight):
            # Once, and not for every chunk.
            hidden_c, hidden_u = both_dense(hidden_c, hidden_u)
        losses_ = losses_of_rows(weight, first_token, group)
        room = row_weight.new_zeros(3, row_weight.numel() if stats else 0)
        objective = objective_of_rows(old_log_probs, parameter, kind, room if stats else None)
        for chunk in chunks:
            mixed = mixed_rows(hidden_c, hidden_u, share, chunk, row_weight)
            logits = project(mixed, weight, bias, workspace)
            of_rows = objective.rows(chunk)
            loss[chunk] = losses_(
                logits,
                targets[chunk],
                share[chunk] if share.shape[1] > 1 else None,
                row_weight[chunk],
                transform,
                gradients.needed,
                of_rows,
            )
            objective.put_stats(chunk, of_rows)
            gradients.add_chunk(logits, mixed, weight, chunk)
            del mixed  # before the next chunk's are made
        add_over_ranks_(gradients.hidden, group)
    return loss, *gradients.results, room


@mixup_rows.register_fake
def _(hidden, _u, weight, _b, _t, _s, row_weight, _scale, _cap, chunk_rows, needs, _first=0,  # type: ignore[no-untyped-def]
      group=None, keeps=False, _divisor=None, _old=None, _parameter=None, _kind=0,
      stats=False):  # fmt: skip
    results = fake_results(
        hidden, weight, needs, chunk_rows, partial=group is not None, keeps=keeps
    )
    room = row_weight.new_empty(3, row_weight.shape[0] if stats else 0)
    return torch.empty_like(row_weight), *results, room


def losses_of_rows(weight: Tensor, first_token: int, group: str | None) -> Callable[..., Tensor]:
    """Return what finds the losses of a chunk's rows and turns its logits into gradients."""
    if group is not None:
        return partial(sharded_losses_, start=first_token, group=group)
    if runs_triton(weight):
        from .row_chunks.kernels import soft_rows_

        return soft_rows_
    return cpu.soft_rows_


@torch.library.custom_op("sftmix_kernels::mixup_tiles", mutates_args=())
def mixup_tiles(
    hidden_c: Tensor,  # (R, D)
    hidden_u: Tensor | None,  # (R, D); None for one hidden state and target
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (R, T) int64 in [0, V)
    share: Tensor,  # (R, T) float32
    row_weight: Tensor,  # (R,) float32
    logit_scale: float,
    softcap: float | None,
    filter_eps: float,
    max_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weighted row losses (R,), the rows' state (4, R) for backward, and live flags."""
    from .vocab_tiles.forward import soft_forward

    hidden_c, hidden_u, weight = *both_dense(hidden_c, hidden_u), dense_rows(weight)
    transform = LogitTransform(logit_scale, softcap, has_bias=bias is not None)
    num_rows = row_weight.numel()
    loss, state = torch.empty_like(row_weight), row_weight.new_empty(4, num_rows)
    live = live_flags(num_rows, BLOCK_R, weight, filter_eps)
    # A row leaves a maximum and a sum for every tile.
    for rows in groups(num_rows, BLOCK_R, 8 * live.shape[1], max_bytes // 2):
        loss[rows], state[:, rows] = soft_forward(
            row_group(hidden_c, hidden_u, targets, share, row_weight, rows),
            weight,
            bias,
            transform,
            live_of(live, rows, BLOCK_R),
            filter_eps,
        )
    return loss, state, live


@mixup_tiles.register_fake
def _(_c, _u, weight, _bias, _targets, _share, row_weight, _scale, _cap, filter_eps, *_):  # type: ignore[no-untyped-def]
    live = live_flags(row_weight.shape[0], BLOCK_R, weight, filter_eps)
    return torch.empty_like(row_weight), row_weight.new_empty(4, row_weight.shape[0]), live


@torch.library.custom_op("sftmix_kernels::mixup_tiles_backward", mutates_args=())
def mixup_tiles_backward(
    hidden_c: Tensor,  # (R, D)
    hidden_u: Tensor | None,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (R, T) int64
    share: Tensor,  # (R, T) float32
    row_weight: Tensor,  # (R,) float32: label weight times upstream gradient
    state: Tensor,  # (4, R) float32
    live: Tensor,  # (row blocks, B) uint8
    needs_gradient: list[bool],  # of hidden, weight, bias
    logit_scale: float,
    softcap: float | None,
    max_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``sum(row_weight * row losses)`` with respect to the mixed rows
    (R, D), weight (V, D) and bias (V,), the last two in float32; empty where not needed."""
    from .vocab_tiles.backward import soft_gradient_

    hidden_c, hidden_u, weight = *both_dense(hidden_c, hidden_u), dense_rows(weight)
    transform = LogitTransform(logit_scale, softcap, has_bias=bias is not None)
    num_rows = row_weight.numel()
    gradients = TileGradients(hidden_c, weight, needs_gradient, num_rows, max_bytes)
    for rows in gradients.groups(num_rows, BLOCK_R, 1, weight):
        index = torch.arange(rows.start, rows.stop, device=weight.device)
        mixed = mixed_rows(hidden_c, hidden_u, share, index, row_weight)
        group = row_group(hidden_c, hidden_u, targets, share, row_weight, rows)
        group_state, group_live = state[:, rows].contiguous(), live_of(live, rows, BLOCK_R)
        for gradient, first in gradients.tiles(mixed, weight):
            soft_gradient_(
                gradient, group, weight, bias, group_state, group_live, transform, first // BLOCK_V
            )
            gradients.add_tiles(gradient, first, mixed, weight, group_live, BLOCK_R, parts=1)
        gradients.end_group(index)
        del mixed  # before the next group's are made
    return gradients.hidden, gradients.weight, gradients.bias


@mixup_tiles_backward.register_fake
def _(hidden, _u, weight, _bias, _targets, _share, _weights, _state, _live, needs_gradient, *_):  # type: ignore[no-untyped-def]
    gradients = Gradients(hidden, weight, needs_gradient, 0)
    return gradients.hidden, gradients.weight, gradients.bias


def both_dense(hidden_c: Tensor, hidden_u: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return both hidden states contiguous: kernels read them with one stride."""
    return hidden_c.contiguous(), None if hidden_u is None else hidden_u.contiguous()


class RowInputs(NamedTuple):
    """The tensors of a call, in the order in which all ops of rows take them."""

    hidden_c: Tensor  # (R, D)
    hidden_u: Tensor | None  # (R, D); None for one hidden state and target
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (R, T) int64 in [0, V)
    share: Tensor  # (R, T) float32, summing to 1 over T
    row_weight: Tensor  # (R,) float32; a row of weight 0 is left out


class Asked(NamedTuple):
    """What an op is asked for, in its order."""

    old_log_probs: Tensor | None
    parameter: Tensor | None  # () float32 on the host
    kind: int
    stats: bool

    @classmethod
    def of(cls, objective: Objective, stats: bool) -> Asked:
        """Return what a call with this objective asks for."""
        old, parameter = objective.old_log_probs, None
        if objective.kind != Kind.PLAIN:
            parameter = filled((), objective.parameter, torch.device("cpu"))
        return cls(old, parameter, objective.kind, stats)


class Options(NamedTuple):
    """What the op needs to know besides tensors."""

    logit_scale: float
    softcap: float | None
    chunk_rows: int
    needs_gradient: list[bool]
    first_token: int
    group: str | None
    keeps: bool

    @classmethod
    def of(
        cls, head: HeadPart, chunk_rows: int, num_rows: int, inputs: tuple[Tensor | None, ...]
    ) -> Options:
        """Return the options of a call with these hidden, weight and bias."""
        needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in inputs]
        whole = head.group is None and not on_plain_cpu(head.weight)
        keeps = whole and needs[1] and keeps_gradients(num_rows, chunk_rows, head.weight)
        chunk_rows = num_rows if keeps else chunk_rows
        return cls(head.logit_scale, head.softcap, chunk_rows, needs, head.start, head.group, keeps)

    @property
    def without_gradients(self) -> Options:
        """The same where no input needs a gradient."""
        return self._replace(needs_gradient=[False] * 3, keeps=False)


class TileOptions(NamedTuple):
    """What the ops of vocabulary tiles need to know besides tensors."""

    logit_scale: float
    softcap: float | None
    filter_eps: float
    max_bytes: int

    @classmethod
    def of(cls, head: HeadPart, schedule: VocabTiles) -> TileOptions:
        """Return the options of a call with this head."""
        return cls(head.logit_scale, head.softcap, schedule.filter_eps, schedule.max_bytes)

    @property
    def backward(self) -> tuple[float, float | None, int]:
        """The options of the backward ops, which find the filter's flags."""
        return self.logit_scale, self.softcap, self.max_bytes


class ReducedRows(torch.autograd.Function):
    """``sum(row losses) / divisor``, and stats; gradients are made in forward and scaled in
    backward."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        (*tensors, divisor, ctx.options), asked = inputs[:-4], Asked(*inputs[-4:])
        ctx.divided_by, rows = divided_by(tensors[2]), RowInputs(*tensors)
        if ctx.divided_by is DividedBy.ROWS:
            rows = rows._replace(row_weight=rows.row_weight / divisor)
        early = divisor if ctx.divided_by is DividedBy.PRODUCTS else None
        loss, *results, stats = mixup_rows(*rows, *ctx.options, early, *asked)
        ctx.save_for_backward(rows.share, divisor, *results)
        ctx.dtype = rows.weight.dtype
        ctx.mark_non_differentiable(stats)
        return divided_sum(loss, None if ctx.divided_by is DividedBy.ROWS else divisor), stats

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        share, divisor, *results = ctx.saved_tensors
        scale = upstream / divisor if ctx.divided_by is DividedBy.BACKWARD else upstream
        gradients = kept_or_made(results, keeps=ctx.options.keeps)
        return input_gradients(gradients, share, scale, ctx.needs_input_grad, ctx.dtype)


class UnreducedRows(torch.autograd.Function):
    """The row losses, and stats; backward runs the op again, with the upstream gradient as row
    weight."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        (*tensors, ctx.options), asked = inputs[:-4], Asked(*inputs[-4:])
        loss, *_, stats = mixup_rows(*tensors, *ctx.options.without_gradients, None, *asked)
        ctx.save_for_backward(*tensors, asked.old_log_probs, asked.parameter)
        ctx.kind = asked.kind
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, old_log_probs, parameter = ctx.saved_tensors
        rows = RowInputs(*tensors)
        rows = rows._replace(row_weight=weighted_loss(rows.row_weight, upstream))
        asked = Asked(old_log_probs, parameter, ctx.kind, stats=False)
        _, *results, _ = mixup_rows(*rows, *ctx.options, None, *asked)
        gradients = kept_or_made(results, keeps=ctx.options.keeps)
        unit, needs = upstream.new_ones(()), ctx.needs_input_grad
        return input_gradients(gradients, rows.share, unit, needs, rows.weight.dtype)


class TileRows(torch.autograd.Function):
    """The row losses by tiles; the upstream gradient of each row is its weight in backward."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, ctx.options = inputs
        loss, *state = mixup_tiles(*tensors, *ctx.options)
        ctx.save_for_backward(*tensors, *state)
        return loss  # type: ignore[no-any-return]

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, state, live = ctx.saved_tensors
        rows, unit, needs = RowInputs(*tensors), unit_of(upstream), ctx.needs_input_grad
        rows = rows._replace(row_weight=weighted_loss(rows.row_weight, upstream / unit))
        wanted = [needs[0] or needs[1], needs[2], needs[3]]
        gradients = mixup_tiles_backward(*rows, state, live, wanted, *ctx.options.backward)
        return input_gradients(gradients, rows.share, unit, needs, rows.weight.dtype)


def reduced_loss(
    hidden_c: Tensor,  # (..., D)
    hidden_u: Tensor | None,
    head: HeadPart,
    targets: Tensor,  # (..., T) in [0, V)
    share: Tensor,  # (..., T)
    row_weight: Tensor,  # (...)
    reduction: Reduction,
    divisor: float | Tensor | None,
    schedule: int | VocabTiles,
    objective: Objective = PLAIN,  # of (...) rows with one target
    stats: bool = False,
) -> tuple[Tensor, Tensor]:
    """Flatten, run and reduce, for Mixup as for the plain cross-entropy: the loss, and stats."""
    size, terms = head.weight.shape[1], targets.shape[-1]
    rows = RowInputs(
        hidden_c.reshape(-1, size),
        None if hidden_u is None else hidden_u.reshape(-1, size),
        head.weight,
        head.bias,
        targets.reshape(-1, terms),
        share.reshape(-1, terms),
        row_weight.reshape(-1),
    )
    total = loss_divisor(1.0 if reduction == "sum" else divisor, row_weight)
    if objective.old_log_probs is not None:
        objective = objective._replace(old_log_probs=objective.old_log_probs.reshape(-1))
    if isinstance(schedule, VocabTiles):
        losses = tile_losses(rows, TileOptions.of(head, schedule), objective)
        loss = (
            losses.reshape(row_weight.shape) if reduction == "none" else divided_sum(losses, total)
        )
        return loss, loss.new_empty(3, 0)
    # The mixed rows need a gradient where either of the two hidden states does.
    either = hidden_u if hidden_u is not None and hidden_u.requires_grad else hidden_c
    inputs = (either, head.weight, head.bias)
    options = Options.of(head, schedule, rows.row_weight.numel(), inputs)
    asked = Asked.of(objective, stats)
    if reduction == "none":
        losses, found = UnreducedRows.apply(*rows, options, *asked)  # type: ignore[no-untyped-call]
        return losses.reshape(row_weight.shape), found
    return ReducedRows.apply(*rows, total, options, *asked)  # type: ignore[no-any-return, no-untyped-call]


def tile_losses(rows: RowInputs, options: TileOptions, objective: Objective) -> Tensor:
    """Return row losses by tiles. A gate that depends on p is known from the losses without it."""
    if objective.is_plain:
        return TileRows.apply(*rows, options)  # type: ignore[no-any-return, no-untyped-call]
    plain = rows._replace(row_weight=present(rows.row_weight))
    losses: Tensor = TileRows.apply(*plain, options)  # type: ignore[no-untyped-call]
    return weighted_loss(both(rows.row_weight, objective.gate(losses.detach())), losses)


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
    reduction: Reduction = "mean",
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
        hidden_c, hidden_u: (..., D), what the LM head reads, in any shape such as
            (batch, length, D); float32, bfloat16 or float16.
        weight: (V, D), the LM head, in hidden's dtype and on its device.
        labels_c, labels_u: (...) int64, already shifted; a position counts only where both are
            valid. ``ignore_index`` leaves it out; another label outside ``[0, V)`` makes the
            position's loss and gradients NaN, of which a warning tells on the CPU.
        lam: share of ``c``, in ``[0, 1]``: a number, or floating-point in a shape that labels'
            shape begins with: (), (batch,) or (batch, length). Not differentiated: one that
            requires a gradient is refused, as such a divisor is.
        bias: (V,), in hidden's dtype, or None.
        logit_scale, softcap: of the head, as above; no bound where ``softcap`` is None.
        ignore_index: the label that leaves a position out.
        reduction: ``"mean"`` over the positions that count, ``"sum"``, or ``"none"``.
        divisor: replaces the count of positions in ``"mean"`` (a global count over ranks, say), a
            number or a tensor () of one; a tensor of 0 counts as 1.
        schedule: ``"auto"``, ``"row_chunks"``, ``"vocab_tiles"`` (CUDA), or `RowChunks` or
            `VocabTiles` with other numbers.
        vocab_parallel: which tokens' rows weight and bias hold, where the head is shared out over
            ranks (`VocabShard`): labels are global, and hidden, labels, lam, the options and what
            needs a gradient are the same on every rank of the group. The loss is then the same on
            every rank too; so are hidden's gradients, whole: reduce neither again. Of weight and
            bias each rank gets its own. ``row_chunks`` only.
        validate: refuse labels and lam out of range, which waits for the device.

    Returns:
        A float32 scalar in nats, or labels' shape (...) for ``"none"``. Nothing to average: 0,
        with gradients 0.

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
    check_ignore_index(ignore_index)
    for name, labels in (("labels_c", labels_c), ("labels_u", labels_u)):
        check_ids(name, labels, hidden_c)
        check_label_values(name, labels, vocab_size, ignore_index, validate=validate)
    share_c = checked_lam(lam, labels_c, validate=validate)
    targets, counts = label_terms(labels_c, labels_u, vocab_size, ignore_index)
    loss, _ = reduced_loss(
        hidden_c,
        hidden_u,
        head,
        targets,
        torch.stack((share_c, 1.0 - share_c), dim=-1),
        counts,
        reduction,
        divisor,
        resolve_schedule(schedule, hidden_c, head.widest),
    )
    return loss
