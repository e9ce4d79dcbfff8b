"""Where rows come from: folders, saved data sets, names with configs, and what is no data."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftmix.cli import main
from sftmix.data.examples import load_examples
from sftmix.data.files import EXPECTED
from sftmix.data.hub import is_reached
from sftmix.data.selection import Keys


def rows(answer: str, number: int = 2) -> list[dict[str, str]]:
    return [{"question": f"q{i}", "answer": answer} for i in range(number)]


def write(path: Path, number: int = 2) -> Path:
    """A file of rows whose answer is the file's stem."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = rows(path.stem, number)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(content), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(content))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def answers(data: Path | str, split: str = "train") -> list[str]:
    """The answers that are read, one for each run of the same."""
    found = [(one.messages or ())[-1]["content"] for one in load_examples([data], split=split)]
    assert all(found.count(one) == 2 for one in found)
    return list(dict.fromkeys(found))


FOLDERS = [
    (["train.jsonl", "extra.jsonl"], "train", ["extra", "train"], []),
    (["part1.jsonl", "part2.jsonl", "test.jsonl"], "train", ["part1", "part2"], ["test.jsonl"]),
    (["p.jsonl", "q.jsonl", "test.jsonl"], "test", ["test"], ["p.jsonl", "q.jsonl"]),
    (["a.jsonl", "b.json", "c.parquet", "notes.txt"], "train", ["a", "b", "c"], ["notes.txt"]),
    (["my-dev.jsonl", "val_2.jsonl", "x.jsonl"], "validation", ["my-dev", "val_2"], ["x.jsonl"]),
    (["my-dev.jsonl", "x.jsonl"], "dev", ["my-dev"], ["x.jsonl"]),
    (["train/a.jsonl", "test/b.jsonl"], "train", ["a"], ["test/b.jsonl"]),
    (["train/a.jsonl", "test/b.jsonl"], "test", ["b"], ["train/a.jsonl"]),
    (["contest.jsonl", "restraint.jsonl"], "train", ["contest", "restraint"], []),
    (
        ["data/train_sft-00000-of-00001.parquet", "data/train_gen-00000-of-00001.parquet"],
        "train_sft",
        ["train_sft-00000-of-00001"],
        ["data/train_gen-00000-of-00001.parquet"],
    ),
    ([".hidden.jsonl", "a.jsonl", ".git/b.jsonl"], "train", ["a"], []),
]  # fmt: skip


@pytest.mark.parametrize(("files", "split", "read", "left"), FOLDERS)
def test_all_files_of_a_folder_are_read_or_named(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    files: list[str],
    split: str,
    read: list[str],
    left: list[str],
) -> None:
    for file in files:
        write(tmp_path / file)
    assert answers(tmp_path, split) == read
    assert len(caplog.records) == bool(left)
    assert re.findall(r"'(\S+\.\w+)'", caplog.text) == left


def test_empty_files_of_a_folder_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    empty = [write(tmp_path / name, 0) for name in ("a.jsonl", "c.parquet")]
    with pytest.raises(ValueError, match=rf"^{empty[0]}, {empty[1]}: holds no rows$"):
        load_examples([tmp_path])
    write(tmp_path / "b.jsonl")
    assert answers(tmp_path) == ["b"]
    assert caplog.messages == [f"no rows in {empty[0]}, {empty[1]}"]


def test_links_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere/a.jsonl")
    write(tmp_path / "data/b.jsonl")
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/above").symlink_to(tmp_path)
    (tmp_path / "data/c.jsonl").symlink_to(write(tmp_path / "one/c.jsonl"))
    assert answers(tmp_path / "data") == ["b", "c", "a"]


