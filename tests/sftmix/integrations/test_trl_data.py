"""Which tokens are learnt of TRL's data: prompts only where they were asked for."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer

from sftmix.data.examples import load_examples
from sftmix.integrations.trl import SFTMixSFTTrainer, content_hashes
from sftmix.integrations.trl_data import with_responses
from sftmix.templates.tokenizing import tokenize_examples
from tests.sftmix.integrations.test_trl import MARKED, ours

# TRL's own defaults use a name that transformers gives up.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")

# ChatML, without marks of what the assistant writes.
UNMARKED = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' }}"
    "{{ message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
# It writes no prompt that the conversation begins with.
UNLIKE = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'Answer: ' }}{% endif %}"
)
TURNS = ["Name a colour.", "Red.", "And one more, please.", "Green or blue."]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL tells its makers of every trainer, except in CI."""
    monkeypatch.setenv("CI", "1")


def message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


CHAT = [message(role, text) for role, text in zip(("user", "assistant") * 2, TURNS, strict=True)]
ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": CHAT},
    "conversations": {
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}[one["role"]], "value": one["content"]}
            for one in CHAT
        ]
    },
    "pairs": {"prompt": CHAT[:3], "completion": CHAT[3:]},
    "strings": {"prompt": TURNS[0], "completion": f" {TURNS[1]}"},
    "tokens": {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    "completion_mask": {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]},
    "assistant_masks": {"input_ids": [5, 6, 7], "assistant_masks": [0, 1, 1]},
    "text": {"text": TURNS[0]},
    "bare tokens": {"input_ids": [5, 6, 7]},
    "instructions": {"instruction": TURNS[0], "output": TURNS[1]},
}


def data(kind: str) -> datasets.Dataset:
    """Four rows of a kind of `ROWS`."""
    return datasets.Dataset.from_list([ROWS[kind]] * 4)


def made(
    toy_model: Path,
    folder: Path,
    rows: datasets.Dataset,
    given: dict[str, Any] | None = None,
    template: str = UNMARKED,
    **changes: Any,
) -> SFTMixSFTTrainer:
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    tokenizer.chat_template = template
    given = {"processing_class": tokenizer, **(given or {})}
    return ours(toy_model, folder, rows, given, **changes)


def parts(trainer: SFTMixSFTTrainer, rows: datasets.Dataset | None = None) -> tuple[str, str]:
    """The text of the first row to train on, and what of it is learnt."""
    row = (trainer.examples if rows is None else rows)[0]
    learnt = [label for label in row["labels"] if label != -100]
    assert learnt == [
        token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100
    ]
    return trainer.processing_class.decode(row["input_ids"]), trainer.processing_class.decode(
        learnt
    )


def test_of_conversations_the_responses_are_learnt_as_by_the_command(
    toy_model: Path, tmp_path: Path
) -> None:
    data("messages").to_json(tmp_path / "chats.jsonl")
    for template in (UNMARKED, MARKED):
        trainer = made(toy_model, tmp_path, data("messages"), template=template)
        examples = load_examples([tmp_path / "chats.jsonl"])
        expected = tokenize_examples(examples, trainer.processing_class)
        assert trainer.examples["input_ids"][:] == expected["input_ids"][:]
        assert trainer.examples["labels"][:] == expected["labels"][:]
        eos = trainer.processing_class.eos_token
        assert parts(trainer)[1] == f"Red.{eos}Green or blue.{eos}"
    marked = made(toy_model, tmp_path, data("messages"), template=MARKED, assistant_only_loss=True)
    assert trainer.examples["input_ids"][:] == marked.examples["input_ids"][:]
    assert trainer.examples["labels"][:] == marked.examples["labels"][:]


@pytest.mark.parametrize(
    ("kind", "learnt"),
    [
        ("messages", "Red.{eos}Green or blue.{eos}"),
        ("conversations", "Red.{eos}Green or blue.{eos}"),
        ("pairs", "Green or blue.{eos}"),
        ("strings", " Red.{eos}"),
    ],
)
def test_no_prompt_is_learnt_or_mixed(
    kind: str, learnt: str, toy_model: Path, tmp_path: Path
) -> None:
    trainer = made(toy_model, tmp_path, data(kind))
    tokenizer = trainer.processing_class
    found = parts(trainer)[1]
    assert found == learnt.format(eos=tokenizer.eos_token)
    batch = next(iter(trainer.get_train_dataloader()))
    for places in (batch["pair_c"], batch["pair_u"]):
        mixed = batch["targets"][places]
        assert tokenizer.decode(mixed) == 2 * found  # two pairs of equal rows
    assert len(batch["targets"]) < batch["lengths"].sum()


