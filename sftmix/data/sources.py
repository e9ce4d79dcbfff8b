"""Find where rows come from: a file, a folder of files, a saved data set, or one of the hub.

FILE                 as `files.py` reads it
PATTERN              all files that a pattern matches, 'shards/*.parquet', in order of their names
FOLDER               all data files in it and in its folders, in order of their names, without
                     hidden ones. A word in the name of the file or of its folder tells the split
                     (train, training; validation, valid, val, dev; test, testing, eval,
                     evaluation), as does the word before -00000-of-00001; other files belong to
                     train. `split` chooses, and one line names the files that are not read
FOLDER               of `datasets`' save_to_disk; `split` chooses among several
NAME, NAME:CONFIG    what `datasets.load_dataset(NAME, CONFIG, split=split)` gives, at a REVISION if
NAME@REVISION        it is named
FOLDER,              a folder whose README.md has `configs:` is read so, too; one line names the
FOLDER:CONFIG        configs and splits that are not read

`split` is a name, or an expression such as train[:1000] (`splits.py`).
"""

from __future__ import annotations

import functools
import glob
import itertools
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from sftmix.data.files import ENDINGS, EXPECTED, ending_of, read_file, special
from sftmix.data.hub import WAY_OUT, check_folder, folder_of, no_split, numbered, read_name
from sftmix.data.rows import Row
from sftmix.data.splits import Source, is_expression, sliced

logger = logging.getLogger(__name__)

# As `datasets` names the splits of files (data_files.py there).
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
NAMES_SHOWN = 10
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")
# These JSON files are of `datasets` itself.
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def open_sources(
    name: str | Path,
    split: str,
    *,
    encoding: str = "utf-8",
    numbers: Collection[str] = (),
    streaming: bool = False,
) -> Iterator[Source]:
    """Yield the files behind a name, one after another, each with what reads its rows.

    The rows of one are read before the next is asked for, again if need be. `encoding` and
    `numbers` are those of `read_file`. With `streaming`, data sets of the hub are read as they
    arrive, without a copy on disk.

    Raises:
        FileNotFoundError: there is no such file, folder or data set.
        ValueError: the name is empty or a device, a folder holds no data file or none of the split,
            a data set has several configs and none is named, or as `read_file`.
        OSError: a data set cannot be had, or is damaged.
    """
    read = functools.partial(read_file, encoding=encoding, numbers=numbers)

    def places(part: str) -> list[Source]:
        return list(_places(str(name), part, read, streaming))

    # `load_dataset` reads expressions itself, except from a stream.
    if not is_expression(split) or (_is_loaded(Path(name)) and not streaming):
        yield from places(split)
    else:
        yield from sliced(places, split)


def read_rows(name: str | Path, split: str) -> Iterator[Row]:
    """Return the rows of all files behind a name, as `open_sources` finds them."""
    return itertools.chain.from_iterable(rows() for _, rows in open_sources(name, split))


def is_file(name: str) -> bool:
    """Tell whether a name is that of a file, or a pattern of files: these have one split."""
    return Path(name).is_file() or (glob.has_magic(name) and not Path(name).exists())


def _places(
    name: str, split: str, read: Callable[[Path], Iterator[Row]], streaming: bool
) -> Iterator[Source]:
    path = Path(name)
    if not name.strip():
        raise ValueError("data: expected a file, a folder or a data set's name, got ''")
    if path.is_dir():
        yield from _of_folder(path, split, read)
    elif path.is_file() or path.is_symlink():
        yield name, functools.partial(read, path)
    elif path.exists():
        what = special(path.stat().st_mode)
        raise ValueError(f"data: expected a file or a folder, {name} is neither but {what}")
    elif glob.has_magic(name):
        files = [
            file for file in sorted(glob.glob(name, recursive=True)) if not Path(file).is_dir()
        ]
        if not files:
            raise FileNotFoundError(f"data: no file matches {name!r}")
        yield from ((file, functools.partial(read, Path(file))) for file in files)
    elif ending_of(path) in ENDINGS:
        raise FileNotFoundError(f"data: no such data file: {name}")
    else:
        if folder_of(name)[0]:
            check_folder(name, split)
        yield name, functools.partial(read_name, name, split, streaming=streaming)


def _is_loaded(path: Path) -> bool:
    """Tell whether `datasets.load_dataset` reads a name."""
    return _has_configs(path) if path.is_dir() else not (path.exists() or is_file(str(path)))


def _of_folder(folder: Path, split: str, read: Callable[[Path], Iterator[Row]]) -> Iterator[Source]:
    if (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("dataset_info.json", "state.json")
    ):
        yield str(folder), functools.partial(numbered, _saved(folder, split))
        return
    if _has_configs(folder):
        check_folder(str(folder), split)
        yield str(folder), functools.partial(read_name, str(folder), split)
        return
    if folder.resolve() == Path(folder.anchor or "/"):
        raise ValueError(f"data: expected a folder of data files, got {str(folder)!r}")
    files = sorted(_walk(folder))
    data = [file for file in files if ending_of(file) in ENDINGS and file.name not in _ABOUT]
    if not data:
        raise ValueError(
            f"data: the folder {str(folder)!r} holds no data file ({EXPECTED})"
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
    yield from ((str(file), functools.partial(read, file)) for file in chosen)


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


def _saved(folder: Path, split: str) -> Any:
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
            raise no_split(folder, split, names)
        left = [f"{name!r} ({len(found[name]):,} rows)" for name in names if name not in chosen]
        if left:
            logger.warning("%s: read the split %r, and not %s", folder, *chosen, ", ".join(left))
        return found[chosen[0]]
    # One that was made in memory has a split without a name, which is train, as that of a file.
    own = [part.partition("[")[0] for part in str(found.split or "train").split("+")]
    if SPLITS.get(split, split) not in (SPLITS.get(name, name) for name in own):
        raise no_split(folder, split, own)
    return found
