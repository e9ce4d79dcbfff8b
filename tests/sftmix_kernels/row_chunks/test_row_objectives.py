"""The objectives of `gates.py` in the rows of a chunk: compiled ops, PyTorch operations, Triton.

Legend: K rows, P pairs, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sftmix_kernels import Clipped, Entropy, Power, Threshold, reference
from sftmix_kernels.gates import Gate, Objective, objective_of
from sftmix_kernels.row_chunks import cpu, pytorch
from sftmix_kernels.transform import LogitTransform

from ..budget import check, same_class
from ..conftest import CUDA, DTYPES, INTERPRETER
from .row_cases import INF, NAN, PLAIN, TRANSFORMS, amid_nan, ops_of, place_of, take
from .test_rows import ON_CPU

OPERATIONS = "operations"
PLACES = (ON_CPU, pytest.param(OPERATIONS), INTERPRETER, CUDA)
# What the interpreter takes a minute for, and the compiled kernels' executor has a part of.
SLOWLY = pytest.param("cpu", marks=(pytest.mark.interpret, pytest.mark.slow))
LESS_OFTEN = pytest.mark.parametrize("device", [ON_CPU, pytest.param(OPERATIONS), SLOWLY, CUDA])
HEADS = (PLAIN, TRANSFORMS[-1])


@pytest.fixture(params=PLACES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Options(NamedTuple):
    """What a caller asks for; `old` of each row is made where the gate needs it."""

    gate: Gate | str | None = None
    label_smoothing: float = 0.0
    gem_beta: float | None = None

    def of(self, old: Tensor) -> dict[str, Any]:
        return self._replace(
            gate=Clipped(old, 0.3) if self.gate == "clipped" else self.gate
        )._asdict()


OBJECTIVES = {
    "ntp": Options(),
    "dft": Options(Power(1.0)),
    "power": Options(Power(2.5)),
    "above": Options(Threshold(0.02)),
    "below": Options(Threshold(0.02, keep="below")),
    "eaft": Options(Entropy(1.0)),
    "entropy": Options(Entropy(0.5)),
    "psft": Options("clipped"),
    "smoothed": Options(label_smoothing=0.2),
    "gem": Options(gem_beta=0.7),
}
GATES = [name for name, options in OBJECTIVES.items() if options.gate is not None]
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


class Rows(NamedTuple):
    """Rows of logits with one label each."""

    logits: Tensor  # (K, V)
    labels: Tensor  # (K,)
    weight: Tensor  # (K,)
    old: Tensor  # (K,) log-probabilities


class Found(NamedTuple):
    """Weighted losses, the gradient of their sum, and stats."""

    loss: Tensor
    gradient: Tensor
    nll: Tensor
    entropy: Tensor
    is_top: Tensor


def some_rows(count: int, vocab_size: int, dtype: torch.dtype = torch.float32) -> Rows:
    """Rows of which the label of every third is likely, and of some all but certain."""
    logits, labels = 2.0 * torch.randn(count, vocab_size), torch.randint(0, vocab_size, (count,))
    sure = torch.arange(count) % 3 == 0
    logits[sure, labels[sure]] += torch.linspace(0.0, 25.0, int(sure.sum()))
    weight, old = 0.5 + torch.rand(count), -6.0 * torch.rand(count)
    return Rows(logits.to(dtype), labels, weight, old)


def enough(device: str) -> int:
    """The interpreter is slow."""
    return 12 if device == "cpu" else 200


def run(
    rows: Rows,
    options: Options,
    transform: LogitTransform,
    device: str,
    *,
    stats: bool = True,
    needs_gradient: bool = True,
) -> Found:
    """The row op amid NaN."""
    place = "cpu" if device == OPERATIONS else place_of(device)
    ops = pytorch if device == OPERATIONS else ops_of(device)
    logits, count = amid_nan(rows.logits, place, columns=5), rows.labels.numel()
    room = torch.full((3, count), NAN, device=place) if stats else None
    objective = objective_of(**options.of(amid_nan(rows.old, place)))._replace(stats=room)
    loss = ops.soft_rows_(
        logits,
        rows.labels.to(place).unsqueeze(-1),
        None,
        amid_nan(rows.weight, place),
        transform,
        needs_gradient,
        objective,
    )
    found = torch.zeros(3, count) if room is None else room.cpu()
    return Found(loss.cpu(), take(logits), *found)


def dense(
    rows: Rows, options: Options, transform: LogitTransform, *, double: bool = False
) -> Found:
    """The reference on raw logits, which are a head of their own."""
    leaf = rows.logits.double() if double else rows.logits.clone()
    logits = leaf.requires_grad_().to(torch.promote_types(leaf.dtype, torch.float32))
    logits = logits * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    log_probs = logits.log_softmax(-1)
    weight = rows.weight.to(log_probs)
    losses = reference.token_losses(log_probs, rows.labels, weight, **options.of(rows.old))
    losses.sum().backward()
    assert leaf.grad is not None
    stats = reference.token_stats(log_probs, rows.labels, torch.ones_like(weight))
    return Found(losses.detach(), leaf.grad, *stats)


def assert_in_budget(found: Found, rows: Rows, options: Options, transform: LogitTransform) -> None:
    """Hold the row op to the budget, with PyTorch's error on 200 more rows of the same kind."""
    truth = dense(rows, options, transform, double=True)
    more = some_rows(200, rows.logits.shape[1], rows.logits.dtype)
    torchs, exact = dense(more, options, transform), dense(more, options, transform, double=True)
    fields = list(zip(Found._fields, found, truth, torchs, exact, strict=True))
    for name, ours, true, plain, plain_true in fields[:-1]:
        check(name, ours, true, plain.double() - plain_true)
    assert torch.equal(found.is_top == 1, truth.is_top)


