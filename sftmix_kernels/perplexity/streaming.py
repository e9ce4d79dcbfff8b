"""Per-example perplexity in one pass over the vocabulary, a chunk of logits at a time.

Legend: R tokens, K tokens of one block, D hidden size, V vocabulary, S examples, C checkpoints.

For a block of tokens, each chunk of logits comes from the vendor GEMM into one workspace that stays
in cache, and is folded into the tokens' running softmax (`online_softmax.py`). Chunks depend on the
device alone, so that a token's bits do not depend on the batch it comes in. A token's loss is
``log(sum of exp) - logit of its label``, an example's perplexity
``exp(sum of losses / number of tokens)``, in float64.

- Formula: `reference.py`.
- Kernels: `csrc/online_softmax_kernels.cuh`; on the CPU `csrc/online_softmax_cpu.cpp`.
- Proof: `tests/sftmix_kernels/perplexity/test_streaming.py`; of the kernels
  `tests/sftmix_kernels/perplexity/test_online_softmax.py`.
- Time: `benchmarks/bench_perplexity.py`; of the kernels `benchmarks/bench_online_softmax.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce

from ..checks import (
    autocast,
    check_count,
    check_head,
    check_ids,
    check_ignore_index,
    check_label_values,
    check_tensor,
    values_are_free,
)
from ..schedules import PADDING
from .online_softmax import new_state, nothing

# Bytes of the CPU's workspace, whose logits are read from the cache again, and columns of a chunk.
# Many rows by few columns are the fastest products: at 4,096 tokens, D = 512, V = 32,000 on two
# cores of an AMD EPYC (AVX-512) 0.74 s, where 8,192 columns of half as many rows took 0.87 s.
CPU_WORKSPACE = 2**23
CPU_CHUNK = 2048
# Rows and columns of the output tile that one SM computes at a time. Blocks are multiples of the
# rows where they can be.
GEMM_TILE, GEMM_COLUMNS = 128, 256
# Row tiles whose columns fill the SMs once by default. SMs come in fours on the data center chips
# (108, 132, 148), so that none is idle; on 132 of them chunks have 8448 columns.
WAVE_TILES = 4


def add_sample_losses(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (R,) int64
    sample_ids: Tensor,  # (R,) int64
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    vocab_chunk: int | None,
    nll_sum: Tensor,  # (S,) float64; updated
    num_tokens: Tensor,  # (S,) int64; updated
) -> None:
    """Add the losses of tokens whose label is not ``ignore_index``, and their number."""
    if hidden.device.type == "cpu":
        # Ignored tokens need no product. On an accelerator the host would have to wait for their
        # number; callers that know it gather first.
        counted = (labels != ignore_index).nonzero().squeeze(-1)
        if counted.shape != labels.shape:
            hidden, labels, sample_ids = hidden[counted], labels[counted], sample_ids[counted]
    with torch.autocast(weight.device.type, enabled=False):
        state = token_states(hidden, weight, bias, labels, logit_scale, softcap, vocab_chunk)
    order = sample_ids.argsort(stable=True)
    torch.ops.sftmix_kernels.add_token_losses(
        state, labels, ignore_index, sample_ids, order, nll_sum, num_tokens
    )


# For compiled graphs. Eager calls go past it: it takes the host 0.2 ms, as long as everything else
# does for a batch of few tokens.
add_sample_losses_op = torch.library.custom_op(
    "sftmix_kernels::add_sample_losses",
    add_sample_losses,
    mutates_args=("nll_sum", "num_tokens"),
)
add_sample_losses_op.register_fake(nothing)


def token_states(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (R,) int64
    logit_scale: float,
    softcap: float | None,
    vocab_chunk: int | None,
) -> Tensor:  # (3, R) float32
    """Return the states of tokens after the whole vocabulary."""
    state = new_state(hidden.shape[0], hidden)
    # Each part of the bias begins where a 16-byte load can, whatever view it came as.
    chunk = chunk_columns(hidden, weight.shape[0], vocab_chunk)
    bias = None if bias is None else bias.clone(memory_format=torch.contiguous_format)
    rows = block_rows(hidden, chunk)
    workspace = hidden.new_empty(rows, round_up(chunk, PADDING))
    blocks = zip(hidden.split(rows), labels.split(rows), state.split(rows, 1), strict=True)
    for block, block_labels, block_state in blocks if hidden.shape[0] else ():
        for start in range(0, weight.shape[0], chunk):
            part = weight[start : start + chunk]
            logits = workspace[: block.shape[0], : part.shape[0]]
            torch.mm(block, part.t(), out=logits)
            torch.ops.sftmix_kernels.fold_logits(
                logits,
                None if bias is None else bias[start : start + chunk],
                block_labels,
                start,
                logit_scale,
                softcap,
                block_state,
            )
    return state


def chunk_columns(hidden: Tensor, vocab_size: int, vocab_chunk: int | None) -> int:
    """Return the vocabulary entries of one chunk, by default `CPU_CHUNK` or `wave_columns`."""
    if vocab_chunk is None:
        vocab_chunk = CPU_CHUNK
        if hidden.is_cuda:
            vocab_chunk = wave_columns(properties(hidden).multi_processor_count)
    return min(round_up(vocab_chunk, PADDING), vocab_size)


def block_rows(hidden: Tensor, chunk: int) -> int:
    """Return the tokens of one block whose chunk of logits fits the workspace.

    On the CPU blocks are few and of about equal size. On CUDA the workspace is half of L2, beside
    the operands that the GEMM streams through it.
    """
    num_rows, row_bytes = max(1, hidden.shape[0]), chunk * hidden.element_size()
    if not hidden.is_cuda:
        most = max(1, CPU_WORKSPACE // row_bytes)
        num_blocks = -(-num_rows // most)
        return min(num_rows, most, round_up(-(-num_rows // num_blocks), GEMM_TILE))
    device = properties(hidden)
    most = max(1, device.L2_cache_size // 2 // row_bytes)
    return min(num_rows, wave_rows(most, chunk, device.multi_processor_count))


def wave_columns(processors: int) -> int:
    """Return the columns of a chunk of which `WAVE_TILES` row tiles are a wave.

    A wave is what the SMs compute at once, a tile each.
    """
    return GEMM_COLUMNS * max(1, processors // WAVE_TILES)


def wave_rows(most: int, chunk: int, processors: int) -> int:
    """Return the rows, at most ``most``, whose tiles are a whole number of waves.

    On 132 SMs 1,536 rows of 8,448 columns are 3 waves of 396 tiles; 1,664 x 8,192 would be 416
    tiles in 4.
    """
    wave = GEMM_TILE * max(1, processors // -(-chunk // GEMM_COLUMNS))
    # Where a wave does not fit, whole tiles; where one does not, what fits.
    whole = next(rows for rows in (wave, GEMM_TILE, 1) if rows <= most)
    return most // whole * whole


def properties(hidden: Tensor) -> Any:
    """Return what PyTorch knows of the device."""
    return torch.cuda.get_device_properties(hidden.device)


def round_up(number: int, multiple: int) -> int:
    """Return the least multiple that is not smaller."""
    return -(-number // multiple) * multiple


def new_sums(num_samples: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return sums of losses (S,) float64 and numbers of tokens (S,) int64, all 0."""
    check_count("num_samples", num_samples, 0)
    nll_sum = torch.zeros(num_samples, dtype=torch.float64, device=device)
    return nll_sum, torch.zeros_like(nll_sum, dtype=torch.int64)


