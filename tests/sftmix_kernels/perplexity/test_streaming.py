"""Streaming perplexity against the float64 reference, and its state over checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from sftmix_kernels import StreamingPerplexity, reference, streaming_perplexity
from sftmix_kernels.perplexity import streaming

from ..budget import (
    DTYPES,
    FAR,
    HEADS,
    Tensors,
    assert_refused,
    check,
    exact,
    head_inputs,
    same_class,
    some_labels,
)
from ..processes import start_ranks

S = 6


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def token_losses(tensors: Tensors, labels: Tensor, **options: Any) -> Tensor:
    """Losses of tokens that are an example each, in float32; 0 where ignored."""
    state = StreamingPerplexity(labels.numel(), labels.device)
    ids = torch.arange(labels.numel(), device=labels.device)
    state.update(**tensors, labels=labels, sample_ids=ids, **options)
    state.end_checkpoint()
    return state.nll_sum[:, 0].float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("vocab_chunk", [16, 100, 8192])
def test_token_losses_are_in_budget(
    device: str, dtype: torch.dtype, head: dict[str, Any], vocab_chunk: int
) -> None:
    options = dict(head)
    tensors = head_inputs((211, 64), 515, dtype, bias=options.pop("bias", False))
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    labels = some_labels((211,), 515, ignored=0.2).to(device)
    plain, truth = (
        reference.cross_entropy(**values, labels=labels, reduction="none", **options)
        for values in (tensors, {k: v.double() for k, v in tensors.items()})
    )
    found = token_losses(tensors, labels, vocab_chunk=vocab_chunk, **options)
    check("loss", found, truth, plain - truth)


def test_perplexity_of_every_example() -> None:
    tensors = {"hidden": exact(4, 50, 32), "weight": exact(123, 32)}
    labels, ids = some_labels((4, 50), 123, ignored=0.2), torch.randint(0, S - 1, (4, 50))
    found = streaming_perplexity(**tensors, labels=labels, sample_ids=ids, num_samples=S)
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    expected = reference.perplexity(**doubles, labels=labels, sample_ids=ids, num_samples=S)
    assert found.dtype == torch.float64
    assert found[-1].isnan()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, equal_nan=True)


def test_a_mean_loss_over_88_does_not_overflow() -> None:
    """exp(200) is beyond float32 and well inside float64; exp(800) is beyond both."""
    hidden = torch.tensor([[200.0], [800.0]])
    weight, labels = torch.tensor([[0.0], [1.0]]), torch.tensor([0, 0])
    found = streaming_perplexity(hidden, weight, labels, torch.tensor([0, 1]), 2)
    torch.testing.assert_close(found[0].log(), torch.tensor(200.0, dtype=torch.float64))
    assert found[1] == torch.inf


@pytest.mark.parametrize("label", [123, *FAR])
def test_label_out_of_range_makes_its_example_nan_alone(label: int) -> None:
    hidden, weight, labels = exact(50, 8), exact(123, 8), some_labels((50,), 123)
    ids = torch.arange(50) % S
    good = streaming_perplexity(hidden, weight, labels, ids, S)
    labels[7] = label
    bad = streaming_perplexity(hidden, weight, labels, ids, S)
    others = torch.arange(S) != ids[7]
    assert bad[ids[7]].isnan()
    assert torch.equal(bad[others], good[others])
    with pytest.raises(ValueError, match=rf"labels: .*got {label} at position \[7\]"):
        streaming_perplexity(hidden, weight, labels, ids, S, validate=True)


@pytest.mark.parametrize("masked", [slice(0, 1), slice(0, 20), slice(100, 123)])
def test_masked_vocabulary_chunk_is_no_nan(masked: slice) -> None:
    hidden, weight, bias = exact(9, 8), exact(123, 8), torch.zeros(123)
    bias[masked] = -torch.inf
    labels, ids = torch.arange(30, 39), torch.zeros(9, dtype=torch.int64)
    found = streaming_perplexity(hidden, weight, labels, ids, 1, bias=bias, vocab_chunk=10)
    expected = reference.perplexity(
        hidden.double(), weight.double(), labels, ids, 1, bias=bias.double()
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_several_updates_and_checkpoints() -> None:
    state, whole = StreamingPerplexity(S, "cpu"), []
    labels, ids = some_labels((40,), 123, ignored=0.2), torch.arange(40) % (S - 1)
    for _ in range(3):
        hidden, weight = exact(40, 8), exact(123, 8)
        for part in (slice(0, 15), slice(15, 40)):
            state.update(hidden[part], weight, labels[part], ids[part])
        state.end_checkpoint()
        whole.append(streaming_perplexity(hidden, weight, labels, ids, S))
    expected = torch.stack(whole, 1)
    close = {"rtol": 1e-12, "atol": 0.0, "equal_nan": True}
    torch.testing.assert_close(state.perplexity, expected, **close)
    torch.testing.assert_close(state.confidence, -expected.mean(1), **close)
    torch.testing.assert_close(state.variability, expected.std(1, correction=0), **close)
    assert state.nll_sum.shape == (S, 3)
    assert torch.equal(state.num_tokens, torch.bincount(ids[labels != -100], minlength=S))
    other = StreamingPerplexity(S, "cpu")
    other.load_state_dict(state.state_dict())
    assert torch.equal(other.nll_sum, state.nll_sum)
    assert torch.equal(other.num_tokens, state.num_tokens)
    with pytest.raises(ValueError, match="state: expected 7 examples"):
        StreamingPerplexity(7, "cpu").load_state_dict(state.state_dict())


def test_checkpoints_must_see_the_same_tokens() -> None:
    state, labels = StreamingPerplexity(2, "cpu"), torch.tensor([1, 2, 3])
    hidden, weight = exact(3, 8), exact(123, 8)
    state.update(hidden, weight, labels, torch.tensor([0, 1, 1]))
    state.end_checkpoint()
    state.update(hidden, weight, labels, torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match=r"expected 1 tokens of example 0 .* got 2"):
        state.end_checkpoint()


def test_batches_and_order_change_no_bit(device: str) -> None:
    """Examples split over updates of any size, tokens in any order: inputs that a GEMM is exact on.

    Losses are whole steps of 2^-32, so that their sums are exact too.
    """
    hidden, weight = exact(300, 16).to(device), exact(515, 16).to(device)
    labels, ids = some_labels((300,), 515, ignored=0.2), torch.randint(0, S, (300,))
    labels, ids = labels.to(device), ids.to(device)
    found = []
    for size, order in ((300, torch.arange(300)), (1, torch.randperm(300)), (37, ids.argsort())):
        state = StreamingPerplexity(S, device)
        for rows in order.to(device).split(size):
            state.update(hidden[rows], weight, labels[rows], ids[rows])
        state.end_checkpoint()
        found.append(state)
    for other in found[1:]:
        assert torch.equal(other.nll_sum, found[0].nll_sum)
        assert torch.equal(other.num_tokens, found[0].num_tokens)
    assert found[0].nll_sum.gt(0).all()


@pytest.mark.parametrize("vocab_size", [123, 8191, 50257])
def test_chunk_size_stays_in_budget(device: str, vocab_size: int) -> None:
    tensors = {
        n: t.to(device) for n, t in head_inputs((211, 32), vocab_size, torch.float32).items()
    }
    labels = some_labels((211,), vocab_size).to(device)
    plain, truth = (
        reference.cross_entropy(**values, labels=labels, reduction="none")
        for values in (tensors, {k: v.double() for k, v in tensors.items()})
    )
    for chunk in (16, 112, 8192, 10**6):
        if vocab_size // chunk < 1000:
            found = token_losses(tensors, labels, vocab_chunk=chunk)
            check("loss", found, truth, plain - truth)


@pytest.mark.parametrize("rows", [1, 511, 513, 1300])
def test_blocks_of_tokens(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens than the workspace holds: several blocks, the last one ragged."""
    hidden, weight, labels = exact(rows, 8), exact(200, 8), some_labels((rows,), 200)
    ids = torch.arange(rows)
    whole = streaming_perplexity(hidden, weight, labels, ids, rows)
    monkeypatch.setattr(streaming, "CPU_WORKSPACE", 200 * 4 * 128)
    assert streaming.block_rows(hidden, 200) == min(rows, 128)
    assert streaming.block_rows(hidden, 2000) == min(rows, 12)  # no tile of 128 rows fits
    assert torch.equal(streaming_perplexity(hidden, weight, labels, ids, rows), whole)


