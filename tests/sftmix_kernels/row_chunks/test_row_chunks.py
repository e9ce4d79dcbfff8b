"""The proof of the ``row_chunks`` kernels: losses and gradients against dense PyTorch in float64.

First the three losses, then `pair_rows_`, `soft_rows_` and `mixed_rows` alone on raw logits, are
held to the error budget, for every dtype and option of the head: the root mean square error is at
most twice that of dense PyTorch (`sftmix_kernels/reference.py`) in the same dtype, plus one
rounding (`sftmix_kernels/budget.py`). Then comes what the row kernels promise to the bit.
A GPU runs all dtypes; the interpreter, without one, runs float16, and float32 for one head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from sftmix_kernels.mixup_loss import mixup_rows
from sftmix_kernels.row_chunks.kernels import mixed_rows, pair_rows_, soft_rows_
from sftmix_kernels.sftmix_loss import sftmix_rows
from sftmix_kernels.transform import LogitTransform

from ..budget import check, exact, same_class
from ..conftest import DTYPES, ROW_CHUNKS
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
from .row_cases import (
    INF,
    NAN,
    PLAIN,
    TRANSFORMS,
    Found,
    Pairs,
    Rows,
    amid_nan,
    as_rows,
    assert_in_budget,
    assert_same_bits,
    dense,
    run_pairs,
    run_rows,
    shares,
    some_pairs,
    some_rows,
)


@every_case((torch.float16,))
def test_cross_entropy_in_budget(device: str, dtype: torch.dtype, head: dict[str, Any]) -> None:
    cross_entropy_in_budget(device, dtype, head, ROW_CHUNKS)


@every_case((torch.float16,))
def test_mixup_in_budget(device: str, dtype: torch.dtype, head: dict[str, Any]) -> None:
    mixup_in_budget(device, dtype, head, ROW_CHUNKS)


@every_case(DTYPES["cpu"])
def test_sftmix_in_budget(device: str, dtype: torch.dtype, head: dict[str, Any]) -> None:
    sftmix_in_budget(device, dtype, head, ROW_CHUNKS)


@pytest.mark.parametrize("shape", RAGGED)
def test_ragged_shapes_in_budget(device: str, shape: tuple[int, int, int]) -> None:
    ragged_in_budget(device, shape, ROW_CHUNKS)


def test_upstream_gradients_not_uniform_in_budget(device: str) -> None:
    other_upstreams_in_budget(device, ROW_CHUNKS)


def test_confident_tokens_and_equal_labels_in_budget(device: str) -> None:
    confident_tokens_in_budget(device, ROW_CHUNKS)


def enough(device: str) -> int:
    """The interpreter takes 50 ms a pair."""
    return 6 if device == "cpu" else 300


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_pairs_of_every_dtype_and_option(
    device_and_dtype: tuple[str, torch.dtype], transform: LogitTransform
) -> None:
    device, dtype = device_and_dtype
    pairs = some_pairs(enough(device), 515, dtype)
    assert_in_budget(run_pairs(pairs, transform, device), pairs, transform)


@pytest.mark.parametrize("num_targets", [1, 2])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_rows_of_every_dtype_and_option(
    device_and_dtype: tuple[str, torch.dtype], transform: LogitTransform, num_targets: int
) -> None:
    device, dtype = device_and_dtype
    rows = some_rows(enough(device), 515, num_targets, dtype)
    assert_in_budget(run_rows(rows, transform, device), rows, transform)


@pytest.mark.parametrize("vocab_size", [1, 2, 123, 4096, 4097, 9000])
def test_ragged_vocabularies(device: str, vocab_size: int) -> None:
    pairs = some_pairs(4, vocab_size)
    pairs.labels[0] = vocab_size - 1
    assert_in_budget(run_pairs(pairs, PLAIN, device), pairs, PLAIN)
    rows = some_rows(6, vocab_size, 2, torch.float32)
    rows.targets[0] = vocab_size - 1
    assert_in_budget(run_rows(rows, PLAIN, device), rows, PLAIN)


def test_nothing_is_launched_for_nothing(device: str) -> None:
    assert run_pairs(some_pairs(0, 123), PLAIN, device).gradient.shape == (0, 123)
    assert run_rows(some_rows(0, 123, 1, torch.float32), PLAIN, device).ntp.shape == (0,)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_lam_zero_or_one_is_bitwise_the_plain_cross_entropy(
    device: str, transform: LogitTransform
) -> None:
    """With a masked entry where there is a bias; the other row of the pair gets exactly 0."""
    pairs = some_pairs(2, 123)
    if transform.has_bias:
        pairs.logits[:, pairs.labels.max() // 2 + 1] = -INF
    ones = torch.ones(2)
    alone = torch.tensor([2, 1])  # u of the pair with lam 0, c of the one with lam 1
    rows = Rows(pairs.logits[alone], pairs.labels[alone].unsqueeze(-1), None, ones)
    expected = run_rows(rows, transform, device)
    mixed = pairs._replace(row_weight=torch.zeros(4), pair_weight=ones, mix_ratio=torch.ones(()))
    found = run_pairs(mixed, transform, device)
    assert torch.equal(found.mixup, expected.ntp)
    assert torch.equal(found.gradient[alone], expected.gradient)
    assert not found.gradient[[0, 3]].any()
    two = rows._replace(targets=pairs.labels.reshape(2, 2).t().contiguous(), share=pairs.share)
    assert_same_bits(run_rows(two, transform, device), expected)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_pair_of_weight_zero_is_bitwise_two_rows(device: str, transform: LogitTransform) -> None:
    pairs = some_pairs(3, 4200)
    pairs = pairs._replace(pair_weight=torch.zeros(3))
    found = run_pairs(pairs, transform, device)
    assert not found.mixup.any()
    expected = run_rows(as_rows(pairs), transform, device)
    assert_same_bits(found._replace(mixup=torch.empty(0)), expected)


def test_rows_of_weight_zero_are_exactly_zero_whatever_they_hold(device: str) -> None:
    """Row c of the first pair and both of the second; the partner in the first is as alone."""
    pairs, nothing = some_pairs(3, 123), torch.tensor([0, 1, 4])
    pairs.row_weight[nothing] = 0.0
    pairs.pair_weight[:2] = 0.0
    clean = run_pairs(pairs, PLAIN, device)
    pairs.logits[nothing] = NAN
    found = run_pairs(pairs, PLAIN, device)
    assert_same_bits(found, clean)
    assert not found.ntp[nothing].any()
    assert not found.gradient[nothing].any()
    rows = run_rows(as_rows(pairs), PLAIN, device)
    assert torch.equal(rows.gradient[3], found.gradient[3])
    assert not rows.ntp[nothing].any()
    assert not rows.gradient[nothing].any()


@pytest.mark.parametrize("poison", ["row_weight", "logits", "share"])
@pytest.mark.parametrize("transform", [PLAIN, TRANSFORMS[-1]])
def test_nan_stays_in_its_pair(device: str, transform: LogitTransform, poison: str) -> None:
    """A NaN row weight is a label out of range; the pair's weight is then NaN too."""
    pairs = some_pairs(3, 123)
    good = run_pairs(pairs, transform, device)
    getattr(pairs, poison)[1] = NAN
    if poison == "row_weight":
        pairs.pair_weight[1] = NAN
    found = run_pairs(pairs, transform, device)
    assert found.gradient[[1, 4]].isnan().all()
    assert found.mixup[1].isnan()
    others = torch.tensor([0, 2, 3, 5])
    assert torch.equal(found.gradient[others], good.gradient[others])
    assert torch.equal(found.mixup[[0, 2]], good.mixup[[0, 2]])
    if poison != "share":
        assert found.ntp[1].isnan()
        good.ntp[1] = found.ntp[1] = 0.0
    assert torch.equal(found.ntp, good.ntp)
    if poison != "share":
        alone = run_rows(as_rows(pairs), transform, device)
        assert alone.gradient[1].isnan().all()
        assert alone.gradient.isnan().any(-1).sum() == 1


