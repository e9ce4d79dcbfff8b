"""The pairs that are shown are those that a training begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sftmix.recipe.first_batch import first_batch
from tests.sftmix import tiny


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layout": "packed", "lambda_scope": "batch", "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 8, "alpha": 2.0, "seed": 3, "layout": "padding_free"},
    ],
)
def test_they_are_those_of_the_first_batch(tmp_path: Path, changes: dict[str, Any]) -> None:
    data = tiny.examples(22)
    made = tiny.trainer(tiny.build("Llama"), tmp_path, data, **changes)
    batch = next(iter(made.get_train_dataloader()))
    pairs, shape = first_batch(
        made.args, data, tiny.halves(22), made.data_collator, lambda ids: list(map(str, ids))
    )
    assert shape == tuple(batch["input_ids"].shape)
    drawn = [data[row]["id"] for pair in pairs for row in pair.examples]
    assert drawn == batch["ids"].tolist()
    meetings = [meeting for pair in pairs for meeting in pair.meetings]
    for side, name in enumerate(("pair_c", "pair_u")):
        assert [one.rows[side] for one in meetings] == batch["rows"][batch[name]].tolist()
        targets = batch["targets"][batch[name]].tolist()
        assert [one.texts[side] for one in meetings] == list(map(str, targets))
    lam = [pair.lam for pair in pairs for _ in pair.meetings]
    assert torch.equal(torch.tensor(lam), batch["lam"])
    assert len({pair.lam for pair in pairs}) == (1 if "lambda_scope" in changes else len(pairs))
    assert sum(pair.left_over for pair in pairs) == len(batch["rows"]) - 2 * len(meetings)


def test_fewer_examples_than_a_batch_are_refused(tmp_path: Path) -> None:
    options = tiny.config(tmp_path, per_device_train_batch_size=8)
    collator: Any = None
    with pytest.raises(ValueError, match="per_device_train_batch_size: expected at most the 4 exa"):
        first_batch(options, tiny.examples(4), tiny.halves(4), collator, list)
