"""Runs survive kill -9 and never leave their folder."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sftmix.runs.folders import (
    atomic_write,
    lock_run,
    open_run,
    publish_folder,
    remove_leftovers,
    write_json,
)

ROOT = Path(__file__).parents[3]


def start(script: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """Runs `script` in another Python and returns once it has printed a line."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL


# open_run


def test_new_run_is_created_with_its_parents(tmp_path):
    folder = open_run(tmp_path / "a" / "b", resume=False)
    assert folder == tmp_path / "a" / "b"
    assert folder.is_dir()


def test_existing_empty_folder_is_a_new_run(tmp_path):
    assert open_run(str(tmp_path), resume=False) == tmp_path


def test_used_run_needs_resume(tmp_path):
    (tmp_path / "result").touch()
    with pytest.raises(ValueError, match="--resume"):
        open_run(tmp_path, resume=False)
    assert open_run(tmp_path, resume=True) == tmp_path


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(ValueError, match="no run to resume"):
        open_run(tmp_path / "missing", resume=True)
    assert not (tmp_path / "missing").exists()


def test_lock_and_leftovers_are_no_content(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".tmp-1234-state.json").touch()
    open_run(tmp_path, resume=False)
    # Killed before it wrote anything: to resume is to start from the beginning.
    assert open_run(tmp_path, resume=True) == tmp_path


@pytest.mark.parametrize("name", ["../outside", "a/../b", "a/.."])
def test_parent_components_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cannot leave its folder"):
        open_run(name, resume=False)
    assert not list(tmp_path.iterdir())


def test_empty_name_is_refused():
    with pytest.raises(ValueError, match="empty name"):
        open_run("", resume=False)


def test_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="got the file"):
        open_run(tmp_path / "file", resume=True)


@pytest.mark.parametrize("target", [".", "missing"])
def test_run_that_is_a_link_is_refused(tmp_path, target):
    (tmp_path / "link").symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match="symbolic link"):
        open_run(tmp_path / "link", resume=False)


@pytest.mark.parametrize("target", ["/", "../..", "../../neighbour", "/etc/hostname"])
def test_link_out_of_the_run_is_refused(tmp_path, target):
    inner = tmp_path / "run" / "checkpoint"
    inner.mkdir(parents=True)
    (inner / "link").symlink_to(target)
    with pytest.raises(ValueError, match=r"checkpoint/link.*leads out"):
        open_run(tmp_path / "run", resume=True)


def test_link_chain_out_of_the_run_is_refused(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "outside").mkdir()
    (run / ".tmp-x").symlink_to(tmp_path / "outside")
    (run / "chain").symlink_to(run / ".tmp-x" / "file")
    with pytest.raises(ValueError, match="leads out"):
        open_run(run, resume=True)


def test_link_inside_the_run_is_allowed(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "last").symlink_to("checkpoint-1")
    (tmp_path / "loop").symlink_to("loop")
    assert open_run(tmp_path, resume=True) == tmp_path


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_folder_is_an_error(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(PermissionError):
        open_run(tmp_path, resume=True)


# atomic_write, write_json


def test_atomic_write_replaces_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "state.npy"
    path.write_text("old")
    seen = []

    def write(temporary: Path) -> None:
        seen.append(temporary)
        temporary.write_text("new")
        assert path.read_text() == "old"

    atomic_write(path, write)
    assert path.read_text() == "new"
    assert seen[0].parent == tmp_path
    assert seen[0].suffix == ".npy"
    assert list(tmp_path.iterdir()) == [path]


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "state"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        atomic_write(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "state", lambda temporary: None)


def test_atomic_write_replaces_a_link_and_not_its_target(tmp_path):
    (tmp_path / "target").write_text("target")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    atomic_write(link, lambda temporary: temporary.write_text("new"))
    assert not link.is_symlink()
    assert (tmp_path / "target").read_text() == "target"


def test_kill_during_atomic_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "state"
    path.write_text("old")
    script = """
        import sys, time
        from pathlib import Path
        from sftmix.runs.folders import atomic_write

        def write(temporary):
            temporary.write_text("half")
            print("ready", flush=True)
            time.sleep(1800)

        atomic_write(Path(sys.argv[1]), write)
    """
    kill(start(script, path))
    assert path.read_text() == "old"
    with lock_run(tmp_path):
        (leftover,) = remove_leftovers(tmp_path)
    assert leftover.name.endswith("-state")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "state"]


