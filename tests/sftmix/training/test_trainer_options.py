"""What a trainer takes besides the data: collator, evaluation sets, options it must not ignore."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers

from sftmix import SFTMixOptions, SFTMixTrainer
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
    assert found["eval_far_loss"] == made.evaluate("far")["eval_loss"]
    with pytest.raises(ValueError, match=r"^eval_dataset: .*own \(near, far\), got 'test'"):
        made.evaluate("test")


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
    with pytest.raises(
        TypeError, match=r"^train_dataset: expected one data set, got DatasetDict of"
    ):
        SFTMixTrainer(model, args, train_dataset=datasets.DatasetDict(train=data, test=data))


class SFTConfig(transformers.TrainingArguments):
    """Stands for TRL's."""


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        (None, r"NoneType; args=SFTMixConfig\(output_dir=...\)"),
        (dict, "dict; args=SFTMixConfig"),
        (
            transformers.TrainingArguments,
            "TrainingArguments; SFTMixConfig takes the same options; its defaults are the paper's",
        ),
        (
            transformers.Seq2SeqTrainingArguments,
            "Seq2SeqTrainingArguments; a dataclass that derives from SFTMixOptions and Seq2Seq",
        ),
        (SFTConfig, r"SFTConfig; sftmix.integrations.trl has SFTMixSFTConfig, and SFTMixSFTTra"),
    ],
)
def test_options_without_ours_are_refused_with_what_to_take(
    kind: Any, way: str, tmp_path: Path
) -> None:
    options = kind(str(tmp_path), use_cpu=True) if kind not in (None, dict) else kind and kind()
    with pytest.raises(TypeError, match=rf"^args: expected SFTMixConfig, .* got {way}"):
        SFTMixTrainer(tiny.build("Llama"), options, train_dataset=tiny.examples(8))


def test_a_dataclass_of_both_options_is_taken(tmp_path: Path) -> None:
    """What the refusal of other arguments says."""

    @dataclasses.dataclass
    class Both(SFTMixOptions, transformers.Seq2SeqTrainingArguments):
        pass

    options = Both(str(tmp_path), use_cpu=True, per_device_train_batch_size=4, mu=0.5)
    made = SFTMixTrainer(
        tiny.build("Llama"), options, train_dataset=tiny.examples(8), confident=tiny.halves(8)
    )
    assert made.args.mu == 0.5


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_data_of_another_kind_are_one_message(name: str, tmp_path: Path) -> None:
    """Data without labels, and streams, by position too."""
    model, args, good = tiny.build("Llama"), tiny.config(tmp_path, method="ntp"), tiny.examples(8)
    unlabelled, stream = good.remove_columns("labels"), good.to_iterable_dataset()
    place = ["train_dataset", "eval_dataset"].index(name)
    for bad, error, message in (
        (unlabelled, ValueError, "without labels; `tokenize_examples` makes them from text, and w"),
        (list(unlabelled), ValueError, "row 0: .*without labels; `tokenize_examples` makes them"),
        (stream, TypeError, "expected a datasets.Dataset or a list, .*got IterableDataset; of a s"),
    ):
        data: list[Any] = [good] * place + [bad]
        with pytest.raises(error, match=rf"^{name}: .*{message}"):
            SFTMixTrainer(model, args, None, *data)
        with pytest.raises(error, match=rf"^{name}: .*{message}"):
            SFTMixTrainer(model, args, **{"train_dataset": good, name: bad})


@pytest.mark.parametrize("value", ["no", None, 0.5, float("nan")])
def test_halves_that_are_no_booleans_are_refused(value: Any, tmp_path: Path) -> None:
    """Anything but an empty text counts as true in Python."""
    with pytest.raises(ValueError, match=r"^confident: expected a boolean for each training exa"):
        tiny.trainer(tiny.build("Llama"), tmp_path, tiny.examples(8), confident=[value] * 8)


@pytest.mark.parametrize("value", ["a", None, 1.5, [1]])
@pytest.mark.parametrize("as_list", [False, True])
def test_ids_that_no_batch_carries_are_refused(value: Any, as_list: bool, tmp_path: Path) -> None:
    data: Any = tiny.examples(8).select_columns(["input_ids", "labels"])
    data = data.add_column("id", [value] * 8)
    words = r"^train_dataset: row 0: expected id, .* to be an integer, .*; leave the column out, or"
    with pytest.raises(ValueError, match=words):
        tiny.trainer(tiny.build("Llama"), tmp_path, list(data) if as_list else data)


@pytest.mark.parametrize("kind", ["text", "none", "missing", "arrow"])
def test_an_id_of_any_row_is_looked_at(kind: str, tmp_path: Path) -> None:
    rows: Any = list(tiny.examples(8).select_columns(["id", "input_ids", "labels"]))
    rows[5]["id"] = "a" if kind == "text" else None
    if kind == "missing":
        del rows[5]["id"]
    data = datasets.Dataset.from_list(rows) if kind == "arrow" else rows
    words = rf"^train_dataset: row 5: expected id, .*, got {rows[5].get('id')!r}; leave"
    with pytest.raises(ValueError, match=words):
        tiny.trainer(tiny.build("Llama"), tmp_path, data)


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
        found[layout] = [*tiny.losses(made, "loss", "lam_mean", "unmixed_fraction"), (evaluated,)]
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
    with pytest.raises(TypeError, match=r"data_collator: .* PairedCollator, got function; leave"):
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
