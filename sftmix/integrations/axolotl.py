"""SFTMix in axolotl: a plugin that brings the options, the collator and the trainer.

    plugins:
      - sftmix.integrations.axolotl.SFTMixPlugin
    sftmix_partition: runs/score/confidence.parquet

Axolotl shuffles, splits and drops rows, so a row finds its half by its tokens and labels: what is
scored is the data that axolotl prepared.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

import datasets
import numpy as np
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.integrations.base import BasePlugin
from pydantic import create_model
from transformers import Trainer

from sftmix.data.examples import content_hash
from sftmix.integrations.tokens import has_targets, named_rows
from sftmix.methods import METHODS
from sftmix.pairs.collator import PairedCollator
from sftmix.pairs.partition import Partition, read_partition, take
from sftmix.training.config import SFTMixOptions, layout_for
from sftmix.training.trainer import SFTMixMixin, make_collator

HERE = "sftmix.integrations.axolotl"
# All options of the trainer but one that has to stay as it is.
NAMES = tuple(one.name for one in fields(SFTMixOptions) if one.name != "remove_unused_columns")

# Options of axolotl that the loss, the pairs or the collator would not heed.
UNSUPPORTED = (
    "sample_packing",
    "eval_sample_packing",
    "batch_flattening",
    "curriculum_sampling",
    "pretraining_dataset",
    "streaming",
    "rl",
    "orpo_alpha",
    "reward_model",
    "process_reward_model",
    "kd_trainer",
    "use_eaft",
    "processor_type",
    "activation_offloading",
    "layer_offloading",
)
# Pairs are laid out by the collator, which keeps them whole.
INSTEAD = {
    "sample_packing": "sftmix_layout: packed",
    "batch_flattening": "sftmix_layout: padding_free",
    "use_eaft": "sftmix_method: eaft",
}
PARALLEL = ("context_parallel_size", "tensor_parallel_size", "expert_parallel_size")


_TYPES: dict[str, Any] = {**get_type_hints(SFTMixOptions), "method": Literal[tuple(METHODS)]}
_KEYS: dict[str, Any] = {f"sftmix_{name}": (_TYPES[name] | None, None) for name in NAMES}
SFTMixArgs = create_model(
    "SFTMixArgs",
    __doc__="The plugin's keys in the YAML file; what is left out has `SFTMixOptions`' default.",
    __module__=__name__,
    sftmix_partition=(str | None, None),
    **_KEYS,
)


@dataclass
class SFTMixTrainingArgs(SFTMixOptions):
    """What the plugin adds to axolotl's training arguments."""

    sftmix_partition: str | None = field(
        default=None, metadata={"help": "confidence.parquet of the data that axolotl prepared"}
    )


class SFTMixPlugin(BasePlugin):  # type: ignore[misc]
    """Names the classes of this module to axolotl."""

    def get_input_args(self) -> str:
        """Return the path of the class with the keys in the YAML file."""
        return f"{HERE}.SFTMixArgs"

    def get_training_args_mixin(self) -> str:
        """Return the path of the options that are added to axolotl's training arguments."""
        return f"{HERE}.SFTMixTrainingArgs"

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """Return the options that the YAML file sets.

        Raises:
            ValueError: an option of axolotl that would not be heeded.
        """
        for name in UNSUPPORTED:
            if cfg.get(name):
                hint = f"; set {INSTEAD[name]}" if name in INSTEAD else ""
                raise ValueError(f"{name}: not supported with SFTMix, got {cfg.get(name)!r}{hint}")
        for name in PARALLEL:
            if (cfg.get(name) or 1) > 1:
                raise ValueError(f"{name}: not supported with SFTMix, got {cfg.get(name)!r}")
        given = {name: cfg.get(f"sftmix_{name}") for name in NAMES}
        given["sftmix_partition"] = cfg.get("sftmix_partition")
        return {name: value for name, value in given.items() if value is not None}

    def get_trainer_cls(self, cfg: Any) -> type[Trainer]:
        """Return the trainer's class."""
        return SFTMixAxolotlTrainer

    def get_collator_cls_and_kwargs(
        self, cfg: Any, is_eval: bool = False
    ) -> tuple[Any, dict[str, Any]]:
        """Return the collator, which is called with the tokenizer, and its keywords."""
        layout = layout_for(cfg.get("sftmix_layout") or "padded", cfg.get("sftmix_memory"))
        return paired_collator, {
            "layout": layout,
            "row_length": cfg.get("sftmix_row_length"),
        }


class SFTMixAxolotlTrainer(SFTMixMixin, AxolotlTrainer):  # type: ignore[misc]
    """Axolotl's trainer with the loss, the pairs and the checkpoints of `SFTMixMixin`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what `AxolotlTrainer` takes, all of it by name.

        Raises:
            TypeError: training arguments without the plugin's.
            ValueError: as `SFTMixMixin`; a row without a token to learn; or one not scored.
        """
        options = kwargs.get("args")
        if not isinstance(options, SFTMixTrainingArgs):
            raise TypeError(
                f"args: expected the options of the plugin, got {type(options).__name__}; add "
                f"{HERE}.SFTMixPlugin to plugins"
            )
        if kwargs.get("train_dataset") is not None:
            kwargs["train_dataset"] = numbered(kwargs["train_dataset"])
            if options.sftmix_partition is not None:
                kwargs["confident"] = find_halves(
                    kwargs["train_dataset"], Path(options.sftmix_partition)
                )
        super().__init__(*args, **kwargs)

    def _matched(self, confident: Any) -> Any:
        # `find_halves` has found the rows by their contents.
        return confident

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        # Axolotl's own only adds sample packing, and asks the data set for its columns.
        return Trainer._get_dataloader(self, *args, **kwargs)


def paired_collator(
    tokenizer: Any,
    *,
    layout: str,
    row_length: int | None,
    pad_to_multiple_of: int | None = None,
    **_: Any,
) -> PairedCollator:
    """Return a `PairedCollator`, of the arguments that axolotl gives to any collator."""
    token = make_collator(tokenizer).pad_token_id
    return PairedCollator(token, pad_to_multiple_of or 1, layout=layout, row_length=row_length)


def numbered(dataset: datasets.Dataset) -> datasets.Dataset:
    """Return tokens and labels, with the number of each row as ``id``.

    Raises:
        ValueError: a row without a token to learn.
    """
    dataset = dataset.select_columns(["input_ids", "labels"]).with_format(None)
    empty = (~has_targets(dataset)).nonzero()[0]
    if len(empty):
        raise ValueError(
            f"train_dataset: {len(empty)} of {len(dataset)} prepared rows have no token to learn: "
            f"{named_rows(empty)}"
        )
    return dataset.add_column("id", np.arange(len(dataset)))


def find_halves(dataset: datasets.Dataset, path: Path) -> Partition:
    """Return the partition in the order of the rows, found by their content hashes.

    The partition may have rows that axolotl left out or holds back for evaluation. Where several
    rows have one content, each takes one of its places.

    Raises:
        ValueError: a row that was not scored.
    """
    scored = read_partition(path)
    places: dict[str, list[int]] = defaultdict(list)
    for place, content in enumerate(scored.content_hash.tolist()):
        places[content].append(place)
    found = np.empty(len(dataset), dtype=np.int64)
    for row, example in enumerate(dataset):
        same = places[content_hash(example)]
        if not same:
            raise ValueError(
                f"sftmix_partition: prepared row {row} is not in {path}; score the data that "
                "`axolotl preprocess` wrote"
            )
        found[row] = same.pop()
    return take(scored, found)