# SMs and bytes of L2: A100, H100 and H200, B200.
CHIPS = {108: 40 * 2**20, 132: 60 * 10**6, 148: 126 * 2**20}


def on_chip(monkeypatch: pytest.MonkeyPatch, processors: int, rows: int, itemsize: int) -> Any:
    """Stand in for hidden states on a GPU of so many SMs."""
    found = SimpleNamespace(multi_processor_count=processors, L2_cache_size=CHIPS[processors])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    shape = (rows, 4096)
    return SimpleNamespace(is_cuda=True, device=0, shape=shape, element_size=lambda: itemsize)


def tiles_of(rows: int, columns: int) -> int:
    return -(-rows // 128) * -(-columns // 256)


@pytest.mark.parametrize("vocab_chunk", [None, 8192, 4608])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("processors", list(CHIPS))
def test_blocks_keep_the_processors_busy(
    processors: int, itemsize: int, vocab_chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = on_chip(monkeypatch, processors, 10**6, itemsize)
    chunk = streaming.chunk_columns(hidden, 128256, vocab_chunk)
    rows = streaming.block_rows(hidden, chunk)
    room = CHIPS[processors] // 2
    assert rows * chunk * itemsize <= room
    # As much as fits, but for what is short of one more wave.
    wave = 128 * max(1, processors // -(-chunk // 256))
    assert (rows + wave) * chunk * itemsize > room
    waves = tiles_of(rows, chunk) / processors
    # By default none is idle. 86 % of 148 is what 4 rows of 32 tiles leave.
    assert waves == int(waves) if vocab_chunk is None else waves / math.ceil(waves) > 0.86


def test_a_chunk_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token's bits depend on where chunks end."""
    few, many = (on_chip(monkeypatch, 132, rows, 2) for rows in (7, 8192))
    assert streaming.chunk_columns(few, 128256, None) == 8448
    assert streaming.chunk_columns(many, 128256, None) == 8448
    assert [streaming.block_rows(x, 8448) for x in (few, many)] == [7, 1536]
    assert streaming.chunk_columns(few, 1003, None) == 1003
    assert streaming.chunk_columns(few, 128256, 100) == 112
    # One tile of a huge chunk does not fit.
    assert streaming.block_rows(many, 300_000) == 50


def test_strided_inputs_give_the_bits_of_contiguous_ones(device: str) -> None:
    room = {"hidden": exact(40, 2, 24), "weight": exact(123, 24), "bias": exact(247)}
    room = {name: tensor.to(device) for name, tensor in room.items()}
    labels = some_labels((40, 3), 123, ignored=0.2).to(device)
    ids = torch.randint(0, S, (40, 2), device=device)
    strided = {
        "hidden": room["hidden"][:, 1, ::3],
        "weight": room["weight"][:, 1::3],
        "bias": room["bias"][1::2],
        "labels": labels[:, 2],
        "sample_ids": ids[:, 0],
    }
    plain = {name: tensor.contiguous() for name, tensor in strided.items()}
    found, expected = (streaming_perplexity(**x, num_samples=S) for x in (strided, plain))
    assert torch.equal(found, expected)
    assert found.isfinite().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_equals_eager_with_ignored_rows(device: str) -> None:
    tensors = head_inputs((50, 8), 123, torch.float32, bias=True)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    labels, ids = some_labels((50,), 123, ignored=0.3).to(device), torch.arange(50).to(device) % 5
    compiled = torch.compile(streaming_perplexity, fullgraph=True, backend="aot_eager")
    found = compiled(**tensors, labels=labels, sample_ids=ids, num_samples=S, vocab_chunk=48)
    plain = streaming_perplexity(
        **tensors, labels=labels, sample_ids=ids, num_samples=S, vocab_chunk=48
    )
    torch.testing.assert_close(found, plain, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_hidden_row_is_its_examples_alone(device: str, value: float) -> None:
    hidden, weight = exact(50, 8).to(device), exact(123, 8).to(device)
    labels, ids = some_labels((50,), 123).to(device), (torch.arange(50) % S).to(device)
    good = streaming_perplexity(hidden, weight, labels, ids, S)
    hidden[7, 3] = value
    bad = streaming_perplexity(hidden, weight, labels, ids, S)
    others = torch.arange(S) != 7 % S
    assert torch.equal(bad[others], good[others])
    doubles = (hidden.double(), weight.double())
    assert same_class(bad, reference.perplexity(*doubles, labels, ids, S))


def test_a_token_that_does_not_count_may_belong_to_no_example(device: str) -> None:
    hidden, weight = exact(4, 8).to(device), exact(123, 8).to(device)
    labels = torch.tensor([1, -100, 3, 4], device=device)
    ids = torch.tensor([0, -1, 1, 1], device=device)
    found = streaming_perplexity(hidden, weight, labels, ids, 2)
    kept = labels != -100
    expected = streaming_perplexity(hidden[kept], weight, labels[kept], ids[kept], 2)
    assert torch.equal(found, expected)


@pytest.mark.gpu
def test_id_outside_on_a_device_is_never_lost() -> None:
    hidden, weight = exact(4, 8).cuda(), exact(123, 8).cuda()
    labels, ids = torch.tensor([1, 2, 3, 4]).cuda(), torch.tensor([0, 5, 1, 1]).cuda()
    assert streaming_perplexity(hidden, weight, labels, ids, 2).isnan().all()
    state = StreamingPerplexity(2, "cuda")
    state.update(hidden, weight, labels, ids)
    with pytest.raises(ValueError, match=r"sample_ids: expected values in \[0, 2\)"):
        state.end_checkpoint()


def test_losses_made_elsewhere_are_checked_as_tokens_are() -> None:
    """A token of no example would be left out of the sums without a word."""
    losses, ids = torch.rand(2, 2, requires_grad=True), torch.tensor([[0, 1], [1, 1]])
    scores = StreamingPerplexity(2, "cpu")
    scores.add(losses, ids)
    assert scores.num_tokens.tolist() == [1, 3]
    assert not scores.nll_sum.requires_grad
    for bad, error, words in (
        (torch.tensor([[0, 1], [1, 2]]), ValueError, r"expected values in \[0, 2\), got 2"),
        (ids.int(), TypeError, "expected int64, got torch.int32"),
        (ids[0], ValueError, r"expected shape \(2, 2\) to match losses, got \(2,\)"),
    ):
        with pytest.raises(error, match=f"^sample_ids: {words}"):
            scores.add(losses, bad)
    assert scores.num_tokens.tolist() == [1, 3]


def test_one_checkpoint_is_confidence_without_spread(device: str) -> None:
    state = StreamingPerplexity(2, device)
    labels, ids = torch.tensor([1, 2, 3], device=device), torch.tensor([0, 1, 1], device=device)
    state.update(exact(3, 8).to(device), exact(123, 8).to(device), labels, ids)
    state.end_checkpoint()
    assert state.perplexity.shape == (2, 1)
    assert torch.equal(state.confidence, -state.perplexity[:, 0])
    assert state.variability.tolist() == [0.0, 0.0]


def test_a_killed_scoring_goes_on(tmp_path: Path) -> None:
    """State from a file, in the middle of the second checkpoint, gives the bits of one go."""
    hidden, weight = exact(60, 8), exact(123, 8)
    labels, ids = some_labels((60,), 123), torch.arange(60) % S
    parts = [slice(0, 20), slice(20, 40), slice(40, 60)]
    whole = StreamingPerplexity(S, "cpu")
    for _ in range(2):
        for rows in parts:
            whole.update(hidden[rows], weight, labels[rows], ids[rows])
        whole.end_checkpoint()
    broken = StreamingPerplexity(S, "cpu")
    for rows in (*parts, None, *parts[:1]):
        if rows is None:
            broken.end_checkpoint()
        else:
            broken.update(hidden[rows], weight, labels[rows], ids[rows])
    save_file(broken.state_dict(), tmp_path / "state.safetensors")
    # What was saved is a copy: going on does not change it.
    saved = broken.state_dict()
    broken.update(hidden[parts[1]], weight, labels[parts[1]], ids[parts[1]])
    assert torch.equal(
        saved["open_nll_sum"], load_file(tmp_path / "state.safetensors")["open_nll_sum"]
    )

    resumed = StreamingPerplexity(S, "cpu")
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    for rows in parts[1:]:
        resumed.update(hidden[rows], weight, labels[rows], ids[rows])
    resumed.end_checkpoint()
    assert torch.equal(resumed.nll_sum, whole.nll_sum)
    assert torch.equal(resumed.num_tokens, whole.num_tokens)


def test_state_that_lacks_a_part_is_refused() -> None:
    state = StreamingPerplexity(2, "cpu")
    part = {k: v for k, v in state.state_dict().items() if k != "open_nll_sum"}
    with pytest.raises(ValueError, match="state: expected open_nll_sum"):
        state.load_state_dict(part)


def test_sums_on_another_device_are_refused() -> None:
    state, labels = StreamingPerplexity(2, "meta"), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="hidden: expected the sums' device meta, got cpu"):
        state.update(exact(2, 8), exact(123, 8), labels, torch.tensor([0, 1]))


def score_part(rank: int, folder: str) -> None:
    """One of two ranks: every other row of two checkpoints; rank 1 has none of the last rows."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    state, inputs = StreamingPerplexity(S, "cpu"), load_file(f"{folder}/inputs.safetensors")
    for part in ("first", "second"):
        rows = torch.arange(rank, 40 if rank else 61, 2)
        if rank == 0:
            rows = torch.cat([rows, torch.arange(41, 61, 2)])
        state.update(
            inputs[part][rows], inputs["weight"], inputs["labels"][rows], inputs["ids"][rows]
        )
        state.end_checkpoint(dist.group.WORLD)
    save_file(state.state_dict(), f"{folder}/rank{rank}.safetensors")
    dist.destroy_process_group()


def test_two_ranks_add_up_to_one_process(tmp_path: Path) -> None:
    inputs = {"first": exact(61, 8), "second": exact(61, 8), "weight": exact(123, 8)}
    inputs |= {"labels": some_labels((61,), 123, ignored=0.2), "ids": torch.arange(61) % S}
    save_file(inputs, tmp_path / "inputs.safetensors")
    start_ranks(score_part, tmp_path)
    one = StreamingPerplexity(S, "cpu")
    for part in ("first", "second"):
        one.update(inputs[part], inputs["weight"], inputs["labels"], inputs["ids"])
        one.end_checkpoint()
    for rank in range(2):
        found = load_file(tmp_path / f"rank{rank}.safetensors")
        assert torch.equal(found["nll_sum"], one.nll_sum)
        assert torch.equal(found["num_tokens"], one.num_tokens)


def test_empty_state_and_empty_update() -> None:
    state = StreamingPerplexity(2, "cpu")
    assert state.perplexity.shape == (2, 0)
    nothing = torch.empty(0, dtype=torch.int64)
    state.update(torch.empty(0, 8), exact(123, 8), nothing, nothing)
    assert state.started.tolist() == [False, False]
    state.end_checkpoint()
    assert state.perplexity.isnan().all()
    assert StreamingPerplexity(0, "cpu").confidence.shape == (0,)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"sample_ids": torch.tensor([0, 6])}, ValueError, r"sample_ids: .*\[0, 6\), got 6"),
        ({"sample_ids": torch.tensor([-1, 0])}, ValueError, "sample_ids: .*got -1"),
        ({"sample_ids": torch.tensor([0])}, ValueError, "sample_ids: expected shape"),
        ({"vocab_chunk": 0}, ValueError, "vocab_chunk"),
        ({"num_samples": -1}, ValueError, "num_samples"),
        ({"hidden": [1.0]}, TypeError, "hidden: expected a Tensor, got list"),
    ],
)
def test_refused(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"hidden": exact(2, 8), "weight": exact(123, 8), "labels": torch.tensor([1, 2])}
    good |= {"sample_ids": torch.tensor([0, 1]), "num_samples": S}
    assert_refused(streaming_perplexity, {**good, **changed}, error, message)


def test_state_before_the_first_checkpoint() -> None:
    state = StreamingPerplexity(2, "cpu")
    state.update(
        torch.randn(3, 8), torch.randn(9, 8), torch.tensor([1, 2, 3]), torch.tensor([0, 0, 1])
    )
    assert state.num_tokens.tolist() == [2, 1]
    assert state.started.tolist() == [True, True]
    assert state.nll_sum.shape == state.perplexity.shape == (2, 0)
    assert state.confidence.isnan().all()
    assert state.variability.isnan().all()


def test_an_infinite_perplexity_has_an_infinite_variability() -> None:
    state = StreamingPerplexity(2, "cpu")
    nll_sum = torch.tensor([[1e4, 1.0], [1.0, 1.0]], dtype=torch.float64)
    num_tokens = torch.ones(2, dtype=torch.int64)
    state.load_state_dict({**state.state_dict(), "nll_sum": nll_sum, "num_tokens": num_tokens})
    assert state.confidence[0] == -torch.inf
    assert state.variability.tolist() == [torch.inf, 0.0]
