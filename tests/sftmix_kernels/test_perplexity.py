"""Streaming perplexity against the float64 reference, and its state over checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sftmix_kernels import StreamingPerplexity, reference, streaming_perplexity
from sftmix_kernels.perplexity import token_nll

from .budget import DTYPES, HEADS, assert_refused, check, exact, head_inputs, some_labels

S = 6


def token_losses(tensors: dict[str, Tensor], labels: Tensor, **options: Any) -> Tensor:
    """The op's float32 token losses."""
    weight = reference.label_weight(labels, tensors["weight"].shape[0])
    return token_nll(
        tensors["hidden"],
        tensors["weight"],
        tensors.get("bias"),
        labels.clamp(min=0),
        weight,
        options.get("logit_scale", 1.0),
        options.get("softcap"),
        options.get("vocab_chunk", 8192),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("vocab_chunk", [7, 8192])
def test_token_losses_are_in_budget(
    dtype: torch.dtype, head: dict[str, Any], vocab_chunk: int
) -> None:
    options = dict(head)
    tensors = head_inputs((211, 64), 515, dtype, bias=options.pop("bias", False))
    labels = some_labels((211,), 515, ignored=0.2)
    plain, truth = (
        reference.cross_entropy(**values, labels=labels, reduction="none", **options)
        for values in (tensors, {k: v.double() for k, v in tensors.items()})
    )
    found = token_losses(tensors, labels, vocab_chunk=vocab_chunk, **options)
    check("loss", found, truth, float((plain - truth).abs().max()))


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


@pytest.mark.parametrize("label", [123, -1, 2**31])
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


def test_empty_state_and_empty_update() -> None:
    state = StreamingPerplexity(2, "cpu")
    assert state.perplexity.shape == (2, 0)
    nothing = torch.empty(0, dtype=torch.int64)
    state.update(torch.empty(0, 8), exact(123, 8), nothing, nothing)
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
    assert state.nll_sum.shape == state.perplexity.shape == (2, 0)
    assert state.confidence.isnan().all()
    assert state.variability.isnan().all()


def test_an_infinite_perplexity_has_an_infinite_variability() -> None:
    state = StreamingPerplexity(2, "cpu")
    nll_sum = torch.tensor([[1e4, 1.0], [1.0, 1.0]], dtype=torch.float64)
    state.load_state_dict({"nll_sum": nll_sum, "num_tokens": torch.ones(2, dtype=torch.int64)})
    assert state.confidence[0] == -torch.inf
    assert state.variability.tolist() == [torch.inf, 0.0]
