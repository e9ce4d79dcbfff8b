"""What training turns on in a model's config, and the config to save without it."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from typing import Any

logger = logging.getLogger(__name__)

# Only on in training: with it `generate` adds the router's loss, which fails on padded prompts.
TRAINING_ONLY = {"output_router_logits": False}
# What transformers' trainer sets to an option of its own.
SET_BY_TRAINER = ("use_cache",)


def configs_of(model: Any) -> list[Any]:
    """Return the model's config, and that of its text model where that is another."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return []
    text = config.get_text_config()
    return [config] if text is config else [config, text]


def as_loaded(model: Any) -> dict[str, Any]:
    """Return the values that a trainer is about to replace in the model's config."""
    found = {}
    for config in configs_of(model)[:1]:
        found = {name: getattr(config, name) for name in SET_BY_TRAINER if hasattr(config, name)}
    return found


@contextlib.contextmanager
def config_to_save(model: Any, loaded: Mapping[str, Any]) -> Iterator[None]:
    """Take out of the config what training turned on, for as long as it is written.

    ``loaded`` is what `as_loaded` found before the trainer was made.
    """
    before: list[tuple[Any, str, Any]] = []
    for number, config in enumerate(configs_of(model)):
        for name, value in {**TRAINING_ONLY, **(loaded if number == 0 else {})}.items():
            if hasattr(config, name):
                before.append((config, name, getattr(config, name)))
                setattr(config, name, value)
    try:
        yield
    finally:
        for config, name, value in reversed(before):
            setattr(config, name, value)


def make_savable(model: Any) -> None:
    """Make the generation config one that transformers saves, or refuse the model.

    Some models come with a temperature or a top_p beside greedy search. transformers reads that and
    does not write it, which would be found out when the trained model is saved.

    Raises:
        ValueError: it is none, and is so even where `do_sample` is true.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    try:
        config.validate(strict=True)
        return
    except ValueError as error:
        reason = " ".join(str(error).split())
    sampling = copy.deepcopy(config)
    sampling.do_sample = True
    try:
        sampling.validate(strict=True)
    except ValueError:
        raise ValueError(
            f"model: expected a generation_config.json that transformers can save, got: "
            f"{reason:.500}; mend it in the model's folder, or delete it there"
        ) from None
    logger.warning(
        "the model's generation_config.json has options of sampling without do_sample, which "
        "transformers does not save: do_sample is set to true"
    )
    config.do_sample = True
