"""The objectives of `fused_cross_entropy` and of NTP in `fused_sftmix_loss`: weights, gates, stats.

Of each the gradient equals autograd's of the dense formula (`reference.py`, which
`test_reference.py` holds to the papers'); `row_chunks/test_row_objectives.py` has the rows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sftmix_kernels import (
    Clipped,
    Entropy,
    Power,
    RowChunks,
    SFTMixLoss,
    Threshold,
    TokenStats,
    VocabTiles,
    fused_cross_entropy,
    fused_sftmix_loss,
    reference,
)
from sftmix_kernels.gates import Kind, Objective
from sftmix_kernels.mixup_loss import mixup_rows
from sftmix_kernels.row_chunks import cpu, pytorch
from sftmix_kernels.row_chunks.pytorch import Row
from sftmix_kernels.sftmix_loss import sftmix_rows

from .budget import (
    DTYPES,
    HEADS,
    assert_in_budget,
    assert_refused,
    assert_same_bits,
    exact,
    head_inputs,
    run,
    some_labels,
)

R, D, V = 60, 24, 515
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dft": {"gate": Power(1.0)},
    "power": {"gate": Power(2.5)},
    "above": {"gate": Threshold(0.002)},
    "below": {"gate": Threshold(0.002, keep="below")},
    "eaft": {"gate": Entropy(1.5)},
    "psft": {"gate": Clipped(torch.linspace(-9.0, -4.0, R), 0.3)},
    "smoothed": {"label_smoothing": 0.2},
    "gem": {"gem_beta": 0.7},
    "weighted": {"row_weight": torch.linspace(0.0, 2.0, R)},
    "weighted dft": {"row_weight": torch.linspace(0.0, 2.0, R), "gate": Power(1.0)},
}
GATES = {name: options for name, options in OBJECTIVES.items() if "gate" in options}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)
# PyTorch's own tracing of an autograd.Function uses what PyTorch deprecates.
ignore_tracing_warning = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def assert_loss_in_budget(
    tensors: dict[str, Tensor], labels: Tensor, upstream: float | Tensor = 0.37, **options: Any
) -> None:
    """Our loss against the dense one; the scalar's PyTorch error counted per row."""
    dense = {k: v for k, v in options.items() if k != "schedule"}
    parts = {k: v for k, v in dense.items() if k != "reduction"}
    divisor = max(1, int((labels != -100).sum())) if "reduction" not in options else 1

    def rows(**t: Tensor) -> Tensor:
        losses = reference.cross_entropy(**t, labels=labels, reduction="none", **parts)
        return losses / divisor  # type: ignore[no-any-return]

    assert_in_budget(
        lambda **t: fused_cross_entropy(**t, labels=labels, **options),
        lambda **t: reference.cross_entropy(**t, labels=labels, **dense),
        tensors,
        upstream=upstream,
        rows=None if options.get("reduction") == "none" else rows,
    )


def inputs(dtype: torch.dtype = torch.float32, *, bias: bool = False) -> dict[str, Tensor]:
    return head_inputs((R, D), V, dtype, bias=bias)


@every_objective
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_objective_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    options = {**HEADS[-1], **OBJECTIVES[name]}
    tensors = inputs(dtype, bias=bool(options.pop("bias")))
    assert_loss_in_budget(tensors, some_labels((R,), V, ignored=0.3), **options)


@every_objective
def test_upstream_gradients_that_are_not_uniform(name: str) -> None:
    labels, options = some_labels((R,), V, ignored=0.3), OBJECTIVES[name]
    assert_loss_in_budget(inputs(), labels, torch.randn(R), reduction="none", **options)
    assert_loss_in_budget(inputs(), labels, reduction="sum", **options)


@every_objective
def test_by_pytorch_operations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for rows_ in ("soft_rows_", "pair_rows_"):
        monkeypatch.setattr(cpu, rows_, getattr(pytorch, rows_))
    assert_loss_in_budget(inputs(bias=True), some_labels((R,), V), softcap=5.0, **OBJECTIVES[name])
    assert_sftmix_in_budget(name if name in GATES else "weighted")


