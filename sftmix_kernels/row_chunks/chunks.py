"""The rows of a chunk: how many, which, and the products that make logits of them.

Legend: R rows, K rows of one chunk, P pairs, S rows outside of pairs, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..gradients import Gradients, on_plain_cpu, weight_tiles
from ..schedules import FEWEST_ROWS, PADDING, logits_dtype, runs_triton
from ..terms import is_paired, single_rows


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


def counted_chunks(row_weight: Tensor, chunk_rows: int) -> list[Tensor | slice]:
    """Return the rows of each chunk that enter the matrix products.

    On the CPU these are the rows whose weight is not 0, each chunk (K,) int64. On an accelerator
    they are all rows, since the host would have to wait to learn how many count; callers that know
    gather first, as the trainer does.
    """
    if on_plain_cpu(row_weight):
        counted = row_weight.nonzero().squeeze(-1)
        return list(counted.split(chunk_sizes(counted.numel(), chunk_rows)))
    return list(consecutive(chunk_sizes(row_weight.numel(), chunk_rows)))


def consecutive(sizes: list[int]) -> Iterator[slice]:
    """Yield slices of these sizes, one after the other."""
    start = 0
    for size in sizes:
        yield slice(start, start + size)
        start += size


def counted_pairs(pair_weight: Tensor) -> Tensor | slice:  # (p,) int64
    """Return the pairs that are mixed on the CPU, elsewhere all: the host does not wait."""
    return pair_weight.nonzero().squeeze(-1) if on_plain_cpu(pair_weight) else slice(None)


def counted_singles(row_weight: Tensor, pair_c: Tensor, pair_u: Tensor) -> Tensor:  # (S,) int64
    """Return the rows outside of pairs, of which the CPU leaves out those of weight 0."""
    if on_plain_cpu(row_weight):
        return ((row_weight != 0) & ~is_paired(row_weight, pair_c, pair_u)).nonzero().squeeze(-1)
    return single_rows(row_weight, pair_c, pair_u)


def pair_chunks(num_pairs: int, sizes: list[int]) -> Iterator[tuple[slice, slice]]:
    """Yield the pairs and single rows of each chunk: pairs first, until there are no more."""
    pair = single = 0
    for size in sizes:
        some = slice(pair, min(pair + size // 2, num_pairs))
        pair = some.stop
        rest = slice(single, single + size - 2 * (some.stop - some.start))
        single = rest.stop
        yield some, rest


def joined(*parts: Tensor) -> Tensor:
    """Return the parts one after the other; one that is all there is as it is."""
    some = [part for part in parts if part.numel()]
    return torch.cat(some) if len(some) > 1 else (some or parts)[0]


def count_of(rows: Tensor | slice) -> int:
    """Return how many rows these are."""
    return rows.numel() if isinstance(rows, Tensor) else rows.stop - rows.start


def gather_rows(
    hidden: Tensor,  # (R, D)
    rows: Tensor | slice,  # (K,) int64
    weight: Tensor,  # (K,) float32
) -> Tensor:  # (K, D)
    """Return ``hidden[rows]``, 0 where the weight is 0: an ignored NaN must not reach ``dW``.

    They have the dtype of the logits.
    """
    if runs_triton(hidden):
        from ..scaling import scaled_rows

        out = hidden.new_empty(weight.numel(), hidden.shape[1])
        if isinstance(rows, slice):
            return scaled_rows(hidden[rows], out=out, weight=weight)
        return scaled_rows(hidden, out=out, rows=rows, weight=weight)
    counts = (weight != 0).unsqueeze(-1)
    if isinstance(rows, slice):
        return torch.where(counts, hidden[rows], 0.0).to(logits_dtype(hidden))
    gathered = hidden.index_select(0, rows).to(logits_dtype(hidden))
    return gathered.masked_fill_(~counts, 0.0)


def mixed_rows(
    hidden_c: Tensor,  # (R, D)
    hidden_u: Tensor | None,  # (R, D)
    share: Tensor,  # (R, 2) float32; not read where nothing is mixed
    rows: Tensor | slice,  # (K,) int64
    row_weight: Tensor,  # (R,) float32
) -> Tensor:  # (K, D)
    """Return ``lam h_c + (1 - lam) h_u`` of some rows, computed in float32.

    They are rounded at most once, to the dtype of the logits.
    """
    if hidden_u is None:
        return gather_rows(hidden_c, rows, row_weight[rows])
    if runs_triton(share):
        from . import mixing

        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=share.device)
        return mixing.mixed_rows(hidden_c, hidden_u, share, rows, row_weight)
    weight, (share_c, share_u) = row_weight[rows], share[rows].tensor_split(2, dim=-1)
    mixed = gather_rows(hidden_c, rows, weight).float().mul_(share_c)
    mixed.addcmul_(gather_rows(hidden_u, rows, weight).float(), share_u)
    return mixed.to(logits_dtype(hidden_c))


def fake_results(
    hidden: Tensor,
    weight: Tensor,
    needs_gradient: list[bool],
    chunk_rows: int,
    *,
    partial: bool,
    keeps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `Gradients.results` look like, for the fake kernels of ops of rows."""
    gradients = Gradients(
        hidden, weight, needs_gradient, 0, partial=partial, keeps=keeps, chunk_rows=chunk_rows
    )
    if keeps:
        gradients.weight = logits_workspace(weight, hidden.shape[0])
        gradients.gathered = hidden.new_empty(hidden.shape)
    return gradients.results


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
