"""The proof of the ``vocab_tiles`` kernels: losses and gradients against dense PyTorch in float64.

`fused_sftmix_loss`, `fused_mixup_loss` and `fused_cross_entropy` are held to the error budget, for
every dtype and option of the head: the root mean square error is at most twice that of dense
PyTorch (`sftmix_kernels/reference.py`) in the same dtype, plus one rounding
(`sftmix_kernels/budget.py`). Then comes what only this schedule has: the filter, groups of rows,
pairs for every row, and ``max_bytes``. A GPU runs all dtypes; the interpreter, without one, runs
float16, and float32 for one head.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sftmix_kernels import VocabTiles, fused_cross_entropy, fused_mixup_loss
from sftmix_kernels.gradients import unit_of
from sftmix_kernels.mixup_loss import mixup_tiles, mixup_tiles_backward
from sftmix_kernels.schedules import BLOCK_P, BLOCK_R, BLOCK_V
from sftmix_kernels.sftmix_loss import sftmix_tiles, sftmix_tiles_backward
from sftmix_kernels.terms import PairPlan
from sftmix_kernels.vocab_tiles.groups import every_row_paired, groups
from sftmix_kernels.vocab_tiles.logits import l2_bytes
from tools.peak_memory import peak_extra_bytes

from ..budget import assert_same_bits, check, run
from ..conftest import DTYPES, VOCAB_TILES
from ..kernel_cases import (
    RAGGED,
    confident_tokens_in_budget,
    cross_entropy_in_budget,
    every_case,
    mixup_in_budget,
    other_upstreams_in_budget,
    ragged_in_budget,
    sftmix_in_budget,
)


@every_case((torch.float16,))
def test_cross_entropy_in_budget(device: str, dtype: torch.dtype, head: dict[str, Any]) -> None:
    cross_entropy_in_budget(device, dtype, head, VOCAB_TILES)


@every_case((torch.float16,))
def test_mixup_in_budget(device: str, dtype: torch.dtype, head: dict[str, Any]) -> None:
    mixup_in_budget(device, dtype, head, VOCAB_TILES)


@every_case(DTYPES["cpu"])
def test_sftmix_in_budget(device: str, dtype: torch.dtype, head: dict[str, Any]) -> None:
    sftmix_in_budget(device, dtype, head, VOCAB_TILES)


@pytest.mark.parametrize("shape", RAGGED)
def test_ragged_shapes_in_budget(device: str, shape: tuple[int, int, int]) -> None:
    ragged_in_budget(device, shape, VOCAB_TILES)


def test_upstream_gradients_not_uniform_in_budget(device: str) -> None:
    other_upstreams_in_budget(device, VOCAB_TILES)


def test_confident_tokens_and_equal_labels_in_budget(device: str) -> None:
    confident_tokens_in_budget(device, VOCAB_TILES)


ROWS, SIZE, VOCAB = 300, 16, 700
EPS = 1e-3


class Peaked(NamedTuple):
    """Rows whose probability lies in a few tiles: most others are dead under the filter."""

    hidden: Tensor  # (R, D)
    weight: Tensor  # (V, D)
    labels: Tensor  # (R,)


def peaked(device: str) -> Peaked:
    """With t from -1 to 1 over the vocabulary, logits are -320 (t - t0)^2 and some noise. Of rows
    of the first block t0 is in the middle of tile 0, of others of tile 4, of the half-half mixture
    of two such rows of tile 2; labels are in tiles 0 and 5."""
    hidden, weight = torch.randn(ROWS, SIZE) / 2, torch.randn(VOCAB, SIZE) / 4
    first = torch.arange(ROWS) < BLOCK_R
    labels = torch.where(first, 5, VOCAB - 1)
    t = torch.linspace(-1, 1, VOCAB)
    hidden[:, 0], weight[:, 0] = 640 * torch.where(first, t[64], t[576]), t
    hidden[:, 1], weight[:, 1] = 320.0, -t.square()
    return Peaked(hidden.to(device), weight.to(device), labels.to(device))


def blocks_of_tiles(probability: Tensor, labels: Tensor | None, block: int) -> Tensor:
    """Which (block, tile) holds a probability above the filter or a target, entry by entry."""
    above = probability > EPS
    if labels is not None:
        above |= torch.nn.functional.one_hot(labels, VOCAB).bool()
    live = torch.zeros_like(above)
    for row in range(0, len(above), block):
        for column in range(0, VOCAB, BLOCK_V):
            here = slice(row, row + block), slice(column, column + BLOCK_V)
            live[here] = above[here].any()
    return live


def dense_gradients(x: Peaked, live: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dH and dW of the mean NTP loss, live entries alone."""
    hidden, weight = x.hidden.to(dtype), x.weight.to(dtype)
    gradient = (hidden @ weight.t()).softmax(-1)
    gradient[torch.arange(ROWS, device=gradient.device), x.labels] -= 1
    gradient = gradient * live / ROWS
    return gradient @ weight, gradient.t() @ hidden