@pytest.mark.parametrize("transform", [PLAIN, TRANSFORMS[-1]])
def test_infinite_logits_are_of_dense_torchs_class(device: str, transform: LogitTransform) -> None:
    pairs = some_pairs(7, 123)._replace(share=shares(torch.full((7,), 0.25)))
    label = pairs.labels[:7]
    other = (label + 1) % 123
    pairs.logits[0, other[0]] = INF
    pairs.logits[1, label[1]] = INF
    pairs.logits[2, other[2]] = -INF
    pairs.logits[3, label[3]] = -INF
    pairs.logits[4] = -INF
    pairs.logits[[5, 12], other[5]] = torch.tensor([INF, -INF])
    rows = Rows(
        pairs.logits, torch.stack((pairs.labels, pairs.labels.roll(7)), -1), None, torch.ones(14)
    )
    rows = rows._replace(share=shares(torch.full((14,), 0.25)))
    runs = [
        (run_pairs(pairs, transform, device), dense(pairs, transform)),
        (run_rows(as_rows(pairs), transform, device), dense(as_rows(pairs), transform)),
        (run_rows(rows, transform, device), dense(rows, transform)),
    ]
    for found, expected in runs:
        for name, ours, torchs in zip(Found._fields, found, expected, strict=True):
            for row, (one, other_row) in enumerate(zip(ours, torchs, strict=True)):
                assert same_class(one, other_row), (name, row)