class StreamingPerplexity:
    """Perplexities of a data set at several checkpoints, kept on the device as sums.

    Call `update` for every batch (an example may arrive in several, in any order), then
    `end_checkpoint` once the whole data set has been seen; repeat for each of the C checkpoints.
    Token losses are rounded to 2^-32 nats before they are added, so that sums below 2^21 nats are
    exact: batches, order and ranks do not change their bits.

    Example:
        Two examples at one checkpoint:

        >>> hidden, weight = torch.eye(3), torch.arange(12.0).reshape(4, 3) / 4
        >>> labels, sample_ids = torch.tensor([3, 2, 0]), torch.tensor([0, 0, 1])
        >>> scores = StreamingPerplexity(num_samples=2, device="cpu")
        >>> scores.update(hidden, weight, labels, sample_ids)
        >>> scores.end_checkpoint()
        >>> scores.num_tokens.tolist(), scores.confidence
        ([2, 1], tensor([ -2.6203, -17.0864], dtype=torch.float64))

    Args:
        num_samples: S, the examples of the data set.
        device: where the sums are, and what `update` is given.

    Raises:
        TypeError, ValueError: ``num_samples`` is no integer of at least 0.
    """

    def __init__(self, num_samples: int, device: torch.device | str) -> None:
        self.num_samples = num_samples
        self.device = torch.device(device)
        self._closed: list[Tensor] = []
        self._num_tokens: Tensor | None = None
        self._open()

    def _open(self) -> None:
        self._sum, self._count = new_sums(self.num_samples, self.device)
        self._outside = torch.zeros((), dtype=torch.bool, device=self.device)

    def update(
        self,
        hidden: Tensor,  # (..., D)
        weight: Tensor,  # (V, D)
        labels: Tensor,  # (...) int64, already shifted
        sample_ids: Tensor,  # (...) int64
        *,
        bias: Tensor | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        ignore_index: int = -100,
        vocab_chunk: int | None = None,
        validate: bool = False,
    ) -> None:
        """Add a batch's token losses to its examples.

        Arguments, with their shapes, and errors are those of `streaming_perplexity`: hidden
        (..., D), weight (V, D), labels and sample_ids (...) int64. A sample id outside ``[0, S)``
        that is not refused here is refused by `end_checkpoint`.
        """
        hidden, weight, bias = autocast(hidden, weight, bias)  # type: ignore[assignment]
        check_head(hidden, weight, bias, logit_scale, softcap)
        if hidden.device.type == "meta":
            raise ValueError(
                "hidden: expected values, whose perplexity is asked for, got the meta device; the "
                "three losses take it"
            )
        check_ids("labels", labels, hidden)
        check_ignore_index(ignore_index)
        check_ids("sample_ids", sample_ids, hidden)
        if hidden.device != self._sum.device:
            raise ValueError(
                f"hidden: expected the sums' device {self._sum.device}, got {hidden.device}"
            )
        if vocab_chunk is not None:
            check_count("vocab_chunk", vocab_chunk, 1)
        self._see(sample_ids, labels != ignore_index, validate=validate)
        check_label_values("labels", labels, weight.shape[0], ignore_index, validate=validate)
        add = add_sample_losses_op if torch.compiler.is_compiling() else add_sample_losses
        with torch.no_grad():
            add(
                hidden.reshape(-1, hidden.shape[-1]),
                weight,
                bias,
                labels.reshape(-1).contiguous(),
                sample_ids.reshape(-1).contiguous(),
                float(logit_scale),
                None if softcap is None else float(softcap),
                ignore_index,
                vocab_chunk,
                self._sum,
                self._count,
            )

    def _see(self, sample_ids: Tensor, counts: Tensor, *, validate: bool = False) -> None:
        """Refuse an id outside ``[0, S)`` of a token that counts, or remember that one came."""
        outside = counts & ((sample_ids < 0) | (sample_ids >= self.num_samples))
        if (validate or values_are_free(sample_ids)) and outside.any():
            raise ValueError(
                f"sample_ids: expected values in [0, {self.num_samples}), "
                f"got {int(sample_ids[outside][0])}"
            )
        self._outside |= outside.any()

    def add(
        self,
        losses: Tensor,  # (...) nats
        sample_ids: Tensor,  # (...) int64, in [0, S)
    ) -> None:
        """Add token losses made elsewhere, rounded as those of `update`; all of them count.

        Raises:
            TypeError, ValueError: sample ids of another dtype, shape or device, or outside
                ``[0, S)``, as `update` refuses them.
        """
        check_tensor("losses", losses)
        check_ids("sample_ids", sample_ids, losses.unsqueeze(-1), "losses")
        losses, sample_ids = losses.detach().float().reshape(-1), sample_ids.reshape(-1)
        self._see(sample_ids, losses.new_ones((), dtype=torch.bool))
        # A state of which the loss is log(1) - (0 - loss).
        state = torch.stack([losses, torch.ones_like(losses), torch.zeros_like(losses)])
        order = sample_ids.argsort(stable=True)
        torch.ops.sftmix_kernels.add_token_losses(
            state, torch.zeros_like(sample_ids), -100, sample_ids, order, self._sum, self._count
        )

    def end_checkpoint(self, group: ProcessGroup | None = None) -> None:
        """Close one scoring of the data set; with a process group, add up what its ranks saw.

        Raises:
            ValueError: a sample id was outside ``[0, S)``, or an example had another number of
                tokens than at the first checkpoint.
        """
        if group is not None:
            outside = self._outside.long()
            for sums in (self._sum, self._count, outside):
                all_reduce(sums, group=group)
            self._outside = outside != 0
        if self._outside:
            raise ValueError(f"sample_ids: expected values in [0, {self.num_samples})")
        if self._num_tokens is None:
            self._num_tokens = self._count
        elif not torch.equal(self._num_tokens, self._count):
            sample = int((self._num_tokens != self._count).nonzero()[0])
            raise ValueError(
                f"end_checkpoint: expected {int(self._num_tokens[sample])} tokens of example "
                f"{sample} as at the first checkpoint, got {int(self._count[sample])}"
            )
        self._closed.append(self._sum)
        self._open()

    @property
    def nll_sum(self) -> Tensor:
        """The sums of token losses in nats, (S, C) float64."""
        if not self._closed:
            return torch.empty(self.num_samples, 0, dtype=torch.float64, device=self.device)
        return torch.stack(self._closed, dim=1)

    @property
    def num_tokens(self) -> Tensor:
        """The tokens of each example that count, (S,) int64; those so far in the first one."""
        return self._count if self._num_tokens is None else self._num_tokens

    def open_perplexity(self) -> Tensor:
        """Return the perplexities of the open checkpoint so far, (S,) float64.

        All are NaN where a sample id was outside ``[0, S)``.
        """
        return (self._sum / self._count).exp().masked_fill(self._outside, torch.nan)

    @property
    def started(self) -> Tensor:
        """Which examples have a token in the open checkpoint, (S,) bool."""
        return self._count > 0

    @property
    def perplexity(self) -> Tensor:
        """``exp(nll_sum / num_tokens)``, (S, C) float64; NaN where an example has no token."""
        return (self.nll_sum / self.num_tokens.unsqueeze(-1)).exp()

    @property
    def confidence(self) -> Tensor:
        """The negative mean perplexity over checkpoints, (S,) float64 (arXiv 2410.05248)."""
        return -self.perplexity.mean(-1)

    @property
    def variability(self) -> Tensor:
        """The population standard deviation of perplexity over checkpoints, (S,) float64.

        It is infinite where a perplexity is.
        """
        perplexity, mean = self.perplexity, -self.confidence.unsqueeze(-1)
        deviation = (perplexity - mean).square().mean(-1).sqrt()
        return deviation.masked_fill(perplexity.isinf().any(-1), torch.inf)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of all sums, of closed checkpoints and of the open one, for safetensors."""
        state = {
            "nll_sum": self.nll_sum,
            "num_tokens": self.num_tokens,
            "open_nll_sum": self._sum,
            "open_num_tokens": self._count,
            "open_outside": self._outside,
        }
        return {name: tensor.clone().contiguous() for name, tensor in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state_dict`, in the middle of a checkpoint too.

        Raises:
            ValueError: the state has another number of examples, or lacks a tensor.
        """
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise ValueError(f"state: expected {', '.join(sorted(missing))}, got none")
        for name in ("nll_sum", "num_tokens", "open_nll_sum", "open_num_tokens"):
            if state[name].shape[0] != self.num_samples:
                raise ValueError(
                    f"state: expected {self.num_samples} examples, "
                    f"got {state[name].shape[0]} of {name}"
                )
        state = {name: tensor.to(self.device, copy=True) for name, tensor in state.items()}
        self._closed = [column.contiguous() for column in state["nll_sum"].unbind(1)]
        self._num_tokens = state["num_tokens"] if self._closed else None
        self._sum, self._count = state["open_nll_sum"], state["open_num_tokens"]
        self._outside = state["open_outside"]


