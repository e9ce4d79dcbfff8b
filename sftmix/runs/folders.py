"""Write the folders and files of a run such that they survive a crash.

A file is written under a temporary name and renamed into its place, so a reader sees the old file
or the new one, also after a power cut. Temporary names begin with `.tmp-`, which identifies the
leftovers of a killed process. This module needs a POSIX system.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sftmix.runs.failures import Naming

TEMPORARY_PREFIX = ".tmp-"
LOCK_NAME = ".lock"


def open_run(path: str | os.PathLike[str], *, resume: bool, name: str = "path") -> Path:
    """Return the output folder of a run: create a new one, or check the one to resume.

    The lock and the leftovers of a killed process do not count as content. A run that was killed
    before it wrote anything may be resumed: it starts from the beginning. Messages call the folder
    `name`, which is what its user typed for it.

    Raises:
        ValueError: `path` is empty, has a `..` component, is a symbolic link or a file; it holds
            results and `resume` is False; it does not exist and `resume` is True; or something in
            it is a symbolic link that leads out of it.
    """
    if not os.fspath(path):
        raise ValueError(f"{name}: expected the folder of a run, got an empty name")
    folder = Path(path)
    if ".." in folder.parts:
        raise ValueError(
            f"{name}: a run name cannot leave its folder, got {str(folder)!r}; give a path without "
            "'..', such as an absolute one"
        )
    if folder.is_symlink():
        raise ValueError(f"{name}: expected a folder, got the symbolic link {str(folder)!r}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{name}: expected a folder, got the file {str(folder)!r}")
    used = folder.is_dir() and any(map(_is_content, folder.iterdir()))
    if resume and not folder.is_dir():
        raise ValueError(
            f"{name}: there is no run to resume in {str(folder)!r}; leave --resume out to start one"
        )
    if used and not resume:
        raise ValueError(
            f"{name}: {str(folder)!r} already holds a run; pass --resume to continue it "
            "or choose another folder"
        )
    if folder.is_dir():
        _refuse_links_out_of(folder, name)
    with Naming(name):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Write the file `path` with `write`, or leave the old file as it was.

    `write` gets a temporary path in the same folder, with the same ending. Its result is ignored.

    Raises:
        OSError: the file cannot be written or put in its place.
        Exception: whatever `write` raises.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(4)}-{path.name}")
    try:
        write(temporary)
        _finish(temporary)
        os.replace(temporary, path)
    except OSError as error:
        # An error while writing does not say in which file.
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def write_json(path: Path, obj: Any) -> None:
    """Write `obj` as JSON with sorted keys, atomically.

    Raises:
        ValueError: `obj` holds NaN or an infinity, which JSON has no word for.
        TypeError: `obj` holds something else that JSON cannot express.
    """
    text = json.dumps(obj, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    data = text.encode()
    atomic_write(path, lambda temporary: temporary.write_bytes(data))


def sync_folder(folder: Path) -> None:
    """Wait until everything in `folder` is on the disk, with the permissions of new files.

    Raises:
        OSError: the disk refuses.
    """
    for root, _, files in _walk(folder):
        # A link has no data of its own to sync; its name is synced with its folder.
        for name in files:
            if not (root / name).is_symlink():
                _finish(root / name)
        _sync(root)


def publish_folder(staging: Path, final: Path, *, replace: bool = False) -> None:
    """Rename the folder `staging` to `final` once everything in it is on the disk.

    `final` appears complete or not at all. Both must be on one file system. With `replace`, what
    stands at `final` is moved out of the way the moment before, and deleted after.

    Raises:
        ValueError: `staging` is not a folder, or, without `replace`, there is something at `final`
            already.
        OSError: the disk refuses, or the two lie on different file systems.
    """
    if staging.is_symlink() or not staging.is_dir():
        raise ValueError(f"staging: expected a folder, got {str(staging)!r}")
    stands = os.path.lexists(final)
    if stands and not replace:
        raise ValueError(f"final: {str(final)!r} exists already")
    sync_folder(staging)
    old = final.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(4)}-{final.name}")
    if stands:
        os.rename(final, old)
    os.rename(staging, final)
    _sync(final.parent)
    if staging.parent != final.parent:
        _sync(staging.parent)
    if stands:
        shutil.rmtree(old)


@contextlib.contextmanager
def lock_run(path: Path, *, name: str = "path") -> Iterator[None]:
    """Hold the folder `path`, called `name`, to keep other processes from writing the same run.

    The lock is advisory and belongs to this process: the kernel drops it when the process ends,
    however it ends, and a forked child does not inherit it.

    Raises:
        ValueError: the folder is held already.
        OSError: the lock file cannot be opened.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path / LOCK_NAME, flags, 0o666)
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{name}: another process is writing the run {str(path)!r}") from error
        yield
    finally:
        _release(descriptor)