def test_a_common_offset_changes_no_bit(device: str) -> None:
    """Quarters near 1e4 are exact in float32, and so are their interpolations by quarters."""
    pairs = some_pairs(3, 4200)._replace(
        logits=8 * exact(6, 4200), share=shares(torch.tensor([0.25, 0.5, 1.0]))
    )
    shifted = pairs._replace(logits=pairs.logits + 1e4)
    assert_same_bits(run_pairs(shifted, PLAIN, device), run_pairs(pairs, PLAIN, device))
    assert_same_bits(
        run_rows(as_rows(shifted), PLAIN, device), run_rows(as_rows(pairs), PLAIN, device)
    )


def twins(logits: Tensor, label: int) -> Pairs:
    """Each row paired with itself: its gradient is ``1 + lam mix_ratio`` times the plain one."""
    count = logits.shape[0]
    labels, lam = torch.full((2 * count,), label), torch.full((count,), 0.25)
    ones = torch.ones(2 * count)
    return Pairs(logits.repeat(2, 1), labels, ones, shares(lam), ones[:count], torch.tensor(0.5))


def assert_relatively_exact(pairs: Pairs, transform: LogitTransform, device: str, truth: Tensor,
                            bound: Tensor) -> None:  # fmt: skip
    """Gradients of `twins` entry by entry; ``bound`` (P, 1) is relative."""
    found = run_rows(as_rows(pairs), transform, device).gradient.double()
    twice = torch.cat((truth, truth))
    bounds = torch.cat((bound, bound))
    assert ((found - twice).abs() <= bounds * twice.abs()).all()
    found = run_pairs(pairs, transform, device).gradient.double()
    factor = 1 + pairs.share.double().t().reshape(-1, 1) * pairs.mix_ratio
    assert ((found - factor * twice).abs() <= bounds * factor * twice.abs()).all()


def test_gradient_of_a_confident_row_is_exact(device: str) -> None:
    """``p - 1`` of a token with p up to 1 - 4e-18, to float32's own precision.

    ``exp(-gap)`` carries what rounding does to its argument times log2(e), twice half an eps of
    the gap, and some eight roundings follow.
    """
    gap = torch.tensor([[5.0], [14.0], [20.0], [40.0]])
    logits = torch.zeros(4, 9)
    logits[:, 3:4] = gap
    truth = logits.double().softmax(-1)
    truth[:, 3] = 0.0
    truth[:, 3] = -truth.sum(-1)
    pairs, eps = twins(logits, 3), torch.finfo(torch.float32).eps
    bound = (gap + 8) * eps
    assert_relatively_exact(pairs, PLAIN, device, truth, bound)
    loss = torch.log1p(8 * (-gap.double()).exp())
    for found in (run_pairs(pairs, PLAIN, device), run_rows(as_rows(pairs), PLAIN, device)):
        losses = found.ntp.double().reshape(2, 4, 1)
        assert ((losses - loss).abs() <= bound * loss).all()


def test_a_saturated_softcap_keeps_its_slope(device: str) -> None:
    """Slopes down to 1e-34, where ``1 - tanh^2`` is 0 in float64 too.

    With ``x = raw / cap`` the slope is ``4 e / (1 + e)^2``, ``e = exp(-2 |x|)``: an eps for each
    unit of ``2 |x|`` and some sixteen roundings. Logits near the cap are good to two eps of it,
    and two of them make a probability.
    """
    cap, eps = 4.0, torch.finfo(torch.float32).eps
    x = torch.tensor([[4.0], [12.0], [25.0], [39.0]]) + torch.arange(9) / 8
    e = (-2 * x.double()).exp()
    slope, capped = 4 * e / (1 + e) ** 2, cap * (1 - e) / (1 + e)
    truth = capped.softmax(-1)
    truth[:, 3] -= 1.0
    bound = (2 * x.amax(-1, keepdim=True) + 4 * cap + 16) * eps
    pairs = twins(cap * x, 3)
    assert_relatively_exact(pairs, PLAIN._replace(softcap=cap), device, truth * slope, bound)


def test_without_gradients_logits_are_left_alone(device: str) -> None:
    pairs = some_pairs(3, 4200, torch.float16)
    for run, inputs in ((run_pairs, pairs), (run_rows, as_rows(pairs))):
        launch: Callable[..., Found] = run
        found = launch(inputs, TRANSFORMS[-1], device, needs_gradient=False)
        assert torch.equal(found.gradient, pairs.logits)
        expected = launch(inputs, TRANSFORMS[-1], device)
        assert_same_bits(found, expected._replace(gradient=found.gradient))