def assert_filtered(found: dict[str, Tensor | None], x: Peaked, live: Tensor) -> None:
    assert 0.2 < live.float().mean() < 0.8
    plain, truth = (dense_gradients(x, live, d) for d in (torch.float32, torch.float64))
    for name, one, other in zip(("hidden", "weight"), plain, truth, strict=True):
        gradient = found[name]
        assert gradient is not None
        check(name, gradient, other, one - other)


def test_backward_leaves_out_the_tiles_below_the_filter_and_no_other(device: str) -> None:
    x = peaked(device)
    schedule = VocabTiles(filter_eps=EPS, max_bytes=2**17)
    found = run(
        lambda **t: fused_cross_entropy(**t, labels=x.labels, schedule=schedule),
        {"hidden": x.hidden, "weight": x.weight},
    )
    p = (x.hidden.double() @ x.weight.double().t()).softmax(-1)
    assert_filtered(found.gradients, x, blocks_of_tiles(p, x.labels, BLOCK_R))


def test_a_pair_is_live_where_any_of_its_three_softmaxes_is(device: str) -> None:
    """Row p with row R/2 + p."""
    x, half = peaked(device), ROWS // 2
    c, u = rows = torch.arange(ROWS, device=device).view(2, half)
    ones, shares = torch.ones(3, half, device=device), torch.full((2, half), 0.5, device=device)
    ratio = torch.tensor(0.2, device=device)
    plan = (rows, x.labels[rows], ones, shares, ratio)
    *_, live = sftmix_tiles(x.hidden, x.weight, None, *plan, 1.0, None, EPS, 2**26)
    logits = x.hidden.double() @ x.weight.double().t()
    mixture = (logits[c] + logits[u]) / 2
    expected, by_term = torch.zeros(half, VOCAB, dtype=torch.bool, device=device), []
    for term, labels in ((logits[c], x.labels[c]), (logits[u], x.labels[u]), (mixture, None)):
        by_term.append(blocks_of_tiles(term.softmax(-1), labels, BLOCK_P))
        expected |= by_term[-1]
    assert torch.equal(live.bool(), expected[::BLOCK_P, ::BLOCK_V])
    assert all((term & ~other).any() for term in by_term for other in by_term if term is not other)
    # A pair that is not mixed has no mixture to keep a tile alive.
    ones[2] = 0
    *_, live = sftmix_tiles(x.hidden, x.weight, None, *plan, 1.0, None, EPS, 2**26)
    assert torch.equal(live.bool(), (by_term[0] | by_term[1])[::BLOCK_P, ::BLOCK_V])


@pytest.mark.parametrize("filter_eps", [1e-30, EPS])
def test_a_row_of_nan_keeps_its_tiles(device: str, filter_eps: float) -> None:
    """A filter hides no NaN."""
    x = peaked(device)
    x.hidden[3] = torch.nan
    schedule = VocabTiles(filter_eps=filter_eps)
    found = run(
        lambda **t: fused_cross_entropy(**t, labels=x.labels, schedule=schedule),
        {"hidden": x.hidden, "weight": x.weight},
    )
    assert found.loss.isnan()
    gradient = found.gradients["weight"]
    assert gradient is not None
    assert gradient.isnan().all()


