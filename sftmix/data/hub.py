"""Read data sets that `datasets` knows by name, or has saved."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from datasets.naming import camelcase_to_snakecase
from huggingface_hub import HfApi, constants

# Of httpx or of httpx2, whichever huggingface_hub asks with.
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

from sftmix.data.rows import Row
from sftmix.data.splits import names_of
from sftmix.runs.failures import printable

logger = logging.getLogger(__name__)

NAME = re.compile(
    r"(?P<path>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<config>[\w.+-]+))?(@(?P<revision>\w[\w./-]*))?"
)
WAY_OUT = "choose one with --data_split (of --eval_data: --eval_split)"
# What `datasets` raises for data that it does not load.
FAULTS = (DatasetsError, OSError, ValueError, RuntimeError, ImportError)
TIMEOUT = 10  # seconds that the hub has to answer
CONFIGS = re.compile(r"(?:available configs|Available): (\[.*?\])")


def read_name(name: str, split: str, *, streaming: bool = False) -> Iterator[Row]:
    """Return the rows of NAME, NAME:CONFIG or NAME@REVISION on the hub, of FOLDER or FOLDER:CONFIG.

    They lie on disk, in the cache of `datasets`; with `streaming` they are read as they arrive.

    Raises:
        FileNotFoundError: there is no such data set, or the hub is not reached.
        ValueError: it has several configs and none is named, or no such split, or is damaged.
    """
    options: dict[str, Any] = {"split": split, **({"streaming": True} if streaming else {})}
    path, config = folder_of(name)
    if not path:
        match = NAME.fullmatch(name)
        if match is None:
            raise FileNotFoundError(f"data: no file, folder or data set is named {name!r}")
        path, config = match["path"], match["config"]
        if match["revision"]:
            options["revision"] = match["revision"]
        _check_reached(name, path, match["revision"])
    try:
        rows = datasets.load_dataset(path, *([config] if config else []), **options)
    except FAULTS as error:
        raise _not_had(name, path, split, error) from error
    return numbered(rows)


def folder_of(name: str) -> tuple[str, str | None]:
    """Return the folder and the config of FOLDER or FOLDER:CONFIG; ("", None) of another name."""
    folder, _, config = name.rpartition(":")
    if Path(name).is_dir():
        return name, None
    return (folder, config) if folder and Path(folder).is_dir() else ("", None)


def check_folder(name: str, split: str) -> None:
    """Log one line that names the configs and splits of a folder that are not read.

    Raises:
        ValueError: it does not have the config or the split, or has several configs and none is
            named, or is damaged.
    """
    path, config = folder_of(name)
    try:
        builder = datasets.load_dataset_builder(path, config)
    except FAULTS as error:
        raise _not_had(name, path, split, error) from error
    wanted, splits = names_of(split), [str(one) for one in builder.config.data_files or ()]
    wanted = splits if wanted == ["all"] else wanted
    if missing := [one for one in wanted if one not in splits]:
        raise no_split(name, missing[0], splits)
    read = builder.config.name
    others = builder.builder_configs if config is None else ()
    left = [f"config {one!r}" for one in others if one != read]
    left += [f"split {one!r}" for one in splits if one not in wanted]
    if left:
        what = f"{path}: read {split!r} of the config {read!r}, and not the {', the '.join(left)}"
        logger.warning("%s", printable(what))


def _not_had(name: str, path: str, split: str, error: Exception) -> OSError | ValueError:
    """Return the error for a data set that `datasets` does not load."""
    if configs := CONFIGS.search(str(error)):
        return ValueError(f"data: {path} has the configs {configs[1]}; name one: {path}:CONFIG")
    if Path(path).is_dir():
        return ValueError(f"data: {name} cannot be read: {error}")
    kind = FileNotFoundError if isinstance(error, OSError) else ValueError
    return kind(
        f"data: no file or folder {name!r}, and no data set of this name with the split "
        f"{split!r} can be had: {error}"
    )


def no_split(name: str | Path, split: str, found: Collection[str]) -> ValueError:
    """Return the error for a split that a data set does not have, with those it has."""
    return ValueError(
        f"data: {str(name)!r} has no split {split!r}; it has {', '.join(sorted(found))}; {WAY_OUT}"
    )


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
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
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