def test_ids_and_places_run_over_a_folder(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json"):
        write(tmp_path / name)
    examples = load_examples([tmp_path])
    assert [one.id for one in examples] == [0, 1, 2, 3]
    assert examples[2].source == f"{tmp_path}/b.jsonl:1"
    assert list(examples.reading.rows.items()) == [
        (f"{tmp_path}/a.json", 2), (f"{tmp_path}/b.jsonl", 2)
    ]  # fmt: skip


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_saved_data_set(tmp_path: Path, caplog: pytest.LogCaptureFixture, split: str) -> None:
    alone = datasets.Dataset.from_list(rows("alone"), split=split)
    alone.save_to_disk(str(tmp_path / "alone"))
    assert answers(tmp_path / "alone", split) == ["alone"]
    assert answers(tmp_path / "alone", f"{split}[:2]") == ["alone"]
    assert not caplog.records
    for wrong in ({"train": "test", "test": "train"}[split], "nonsense"):
        with pytest.raises(ValueError, match=rf"has no split '{wrong}'; it has {split}; choose"):
            load_examples([tmp_path / "alone"], split=wrong)
    datasets.Dataset.from_list(rows("unnamed")).save_to_disk(str(tmp_path / "unnamed"))
    assert answers(tmp_path / "unnamed") == ["unnamed"]
    with pytest.raises(ValueError, match=r"has no split 'test'; it has train; choose one with"):
        load_examples([tmp_path / "unnamed"], split="test")
    several = {name: datasets.Dataset.from_list(rows(name)) for name in ("train", "test")}
    datasets.DatasetDict(several).save_to_disk(str(tmp_path / "several"))
    assert answers(tmp_path / "several", split) == [split]
    other = "test" if split == "train" else "train"
    assert f"read the split '{split}', and not '{other}' (2 rows)" in caplog.text
    with pytest.raises(
        ValueError, match=r"has no split 'dev'; it has test, train; choose one with"
    ):
        load_examples([tmp_path / "several"], split="dev")
    (tmp_path / "alone" / "state.json").write_text("{}")
    with pytest.raises(OSError, match=r"data: the data set saved in .*alone is damaged"):
        load_examples([tmp_path / "alone"])


CONFIGS = "Config name is missing.\nPlease pick one among the available configs: ['main', 'other']"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sftmix.data.hub.is_reached", lambda path, revision: True)


@pytest.mark.usefixtures("hub")
def test_a_name_with_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(
        name: str, config: str | None = None, *, split: str, **options: Any
    ) -> datasets.Dataset:
        if config is None:
            raise ValueError(CONFIGS)
        told = " ".join(map(str, options.values()))
        found = datasets.Dataset.from_list(rows(f"{name} {config} {split} {told}".strip()))
        return found.to_iterable_dataset() if "streaming" in options else found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert answers("someone/sums:main", "test") == ["someone/sums main test"]
    assert answers("someone/sums:main@v1.0", "test[:2]") == ["someone/sums main test[:2] v1.0"]
    [streamed] = load_examples(["someone/sums:main"], split="test[:1]", streaming=True)
    assert (streamed.messages or ())[-1]["content"] == "someone/sums main test True"
    with pytest.raises(ValueError, match=re.escape("data: someone/sums has the configs ['main'")):
        load_examples(["someone/sums"])


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionError("no route"), FileNotFoundError),
        (datasets.exceptions.DatasetNotFoundError("no such"), FileNotFoundError),
        (datasets.exceptions.DatasetGenerationError("broken"), ValueError),
        (ValueError("Unknown split"), ValueError),
    ],
)
@pytest.mark.usefixtures("hub")
def test_a_data_set_that_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception]
) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(kind, match=r"no file or folder 'someone/sums'.* split 'train' can be had"):
        load_examples(["someone/sums"])


def test_an_unreachable_hub_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # No server listens on port 1 of this machine.
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("sftmix.data.hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    begin = time.monotonic()
    with pytest.raises(
        FileNotFoundError, match=r"no file or folder 'someone/mySums:main'.* not reached"
    ):
        load_examples(["someone/mySums:main"])
    assert not is_reached("someone/sums")
    assert is_reached("no..name")
    assert time.monotonic() - begin < 5
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: datasets.Dataset.from_list(rows("kept"))
    )
    (tmp_path / "someone___my_sums").mkdir()
    assert answers("someone/mySums") == ["kept"]
    assert "the hub is not reached: someone/mySums is read from the cache" in caplog.text


