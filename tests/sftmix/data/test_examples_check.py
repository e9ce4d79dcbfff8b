"""Rows that the model cannot read or learn from are refused before its first forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sftmix.cli import main
from sftmix.data.examples_check import check_examples, model_limits, num_positions
from tests.sftmix import tiny
from tools.families import build

GOOD, EMPTY = tiny.named([5, 6, 7], [-100, 6, 7]), tiny.named([], [])


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny.build("Llama")


def arrow(rows: list[dict[str, Any]]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows)


def mapped(rows: list[dict[str, Any]]) -> datasets.Dataset:
    """Rows behind a mapping, in another order than Arrow has them."""
    return datasets.Dataset.from_list(rows[::-1]).select(range(len(rows) - 1, -1, -1))


def transformed(rows: list[dict[str, Any]]) -> datasets.Dataset:
    """Rows that exist only when they are looked up."""
    numbers = datasets.Dataset.from_dict({"row": list(range(len(rows)))})
    numbers.set_transform(
        lambda batch: {key: [rows[i][key] for i in batch["row"]] for key in rows[0]}
    )
    return numbers


def test_positions_beyond_those_a_model_was_made_for(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotary positions are computed, so that a longer example is no error."""
    monkeypatch.setattr(model.config, "max_position_embeddings", 3)
    check_examples(model, train_dataset=[GOOD])
    assert not caplog.messages
    check_examples(model, train_dataset=[GOOD, tiny.named([5] * 4, [5] * 4)])
    assert [one.partition(";")[0] for one in caplog.messages] == [
        "train_dataset: the longest example has 4 tokens, and the model was made for 3 "
        "(max_position_embeddings)"
    ]