@every_objective
@pytest.mark.parametrize("transform", HEADS)
def test_every_objective_is_in_budget(device: str, name: str, transform: LogitTransform) -> None:
    rows, options = some_rows(enough(device), 515), OBJECTIVES[name]
    assert_in_budget(run(rows, options, transform, device), rows, options, transform)


@LESS_OFTEN
@every_objective
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_objective_in_half_precision(device: str, name: str, dtype: torch.dtype) -> None:
    if device == "cpu" and dtype not in DTYPES["cpu"]:
        pytest.skip("the interpreter truncates float32 where it stores bfloat16")
    rows, options = some_rows(enough(device), 515, dtype), OBJECTIVES[name]
    assert_in_budget(run(rows, options, PLAIN, device), rows, options, PLAIN)


@LESS_OFTEN
@every_objective
@pytest.mark.parametrize("vocab_size", [1, 2, 4099])
def test_ragged_vocabularies(device: str, name: str, vocab_size: int) -> None:
    rows, options = some_rows(6, vocab_size), OBJECTIVES[name]
    rows.labels[0] = vocab_size - 1
    assert_in_budget(run(rows, options, PLAIN, device), rows, options, PLAIN)


def test_gates_that_are_one_change_no_bit(device: str) -> None:
    rows = some_rows(6, 515)
    plain = run(rows, Options(), PLAIN, device, stats=False)
    for gate in (Power(0.0), Threshold(0.0)):
        found = run(rows, Options(gate), PLAIN, device, stats=False)
        assert torch.equal(found.loss, plain.loss)
        assert torch.equal(found.gradient, plain.gradient)


@every_objective
def test_without_stats_and_gradient_nothing_else_changes(device: str, name: str) -> None:
    rows, options = some_rows(6, 515), OBJECTIVES[name]
    whole = run(rows, options, PLAIN, device)
    found = run(rows, options, PLAIN, device, stats=False, needs_gradient=False)
    if device != OPERATIONS:  # which work in place
        assert torch.equal(found.gradient, rows.logits)
    torch.testing.assert_close(found.loss, whole.loss, rtol=1e-6, atol=1e-6)


