"""NTP + Mixup in one op, at the price of the matrix products of NTP.

Legend: R rows of hidden, P pairs, S single rows, K rows of one chunk, D hidden size, V vocabulary,
B tiles of the vocabulary.

Each chunk lays its rows out as ``[c rows | u rows | single rows]``; one projection serves the three
losses, and one gradient per row serves both terms:

    m   = f(lam a_c + (1 - lam) a_u)
    g_m = mix_ratio * (softmax(m) - lam onehot(y_c) - (1 - lam) onehot(y_u)) f'
    G_c = (softmax(f(a_c)) - onehot(y_c)) f' + lam g_m,   G_u likewise with (1 - lam)

where ``mix_ratio = mu * ntp_divisor / mixup_divisor``; backward divides by ``ntp_divisor``.
Every row that counts sits in exactly one pair or is single: left over where the longer response of
a pair was cut, or unpaired.

- Formula: `reference.py`.
- Kernels: `row_chunks/kernels.py`; `vocab_tiles/forward.py`, `vocab_tiles/backward.py`. On the CPU:
  `csrc/row_chunks.h`, behind `row_chunks/cpu.py`.
- Proof: `tests/sftmix_kernels/test_sftmix_loss.py`; of the kernels
  `tests/sftmix_kernels/row_chunks/test_row_chunks.py`,
  `tests/sftmix_kernels/vocab_tiles/test_vocab_tiles.py`.
- Time: `benchmarks/bench_loss.py`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from .checks import (
    autocast,
    check_divisor,
    check_flag,
    check_ids,
    check_ignore_index,
    check_label_values,
    check_pairs,
    check_row_out,
    checked_lam,
)
from .cross_entropy import checked_objective, checked_weights, refuse_missing, token_stats
from .gates import PLAIN, Gate, Kind, Objective, objective_of_rows
from .gradients import (
    DividedBy,
    Gradients,
    divided_by,
    first_order_only,
    handed_out,
    kept_or_made,
    unwritten,
)
from .mixup_loss import Asked, Options, RowInputs, TileOptions, TileRows, reduced_loss
from .number_checks import check_number
from .reference import SFTMixLoss, TokenStats, both, present
from .row_chunks.chunks import (
    chunk_sizes,
    counted_pairs,
    counted_singles,
    fake_results,
    gather_rows,
    joined,
    logits_workspace,
    pair_chunks,
    project,
)
from .schedules import BLOCK_P, BLOCK_V, Schedule, VocabTiles, resolve_schedule, runs_triton
from .terms import PairPlan, divided_sum, label_terms, loss_divisor, ordered_pairs
from .transform import LogitTransform
from .vocab_parallel.losses import add_over_ranks_, sharded_pair_losses_
from .vocab_parallel.shard import HeadPart, VocabShard, checked_head
from .vocab_tiles.gradients import TileGradients
from .vocab_tiles.groups import (
    PairGroup,
    dense_rows,
    every_row_paired,
    groups,
    live_flags,
    live_of,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .keywords import SFTMixKeywords


@torch.library.custom_op("sftmix_kernels::sftmix_rows", mutates_args=())
def sftmix_rows(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (R,) int64 in [0, V)
    row_weight: Tensor,  # (R,) float32: 1, 0 or NaN; a row of weight 0 is left out
    pair_c: Tensor,  # (P,) int64
    pair_u: Tensor,  # (P,) int64
    pair_weight: Tensor,  # (P,) float32: 1, 0 or NaN; a pair of weight 0 is not mixed
    share: Tensor,  # (P, 2) float32: lam and 1 - lam
    single: Tensor | None,  # (S,) int64, the rows outside of pairs, where they are known
    mix_ratio: Tensor,  # () float32
    logit_scale: float,
    softcap: float | None,
    chunk_rows: int,
    needs_gradient: list[bool],  # of hidden, weight, bias
    first_token: int = 0,
    group: str | None = None,  # over which the vocabulary is shared out
    keeps: bool = False,
    divisor: Tensor | None = None,  # () float32
    old_log_probs: Tensor | None = None,  # (R,) float32, of the objective
    parameter: Tensor | None = None,  # () float32 on the host, of the objective
    kind: int = Kind.PLAIN,  # of the objective of NTP: a gate, or none
    stats: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return NTP losses of rows (R,), Mixup losses of pairs (P,), and the gradients of
    ``sum(ntp) + mix_ratio * sum(mixup)`` with respect to hidden (R, D), weight (V, D) and bias
    (V,), the last two as `Gradients` has them; empty where not needed. Group, ``keeps``, divisor
    and stats mean what they do in `mixup_rows`, and so does what follows the gradients."""
    transform = LogitTransform(logit_scale, softcap, has_bias=bias is not None)
    ntp = unwritten(row_weight, row_weight.shape, row_weight.dtype)
    with torch.autocast(weight.device.type, enabled=False):
        pairs = counted_pairs(pair_weight)
        if single is None:
            single = counted_singles(row_weight, pair_c[pairs], pair_u[pairs])
        of_pairs = (pair_c[pairs], pair_u[pairs], pair_weight[pairs], share[pairs])
        num_rows = 2 * of_pairs[0].numel() + single.numel()
        gradients = Gradients(
            hidden,
            weight,
            needs_gradient,
            num_rows,
            partial=group is not None,
            scale=1.0 if divisor is None else float(divisor.reciprocal()),
            keeps=keeps,
            chunk_rows=chunk_rows,
        )
        sizes = chunk_sizes(num_rows, chunk_rows)
        workspace = logits_workspace(weight, max(sizes, default=0))
        losses_ = chunk_losses_
        if group is not None:
            losses_ = partial(sharded_pair_losses_, start=first_token, group=group)
        room = row_weight.new_zeros(3, row_weight.numel() if stats else 0)
        objective = objective_of_rows(old_log_probs, parameter, kind, room if stats else None)
        if runs_triton(hidden):
            # Once, and not for every chunk.
            hidden = dense_rows(hidden)
        found = []
        for some, rest in pair_chunks(of_pairs[0].numel(), sizes):
            of_c, of_u, weight_of_pairs, share_of_pairs = (numbers[some] for numbers in of_pairs)
            rows = joined(of_c, of_u, single[rest])
            weights = row_weight[rows]
            gathered = gather_rows(hidden, rows, weights)
            logits = project(gathered, weight, bias, workspace)
            of_rows = objective.rows(rows)
            ntp[rows], of_chunk = losses_(
                logits,
                labels[rows],
                weights,
                weight_of_pairs,
                share_of_pairs,
                mix_ratio,
                transform,
                gradients.needed,
                of_rows,
            )
            objective.put_stats(rows, of_rows)
            found.append(of_chunk)
            gradients.add_chunk(logits, gathered, weight, rows)
            del gathered  # before the next chunk's are made
        mixup = joined(pair_weight.new_empty(0), *found)
        if isinstance(pairs, Tensor):
            mixup = torch.zeros_like(pair_weight).index_copy_(0, pairs, mixup)
        add_over_ranks_(gradients.hidden, group)
    return ntp, mixup, *gradients.results, room


