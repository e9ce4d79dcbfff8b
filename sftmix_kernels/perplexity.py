"""Per-example perplexity in one pass over the vocabulary, a chunk of logits at a time.

Legend: R tokens, D hidden size, V vocabulary, S examples, C checkpoints.

Each token keeps a running maximum ``m``, a sum of exponentials ``s`` and its target's logit ``t``;
a chunk with maximum ``m'`` and sum ``s'`` is merged by ``s = s exp(m - M) + s' exp(m' - M)``,
``M = max(m, m')``. The token's loss is ``log s - (t - m)``, an example's perplexity
``exp(sum of losses / number of tokens)``, in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import (
    autocast,
    check_count,
    check_head,
    check_ids,
    check_label_values,
    values_are_free,
)
from .reference import label_weight, weighted_loss
from .row_chunks import LogitTransform, chunk_sizes, counted_rows, gather_rows

# Rows of one pass: 512 x 8192 float32 logits are 16 MiB.
ROWS = 512


@torch.library.custom_op("sftmix_kernels::token_nll", mutates_args=())
def token_nll(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (R,) int64 in [0, V)
    row_weight: Tensor,  # (R,) float32; a row of weight 0 is left out
    logit_scale: float,
    softcap: float | None,
    vocab_chunk: int,
) -> Tensor:  # (R,) float32
    """Weighted token losses ``LSE(a) - a[label]``."""
    transform = LogitTransform(logit_scale, softcap, has_bias=bias is not None)
    loss = torch.zeros_like(row_weight)
    with torch.autocast(weight.device.type, enabled=False):
        counted = counted_rows(row_weight)
        for rows in counted.split(chunk_sizes(counted.numel(), ROWS)):
            gathered = gather_rows(hidden, rows, row_weight[rows])
            target = labels[rows].unsqueeze(-1)
            peak = torch.full_like(target, -torch.inf, dtype=torch.float32)
            total, target_logit = torch.zeros_like(peak), torch.zeros_like(peak)
            for start in range(0, weight.shape[0], vocab_chunk):
                logits = chunk_logits(gathered, weight, bias, start, vocab_chunk, transform)
                new_peak = torch.maximum(peak, logits.amax(-1, keepdim=True))
                # A chunk masked as a whole (bias -inf) has no peak: -inf - -inf would be NaN.
                base = new_peak.masked_fill(new_peak == -torch.inf, 0.0)
                column = target - start
                inside = (column >= 0) & (column < logits.shape[1])
                found = logits.gather(-1, column.clamp(0, logits.shape[1] - 1))
                target_logit = torch.where(inside, found, target_logit)
                total = total * (peak - base).exp()
                total += logits.sub_(base).exp_().sum(-1, keepdim=True)
                peak = new_peak
            losses = (total.log() - (target_logit - peak)).squeeze(-1)
            loss[rows] = weighted_loss(row_weight[rows], losses)
    return loss


@token_nll.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_weight: Tensor,
    logit_scale: float,
    softcap: float | None,
    vocab_chunk: int,
) -> Tensor:
    return torch.empty_like(row_weight)


def chunk_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    start: int,
    vocab_chunk: int,
    transform: LogitTransform,
) -> Tensor:
    """Float32 logits of vocabulary entries ``[start, start + vocab_chunk)``."""
    part = slice(start, start + vocab_chunk)
    logits = torch.nn.functional.linear(hidden, weight[part], None if bias is None else bias[part])
    logits = logits.float()
    transform.apply_(logits, needs_slope=False)
    return logits


def sample_sums(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    sample_ids: Tensor,
    num_samples: int,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    vocab_chunk: int = 8192,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sum of token losses (S,) float64 and number of tokens (S,) int64 of each example.

    A sample id outside ``[0, S)`` is refused where its value is free to read, and otherwise makes
    every sum NaN.
    """
    hidden, weight, bias = autocast(hidden, weight, bias)  # type: ignore[assignment]
    check_head(hidden, weight, bias, logit_scale, softcap)
    check_ids("labels", labels, hidden)
    check_ids("sample_ids", sample_ids, hidden)
    check_count("num_samples", num_samples, 0)
    check_count("vocab_chunk", vocab_chunk, 1)
    ids, flat_labels = sample_ids.reshape(-1), labels.reshape(-1)
    outside = (ids < 0) | (ids >= num_samples)
    if (validate or values_are_free(ids)) and outside.any():
        raise ValueError(
            f"sample_ids: expected values in [0, {num_samples}), got {int(ids[outside][0])}"
        )
    if validate:
        check_label_values("labels", labels, weight.shape[0], ignore_index)
    row_weight = label_weight(flat_labels, weight.shape[0], ignore_index)
    with torch.no_grad():
        losses = token_nll(
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            bias,
            flat_labels.clamp(0, weight.shape[0] - 1),
            row_weight,
            float(logit_scale),
            softcap,
            vocab_chunk,
        )
    # One slot more takes what is outside. index_put_ adds up in a fixed order on every device.
    slots = torch.where(outside, num_samples, ids)
    total = losses.new_zeros(num_samples + 1, dtype=torch.float64)
    total.index_put_((slots,), losses.double(), accumulate=True)
    count = torch.zeros_like(total, dtype=torch.int64)
    count.index_put_((slots,), (row_weight != 0).long(), accumulate=True)
    poison = torch.where(count[num_samples] > 0, torch.nan, 0.0).double()
    return total[:num_samples] + poison, count[:num_samples]


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
    vocab_chunk: int = 8192,
    validate: bool = False,
) -> Tensor:  # (S,) float64
    """Perplexity of each example, ``exp(mean token loss)``, without holding (N, V) logits.

    No gradient. ``vocab_chunk`` is how many vocabulary entries are projected at a time. An example
    without a token that counts gets NaN, and so does one with a label outside ``[0, V)``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, and what came.
    """
    total, count = sample_sums(
        hidden,
        weight,
        labels,
        sample_ids,
        num_samples,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
        vocab_chunk=vocab_chunk,
        validate=validate,
    )
    return (total / count).exp()