@every_objective
def test_any_chunk_size_gives_the_same_row_losses_and_stats(name: str) -> None:
    hidden, weight, labels = exact(R, D), exact(V, D), some_labels((R,), V, ignored=0.2)
    options = {"reduction": "none", "stats": True, **OBJECTIVES[name]}
    whole, stats = fused_cross_entropy(hidden, weight, labels, **options)
    found, others = fused_cross_entropy(
        hidden, weight, labels, schedule=RowChunks(rows=16), **options
    )
    assert torch.equal(found, whole)
    assert all(torch.equal(one, other) for one, other in zip(stats, others, strict=True))


@every_objective
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_input_has_no_gradient_and_changes_no_other(name: str, frozen: str) -> None:
    tensors, labels = inputs(), some_labels((R,), V)

    def loss(**t: Tensor) -> Tensor:
        return fused_cross_entropy(**t, labels=labels, **OBJECTIVES[name])

    both, constant = run(loss, tensors), tensors.pop(frozen)
    one = run(lambda **t: loss(**t, **{frozen: constant}), tensors)
    gradients = {k: v for k, v in both.gradients.items() if k != frozen}
    assert_same_bits(one, both._replace(gradients=gradients))


@every_objective
def test_nothing_to_average_is_zero_and_a_bad_label_is_nan_alone(name: str) -> None:
    tensors, ignored = inputs(), torch.full((R,), -100)
    options = {k: v for k, v in OBJECTIVES[name].items() if k != "row_weight"}
    found = run(lambda **t: fused_cross_entropy(**t, labels=ignored, **options), tensors)
    assert not found.loss
    assert all(g is not None and not g.any() for g in found.gradients.values())
    labels = some_labels((R,), V)
    bad, others = labels.clone(), torch.arange(R) != 7
    bad[7] = V
    more = {"reduction": "none", "stats": True, **options}
    good, stats = fused_cross_entropy(**tensors, labels=labels, **more)
    losses, bad_stats = fused_cross_entropy(**tensors, labels=bad, **more)
    assert losses[7].isnan()
    assert bad_stats.nll[7].isnan()
    assert not bad_stats.is_top[7]
    assert torch.equal(losses[others], good[others])
    for one, other in zip(bad_stats, stats, strict=True):
        assert torch.equal(one[others], other[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_stats_are_the_references(dtype: torch.dtype) -> None:
    """In labels' shape, detached, and those of the plain softmax whatever the objective."""
    tensors, labels = inputs(dtype, bias=True), some_labels((R,), V, ignored=0.3)
    labels[::2] = reference.log_probabilities(**tensors).argmax(-1)[::2]
    leaves = {k: v.requires_grad_() for k, v in tensors.items()}
    tensors["hidden"] = leaves["hidden"].view(6, 10, D)
    labels = labels.view(6, 10)
    doubles = {k: v.double() for k, v in tensors.items()}
    _, truth = reference.cross_entropy(**doubles, labels=labels, stats=True)
    _, plain = reference.cross_entropy(**tensors, labels=labels, stats=True)
    for options in ({}, {"gate": Power(1.0)}, {"gem_beta": 0.7}, {"label_smoothing": 0.1}):
        loss, stats = fused_cross_entropy(**leaves | tensors, labels=labels, stats=True, **options)
        assert isinstance(stats, TokenStats)
        assert loss.requires_grad
        for name in ("nll", "entropy"):
            found, true, dense = (getattr(s, name) for s in (stats, truth, plain))
            error = (dense.double() - true).abs().max()
            assert found.dtype == torch.float32
            assert not found.requires_grad
            assert (found - true).abs().max() <= 2 * error + 1e-6
            assert not found[labels == -100].any()
        top = true_gap(doubles, labels).abs() > 1e-2  # no tie to rounding
        assert torch.equal(stats.is_top[top], truth.is_top[top])
        assert top[labels != -100].sum() > 20


def true_gap(tensors: dict[str, Tensor], labels: Tensor) -> Tensor:
    """The label's log-probability less the largest of the others."""
    log_probs = reference.log_probabilities(**tensors).detach()
    column = labels.clamp(min=0).unsqueeze(-1)
    others = log_probs.scatter(-1, column, -torch.inf).amax(-1)
    return log_probs.gather(-1, column).squeeze(-1) - others


def test_a_weight_of_zero_leaves_a_token_out_but_not_out_of_the_count() -> None:
    tensors, labels = inputs(), some_labels((R,), V)
    weight = torch.ones(R)
    weight[::3] = 0.0
    masked = labels.masked_fill(weight == 0, -100)
    expected = run(lambda **t: fused_cross_entropy(**t, labels=masked, divisor=float(R)), tensors)
    tensors["hidden"][::3] = torch.nan
    found = run(lambda **t: fused_cross_entropy(**t, labels=labels, row_weight=weight), tensors)
    assert_same_bits(found, expected)


def test_what_was_impossible_before_is_beyond_every_clip() -> None:
    """An old probability of 0 makes the ratio infinite: no gradient, and no NaN."""
    old = torch.full((R,), -torch.inf)
    old[::2] = -9.0
    options = {"gate": Clipped(old, 0.3), "reduction": "none"}
    tensors, labels = inputs(), some_labels((R,), V)
    losses = fused_cross_entropy(**tensors, labels=labels, **options)
    assert not losses[1::2].any()
    assert losses.any()
    expected = reference.cross_entropy(**tensors, labels=labels, **options)
    torch.testing.assert_close(losses, expected)


def assert_sftmix_in_budget(name: str) -> None:
    """The joint loss with a gate or weights, mixed pairs, unmixed ones and single rows."""
    tensors, labels = inputs(), some_labels((R,), V, ignored=0.2)
    rows = torch.randperm(R)[:40]
    more = {"pair_c": rows[::2], "pair_u": rows[1::2], "lam": torch.rand(20), "mu": 0.9}

    def parts(**t: Tensor) -> Tensor:
        ntp = reference.cross_entropy(**t, labels=labels, reduction="none", **OBJECTIVES[name])
        mixup = reference.mixup_loss(
            t["hidden"][more["pair_c"]],
            t["hidden"][more["pair_u"]],
            t["weight"],
            labels[more["pair_c"]],
            labels[more["pair_u"]],
            more["lam"],
            reduction="none",
        )
        both = 0.9 * mixup / (mixup != 0).sum()
        return torch.cat((ntp / (labels != -100).sum(), both))

    def ours(**t: Tensor) -> Tensor:
        found, _ = fused_sftmix_loss(**t, labels=labels, stats=True, **more, **OBJECTIVES[name])
        assert isinstance(found, SFTMixLoss)
        return found.loss

    assert_in_budget(
        ours,
        lambda **t: reference.sftmix_loss(**t, labels=labels, **more, **OBJECTIVES[name]).loss,
        tensors,
        rows=parts,
    )


@pytest.mark.parametrize("name", [*GATES, "weighted"])
def test_ntp_of_the_joint_loss_has_gates_and_weights(name: str) -> None:
    assert_sftmix_in_budget(name)


@pytest.mark.parametrize("mu", [0.0, 0.2])
def test_stats_of_the_joint_loss_are_those_of_the_cross_entropy(mu: float) -> None:
    hidden, weight, labels = exact(R, D), exact(V, D), some_labels((R,), V, ignored=0.2)
    labels = labels.view(2, -1)
    hidden = hidden.view(2, -1, D)
    pairs = {"pair_c": torch.arange(20), "pair_u": torch.arange(25, 45), "lam": 0.3, "mu": mu}
    _, expected = fused_cross_entropy(hidden, weight, labels, stats=True)
    losses, found = fused_sftmix_loss(hidden, weight, labels, **pairs, stats=True)
    plain = fused_sftmix_loss(hidden, weight, labels, **pairs)
    assert torch.equal(losses.loss, plain.loss) or mu
    torch.testing.assert_close(losses, plain, rtol=1e-6, atol=0)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_pair_with_a_token_of_weight_zero_is_not_mixed() -> None:
    hidden, weight, labels = exact(4, D), exact(V, D), some_labels((4,), V)
    pairs = {"pair_c": torch.tensor([0, 1]), "pair_u": torch.tensor([2, 3]), "lam": 0.3}
    row_weight = torch.tensor([0.0, 1.0, 1.0, 0.5])
    found = fused_sftmix_loss(hidden, weight, labels, row_weight=row_weight, **pairs)
    alone = {k: v[1:] if isinstance(v, Tensor) else v for k, v in pairs.items()}
    expected = fused_sftmix_loss(hidden, weight, labels, **alone)
    assert torch.equal(found.mixup, expected.mixup)


@ignore_tracing_warning
@pytest.mark.parametrize("name", ["dft", "psft", "gem", "weighted"])
def test_compiled_equals_eager(name: str) -> None:
    tensors, labels = inputs(), some_labels((R,), V, ignored=0.2)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        found, stats = fused_cross_entropy(hidden, weight, labels, stats=True, **OBJECTIVES[name])
        return torch.stack((found, stats.nll.sum(), stats.entropy.sum(), stats.is_top.sum()))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same_bits(run(compiled, tensors), run(loss, tensors))


def test_opcheck() -> None:
    hidden, weight, bias = head_inputs((12, D), 123, torch.float32, bias=True).values()
    labels, ones, old = some_labels((12,), 123), torch.ones(12), -torch.rand(12)
    head = (1.5, 3.0, 4, [True, True, True])
    targets, share = labels.unsqueeze(-1), torch.ones(12, 1)
    asked = {"old_log_probs": old, "parameter": torch.tensor(0.2), "stats": True}
    asked["kind"] = int(Kind.CLIPPED)
    rows = (hidden, None, weight, bias, targets, share, ones, *head)
    torch.library.opcheck(mixup_rows, rows, asked)
    pairs = (torch.arange(4), torch.arange(4, 8), torch.tensor([1.0, 0, 1, 1]), torch.rand(4, 2))
    joint = (hidden, weight, bias, labels, ones, *pairs, None, torch.tensor(0.2), *head)
    torch.library.opcheck(sftmix_rows, joint, asked)


CALL = {**inputs(), "labels": torch.arange(R)}
OUTSIDE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"gate": "dft"}, TypeError, "gate: expected None, Power, .*got str"),
    ({"gate": Power}, TypeError, "gate: .*got Power itself"),
    ({"gate": Power(1.0), "gem_beta": 0.7}, ValueError, "gate: .* beside gem_beta"),
    ({"gate": Power(1.0), "label_smoothing": 0.1}, ValueError, "gate: .* beside label_smoothing"),
    ({"gem_beta": 0.7, "label_smoothing": 0.1}, ValueError, "label_smoothing: .* beside gem_beta"),
    ({"gem_beta": 0.0}, ValueError, "gem_beta: .*got 0.0"),
    ({"gem_beta": float("nan")}, ValueError, "gem_beta: .*got nan"),
    ({"label_smoothing": 1.0}, ValueError, r"label_smoothing: .*\[0.0, 1.0\), got 1.0"),
    ({"label_smoothing": -0.1}, ValueError, "label_smoothing: .*got -0.1"),
    ({"label_smoothing": "x"}, TypeError, "label_smoothing: expected a number, got str"),
    ({"gate": Clipped(torch.zeros(3))}, ValueError, r"old_log_probs: .*got \(3,\)"),
    ({"gate": Clipped(torch.full((R,), 0.5))}, ValueError, "old_log_probs: .*got 0.5 .* \\[0\\]"),
    ({"row_weight": torch.ones(3)}, ValueError, r"row_weight: .*got \(3,\)"),
    ({"row_weight": torch.ones(R).double()}, TypeError, "row_weight: .*got torch.float64"),
    ({"row_weight": [1.0] * R}, TypeError, "row_weight: expected a Tensor, got list"),
    ({"row_weight": -torch.ones(R)}, ValueError, r"row_weight: .*got -1.0 at position \[0\]"),
    ({"row_weight": torch.ones(R, requires_grad=True)}, ValueError, r"row_weight\.detach\(\)"),
    ({"gate": Clipped(torch.zeros(R, requires_grad=True))}, ValueError, "old_log_probs.detach"),
    ({"row_weight": torch.full((R,), torch.nan)}, ValueError, "row_weight: .*got nan"),
    ({"row_weight": torch.full((R,), torch.inf)}, ValueError, "row_weight: .*got inf"),
]