@sftmix_rows.register_fake
def _(hidden, weight, _b, _y, row_weight, _c, _u, pair_weight, _share, _single, _ratio, _scale,  # type: ignore[no-untyped-def]
      _cap, chunk_rows, needs, _first=0, group=None, keeps=False, _divisor=None, _old=None,
      _parameter=None, _kind=0, stats=False):  # fmt: skip
    results = fake_results(
        hidden, weight, needs, chunk_rows, partial=group is not None, keeps=keeps
    )
    room = row_weight.new_empty(3, row_weight.shape[0] if stats else 0)
    return torch.empty_like(row_weight), torch.empty_like(pair_weight), *results, room


def chunk_losses_(
    logits: Tensor,  # (K, V): [c | u | single] raw logits; gradients afterwards
    labels: Tensor,  # (K,)
    row_weight: Tensor,  # (K,)
    pair_weight: Tensor,  # (p,) pairs of this chunk
    share: Tensor,  # (p, 2)
    mix_ratio: Tensor,  # ()
    transform: LogitTransform,
    needs_gradient: bool,
    objective: Objective = PLAIN,  # of the K rows' NTP
) -> tuple[Tensor, Tensor]:  # NTP losses (K,), Mixup losses (p,)
    """Return the weighted losses of one chunk; turn its logits into gradients in place."""
    if runs_triton(logits):
        from .row_chunks.kernels import pair_rows_, soft_rows_
    else:
        from .row_chunks.cpu import pair_rows_, soft_rows_
    paired, single = slice(2 * pair_weight.numel()), slice(2 * pair_weight.numel(), None)
    of_paired, of_single = objective.rows(paired), objective.rows(single)
    pairs = (labels, row_weight, share, pair_weight, mix_ratio)
    ntp_of_pairs, mixup = pair_rows_(logits, *pairs, transform, needs_gradient, of_paired)
    targets, weights = labels[single].unsqueeze(-1), row_weight[single]
    ntp_of_singles = soft_rows_(
        logits[single], targets, None, weights, transform, needs_gradient, of_single
    )
    objective.put_stats(paired, of_paired)
    objective.put_stats(single, of_single)
    return joined(ntp_of_pairs, ntp_of_singles), mixup