@pytest.mark.parametrize("kind", ["tokens", "completion_mask", "assistant_masks"])
def test_of_tokens_what_a_mask_says_is_learnt(kind: str, toy_model: Path, tmp_path: Path) -> None:
    trainer = made(toy_model, tmp_path, data(kind))
    assert trainer.examples["labels"][0] == [-100, 6, 7]
    assert sorted(trainer.examples.column_names) == ["id", "input_ids", "labels"]


@pytest.mark.parametrize(
    ("beside", "words"),
    [
        (
            {"completion_mask": [0, 1, 1]},
            r"row 0: completion_mask\[0\] is 0, .*set the label to -",
        ),
        ({"assistant_masks": [1, 1, 0]}, r"row 0: assistant_masks\[2\] is 0, .*set the label to"),
        ({"attention_mask": [0, 1, 1]}, r"row 0: attention_mask\[0\] is 0, .*cut padding off"),
        ({"position_ids": [0, 0, 1]}, r"row 0: position_ids\[1\] is 0, .*give every packed exam"),
        ({"seq_lengths": [2, 1]}, "expected no column 'seq_lengths', .*give every packed example"),
    ],
)
def test_columns_that_take_back_what_labels_say_are_refused(
    beside: dict[str, Any], words: str, toy_model: Path, tmp_path: Path
) -> None:
    """TRL reads none of them beside labels, so that a prompt would be learnt."""
    rows = datasets.Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7], **beside}] * 4)
    with pytest.raises(ValueError, match=f"^train_dataset: {words}"):
        made(toy_model, tmp_path, rows)
    with pytest.raises(ValueError, match=f"^eval_dataset: {words}"):
        made(toy_model, tmp_path, data("tokens"), {"eval_dataset": rows})


def test_columns_that_say_what_labels_say_are_taken(toy_model: Path, tmp_path: Path) -> None:
    beside = {"completion_mask": [0, 1, 1], "attention_mask": [1, 1, 1], "id": "a"}
    rows = datasets.Dataset.from_list([{**ROWS["tokens"], **beside}] * 4)
    trainer = made(toy_model, tmp_path, rows, {"eval_dataset": rows})
    assert trainer.examples["labels"][0] == trainer.eval_dataset["labels"][0] == [-100, 6, 7]


ASKED: list[tuple[str, dict[str, Any]]] = [
    ("messages", {"assistant_only_loss": False}),
    ("messages", {"completion_only_loss": False}),
    ("conversations", {"assistant_only_loss": False}),
    ("pairs", {"completion_only_loss": False}),
    ("strings", {"completion_only_loss": False}),
    ("completion_mask", {"completion_only_loss": False}),
    ("text", {"completion_only_loss": False}),
    ("bare tokens", {"completion_only_loss": False}),
]


@pytest.mark.parametrize(("kind", "changes"), ASKED)
def test_prompts_are_learnt_where_they_are_asked_for(
    kind: str, changes: dict[str, Any], toy_model: Path, tmp_path: Path
) -> None:
    trainer = made(toy_model, tmp_path, data(kind), **changes)
    whole, learnt = parts(trainer)
    assert learnt == whole


def asked(**options: bool | None) -> Any:
    """Options of a trainer that says nothing of prompts, or what is given here."""
    return SimpleNamespace(**{"assistant_only_loss": None, "completion_only_loss": None, **options})


@pytest.mark.parametrize("kind", ["text", "bare tokens", "instructions"])
@pytest.mark.parametrize("completion", [None, True])
def test_data_that_do_not_tell_responses_are_refused(kind: str, completion: bool | None) -> None:
    options = asked(completion_only_loss=completion, assistant_only_loss=False)
    columns = re.escape(str(sorted(ROWS[kind])))
    words = f"^d: expected data that tell responses from prompts .* got {columns}; completion_only"
    with pytest.raises(ValueError, match=words):
        with_responses(data(kind), None, options, None, "d")  # type: ignore[arg-type]


