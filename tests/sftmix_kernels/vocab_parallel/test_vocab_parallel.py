"""Losses of a head that is shared out over two ranks, against the reference and one process.

Both ranks are started once, run the cases of `two_ranks.py` and write down what they found.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sftmix_kernels import (
    Entropy,
    RowChunks,
    VocabShard,
    VocabTiles,
    checks,
    fused_cross_entropy,
    fused_sftmix_loss,
    reference,
)
from sftmix_kernels.row_chunks import cpu, pytorch
from sftmix_kernels.vocab_parallel.shard import check_bounds
from tools.peak_memory import peak_extra_bytes

from ..budget import (
    Result,
    Tensors,
    assert_refused,
    assert_result_in_budget,
    assert_same_bits,
    head_inputs,
    run,
    same_class,
    some_labels,
)
from ..processes import start_ranks
from ..test_sftmix_loss import PAIRED_TWICE
from .two_ranks import BAD_LABELS, CASES, DENSE, OURS, Case, frozen_of, make_inputs, of, run_rank

IN_BUDGET = [name for name, case in CASES.items() if case.inputs in ("random", "confident")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(run_rank, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def whole(case: Case, name: str, ranks: list[dict[str, Any]]) -> Result:
    """Loss and gradients of both ranks together, equal bits where both have the same."""
    first, second = (rank[name] for rank in ranks)
    shared = Result(first["loss"], {k: v for k, v in first["gradients"].items() if "hidden" in k})
    assert_same_bits(Result(second["loss"], second["gradients"]), shared)
    assert first["collectives"] == second["collectives"]
    gradients = dict(first["gradients"])
    by_start = sorted(range(2), key=lambda rank: case.bounds[rank])
    for key in gradients.keys() & {"weight", "bias"}:
        gradients[key] = torch.cat([ranks[rank][name]["gradients"][key] for rank in by_start])
    return Result(first["loss"], gradients)


def dense_rows(case: Case, constants: dict[str, Any], frozen: Tensors) -> Any:
    """What adds up to a scalar loss, from the reference."""
    if case.options.get("reduction") == "none":
        return None
    head = {k: constants[k] for k in ("logit_scale", "softcap") if k in constants}

    def ntp(tensors: Tensors) -> Tensor:
        more = {k: constants[k] for k in ("gate", "row_weight") if k in constants}
        rows = reference.cross_entropy(
            **tensors, labels=constants["labels"], reduction="none", **head, **more
        )
        count = (constants["labels"] != -100).sum()
        return rows / (1.0 if "reduction" in constants else constants.get("ntp_divisor", count))

    def mixup(tensors: Tensors) -> Tensor:
        tensors, labels = dict(tensors), {k: v for k, v in constants.items() if "labels_" in k}
        if case.loss == "sftmix":
            hidden = tensors.pop("hidden")
            for side in "cu":
                tensors[f"hidden_{side}"] = hidden[constants[f"pair_{side}"]]
                labels[f"labels_{side}"] = constants["labels"][constants[f"pair_{side}"]]
        rows = reference.mixup_loss(
            **tensors, **labels, lam=constants["lam"], reduction="none", **head
        )
        count = torch.stack([y != -100 for y in labels.values()]).all(0).sum()
        return rows / constants.get("divisor", constants.get("mixup_divisor", count))

    def rows(**tensors: Tensor) -> Tensor:
        everything = {**tensors, **{k: v.to(tensors["weight"].dtype) for k, v in frozen.items()}}
        terms = [ntp(everything)] if case.loss != "mixup" else []
        if case.loss != "ntp":
            terms.append(constants.get("mu", 0.2) * mixup(everything))
        return torch.cat(terms)

    return rows if not frozen else None


@pytest.mark.parametrize("name", IN_BUDGET)
def test_two_ranks_are_in_budget(name: str, ranks: list[dict[str, Any]]) -> None:
    case = CASES[name]
    tensors, constants, upstream = make_inputs(case)
    frozen = frozen_of(case, tensors)
    dense = of(DENSE[case.loss], constants, {})

    def any_dtype(**t: Tensor) -> Tensor:
        dtype = next(iter(t.values())).dtype
        return dense(**t, **{name: tensor.to(dtype) for name, tensor in frozen.items()})

    rows = dense_rows(case, constants, frozen)
    assert_result_in_budget(
        whole(case, name, ranks), any_dtype, tensors, upstream=upstream, rows=rows
    )


def one_process(name: str) -> Result:
    """The unsharded op on the same inputs."""
    case = CASES[name]
    tensors, constants, upstream = make_inputs(case)
    call = of(OURS[case.loss], constants, frozen_of(case, tensors), schedule=case.schedule)
    return run(call, tensors, upstream)


@pytest.mark.parametrize("name", [name for name in CASES if "empty" in name])
def test_one_rank_with_all_tokens_gives_the_bits_of_one_process(
    name: str, ranks: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both in PyTorch operations, as a rank's columns are."""
    for rows_ in ("soft_rows_", "pair_rows_"):
        monkeypatch.setattr(cpu, rows_, getattr(pytorch, rows_))
    assert_same_bits(whole(CASES[name], name, ranks), one_process(name))


