"""`VocabShard`: which rows of the LM head are this rank's, where a group shares them out.

`losses.py` has the losses. Legend: D hidden size, V vocabulary of the group, W tokens of
this rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from ..checks import check_count, check_head
from ..schedules import RowChunks, Schedule


class VocabShard:
    """Tokens ``[start, stop)`` of the vocabulary are this rank's; all ranks make theirs together.

    Making one is a collective call of the group, as ``torch.distributed.new_group`` is: the ranks
    tell each other their bounds once, and no loss has to ask again. Make it beside the head and
    keep it. Shards may be of any size, also empty, and in any order. The head of this rank is
    (W, D) with W >= stop - start, in place of (V, D).

    Example:
        The second of two ranks, of a vocabulary of 32,000 (``torch.distributed`` is initialised):

            shard = VocabShard(16_000, 32_000)
            loss = fused_cross_entropy(hidden, weight, labels, vocab_parallel=shard)

    Args:
        start, stop: the tokens whose rows the head of this rank begins with. Rows beyond
            ``stop - start`` are padding: no tokens, with gradients of exactly 0.
        group: the process group that shares the head, of which this rank is a member; None for
            all ranks.

    Attributes:
        vocab_size: tokens of the whole group.
        widest: tokens of the largest shard.

    Raises:
        TypeError, ValueError: a bound that is no integer; a group that is none, or before
            ``torch.distributed`` is initialised; on all ranks alike, bounds that are negative, out
            of order, or leave gaps or overlap.
    """

    def __init__(self, start: int, stop: int, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                f"group: expected torch.distributed to be initialised first, got {group!r}"
            )
        group = dist.group.WORLD if group is None else group
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "group: expected a process group that this rank is a member of, "
                f"got {type(group).__name__}"
            )
        for name, bound in (("start", start), ("stop", stop)):
            # The values are checked on all ranks together, so that none is left waiting.
            check_count(name, bound, -(2**63))
        self.start, self.stop, self.group = int(start), int(stop), group
        self.group_name = group.group_name
        shards: list[tuple[int, int]] = [(0, 0)] * group.size()
        dist.all_gather_object(shards, (self.start, self.stop), group=group)
        check_bounds(shards)
        self.vocab_size = max(stop for _, stop in shards)
        self.widest = max(stop - start for start, stop in shards)

    def __repr__(self) -> str:
        return f"VocabShard({self.start}, {self.stop}, {self.group_name!r})"


def check_bounds(shards: list[tuple[int, int]]) -> None:
    """Refuse bounds unless every token from 0 on is in exactly one rank's ``[start, stop)``."""
    for rank, (start, stop) in enumerate(shards):
        if not 0 <= start <= stop:
            raise ValueError(
                f"start, stop: expected 0 <= start <= stop, got {start} and {stop} on rank {rank} "
                "of the group"
            )
    expected = 0
    for start, stop in sorted(shard for shard in shards if shard[0] < shard[1]):
        if start != expected:
            raise ValueError(
                "start, stop: expected every token of the vocabulary on one rank of the group, "
                f"got {'a gap' if start > expected else 'an overlap'} at token "
                f"{min(start, expected)} of {shards}"
            )
        expected = stop
    if expected == 0:
        raise ValueError(f"start, stop: expected a vocabulary with tokens, got {shards}")


class HeadPart(NamedTuple):
    """This process's part of the LM head, and which part that is."""

    weight: Tensor  # (W, D)
    bias: Tensor | None  # (W,)
    vocab_size: int  # V
    widest: int  # the most tokens that a process has, which bounds the bytes of chunks
    logit_scale: float
    softcap: float | None
    start: int = 0  # the first token of this process
    group: str | None = None  # name of the group; None where this process has the whole head


def checked_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    vocab_parallel: VocabShard | None,
    schedule: Schedule,
    *,
    name: str = "hidden",
) -> HeadPart:
    """Check what a public function was given for the head; leave padding out.

    The bias it returns is contiguous, as kernels read it.
    """
    if vocab_parallel is None:
        check_head(hidden, weight, bias, logit_scale, softcap, name=name)
        size = weight.shape[0]
        bias = None if bias is None else bias.contiguous()
        return HeadPart(weight, bias, size, size, float(logit_scale), softcap)
    if not isinstance(vocab_parallel, VocabShard):
        raise TypeError(
            f"vocab_parallel: expected a VocabShard, got {type(vocab_parallel).__name__}"
        )
    if schedule not in ("auto", "row_chunks") and not isinstance(schedule, RowChunks):
        raise ValueError(
            "schedule: expected 'auto', 'row_chunks' or RowChunks(...) with vocab_parallel, "
            f"got {schedule!r}"
        )
    shard, width = vocab_parallel, vocab_parallel.stop - vocab_parallel.start
    check_head(hidden, weight, bias, logit_scale, softcap, name=name, fewest_tokens=width)
    if weight.shape[0] > width:
        weight, bias = weight[:width], None if bias is None else bias[:width]
    bias = None if bias is None else bias.contiguous()
    return HeadPart(
        weight,
        bias,
        shard.vocab_size,
        shard.widest,
        float(logit_scale),
        softcap,
        shard.start,
        shard.group_name,
    )