class StreamingPerplexity:
    """Perplexities of a data set at several checkpoints, kept on the device as sums.

    Call `update` for every batch (an example may arrive in several), then `end_checkpoint` once the
    whole data set has been seen; repeat for each of the C checkpoints.
    """

    def __init__(self, num_samples: int, device: torch.device | str) -> None:
        check_count("num_samples", num_samples, 0)
        self.num_samples = num_samples
        self.device = torch.device(device)
        self._closed: list[Tensor] = []
        self._num_tokens: Tensor | None = None
        self._reset()

    def _reset(self) -> None:
        self._sum = torch.zeros(self.num_samples, dtype=torch.float64, device=self.device)
        self._count = torch.zeros(self.num_samples, dtype=torch.int64, device=self.device)

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
        vocab_chunk: int = 8192,
        validate: bool = False,
    ) -> None:
        """Add a batch's token losses to its examples; arguments as `streaming_perplexity`."""
        total, count = sample_sums(
            hidden,
            weight,
            labels,
            sample_ids,
            self.num_samples,
            bias=bias,
            logit_scale=logit_scale,
            softcap=softcap,
            ignore_index=ignore_index,
            vocab_chunk=vocab_chunk,
            validate=validate,
        )
        self._sum += total
        self._count += count

    def end_checkpoint(self) -> None:
        """Close one scoring of the data set.

        Raises:
            ValueError: an example had another number of tokens than at the first checkpoint.
        """
        if self._num_tokens is None:
            self._num_tokens = self._count
        elif not torch.equal(self._num_tokens, self._count):
            sample = int((self._num_tokens != self._count).nonzero()[0])
            raise ValueError(
                f"end_checkpoint: expected {int(self._num_tokens[sample])} tokens of example "
                f"{sample} as at the first checkpoint, got {int(self._count[sample])}"
            )
        self._closed.append(self._sum)
        self._reset()

    @property
    def nll_sum(self) -> Tensor:
        """Sum of token losses in nats, (S, C) float64."""
        if not self._closed:
            return torch.empty(self.num_samples, 0, dtype=torch.float64, device=self.device)
        return torch.stack(self._closed, dim=1)

    @property
    def num_tokens(self) -> Tensor:
        """Tokens that count in each example, (S,) int64; so far, during the first checkpoint."""
        return self._count if self._num_tokens is None else self._num_tokens

    @property
    def perplexity(self) -> Tensor:
        """``exp(nll_sum / num_tokens)``, (S, C) float64; NaN where an example has no token."""
        return (self.nll_sum / self.num_tokens.unsqueeze(-1)).exp()

    @property
    def confidence(self) -> Tensor:
        """Minus the mean perplexity over checkpoints, (S,) float64 (arXiv 2410.05248)."""
        return -self.perplexity.mean(-1)

    @property
    def variability(self) -> Tensor:
        """Standard deviation over checkpoints (population), (S,) float64; inf where one is."""
        perplexity, mean = self.perplexity, -self.confidence.unsqueeze(-1)
        deviation = (perplexity - mean).square().mean(-1).sqrt()
        return deviation.masked_fill(perplexity.isinf().any(-1), torch.inf)

    def state_dict(self) -> dict[str, Tensor]:
        """The closed checkpoints as tensors, for safetensors."""
        return {"nll_sum": self.nll_sum, "num_tokens": self.num_tokens}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back closed checkpoints; an unfinished one starts anew.

        Raises:
            ValueError: the state is of another number of examples.
        """
        nll_sum, num_tokens = state["nll_sum"].to(self.device), state["num_tokens"].to(self.device)
        if num_tokens.shape != (self.num_samples,) or nll_sum.shape[0] != self.num_samples:
            raise ValueError(
                f"state: expected {self.num_samples} examples, got {tuple(nll_sum.shape)}"
            )
        self._closed = list(nll_sum.unbind(1))
        self._num_tokens = num_tokens if self._closed else None
        self._reset()
