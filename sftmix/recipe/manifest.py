"""Record what a run was made from when it starts, and compare it when the run is resumed.

Model, tokenizer and data are compared by content; names and paths are recorded for people.
"""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from sftmix import __version__
from sftmix.conventions import MANIFEST, MODEL_CARD, TRAINER_STATE
from sftmix.data.examples import data_hash
from sftmix.data.mixture import ids_by_source
from sftmix.methods import method_of
from sftmix.recipe.arguments import RunArguments
from sftmix.recipe.lora import lora_options
from sftmix.runs.checkpoints import latest_checkpoint
from sftmix.runs.folders import read_manifest, write_json
from sftmix.runs.provenance import PARTS, provenance
from sftmix.runs.redaction import redacted
from sftmix.templates.chat import template_date, template_hash
from sftmix.training.config import SFTMixConfig

logger = logging.getLogger(__name__)

# Entries that are not compared: facts, what reading the data found, the parts of hashes, and the
# note of `sftmix split`.
NOT_RECIPE = ("versions", "files", "split", "reading", PARTS)
# Options whose content has a hash: equal content elsewhere, or chosen otherwise, is the same.
BY_CONTENT = {
    "model": "model_hash",
    "revision": "model_hash",
    "commit": "model_hash",
    "data": "data_hash",
    "weights": "data_hash",
    "sources": "data_hash",
    "data_split": "data_hash",
    "select": "data_hash",
    "on_bad_row": "data_hash",
    "columns": "data_hash",
    "train_on": "data_hash",
    "encoding": "data_hash",
    "streaming": "data_hash",
    "weight": "weight_hash",
}
# Options that save memory and change results by roundings alone (and the random numbers of dropout
# and noise), with which a run that ran out of memory may go on; but `packed` makes other batches.
UP_TO_ROUNDING = ("layout", "mlp_tile_tokens", "loss_max_bytes")
SCORE_AGAIN = "score the data again"
# What a resumed training may have more of, and where the manifest keeps what it had before.
EPOCHS, STEPS, LENGTHENED = "num_train_epochs", "max_steps", "lengthened_from"
SCHEDULES_OF_MU = ("mu_schedule", "mu_warmup_ratio")
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Return versions of Python and of packages, and the number of threads.

    They decide a run's last bits.
    """
    found = {name: version(name) for name in PACKAGES}
    return {
        "sftmix": __version__,
        "python": platform.python_version(),
        **found,
        # Another number of threads rounds sums differently.
        "torch_threads": str(torch.get_num_threads()),
    }


# Fields of the training config that decide a run's results.
RECIPE_FIELDS = (
    "method",
    "head",
    "loss_schedule",
    "layout",
    "row_length",
    "mlp_tile_tokens",
    "loss_max_bytes",
    "mu",
    "alpha",
    "lambda_scope",
    "pairing",
    "kl_reg",
    "power_k",
    "eaft_alpha",
    "gem_beta",
    "label_smoothing_factor",
    "num_scorings",
    "seed",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "learning_rate",
    "weight_decay",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_grad_norm",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "neftune_noise_alpha",
    "dataloader_drop_last",
    "bf16",
    "fp16",
)


def recipe(
    arguments: RunArguments,
    config: SFTMixConfig,
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    **more: Any,
) -> dict[str, Any]:
    """Return what decides the results of a run: model, data, template, and every number."""
    numbers = {name: getattr(config, name) for name in RECIPE_FIELDS if hasattr(config, name)}
    return {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "attn_implementation": arguments.attn_implementation,
        "data": arguments.data,
        "weights": arguments.weights,
        "sources": ids_by_source(dataset),
        "data_split": arguments.data_split,
        "select": arguments.select,
        "on_bad_row": arguments.on_bad_row,
        "columns": arguments.columns,
        "train_on": arguments.train_on,
        "encoding": arguments.encoding,
        "streaming": arguments.streaming,
        "data_hash": data_hash(dataset["content_hash"][:]),
        "num_examples": len(dataset),
        "max_length": arguments.max_length,
        "template_hash": template_hash(tokenizer),
        **provenance(
            arguments.model,
            tokenizer,
            arguments.revision,
            trust_remote_code=arguments.trust_remote_code,
        ),
        "template_date": template_date(tokenizer),
        **lora_options(arguments),
        **numbers,
        **more,
    }


def kept_date(run: Path | None, scored: Path | None = None) -> str | None:
    """Return the date that the chat template told in the run, or else in the scored one.

    A run that goes on another day reads the tokens that it began with; a run that trains on a
    partition reads those that were scored.

    Raises:
        ValueError: a manifest is damaged.
        OSError: it cannot be read.
    """
    if run is not None and (run / MANIFEST).exists():
        date = read_manifest(run / MANIFEST, "resume").get("template_date")
        if date is not None:
            return str(date)
    if scored is None or not (scored / MANIFEST).exists():
        return None
    date = read_manifest(scored / MANIFEST, "partition", SCORE_AGAIN).get("template_date")
    return None if date is None else str(date)


def warn_of_other_template(partition: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Log one line if the manifest beside a partition names another chat template.

    Raises:
        ValueError: the manifest is damaged.
        OSError: it cannot be read.
    """
    manifest = partition.with_name(MANIFEST)
    if not manifest.exists():
        return
    scored = read_manifest(manifest, "partition", SCORE_AGAIN).get("template_hash")
    if scored not in (None, template_hash(tokenizer)):
        logger.warning(
            "partition: %s was scored under another chat template than this run's: its "
            "confidences are of other texts",
            partition,
        )