@every_objective
def test_a_nan_row_and_a_row_of_weight_zero_stay_alone(device: str, name: str) -> None:
    rows, options = some_rows(6, 515), OBJECTIVES[name]
    clean = run(rows, options, PLAIN, device)
    rows.logits[1] = NAN
    rows.weight[2], rows.weight[3] = 0.0, NAN
    if device != OPERATIONS:  # whose callers leave such rows out
        rows.logits[2] = NAN
    found, others = run(rows, options, PLAIN, device), torch.tensor([0, 4, 5])
    assert found.loss[[1, 3]].isnan().all()
    assert found.gradient[[1, 3]].isnan().all()
    assert found.nll[1].isnan()
    assert found.entropy[1].isnan()
    assert not found.is_top[1]
    assert not found.loss[2]
    assert not found.gradient[2].any()
    for ours, expected in zip(found, clean, strict=True):
        assert torch.equal(ours[others], expected[others])


@every_objective
def test_masked_tokens_are_of_dense_torchs_class(device: str, name: str) -> None:
    """A bias of -inf masks a token: of it no entropy, and an infinite NLL where it is the label."""
    rows, options = some_rows(4, 123), OBJECTIVES[name]
    rows.labels[:] = 7
    rows.logits[0, 5] = rows.logits[1, 7] = rows.logits[3, :100] = -INF
    rows.logits[3, 7] = 1.0
    found, expected = run(rows, options, PLAIN, device), dense(rows, options, PLAIN)
    for field, ours, torchs in zip(Found._fields, found, expected, strict=True):
        if name in ("smoothed", "gem") and field in ("loss", "gradient"):
            # Dense PyTorch multiplies 0 by inf there.
            ours, torchs = ours[2], torchs[2]
        assert same_class(ours, torchs.to(ours)), field
    torch.testing.assert_close(found.entropy, expected.entropy, rtol=1e-5, atol=1e-6)


@every_objective
def test_confident_rows_are_relatively_exact(device: str, name: str) -> None:
    """NLL, entropy and gradient of p up to 1 - 1e-16, to float32's own precision."""
    gap = torch.tensor([5.0, 14.0, 20.0, 37.0])
    logits, labels = torch.zeros(4, 9), torch.full((4,), 3)
    logits[:, 3] = gap
    rows = Rows(logits, labels, torch.ones(4), torch.full((4,), -1e-3))
    found = run(rows, Options(), PLAIN, device)
    others = 8 * torch.exp(-gap.double())
    p, nll = 1 / (1 + others), torch.log1p(others)
    entropy = p * nll + (others / (1 + others)) * (nll + gap.double())
    bound = 8 * (gap + 8) * torch.finfo(torch.float32).eps
    for ours, truth in ((found.nll, nll), (found.entropy, entropy)):
        assert ((ours.double() - truth).abs() <= bound * truth).all()
    gated = run(rows, OBJECTIVES[name], PLAIN, device).gradient
    if name in GATES and name not in ("eaft", "entropy", "below"):
        assert (gated[:, 3] < 0).all()
    assert found.is_top.all()


@LESS_OFTEN
@every_objective
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_logits_leave_no_doubt_and_no_nan(device: str, name: str, size: float) -> None:
    """The probability of a label is 1 or 0, so that gates are closed or open."""
    rows, options = some_rows(4, 123), OBJECTIVES[name]
    rows.logits[0, rows.labels[0]] = rows.logits[1, (rows.labels[1] + 1) % 123] = 9.0
    rows = rows._replace(logits=size * rows.logits)
    found = run(rows, options, PLAIN, device)
    truth = dense(rows, options, PLAIN, double=True)
    for ours, expected in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), expected.double(), rtol=1e-6, atol=1e-6)
    assert found.is_top[:2].tolist() == [1.0, 0.0]


