"""The rows of a chunk: how many, which, and the products that make logits of them.

Legend: R rows, K rows of one chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gradients import weight_tiles
from ..schedules import FEWEST_ROWS, PADDING, logits_dtype, runs_triton


def chunk_sizes(num_rows: int, chunk_rows: int) -> list[int]:
    """Return the rows of each chunk: as few chunks as ``chunk_rows`` allows, of about equal size.

    5,000 rows in chunks of at most 4,096 are two of 2,500: a small last chunk would waste a pass
    over ``dW``. None has fewer than `FEWEST_ROWS` where there are as many, so that the size of
    chunks does not change the bits of row losses. All but the last are even, for pairs.
    """
    if num_rows == 0:
        return []
    num_chunks = max(1, min(-(-num_rows // chunk_rows), num_rows // (FEWEST_ROWS + 2)))
    twos, longer = divmod((num_rows + 1) // 2, num_chunks)
    sizes = [2 * twos + 2] * longer + [2 * twos] * (num_chunks - longer)
    sizes[-1] -= num_rows % 2
    return sizes


def counted_rows(weight: Tensor) -> Tensor:
    """Return the rows that enter the matrix products: (K,) int64.

    On the CPU these are the rows whose weight is not 0. On an accelerator they are all rows, since
    the host would have to wait to learn how many count; callers that know gather first, as the
    trainer does.
    """
    if weight.device.type == "cpu":
        return weight.nonzero().squeeze(-1)
    return torch.arange(weight.shape[0], device=weight.device)


def gather_rows(hidden: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Return ``hidden[rows]``, 0 where the weight is 0: an ignored NaN must not reach ``dW``.

    They have the dtype of the logits.
    """
    gathered = hidden.index_select(0, rows).to(logits_dtype(hidden))
    return gathered.masked_fill_((weight == 0).unsqueeze(-1), 0.0)


def mixed_rows(
    hidden_c: Tensor,  # (R, D)
    hidden_u: Tensor | None,  # (R, D)
    share: Tensor,  # (R, 2) float32; not read where nothing is mixed
    rows: Tensor,  # (K,) int64
    row_weight: Tensor,  # (R,) float32
) -> Tensor:  # (K, D)
    """Return ``lam h_c + (1 - lam) h_u`` of some rows, computed in float32.

    They are rounded at most once, to the dtype of the logits.
    """
    if hidden_u is None:
        return gather_rows(hidden_c, rows, row_weight[rows])
    if runs_triton(share):
        from . import kernels

        return kernels.mixed_rows(hidden_c, hidden_u, share, rows, row_weight)
    weight, (share_c, share_u) = row_weight[rows], share[rows].tensor_split(2, dim=-1)
    mixed = gather_rows(hidden_c, rows, weight).float().mul_(share_c)
    mixed.addcmul_(gather_rows(hidden_u, rows, weight).float(), share_u)
    return mixed.to(logits_dtype(hidden_c))


def logits_workspace(weight: Tensor, num_rows: int) -> Tensor:
    """Return room for the logits of some rows, (K, V).

    For kernels the rows are padded, so that each begins where a 16-byte load can: V is 50257 in
    GPT-2, and odd in many a model to which one token was added.
    """
    vocab_size = weight.shape[0]
    padding = -vocab_size % PADDING if runs_triton(weight) else 0
    room = weight.new_empty(num_rows, vocab_size + padding, dtype=logits_dtype(weight))
    return room[:, :vocab_size]


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, workspace: Tensor) -> Tensor:
    """Return the raw logits of a chunk, (K, V), which are the workspace's first K rows."""
    logits = workspace[: hidden.shape[0]]
    if weight.dtype == logits.dtype:
        project_(logits, hidden, weight, bias)
        return logits
    for tokens, tile in weight_tiles(weight):
        project_(logits[:, tokens], hidden, tile, None if bias is None else bias[tokens].float())
    return logits


def project_(logits: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Write ``hidden @ weight.t() + bias``, all of one dtype."""
    if bias is None:
        torch.mm(hidden, weight.t(), out=logits)
    else:
        torch.addmm(bias, hidden, weight.t(), out=logits)