@pytest.mark.parametrize(("changed", "error", "message"), OUTSIDE)
def test_refused(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    assert_refused(fused_cross_entropy, {**CALL, **changed}, error, message)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Power(-1.0), ValueError, "k: .*at least 0, got -1.0"),
        (lambda: Power("1"), TypeError, "k: expected a number, got str"),
        (lambda: Threshold(1.5), ValueError, r"tau: .*\[0.0, 1.0\], got 1.5"),
        (lambda: Threshold(0.5, "over"), ValueError, "keep: expected 'above' or 'below', got"),
        (lambda: Entropy(float("nan")), ValueError, "alpha: .*got nan"),
        (lambda: Clipped(torch.zeros(2), -0.1), ValueError, "eps: .*got -0.1"),
        (lambda: Clipped([0.0]), TypeError, "old_log_probs: expected a Tensor, got list"),
        (lambda: Clipped(torch.zeros(2).half()), TypeError, "old_log_probs: .*got torch.float16"),
    ],
)
def test_gates_refuse(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_weights_of_ignored_tokens_may_be_anything() -> None:
    weight, labels = torch.ones(R), torch.arange(R)
    weight[3], labels[3] = torch.nan, -100
    head = {k: v for k, v in CALL.items() if k != "labels"}
    found = fused_cross_entropy(**head, labels=labels, row_weight=weight)
    assert torch.equal(found, fused_cross_entropy(**head, labels=labels))


def mutated_gate(self: Objective, nll: Tensor, evenness: Tensor | None = None) -> Tensor:
    """A power off by one, an entropy that is not divided by log V."""
    if self.kind == Kind.POWER:
        return torch.exp(-nll) ** (self.parameter + 1)
    assert evenness is not None
    return (evenness * torch.tensor(float(V)).log()).clamp(min=0).pow(self.parameter)


def undetached_gate(self: Objective, nll: Tensor, evenness: Tensor | None = None) -> Tensor:
    """What ``p nll`` has for a gradient where p is differentiated as well: ``p (1 - nll)``."""
    return torch.exp(-nll) * (1 - nll)


def flipped_gate(self: Objective, nll: Tensor, evenness: Tensor | None = None) -> Tensor:
    """The other side of a threshold."""
    p = torch.exp(-nll)
    return (p < self.parameter if self.kind == Kind.ABOVE else p >= self.parameter).to(p)


MUTANTS = [(name, mutated_gate) for name in ("dft", "power", "eaft")]
MUTANTS += [(name, flipped_gate) for name in ("above", "below")]


@pytest.mark.parametrize(("name", "mutant"), [*MUTANTS, ("dft", undetached_gate)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_gate_is_caught(
    name: str, mutant: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "soft_rows_", pytorch.soft_rows_)
    tensors, labels = inputs(dtype), some_labels((R,), V)
    assert_loss_in_budget(tensors, labels, **OBJECTIVES[name])
    monkeypatch.setattr(Objective, "gate", mutant)
    with pytest.raises(AssertionError, match="is over the error budget"):
        assert_loss_in_budget(tensors, labels, **OBJECTIVES[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smoothing_that_is_not_spread_over_the_vocabulary_is_caught(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judged(row: Row, objective: Objective, sums: Any, log_p: Any, total: Any, _: int) -> Row:
        return right(row, objective, sums, log_p, total, 1)

    monkeypatch.setattr(cpu, "soft_rows_", pytorch.soft_rows_)
    tensors, labels, right = inputs(dtype), some_labels((R,), V), Row.judged
    assert_loss_in_budget(tensors, labels, **OBJECTIVES["smoothed"])
    monkeypatch.setattr(Row, "judged", judged)
    with pytest.raises(AssertionError, match="is over the error budget"):
        assert_loss_in_budget(tensors, labels, **OBJECTIVES["smoothed"])


@every_objective
def test_a_second_backward_gives_the_same_bits(name: str) -> None:
    tensors, labels = inputs(), some_labels((R,), V, ignored=0.2)
    for reduction in ("mean", "none"):
        leaves = {k: v.clone().requires_grad_() for k, v in tensors.items()}
        loss = fused_cross_entropy(
            **leaves, labels=labels, reduction=reduction, **OBJECTIVES[name]
        ).sum()
        first, second = (
            torch.autograd.grad(loss, list(leaves.values()), retain_graph=True) for _ in range(2)
        )
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@every_objective
def test_layouts_in_memory_change_no_bit(name: str) -> None:
    """Transposed, strided, and expanded: hidden, labels, weights and old log-probabilities."""
    hidden, weight, labels = exact(R, D), exact(V, D), some_labels((R,), V, ignored=0.2)
    old, weights = torch.full((R,), -5.5), torch.full((R,), 1.5)
    options = dict(OBJECTIVES[name])
    strange = dict(options)
    if name == "psft":
        options["gate"] = Clipped(old, 0.3)
        strange["gate"] = Clipped(old[:1].expand(R), 0.3)
    if "row_weight" in options:
        options["row_weight"], strange["row_weight"] = weights, weights[:1].expand(R)
    expected = run(
        lambda **t: fused_cross_entropy(**t, labels=labels, **options),
        {"hidden": hidden, "weight": weight},
    )
    found = run(
        lambda hidden, weight: fused_cross_entropy(
            hidden.t(), weight.t(), torch.stack((labels, labels), -1)[:, 0], **strange
        ),
        {"hidden": hidden.t().contiguous(), "weight": weight.t().contiguous()},
    )
    transposed = {k: g.t() for k, g in found.gradients.items() if g is not None}
    assert_same_bits(found._replace(gradients=transposed), expected)


def test_of_one_token_there_is_nothing_to_learn() -> None:
    """V = 1: p is 1, the entropy 0, and every gradient."""
    tensors, labels = head_inputs((5, D), 1, torch.float32), torch.zeros(5, dtype=torch.int64)
    for name, options in OBJECTIVES.items():
        if name == "psft" or "row_weight" in options:
            continue
        for leaf in tensors.values():
            leaf.requires_grad_().grad = None
        loss, stats = fused_cross_entropy(**tensors, labels=labels, stats=True, **options)
        loss.backward()
        assert not loss
        assert not any(leaf.grad is None or leaf.grad.any() for leaf in tensors.values())
        assert not stats.nll.any()
        assert not stats.entropy.any()
        assert stats.is_top.all()


@every_objective
def test_kernels_of_row_chunks(device: str, name: str) -> None:
    """Through both ops, with an upstream gradient of each row too."""
    assert_kernels_in_budget(device, name, RowChunks(rows=16))
    if name in (*GATES, "weighted"):
        assert_kernels_in_budget(device, name, RowChunks(rows=16), joint=True)


@pytest.mark.parametrize("name", ["dft", "power", "above", "below", "psft", "weighted dft"])
def test_kernels_of_vocab_tiles(device: str, name: str) -> None:
    assert_kernels_in_budget(device, name, VocabTiles(max_bytes=2**15))


def assert_kernels_in_budget(device: str, name: str, schedule: Any, *, joint: bool = False) -> None:
    """In float16, of which the budget needs few rows, and the interpreter makes few."""
    options, count = dict(OBJECTIVES[name]), 30
    if "row_weight" in options:
        options["row_weight"] = options["row_weight"][::2].contiguous().to(device)
    if name == "psft":
        options["gate"] = Clipped(torch.linspace(-9.0, -4.0, count).to(device), 0.3)
    tensors = head_inputs((count, D), V, torch.float16)
    tensors = {k: v.to(device) for k, v in tensors.items()}
    labels = some_labels((count,), V, ignored=0.2).to(device)
    if not joint:
        upstream = torch.randn(count).to(device)
        more = {"reduction": "none", "schedule": schedule, **options}
        assert_loss_in_budget(tensors, labels, upstream, **more)
        return
    rows = torch.randperm(count).to(device)
    pairs = {"pair_c": rows[:9], "pair_u": rows[9:18], "lam": 0.3}
    assert_in_budget(
        lambda **t: (
            fused_sftmix_loss(**t, labels=labels, schedule=schedule, **pairs, **options).loss
        ),
        lambda **t: reference.sftmix_loss(**t, labels=labels, **pairs, **options).loss,
        tensors,
        rows=lambda **t: (
            reference.cross_entropy(**t, labels=labels, reduction="none") / len(labels)
        ),
    )


def test_tiles_refuse_by_name_what_they_do_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sftmix_kernels.schedules.runs_triton", lambda _: True)
    tiles = {**CALL, "schedule": VocabTiles()}
    for changed, name in (
        ({"gate": Entropy(1.0)}, "gate"),
        ({"label_smoothing": 0.1}, "label_smoothing"),
        ({"gem_beta": 0.7}, "gem_beta"),
        ({"stats": True}, "stats"),
    ):
        assert_refused(
            fused_cross_entropy, {**tiles, **changed}, ValueError, f"{name}: .*VocabTiles"
        )
    joint = {"pair_c": torch.tensor([0]), "pair_u": torch.tensor([1]), "lam": 0.3}
    for changed, name in (({"gate": Power(1.0)}, "gate"), ({"stats": True}, "stats")):
        assert_refused(
            fused_sftmix_loss, {**tiles, **joint, **changed}, ValueError, f"{name}: .*VocabTiles"
        )