def test_all_data_of_a_trainer_are_looked_at(toy_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^train_dataset: expected data that tell"):
        made(toy_model, tmp_path, data("text"))
    held = {"eval_dataset": {"held": data("text")}}
    with pytest.raises(ValueError, match=r"^eval_dataset\['held'\]: expected data that tell"):
        made(toy_model, tmp_path, data("strings"), held)
    trainer = made(toy_model, tmp_path, data("strings"))
    with pytest.raises(ValueError, match=r"^eval_dataset: expected data that tell"):
        trainer.evaluate(data("text"))


def test_the_text_of_a_function_is_refused(toy_model: Path, tmp_path: Path) -> None:
    def first(row: dict[str, Any]) -> str:
        return str(row["instruction"])

    rows, given = data("instructions"), {"formatting_func": first}
    with pytest.raises(ValueError, match=r"^d: .* got the text of formatting_func; "):
        with_responses(rows, None, asked(), first, "d")  # type: ignore[arg-type]
    for kind in ("messages", "strings"):
        with pytest.raises(ValueError, match=r"^formatting_func: expected data without messages"):
            made(toy_model, tmp_path, data(kind), given, completion_only_loss=False)
    trainer = made(toy_model, tmp_path, rows, given, completion_only_loss=False)
    whole, learnt = parts(trainer)
    assert whole == learnt == TURNS[0] + trainer.processing_class.eos_token


@pytest.mark.parametrize(
    ("trained", "kind"), [("messages", "strings"), ("strings", "messages"), ("messages", "pairs")]
)
def test_data_to_evaluate_may_be_of_another_kind(
    trained: str, kind: str, toy_model: Path, tmp_path: Path
) -> None:
    """TRL decides by the data to train on whether it masks prompts."""
    held = {"train": data(kind)}
    trainer = made(toy_model, tmp_path, data(trained), {"eval_dataset": held})
    own = made(toy_model, tmp_path, data(kind))
    assert trainer.eval_dataset["train"]["labels"][:] == own.examples["labels"][:]
    metrics = trainer.evaluate()
    learnt = [label for row in own.examples["labels"] for label in row[1:] if label != -100]
    assert metrics["eval_train_num_tokens"] == len(learnt)


def test_a_conversation_without_findable_responses_names_its_row(
    toy_model: Path, tmp_path: Path
) -> None:
    def refused(rows: datasets.Dataset, words: str, template: str = UNMARKED) -> str:
        with pytest.raises(ValueError, match=words) as caught:
            made(toy_model, tmp_path, rows, template=template)
        return str(caught.value)

    said = refused(
        data("messages"), "^train_dataset: row 0: the chat template is not prefix", UNLIKE
    )
    assert "Give chat_template_path=FILE with" in said
    assert "--" not in said
    assert said.endswith("assistant_only_loss=False learns prompts too")
    asking = [ROWS["messages"], {"messages": CHAT[:1]}, ROWS["messages"], ROWS["messages"]]
    refused(datasets.Dataset.from_list(asking), "^train_dataset: row 1: ")
    styled = data("messages").add_column("chat_template_kwargs", [{"style": "short"}] * 4)
    refused(styled, "^train_dataset: row 0: 'chat_template_kwargs' ")


def test_what_is_not_read_of_messages_is_said(
    toy_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = datasets.Dataset.from_list([{"messages": [{**one, "mood": "calm"} for one in CHAT]}] * 4)
    with caplog.at_level(logging.WARNING, logger="sftmix"):
        made(toy_model, tmp_path, rows)
    assert any("train_dataset: not used: " in line and "mood" in line for line in caplog.messages)


def test_rows_have_one_content_in_every_format() -> None:
    """The text of a long tensor leaves most of it out."""
    rows = [
        {"input_ids": [*range(2000), 5], "labels": [*range(1000), one, *range(1000)]}
        for one in (1, 2)
    ]
    data = datasets.Dataset.from_list(rows)
    found = content_hashes(data)
    assert len({*found}) == 2
    for kind in ("torch", "numpy"):
        assert content_hashes(data.with_format(kind)) == found


def test_the_rest_of_trls_preparation_stays(toy_model: Path, tmp_path: Path) -> None:
    """Rows are cut, left out where nothing to learn is left, and shuffled."""
    long = {"messages": [message("user", TURNS[2] * 30), message("assistant", "Yes.")]}
    rows = datasets.Dataset.from_list([ROWS["messages"], long] * 4)
    given = {"confident": None}
    trainer = made(
        toy_model, tmp_path, rows, given, max_length=30, shuffle_dataset=True, method="ntp"
    )
    ids = trainer.examples["id"][:]
    assert sorted(ids) == [0, 2, 4, 6] != ids
    assert max(map(len, trainer.examples["input_ids"])) <= 30
