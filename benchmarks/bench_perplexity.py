"""Time the perplexity of each example, without gradients: ours beside what a user would write.

Timed are the calls of `calls`: ours, all logits at once, and PyTorch's own loss in chunks; ours run
by PyTorch operations; and `bare`, only the products of ours, which nobody can beat. Each is checked
against float64 first. Figures: "perplexity" in RESULTS.md and README.

Legend: N tokens, S examples, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sftmix_kernels import reference, streaming_perplexity
from sftmix_kernels.budget import Budget, budget
from sftmix_kernels.extension import build_info
from sftmix_kernels.perplexity import online_softmax
from sftmix_kernels.perplexity import streaming as perplexity
from sftmix_kernels.schedules import PADDING
from tools.peak_memory import peak_extra_bytes

from . import records as names
from .inputs import make_inputs
from .measure import SuiteError, interleaved_samples
from .peers import torch_chunked
from .result_file import Results
from .settings import QUICK, Case, Settings

TOKENS_OF_EXAMPLE = 64
CHECKED_TOKENS = 256
# Head and tokens of each device.
SIZES = {"cpu": ("small", 4096), "cuda": ("Llama-3.1-8B", 8192)}


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
    """Return seeded random tokens, an even number, with logits of about unit size."""
    x = make_inputs(num_tokens // 2, hidden_size, vocab_size, dtype, device)
    sample_ids = torch.arange(num_tokens, device=device) // TOKENS_OF_EXAMPLE
    num_samples = -(-num_tokens // TOKENS_OF_EXAMPLE)
    return Tokens(x.hidden.detach(), x.weight.detach(), x.labels, sample_ids, num_samples)


def ours(x: Tokens) -> Tensor:
    """Compute ours."""
    return streaming_perplexity(*x)


def dense(x: Tokens) -> Tensor:
    """Compute what a user writes: all logits at once."""
    losses = F.cross_entropy(F.linear(x.hidden, x.weight).float(), x.labels, reduction="none")
    return of_examples(losses, x)


def of_examples(losses: Tensor, x: Tokens) -> Tensor:  # (S,) float64
    """Return ``exp(mean of the losses)`` of each example."""
    sums = losses.new_zeros(x.num_samples, dtype=torch.float64)
    sums.index_add_(0, x.sample_ids, losses.double())
    return (sums / x.sample_ids.bincount(minlength=x.num_samples)).exp()


def chunks_of_logits(
    x: Tokens,
    use: Callable[[Tensor, slice, int], object],  # logits, which rows, first column
    vocab_chunk: int | None = None,
    rows: int | None = None,
) -> None:
    """Compute the products of ours in its chunks and blocks, or in those that are named."""
    (num_tokens, _), vocab_size = x.hidden.shape, x.weight.shape[0]
    columns = perplexity.chunk_columns(x.hidden, vocab_size, vocab_chunk)
    rows = rows or perplexity.block_rows(x.hidden, columns)
    room = x.hidden.new_empty(rows, -(-columns // PADDING) * PADDING)
    for first in range(0, num_tokens, rows):
        some = slice(first, first + rows)
        block = x.hidden[some]
        for start in range(0, vocab_size, columns):
            part = x.weight[start : start + columns]
            logits = room[: block.shape[0], : part.shape[0]]
            use(torch.mm(block, part.t(), out=logits), some, start)


def bare(x: Tokens, vocab_chunk: int | None = None, rows: int | None = None) -> None:
    """Compute only the products: no way of finding perplexities in these chunks can beat them."""
    chunks_of_logits(x, lambda *_: None, vocab_chunk, rows)


def folded(x: Tokens, ops: Any, vocab_chunk: int | None = None, rows: int | None = None) -> Tensor:
    """Compute ours by compiled ``ops``, or by `online_softmax`, which has them in PyTorch."""
    state = online_softmax.new_state(x.labels.shape[0], x.hidden)
    nll_sum, num_tokens = perplexity.new_sums(x.num_samples, x.hidden.device)

    def use(logits: Tensor, some: slice, start: int) -> None:
        ops.fold_logits(logits, None, x.labels[some], start, 1.0, None, state[:, some])

    chunks_of_logits(x, use, vocab_chunk, rows)
    order = x.sample_ids.argsort(stable=True)
    ops.add_token_losses(state, x.labels, -100, x.sample_ids, order, nll_sum, num_tokens)
    return (nll_sum / num_tokens).exp()


@contextlib.contextmanager
def unwarned() -> Iterator[None]:
    """Silence the warning that an op runs on PyTorch operations: here it is meant to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="sftmix_kernels: ")
        yield