def test_a_pattern_reads_all_files_that_it_matches(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.parquet", "test.jsonl", "deep/c.jsonl"):
        write(tmp_path / name)
    assert answers(str(tmp_path / "*.*")) == ["a", "b", "test"]
    assert answers(str(tmp_path / "**/*.jsonl")) == ["b", "c", "test"]
    write(tmp_path / "[x].jsonl")
    assert answers(str(tmp_path / "[x].jsonl")) == ["[x]"]


def test_a_folder_whose_card_has_configs_is_read_as_it_says(tmp_path: Path) -> None:
    write(tmp_path / "one/rows.jsonl")
    write(tmp_path / "two/rows.jsonl")
    card = "---\nconfigs:\n- config_name: default\n  data_files: one/rows.jsonl\n---\n# Sums\n"
    (tmp_path / "README.md").write_text(card)
    assert len(load_examples([tmp_path])) == 2
    (tmp_path / "README.md").write_text("# Sums\n")
    assert len(load_examples([tmp_path])) == 4


CARD = """---
configs:
- config_name: CONFIG
  data_files:
  - split: train
    path: one.jsonl
  - split: test
    path: two.jsonl
- config_name: second
  data_files: three.jsonl
---
"""


def test_the_configs_and_splits_of_a_folder_are_read_or_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("one", "two", "three"):
        write(tmp_path / f"{name}.jsonl")
    (tmp_path / "README.md").write_text(CARD.replace("CONFIG", "default"))
    assert answers(tmp_path) == ["one"]
    read = f"{tmp_path}: read 'train' of the config 'default', and not the "
    assert caplog.messages == [f"{read}config 'second', the split 'test'"]
    assert answers(tmp_path, "test[:2]") == ["two"]
    caplog.clear()
    assert answers(f"{tmp_path}:second") == ["three"]
    assert not caplog.messages
    with pytest.raises(ValueError, match=r"has no split 'dev'; it has test, train; choose one"):
        load_examples([tmp_path], split="dev")
    (tmp_path / "README.md").write_text(CARD.replace("CONFIG", "first"))
    has = re.escape(f"data: {tmp_path} has the configs ['first', 'second']; name one: {tmp_path}:C")
    for name in (tmp_path, f"{tmp_path}:third"):
        with pytest.raises(ValueError, match=has):
            load_examples([name])
    assert answers(f"{tmp_path}:first", "train+test") == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "--data: expected a file, a folder or a data set's name, got ''"),
        ("/", "--data: expected a folder of data files, got '/'"),
        (".", f"--data: the folder '.' holds no data file ({EXPECTED})"),
        ("empty", f"--data: the folder 'empty' holds no data file ({EXPECTED})"),
        ("notes", f"holds no data file ({EXPECTED}); it holds 'notes.txt'"),
        ("/dev/null", "--data: expected a file or a folder, /dev/null is neither but a device"),
        ("pipe", "--data: expected a file or a folder, pipe is neither but a pipe (FIFO)"),
        ("socket", "--data: expected a file or a folder, socket is neither but a socket"),
        ("link.jsonl", "--data: link.jsonl: a link to gone.jsonl, which does not exist"),
        ("link", "--data: link: a link to gone, which does not exist"),
        ("none/*.jsonl", "--data: no file matches 'none/*.jsonl'"),
        ("typo.csv.gz", "--data: no such data file: typo.csv.gz"),
        (
            "someone/sums",
            "--data: no file or folder 'someone/sums', and no data set of this name is in the",
        ),
        ("notes/notes.txt", "notes.txt: a data file must end in"),
        ("./typo", "--data: no file, folder or data set is named './typo'"),
        ("a b", "--data: no file, folder or data set is named 'a b'"),
        ("typo.jsonl", "--data: no such data file: typo.jsonl"),
        ("tests", "--data: no file of 'tests' is of the split 'train'; it has test, validation;"),
    ],
)
def test_what_is_no_data_is_one_message(
    tmp_path: Path,
    toy_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    message: str,
) -> None:
    if name == ".":
        (tmp_path / "here").mkdir()
    write(tmp_path / "tests/test.jsonl")
    write(tmp_path / "tests/dev.jsonl")
    os.mkfifo(tmp_path / "pipe")
    for link in ("link", "link.jsonl"):
        (tmp_path / link).symlink_to(link.replace("link", "gone"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/notes.txt").write_text("x")
    monkeypatch.chdir(tmp_path / "here" if name == "." else tmp_path)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
    monkeypatch.setattr("sftmix.data.hub.is_reached", lambda path, revision: False)
    words = ["score", "--model", str(toy_model), "--data", name, "--output", "run"]
    assert main([*words, "--use_cpu", "true"]) == 2
    error = capsys.readouterr().err
    assert f"sftmix score: error: {message}" in error or (message[0] != "-" and message in error)
    assert error.count("\n") == 1


def test_eval_data_is_named_by_its_own_flag(
    tmp_path: Path, toy_model: Path, toy_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--model", str(toy_model), "--data", "./typo", "--method", "ntp"]
    words += ["--output", str(tmp_path / "run"), "--use_cpu", "true", "--eval_data"]
    assert main([*words, str(tmp_path)]) == 2
    message = f"train: error: --eval_data: the folder '{tmp_path}' holds no data file"
    assert message in capsys.readouterr().err
    assert main([*words, str(toy_data)]) == 2
    assert (
        f"Summary of --eval_data\n  read        31 rows: '{toy_data}' 31\n"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json"])
def test_keys_with_a_byte_order_mark(tmp_path: Path, ending: str) -> None:
    examples = load_examples([write(tmp_path / "data.jsonl")])
    file = tmp_path / f"keys{ending}"
    text = "1\n" if ending == ".txt" else json.dumps(rows("data")[1])
    file.write_bytes(b"\xef\xbb\xbf" + (f"[{text}]" if ending == ".json" else text).encode())
    assert [one.id for one in Keys(str(file))(examples)] == [1]


def test_keys_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_bytes(b"\xff\xfe1\x00")
    with pytest.raises(ValueError, match=r"^select: .*keys\.txt: not valid UTF-8"):
        Keys(str(tmp_path / "keys.txt"))([])
    with pytest.raises(FileNotFoundError, match=r"^select: .*absent\.txt"):
        Keys(str(tmp_path / "absent.txt"))([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"^select: the folder .* holds no data file"):
        Keys(str(tmp_path / "empty"))([])