def start_manifest(run: Path, recipe: dict[str, Any], **files: Any) -> bool:
    """Write `RUN/manifest.json`, or compare it with that of the resumed run.

    Returns:
        Whether the resumed run is a training that now has more epochs or steps: `lengthen` it.

    `files` are recorded for reports but not compared, since they may have been moved. `folder`
    records the directory against which relative paths are resolved.

    Raises:
        ValueError: the run was started from another recipe, naming what differs; or its manifest
            is damaged.
    """
    path = run / MANIFEST
    recipe = redacted(json.loads(json.dumps(recipe)))
    if not path.exists():
        places = {"folder": os.getcwd(), **files}
        write_json(path, {**recipe, "versions": versions(), "files": redacted(places)})
        return False
    earlier = read_manifest(path, "resume")
    if earlier.get("mu_schedule") == "constant":
        # Versions before this one had schedules of mu; a constant mu is what all runs have now.
        earlier = {name: earlier[name] for name in earlier if name not in SCHEDULES_OF_MU}
    # Nor had they every option: one that is off, or that the method does not read, says nothing.
    idle = method_of(recipe["method"]).idle_options if "method" in recipe else set[str]()
    recipe = {
        name: value
        for name, value in recipe.items()
        if name in earlier or (value and name not in idle)
    }
    # Versions before this one kept only names.
    unknown = [
        name for name in recipe if name.endswith("_hash") and recipe[name] and name not in earlier
    ]
    if unknown:
        logger.warning(
            "%s was started by a version that kept no %s: whether they are the same cannot be "
            "told, their names are compared",
            run,
            ", ".join(unknown),
        )
    longer = is_longer(recipe, earlier)
    passed = {*NOT_RECIPE, *unknown, LENGTHENED, *((EPOCHS, STEPS) if longer else ())}
    for name in sorted(recipe.keys() | earlier.keys()):
        if name in passed or (BY_CONTENT.get(name, "") in earlier.keys() & recipe):
            continue
        if recipe.get(name) != earlier.get(name):
            if name in UP_TO_ROUNDING and "packed" not in (recipe.get(name), earlier.get(name)):
                logger.warning(
                    "%s was started with %s = %r, now it is %r: results are not the same to the "
                    "bit, but up to rounding, and to the random numbers of dropout and noise",
                    *(run, name, earlier.get(name), recipe.get(name)),
                )
                continue
            raise ValueError(
                f"resume: {run} was started with {name} = {earlier.get(name)!r}, "
                f"now it is {recipe.get(name)!r}{what_differs(name, earlier, recipe)}; take what "
                "it was started with, or start anew with another --output"
            )
    if earlier.get("versions") != versions():
        logger.warning("%s was started with other versions: %s", run, earlier.get("versions"))
    return longer


def is_longer(recipe: Mapping[str, Any], earlier: Mapping[str, Any]) -> bool:
    """Tell whether a training has more epochs than earlier, or more steps where it counts these."""
    if not {EPOCHS, STEPS} <= recipe.keys() & earlier.keys() or "num_scorings" in recipe:
        return False
    counted = STEPS if recipe[STEPS] > 0 else EPOCHS
    return bool((earlier[STEPS] > 0) == (counted == STEPS) and recipe[counted] > earlier[counted])


def lengthen(run: Path, recipe: Mapping[str, Any]) -> str:
    """Make a training unfinished that goes on to the epochs or steps of `recipe`; say so.

    The manifest keeps what it had before as `lengthened_from`: with a learning rate that decays, a
    run that was lengthened is none that had its length from the start.

    Raises:
        ValueError: there is no checkpoint to go on from, or none that is whole.
    """
    earlier = read_manifest(run / MANIFEST, "resume")
    counted = STEPS if recipe[STEPS] > 0 else EPOCHS
    if latest_checkpoint(run) is None:
        raise ValueError(
            f"{counted}: {run} was started with {earlier[counted]:.15g} and has no checkpoint to "
            "go on from; start anew with another --output, or train its model further with "
            f"--model {run}"
        )
    # The card comes first: without it, the run does not pass for finished.
    for name in (MODEL_CARD, TRAINER_STATE):
        (run / name).unlink(missing_ok=True)
    before = [*earlier.get(LENGTHENED, ()), earlier[counted]]
    lengths = {EPOCHS: recipe[EPOCHS], STEPS: recipe[STEPS], LENGTHENED: before}
    write_json(run / MANIFEST, {**earlier, **lengths})
    return (
        f"{run} goes on to --{counted} {recipe[counted]:.15g}, from "
        f"{earlier[counted]:.15g}; the learning rate is from now on that of the longer run"
    )


def what_differs(name: str, earlier: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """Return a text that names the parts of a hash (files, say) that differ, and their places."""
    parts, before = ((one.get(PARTS) or {}).get(name) or {} for one in (recipe, earlier))
    changed = [one for one in {**before, **parts} if before.get(one) != parts.get(one)]
    told = [f"{', '.join(changed[:5])} differ{'' if len(changed) > 1 else 's'}"] if changed else []
    for place, owner in BY_CONTENT.items():
        if owner == name and recipe.get(place) != earlier.get(place):
            told.append(f"{place} was {earlier.get(place)!r}, now {recipe.get(place)!r}")
    return f" ({'; '.join(told)})" if told else ""
