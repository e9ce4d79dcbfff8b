"""Selections of rows: by a column, by length, by a list; and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from sftmix.cli import main
from sftmix.data.examples import BadRowError, Example, content_hash, load_examples
from sftmix.data.selection import columns_of, parse_selection, response_length, select
from sftmix.pairs.partition import read_partition
from sftmix.recipe.arguments import TrainRunArguments
from sftmix.recipe.loading import load_data, load_held_out, load_tokenizer
from tests.sftmix.conftest import write_rows

REAL_DATA = Path(__file__).parents[3] / "../shared/data"
ANSWERS = ["four", "a", "the longest", "six", "12345"]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Five rows with a score each."""
    rows = [
        {"question": f"q{n}", "answer": answer, "score": score, "rank": n}
        for n, (answer, score) in enumerate(zip(ANSWERS, (4.5, 5, 4, 3.0, 4.75), strict=True))
    ]
    return write(tmp_path / "data.jsonl", rows)


def kept(data: Path, *texts: str) -> list[int]:
    """Ids of the rows that are selected."""
    selections = {text: parse_selection(text) for text in texts}
    examples = load_examples([data], numbers=columns_of(selections))
    return [example.id for example in select(examples, selections)]


@pytest.mark.parametrize(
    ("texts", "ids"),
    [
        ([], [0, 1, 2, 3, 4]),
        (["score>=4.5:score"], [0, 1, 4]),
        (["score>4.5:score"], [1, 4]),
        (["score<=4:score"], [2, 3]),
        (["score<4:score"], [3]),
        (["score>-1:rank", "score<2:rank"], [0, 1]),
        (["longest:2"], [2, 4]),
        (["longest:3"], [0, 2, 4]),
        (["longest:5"], [0, 1, 2, 3, 4]),
        (["score>=4.5:score", "longest:2"], [0, 4]),
        (["longest:2", "score>=4.5:score"], [4]),
    ],
)
def test_what_is_kept(data: Path, texts: list[str], ids: list[int]) -> None:
    assert kept(data, *texts) == ids


def test_equal_lengths_go_by_the_smaller_id(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": answer} for answer in ("bb", "aa", "c", "dd")]
    assert kept(write(tmp_path / "data.jsonl", rows), "longest:2") == [0, 1]


def test_lengths_are_of_all_responses() -> None:
    turns = ("user", "long question"), ("assistant", "héé"), ("user", "x"), ("assistant", "yes")
    messages = tuple({"role": role, "content": content} for role, content in turns)
    assert response_length(Example(0, "x:1", "", messages=messages)) == 6
    labels = [5, -100, 6, 7, -100]  # the first is never predicted
    assert response_length(Example(0, "x:1", "", input_ids=labels, labels=labels)) == 2


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".txt"])
def test_keys(data: Path, tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"answer": ANSWERS[n], "question": f"q{n}"} for n in (3, 1)]
    rows.append({"question": "q1", "answer": "another answer"})
    file = tmp_path / f"keys{ending}"
    if ending == ".json":
        file.write_text(json.dumps(rows))
    elif ending == ".jsonl":
        write(file, rows)
    else:
        hashes = [example.content_hash for example in load_examples([data])]
        file.write_text(f"{hashes[3]}\n\n 1 \n99\n")
    assert kept(data, f"keys:{file}") == [1, 3]
    said = capsys.readouterr().out
    assert f"found 2 of 3 keys of {file}\nselected 2 of 5 rows (keys:{file})\n" in said


@pytest.mark.parametrize(
    "text",
    [
        *("score>=4.5", "score>=4.5:", "score>=:score", "score=4:score", "score>=high:score"),
        *("longest", "longest:", "longest:0", "longest:-1", "longest:1.5"),
        *("keys:", "shortest:3", ""),
    ],
)
def test_texts_that_are_no_selection(text: str) -> None:
    with pytest.raises(ValueError, match=f"select: expected .*; got {re.escape(repr(text))}"):
        parse_selection(text)


@pytest.mark.parametrize("score", [None, "5", True, float("nan"), 10**400, "missing"])
def test_rows_without_a_number_are_bad(data: Path, score: Any) -> None:
    row = {"question": "q", "answer": "a", "score": score}
    if score == "missing":
        del row["score"]
    with data.open("a") as file:
        file.write(json.dumps(row) + "\n")
    assert len(load_examples([data])) == 6
    reason = "(must be a number|is missing|is an integer beyond any float)"
    with pytest.raises(BadRowError, match=rf"data\.jsonl:6: 'score' {reason}"):
        load_examples([data], numbers=["score"])
    left = load_examples([data], numbers=["score", "rank"], on_bad_row="skip")
    assert [example.numbers for example in left][1] == {"score": 5.0, "rank": 1.0}