def test_ignored_rows_keep_no_tile_alive(device: str) -> None:
    x = peaked(device)
    labels = x.labels.masked_fill(torch.arange(ROWS, device=device) % 2 == 0, -100)
    counts = (labels != -100).float()
    one = torch.ones(ROWS, 1, device=device)
    targets = labels.clamp(min=0).unsqueeze(-1)
    loss, _, live = mixup_tiles(
        x.hidden, None, x.weight, None, targets, one, counts, 1.0, None, EPS, 2**26
    )
    assert not loss[::2].any()
    nothing = torch.zeros_like(counts)
    _, _, dead = mixup_tiles(
        x.hidden, None, x.weight, None, targets, one, nothing, 1.0, None, EPS, 2**26
    )
    assert live.shape == (-(-ROWS // BLOCK_R), -(-VOCAB // BLOCK_V))
    assert live.any()
    assert not dead.any()


def test_a_filter_of_next_to_nothing_is_exact(device: str) -> None:
    x = peaked(device)
    c, u = torch.arange(ROWS, device=device).chunk(2)
    exact, filtered = (
        run(
            lambda s=schedule, **t: fused_mixup_loss(
                t["hidden"][c],
                t["hidden"][u],
                t["weight"],
                x.labels[c],
                x.labels[u],
                0.3,
                schedule=s,
            ),
            {"hidden": x.hidden, "weight": x.weight},
        )
        for schedule in (VocabTiles(), VocabTiles(filter_eps=1e-37))
    )
    assert torch.equal(exact.loss, filtered.loss)
    for name, gradient in exact.gradients.items():
        other = filtered.gradients[name]
        assert gradient is not None
        assert other is not None
        # The same products by another GEMM: both within K / 2 roundings of the sum of absolutes.
        bound = max(VOCAB, ROWS) * torch.finfo(torch.float32).eps * float(gradient.abs().max())
        assert (gradient - other).abs().max() <= bound, name


def test_upstream_gradients_of_half_precision_keep_their_size(device: str) -> None:
    """A mean over many rows: 1e-6 of a gradient of 1e-2 is nothing in float16."""
    x = peaked(device)
    hidden, weight = x.hidden.half(), x.weight.half()
    one, small = (
        run(
            lambda **t: fused_cross_entropy(
                **t, labels=x.labels, reduction="none", schedule="vocab_tiles"
            ),
            {"hidden": hidden, "weight": weight},
            torch.full((ROWS,), scale, device=device),
        )
        for scale in (1.0, 2.0**-20)
    )
    large, found = one.gradients["weight"], small.gradients["weight"]
    assert large is not None
    assert found is not None
    # Rounded twice: to float16 there, to one of its smallest steps here.
    expected = large.float() * 2.0**-20
    assert ((found.float() - expected).abs() <= expected.abs() * 2.0**-10 + 2.0**-25).all()
    assert found.any()


@pytest.mark.interpret
def test_bytes_that_forward_tiles_read() -> None:
    """At an 8B model's shape few enough for an L2 of 7 TB/s to take 15 ms of products."""
    found = l2_bytes(8192, 4096, 128256, torch.bfloat16, None)
    assert found == 64 * 501 * (128 + 256) * 4096 * 2
    assert found <= 110e9
    assert l2_bytes(8192, 4096, 128256, torch.float16, 30.0) == 64 * 1002 * 256 * 4096 * 2
    assert l2_bytes(129, 10, 257, torch.float32, None) == 2 * 3 * (128 + 128) * 10 * 4


@pytest.mark.interpret
def test_unit_of_upstream_gradients() -> None:
    assert unit_of(torch.tensor([1.0, -4.0, torch.inf, torch.nan])) == 4
    assert unit_of(torch.zeros(3)) == 1
    assert unit_of(torch.empty(0)) == 1


@pytest.mark.interpret
def test_groups_are_of_whole_blocks() -> None:
    found = list(groups(1000, 128, bytes_each=10, max_bytes=3000))
    assert [(g.start, g.stop) for g in found] == [(0, 256), (256, 512), (512, 768), (768, 1000)]
    assert list(groups(0, 128, 1, 1)) == []
    assert list(groups(130, 128, 10**9, 1)) == [slice(0, 128), slice(128, 130)]


@pytest.mark.interpret
@pytest.mark.parametrize("num_rows", [6, 7])
def test_every_row_is_in_one_pair(num_rows: int) -> None:
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])[:num_rows]
    labels = torch.arange(num_rows) + 10
    plan = PairPlan(
        labels,
        weight,
        torch.tensor([0, 4]),
        torch.tensor([2, 3]),
        torch.tensor([1.0, 1.0]),
        torch.tensor([[0.25, 0.75], [0.5, 0.5]]),
    )
    rows, found, weights, share = every_row_paired(plan)
    expected = [[0, 4, 1], [2, 3, 5]] if num_rows == 6 else [[0, 4, 1, 5], [2, 3, 6, 7]]
    assert rows.tolist() == expected
    exists = rows < num_rows
    assert torch.equal(found[exists], rows[exists] + 10)
    assert torch.equal(weights[:2][exists], weight[rows[exists]])
    assert not weights[:2][~exists].any()
    assert weights[2].tolist() == [1.0, 1.0] + [0.0] * (rows.shape[1] - 2)
    assert share[:, 0].tolist() == [0.25, 0.75]