def discard(folders: Sequence[Path]) -> None:
    """Delete the folders of a run in which nothing was written but its lock, the run itself first.

    Call this only while `lock_run` is held.
    """
    for folder in folders:
        with contextlib.suppress(OSError):  # something is in it
            if [entry.name for entry in folder.iterdir()] == [LOCK_NAME]:
                (folder / LOCK_NAME).unlink()
            folder.rmdir()


def remove_leftovers(path: Path) -> list[Path]:
    """Delete the files that killed writers left in the run `path`; return them, sorted.

    These are all files and folders whose names begin with `TEMPORARY_PREFIX`. Call this only while
    `lock_run` is held: another process may be about to rename such a file into its place.

    Raises:
        OSError: something cannot be deleted.
    """
    leftovers: list[Path] = []
    for root, folders, files in _walk(path):
        leftovers += [root / name for name in folders + files if name.startswith(TEMPORARY_PREFIX)]
        folders[:] = [name for name in folders if not name.startswith(TEMPORARY_PREFIX)]
    for leftover in leftovers:
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    return sorted(leftovers)


# A flock lives until its last copy is closed. The data workers of a killed process outlive it by
# seconds; without this they would keep the run locked against the process that resumes it.
_held: set[int] = set()


def _release(descriptor: int) -> None:
    if descriptor in _held:
        _held.remove(descriptor)
        os.close(descriptor)


def _release_in_child() -> None:
    for descriptor in tuple(_held):
        _release(descriptor)


os.register_at_fork(after_in_child=_release_in_child)


def _is_content(entry: Path) -> bool:
    return entry.name != LOCK_NAME and not entry.name.startswith(TEMPORARY_PREFIX)


def _walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Walk as `os.walk`, but raise on a folder that cannot be read instead of leaving it out."""

    def fail(error: OSError) -> None:
        raise error

    for root, folders, files in os.walk(folder, onerror=fail):
        yield Path(root), folders, files


def _refuse_links_out_of(folder: Path, name: str) -> None:
    inside = Path(os.path.realpath(folder))
    for root, folders, files in _walk(folder):
        for entry in (root / file for file in sorted(folders + files)):
            if entry.is_symlink() and not Path(os.path.realpath(entry)).is_relative_to(inside):
                raise ValueError(
                    f"{name}: {str(entry)!r} is a symbolic link that leads out of the run's folder"
                )


def _finish(file: Path) -> None:
    # safetensors lets only the owner read its files, whatever the umask says.
    umask = os.umask(0o077)
    os.umask(umask)
    os.chmod(file, 0o666 & ~umask)
    _sync(file)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(
    path: Path, name: str = "", way_out: str = "start anew with another --output"
) -> dict[str, Any]:
    """Return the content of a manifest, for which messages blame the option `name`.

    Raises:
        ValueError: it is damaged, with its name.
        OSError: it cannot be read.
    """
    damaged = f"{name}: {path} is damaged" if name else f"{path} is damaged"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{damaged}: {error}; {way_out}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{damaged}: expected names and values, got {type(content).__name__}; {way_out}"
        )
    return content
