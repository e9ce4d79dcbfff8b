"""Compute per-example perplexity in every way, check it against float64, and fold logits.

Legend: N tokens, S examples, D hidden size, V vocabulary, K rows and C columns of a chunk of
logits.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sftmix_kernels import reference, streaming_perplexity
from sftmix_kernels.budget import Budget, budget
from sftmix_kernels.extension import build_info
from sftmix_kernels.perplexity import online_softmax
from sftmix_kernels.perplexity import streaming as perplexity
from sftmix_kernels.schedules import PADDING

from .measure import SuiteError
from .records import DENSE_PERPLEXITY, OPERATIONS, STREAMING, TORCH_PERPLEXITY

# Vocabulary entries that ours projects at a time by default.
VOCAB_CHUNK: int = inspect.signature(streaming_perplexity).parameters["vocab_chunk"].default
TOKENS_OF_EXAMPLE = 64


class Tokens(NamedTuple):
    """Tokens of examples that follow one another."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    labels: Tensor  # (N,)
    sample_ids: Tensor  # (N,)
    num_samples: int


Perplexity = Callable[[Tokens], Tensor]  # (S,) float64


def make_tokens(
    num_tokens: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Tokens:
    """Return seeded random tokens with logits of about unit size."""
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size, device=device)
    weight = torch.randn(vocab_size, hidden_size, device=device) / hidden_size**0.5
    labels = torch.randint(0, vocab_size, (num_tokens,), device=device)
    sample_ids = torch.arange(num_tokens, device=device) // TOKENS_OF_EXAMPLE
    num_samples = -(-num_tokens // TOKENS_OF_EXAMPLE)
    return Tokens(hidden.to(dtype), weight.to(dtype), labels, sample_ids, num_samples)


def ours(x: Tokens, vocab_chunk: int = VOCAB_CHUNK) -> Tensor:
    """Compute ours."""
    return streaming_perplexity(*x, vocab_chunk=vocab_chunk)


def workspace(x: Tokens, vocab_chunk: int) -> Tensor:
    """Return our workspace: room for the logits of one block and one chunk."""
    columns = min(vocab_chunk, x.weight.shape[0])
    rows = perplexity.block_rows(x.hidden, columns)
    return x.hidden.new_empty(rows, -(-columns // PADDING) * PADDING)


def chunks_of_logits(
    x: Tokens,
    vocab_chunk: int,
    use: Callable[[Tensor, slice, int], object],  # logits, which rows, first column
) -> None:
    """Compute the products of ours, in its blocks and chunks."""
    room, vocab_size = workspace(x, vocab_chunk), x.weight.shape[0]
    for first in range(0, x.labels.shape[0], room.shape[0]):
        rows = slice(first, first + room.shape[0])
        block = x.hidden[rows]
        for start in range(0, vocab_size, vocab_chunk):
            part = x.weight[start : start + vocab_chunk]
            logits = room[: block.shape[0], : part.shape[0]]
            use(torch.mm(block, part.t(), out=logits), rows, start)


def bare(x: Tokens, vocab_chunk: int = VOCAB_CHUNK) -> None:
    """Compute only the products: no way of finding perplexities in these chunks can beat them."""
    chunks_of_logits(x, vocab_chunk, lambda logits, rows, start: None)


def dense(x: Tokens) -> Tensor:
    """Compute what a user writes: all logits at once."""
    losses = F.cross_entropy(F.linear(x.hidden, x.weight).float(), x.labels, reduction="none")
    return of_examples(losses, x)


def of_examples(losses: Tensor, x: Tokens) -> Tensor:  # (S,) float64
    """Return ``exp(mean of the losses)`` of each example."""
    sums = losses.new_zeros(x.num_samples, dtype=torch.float64)
    sums.index_add_(0, x.sample_ids, losses.double())
    return (sums / x.sample_ids.bincount(minlength=x.num_samples)).exp()


@contextlib.contextmanager
def unwarned() -> Iterator[None]:
    """Silence the warning that an op runs on PyTorch operations: here it is meant to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="sftmix_kernels: ")
        yield


@unwarned()
def in_operations(x: Tokens) -> Tensor:
    """Compute ours as it runs without its extension."""
    state = online_softmax.new_state(x.labels.shape[0], x.hidden)
    nll_sum, num_tokens = perplexity.new_sums(x.num_samples, x.hidden.device)

    def fold(logits: Tensor, rows: slice, start: int) -> None:
        online_softmax.fold_logits(logits, None, x.labels[rows], start, 1.0, None, state[:, rows])

    chunks_of_logits(x, VOCAB_CHUNK, fold)
    order = x.sample_ids.argsort(stable=True)
    online_softmax.add_token_losses(state, x.labels, -100, x.sample_ids, order, nll_sum, num_tokens)
    return (nll_sum / num_tokens).exp()


def torch_chunked() -> Perplexity:
    """Return PyTorch's own loss in chunks of rows."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"torch {torch.__version__} has no LinearCrossEntropyOptions")
    options = torch.nn.LinearCrossEntropyOptions()

    def call(x: Tokens) -> Tensor:
        head = (x.hidden, x.weight, x.labels)
        return of_examples(F.linear_cross_entropy(*head, reduction="none", options=options), x)

    return call


def providers() -> tuple[dict[str, Perplexity], dict[str, str]]:
    """Return all that find perplexities, and why one is left out."""
    found: dict[str, Perplexity] = {
        STREAMING: ours,
        DENSE_PERPLEXITY: dense,
        OPERATIONS: in_operations,
    }
    try:
        return {**found, TORCH_PERPLEXITY: torch_chunked()}, {}
    except ImportError as reason:
        return found, {TORCH_PERPLEXITY: str(reason)}


def require_compiled(device: str) -> dict[str, str]:
    """Return facts about the extension.

    Raises:
        SuiteError: it is not built, or not for this device.
    """
    info = build_info()
    if info is None:
        raise SuiteError(
            "sftmix_kernels._extension is not built: `python setup.py build_ext --inplace`"
        )
    if device != "cpu" and not info["cuda"]:
        raise SuiteError(
            "sftmix_kernels._extension has no CUDA kernels: it was built without nvcc, or beside a "
            "torch without CUDA"
        )
    return info


def passed(used: Budget) -> Budget:
    """Return the budget.

    Raises:
        SuiteError: an error is over it.
    """
    if not used.holds:
        raise SuiteError(f"losses are over the error budget: {used.says}")
    return used


def check(call: Perplexity, x: Tokens) -> Budget:
    """Return the error of log-perplexities, of single tokens and of the examples."""
    num_tokens = x.labels.shape[0]
    ids = torch.arange(num_tokens, device=x.labels.device)
    single = x._replace(sample_ids=ids, num_samples=num_tokens)
    doubles = {"hidden": x.hidden.double(), "weight": x.weight.double()}
    truth = reference.perplexity(*single._replace(**doubles)).log()
    plain_error = reference.perplexity(*single).log() - truth
    # Perplexities come in float64; the logits that they are of are no better than float32.
    tokens = budget(call(single).log().float(), truth, plain_error)
    of_examples = call(x).log() - reference.perplexity(*x._replace(**doubles)).log()
    # The maximum of a tensor keeps a NaN.
    worst = torch.cat((of_examples.abs(), of_examples.new_tensor([tokens.largest]))).max()
    return tokens._replace(largest=float(worst))


class Fold(NamedTuple):
    """A chunk of logits in memory, and the states that it is folded into."""

    logits: Tensor  # (K, C), in rows as ours pads them
    bias: Tensor | None  # (C,)
    labels: Tensor  # (K,)
    softcap: float | None
    state: Tensor  # (3, K)

    def compiled(self) -> None:
        """Run the compiled op."""
        torch.ops.sftmix_kernels.fold_logits(*self.arguments())

    @unwarned()
    def operations(self) -> None:
        """Run the same by PyTorch operations."""
        online_softmax.fold_logits(*self.arguments())

    def arguments(self) -> tuple[Tensor, Tensor | None, Tensor, int, float, float | None, Tensor]:
        """Return the op's arguments."""
        return self.logits, self.bias, self.labels, 0, 1.0, self.softcap, self.state

    def check(self) -> Budget:
        """Return the error of the compiled op's token losses on the first rows, from new states."""
        rows = slice(0, 256)
        small = self._replace(logits=self.logits[rows], labels=self.labels[rows])
        found = []
        for one in (Fold.compiled, Fold.operations):
            state = online_softmax.new_state(small.labels.shape[0], small.logits)
            one(small._replace(state=state))
            peak, total, target = state.double()
            found.append((total.log() + peak - target).float())
        logits = small.logits.double()
        if self.bias is not None:
            logits = logits + self.bias.double()
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        truth = F.cross_entropy(logits, small.labels, reduction="none")
        ours, plain = found
        return budget(ours, truth, plain - truth)


def make_fold(
    num_rows: int,
    num_columns: int,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    softcap: float | None = None,
    bias: bool = False,
) -> Fold:
    """Return a fold of random logits of unit size."""
    torch.manual_seed(0)
    like = {"dtype": dtype, "device": device}
    padded = torch.empty(num_rows, -(-num_columns // PADDING) * PADDING, **like).normal_()
    labels = torch.randint(0, num_columns, (num_rows,), device=device)
    return Fold(
        padded[:, :num_columns],
        torch.randn(num_columns, **like) if bias else None,
        labels,
        softcap,
        online_softmax.new_state(num_rows, padded),
    )