def streaming_perplexity(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (...) int64, already shifted
    sample_ids: Tensor,  # (...) int64: which example each token belongs to
    num_samples: int,
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    vocab_chunk: int | None = None,
    validate: bool = False,
) -> Tensor:  # (S,) float64
    """Return the perplexity of each example, ``exp(mean token loss)``, without (N, V) logits.

    No gradient. Tokens are in any shape (...), in any order; D is the hidden size, V the
    vocabulary, S the number of examples.

    Example:
        Two tokens of example 0 and one of example 1:

        >>> hidden, weight = torch.eye(3), torch.arange(12.0).reshape(4, 3) / 4
        >>> labels, sample_ids = torch.tensor([3, 2, 0]), torch.tensor([0, 0, 1])
        >>> streaming_perplexity(hidden, weight, labels, sample_ids, num_samples=2)
        tensor([ 2.6203, 17.0864], dtype=torch.float64)

    Args:
        hidden: (..., D), what the LM head reads; float32, bfloat16 or float16.
        weight: (V, D), the LM head, in hidden's dtype and on its device.
        labels: (...) int64, already shifted. ``ignore_index`` leaves a token out; another label
            outside ``[0, V)`` makes its example NaN, of which a warning tells on the CPU.
        sample_ids: (...) int64, which example each token belongs to. One outside ``[0, S)`` of a
            token that counts is refused, or makes every perplexity NaN where the host would have to
            wait to see it (on an accelerator, without ``validate``).
        num_samples: S.
        bias: (V,), in hidden's dtype, or None.
        logit_scale, softcap: of the head, ``softcap * tanh(logit_scale * x / softcap)``.
        ignore_index: the label that leaves a token out.
        vocab_chunk: how many vocabulary entries are projected at a time, rounded up to a multiple
            of 16; by default 2,048 on the CPU, and on CUDA 64 for each SM, so that products keep
            all SMs busy (`block_rows`).
        validate: refuse labels out of range, which waits for the device.

    Returns:
        (S,) float64; NaN for an example without a token that counts.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, and what came.
    """
    state = StreamingPerplexity(num_samples, getattr(hidden, "device", "cpu"))
    state.update(
        hidden,
        weight,
        labels,
        sample_ids,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
        vocab_chunk=vocab_chunk,
        validate=validate,
    )
    return state.open_perplexity()
