"""What a trainer takes besides the data: collator, evaluation sets, options it must not ignore."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers

from sftmix import SFTMixTrainer
from sftmix.pairs.collator import PairedCollator
from tests.sftmix import tiny


def test_the_collator_is_there_by_default(tmp_path: Path) -> None:
    made = SFTMixTrainer(
        model=tiny.build("Llama"),
        args=tiny.config(tmp_path, max_steps=1),
        train_dataset=tiny.examples(8),
        confident=tiny.halves(8),
    )
    assert isinstance(made.data_collator, PairedCollator)
    made.remove_callback(transformers.PrinterCallback)
    made.train()
    assert made.state.global_step == 1


def test_several_evaluation_sets_are_evaluated_one_by_one(tmp_path: Path) -> None:
    sets = {"near": tiny.examples(4), "far": tiny.examples(4, seed=1)}
    made = tiny.trainer(tiny.build("Llama"), tmp_path, tiny.examples(8), eval_dataset=sets)
    found = made.evaluate()
    assert found["eval_near_loss"] == made.evaluate(sets["near"])["eval_loss"]
    assert found["eval_far_loss"] == made.evaluate(sets["far"])["eval_loss"]


def test_nothing_to_evaluate_is_refused(tmp_path: Path) -> None:
    made = tiny.trainer(tiny.build("Llama"), tmp_path, tiny.examples(8))
    with pytest.raises(ValueError, match=r"eval_dataset: .*got None"):
        made.evaluate()


@pytest.mark.parametrize("name", ["model_init", "compute_metrics", "compute_loss_func"])
def test_what_would_be_ignored_is_refused(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {name: lambda *_: None}
    with pytest.raises(ValueError, match=f"{name}: not supported"):
        SFTMixTrainer(tiny.build("Llama"), tiny.config(tmp_path), **options)


def test_arguments_of_another_kind_are_refused(tmp_path: Path) -> None:
    model, args, data = tiny.build("Llama"), tiny.config(tmp_path), tiny.examples(8)
    with pytest.raises(TypeError, match=r"^model: expected a model, got 'toy'; AutoModelForCausal"):
        SFTMixTrainer("toy", args, train_dataset=data)
    with pytest.raises(TypeError, match=r"^args: expected SFTMixConfig, .* got NoneType"):
        SFTMixTrainer(model, train_dataset=data)
    with pytest.raises(TypeError, match=r"^args: expected SFTMixConfig, .* got TrainingArguments"):
        SFTMixTrainer(model, transformers.TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(
        TypeError, match=r"^train_dataset: expected one data set, got DatasetDict of"
    ):
        SFTMixTrainer(model, args, train_dataset=datasets.DatasetDict(train=data, test=data))


@pytest.mark.parametrize("value", ["no", None, 0.5, float("nan")])
def test_halves_that_are_no_booleans_are_refused(value: Any, tmp_path: Path) -> None:
    """Anything but an empty text counts as true in Python."""
    with pytest.raises(ValueError, match=r"^confident: expected a boolean for each training exa"):
        tiny.trainer(tiny.build("Llama"), tmp_path, tiny.examples(8), confident=[value] * 8)


def test_pairs_need_an_even_batch_for_the_baseline_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"even number .*got 3"):
        tiny.trainer(
            tiny.build("Llama"),
            tmp_path,
            tiny.examples(8),
            confident=tiny.halves(8),
            method="ntp",
            per_device_train_batch_size=3,
        )


@pytest.mark.parametrize("head", ["fused", "logits"])
def test_layouts_are_trained_and_evaluated_alike(head: str, tmp_path: Path) -> None:
    """The last bits differ, by which rows the attention multiplies together."""
    found, gradients = {}, {}
    for layout in ("padded", "padding_free", "packed", "sequential"):
        made = SFTMixTrainer(
            model=tiny.build("Llama"),
            args=tiny.config(tmp_path, max_steps=2, layout=layout, head=head),
            train_dataset=tiny.examples(8),
            confident=tiny.halves(8),
        )
        made.remove_callback(transformers.PrinterCallback)
        batch = next(iter(made.get_train_dataloader()))
        assert ("position_ids" in batch) == (layout in ("padding_free", "packed"))
        made.compute_loss(made.model, batch).backward()
        gradients[layout] = {name: p.grad for name, p in made.model.named_parameters()}
        made.model.zero_grad()
        made.train()
        evaluated = made.evaluate(tiny.examples(5, seed=1))["eval_loss"]
        found[layout] = [*tiny.losses(made, "loss", "lam_mean", "truncated_fraction"), (evaluated,)]
    assert len(found["padded"]) == 3
    for layout in ("padding_free", "packed", "sequential"):
        for ours, padded in zip(found[layout], found["padded"], strict=True):
            assert ours == pytest.approx(padded, rel=1e-6)
        for name, gradient in gradients["padded"].items():
            assert tiny.relative_difference(gradients[layout][name], gradient) <= 1e-5, name


def test_a_layout_that_a_model_does_not_heed_is_refused(tmp_path: Path) -> None:
    options = {"vocab_size": 64, "hidden_size": 16, "n_layer": 1, "n_head": 2}
    model = transformers.BloomForCausalLM(transformers.BloomConfig(**options))
    with pytest.raises(ValueError, match=r"layout: .*BloomForCausalLM"):
        SFTMixTrainer(
            model=model,
            args=tiny.config(tmp_path, layout="packed"),
            train_dataset=tiny.examples(8),
            confident=tiny.halves(8),
        )


def test_a_collator_of_another_row_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data_collator: expected row_length=32 .*got 64"):
        SFTMixTrainer(
            model=tiny.build("Llama"),
            args=tiny.config(tmp_path, layout="packed", row_length=32),
            train_dataset=tiny.examples(8),
            data_collator=PairedCollator(0, layout="packed", row_length=64),
            confident=tiny.halves(8),
        )
    with pytest.raises(TypeError, match="data_collator: expected a PairedCollator, got function"):
        SFTMixTrainer(
            model=tiny.build("Llama"),
            args=tiny.config(tmp_path),
            data_collator=transformers.default_data_collator,
            confident=tiny.halves(8),
        )


def test_a_collator_of_another_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data_collator: expected layout='packed'.*got 'padded'"):
        SFTMixTrainer(
            model=tiny.build("Llama"),
            args=tiny.config(tmp_path, layout="packed"),
            train_dataset=tiny.examples(8),
            data_collator=PairedCollator(0),
            confident=tiny.halves(8),
        )
