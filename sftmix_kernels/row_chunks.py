"""The ``row_chunks`` schedule: logits of a chunk of rows, turned into gradients in place.

A chunk's logits come from the vendor GEMM; its row losses and logit gradients are found in place,
block by block while the block sits in cache; ``dH`` and ``dW`` follow by vendor GEMMs, all in the
forward pass. Full (N, V) logits never exist. `reference.py` has the derivation.

Legend: R rows, K rows of one chunk, B rows of one cache block, T targets of a row, D hidden size,
V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .schedules import FEWEST_ROWS, runs_triton

Backward = Callable[..., tuple[Tensor | None, ...]]

# Triton vectorises accesses of rows whose stride 16 divides.
PADDING = 16

# MKL's vector maths gets ready at its first call. Where that was made by two threads at once, one
# half of an `exp` was off by 1.5e-4 in about one process of five (torch 2.13): one number takes one
# thread.
for first_call in (torch.exp, torch.tanh, torch.log1p):
    first_call(torch.zeros(1))


class LogitTransform(NamedTuple):
    """``f(x) = cap * tanh(scale * x / cap)``, or ``scale * x`` where there is no cap."""

    scale: float
    softcap: float | None
    has_bias: bool  # whether raw logits may be -inf, a vocabulary entry masked by its bias

    def apply_(self, logits: Tensor, needs_slope: bool) -> Tensor | None:
        """Turn raw logits into ``f(raw)`` in place; return ``f' / scale`` where it is not 1."""
        if self.softcap is None:
            if self.scale != 1.0:
                logits.mul_(self.scale)
            return None
        logits.mul_(self.scale / self.softcap).tanh_()
        slope = None
        if needs_slope:
            # (1 - t)(1 + t): 1 - t^2 cancels where the cap is nearly reached.
            slope = logits.neg().add_(1.0)
            slope.addcmul_(slope, logits)
        logits.mul_(self.softcap)
        return slope


