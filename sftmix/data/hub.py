"""Read data sets that `datasets` knows by name, or has saved."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from datasets.naming import camelcase_to_snakecase
from huggingface_hub import HfApi, constants

from sftmix.data.rows import Row
from sftmix.runs.failures import is_library_error

logger = logging.getLogger(__name__)

NAME = re.compile(
    r"(?P<path>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<config>[\w.+-]+))?(@(?P<revision>\w[\w./-]*))?"
)
TIMEOUT = 10  # seconds that the hub has to answer
CONFIGS = re.compile(r"available configs: (\[.*?\])")


def read_name(name: str, split: str, *, streaming: bool = False) -> Iterator[Row]:
    """Return the rows of NAME, NAME:CONFIG or NAME@REVISION on the hub, or of a folder.

    They lie on disk, in the cache of `datasets`; with `streaming` they are read as they arrive.

    Raises:
        FileNotFoundError: there is no such data set, or the hub is not reached.
        ValueError: it has several configs and none is named, or no such split, or is damaged.
    """
    options: dict[str, Any] = {"split": split, **({"streaming": True} if streaming else {})}
    path, config = name, None
    if not Path(name).is_dir():
        match = NAME.fullmatch(name)
        if match is None:
            raise FileNotFoundError(f"data: no file, folder or data set is named {name!r}")
        path, config = match["path"], match["config"]
        if match["revision"]:
            options["revision"] = match["revision"]
        _check_reached(name, path, match["revision"])
    try:
        rows = datasets.load_dataset(path, *([config] if config else []), **options)
    except (DatasetsError, OSError, ValueError, RuntimeError, ImportError) as error:
        configs = CONFIGS.search(str(error))
        if configs:
            raise ValueError(
                f"data: {path} has the configs {configs[1]}; name one: {path}:CONFIG"
            ) from error
        is_missing = isinstance(error, OSError) and not Path(name).is_dir()
        kind = FileNotFoundError if is_missing else ValueError
        raise kind(
            f"data: no file or folder {name!r}, and no data set of this name with the split "
            f"{split!r} can be had: {error}"
        ) from error
    return numbered(rows)


def numbered(rows: Any) -> Iterator[Row]:
    """Return the rows of a data set, numbered from 1."""
    rows = rows.with_format(None) if isinstance(rows, datasets.Dataset) else rows
    return (Row(row, value) for row, value in enumerate(rows, start=1))


def _check_reached(name: str, path: str, revision: str | None) -> None:
    """Refuse a name while the hub is not reached and the data set is not in the cache.

    `load_dataset` would try for 24 s.
    """
    if is_reached(path, revision):
        return
    if not _is_cached(path):
        raise FileNotFoundError(
            f"data: no file or folder {name!r}, and no data set of this name is in the cache; the "
            "hub is not reached: give a file or a folder, or download the data set first"
        )
    if not constants.HF_HUB_OFFLINE:
        logger.warning(
            "the hub is not reached: %s is read from the cache, after 24 s of further tries "
            "(HF_HUB_OFFLINE=1 saves them)", name
        )  # fmt: skip


def is_reached(path: str, revision: str | None = None) -> bool:
    """Tell whether the hub answers when it is asked for a data set, whatever the answer is."""
    try:
        HfApi().dataset_info(path, revision=revision, timeout=TIMEOUT)
    except Exception as error:  # of httpx, or of httpx2, or of what follows them
        if not is_library_error(error):
            raise
        # A ValueError is of a name that the hub cannot have: `load_dataset` says so.
        return isinstance(error, ValueError) or getattr(error, "response", None) is not None
    return True


def _is_cached(path: str) -> bool:
    *owner, name = path.split("/")
    saved = "___".join([*owner, camelcase_to_snakecase(name)])
    downloaded = "--".join(["datasets", *owner, name])
    return (
        Path(datasets.config.HF_DATASETS_CACHE, saved).exists()
        or Path(constants.HF_HUB_CACHE, downloaded).exists()
    )
