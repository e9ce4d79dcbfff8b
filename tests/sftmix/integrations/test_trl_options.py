"""Options of TRL: heeded, or refused with a reason; and the coefficient of a router's loss."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer

from sftmix.integrations.trl import (
    ARGUMENTS,
    UNSUPPORTED,
    SFTMixSFTConfig,
    reference_options,
    score,
)
from sftmix.training import option_checks
from tests.sftmix import over_trl, tiny
from tests.sftmix.training.test_methods import dense_loss, flat_gradients
from tools import families

# TRL's own defaults use a name that transformers gives up.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`loss_type='chunked_nll'` is deprecated:FutureWarning"),
]

REFUSED: dict[str, Any] = {
    "packing": True,
    "eval_packing": True,
    "loss_type": "other",
    "use_liger_kernel": True,
    "padding_free": True,
    "label_smoothing_factor": 0.1,
    "save_only_model": True,
    "train_sampling_strategy": "sequential",
    "dataset_kwargs": {"skip_prepare_dataset": True},
}


# What TRL does with them, and what this trainer does in its place; the page says how.
HEEDED = {
    *("model_init_kwargs", "trust_remote_code", "chat_template_path", "eos_token", "pad_token"),
    *("dataset_text_field", "max_length", "truncation_mode", "shuffle_dataset"),
    *("pad_to_multiple_of", "dataset_num_proc", "dataset_kwargs", "completion_only_loss"),
    *("assistant_only_loss", "router_aux_loss_coef", "activation_offloading", "packing_strategy"),
}
PAGE = Path(__file__).parents[3] / "docs" / "integrations.md"


def config(folder: Path, **options: Any) -> SFTMixSFTConfig:
    return SFTMixSFTConfig(str(folder), use_cpu=True, bf16=False, **options)


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_would_not_be_heeded_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{name}: ") as caught:
        config(tmp_path, **{name: REFUSED[name]})
    # What came, why it is refused, and the way out.
    assert re.search(r"; |, which |expected ", str(caught.value))


def test_every_option_of_trl_is_heeded_or_refused() -> None:
    """Those of transformers are sorted by `test_option_checks`; a new one has to be looked at."""
    fields = {field.name for field in dataclasses.fields(SFTConfig) if field.init}
    of_transformers = {field.name for field in dataclasses.fields(TrainingArguments)}
    known = HEEDED | UNSUPPORTED.keys()
    assert fields - of_transformers - known == set()
    assert HEEDED - fields == set()
    assert HEEDED & UNSUPPORTED.keys() == set()
    # In the table of the page, and what is refused under a reason of TRL's users.
    lines = PAGE.read_text(encoding="utf-8").partition("### Options")[2].partition("###")[0]
    rows = {
        line.split("|")[1]: line.split("|")[2] for line in lines.splitlines() if line[:3] == "| `"
    }
    names = {name for cell in rows for name in re.findall(r"`(\w+)`", cell)}
    assert (fields - of_transformers) <= names <= fields
    refused = {
        name
        for cell, says in rows.items()
        if says.strip().startswith("refused")
        for name in re.findall(r"`(\w+)`", cell)
    }
    own = UNSUPPORTED.keys() - of_transformers - {"loss_type"}
    assert refused == own | {"dataset_kwargs", "use_liger_kernel", "save_only_model"}
    assert {"use_liger_kernel", "save_only_model"} <= option_checks.UNSUPPORTED.keys()
    for name in ARGUMENTS:
        assert f"`{name}`" in lines


def test_the_defaults_of_trl_train(tmp_path: Path) -> None:
    """Whatever TRL's own default loss is called, plain NTP is meant."""
    made = config(tmp_path)
    assert made.loss_type == "nll"
    assert made.assistant_only_loss is None
    assert dataclasses.replace(made).loss_type == "nll"


def test_a_batch_of_one_has_a_way_out(tmp_path: Path) -> None:
    words = r"^per_device_train_batch_size: expected an even number .* got 1; layout='sequential'"
    with pytest.raises(ValueError, match=words):
        config(tmp_path, per_device_train_batch_size=1)
    assert config(tmp_path, per_device_train_batch_size=1, method="ntp").method == "ntp"


def test_activation_offloading_is_ours(tmp_path: Path) -> None:
    for options in ({"gradient_checkpointing": True}, {"memory": "lean"}):
        made = config(tmp_path, activation_offloading=True, **options)
        assert made.activation_offload
        assert not made.activation_offloading
        assert dataclasses.replace(made).activation_offload
    with pytest.raises(
        ValueError, match=r"^activation_offloading: expected gradient_checkpointing"
    ):
        config(tmp_path, activation_offloading=True, gradient_checkpointing=False)
    assert not config(tmp_path).activation_offload


