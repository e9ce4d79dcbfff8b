"""Find where rows come from: a file, a folder of files, a saved data set, or one of the hub.

FILE                 .json, .jsonl or .parquet
FOLDER               all such files in it and in its folders, in order of their names, without
                     hidden ones. A word in the name of the file or of its folder tells the split
                     (train, training; validation, valid, val, dev; test, testing, eval,
                     evaluation), as does the word before -00000-of-00001; other files belong to
                     train. `split` chooses, and one line names the files that are not read
FOLDER               of `datasets`' save_to_disk; `split` chooses among several
NAME, NAME:CONFIG    what `datasets.load_dataset(NAME, CONFIG, split=split)` gives; a folder
                     whose README.md has `configs:` is read so, too
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from sftmix.data.rows import ENDINGS, Row, read_file

logger = logging.getLogger(__name__)

# A file's name and its rows.
Source = tuple[str, Iterator[Row]]

# As `datasets` names the splits of files (data_files.py there).
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
WAY_OUT = "choose one with --data_split (of --eval_data: --eval_split)"
NAMES_SHOWN = 10
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.+-]+)?")
# These JSON files are of `datasets` itself.
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def open_sources(name: str | Path, split: str) -> Iterator[Source]:
    """Yield the files behind a name, one after another, each with its rows.

    Raises:
        FileNotFoundError: there is no such file, folder or data set.
        ValueError: the name is empty or a device, a folder holds no data file or none of the split,
            a data set has several configs and none is named, or as `read_file`.
        OSError: a data set cannot be had, or is damaged.
    """
    path = Path(name)
    if not str(name).strip():
        raise ValueError("data: expected a file, a folder or a data set's name, got ''")
    if path.is_dir():
        yield from _of_folder(path, split)
    elif path.is_file():
        yield str(name), read_file(path)
    elif path.suffix.lower() in ENDINGS:
        raise FileNotFoundError(f"data: no such data file: {name}")
    elif path.exists():
        raise ValueError(f"data: expected a file or a folder, {name} is neither")
    else:
        yield str(name), _of_name(str(name), split)


def read_rows(name: str | Path, split: str) -> Iterator[Row]:
    """Return the rows of all files behind a name, as `open_sources` finds them."""
    return itertools.chain.from_iterable(rows for _, rows in open_sources(name, split))


def _of_folder(folder: Path, split: str) -> Iterator[Source]:
    if (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("dataset_info.json", "state.json")
    ):
        yield from _of_disk(folder, split)
        return
    if _has_configs(folder):
        yield str(folder), _of_name(str(folder), split)
        return
    if folder.resolve() == Path(folder.anchor or "/"):
        raise ValueError(f"data: expected a folder of data files, got {str(folder)!r}")
    files = sorted(_walk(folder))
    data = [file for file in files if file.suffix.lower() in ENDINGS and file.name not in _ABOUT]
    if not data:
        raise ValueError(
            f"data: the folder {str(folder)!r} holds no data file ({', '.join(ENDINGS)})"
            f"{'; it holds ' + _some(files, folder) if files else ''}"
        )
    wanted = SPLITS.get(split, split)
    splits = {file: _split_of(file.relative_to(folder)) for file in data}
    chosen = [file for file in data if splits[file] == wanted]
    if not chosen:
        raise ValueError(
            f"data: no file of {str(folder)!r} is of the split {split!r}; it has "
            f"{', '.join(sorted(set(splits.values())))}; {WAY_OUT}"
        )
    left = sorted(set(files) - set(chosen))
    if left:
        logger.warning(
            "%s: read %d files of the split %r, and not %s",
            folder, len(chosen), wanted, _some(left, folder, splits),
        )  # fmt: skip
    for file in chosen:
        yield str(file), read_file(file)


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error

    seen = {str(above) for above in folder.resolve().parents}
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder above, or to one that was read
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place) / name for name in files if not name.startswith("."))


def _some(files: list[Path], folder: Path, splits: dict[Path, str] | None = None) -> str:
    shown = [
        repr(str(file.relative_to(folder)))
        + (f" (of {splits[file]})" if splits and file in splits else "")
        for file in files[:NAMES_SHOWN]
    ]
    more = len(files) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _split_of(file: Path) -> str:
    """Return the split that the nearest part of a file's path names; train if none does."""
    if shard := _SHARD.match(file.name):
        return shard[1]
    for part in (file.stem, *reversed(file.parent.parts)):
        for word in re.split(r"[-._ 0-9]+", part.lower()):
            if word in SPLITS:
                return SPLITS[word]
    return "train"


def _has_configs(folder: Path) -> bool:
    """Tell whether a data set's card says which files belong to which config and split."""
    card = folder / "README.md"
    if not card.is_file():
        return False
    header = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.S)
    return header is not None and re.search(r"^configs:", header[1], re.M) is not None


def _of_disk(folder: Path, split: str) -> Iterator[Source]:
    try:
        found: Any = datasets.load_from_disk(str(folder))
    except (DatasetsError, OSError, ValueError, KeyError, TypeError) as error:
        raise OSError(f"data: the data set saved in {folder} is damaged: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        names = sorted(found)
        chosen = [name for name in names if SPLITS.get(name, name) == SPLITS.get(split, split)]
        if split in names:
            chosen = [split]
        if not chosen:
            raise ValueError(
                f"data: {str(folder)!r} has no split {split!r}; it has {', '.join(names)}; "
                f"{WAY_OUT}"
            )
        left = [f"{name!r} ({len(found[name]):,} rows)" for name in names if name not in chosen]
        if left:
            logger.warning("%s: read the split %r, and not %s", folder, *chosen, ", ".join(left))
        found = found[chosen[0]]
    yield str(folder), _numbered(found)


def _of_name(name: str, split: str) -> Iterator[Row]:
    """Return the rows of `datasets.load_dataset` for a folder, or a name with or without config."""
    path, config = name, ""
    if not Path(name).is_dir():
        if not _HUB_NAME.fullmatch(name):
            raise FileNotFoundError(f"data: no file, folder or data set is named {name!r}")
        path, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(path, *([config] if config else []), split=split)
    except (DatasetsError, OSError, ValueError, RuntimeError, ImportError) as error:
        configs = re.search(r"available configs: (\[.*?\])", str(error))
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
    return _numbered(rows)


def _numbered(rows: Any) -> Iterator[Row]:
    rows = rows.with_format(None) if isinstance(rows, datasets.Dataset) else rows
    return (Row(row, value) for row, value in enumerate(rows, start=1))