@every_objective
def test_a_tie_is_a_top_choice(device: str, name: str) -> None:
    """No other token has a larger logit: one that is larger by a bit is one too many."""
    logits, labels = torch.zeros(3, 9), torch.tensor([4, 4, 4])
    logits[1:, 4] = 1.0
    logits[1, 2] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    rows = Rows(logits, labels, torch.ones(3), -torch.ones(3))
    found = run(rows, OBJECTIVES[name], PLAIN, device)
    assert found.is_top.tolist() == [1.0, 0.0, 1.0]


@every_objective
def test_one_nan_makes_the_row_nan_and_no_choice_is_top(device: str, name: str) -> None:
    """Though a maximum may not see it."""
    rows, options = some_rows(3, 515), OBJECTIVES[name]
    rows.logits[1, rows.labels[1]] = 9.0
    rows.logits[1, (rows.labels[1] + 1) % 515] = NAN
    found = run(rows, options, PLAIN, device)
    for ours in (found.loss, found.nll, found.entropy):
        assert ours.isnan().tolist() == [False, True, False]
    assert found.gradient[1].isnan().all()
    assert not found.is_top[1]


@pytest.mark.parametrize("name", ["dft", "above", "eaft", "psft", "ntp"])
def test_a_pair_of_weight_zero_is_bitwise_two_rows_of_the_gate(device: str, name: str) -> None:
    """The NTP of pairs is gated, and the Mixup beside it is not."""
    place = "cpu" if device == OPERATIONS else place_of(device)
    ops = pytorch if device == OPERATIONS else ops_of(device)
    rows, options = some_rows(6, 515), OBJECTIVES[name]
    expected = run(rows, options, PLAIN, device)

    def pairs(mix: float, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits, room = rows.logits.clone().to(place), torch.full((3, 6), NAN, device=place)
        objective = objective_of(**options.of(rows.old.to(place)))._replace(stats=room)
        share = torch.tensor([[0.25, 0.75]] * 3, device=place)
        ntp, mixup = ops.pair_rows_(
            logits,
            rows.labels.to(place),
            rows.weight.to(place),
            share,
            torch.full((3,), mix, device=place),
            torch.ones((), device=place),
            PLAIN,
            True,
            objective,
        )
        return ntp.cpu(), mixup.cpu(), logits.cpu(), room.cpu()

    ntp, mixup, gradient, room = pairs(0.0, options)
    assert not mixup.any()
    for ours, theirs in zip((ntp, gradient, *room), expected, strict=True):
        assert torch.equal(ours, theirs)
    ntp, mixup, gradient, _ = pairs(1.0, options)
    _, plain_mixup, plain_gradient, _ = pairs(1.0, Options())
    plain = run(rows, Options(), PLAIN, device)
    assert torch.equal(ntp, expected.loss)
    assert torch.equal(mixup, plain_mixup)
    torch.testing.assert_close(
        gradient - expected.gradient, plain_gradient - plain.gradient, rtol=1e-4, atol=1e-6
    )


@pytest.mark.skipif(ON_CPU.marks[0].args[0], reason="the extension is not built")
def test_objectives_that_rows_do_not_have_are_refused() -> None:
    rows, two = some_rows(2, 9), torch.zeros(2, 2, dtype=torch.int64)
    one = two[:, :1].contiguous()
    share = torch.full((2, 2), 0.5)
    for objective in (objective_of(Power(1.0)), Objective(stats=torch.zeros(3, 2))):
        with pytest.raises(RuntimeError, match="kind: expected 0"):
            cpu.soft_rows_(rows.logits, two, share, rows.weight, PLAIN, True, objective)
    for kind in (-1, 8):
        with pytest.raises(RuntimeError, match=f"kind: expected .*, got {kind}"):
            cpu.soft_rows_(rows.logits, one, None, rows.weight, PLAIN, True, Objective(kind))
    with pytest.raises(RuntimeError, match="old_log_probs: expected with kind 5"):
        cpu.soft_rows_(rows.logits, one, None, rows.weight, PLAIN, True, Objective(5))
    with pytest.raises(RuntimeError, match="stats: expected"):
        cpu.soft_rows_(
            rows.logits, one, None, rows.weight, PLAIN, True, Objective(stats=torch.zeros(2))
        )