@pytest.mark.parametrize("coefficient", [None, 0.0, 4.0])
def test_the_routers_loss_is_that_of_trl(
    coefficient: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's own coefficient is 2, and its config leaves the router's loss out."""
    monkeypatch.setenv("CI", "1")  # TRL tells its makers of every other trainer

    def experts() -> Any:
        model = families.build("mixtral", router_aux_loss_coef=2.0)
        model.config.output_router_logits = False
        return model

    given = {} if coefficient is None else {"router_aux_loss_coef": coefficient}
    mine = over_trl.trainer(experts(), tmp_path, tiny.examples(8), 4, method="ntp", **given)
    theirs = SFTTrainer(
        experts(),
        SFTConfig(**over_trl.options(tmp_path, 4), **given),
        train_dataset=mine.examples.remove_columns("id"),
        processing_class=mine.processing_class,
    )
    batch = next(iter(mine.get_train_dataloader()))
    found = mine.compute_loss(mine.model, batch)
    own = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    expected = theirs.compute_loss(theirs.model, own)
    wanted = mine.args.router_aux_loss_coef  # until TRL 1.12 its default is a number
    assert mine.head.router_coefficient == (2.0 if wanted is None else wanted)
    assert tiny.relative_difference(found, expected) < 1e-6
    found.backward()
    expected.backward()
    tiny.assert_same_training(mine.model, theirs.model, own, mine.head.router_coefficient)


def test_dft_is_that_of_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``loss_type`` alone asks for it: the loss of a batch and all gradients, in the budget."""
    monkeypatch.setenv("CI", "1")
    mine = over_trl.trainer(tiny.build("Llama"), tmp_path, tiny.examples(8), 8, loss_type="dft")
    theirs = SFTTrainer(
        tiny.build("Llama"),
        SFTConfig(**over_trl.options(tmp_path, 8), loss_type="dft"),
        train_dataset=mine.examples.remove_columns("id"),
        processing_class=mine.processing_class,
    )
    assert mine.args.method == "dft"
    batch = next(iter(mine.get_train_dataloader()))
    own = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    exact = tiny.build("Llama").double()
    losses = [
        mine.compute_loss(mine.model, batch),
        theirs.compute_loss(theirs.model, dict(own)),
        dense_loss(exact, own, "dft", None),
    ]
    for loss in losses:
        loss.backward()
    assert tiny.relative_difference(losses[0], losses[1]) < 1e-6
    tiny.assert_in_budget("gradients", *map(flat_gradients, (mine.model, theirs.model, exact)))
    plain = dense_loss(exact, own, "ntp", None)
    assert losses[0] < 0.9 * plain


def test_loss_types(tmp_path: Path) -> None:
    def method(**options: Any) -> str:
        return SFTMixSFTConfig(str(tmp_path), use_cpu=True, bf16=False, **options).method

    assert method(loss_type="nll") == method() == "sftmix"
    assert method(loss_type="chunked_nll") == "sftmix"
    for given in ({}, {"method": "ntp"}, {"method": "dft"}):
        assert method(loss_type="dft", **given) == "dft"
    for other in ("gem", "mixup"):
        with pytest.raises(ValueError, match=f"^loss_type: expected 'nll' with method='{other}'"):
            method(loss_type="dft", method=other)
    with pytest.raises(ValueError, match=r"^label_smoothing_factor: .*method='dft'"):
        method(loss_type="dft", label_smoothing_factor=0.1)


def test_a_reference_model_is_trained_without_the_targets_objective(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`score` takes the arguments of the trainer, and trains with NTP."""
    monkeypatch.setenv("CI", "1")
    data = tiny.examples(4).remove_columns("id")
    asked = ({}, {"loss_type": "dft"}, {"method": "ntp", "label_smoothing_factor": 0.1})
    found = []
    for options in asked:
        made = over_trl.options(tmp_path, 4, learning_rate=0.1, **options)
        tokenizer = over_trl.tokenizer()
        args = SFTMixSFTConfig(**made)
        scored = score(
            tiny.build("Llama"),
            args,
            train_dataset=data,
            num_scorings=1,
            processing_class=tokenizer,
        )
        found.append(scored.nll_sum.tolist())
    assert found[0] == found[1] == found[2]


def test_a_reference_model_leaves_no_checkpoint(tmp_path: Path) -> None:
    """Its training has the folder of the one that follows, which would go on from it."""
    made = over_trl.options(tmp_path, 4, learning_rate=0.1, save_minutes=1e-9)
    args = SFTMixSFTConfig(**made, enable_jit_checkpoint=True)
    found = reference_options(args)
    assert found.save_seconds == float("inf")
    assert not found.enable_jit_checkpoint
    data, tokenizer = tiny.examples(4).remove_columns("id"), over_trl.tokenizer()
    score(tiny.build("Llama"), args, train_dataset=data, num_scorings=1, processing_class=tokenizer)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_coefficient_that_the_models_loss_does_not_have_is_refused(tmp_path: Path) -> None:
    model, data = families.build("jetmoe"), tiny.examples(8)
    with pytest.raises(ValueError, match=r"^router_aux_loss_coef: .*adds .*, got 0.5"):
        over_trl.trainer(model, tmp_path, data, 4, router_aux_loss_coef=0.5)