def calls() -> tuple[dict[str, Perplexity], dict[str, str]]:
    """Return all that find perplexities, and why one is left out."""
    found: dict[str, Perplexity] = {
        names.STREAMING: ours,
        names.DENSE_PERPLEXITY: dense,
        names.OPERATIONS: unwarned()(partial(folded, ops=online_softmax)),
    }
    try:
        losses = torch_chunked("none")
    except ImportError as reason:
        return found, {names.TORCH_PERPLEXITY: str(reason)}
    found[names.TORCH_PERPLEXITY] = lambda x: of_examples(losses(x.hidden, x.weight, x.labels), x)
    return found, {}


def size_of(settings: Settings) -> Case:
    """Return the head and tokens that a run measures."""
    return Case(QUICK, 256) if settings.quick else Case(*SIZES[settings.device])


def tokens_of(case: Case, settings: Settings, most: int | None = None) -> Tokens:
    """Return all tokens of a case, or at most as many."""
    rows = case.rows if most is None else min(case.rows, most)
    return make_tokens(rows, *case.sizes, settings.dtype, settings.device)


def measure(settings: Settings, results: Results) -> None:
    """Time everyone."""
    found, left_out = calls()
    if not settings.peers:
        left_out |= dict.fromkeys(set(found) - {names.STREAMING}, "--no-peers")
        found = {names.STREAMING: ours}
    results.leave_out({f"{who}, perplexity": why for who, why in left_out.items()})
    measure_whole(settings, size_of(settings), found, results)


@torch.no_grad()
def measure_whole(
    settings: Settings, case: Case, found: Mapping[str, Perplexity], results: Results
) -> None:
    """Check everyone on the first tokens, then weigh and time in turns those who are right."""
    few, device = tokens_of(case, settings, CHECKED_TOKENS), settings.device
    own: dict[str, dict[str, Any]] = {names.BARE_CHUNKS: {}}
    for who, call in found.items():
        work = partial(checked, who, call, few, device)
        error = results.attempt(f"{who}, perplexity", work, who == names.STREAMING)
        if error is not None:
            own[who] = {"loss_error": error}
    del few
    x = tokens_of(case, settings)
    steps: dict[str, Callable[[], object]] = {}
    for who, figures in own.items():
        step = partial(bare if who == names.BARE_CHUNKS else found[who], x)
        weigh = partial(peak_extra_bytes, step, device)
        peak = results.attempt(f"{who}, perplexity", weigh, who == names.STREAMING)
        if peak is not None:
            figures["peak_bytes"], steps[who] = peak, step
    if device == "cpu":
        results.miss(
            "left_out", f"{names.BARE_CALL}, perplexity", "holds all logits: only on a GPU"
        )
    else:
        room = partial(x.hidden.new_empty, case.rows, case.sizes[1])
        logits = results.attempt(f"{names.BARE_CALL}, perplexity", room, ours=False)
        if logits is not None:
            own[names.BARE_CALL] = {}
            steps[names.BARE_CALL] = lambda: torch.mm(x.hidden, x.weight.t(), out=logits)
    samples = interleaved_samples(steps, settings.repeats, device, says=case.size)
    for who, seconds in samples.items():
        results.add_times(
            seconds,
            measure="perplexity",
            case=case.size,
            **settings.sizes(case.rows, *case.sizes),
            operations=2 * case.rows * math.prod(case.sizes),
            who=who,
            ours=who == names.STREAMING,
            **own[who],
        )


def checked(who: str, call: Perplexity, x: Tokens, device: str) -> float:
    """Return the largest error of log-perplexities, of single tokens and of the examples.

    Raises:
        SuiteError: it is over the error budget; or ours is not compiled.
    """
    if who == names.STREAMING:
        require_compiled(device)
    num_tokens = x.labels.shape[0]
    ids = torch.arange(num_tokens, device=x.labels.device)
    single = x._replace(sample_ids=ids, num_samples=num_tokens)
    doubles = {"hidden": x.hidden.double(), "weight": x.weight.double()}
    truth = reference.perplexity(*single._replace(**doubles)).log()
    plain_error = reference.perplexity(*single).log() - truth
    # Perplexities come in float64; the logits that they are of are no better than float32.
    tokens = budget(call(single).log().float(), truth, plain_error)
    examples = (call(x).log() - reference.perplexity(*x._replace(**doubles)).log()).abs()
    # The maximum of a tensor keeps a NaN.
    worst = torch.cat((examples, examples.new_tensor([tokens.largest]))).max()
    return passed(tokens._replace(largest=float(worst)))


def passed(used: Budget) -> float:
    """Return the largest error.

    Raises:
        SuiteError: an error is over the budget.
    """
    if not used.holds:
        raise SuiteError(f"losses are over the error budget: {used.says}")
    return used.largest


def require_compiled(device: str) -> None:
    """Ask for the extension.

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
