"""The plugin for axolotl, over a stand-in for the parts of axolotl that it touches.

Axolotl itself pins versions of its own, so it is not installed beside the tests. The stand-in keeps
its contract: how options and classes of a plugin are merged, with what the trainer is built, and
what its trainer's data loader does with a data set.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from sftmix.data.examples import content_hash
from sftmix.pairs.partition import from_scores, write_partition
from sftmix.training.config import SFTMixOptions
from tests.sftmix import tiny


class AxolotlTrainer(Trainer):
    """Takes two collators and tags more than `Trainer`, and drops a column of its data."""

    def __init__(
        self,
        *args: Any,
        bench_data_collator: Any = None,
        eval_data_collator: Any = None,
        dataset_tags: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.eval_data_collator = eval_data_collator

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if "length" in dataset.column_names:
            dataset = dataset.remove_columns(["length"])
        return super()._get_dataloader(dataset, *args, **kwargs)


class BasePlugin:
    """All hooks of axolotl's do nothing."""


@dataclass
class AxolotlTrainingMixins:
    """Two of axolotl's training arguments."""

    sample_packing: bool = False
    include_tkps: bool = True


@pytest.fixture
def axolotl(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The integration, imported over the stand-in."""
    parts = {
        "axolotl": {},
        "axolotl.core": {},
        "axolotl.core.trainers": {},
        "axolotl.core.trainers.base": {"AxolotlTrainer": AxolotlTrainer},
        "axolotl.integrations": {},
        "axolotl.integrations.base": {"BasePlugin": BasePlugin},
    }
    for name, members in parts.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    name = "sftmix.integrations.axolotl"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name)


def named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def build(module: ModuleType, cfg: dict[str, Any], data: Any, model: Path, output: Path) -> Any:
    """A trainer as axolotl's builder makes it, from the keys of a YAML file."""
    plugin = named(f"{module.__name__}.SFTMixPlugin")()
    cfg = named(plugin.get_input_args())(**cfg).model_dump() | cfg
    mixins = type(
        "AxolotlTrainingMixins",
        (AxolotlTrainingMixins, named(plugin.get_training_args_mixin())),
        {},
    )
    # Checkpoints hold the arguments, so their class must be found by its name.
    name, core = "AxolotlTrainingArguments", sys.modules["axolotl.core"]
    vars(core)[name] = dataclass(
        type(name, (mixins, TrainingArguments), {"__module__": core.__name__})
    )
    arguments = vars(core)[name](
        output_dir=str(output),
        use_cpu=True,
        disable_tqdm=True,
        per_device_train_batch_size=4,
        num_train_epochs=1,
        logging_steps=1,
        save_strategy="epoch",
        report_to="none",
        **plugin.get_training_args(cfg),
    )
    collator, changes = plugin.get_collator_cls_and_kwargs(cfg, is_eval=False)
    tokenizer = AutoTokenizer.from_pretrained(model)
    given = {"padding": True, "pad_to_multiple_of": 64} | changes | {"return_tensors": "pt"}
    made = collator(tokenizer, **given)
    return plugin.get_trainer_cls(cfg)(
        model=AutoModelForCausalLM.from_pretrained(model),
        train_dataset=data,
        eval_dataset=data.select(range(2)),
        args=arguments,
        data_collator=made,
        callbacks=[],
        eval_data_collator=made,
        bench_data_collator=made,
        processing_class=tokenizer,
        dataset_tags=["rows.jsonl"],
    )


def test_each_option_of_the_trainer_is_a_key(axolotl: ModuleType) -> None:
    keys = {f"sftmix_{one.name}" for one in fields(SFTMixOptions)}
    found = set(axolotl.SFTMixArgs.model_fields)
    assert keys - found == {"sftmix_remove_unused_columns"}
    assert found - keys == {"sftmix_partition"}
    given = {"sftmix_spike_threshold": 6.0, "sftmix_save_minutes": 30.0}
    options = axolotl.SFTMixPlugin().get_training_args(given)
    assert options == {"spike_threshold": 6.0, "save_minutes": 30.0}


@pytest.fixture
def prepared() -> datasets.Dataset:
    """Rows with the columns that axolotl prepares."""
    data = tiny.examples(20).remove_columns(["id", "content_hash"])
    return data.map(lambda row: {"attention_mask": [1] * len(row["input_ids"])})


def write_scores(path: Path, data: datasets.Dataset) -> None:
    """A partition in which every second row is confident."""
    hashes = [content_hash(row) for row in data]
    nll = np.arange(len(data))[:, None] % 2 + 1.0
    write_partition(path, from_scores(range(len(data)), hashes, [1] * len(data), nll))


def test_it_trains_evaluates_and_saves(
    axolotl: ModuleType, prepared: datasets.Dataset, toy_model: Path, tmp_path: Path
) -> None:
    write_scores(tmp_path / "confidence.parquet", prepared)
    # What axolotl does to rows: it shuffles, and holds some back.
    data = prepared.shuffle(seed=3).select(range(12))
    kept = np.random.default_rng(3).permutation(20)[:12]
    cfg = {"sftmix_partition": str(tmp_path / "confidence.parquet"), "sftmix_mu": 0.5}
    trainer = build(axolotl, cfg, data, toy_model, tmp_path / "run")
    confident = np.zeros(12, dtype=bool)
    confident[trainer.confident_rows] = True
    assert confident.tolist() == (kept % 2 == 0).tolist()
    assert (trainer.args.mu, trainer.args.alpha) == (0.5, 0.5)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape == (4, 64)
    trainer.train()
    assert tiny.losses(trainer, "mixup_loss")
    changes = {"sftmix_method": "mixup", "sftmix_pairing": "rank", "sftmix_lambda_scope": "batch"}
    changed = build(axolotl, cfg | changes, data, toy_model, tmp_path / "run")
    assert [pool.ranked for pool in changed.pools] == [True]
    batch = next(iter(changed.get_train_dataloader()))
    assert len(batch["lam"].unique()) == 1
    packed = build(axolotl, cfg | {"sftmix_layout": "packed"}, data, toy_model, tmp_path / "run")
    assert next(iter(packed.get_train_dataloader()))["input_ids"].shape == (1, 64)
    assert trainer.evaluate()["eval_loss"] > 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4")


@pytest.mark.parametrize(
    ("cfg", "layout"),
    [
        ({}, "padded"),
        ({"sftmix_memory": "lean"}, "sequential"),
        ({"sftmix_memory": "lean", "sftmix_layout": "padded"}, "sequential"),
        ({"sftmix_memory": "lean", "sftmix_layout": "packed"}, "packed"),
    ],
    ids=str,
)
def test_the_collator_lays_out_as_the_options_do(
    axolotl: ModuleType, cfg: dict[str, Any], layout: str, tmp_path: Path
) -> None:
    plugin = axolotl.SFTMixPlugin()
    options = tiny.config(tmp_path, **plugin.get_training_args(cfg))
    assert plugin.get_collator_cls_and_kwargs(cfg)[1]["layout"] == options.layout == layout


def test_what_does_not_fit_is_refused(
    axolotl: ModuleType, prepared: datasets.Dataset, toy_model: Path, tmp_path: Path
) -> None:
    scores = tmp_path / "confidence.parquet"
    write_scores(scores, prepared.select(range(19)))

    def refused(words: str, data: Any = prepared, **cfg: Any) -> None:
        cfg = {"sftmix_partition": str(scores)} | cfg
        with pytest.raises(ValueError, match=words):
            build(axolotl, cfg, data, toy_model, tmp_path)

    refused("^sample_packing: not supported with SFTMix, got True", sample_packing=True)
    refused("^batch_flattening: .* set sftmix_layout: padding_free$", batch_flattening="auto")
    refused("^context_parallel_size: not supported", context_parallel_size=2)
    refused("^mu: expected a finite number", sftmix_mu=-1.0)
    refused("^sftmix_partition: prepared row 19 is not in")
    refused("^sftmix_partition: prepared row 1 is not in", prepared.select([0, 0]))
    refused("^confident: method='sftmix' needs", sftmix_partition=None)
    silent = prepared.map(
        lambda row, i: {"labels": [-100 if i == 2 else x for x in row["labels"]]}, with_indices=True
    )
    refused("1 of 20 prepared rows have no token to learn: 2$", silent)
    with pytest.raises(
        TypeError, match=r"got TrainingArguments; add sftmix\.integrations\.axolotl"
    ):
        axolotl.SFTMixAxolotlTrainer(args=TrainingArguments(str(tmp_path), use_cpu=True))