class Torch(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows as tensors."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {key: torch.tensor(value) for key, value in self.rows[row].items()}


KINDS = [list, arrow, mapped, transformed, Torch]
BAD = [
    (tiny.named([5, 64, 7], [-100, 6, 7]), r"input_ids\[1\] to be 0 to 63, the model's embed"),
    (tiny.named([5, -1, 7], [-100, 6, 7]), r"input_ids\[1\] to be 0 to 63, .* got -1"),
    (tiny.named([5, 6, 7], [-100, 6, 64]), r"labels\[2\] to be 0 to 63, .*or -100, got 64; is"),
    (tiny.named([5, 6, 7], [-1, 6, 7]), r"labels\[0\] to be 0 to 63, .* got -1"),
    (tiny.named([5, 6, 7], [6, 7]), "a label for each of 3 input_ids, got 2"),
    (tiny.named([5, 6, 7], [5, -100, -100]), r"other than -100 after the first token, got none"),
    (tiny.named([5], [5]), "got none in 1 tokens"),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_row_is_named_with_position_and_value(
    model: PreTrainedModel, kind: Any, row: dict[str, Any], reason: str
) -> None:
    check_examples(model, train_dataset=kind([GOOD] * 5))
    with pytest.raises(ValueError, match=rf"^train_dataset: row 3: expected .*{reason}"):
        check_examples(model, train_dataset=kind([GOOD, GOOD, GOOD, row, GOOD]))


def test_rows_are_counted_over_blocks(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftmix.data.examples_check.SCAN_ROWS", 2)
    rows = [GOOD, tiny.named([1, 2], [1, 2]), GOOD, tiny.named([1, 2, 99], [1, 2, 3])]
    for kind in KINDS:
        with pytest.raises(ValueError, match=r"row 3: expected input_ids\[2\] .* got 99"):
            check_examples(model, train_dataset=kind(rows))


@pytest.mark.parametrize(("named", "missing"), [((2, 3), 0), ((0, 1), 2), ((1, 3), 0)])
def test_ids_of_some_rows_are_refused_over_blocks(
    model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    named: tuple[int, ...],
    missing: int,
) -> None:
    monkeypatch.setattr("sftmix.data.examples_check.SCAN_ROWS", 2)
    rows: Any = [{**GOOD, "id": row} if row in named else {**GOOD} for row in range(4)]
    with pytest.raises(ValueError, match=rf"row {missing}: expected id, .*, got None"):
        check_examples(model, train_dataset=rows)
    check_examples(model, train_dataset=[{**GOOD, "id": row} for row in range(4)])


def test_empty_lists_are_rows_without_a_target(model: PreTrainedModel) -> None:
    for rows in ([GOOD, EMPTY], [EMPTY, GOOD]):
        with pytest.raises(ValueError, match=rf"row {rows.index(EMPTY)}: .*in 0 tokens"):
            check_examples(model, train_dataset=rows)


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        ([], ValueError, "train_dataset: expected at least one row, got none"),
        (arrow([GOOD]).select([]), ValueError, "expected at least one row, got none"),
        (arrow([GOOD]).to_iterable_dataset(), TypeError, "counted and looked up, got Iterab"),
        (iter([GOOD]), TypeError, "got list_iterator"),
        (arrow([{"input_ids": [1, 2]}]), ValueError, r"got \['input_ids'\] without labels"),
        ([{"text": "a"}], ValueError, r"row 0: .*\['text'\] without input_ids and labels"),
        (arrow([{"input_ids": "ab", "labels": "ab"}]), ValueError, "expected lists of int"),
        (arrow([GOOD, {"input_ids": None, "labels": None}]), ValueError, "s, got null in 1 rows"),
        ([tiny.named([1.5, 2], [1, 2])], ValueError, r"row 0: expected input_ids as"),  # type: ignore[list-item]
        ([{"input_ids": [[1, 2]], "labels": [1, 2]}], ValueError, "input_ids as one list"),
        ({"a": [GOOD], "b": []}, TypeError, "train_dataset: expected one data set, got dict"),
    ],
)  # fmt: skip
def test_what_is_no_data_set(
    model: PreTrainedModel, data: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        check_examples(model, train_dataset=data)


def test_the_trainer_refuses_at_construction(model: PreTrainedModel, tmp_path: Path) -> None:
    bad = [GOOD] * 7 + [tiny.named([5, 6, 7], [-100, 6, 64])]
    good = arrow([GOOD] * 8)
    for data in (bad, arrow(bad)):
        with pytest.raises(ValueError, match=r"train_dataset: row 7: expected labels\[2\]"):
            tiny.trainer(model, tmp_path, data, method="ntp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"eval_dataset\['one'\]: row 7: expected labels\[2\]"):
        tiny.trainer(model, tmp_path, good, method="ntp", eval_dataset={"one": arrow(bad)})
    stream = good.to_iterable_dataset()
    with pytest.raises(TypeError, match=r"train_dataset: expected a datasets\.Dataset or"):
        tiny.trainer(model, tmp_path, stream, method="ntp")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"eval_dataset: expected a datasets\.Dataset or"):
        tiny.trainer(model, tmp_path, good, method="ntp", eval_dataset=stream)
    trainer = tiny.trainer(model, tmp_path, good, method="ntp", eval_dataset=good)
    with pytest.raises(ValueError, match=r"eval_dataset: row 7: expected labels\[2\]"):
        trainer.evaluate(arrow(bad))
    with pytest.raises(ValueError, match=r"eval_dataset: row 7: expected labels\[2\]"):
        trainer.evaluate({"one": good, "two": arrow(bad)})


# Learned, sinusoidal in a table, rotary in a table, with an offset, after padding; and none.
@pytest.mark.parametrize(
    ("family", "positions"),
    [
        ("gpt2", 64),
        ("opt", 64),
        ("openai-gpt", 64),
        ("ctrl", 64),
        ("codegen", 64),
        ("marian", 64),
        ("roberta", 63),
        ("llama", None),
        ("bloom", None),
    ],
)
def test_positions_end_where_the_model_s_table_does(family: str, positions: int | None) -> None:
    model = build(family)
    assert num_positions(model) == positions
    for length in (positions or 64, (positions or 64) + 1):
        rows = [tiny.named([5] * length, [5] * length)]
        ids = torch.full((1, length), 5)
        if positions is None or length <= positions:
            check_examples(model, train_dataset=rows)
            model(input_ids=ids)
        else:
            with pytest.raises(
                ValueError, match=f"row 0: expected at most {positions} tokens, the"
            ):
                check_examples(model, train_dataset=rows)
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=ids)


def test_limits_of_a_model_with_more_rows_than_its_head() -> None:
    model = tiny.build("Llama", tie_word_embeddings=False)
    model.set_output_embeddings(torch.nn.Linear(16, 60, bias=False))
    assert model_limits(model) == (64, 60, None)
    check_examples(model, eval_dataset=[tiny.named([5, 63], [5, 59])])
    with pytest.raises(
        ValueError, match=r"eval_dataset: row 0: expected labels\[1\] to be 0 to 59"
    ):
        check_examples(model, eval_dataset=[tiny.named([5, 63], [5, 60])])


def command(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    words = ["--model", str(model), "--data", str(data), "--output", str(output)]
    return [*words, "--use_cpu", "true", "--disable_tqdm", "true", *more]


@pytest.mark.parametrize("name", ["score", "train"])
def test_a_tokenizer_larger_than_the_embeddings_is_refused_first(
    name: str,
    toy_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    AutoModelForCausalLM.from_pretrained(toy_model).save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    size = len(tokenizer)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path / "model")
    more = ["--method", "ntp"] if name == "train" else []
    words = command(tmp_path / "model", tmp_path / "absent.jsonl", tmp_path / "run", *more)
    assert main([name, *words]) == 2
    message = f"--model: expected a tokenizer with ids below {size}, the rows of the model's embed"
    error = capsys.readouterr().err
    assert message in error
    assert f"got '<extra>' with {size}; call model.resize_token_embeddings" in error


def test_max_length_beyond_the_positions_is_refused_first(
    toy_model: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    tokenizer.save_pretrained(tmp_path / "model")
    model = tiny.build("GPT2", vocab_size=len(tokenizer), n_positions=48)
    model.save_pretrained(tmp_path / "model")
    for length, code in ((49, 2), (48, 0)):
        words = command(tmp_path / "model", toy_data, tmp_path / "run", "--method", "ntp")
        words += ["--max_length", str(length), "--max_steps", "1", "--on_bad_row", "skip"]
        assert main(["train", *words, "--save_strategy", "no"]) == code
        error = capsys.readouterr().err
        assert ("--max_length: expected at most 48, the positions that the" in error) == (code == 2)


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list], ids=["list", "dataset"])
@pytest.mark.parametrize(
    ("key", "usual", "other", "message"),
    [
        ("attention_mask", [1, 1, 1], [0, 1, 1], r"attention_mask\[0\] is 0, .*cut padding off"),
        ("position_ids", [0, 1, 2], [0, 1, 0], r"position_ids\[2\] is 0, .*every packed example"),
        ("token_type_ids", [0, 0, 0], [0, 0, 1], r"token_type_ids\[2\] is 1, .*leave"),
        ("completion_mask", [0, 1, 1], [0, 0, 1], r"completion_mask\[1\] is 0, .*label to -100"),
        ("loss_mask", [False, True, True], [False, True, False], r"loss_mask\[2\] is 0, .*label"),
        ("assistant_masks", [0, 1, 1], [0, 1], "expected one of assistant_masks for each"),
        ("seq_lengths", None, [2, 1], "expected no column 'seq_lengths', which is not read"),
    ],
)
def test_columns_beside_say_what_every_row_has(
    kind: Any, key: str, usual: Any, other: Any, message: str
) -> None:
    """Or are refused: the collator reads ids and labels alone."""
    model = tiny.build("Llama")
    row = tiny.named([5, 6, 7], [-100, 6, 7])
    if usual is not None:
        check_examples(model, train_dataset=kind([{**row, key: usual}] * 3))
    rows = [{**row, key: one} for one in (usual or other, other)]
    with pytest.raises(ValueError, match=rf"^train_dataset: (row \d: )?{message}"):
        check_examples(model, train_dataset=kind(rows))