@pytest.mark.parametrize("name", [name for name in CASES if "masked" in name])
def test_a_shard_masked_by_its_bias(name: str, ranks: list[dict[str, Any]]) -> None:
    found, expected = whole(CASES[name], name, ranks), one_process(name)
    assert found.loss.isfinite()
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
    for key, gradient in expected.gradients.items():
        other = found.gradients[key]
        assert gradient is not None
        assert other is not None
        assert same_class(other, gradient)
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-8)


def test_mu_zero_is_bitwise_ntp(ranks: list[dict[str, Any]]) -> None:
    found, plain = (whole(CASES[name], name, ranks) for name in ("mu 0", "mu 0 is ntp"))
    assert_same_bits(found, plain)


@pytest.mark.parametrize("label", BAD_LABELS)
def test_a_label_of_no_rank_makes_its_row_nan_alone(
    label: int, ranks: list[dict[str, Any]]
) -> None:
    """515 is the first row of padding of the last rank."""
    others = torch.arange(205) != 7
    for rank in ranks:
        good, bad = rank["good"], rank[f"bad {label}"]
        assert bad["row_ntp"][7].isnan()
        assert torch.equal(bad["row_ntp"][others], good["row_ntp"][others])
        gradient = bad["gradients"]["hidden"]
        assert gradient[7].isnan().all()
        assert torch.equal(gradient[others], good["gradients"]["hidden"][others])


def test_frozen_inputs_change_no_other_gradient(ranks: list[dict[str, Any]]) -> None:
    """And no collective is spent on the gradient of a frozen hidden."""
    for rank in ranks:
        both = rank[f"{torch.float32} head 1"]
        for name, case in CASES.items():
            if case.frozen:
                kept = {k: v for k, v in both["gradients"].items() if k not in case.frozen}
                found = Result(rank[name]["loss"], rank[name]["gradients"])
                assert_same_bits(found, Result(both["loss"], kept))
                assert found.gradients.keys() == kept.keys()
                reductions = ["max", "sum"] + ["sum"] * ("hidden" not in case.frozen)
                assert rank[name]["collectives"] == reductions


@pytest.mark.parametrize("name", ["ignored", "none", "ignored, mixup", "none, mixup"])
def test_nothing_to_average_is_zero(name: str, ranks: list[dict[str, Any]]) -> None:
    found = whole(CASES[name], name, ranks)
    assert found.loss == 0
    assert all(g is not None and not g.any() for g in found.gradients.values())


def test_collectives_follow_from_the_widest_shard(ranks: list[dict[str, Any]]) -> None:
    """Two for each chunk, and one for dH; `whole` holds the ranks to the same ones."""
    labels = make_inputs(CASES["byte cap"]).constants["labels"]
    chunks = min(-(-int((labels != -100).sum()) // 16), int((labels != -100).sum()) // 18)
    assert ranks[0]["byte cap"]["collectives"] == ["max", "sum"] * chunks + ["sum"]
    rows = ranks[0][f"{torch.float32} rows"]["collectives"]
    assert rows == ["max", "sum", "max", "sum", "sum"]


def test_row_losses_are_those_of_one_process(ranks: list[dict[str, Any]]) -> None:
    name = f"{torch.float32} head 0"
    tensors, constants, _ = make_inputs(CASES[name])
    expected = torch.empty(205)
    fused_sftmix_loss(**tensors, **constants, row_ntp_out=expected)
    assert torch.equal(ranks[0][name]["row_ntp"], ranks[1][name]["row_ntp"])
    torch.testing.assert_close(ranks[0][name]["row_ntp"], expected, rtol=1e-6, atol=0)


def test_bounds_that_do_not_fit_are_refused_on_both_ranks(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["refused"] == ranks[1]["refused"]
    gap, overlap, late, backwards, negative, empty = ranks[0]["refused"]
    assert "a gap at token 5 of [(0, 5), (6, 9)]" in gap
    assert "an overlap at token 4" in overlap
    assert "a gap at token 0" in late
    assert "got 9 and 5 on rank 1" in backwards
    assert "got -1 and 5 on rank 0" in negative
    assert "a vocabulary with tokens" in empty
    check_bounds([(5, 9), (5, 5), (0, 5)])


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dist.ProcessGroup]:
    """A group of this process alone."""
    store = tmp_path_factory.mktemp("alone") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"start": 1.0}, TypeError, "start: expected an integer, got float"),
        ({"stop": True}, TypeError, "stop: expected an integer, got bool"),
        ({"start": -1}, ValueError, "start, stop: .* got -1 and 9"),
        ({"start": 10}, ValueError, "start, stop: .* got 10 and 9"),
        ({"group": -100}, TypeError, "group: expected a process group .* got int"),
        ({"group": "tp"}, TypeError, "group: expected a process group .* got str"),
    ],
)
def test_shard_refused(
    changed: dict[str, Any], error: type[Exception], message: str, group: dist.ProcessGroup
) -> None:
    assert_refused(VocabShard, {"start": 0, "stop": 9, "group": group, **changed}, error, message)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"weight": torch.randn(8, 4)}, ValueError, r"weight: .* V >= 9 and D >= 1, got \(8, 4\)"),
        ({"bias": torch.randn(8)}, ValueError, r"bias: expected shape \(9,\)"),
        ({"vocab_parallel": (0, 9)}, TypeError, "vocab_parallel: expected a VocabShard, got tuple"),
        ({"schedule": "vocab_tiles"}, ValueError, "schedule: .* got 'vocab_tiles'"),
        ({"schedule": VocabTiles()}, ValueError, "schedule: .* with vocab_parallel"),
        ({"schedule": "tiles"}, ValueError, "schedule: .* got 'tiles'"),
        ({"labels": torch.tensor([1, 9, 3]), "validate": True}, ValueError, "labels: .* got 9"),
        ({"gate": Entropy(1.0)}, ValueError, "gate: .*Entropy with vocab_parallel"),
        ({"stats": True}, ValueError, "stats: .* with vocab_parallel"),
    ],
)
def test_call_refused(
    changed: dict[str, Any], error: type[Exception], message: str, group: dist.ProcessGroup
) -> None:
    """Of three rows of padding 9 is the first: no token."""
    weight = torch.randn(9 + 3 * ("validate" in changed), 4)
    good = {"hidden": torch.randn(3, 4), "weight": weight, "labels": torch.tensor([1, 2, 3])}
    good["vocab_parallel"] = VocabShard(0, 9, group)
    assert_refused(fused_cross_entropy, {**good, **changed}, error, message)
    pairs = {"pair_c": torch.tensor([0]), "pair_u": torch.tensor([1]), "lam": 0.3}
    assert_refused(fused_sftmix_loss, {**good, **pairs, **changed}, error, message)


