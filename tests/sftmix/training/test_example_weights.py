"""Weights of examples in the loss: against the dense formula, and what they leave as it is."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor

from sftmix.pairs.collator import PairedCollator
from sftmix.training.example_weights import training_weights, weights_of
from sftmix.training.loss import batch_counts
from tests.sftmix import tiny
from tests.sftmix.training.test_trainer import Recorder, dense_terms, gradients

WEIGHTS = np.array([0.5, 2.0, 0.0, 1.0, 3.0, 0.25], dtype=np.float32)
MU = 0.7
LAYOUTS = ("padded", "packed", "padding_free", "sequential")


def weighted(data: datasets.Dataset, weights: Any = WEIGHTS) -> datasets.Dataset:
    return data.add_column("weight", np.resize(weights, len(data)).astype(np.float32))


def dense_loss(model: Any, batch: dict[str, Tensor], mu: float) -> Tensor:
    """The formula: the sum of weighted token losses over all tokens, and Mixup of other pairs."""
    weights, lengths = batch["weight"].double(), torch.bincount(batch["owner"])
    mixed = [
        (c, c + 1, float(batch["lam"][batch["owner"][batch["pair_c"]] == c][0]))
        for c in range(0, len(lengths), 2)
        if "lam" in batch and weights[c] > 0 and weights[c + 1] > 0
    ]
    ntp, mixup, pairs = dense_terms(model, batch, mixed)
    return (weights * ntp).sum() / lengths.sum() + mu * mixup / pairs.clamp(min=1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head", ["fused", "logits"])
@pytest.mark.parametrize("method", ["ntp", "sftmix", "equal"])
def test_loss_and_gradients(method: str, head: str, layout: str, tmp_path: Path) -> None:
    model, dense = tiny.build("Llama"), tiny.build("Llama")
    made = tiny.trainer(
        model, tmp_path, weighted(tiny.examples(6)), confident=tiny.halves(6), layout=layout,
        method=method, head=head, mu=MU, per_device_train_batch_size=6,
    )  # fmt: skip
    examples = [made.train_dataset[key] for key in itertools.islice(made._get_train_sampler(), 6)]
    batch = made.data_collator(examples)
    assert sorted(batch["weight"].tolist()) == sorted(WEIGHTS.tolist())
    loss = made.compute_loss(model, batch)
    assert isinstance(loss, Tensor)
    mu = {"ntp": 0.0, "sftmix": MU, "equal": 1.0}[method]
    expected = dense_loss(dense, PairedCollator(0)(examples), mu)
    for one in (loss, expected):
        one.backward()
    assert tiny.relative_difference(loss, expected) <= 1e-5
    found, wanted = gradients(model), gradients(dense)
    for name, gradient in wanted.items():
        assert tiny.relative_difference(found[name], gradient) <= 1e-5, name


def steps_of(folder: Path, data: datasets.Dataset, size: int, windows: int, **changes: Any) -> Any:
    recorder, model = Recorder(), tiny.build("Llama")
    made = tiny.trainer(
        model, folder, data, callbacks=[recorder], per_device_train_batch_size=size,
        gradient_accumulation_steps=windows, max_grad_norm=0.0, **changes,
    )  # fmt: skip
    made.train()
    return recorder.steps, tiny.losses(made, "loss", "ntp_loss"), tiny.weights(model)


@pytest.mark.parametrize("method", ["ntp", "sftmix"])
def test_micro_batches_are_one_batch(method: str, tmp_path: Path) -> None:
    """Whoever shares a micro-batch, and where all of one weigh 0."""
    weights = np.array([2.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.5, 3.0])
    data = weighted(tiny.examples(8), weights)
    whole, logs, _ = steps_of(tmp_path, data, 8, 1, method=method, learning_rate=0.0)
    assert len(whole) == 1
    for size, windows in ((4, 2), (2, 4)):
        found, others, _ = steps_of(tmp_path, data, size, windows, method=method, learning_rate=0.0)
        for name, gradient in whole[0].items():
            assert tiny.relative_difference(found[0][name], gradient) <= 1e-6, (size, name)
        assert others[0] == pytest.approx(logs[0], rel=1e-6)


@pytest.mark.parametrize("head", ["fused", "logits"])
@pytest.mark.parametrize("method", ["ntp", "sftmix"])
def test_weights_of_1_change_no_bit(method: str, head: str, tmp_path: Path) -> None:
    data = tiny.examples(8)
    options = {"method": method, "head": head}
    one, two = (steps_of(tmp_path, one, 4, 1, **options) for one in (data, weighted(data, [1.0])))
    for mine, other in zip(one[0], two[0], strict=True):
        assert tiny.same(mine, other)
    assert one[1] == two[1]
    assert tiny.same(one[2], two[2])


@pytest.mark.parametrize("method", ["ntp", "sftmix"])
def test_twice_the_weight_is_twice_the_pull(method: str, tmp_path: Path) -> None:
    """Of one example beside another whose weight stays, whatever Mixup does."""
    model = tiny.build("Llama")

    def gradient(weight: float) -> Tensor:
        data = weighted(tiny.examples(2), [weight, 1.0])
        made = tiny.trainer(
            model, tmp_path, data, confident=[True, False], method=method,
            per_device_train_batch_size=2,
        )  # fmt: skip
        model.zero_grad()
        loss = made.compute_loss(model, next(iter(made.get_train_dataloader())))
        assert isinstance(loss, Tensor)
        loss.backward()
        return torch.cat([one.flatten() for one in gradients(model).values()])

    once, twice, three = (gradient(weight) for weight in (1.0, 2.0, 3.0))
    assert (twice - once).abs().max() > 1e-3
    assert tiny.relative_difference(three - twice, twice - once) <= 1e-4


def test_an_example_of_weight_0_has_no_part(tmp_path: Path) -> None:
    """Its tokens and pairs are not learnt; its tokens stay in the number that NTP is divided by."""
    data = weighted(tiny.examples(4), [1.0, 0.0, 1.0, 1.0])
    other = [7 if label > 0 else label for label in data[1]["labels"]]
    rows = [{**row, "labels": other} if n == 1 else row for n, row in enumerate(data)]
    found = [
        steps_of(tmp_path, one, 4, 1, method=method)
        for method in ("ntp", "sftmix")
        for one in (data, datasets.Dataset.from_list(rows))
    ]
    for one, changed in (found[:2], found[2:]):
        assert tiny.same(one[0][0], changed[0][0])
        assert one[1] == changed[1]
    made = tiny.trainer(
        tiny.build("Llama"), tmp_path, data, confident=[True, False] * 2, method="sftmix"
    )
    [batch] = list(made.get_train_dataloader())
    counts = batch_counts([batch], torch.device("cpu"))
    zero = batch["weight"] == 0
    tokens = batch["owner"].bincount()
    assert counts.tokens == tokens.sum()
    assert counts.learnt == tokens[~zero].sum()
    assert not zero[batch["owner"][batch["pair_c"]]].any()
    assert not zero[batch["owner"][batch["pair_u"]]].any()
    assert 0 < counts.pairs == batch["pair_c"].numel()
    made.train()
    line = made.state.log_history[0]
    assert line["unmixed_fraction"] == pytest.approx(1 - 2 * float(counts.pairs / counts.tokens))


def test_evaluation_has_no_weights(tmp_path: Path) -> None:
    model, data = tiny.build("Llama"), tiny.examples(6)
    odd = data.add_column("weight", ["a", "b", "c", "d", "e", "f"])
    found = [
        tiny.trainer(model, tmp_path, data, method="ntp", eval_dataset=held_out).evaluate()
        for held_out in (data, odd)
    ]
    assert found[0]["eval_loss"] == found[1]["eval_loss"]


def test_weights_that_are_refused(tmp_path: Path) -> None:
    def refused(weights: Any, **changes: Any) -> str:
        data = tiny.examples(6).add_column("weight", weights)
        with pytest.raises(ValueError, match="weight") as error:
            tiny.trainer(tiny.build("Llama"), tmp_path, data, **changes)
        return str(error.value)

    assert "row 2: expected weight to be a finite number" in refused([1.0, 1.0, -1.0] * 2)
    assert "row 0: expected weight to be a finite number" in refused(["1"] * 6)
    assert "got 0 for all 6 examples" in refused([0.0] * 6)
    assert "of --method mixup has no weights" in refused(WEIGHTS, method="mixup")
    assert "of --method ir_dro has no weights" in refused(WEIGHTS, method="ir_dro")


def test_ranks_have_to_agree_on_weights(tmp_path: Path) -> None:
    data = tiny.examples(4)
    found = [
        tiny.trainer(tiny.build("Llama"), tmp_path, one, method="ntp")._decisive()["weight"]
        for one in (data, weighted(data), weighted(data, [1.0]))
    ]
    assert found[0] is None
    assert found[1] != found[2] is not None


# The column

Row = dict[str, Any]


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_the_column_of_a_data_set(kind: Any) -> None:
    rows: list[Row] = [{"id": n, "weight": weight} for n, weight in enumerate((0.5, 2.0, 0.0))]
    found = training_weights(kind(rows), "ntp")
    assert found is not None
    assert found.dtype == np.float32
    assert found.tolist() == [0.5, 2, 0]
    assert training_weights(kind([{"id": 1}]), "ntp") is None
    assert weights_of(None) is None
    with pytest.raises(ValueError, match=r"^train_dataset: row 1: expected weight to be a finite"):
        weights_of(kind([*rows[:1], {"id": 9, "weight": -1.0}]))
    with pytest.raises(ValueError, match=r"row 1: .* got None"):
        weights_of(kind([*rows[:1], {"id": 9}]))
    with pytest.raises(ValueError, match=r"^weight: expected a weight above 0, got 0 for all 1 ex"):
        training_weights(kind(rows[2:]), "sftmix")


def test_weights_of_other_libraries() -> None:
    rows: list[Row] = [{"weight": torch.tensor(0.5)}, {"weight": np.float32(2)}]
    assert weights_of(rows) is not None
    data = datasets.Dataset.from_list([{"weight": 0.5}]).with_format("torch")
    found = weights_of(data)
    assert found is not None
    assert found.tolist() == [0.5]


@pytest.mark.parametrize("method", ["mixup", "ir_dro"])
def test_methods_without_weights_refuse_them(method: str) -> None:
    message = rf"^weight: the loss of --method {method} has no weights of examples, expected one of"
    with pytest.raises(ValueError, match=message) as error:
        training_weights([{"weight": 1.0}], method)
    assert "sftmix, ntp, equal" in str(error.value)
