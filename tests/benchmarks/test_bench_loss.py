"""Who is measured on what, and that nothing wrong gets a time."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import bench_loss, peers
from benchmarks.bench_loss import (
    COMPOSED,
    OURS,
    Products,
    Provider,
    find_providers,
    operations,
    race,
    step,
)
from benchmarks.bench_loss import DENSE as DENSE_LOSSES
from benchmarks.errors import ROWS, Oracle
from benchmarks.inputs import Inputs, make_inputs, peakedness
from benchmarks.records import (
    BARE,
    BOTH,
    COMPILED,
    DENSE,
    FILTERED,
    FORWARD,
    NTP,
    ROW_CHUNKS,
    STEP,
    TASKS,
    TORCH,
    VOCAB_TILES,
)
from benchmarks.result_file import Results
from benchmarks.settings import HEADS, RANDOM, TRAINED, Case, Settings

QUICK = Settings(quick=True)
TINY = Case("tiny", 64)


def hard_labels(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), labels)


@pytest.mark.parametrize("task", TASKS)
def test_ours_dense_and_compositions_are_the_reference(task: str) -> None:
    x = make_inputs(16, 8, 50).given(one_lam=True)
    for loss in (OURS[task], DENSE_LOSSES[task], partial(COMPOSED[task], ntp=hard_labels)):
        Oracle(ROWS[task], x).check(step(loss, x), 1e-5)


def test_one_lam_is_one_for_all() -> None:
    x = make_inputs(16, 8, 50).given(one_lam=True)
    assert (x.lam == x.lam[0]).all()


# PyTorch's compiler warns about a part of PyTorch when it is imported.
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_everyone_is_there_or_left_out_with_a_reason() -> None:
    everyone = {ROW_CHUNKS, VOCAB_TILES, FILTERED, DENSE, COMPILED}
    everyone |= {peer.who for peer in peers.PEERS}
    for device in ("cpu", "cuda"):
        for compiled in (False, True):
            found, left_out = find_providers(Settings(device), compiled)
            names = {one.who for one in found}
            assert names | left_out.keys() == everyone
            assert not names & left_out.keys()
            assert all(left_out.values())
            assert {(one.who, one.task) for one in found} == {(w, t) for w in names for t in TASKS}
    ours, _ = find_providers(Settings(peers=False))
    assert {one.who for one in ours} == {ROW_CHUNKS}


def test_a_peer_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> peers.HardLabelLoss:
        raise ImportError("No module named 'absent'")

    monkeypatch.setattr(peers, "PEERS", (peers.Peer("absent", missing, ("cpu",)),))
    found, left_out = peers.find_peers("cpu")
    assert not found
    assert left_out == {"absent": "ImportError: No module named 'absent'"}


@pytest.mark.parametrize("ours", [True, False])
def test_a_provider_that_is_wrong_or_fails_gets_no_time(
    ours: bool, results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(x: Inputs) -> Tensor:
        return 1.1 * hard_labels(x.hidden, x.weight, x.labels)

    def not_a_number(x: Inputs) -> Tensor:
        return hard_labels(x.hidden, x.weight, x.labels) * float("nan")

    def raises(x: Inputs) -> Tensor:
        raise RuntimeError("no kernel")

    def too_large(x: Inputs) -> Tensor:
        raise torch.OutOfMemoryError("tried to allocate 1 TiB\nand more")

    limit = None if ours else 0.02
    losses = {"wrong": wrong, "nan": not_a_number, "raises": raises, "large": too_large}
    bad = [Provider(who, NTP, loss, ours=ours, limit=limit) for who, loss in losses.items()]
    right = Provider("right", NTP, DENSE_LOSSES[NTP], limit=0.02)
    race(TINY, [*bad, right], QUICK, results)
    assert f"): {STEP}, {TINY.name}, NTP, right\n" in capsys.readouterr().out
    report = results.report
    reasons = report["failed" if ours else "left_out"]
    assert reasons[f"raises, NTP, {TINY.name}"].endswith("RuntimeError: no kernel")
    assert "relative errors" in reasons[f"wrong, NTP, {TINY.name}"]
    assert "relative errors" in reasons[f"nan, NTP, {TINY.name}"]
    assert len(report["failed"]) == (3 if ours else 0)
    large = report["left_out"][f"large, NTP, {TINY.name}"]
    assert large == "does not fit: tried to allocate 1 TiB"
    for measure in (STEP, FORWARD):
        found = {r["who"]: r for r in report["records"] if r["measure"] == measure}
        assert found.keys() == {BARE, "right"}
        assert {record["task"] for record in found.values()} == {NTP}
        assert found["right"]["relative_error"] < 1e-5
        assert ("peak_bytes" in found["right"]) == (measure == STEP)


def test_a_case_that_does_not_fit_does_not_stop_the_next(
    monkeypatch: pytest.MonkeyPatch, results: Results
) -> None:
    ran = []

    def too_large(case: Case, *_: object) -> None:
        ran.append(case)
        if case is TINY:
            raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    other = Case("tiny", 32)
    monkeypatch.setattr(bench_loss, "race", too_large)
    monkeypatch.setattr(Settings, "cases", lambda self: [TINY, other])
    bench_loss.measure(Settings(quick=True, peers=False), results)
    assert ran == [TINY, other]
    assert results.report["left_out"][TINY.name] == "does not fit: tried to allocate 1 TiB"


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_the_grid_is_for_those_who_hold_no_logits() -> None:
    found, _ = find_providers(Settings("cuda"))
    grid = Case("Llama-3.1-8B", 8192, full=False)
    names = {(one.who, one.task) for one in found if one.in_race(grid, STEP)}
    assert (ROW_CHUNKS, BOTH) in names
    assert (TORCH, BOTH) not in names
    assert DENSE not in {who for who, _ in names}
    assert not any(one.in_race(grid, FORWARD) for one in found)


def test_every_head_is_measured_on_a_gpu_at_three_lengths() -> None:
    cases = Settings("cuda").cases()
    assert [case.inputs for case in cases[:2]] == [TRAINED, RANDOM]
    assert cases[0].sizes == (4096, 128256)
    large = {case.head for case in cases}
    assert large == HEADS.keys() - {"small", "SmolLM2-135M"}
    assert {case.rows for case in cases} == {2048, 8192, 32768}
    assert len(Settings("cuda", grid=False).cases()) == 2


def test_trained_like_inputs_favour_the_label() -> None:
    flat, peaked = (peakedness(make_inputs(64, 64, 500, trained=t)) for t in (False, True))
    assert flat["mean_target_probability"] < 0.05
    assert 0.3 < peaked["mean_target_probability"] < 0.95
    assert peaked["mean_tokens_above_filter"] < flat["mean_tokens_above_filter"]


@pytest.mark.parametrize("chunk", [None, 6])
def test_bare_products_are_the_gradients_of_the_sum_of_losses(
    chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = make_inputs(8, 8, 50)
    products = Products(x)
    if chunk:
        # The gradient of the first chunk's logits is multiplied with every chunk's rows.
        monkeypatch.setattr(products, "logits", products.logits[:chunk])
        assert [rows.stop for rows in products.chunks()] == [6, 12, 16]
        products.all_three()
        parts = [products.gradient[: r.stop - r.start] for r in products.chunks()]
        gradient = torch.cat(parts)
        torch.testing.assert_close(products.of_hidden, gradient @ x.weight)
        torch.testing.assert_close(products.of_weight, gradient.t() @ x.hidden)
        return
    products.all_three()
    loss = F.cross_entropy(F.linear(x.hidden, x.weight), x.labels, reduction="sum")
    of_hidden, of_weight = torch.autograd.grad(loss, (x.hidden, x.weight))
    torch.testing.assert_close(products.of_hidden, of_hidden)
    torch.testing.assert_close(products.of_weight, of_weight)
    assert operations(NTP, x, backward=True) == 3 * 2 * 16 * 8 * 50
    assert operations("Mixup", x, backward=False) == 2 * 8 * 8 * 50