class TargetColumns(NamedTuple):
    """The shares of a row's targets. Both may be the same token: its column carries both shares."""

    share: Tensor  # (B, T) float32, summing to 1
    column_share: Tensor  # (B, T): of all targets in this target's column
    same: Tensor  # (B, T, T): 1 where two targets are the same token

    def held(self, exp_at: Tensor) -> Tensor:
        """What of the targets' exponentials is kept out of the row's sum.

        A target without a share (lam is 0 or 1) stays in like any other: bitwise the plain loss.
        """
        return exp_at.masked_fill(self.column_share == 0, 0.0)

    def finish(
        self, log_p: Tensor, exp_at: Tensor, rest: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:  # (B,), (B, 1), (B, T)
        """Loss, sum of all exponentials, and that times the gradient at the targets.

        ``log_p`` are the targets' logits less the row's peak, ``exp_at`` their exponentials, and
        ``rest`` (B, 1) is the sum of all exponentials but those held.
        """
        held = self.held(exp_at)
        held_sum = (held / self.same.sum(-1)).sum(-1, keepdim=True)
        log_p = log_p - torch.log1p(rest + (held_sum - 1.0))
        others = rest + ((1.0 - self.same) * held.unsqueeze(-2)).sum(-1)
        at_targets = exp_at * (1.0 - self.column_share) - self.column_share * others
        return -(self.share * log_p).sum(-1), rest + held_sum, at_targets


def target_columns(targets: Tensor, share: Tensor) -> TargetColumns:
    """From token ids (B, T) and shares (B, T)."""
    same = (targets.unsqueeze(-1) == targets.unsqueeze(-2)).float()
    return TargetColumns(share, (same * share.unsqueeze(-2)).sum(-1), same)


def soft_cross_entropy_(
    logits: Tensor,  # (B, V) float32 raw logits; holds the gradient afterwards
    targets: Tensor,  # (B, T) int64 in [0, V)
    share: Tensor,  # (B, T) float32, summing to 1
    weight: Tensor,  # (B,) float32
    transform: LogitTransform,
    needs_gradient: bool,
) -> Tensor:  # (B,) float32
    """Row losses ``-sum_t share_t log p[target_t]``; logits become ``weight * d loss / d raw``.

    The exponentials of targets are kept out of the row's sum: of a confident token that leaves the
    sum of all others, from which ``p - 1`` and ``log p`` follow without cancelling.
    """
    slope = transform.apply_(logits, needs_gradient)
    peak = logits.amax(-1, keepdim=True)
    log_p = logits.gather(-1, targets) - peak
    exp_at = logits.sub_(peak).exp_().gather(-1, targets)
    columns = target_columns(targets, share)
    rest = logits.scatter_(-1, targets, exp_at - columns.held(exp_at)).sum(-1, keepdim=True)
    loss, total, at_targets = columns.finish(log_p, exp_at, rest)
    if needs_gradient:
        factor = (weight * transform.scale).unsqueeze(-1) / total
        logits.mul_(factor).scatter_(-1, targets, factor * at_targets)
        if slope is not None:
            logits.mul_(slope)
    return loss


def pair_cross_entropy_(
    logits: tuple[Tensor, Tensor],  # two (B, V) float32 raw logits; gradients afterwards
    labels: tuple[Tensor, Tensor],  # two (B,) int64 in [0, V)
    share: Tensor,  # (B, 2) float32: lam and 1 - lam
    ntp_weight: tuple[Tensor, Tensor],  # two (B,) float32
    mix_weight: Tensor,  # (B,) float32
    transform: LogitTransform,
    workspace: Tensor,  # (>= B, V) float32, for the mixed logits
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # NTP of c, NTP of u, Mixup: (B,) float32 each
    """The three losses of a pair of rows; both logits become ``G_c`` and ``G_u`` in place."""
    share_c, share_u = share.tensor_split(2, dim=-1)
    mixed = mixed_logits(logits, share, transform.has_bias, workspace)
    mixup = soft_cross_entropy_(
        mixed, torch.stack(labels, dim=-1), share, mix_weight, transform, needs_gradient
    )
    ntp_c, ntp_u = (
        cross_entropy_(a, y, w, transform, needs_gradient)
        for a, y, w in zip(logits, labels, ntp_weight, strict=True)
    )
    if needs_gradient:
        logits[0].addcmul_(mixed, share_c)
        logits[1].addcmul_(mixed, share_u)
    return ntp_c, ntp_u, mixup


def mixed_logits(
    logits: tuple[Tensor, Tensor],  # two (B, V)
    share: Tensor,  # (B, 2)
    has_bias: bool,
    workspace: Tensor,  # (>= B, V)
) -> Tensor:  # (B, V)
    """``share_c a_c + share_u a_u`` of raw logits, in the workspace's first rows."""
    share_c, share_u = share.tensor_split(2, dim=-1)
    mixed = torch.mul(logits[0], share_c, out=workspace[: share.shape[0]])
    mixed.addcmul_(logits[1], share_u)
    if has_bias:
        # 0 * -inf is NaN: where one share is 0, the mixture is the other row.
        torch.where(share_u == 0, logits[0], mixed, out=mixed)
        torch.where(share_c == 0, logits[1], mixed, out=mixed)
    return mixed


def cross_entropy_(
    logits: Tensor,  # (B, V) float32
    labels: Tensor,  # (B,) int64 in [0, V)
    weight: Tensor,  # (B,) float32
    transform: LogitTransform,
    needs_gradient: bool,
) -> Tensor:  # (B,) float32
    """`soft_cross_entropy_` with one target."""
    targets = labels.unsqueeze(-1)
    share = torch.ones_like(targets, dtype=torch.float32)
    return soft_cross_entropy_(logits, targets, share, weight, transform, needs_gradient)


def cache_blocks(
    start: int, stop: int, logits: Tensor, block_bytes: int = 2**21
) -> Iterator[slice]:
    """Slices of rows whose float32 logits take about 2 MiB, so that every pass hits a cache.

    NTP + Mixup at D = 512, V = 32000 on two cores with 2 MiB of L2 each, in turns: 2.15 s with
    1 MiB, 2.19 s with 2 MiB, quartiles overlapping.

    A last row alone joins the block before it: PyTorch sums a single long row over threads, in
    another order, and then the bits of a row's loss would hang on its place in the chunk.
    """
    step = max(2, block_bytes // (4 * logits.shape[1]))
    while start < stop:
        end = stop if stop - start <= step + 1 else start + step
        yield slice(start, end)
        start = end


class Gradients:
    """The gradients of one op call, filled chunk by chunk; what is not needed is not allocated.

    ``hidden`` (R, D) in its own dtype, or in float32 where ranks add theirs up; ``weight`` (V, D)
    and ``bias`` (V,) in float32, since sums over many chunks diverge in bfloat16.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        needs_gradient: list[bool],
        num_rows: int,
        *,
        partial: bool = False,
    ) -> None:
        self.needs_hidden, self.needs_weight, self.needs_bias = needs_gradient
        self.needed = any(needs_gradient)
        self.first = True
        dtype = torch.float32 if partial else hidden.dtype
        self.hidden = hidden.new_zeros(hidden.shape if self.needs_hidden else 0, dtype=dtype)
        # The first chunk overwrites dW, so that only an op without rows has to clear it.
        shape = weight.shape if self.needs_weight else (0,)
        self.weight = weight.new_empty(shape, dtype=torch.float32)
        if num_rows == 0:
            self.weight.zero_()
        self.bias = weight.new_zeros(weight.shape[0] if self.needs_bias else 0, dtype=torch.float32)

    def add_chunk(self, gradient: Tensor, hidden: Tensor, weight: Tensor, rows: Tensor) -> None:
        """Add ``dH[rows] = G W``, ``dW += G^T H`` and ``db += sum G`` of one chunk's ``G``."""
        if self.needs_hidden:
            self.hidden.index_copy_(0, rows, product(gradient, weight, self.hidden.dtype))
        if self.needs_weight:
            add_product_(self.weight, gradient.t(), hidden, overwrite=self.first)
        if self.needs_bias:
            self.bias += gradient.sum(0, dtype=torch.float32)
        self.first = False


def first_order_only(backward: Backward) -> Backward:
    """Refuse ``create_graph=True`` in a Function's backward.

    PyTorch's ``once_differentiable`` lets it pass where the upstream gradient is a constant, and a
    gradient penalty would then silently be without gradient.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the fused losses cannot be differentiated twice: expected create_graph=False, "
                "or `sftmix_kernels.reference` for second derivatives"
            )
        return backward(ctx, *upstream)

    return checked


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``factor * gradient``, computed in float32 and rounded once to ``dtype``."""
    # With a dimension the factor takes part in type promotion; without, it would be rounded to
    # the gradient's dtype before the product.
    factor = factor if factor.dim() else factor.reshape(1)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left @ right`` in their own dtype, or in float32 without rounding to theirs."""
    if left.dtype == dtype:
        return left @ right
    total = left.new_empty(left.shape[0], right.shape[1], dtype=dtype)
    add_product_(total, left, right, overwrite=True)
    return total


def add_product_(total: Tensor, left: Tensor, right: Tensor, *, overwrite: bool) -> None:
    """``total += left @ right`` in float32, with no temporary of total's size."""
    if left.is_cuda and left.dtype != torch.float32:
        if overwrite:
            torch.mm(left, right, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, left.float(), right.float(), beta=0 if overwrite else 1, out=total)


def load_rows(logits: Tensor, rows: slice) -> Tensor:
    """Some rows of logits in float32: a view where they are float32 already."""
    return logits[rows].float()


def store_rows_(logits: Tensor, rows: slice, gradient: Tensor) -> None:
    """Put the gradient of `load_rows`'s rows back, rounded once; a view is there already."""
    if logits.dtype != torch.float32:
        logits[rows] = gradient


def logits_workspace(weight: Tensor, num_rows: int) -> Tensor:
    """Room for logits of some rows, (K, V).

    For kernels the rows are padded, so that each begins where a 16-byte load can: V of GPT-2 is
    50257, and of any model with one token added it is odd.
    """
    vocab_size = weight.shape[0]
    padding = -vocab_size % PADDING if runs_triton(weight) else 0
    return weight.new_empty(num_rows, vocab_size + padding)[:, :vocab_size]


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, workspace: Tensor) -> Tensor:
    """Raw logits of a chunk, (K, V) in hidden's dtype, in the workspace's first K rows."""
    logits = workspace[: hidden.shape[0]]
    if bias is None:
        return torch.mm(hidden, weight.t(), out=logits)
    return torch.addmm(bias, hidden, weight.t(), out=logits)


def counted_rows(weight: Tensor) -> Tensor:
    """Rows that enter the matrix products: (K,) int64.

    On the CPU those whose weight is not 0. On an accelerator all of them, since to know how many
    count would make the host wait for the device; callers that know gather first, as the
    trainer does.
    """
    if weight.device.type == "cpu":
        return weight.nonzero().squeeze(-1)
    return torch.arange(weight.shape[0], device=weight.device)


def chunk_sizes(num_rows: int, chunk_rows: int) -> list[int]:
    """Rows of each chunk: as few chunks as ``chunk_rows`` allows, of about equal size.

    A small last chunk would waste a pass over ``dW``. None has fewer than `FEWEST_ROWS` where there
    are as many, so that the size of chunks does not change the bits of row losses. All but the last
    are even, for pairs.
    """
    if num_rows == 0:
        return []
    num_chunks = max(1, min(-(-num_rows // chunk_rows), num_rows // (FEWEST_ROWS + 2)))
    twos, more = divmod((num_rows + 1) // 2, num_chunks)
    sizes = [2 * (twos + (chunk < more)) for chunk in range(num_chunks)]
    sizes[-1] -= num_rows % 2
    return sizes


def gather_rows(hidden: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """``hidden[rows]`` with zeros where the weight is 0: an ignored NaN must not reach ``dW``."""
    return hidden.index_select(0, rows).masked_fill_((weight == 0).unsqueeze(-1), 0.0)


def mixed_rows(
    hidden: list[Tensor], share: Tensor, rows: Tensor, row_weight: Tensor
) -> Tensor:  # (K, D)
    """``sum_t share_t hidden_t`` of some rows, in float32, rounded once to hidden's dtype."""
    if len(hidden) == 1:
        return gather_rows(hidden[0], rows, row_weight[rows])
    first, second = hidden
    if runs_triton(share):
        from .triton import row_chunks

        return row_chunks.mixed_rows(first, second, share, rows, row_weight)
    first, second = (gather_rows(h, rows, row_weight[rows]).float() for h in hidden)
    share_first, share_second = share[rows].tensor_split(2, dim=-1)
    return (first * share_first + second * share_second).to(hidden[0].dtype)


def present(*tensors: Tensor | None) -> list[Tensor]:
    """The tensors that are not None."""
    return [tensor for tensor in tensors if tensor is not None]


def input_gradients(
    ctx: Any, gradients: list[Tensor], share: Tensor, scale: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden_c, hidden_u, weight and bias from those of the mixed rows."""
    mixed, weight, bias = gradients
    one = share.shape[1] == 1
    factors = [scale] if one else [share_t * scale for share_t in share.tensor_split(2, dim=-1)]
    hidden = [
        scaled(mixed, factor, ctx.dtype) if needed else None
        for factor, needed in zip(factors, ctx.needs_input_grad, strict=False)
    ]
    return (
        *hidden,
        *((None,) if one else ()),
        scaled(weight, scale, ctx.dtype) if ctx.needs_input_grad[2] else None,
        scaled(bias, scale, ctx.dtype) if ctx.needs_input_grad[3] else None,
    )
