"""What the rows of a chunk promise, by the compiled ops of the CPU and by the Triton kernels.

`pair_rows_` and `soft_rows_` on raw logits are held to the error budget for every dtype and option
of the head; then comes what they promise to the bit. `row_cases.py` runs them amid NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sftmix_kernels.extension import build_info
from sftmix_kernels.transform import LogitTransform

from ..budget import exact, same_class
from ..conftest import CUDA, DTYPES, INTERPRETER
from .row_cases import (
    COMPILED,
    INF,
    NAN,
    PLAIN,
    TRANSFORMS,
    Found,
    Pairs,
    Rows,
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

ON_CPU = pytest.param(
    COMPILED,
    marks=pytest.mark.skipif(build_info() is None, reason="the extension is not built"),
)
PLACES = (ON_CPU, INTERPRETER, CUDA)


@pytest.fixture(params=PLACES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(
    params=[
        pytest.param((place.values[0], dtype), marks=place.marks, id=f"{place.values[0]}-{dtype}")
        for place in PLACES
        for dtype in DTYPES["cpu" if place is INTERPRETER else "cuda"]
    ]
)
def device_and_dtype(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    return request.param  # type: ignore[no-any-return]


# Exponentials of half precision are computed otherwise, and what is promised must hold there too.
EITHER = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])


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


@EITHER
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_lam_zero_or_one_is_bitwise_the_plain_cross_entropy(
    device: str, transform: LogitTransform, dtype: torch.dtype
) -> None:
    """With a masked entry where there is a bias; the other row of the pair gets exactly 0."""
    pairs = some_pairs(2, 123, dtype)
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


@EITHER
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_pair_of_weight_zero_is_bitwise_two_rows(
    device: str, transform: LogitTransform, dtype: torch.dtype
) -> None:
    pairs = some_pairs(3, 4200, dtype)
    pairs = pairs._replace(pair_weight=torch.zeros(3))
    found = run_pairs(pairs, transform, device)
    assert not found.mixup.any()
    expected = run_rows(as_rows(pairs), transform, device)
    assert_same_bits(found._replace(mixup=torch.empty(0)), expected)


@EITHER
def test_a_row_of_weight_zero_may_be_mixed(device: str, dtype: torch.dtype) -> None:
    """Its exponentials times 0 are 0, though those of its logits are past the largest float32."""
    pairs = some_pairs(3, 123, dtype)._replace(share=shares(torch.full((3,), 0.5)))
    pairs.row_weight[[0, 4]] = 0.0
    pairs.logits[0, 7], pairs.logits[4, 9] = 200.0, 100.0
    assert_in_budget(run_pairs(pairs, PLAIN, device), pairs, PLAIN)


def test_half_precision_takes_its_largest_logits(device: str) -> None:
    """log2(e) times 6e4, rounded, is off by up to a 256th: by the same factor for all of a row."""
    pairs = some_pairs(3, 123, torch.float16)._replace(share=shares(torch.full((3,), 0.5)))
    pairs.logits[:, 5] = torch.tensor([6e4, -6e4, 6e4, 5e4, 6e4, 5.9e4]).half()
    rows = as_rows(pairs)
    for found, inputs in (
        (run_pairs(pairs, PLAIN, device), pairs),
        (run_rows(rows, PLAIN, device), rows),
    ):
        truth = dense(inputs, PLAIN, double=True)
        torch.testing.assert_close(found.ntp.double(), truth.ntp, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.gradient, truth.gradient.half(), rtol=1e-3, atol=1e-7)


@EITHER
def test_rows_of_weight_zero_are_exactly_zero_whatever_they_hold(
    device: str, dtype: torch.dtype
) -> None:
    """Row c of the first pair and both of the second; the partner in the first is as alone."""
    pairs, nothing = some_pairs(3, 123, dtype), torch.tensor([0, 1, 4])
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


@EITHER
@pytest.mark.parametrize("poison", ["row_weight", "logits", "share"])
@pytest.mark.parametrize("transform", [PLAIN, TRANSFORMS[-1]])
def test_nan_stays_in_its_pair(
    device: str, transform: LogitTransform, poison: str, dtype: torch.dtype
) -> None:
    """A NaN row weight is a label out of range; the pair's weight is then NaN too."""
    pairs = some_pairs(3, 123, dtype)
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


@EITHER
def test_a_masked_label_of_the_partner_changes_nothing_of_a_row(
    device: str, dtype: torch.dtype
) -> None:
    """A bias may mask it with -inf in both; where a share is 0 the mixture has no such target."""
    pairs = some_pairs(3, 123, dtype)._replace(share=shares(torch.tensor([0.25, 0.0, 1.0])))
    pairs.labels[3:] = (pairs.labels[:3] + 1) % 123
    for row in range(3):
        pairs.logits[[row, row + 3], pairs.labels[row + 3]] = -INF
    masked = LogitTransform(1.0, None, has_bias=True)
    found, expected = run_pairs(pairs, masked, device), dense(pairs, masked)
    torch.testing.assert_close(found.ntp[:3], expected.ntp[:3].float(), rtol=1e-5, atol=0)
    assert found.ntp[3:].isinf().all()
    assert found.mixup.isinf().tolist() == [True, True, False]


@EITHER
@pytest.mark.parametrize("transform", [PLAIN, TRANSFORMS[-1]])
def test_infinite_logits_are_of_dense_torchs_class(
    device: str, transform: LogitTransform, dtype: torch.dtype
) -> None:
    pairs = some_pairs(7, 123, dtype)._replace(share=shares(torch.full((7,), 0.25)))
    label = pairs.labels[:7]
    other = (label + 1) % 123
    pairs.logits[0, other[0]] = INF
    pairs.logits[1, label[1]] = INF
    pairs.logits[2, other[2]] = -INF
    pairs.logits[3, label[3]] = -INF
    pairs.logits[4] = -INF
    pairs.logits[[5, 12], other[5]] = torch.tensor([INF, -INF], dtype=dtype)
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


@pytest.mark.parametrize("softcap", [None, 2000.0])
def test_no_probability_is_above_one(device: str, softcap: float | None) -> None:
    """The scaled logits of the gradient are rounded as those of the sum, however large."""
    transform = LogitTransform(1.1, softcap, has_bias=False)
    rows = some_rows(200 if device == COMPILED else 6, 9, 1, torch.float32)
    rows.logits[torch.arange(len(rows.logits)), (rows.targets[:, 0] + 1) % 9] = 912.345
    gradient = run_rows(rows, transform, device).gradient
    others = rows.weight * transform.scale
    assert (gradient.amax(-1) <= others * (1 + 4 * torch.finfo(torch.float32).eps)).all()


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
