"""Parts of splits, as `datasets` names them, of files, folders and saved data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from sftmix.data import sources
from sftmix.data.rows import Row
from sftmix.data.sources import open_sources
from sftmix.data.splits import names_of
from sftmix.recipe.arguments import check_split


def write(path: Path, begin: int, end: int) -> Path:
    path.write_text("".join(json.dumps({"number": i}) + "\n" for i in range(begin, end)))
    return path


def read(name: Path | str, split: str) -> list[int]:
    return [row.value["number"] for _, rows in open_sources(name, split) for row in rows()]


EXPRESSIONS = [
    "train", "train[:3]", "train[7:]", "train[2:5]", "train[-3:]", "train[:-8]", "train[:30%]",
    "train[50%:]", "train[-10%:]", "train[3:3]+train[:1]", "train[:2]+train[-2:]", "train[8:100]",
    "train[5:6] + train[:1]", "train[:10]", "train[4:8]",
]  # fmt: skip


@pytest.mark.parametrize("split", EXPRESSIONS)
def test_a_part_is_what_datasets_gives(tmp_path: Path, split: str) -> None:
    expected = datasets.Dataset.from_list([{"number": i} for i in range(10)])
    instruction = datasets.ReadInstruction.from_spec(split).to_absolute({"train": 10})
    wanted = [i for one in instruction for i in expected["number"][one.from_ : one.to]]
    assert read(write(tmp_path / "one.jsonl", 0, 10), split) == wanted
    folder = tmp_path / "several"
    folder.mkdir()
    for name, begin, end in (("a", 0, 4), ("b", 4, 4), ("c", 4, 8), ("d", 8, 10)):
        write(folder / f"{name}.jsonl", begin, end)
    write(folder / "test.jsonl", 100, 110)
    assert read(folder, split) == wanted
    expected.save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved", split) == wanted


def test_splits_are_added(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", 0, 4)
    write(tmp_path / "test.jsonl", 10, 14)
    assert read(tmp_path, "train[:1]+test[-1:]") == [0, 13]
    assert read(tmp_path, "test+train") == [10, 11, 12, 13, 0, 1, 2, 3]
    with pytest.raises(ValueError, match="is of the split 'dev'; it has test, train"):
        read(tmp_path, "train+dev[:1]")


def test_rows_behind_a_part_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_file(path: Path, **options: Any) -> Any:
        assert path.name == "a.jsonl"
        yield from (Row(i, {"number": i}) for i in (1, 2))
        raise AssertionError

    monkeypatch.setattr(sources, "read_file", read_file)
    write(tmp_path / "a.jsonl", 0, 0)
    write(tmp_path / "b.jsonl", 0, 0)
    assert read(tmp_path, "train[:2]") == [1, 2]


def test_an_empty_part_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "one.jsonl", 0, 3)
    for split in ("train[3:]", "train[2:2]", "train[:0]", "train[:1%]"):
        with pytest.raises(ValueError, match=r"^data: the split 'train\[.*' holds no rows"):
            read(path, split)


@pytest.mark.parametrize(
    "split", ["train[", "train[a:b]", "[:3]", "train[:200%]", "train[1]", "a+"]
)
def test_what_is_no_split_names_the_flag(split: str) -> None:
    with pytest.raises(ValueError, match=r"^data_split: expected a split such as train, train\[:1"):
        check_split("data_split", split, ["absent"])


def test_a_file_has_only_train(tmp_path: Path) -> None:
    path = str(write(tmp_path / "one.jsonl", 0, 3))
    check_split("data_split", "train[:2]+train[-1:]", [path])
    assert names_of("train[:2] + test") == ["train", "test"]
    for name in (path, str(tmp_path / "*.jsonl")):
        for split in ("test", "test[:2]", "train+test"):
            with pytest.raises(
                ValueError, match=r"^data_split: expected a folder or a data set wi"
            ):
                check_split("data_split", split, [name])