def test_not_initialised_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    with pytest.raises(ValueError, match=r"group: expected torch.distributed to be initialised"):
        VocabShard(0, 9, None)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_equals_eager(group: dist.ProcessGroup) -> None:
    tensors, constants, _ = make_inputs(CASES[f"{torch.bfloat16} head 4"])
    call = of(fused_sftmix_loss, constants, {}, vocab_parallel=VocabShard(0, 515, group))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same_bits(run(compiled, tensors), run(call, tensors))


@pytest.mark.parametrize(("pair_c", "pair_u"), PAIRED_TWICE)
def test_rows_paired_twice_make_all_nan_where_values_are_not_read(
    pair_c: list[int],
    pair_u: list[int],
    group: dist.ProcessGroup,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checks, "values_are_free", lambda tensor: False)
    pairs = {"pair_c": torch.tensor(pair_c), "pair_u": torch.tensor(pair_u), "lam": 0.3}
    constants = {"labels": some_labels((6,), 123), **pairs}
    call = of(fused_sftmix_loss, constants, {}, vocab_parallel=VocabShard(0, 123, group))
    found = run(call, head_inputs((6, 8), 123, torch.float32, bias=True))
    assert found.loss.isnan()
    assert all(g is not None and g.isnan().all() for g in found.gradients.values())


def test_double_backward_is_a_clear_error(group: dist.ProcessGroup) -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4)
    for reduction in ("mean", "none"):
        loss = fused_cross_entropy(
            hidden,
            weight,
            torch.tensor([1, 2, 3]),
            reduction=reduction,
            vocab_parallel=VocabShard(0, 9, group),
        ).sum()
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_peak_memory_is_the_stated_formula(
    dtype: torch.dtype, frozen: bool, group: dist.ProcessGroup
) -> None:
    rows, size, vocab_size, chunk, block = 1024, 64, 8000, 256, 2**21
    tensors = head_inputs((rows, size), vocab_size, dtype)
    hidden, weight = (
        tensors["hidden"].requires_grad_(),
        tensors["weight"].requires_grad_(not frozen),
    )
    labels, order = some_labels((rows,), vocab_size), torch.randperm(rows)
    plan = {"pair_c": order[:400], "pair_u": order[400:800], "lam": 0.3}
    shard, width = VocabShard(0, vocab_size, group), dtype.itemsize
    head = 0 if frozen else vocab_size * size
    kept = 4 * head + 4 * rows * size
    copies = 0 if width == 4 else 4 * (chunk * vocab_size + vocab_size * size)
    logits = width * chunk * vocab_size + (4 + width) * chunk * size
    forward = logits + max(7 * block, copies)
    handed_out = width * (head + rows * size)

    def step() -> Tensor:
        schedule = RowChunks(rows=chunk)
        loss = fused_sftmix_loss(
            hidden, weight, labels, schedule=schedule, vocab_parallel=shard, **plan
        ).loss
        loss.backward()
        return loss

    assert peak_extra_bytes(step) <= 1.05 * (kept + max(forward, handed_out))