def test_selections_that_do_not_fit_the_data(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="longest:6 of 5 rows"):
        kept(data, "longest:6")
    with pytest.raises(ValueError, match="score>9:score leaves none of 5 rows"):
        kept(data, "score>9:score")
    keys = tmp_path / "keys.txt"
    for text, message in (
        ("77\n", "none of 1 keys is in the data"),
        ("", "none of 0 keys is in the data"),
        ("1\nabc\n", r"keys\.txt:2: expected a row's id or its content hash, got 'abc'"),
    ):
        keys.write_text(text)
        with pytest.raises(ValueError, match=message):
            kept(data, f"keys:{keys}")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        kept(data, "keys:nowhere.txt")
    tokens = write(tmp_path / "tokens.jsonl", [{"input_ids": [1, 2], "labels": [-100, 2]}])
    with pytest.raises(ValueError, match="rows of text or rows of tokens, got both"):
        select(load_examples([data, tokens]), {"longest:1": parse_selection("longest:1")})


def test_the_rows_that_alpagasus_kept() -> None:
    files = [REAL_DATA / f"{name}.json" for name in ("alpaca_9k", "alpaca_claude_t45")]
    if not all(file.is_file() for file in files):
        pytest.skip("needs ../shared/data/alpaca_9k.json and alpaca_claude_t45.json")
    text = f"keys:{files[1]}"
    examples = load_examples([files[0]], on_bad_row="skip")
    assert len(select(examples, {text: parse_selection(text, on_bad_row="skip")})) == 935


def test_splits_are_those_of_the_data_the_keys_and_the_held_out_data(
    toy_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(split: str) -> list[dict[str, str]]:
        return [{"question": f"a question of {split}", "answer": "an answer"}]

    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(rows(split))
    )
    arguments = TrainRunArguments(
        str(toy_model), ["own/data"], "run", "first", ["keys:own/keys"],
        eval_data=["own/held-out"], eval_split="second",
    )  # fmt: skip
    tokenizer = load_tokenizer(arguments)
    held_out, _ = load_held_out(arguments, tokenizer)
    assert held_out is not None
    for found, split in ((load_data(arguments, tokenizer)[0], "first"), (held_out, "second")):
        assert found["content_hash"][:] == [content_hash(row) for row in rows(split)]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, toy_model: Path) -> tuple[Path, Path, Path]:
    """Thirty-one rows, and a run that scored the twelve longest of them."""
    folder = tmp_path_factory.mktemp("selected")
    data = write_rows(folder / "rows.jsonl", 31, seed=3)
    words = ["--model", str(toy_model), "--data", str(data), "--output", str(folder / "score")]
    quiet = ["--num_scorings", "1", "--use_cpu", "true", "--disable_tqdm", "true"]
    assert main(["score", *words, *quiet, "--select", "longest:20", "longest:12"]) == 0
    return toy_model, data, folder / "score"


@pytest.fixture
def train(scored: tuple[Path, Path, Path], tmp_path: Path) -> Callable[..., int]:
    """Runs two steps of `sftmix train` with the partition."""
    model, data, run = scored
    words = ["train", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "run")]
    words += ["--partition", str(run / "confidence.parquet"), "--max_steps", "2"]
    words += ["--save_strategy", "no", "--use_cpu", "true", "--disable_tqdm", "true"]
    return lambda *flags: main([*words, *flags])


def test_selected_rows_are_scored_and_trained_on(
    scored: tuple[Path, Path, Path],
    train: Callable[..., int],
    tmp_path: Path,
    held_out: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    partition = read_partition(scored[2] / "confidence.parquet")
    assert partition.id.tolist() == kept(scored[1], "longest:12") != list(range(12))
    ids = tmp_path / "ids.txt"
    ids.write_text("\n".join(map(str, partition.id)))
    # Another selection of the same rows fits; the nine held-out rows are not selected from.
    assert train("--select", f"keys:{ids}", "--eval_data", str(held_out)) == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["select"], manifest["num_examples"]) == ([f"keys:{ids}"], 12)
    assert f"selected 12 of 31 rows (keys:{ids})" in capsys.readouterr().out
    assert "| select | keys:ids.txt |" in (tmp_path / "run" / "README.md").read_text()
    # What is compared is what the selection keeps, not its words.
    assert train("--select", "longest:12", "--eval_data", str(held_out), "--resume") == 0
    assert "is finished already" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--select", "longest:13"]])
def test_a_partition_of_another_selection_is_refused(
    flags: list[str], train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*flags) == 2
    error = capsys.readouterr().err
    now = "'longest:13'" if flags else "not given"
    assert "the data changed after scoring: example " in error
    assert f"scored with --select 'longest:20' 'longest:12', this run has --select {now}" in error
