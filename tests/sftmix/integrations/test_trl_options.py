"""Options of TRL: those that would not be heeded, and the coefficient of a router's loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trl import SFTConfig, SFTTrainer

from sftmix.integrations.trl import SFTMixSFTConfig
from tests.sftmix import over_trl, tiny
from tools import families

# TRL's own defaults use a name that transformers gives up.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")

REFUSED: dict[str, Any] = {
    "packing": True,
    "eval_packing": True,
    "loss_type": "dft",
    "activation_offloading": True,
    "use_liger_kernel": True,
    "padding_free": True,
    "label_smoothing_factor": 0.1,
    "save_only_model": True,
    "train_sampling_strategy": "sequential",
    "dataset_kwargs": {"skip_prepare_dataset": True},
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_would_not_be_heeded_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        SFTMixSFTConfig(str(tmp_path), use_cpu=True, bf16=False, **{name: REFUSED[name]})


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

    given = {"method": "ntp", "router_aux_loss_coef": coefficient}
    mine = over_trl.trainer(experts(), tmp_path, tiny.examples(8), 4, **given)
    theirs = SFTTrainer(
        experts(),
        SFTConfig(**over_trl.options(tmp_path, 4), router_aux_loss_coef=coefficient),
        train_dataset=mine.examples.remove_columns("id"),
        processing_class=mine.processing_class,
    )
    batch = next(iter(mine.get_train_dataloader()))
    found = mine.compute_loss(mine.model, batch)
    own = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    expected = theirs.compute_loss(theirs.model, own)
    assert mine.head.router_coefficient == (2.0 if coefficient is None else coefficient)
    assert tiny.relative_difference(found, expected) < 1e-6
    found.backward()
    expected.backward()
    tiny.assert_same_training(mine.model, theirs.model, own, mine.head.router_coefficient)


def test_a_coefficient_that_the_models_loss_does_not_have_is_refused(tmp_path: Path) -> None:
    model, data = families.build("jetmoe"), tiny.examples(8)
    with pytest.raises(ValueError, match=r"^router_aux_loss_coef: .*adds .* 0.01, got 0.5"):
        over_trl.trainer(model, tmp_path, data, 4, router_aux_loss_coef=0.5)