def test_write_json_is_stable(tmp_path):
    write_json(tmp_path / "a", {"b": 1, "a": ["é", None]})
    write_json(tmp_path / "b", {"a": ["é", None], "b": 1})
    text = (tmp_path / "a").read_text(encoding="utf-8")
    assert text == (tmp_path / "b").read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert json.loads(text) == {"b": 1, "a": ["é", None]}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_write_json_refuses_what_json_has_no_word_for(tmp_path, value):
    (tmp_path / "a").write_text("old")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a", {"loss": value})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a", {"loss": object()})
    assert (tmp_path / "a").read_text() == "old"


# publish_folder, remove_leftovers


def test_published_folder_is_complete(tmp_path):
    staging = tmp_path / ".tmp-checkpoint-1"
    (staging / "inner").mkdir(parents=True)
    (staging / "inner" / "weights").write_text("w")
    (staging / "link").symlink_to("missing")
    publish_folder(staging, tmp_path / "checkpoint-1")
    assert (tmp_path / "checkpoint-1" / "inner" / "weights").read_text() == "w"
    assert not staging.exists()


def test_published_folder_may_come_from_another_parent(tmp_path):
    (tmp_path / "a" / "staging").mkdir(parents=True)
    publish_folder(tmp_path / "a" / "staging", tmp_path / "final")
    assert (tmp_path / "final").is_dir()


@pytest.mark.parametrize("final", ["folder", "file", "link"])
def test_publish_refuses_to_replace(tmp_path, final):
    (tmp_path / "staging").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("missing")
    with pytest.raises(ValueError, match="exists already"):
        publish_folder(tmp_path / "staging", tmp_path / final)
    assert (tmp_path / "staging").is_dir()


@pytest.mark.parametrize("staging", ["missing", "file", "link"])
def test_publish_needs_a_folder(tmp_path, staging):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(".")
    with pytest.raises(ValueError, match="expected a folder"):
        publish_folder(tmp_path / staging, tmp_path / "final")


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    (tmp_path / ".tmp-checkpoint-2" / ".tmp-inner").mkdir(parents=True)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / ".tmp-1-state").touch()
    (tmp_path / "checkpoint-1" / "state").touch()
    (tmp_path / "kept").mkdir()
    (tmp_path / ".tmp-link").symlink_to("kept")
    removed = remove_leftovers(tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in removed] == [
        ".tmp-checkpoint-2",
        ".tmp-link",
        "checkpoint-1/.tmp-1-state",
    ]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["checkpoint-1", "kept", "state"]


# lock_run

HOLD = """
    import os, sys, time
    from pathlib import Path
    from sftmix.runs.folders import lock_run

    with lock_run(Path(sys.argv[1])):
        if len(sys.argv) > 2 and os.fork() == 0:  # a data worker, which outlives its parent
            Path(sys.argv[2]).write_text(str(os.getpid()))
            print("ready", flush=True)
            time.sleep(1800)
            os._exit(0)
        if len(sys.argv) == 2:
            print("ready", flush=True)
        time.sleep(1800)
"""


def test_lock_excludes_a_second_writer_until_it_is_released(tmp_path):
    with lock_run(tmp_path), pytest.raises(ValueError, match=str(tmp_path)), lock_run(tmp_path):
        pass
    with lock_run(tmp_path):
        pass


def test_lock_is_released_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), lock_run(tmp_path):
        raise RuntimeError
    with lock_run(tmp_path):
        pass


def test_lock_file_that_is_a_link_is_refused(tmp_path):
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"), lock_run(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_lock_is_released_by_kill(tmp_path):
    process = start(HOLD, tmp_path)
    with pytest.raises(ValueError, match="another process"), lock_run(tmp_path):
        pass
    kill(process)
    with lock_run(tmp_path):
        pass


def test_forked_worker_does_not_keep_the_lock_of_a_killed_process(tmp_path):
    process = start(HOLD, tmp_path, tmp_path / "worker")
    worker = int((tmp_path / "worker").read_text())
    with pytest.raises(ValueError, match="another process"), lock_run(tmp_path):
        pass
    process.kill()
    process.wait()
    try:
        with lock_run(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        process.stdout.close()
