"""What the tests of the row kernels share: inputs, launches amid NaN, and dense PyTorch.

Legend: K rows, P pairs, T targets of a row, V vocabulary.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sftmix_kernels.row_chunks import cpu
from sftmix_kernels.transform import LogitTransform

from ..budget import check

PLAIN = LogitTransform(1.0, None, has_bias=False)
TRANSFORMS = (
    PLAIN,
    PLAIN._replace(has_bias=True),
    PLAIN._replace(scale=0.5),
    PLAIN._replace(softcap=5.0),
    LogitTransform(1.5, 3.0, has_bias=True),
)
INF, NAN = float("inf"), float("nan")
# In place of a device: the CPU, by the compiled ops.
COMPILED = "compiled"


class Rows(NamedTuple):
    """What `soft_rows_` reads."""

    logits: Tensor  # (K, V)
    targets: Tensor  # (K, T)
    share: Tensor | None  # (K, T)
    weight: Tensor  # (K,)


class Pairs(NamedTuple):
    """What `pair_rows_` reads."""

    logits: Tensor  # (2 P, V), rows of c before rows of u
    labels: Tensor  # (2 P,)
    row_weight: Tensor  # (2 P,)
    share: Tensor  # (P, 2)
    pair_weight: Tensor  # (P,)
    mix_ratio: Tensor  # ()


class Found(NamedTuple):
    """Weighted losses and the gradient of their sum; rows have no ``mixup``."""

    ntp: Tensor
    mixup: Tensor
    gradient: Tensor


def shares(lam: Tensor) -> Tensor:
    return torch.stack((lam, 1.0 - lam), dim=-1)


def some_rows(count: int, vocab_size: int, num_targets: int, dtype: torch.dtype) -> Rows:
    """Random rows; with two targets also lam 0 and 1, and two targets that are one token."""
    targets, lam = torch.randint(0, vocab_size, (count, num_targets)), torch.rand(count)
    lam[:2] = torch.tensor([0.0, 1.0])[:count]
    targets[2:3] = targets[2:3, :1]
    logits = (3.0 * torch.randn(count, vocab_size)).to(dtype)
    share = shares(lam) if num_targets == 2 else None
    return Rows(logits, targets, share, 0.5 + torch.rand(count))


def some_pairs(count: int, vocab_size: int, dtype: torch.dtype = torch.float32) -> Pairs:
    """`some_rows` with two targets, those of the rows themselves."""
    rows = some_rows(count, vocab_size, 2, dtype)
    assert rows.share is not None
    logits = torch.cat((rows.logits, (3.0 * torch.randn(count, vocab_size)).to(dtype)))
    row_weight, ratio = 0.5 + torch.rand(2 * count), torch.tensor(0.37)
    return Pairs(logits, rows.targets.t().reshape(-1), row_weight, rows.share, rows.weight, ratio)


def amid_nan(tensor: Tensor, device: str, columns: int = 0) -> Tensor:
    """A copy with a row of NaN before and after it, and columns of NaN on both sides."""
    if tensor.dim() == 1:
        return F.pad(tensor, (1, 1), value=NAN).to(device)[1:-1]
    buffer = F.pad(tensor, (columns, columns, 1, 1), value=NAN).to(device)
    return buffer[1:-1, columns : columns + tensor.shape[1]]


def take(view: Tensor) -> Tensor:
    """What a kernel left in a view of `amid_nan`; all around it must still be NaN."""
    found = view.detach().clone().cpu()
    assert view._base is not None
    assert view.fill_(NAN)._base.isnan().all()  # type: ignore[union-attr]
    return found


def ops_of(device: str) -> ModuleType:
    """What has `soft_rows_` and `pair_rows_`: the compiled ops, or the Triton kernels."""
    if device == COMPILED:
        return cpu
    from sftmix_kernels.row_chunks import kernels  # Triton exists only on Linux

    return kernels


def place_of(device: str) -> str:
    return "cpu" if device == COMPILED else device


def run_rows(
    rows: Rows, transform: LogitTransform, device: str, *, needs_gradient: bool = True
) -> Found:
    place = place_of(device)
    logits = amid_nan(rows.logits, place, columns=5)
    share = None if rows.share is None else amid_nan(rows.share, place)
    targets, weight = rows.targets.to(place), amid_nan(rows.weight, place)
    loss = ops_of(device).soft_rows_(logits, targets, share, weight, transform, needs_gradient)
    return Found(loss.cpu(), torch.empty(0), take(logits))


def run_pairs(
    pairs: Pairs, transform: LogitTransform, device: str, *, needs_gradient: bool = True
) -> Found:
    place = place_of(device)
    logits = amid_nan(pairs.logits, place, columns=5)
    ntp, mixup = ops_of(device).pair_rows_(
        logits,
        pairs.labels.to(place),
        amid_nan(pairs.row_weight, place),
        amid_nan(pairs.share, place),
        amid_nan(pairs.pair_weight, place),
        pairs.mix_ratio.to(place),
        transform,
        needs_gradient,
    )
    return Found(ntp.cpu(), mixup.cpu(), take(logits))


def as_rows(pairs: Pairs) -> Rows:
    """The rows of pairs, unmixed."""
    return Rows(pairs.logits, pairs.labels.unsqueeze(-1), None, pairs.row_weight)


def cross_entropies(
    logits: Tensor, targets: Tensor, share: Tensor | None, transform: LogitTransform
) -> Tensor:
    """``-sum_t share_t log p[target_t]`` of raw logits, in dense PyTorch."""
    logits = logits * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    log_p = logits.log_softmax(-1).gather(-1, targets)
    return -(log_p if share is None else share.to(log_p) * log_p).sum(-1)


def dense(inputs: Rows | Pairs, transform: LogitTransform, *, double: bool = False) -> Found:
    """The same in dense PyTorch, in float32 or float64, logits rounded to their dtype."""
    leaf = inputs.logits.double() if double else inputs.logits.clone()
    logits = leaf.requires_grad_().to(torch.promote_types(leaf.dtype, torch.float32))
    if isinstance(inputs, Rows):
        losses = cross_entropies(logits, inputs.targets, inputs.share, transform)
        ntp, mixup, total = inputs.weight.to(logits) * losses, torch.empty(0), 0.0
    else:
        labels, share = inputs.labels.unsqueeze(-1), inputs.share.to(logits)
        logits_c, logits_u = logits.chunk(2)
        mixed = share[:, :1] * logits_c + share[:, 1:] * logits_u
        both = torch.cat(labels.chunk(2), dim=-1)
        ntp = inputs.row_weight.to(logits) * cross_entropies(logits, labels, None, transform)
        mixup = inputs.pair_weight.to(logits) * cross_entropies(mixed, both, share, transform)
        total = inputs.mix_ratio.to(logits) * mixup.sum()
    (ntp.sum() + total).backward()
    assert leaf.grad is not None
    return Found(ntp.detach(), mixup.detach(), leaf.grad)


def assert_in_budget(found: Found, inputs: Rows | Pairs, transform: LogitTransform) -> None:
    """Hold the kernel to the budget, with PyTorch's error on 200 more rows of the same kind.

    The interpreter is slow: few rows are run, too few to say how far off PyTorch is.
    """
    truth, vocab_size = dense(inputs, transform, double=True), inputs.logits.shape[1]
    more: Rows | Pairs = some_pairs(100, vocab_size, inputs.logits.dtype)
    if isinstance(inputs, Rows):
        more = some_rows(200, vocab_size, inputs.targets.shape[1], inputs.logits.dtype)
    torchs, exact = dense(more, transform), dense(more, transform, double=True)
    for name, ours, true, plain, plain_true in zip(
        Found._fields, found, truth, torchs, exact, strict=True
    ):
        check(name, ours, true, plain.double() - plain_true)


def assert_same_bits(found: Found, expected: Found) -> None:
    for name, one, other in zip(Found._fields, found, expected, strict=True):
        assert torch.equal(one, other), name