@torch.library.custom_op("sftmix_kernels::sftmix_tiles", mutates_args=())
def sftmix_tiles(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    rows: Tensor,  # (2, P) int64 rows of hidden, each once; R is none, of weight 0
    labels: Tensor,  # (2, P) int64 in [0, V)
    weights: Tensor,  # (3, P) float32: of c, of u, of their mixture
    share: Tensor,  # (2, P) float32: lam and 1 - lam
    mix_ratio: Tensor,  # () float32
    logit_scale: float,
    softcap: float | None,
    filter_eps: float,
    max_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weighted losses (3, P) of c, u and their mixtures, the pairs' state (10, P) for
    backward, and live flags."""
    from .vocab_tiles.forward import pair_forward

    hidden, weight = dense_rows(hidden), dense_rows(weight)
    transform = LogitTransform(logit_scale, softcap, has_bias=bias is not None)
    whole, num_pairs = PairGroup(rows, labels, weights, share), rows.shape[1]
    loss, state = torch.empty_like(weights), weights.new_empty(10, num_pairs)
    live = live_flags(num_pairs, BLOCK_P, weight, filter_eps)
    # A pair leaves three maxima and three sums for every tile.
    for pairs in groups(num_pairs, BLOCK_P, 24 * live.shape[1], max_bytes // 2):
        loss[:, pairs], state[:, pairs] = pair_forward(
            hidden,
            whole.part(pairs),
            mix_ratio,
            weight,
            bias,
            transform,
            live_of(live, pairs, BLOCK_P),
            filter_eps,
        )
    return loss, state, live


@sftmix_tiles.register_fake
def _(_h, weight, _bias, rows, _labels, weights, _share, _ratio, _scale, _cap, filter_eps, *_):  # type: ignore[no-untyped-def]
    live = live_flags(rows.shape[1], BLOCK_P, weight, filter_eps)
    return torch.empty_like(weights), weights.new_empty(10, rows.shape[1]), live


@torch.library.custom_op("sftmix_kernels::sftmix_tiles_backward", mutates_args=())
def sftmix_tiles_backward(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    rows: Tensor,  # (2, P) int64
    labels: Tensor,  # (2, P) int64
    weights: Tensor,  # (3, P) float32
    share: Tensor,  # (2, P) float32
    state: Tensor,  # (10, P) float32
    live: Tensor,  # (pair blocks, B) uint8
    needs_gradient: list[bool],  # of hidden, weight, bias
    logit_scale: float,
    softcap: float | None,
    max_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``sum(ntp) + mix_ratio * sum(mixup)`` with respect to hidden (R, D),
    weight (V, D) and bias (V,), the last two in float32; empty where not needed."""
    from .vocab_tiles.backward import pair_gradient_

    hidden, weight = dense_rows(hidden), dense_rows(weight)
    transform = LogitTransform(logit_scale, softcap, has_bias=bias is not None)
    whole, num_rows = PairGroup(rows, labels, weights, share), hidden.shape[0]
    gradients = TileGradients(hidden, weight, needs_gradient, num_rows, max_bytes)
    for pairs in gradients.groups(rows.shape[1], BLOCK_P, 2, weight):
        index = rows[:, pairs].reshape(-1)
        gathered = gather_rows(
            hidden, index.clamp(max=num_rows - 1), weights[:2, pairs].reshape(-1)
        )
        group = whole.part(pairs)
        group_state, group_live = state[:, pairs].contiguous(), live_of(live, pairs, BLOCK_P)
        for gradient, first in gradients.tiles(gathered, weight):
            tile = first // BLOCK_V
            pair_gradient_(
                gradient, hidden, group, weight, bias, group_state, group_live, transform, tile
            )
            gradients.add_tiles(gradient, first, gathered, weight, group_live, BLOCK_P, parts=2)
        # The partner that fills up an odd number of rows is the last of all.
        partner = pairs.stop == rows.shape[1] and rows.numel() > num_rows
        gradients.end_group(index[: index.numel() - partner])
        del gathered  # before the next group's are made
    return gradients.hidden, gradients.weight, gradients.bias


@sftmix_tiles_backward.register_fake
def _(hidden, weight, _bias, _rows, _labels, _weights, _share, _state, _live, needs_gradient, *_):  # type: ignore[no-untyped-def]
    gradients = Gradients(hidden, weight, needs_gradient, 0)
    return gradients.hidden, gradients.weight, gradients.bias


class NTPAndMixup(torch.autograd.Function):
    """Loss, its two terms, row losses of NTP, and stats; only the loss is differentiable."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        *tensors, mu, ntp_divisor, mixup_divisor, ctx.options = inputs[:-4]
        ctx.divided_by, asked = divided_by(tensors[1]), Asked(*inputs[-4:])
        ntp, row_ntp, pair_mixup, *results, stats = divided_rows(
            tensors, mu, ntp_divisor, mixup_divisor, ctx.options, ctx.divided_by, asked
        )
        ctx.save_for_backward(ntp_divisor, *results)
        ctx.dtype = tensors[1].dtype
        mixup = divided_sum(pair_mixup, mixup_divisor)
        ctx.mark_non_differentiable(ntp, mixup, row_ntp, stats)
        return ntp + mu * mixup, ntp, mixup, row_ntp, stats

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        divisor, *results = ctx.saved_tensors
        scale = upstream / divisor if ctx.divided_by is DividedBy.BACKWARD else upstream
        gradients = kept_or_made(results, keeps=ctx.options.keeps)
        return handed_out(gradients, [scale] * 3, ctx.needs_input_grad, ctx.dtype)


def divided_rows(
    tensors: list[Tensor],
    mu: float,
    ntp_divisor: Tensor,
    mixup_divisor: Tensor,
    options: Options,
    divides: DividedBy,
    asked: Asked,
) -> tuple[Tensor, ...]:
    """Return the NTP term and what `sftmix_rows` does, divided here unless backward does it."""
    if divides is not DividedBy.ROWS:
        early = ntp_divisor if divides is DividedBy.PRODUCTS else None
        mix_ratio = mu * ntp_divisor / mixup_divisor
        ntp, *others = sftmix_rows(*tensors, mix_ratio, *options, early, *asked)
        return divided_sum(ntp, ntp_divisor), ntp, *others
    hidden, weight, bias, labels, row_weight, *of_pairs = tensors
    rows = (hidden, weight, bias, labels, row_weight / ntp_divisor, *of_pairs)
    ntp, *others = sftmix_rows(*rows, mu / mixup_divisor, *options, None, *asked)
    return divided_sum(ntp, None), ntp * ntp_divisor, *others


class TilePairs(torch.autograd.Function):
    """What `NTPAndMixup` gives, by tiles; backward computes the logits again."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *tensors, mu, ntp_divisor, mixup_divisor, ctx.options = inputs
        losses, *state = sftmix_tiles(*tensors, mu * ntp_divisor / mixup_divisor, *ctx.options)
        ctx.save_for_backward(ntp_divisor, *tensors, *state)
        row_ntp = in_row_order(losses[:2], rows=tensors[3], num_rows=tensors[0].shape[0])
        ntp, mixup = divided_sum(row_ntp, ntp_divisor), divided_sum(losses[2], mixup_divisor)
        ctx.mark_non_differentiable(ntp, mixup, row_ntp)
        return ntp + mu * mixup, ntp, mixup, row_ntp

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        divisor, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad
        gradients = sftmix_tiles_backward(*tensors, list(needs[:3]), *ctx.options.backward)
        return handed_out(gradients, [upstream / divisor] * 3, needs, tensors[1].dtype)


def in_row_order(losses: Tensor, rows: Tensor, num_rows: int) -> Tensor:  # (R,)
    """Return losses (2, Q) of pairs of rows (2, Q) in the rows' order."""
    in_order = unwritten(losses, (rows.numel(),), losses.dtype)
    in_order[rows.reshape(-1)] = losses.reshape(-1)
    return in_order[:num_rows].clone()


def joint_losses(
    hidden: Tensor,  # (R, D)
    head: HeadPart,
    plan: PairPlan,
    mu: float,
    ntp_divisor: Tensor,
    mixup_divisor: Tensor,
    schedule: int | VocabTiles,
    objective: Objective = PLAIN,  # of the R rows' NTP
    stats: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, NTP, Mixup, the row losses of NTP, and stats, by the schedule chosen."""
    tensors, divisors = (hidden, head.weight, head.bias), (ntp_divisor, mixup_divisor)
    if not isinstance(schedule, VocabTiles):
        options = Options.of(head, schedule, hidden.shape[0], tensors)
        asked = Asked.of(objective, stats)
        return NTPAndMixup.apply(*tensors, *plan, mu, *divisors, options, *asked)  # type: ignore[no-any-return, no-untyped-call]
    no_stats = plan.row_weight.new_empty(3, 0)
    tiles = TileOptions.of(head, schedule)
    if plan.pair_c.numel():
        pairs = every_row_paired(plan)
        return *TilePairs.apply(*tensors, *pairs, mu, *divisors, tiles), no_stats  # type: ignore[no-untyped-call]
    # Without pairs the loss is bitwise that of the plain cross-entropy.
    targets, one = plan.labels.unsqueeze(-1), torch.ones_like(plan.row_weight).unsqueeze(-1)
    rows = RowInputs(hidden, None, head.weight, head.bias, targets, one, plan.row_weight)
    row_ntp = TileRows.apply(*rows, tiles)  # type: ignore[no-untyped-call]
    loss = divided_sum(row_ntp, ntp_divisor)
    return loss, loss.detach(), torch.zeros_like(loss), row_ntp.detach(), no_stats


def mixup_value(
    hidden: Tensor,  # (R, D)
    head: HeadPart,
    plan: PairPlan,
    divisor: Tensor,
    schedule: int | VocabTiles,
) -> Tensor:
    """Return the Mixup term without gradients, for logging where its weight is 0."""
    with torch.no_grad():
        loss, _ = reduced_loss(
            hidden[plan.pair_c],
            hidden[plan.pair_u],
            head,
            torch.stack((plan.labels[plan.pair_c], plan.labels[plan.pair_u]), dim=-1),
            plan.share,
            plan.pair_weight,
            "mean",
            divisor,
            schedule,
        )
        return loss


@overload
def fused_sftmix_loss(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (...) int64, already shifted
    pair_c: Tensor,  # (P,) int64 rows of hidden.reshape(-1, D)
    pair_u: Tensor,  # (P,) int64
    lam: float | Tensor,  # () or (P,)
    *,
    stats: Literal[False] = ...,
    **options: Unpack[SFTMixKeywords],
) -> SFTMixLoss: ...


@overload
def fused_sftmix_loss(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (...) int64, already shifted
    pair_c: Tensor,  # (P,) int64 rows of hidden.reshape(-1, D)
    pair_u: Tensor,  # (P,) int64
    lam: float | Tensor,  # () or (P,)
    *,
    stats: Literal[True],
    **options: Unpack[SFTMixKeywords],
) -> tuple[SFTMixLoss, TokenStats]: ...


def fused_sftmix_loss(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (...) int64, already shifted: labels[t] is what hidden[t] predicts
    pair_c: Tensor,  # (P,) int64 rows of hidden.reshape(-1, D)
    pair_u: Tensor,  # (P,) int64
    lam: float | Tensor,  # () or (P,)
    *,
    mu: float = 0.2,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    ntp_divisor: float | Tensor | None = None,
    mixup_divisor: float | Tensor | None = None,
    row_weight: Tensor | None = None,  # (...) float32
    gate: Gate | None = None,
    stats: bool = False,
    schedule: Schedule = "auto",
    vocab_parallel: VocabShard | None = None,
    row_ntp_out: Tensor | None = None,  # (...) float32
    validate: bool = False,
) -> SFTMixLoss | tuple[SFTMixLoss, TokenStats]:
    """Return ``NTP(all tokens) + mu * Mixup(pairs)``, for the matrix products of NTP.

    The LM head is linear, so the mixed logits are the interpolation of logits that NTP computes
    anyway (`reference.py` has the formula; arXiv 2410.05248 the method). No (N, V) logits are held.

    Example:
        Four tokens, of which the first two are mixed with each other and the last has no label:

        >>> hidden = torch.eye(3)[[0, 1, 2, 0]].requires_grad_()
        >>> weight = torch.arange(12.0).reshape(4, 3) / 4  # V = 4 tokens
        >>> labels = torch.tensor([3, 2, 1, -100])
        >>> pair_c, pair_u = torch.tensor([0]), torch.tensor([1])
        >>> loss, ntp, mixup = fused_sftmix_loss(hidden, weight, labels, pair_c, pair_u, lam=0.75)
        >>> print(f"{loss:.3f} = {ntp:.3f} + 0.2 * {mixup:.3f}")
        1.493 = 1.338 + 0.2 * 0.776
        >>> loss.backward()  # the gradients were made in the forward pass
        >>> hidden.grad.any(dim=-1).tolist()
        [True, True, True, False]

    Args:
        hidden: (..., D), what the LM head reads, in any shape such as (batch, length, D); float32,
            bfloat16 or float16.
        weight: (V, D), the LM head, in hidden's dtype and on its device.
        labels: (...) int64, already shifted: ``labels[t]`` is what ``hidden[t]`` predicts.
            ``ignore_index`` leaves a token out; another label outside ``[0, V)`` makes the row NaN,
            and the partner it is mixed with, of which a warning tells on the CPU.
        pair_c, pair_u: (P,) int64, rows of ``hidden.reshape(-1, D)`` mixed with each other, each
            row at most once: one that is there twice makes loss and gradients NaN, where values are
            not read. A pair of which one token is ignored is not mixed.
        lam: share of ``c``, in ``[0, 1]``: a number, or (P,) floating-point. Not differentiated:
            one that requires a gradient is refused, as such a divisor is.
        mu: weight of Mixup, at least 0. With 0, loss and gradients are bitwise NTP's.
        bias: (V,), in hidden's dtype, or None.
        logit_scale, softcap: of the head, ``softcap * tanh(logit_scale * x / softcap)``.
        ignore_index: the label that leaves a token out.
        ntp_divisor, mixup_divisor: replace the count of valid tokens and of mixed pairs, a number
            or a tensor () of one; a tensor of 0 counts as 1.
        row_weight, gate: those of `fused_cross_entropy`, (...) float32 and one of four, for the NTP
            term; a pair with a token of weight 0 is not mixed. Vocabulary tiles have no gate.
        stats: return ``(SFTMixLoss, TokenStats)``, as `fused_cross_entropy` does.
        schedule: ``"auto"``, ``"row_chunks"``, ``"vocab_tiles"`` (CUDA), or `RowChunks` or
            `VocabTiles` with other numbers.
        vocab_parallel: which part of the head this rank holds, as in `fused_mixup_loss`.
        row_ntp_out: (...) float32, filled with every token's NTP loss (0 where ignored), for
            logging.
        validate: refuse labels, pairs and lam out of range, which waits for the device.

    Returns:
        `SFTMixLoss`, ``(loss, ntp, mixup)``: float32 scalars in nats; ``ntp`` and ``mixup`` are
        detached. With ``stats`` that and the stats.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, and what came.
    """
    hidden, weight, bias = autocast(hidden, weight, bias)  # type: ignore[assignment]
    head = checked_head(hidden, weight, bias, logit_scale, softcap, vocab_parallel, schedule)
    check_ids("labels", labels, hidden)
    check_ignore_index(ignore_index)
    check_flag("stats", stats)
    check_number("mu", mu, 0.0)
    check_divisor("ntp_divisor", ntp_divisor)
    check_divisor("mixup_divisor", mixup_divisor)
    vocab_size = head.vocab_size
    check_label_values("labels", labels, vocab_size, ignore_index, validate=validate)
    check_pairs(pair_c, pair_u, labels, validate=validate)
    check_row_out("row_ntp_out", row_ntp_out, labels)
    lam = checked_lam(lam, pair_c, validate=validate)
    flat_hidden, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    targets, counts = label_terms(flat_labels, None, vocab_size, ignore_index)
    weights = is_there = counts
    if row_weight is not None:
        of_labels = counts.view(labels.shape)
        weights = checked_weights(row_weight, labels, of_labels, validate=validate).reshape(-1)
        is_there = present(weights)
    plan = ordered_pairs(targets.squeeze(-1), is_there, pair_c, pair_u, lam)
    if row_weight is not None:
        # The plan's are 1, 0, or NaN where a row is paired twice.
        plan = plan._replace(row_weight=both(weights, plan.row_weight))
    divisors = loss_divisor(ntp_divisor, counts), loss_divisor(mixup_divisor, plan.pair_weight)
    chosen = resolve_schedule(schedule, hidden, head.widest)
    objective = joint_objective(gate, labels, ignore_index, chosen)
    refuse_missing(objective, stats, head, chosen)
    if mu == 0:
        # Nothing of Mixup reaches the gradient, so no row is paired and NTP's own chunks run.
        mixup = mixup_value(flat_hidden, head, plan, divisors[1], chosen)
        plan = plan.without_pairs()
        loss, ntp, _, row_ntp, found = joint_losses(
            flat_hidden, head, plan, 0.0, *divisors, chosen, objective, stats
        )
    else:
        loss, ntp, mixup, row_ntp, found = joint_losses(
            flat_hidden, head, plan, float(mu), *divisors, chosen, objective, stats
        )
    if row_ntp_out is not None:
        row_ntp_out.copy_(row_ntp.reshape(labels.shape))
    losses = SFTMixLoss(loss, ntp, mixup)
    return (losses, token_stats(found, weights.view(labels.shape))) if stats else losses


def joint_objective(
    gate: Gate | None, labels: Tensor, ignore_index: int, schedule: int | VocabTiles
) -> Objective:
    """Return the objective of NTP's flat rows, which vocabulary tiles of pairs do not have."""
    if isinstance(schedule, VocabTiles) and gate is not None:
        raise ValueError(
            f"gate: expected None with VocabTiles, got {gate}; schedule='row_chunks' has gates"
        )
    objective = checked_objective(gate, 0.0, None, labels, ignore_index)
    old = objective.old_log_probs
    return objective if old is None else objective._replace(old_log_probs=old.reshape(-1))