def opcheck(op: Any, *arguments: Any) -> None:
    """Schema, fake kernel and what tracing needs; the ops are differentiated by Functions."""
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, arguments, test_utils=tests)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("filter_eps", "needs"), [(0.0, [True, True, True]), (EPS, [False, True, False])]
)
def test_opcheck(device: str, filter_eps: float, needs: list[bool]) -> None:
    hidden, weight = torch.randn(5, 8, device=device), torch.randn(40, 8, device=device)
    bias, counts = torch.randn(40, device=device), torch.ones(5, device=device)
    targets = torch.randint(0, 40, (5, 2), device=device)
    share = torch.full((5, 2), 0.5, device=device)
    head, end = (weight, bias), (1.0, 2.0)
    forward = (hidden, hidden, *head, targets, share, counts, *end, filter_eps, 10**4)
    opcheck(mixup_tiles, *forward)
    _, state, live = mixup_tiles(*forward)
    backward = (hidden, hidden, *head, targets, share, counts, state, live)
    opcheck(mixup_tiles_backward, *backward, needs, *end, 10**4)
    rows = torch.tensor([[0, 2, 4], [1, 3, 5]], device=device)
    labels, weights = rows + 10, torch.ones(3, 3, device=device)
    weights[1, 2] = weights[2, 2] = 0
    plan = (rows, labels, weights, torch.full((2, 3), 0.5, device=device))
    forward = (hidden, *head, *plan, torch.tensor(0.2, device=device), *end, filter_eps, 10**4)
    opcheck(sftmix_tiles, *forward)
    _, state, live = sftmix_tiles(*forward)
    opcheck(sftmix_tiles_backward, hidden, *head, *plan, state, live, needs, *end, 10**4)


def test_layout_of_the_partner_does_not_matter(device: str) -> None:
    """Both hidden states of a row are read with strides of their own."""
    pool = torch.randn(20, 3 * SIZE, device=device)
    first, second = pool[:, :SIZE], pool[:, SIZE : 2 * SIZE].contiguous()
    weight = torch.randn(123, SIZE, device=device)
    labels = torch.randint(0, 123, (2, 20)).to(device)

    def loss(hidden_c: Tensor, hidden_u: Tensor) -> Tensor:
        schedule = "vocab_tiles"
        return fused_mixup_loss(hidden_c, hidden_u, weight, *labels, 0.3, schedule=schedule)

    assert_same_bits(
        run(loss, {"hidden_c": first, "hidden_u": second}),
        run(loss, {"hidden_c": first.contiguous(), "hidden_u": second}),
    )


def tile_ops(device: str, pairs: bool, rows: int, size: int, vocab_size: int) -> Any:
    """Forward and backward of one of the two ops, as functions of ``max_bytes``, and outputs."""
    weight = torch.randn(vocab_size, size, device=device)
    hidden = torch.randn(rows, size, device=device)
    if pairs:
        plan = torch.arange(rows, device=device).view(2, -1)
        halves = torch.full((2, rows // 2), 0.5, device=device)
        weights = torch.ones(3, rows // 2, device=device)
        fixed = (hidden, weight, None, plan, plan % vocab_size, weights, halves)
        last = (torch.tensor(0.2, device=device),)
        ops: Any = (sftmix_tiles, sftmix_tiles_backward)
    else:
        one = torch.ones(rows, device=device)
        targets = (torch.arange(rows, device=device) % vocab_size).unsqueeze(-1)
        fixed = (hidden, None, weight, None, targets, one.unsqueeze(-1), one)
        ops, last = (mixup_tiles, mixup_tiles_backward), ()

    def forward(max_bytes: int) -> Any:
        return ops[0](*fixed, *last, 1.0, None, 0.0, max_bytes)

    def backward(state: list[Tensor], max_bytes: int) -> Any:
        return ops[1](*fixed, *state, [True, True, False], 1.0, None, max_bytes)

    return forward, backward, hidden.nbytes + weight.nbytes


@pytest.mark.parametrize("pairs", [False, True])
def test_forward_takes_max_bytes_and_some_numbers_a_row(device: str, pairs: bool) -> None:
    """Without groups the LSEs of the tiles alone were 144 or 216 bytes a row here."""
    rows, max_bytes = 512, 2**15
    forward, _, _ = tile_ops(device, pairs, rows, size=16, vocab_size=2200)
    few = (110 if pairs else 80) * rows
    assert peak_extra_bytes(lambda: forward(max_bytes), device) <= 1.05 * (max_bytes + few)


@pytest.mark.parametrize("pairs", [False, True])
def test_backward_takes_max_bytes_and_some_numbers_a_row(device: str, pairs: bool) -> None:
    """Hidden states twice as large as the workspace: none of it is of their size."""
    rows, max_bytes = 2048, 2**18
    forward, backward, outputs = tile_ops(device, pairs, rows, size=64, vocab_size=130)
    _, *state = forward(2**20)
    space = peak_extra_bytes(lambda: backward(state, max_bytes), device) - outputs
    assert space <= 1.05 * (max_bytes + 80 * rows)


@pytest.mark.parametrize("pairs", [False, True])
def test_hidden_states_of_no_columns_have_logits_of_0(device: str, pairs: bool) -> None:
    """The kernels are told that there is something to multiply: here the launcher knows better."""
    forward, backward, _ = tile_ops(device, pairs, 8, size=0, vocab_size=300)
    loss, *state = forward(2**20)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(300)))
    dh, dw, _ = backward(state, 2**20)
    assert (dh.shape, dw.shape) == ((8, 0), (300, 0))