@pytest.fixture
def _overflow_asserts() -> Iterator[None]:
    """The interpreter's own switch; without it int32 arithmetic wraps as on a GPU."""
    options = interpreter.interpreter_builder.options
    before = options.debug
    object.__setattr__(options, "debug", True)
    yield
    object.__setattr__(options, "debug", before)


def far_apart(rows: Tensor, device: str) -> Tensor:
    """The rows 2^30 + 8 elements apart: the third begins past 2^31. What is never touched takes no
    memory on the CPU. No multiple of 16, like the rows amid NaN: a GPU sums both in one order."""
    stride = 2**30 + 8
    buffer = torch.empty((rows.shape[0] - 1) * stride + 4096, dtype=rows.dtype, device=device)
    return buffer.as_strided(tuple(rows.shape), (stride, 1)).copy_(rows)


@pytest.mark.usefixtures("_overflow_asserts")
def test_offsets_past_int32(device: str) -> None:
    pairs = some_pairs(2, 123, torch.float16)
    rows = as_rows(pairs)
    labels, row_weight = pairs.labels.to(device), pairs.row_weight.to(device)
    logits = far_apart(pairs.logits, device)
    ntp, mixup = pair_rows_(
        logits, labels, row_weight, *(t.to(device) for t in pairs[3:]), PLAIN, True
    )
    found = Found(ntp.cpu(), mixup.cpu(), logits.cpu())
    assert_same_bits(found, run_pairs(pairs, PLAIN, device))
    logits.copy_(rows.logits)
    loss = soft_rows_(logits, labels.unsqueeze(-1), None, row_weight, PLAIN, True)
    found = Found(loss.cpu(), torch.empty(0), logits.cpu())
    assert_same_bits(found, run_rows(rows, PLAIN, device))


@pytest.mark.usefixtures("_overflow_asserts")
def test_offsets_of_hidden_states_past_int32(device: str) -> None:
    first, second = torch.randn(4, 33).half(), torch.randn(4, 33).half().to(device)
    rows, ones = torch.tensor([3, 0]).to(device), torch.ones(4, device=device)
    share = shares(torch.rand(4)).to(device)
    expected = mixed_rows(first.to(device), second, share, rows, ones)
    assert torch.equal(mixed_rows(far_apart(first, device), second, share, rows, ones), expected)


@pytest.mark.parametrize("size", [1, 1024, 1030])
def test_mixed_rows_of_every_dtype(device_and_dtype: tuple[str, torch.dtype], size: int) -> None:
    """Some rows in some order; one of weight 0 is exactly 0 whatever it holds."""
    device, dtype = device_and_dtype
    first, second = torch.randn(2, 9, size).to(dtype)
    weight, share = torch.ones(9), shares(torch.rand(9))
    rows = torch.tensor([8, 3, 0, 5])
    weight[3], first[3], second[0] = 0.0, NAN, INF
    weight[0] = 0.0
    found = mixed_rows(
        amid_nan(first, device, columns=5),
        amid_nan(second, device, columns=3),
        amid_nan(share, device),
        rows.to(device),
        amid_nan(weight, device),
    ).cpu()

    def mixed(first: Tensor, second: Tensor) -> Tensor:
        share_1, share_2 = share.to(first.dtype)[[8, 5]].tensor_split(2, dim=-1)
        return share_1 * first[[8, 5]] + share_2 * second[[8, 5]]

    assert not found[[1, 2]].any()
    truth = mixed(first.double(), second.double())
    plain = mixed(first.float(), second.float()).to(dtype)
    check("mixed", found[[0, 3]], truth, plain.double() - truth)


def test_opcheck(device: str) -> None:
    """Nothing given is written to, and what comes back is what the fake ops say."""
    utils = ("test_schema", "test_faketensor")
    hidden, weight, bias = (torch.randn(size, device=device) for size in ((5, 8), (50, 8), (50,)))
    labels, ones = torch.arange(5, device=device), torch.ones(5, device=device)
    ones[2] = 0.0
    share, rest = shares(torch.rand(5)).to(device), (1.5, 3.0, 16, [True, True, True])
    targets = torch.stack((labels, labels.flip(0)), -1)
    torch.library.opcheck(
        mixup_rows,
        (hidden, hidden + 1, weight, bias, targets, share, ones, *rest),
        test_utils=utils,
    )
    pairs = (labels[:2], labels[2:4], 1.0 - ones[2:4], share[:2], torch.tensor(0.2, device=device))
    torch.library.opcheck(
        sftmix_rows, (hidden, weight, bias, labels, ones, *pairs, *rest), test_utils=utils
    )
