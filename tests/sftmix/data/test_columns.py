"""What stands inside messages and beside the text: read, refused, or named; never dropped."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftmix.data.examples import BadRowError, Example, content_hash, load_examples
from sftmix.data.selection import response_length
from sftmix.data.weighting import WeightColumn

USER, REPLY = {"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "3"}
PAIR = [USER, REPLY]
TEXT = {"question": "Add 1 and 2.", "answer": "3"}
CALL = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(tmp_path: Path, row: dict[str, Any]) -> Example:
    [example] = load_examples([write(tmp_path / "data.jsonl", row)], weight=WeightColumn())
    assert example.content_hash == content_hash(row)
    return example


def refused(tmp_path: Path, row: dict[str, Any]) -> str:
    with pytest.raises(BadRowError) as caught:
        read(tmp_path, row)
    return caught.value.reason


def plain_hash(*messages: dict[str, Any]) -> str:
    return content_hash({"messages": list(messages)})


def test_the_hash_of_a_plain_row_stays() -> None:
    # Runs of earlier versions have it in their partitions.
    known = "b48fc72d2485f0419cfc490768ef6330e7f2422b09f100c2ce12b024108c9020"
    assert plain_hash(*PAIR) == content_hash(TEXT) == known
    empty = {"tools": [], "system": "", "history": None, "rejected": None, "weight": 1}
    assert content_hash({**TEXT, **empty, "id": 7}) == plain_hash(*PAIR)
    blank = {"tool_calls": None, "reasoning_content": "", "weight": 1, "name": None}
    assert plain_hash(USER, {**REPLY, **blank}) == plain_hash(*PAIR)


@pytest.mark.parametrize(
    "more",
    [
        {"reasoning_content": "1 + 2"},
        {"thinking": "1 + 2"},
        {"name": "adder"},
        {"tool_calls": [CALL]},
        {"tool_calls": [CALL], "reasoning_content": "I need a tool"},
    ],
)
def test_what_templates_read_stays_in_the_message(tmp_path: Path, more: dict[str, Any]) -> None:
    example = read(tmp_path, {"messages": [USER, {**REPLY, **more}]})
    assert example.messages == (USER, {**REPLY, **more})
    assert example.learnt is None
    assert example.content_hash != plain_hash(*PAIR)


@pytest.mark.parametrize("nothing", [{}, {"content": None}, {"content": ""}])
@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
def test_a_conversation_with_tools(tmp_path: Path, nothing: dict[str, Any], arguments: Any) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    asks = {"role": "assistant", **nothing, "tool_calls": [call]}
    answer = {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"}
    row = {"messages": [USER, asks, answer, REPLY], "tools": [TOOL]}
    example = read(tmp_path, row)
    assert example.messages is not None
    assert example.messages[1]["content"] == nothing.get("content")
    assert example.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert example.messages[2] == answer
    assert example.tools == [TOOL]
    assert response_length(example) == 1
    assert read(tmp_path, {**row, "tools": None}).content_hash != example.content_hash


def test_fields_of_another_spelling_are_read_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    function = {"Name": "add", "Arguments": '{"a": 1, "b": 2}'}
    call = {"type": "function", "id": "c1", "Function": function}
    asks = {"Role": "assistant", "Content": None, "toolCalls": [call], "Reasoning_Content": "1 + 2"}
    answer = {"role": "tool", "content": "3", "Tool Call ID": "c1"}
    example = read(tmp_path, {"messages": [USER, asks, answer, {**REPLY, "Weight": "1"}]})
    assert example.messages == (
        USER,
        {"role": "assistant", "content": None, "reasoning_content": "1 + 2", "tool_calls": [CALL]},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
        REPLY,
    )
    for what in (
        "field 'toolCalls' as 'tool_calls' (1)",
        "field 'Arguments' as 'arguments' (1)",
        "field 'Tool Call ID' as 'tool_call_id' (1)",
        "text '1' of 'messages[].weight' as 1 (1)",
    ):
        assert what in caplog.text
    assert "not used" not in caplog.text


def test_parts_under_the_name_that_gemini_has(tmp_path: Path) -> None:
    asked = {"role": "user", "parts": [{"text": "Add 1"}, {"text": " and 2."}]}
    example = read(tmp_path, {"messages": [asked, {"role": "model", "parts": [{"text": "3"}]}]})
    assert example.content_hash == plain_hash(*PAIR)


@pytest.mark.parametrize("arguments", ["", None, "{}", {}])
def test_a_call_without_arguments(tmp_path: Path, arguments: Any) -> None:
    call = {"name": "now", "arguments": arguments}
    row = {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}
    messages = read(tmp_path, row).messages
    assert messages is not None
    assert messages[1]["tool_calls"] == [{"name": "now", "arguments": {}}]


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]])
@pytest.mark.parametrize("row", [{"messages": PAIR}, TEXT])
def test_tools_are_a_list_or_json_text(tmp_path: Path, row: dict[str, Any], tools: Any) -> None:
    assert read(tmp_path, {**row, "tools": tools}).tools == [TOOL]


def test_nulls_that_arrow_adds_carry_nothing(tmp_path: Path) -> None:
    rows = [
        {"messages": [USER, {**REPLY, "tool_calls": [CALL], "weight": 1}], "tools": [TOOL]},
        {"messages": [USER, REPLY], "tools": [{**TOOL, "strict": True}]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    examples = load_examples([tmp_path / "data.parquet"])
    assert [one.content_hash for one in examples] == [content_hash(row) for row in rows]
    assert [one.tools for one in examples] == [row["tools"] for row in rows]


@pytest.mark.parametrize(
    ("key", "no", "yes"),
    [
        ("weight", 0, 1),
        ("weight", 0.0, 1.0),
        ("loss_weight", 0, 1),
        ("train", False, True),
        ("training", False, True),
        ("trainable", False, True),
        ("loss", False, True),
        ("loss_mask", 0, 1),
        ("step_loss_mask", 0, 1),
    ],
)
def test_masks_say_what_is_learnt(tmp_path: Path, key: str, no: Any, yes: Any) -> None:
    row = {"messages": [USER, {**REPLY, key: no}, USER, {**REPLY, key: yes}]}
    example = read(tmp_path, row)
    assert example.learnt == (False, False, False, True)
    assert example.messages == (USER, REPLY, USER, REPLY)
    assert example.content_hash != plain_hash(USER, REPLY, USER, REPLY)
    assert response_length(example) == 1
    spelt, text = key.title().replace("_", " "), str(no).lower()
    for other in ({spelt: no}, {key: str(no)}, {key.upper(): f" {text}"}):
        read_so = read(tmp_path, {"messages": [USER, {**REPLY, **other}, USER, REPLY]})
        assert read_so.learnt == (False, False, False, True)
    same = {"messages": [{**USER, key: no}, {**REPLY, key: yes}]}
    assert read(tmp_path, same).content_hash == plain_hash(*PAIR)


def test_only_the_completion_of_a_prompt_with_answers_is_learnt(tmp_path: Path) -> None:
    row: dict[str, Any] = {"prompt": [USER, REPLY, USER], "completion": [REPLY]}
    assert read(tmp_path, row).learnt == (False, False, False, True)
    row["prompt"][1] = {**REPLY, "train": True}
    assert read(tmp_path, row).learnt is None


@pytest.mark.parametrize(
    ("content", "joined"),
    [
        ([{"type": "text", "text": "3"}], "3"),
        ([{"text": "3"}, {"text": " apples", "image": None, "thought": False}], "3 apples"),
        ([{"type": "text", "text": "3"}, {"type": "text", "text": " apples", "image": None}],
         "3 apples"),
    ],
)  # fmt: skip
def test_text_parts_are_joined(tmp_path: Path, content: Any, joined: str) -> None:
    example = read(tmp_path, {"messages": [USER, {**REPLY, "content": content}]})
    assert example.content_hash == plain_hash(USER, {**REPLY, "content": joined})


REPLIES: list[tuple[dict[str, Any], str]] = [
    ({"content": [{"type": "image", "image": "x.png"}]}, r"part of type 'text', got 'image'"),
    ({"content": [{"type": "thinking", "thinking": "x"}]}, r"'messages[1].content[0]' must be"),
    ({"content": ["3"]}, "must be a part of type 'text', got '3'"),
    ({"content": [{"type": "text", "text": "3", "weight": 0}]}, "only a whole message has a mask"),
    ({"content": [{"type": "text"}]}, "content[0].text' must be a string, got null"),
    ({"content": []}, "'messages[1].content' is empty"),
    ({"content": {"text": "3"}}, "content' must be a string, got dict"),
    ({"weight": 0}, "no assistant message is learnt: the masks of all are 0"),
    ({"weight": 0.5}, "'messages[1].weight' must be 0 or 1 (false or true), got 0.5"),
    ({"weight": "0.5"}, "must be 0 or 1 (false or true), got '0.5'"),
    ({"weight": "yes"}, "must be 0 or 1 (false or true), got 'yes'"),
    ({"weight": "0"}, "no assistant message is learnt"),
    ({"Weight": 0}, "no assistant message is learnt"),
    ({" TRAIN": "False"}, "no assistant message is learnt"),
    ({"Weight": 0, "weight": 1}, "'messages[1]' has 'Weight' beside 'weight'; leave one of them o"),
    ({"lossWeight": 0, "train": True}, "both learnt and not: 'loss_weight', 'train' differ"),
    ({"Images": ["x.png"]}, "'messages[1].images' is not read; only text is learnt from"),
    ({"Tool_Calls": ["add"]}, "tool_calls[0]' must be an object, got str"),
    ({"tools": [TOOL]}, "tools' is not read; give them in the row's column 'tools'"),
    ({"functions": "[{}]"}, "functions' is not read; give them in the row's column 'tools'"),
    ({"function_calls": "add(1)"}, "function_calls' is not read; give it as 'tool_calls' of the"),
    ({"Tool Call": CALL}, "tool_call' is not read; give it as 'tool_calls'"),
    ({"tool_results": ["3"]}, "tool_results' is not read; give it as the content of a message"),
    ({"tool_calls": [{"name": "add", "parameters": {"a": 1}}]}, "name it 'arguments'"),
    ({"content": [{"text": "3"}, {"toolUse": {"name": "add"}}]},
     "content[1]' must be a part of type 'text', got 'tool_use'; give it as 'tool_calls' of the"),
    ({"content": [{"type": "tool_use", "name": "add"}]}, "got 'tool_use'; give it as 'tool_calls'"),
    ({"content": [{"type": "tool-result", "content": "3"}]}, "of a message of the role 'tool'"),
    ({"content": [{"text": "1 + 2", "thought": True}]}, "got 'thought'; give it as 'reasoning_con"),
    ({"content": [{"type": "text", "text": "3", "Weight": 0}]}, "only a whole message has a mask"),
    ({"content": None, "parts": [{"functionCall": {"name": "add"}}]},
     "parts[0]' must be a part of type 'text', got 'function_call'; give it as 'tool_calls'"),
    ({"content": None, "parts": [{"inlineData": {"data": "x"}}]}, "; only text is learnt from"),
    ({"content": None, "parts": ["3"]}, "must be a part of type 'text', got '3'"),
    ({"weight": 0, "train": True}, "both learnt and not: 'weight', 'train' differ"),
    ({"mask": True}, "'messages[1].mask' is not read; say with 'train'"),
    ({"train_detail": [{"begin_offset": 0}]}, "train_detail' is not read"),
    ({"function_call": {"name": "add"}, "tool_calls": [CALL]}, "both 'tool_calls' and 'function_c"),
    ({"function_call": {"arguments": "{}"}}, "must have a function with a name"),
    ({"reasoning": "1 + 2", "thinking": "2 + 1"}, "reasoning' and 'messages[1].thinking' differ"),
    ({"reasoning": ["1"]}, "reasoning' must be a string, got list"),
    ({"refusal": "No."}, "refusal' is not read"),
    ({"images": ["x.png"]}, "only text is learnt from"),
    ({"reasoning_content": ["1"]}, "reasoning_content' must be a string, got list"),
    ({"thinking": "\ud800"}, "thinking' holds a lone surrogate"),
    ({"tool_calls": [{"function": {}}]}, "tool_calls[0]' must have a function with a name"),
    ({"tool_calls": ["add"]}, "tool_calls[0]' must be an object, got str"),
    ({"tool_calls": "add(1, 2)"}, "tool_calls' is no JSON: Expecting value at character 0"),
    ({"tool_calls": {"name": "add"}}, "must be a list, or JSON text of one, got dict"),
    ({"tool_calls": [{"name": "add", "arguments": "[1]"}]}, "arguments' must be an object, or J"),
    ({"tool_calls": [{"name": "add", "arguments": {"a": "\ud800"}}]}, "holds a lone surrogate"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "reason"), REPLIES)
def test_fields_that_are_refused(tmp_path: Path, more: dict[str, Any], reason: str) -> None:
    assert reason in refused(tmp_path, {"messages": [USER, {**REPLY, **more}]})


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"weight": 1}, "is of the user and marked as learnt; only assistant messages are"),
        ({"tool_calls": [CALL]}, "tool_calls' are of the user; only the assistant calls tools"),
    ],
)
def test_fields_of_other_roles_that_are_refused(
    tmp_path: Path, more: dict[str, Any], reason: str
) -> None:
    assert reason in refused(tmp_path, {"messages": [{**USER, **more}, REPLY]})


SYSTEM = {"role": "system", "content": "Be brief."}
BESIDE: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    ({"messages": PAIR, "system": "Be brief."}, [SYSTEM, *PAIR]),
    ({"messages": [SYSTEM, *PAIR], "system": "Be brief."}, [SYSTEM, *PAIR]),
    ({"prompt": [USER], "completion": [REPLY], "system": "Be brief."}, [SYSTEM, *PAIR]),
    ({**TEXT, "system_prompt": "Be brief."}, [SYSTEM, *PAIR]),
    ({"instruction": "Add 1 and 2.", "output": "3", "system": "Be brief."}, [SYSTEM, *PAIR]),
    (
        {"instruction": "Add 1 and 2.", "output": "3", "history": [["Hi", "Ho"], ["Ha", "He"]]},
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Ho"},
            {"role": "user", "content": "Ha"},
            {"role": "assistant", "content": "He"},
            *PAIR,
        ],
    ),
    (
        {"question": "Who?", "context": "Ann sleeps.", "answer": "3"},
        [{"role": "user", "content": "Ann sleeps.\n\nWho?"}, REPLY],
    ),
]


@pytest.mark.parametrize(("row", "messages"), BESIDE)
def test_columns_that_are_read(
    tmp_path: Path, row: dict[str, Any], messages: list[dict[str, Any]]
) -> None:
    example = read(tmp_path, row)
    assert example.messages == tuple(messages)
    assert example.content_hash == plain_hash(*messages)


def test_a_system_column_moves_the_masks_along(tmp_path: Path) -> None:
    row = {"messages": [USER, {**REPLY, "weight": 0}, USER, REPLY], "system": "Be brief."}
    assert read(tmp_path, row).learnt == (False, False, False, False, True)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [SYSTEM, *PAIR], "system": "Be long."}, "'system' is another text than the"),
        ({**TEXT, "system": "a", "system_prompt": "b"}, "'system' and 'system_prompt' differ"),
        ({**TEXT, "system": ["a"]}, "'system' must be a string, got list"),
        ({**TEXT, "history": [["a"]]}, "'history[0]' must be a list of a prompt and a response"),
        ({**TEXT, "history": [["a", ""]]}, "'history[0][1]' is empty"),
        ({"messages": PAIR, "history": [["a", "b"]]}, "'history' beside 'messages' is not read"),
        ({**TEXT, "context": {"contexts": ["a"]}}, "'context' must be a string, got dict"),
        ({**TEXT, "instruction": "Be quick."}, "'instruction' is not read; write it into the pr"),
        ({"prompt": "a", "completion": "b", "input": "c"}, "'input' is not read"),
        ({"prompt": "a", "completion": "b", "context": "c"}, "'context' is not read; write it"),
        ({"prompt": "a", "completion": "b", "rejected": "c"}, "'rejected' is not read; it is what"),
        ({"prompt": "a", "completion": "b", "label": False}, "'label' is false: an answer that is"),
        ({"prompt": [USER], "completion": [REPLY], "label": 0}, "'label' is false"),
        ({"messages": PAIR, "label": False}, "'label' is false"),
        ({"messages": PAIR, "label": "False"}, "'label' is false"),
        ({**TEXT, " Label": " false "}, "' Label' is false: an answer that is not wanted"),
        ({"Prompt": "a", "Completion": "b", "LABEL": "0"}, "'LABEL' is false"),
        ({**TEXT, "Weight": 0}, "'Weight' is 0, and weights are read from 'weight'"),
        ({**TEXT, "sampleWeight": "0.50"}, "'sampleWeight' is '0.50', and weights are read from"),
        ({**TEXT, "Train": "FALSE"}, "'Train' is 'FALSE', and weights are read from"),
        ({"messages": PAIR, "systemInstruction": {"parts": []}}, "is not read; give it as text,"),
        ({**TEXT, "sample_weight": 0.5}, "'sample_weight' is 0.5, and weights are read from"),
        ({**TEXT, "train": False}, "'train' is False, and weights are read from"),
        ({"messages": PAIR, "images": ["x.png"]}, "'images' is not read; only text is learnt"),
        ({"messages": PAIR, "functions": [TOOL]}, "'functions' is not read; name them 'tools'"),
        ({"messages": PAIR, "documents": ["x"]}, "'documents' is not read"),
        ({"messages": PAIR, "chat_template_kwargs": {"a": 1}}, "template_kwargs' is not read"),
        ({"messages": PAIR, "tools": "add"}, "'tools' is no JSON"),
        ({"messages": PAIR, "tools": {"add": 1}}, "'tools' must be a list, or JSON text of one"),
        ({"messages": PAIR, "tools": [1]}, "'tools[0]' must be an object, or JSON text of one"),
    ],
)  # fmt: skip
def test_columns_that_are_refused(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    assert reason in refused(tmp_path, row)


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({**TEXT, "source": "web", "id": 7, "empty": "", "none": None}, ["'source'", "'id'"]),
        ({**TEXT, "label": "addition", "score": 0}, ["'label'", "'score'"]),
        ({**TEXT, "label": "0", "Train": "split 1"}, ["'label'", "'Train'"]),
        ({"messages": PAIR, "Label": "True", "images": "False"}, ["'Label'", "'images'"]),
        ({"prompt": "a", "completion": "b", "label": True}, ["'label'"]),
        ({"messages": PAIR, "prompt": "Add 1 and 2.", "rejected": "4"}, ["'prompt'", "'rejected'"]),
        ({"messages": [USER, {**REPLY, "end_turn": True}]}, ["'messages[].end_turn'"]),
        ({"input_ids": [1, 2], "labels": [1, 2], "length": 2}, ["'length'"]),
    ],
)
def test_columns_that_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, row: dict[str, Any], names: list[str]
) -> None:
    file = write(tmp_path / "data.jsonl", row, row, row)
    load_examples([file])
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    listed = ", ".join(f"{name} (3 rows)" for name in names)
    assert record.getMessage() == f"{file}: not used: {listed}"


@pytest.mark.parametrize("column", ["Loss_Mask", "lossMask", "completion mask"])
def test_masks_of_tokens_are_found_in_every_spelling(tmp_path: Path, column: str) -> None:
    row = {"Input_IDs": [5, 6, 7], "Labels": [5, 6, 7], column: [0, 1, 1]}
    assert read(tmp_path, row).labels == [-100, 6, 7]


def test_cells_of_csv_mean_what_they_say(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "data.csv"
    file.write_text("prompt,completion,label,Weight\na,b,True,1\nc,d,False,1\ne,f,True,0\n")
    [example] = load_examples([file], on_bad_row="skip", weight=WeightColumn())
    assert example.messages == ({"role": "user", "content": "a"}, {**REPLY, "content": "b"})
    assert f"{file}:3: 'label' is false" in caplog.text
    assert f"{file}:4: 'Weight' is '0'" in caplog.text
    assert "forgiven: column 'Weight' as 'weight' (1), text '1' of 'Weight' as 1 (1)" in caplog.text


def test_a_column_that_a_selection_asks_for_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "data.jsonl", {**TEXT, "weight": 0.5})
    [example] = load_examples([file], numbers=["weight"])
    assert example.numbers == {"weight": 0.5}
    assert not caplog.records


def test_preferences_are_refused_for_their_own_reason(tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
    with pytest.raises(ValueError, match=r"are preferences, of which one answer is not to be lea"):
        load_examples([file])


def test_a_value_nested_too_deep_is_a_bad_row(tmp_path: Path) -> None:
    deep: Any = {}
    for _ in range(400):
        deep = {"a": deep}
    file = write(tmp_path / "data.jsonl", {**TEXT, "tools": [deep]}, TEXT)
    assert len(load_examples([file], on_bad_row="skip")) in (1, 2)  # as deep as Python allows


TOKENS: list[tuple[dict[str, Any], list[int], list[int]]] = [
    ({"labels": [-100, 6, 7], "attention_mask": [1, 1, 1]}, [5, 6, 7], [-100, 6, 7]),
    ({"labels": [-100, 6, 7], "attention_mask": [0, 1, 1]}, [6, 7], [6, 7]),
    ({"labels": [-100, 6, -100], "attention_mask": [1, 1, 0]}, [5, 6], [-100, 6]),
    ({"labels": [5, 6, 7], "position_ids": [0, 1, 2]}, [5, 6, 7], [5, 6, 7]),
    ({"labels": [5, 6, 7], "attention_mask": [0, 1, 1], "position_ids": [1, 0, 1]}, [6, 7], [6, 7]),
    ({"labels": [5, 6, 7], "token_type_ids": [0, 0, 0]}, [5, 6, 7], [5, 6, 7]),
    ({"completion_mask": [0, 1, 1]}, [5, 6, 7], [-100, 6, 7]),
    ({"assistant_masks": [0, 0, 1]}, [5, 6, 7], [-100, -100, 7]),
    ({"loss_mask": [False, True, True]}, [5, 6, 7], [-100, 6, 7]),
    ({"labels": [-100, 6, 7], "loss_mask": [1, 0, 1]}, [5, 6, 7], [-100, -100, 7]),
    ({"completion_mask": [0, 1, 1], "assistant_masks": [1, 0, 1]}, [5, 6, 7], [-100, -100, 7]),
]


@pytest.mark.parametrize(("more", "ids", "labels"), TOKENS)
def test_masks_of_rows_of_tokens(
    tmp_path: Path, more: dict[str, Any], ids: list[int], labels: list[int]
) -> None:
    example = read(tmp_path, {"input_ids": [5, 6, 7], **more})
    assert (example.input_ids, example.labels) == (ids, labels)
    assert example.content_hash == content_hash({"input_ids": ids, "labels": labels})


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"attention_mask": [1, 0, 1]}, "'attention_mask[1]' is 0 between tokens that are read"),
        ({"attention_mask": [0, 0, 0]}, "the row is only padding"),
        ({"attention_mask": [1, 1, 2]}, "'attention_mask[2]' must be 0 or 1, got 2 (a packed row?"),
        ({"attention_mask": [1, 1]}, "of one length, got 3 and 2"),
        ({"attention_mask": [[1], [1], [1]]}, "'attention_mask[0]' must be an integer, got [1]"),
        ({"labels": None}, "'labels' must be a list of integers, got null"),
        ({"position_ids": [0, 1, 0]}, "several examples are packed in the row; give every packed"),
        ({"position_ids": [4, 5, 6]}, "'position_ids[0]' must be 0, got 4; leave position_ids out"),
        ({"token_type_ids": [0, 0, 1]}, "'token_type_ids' are not all 0"),
        ({"loss_mask": [0, 0, 0]}, "nothing to learn: 'labels' and 'loss_mask' leave no token"),
        ({"loss_mask": [0, 2, 0]}, "'loss_mask[1]' must be 0 or 1, got 2"),
        ({"seq_lengths": [2, 1]}, "'seq_lengths' is not read; give every packed example as a row"),
        ({"shift_labels": [6, 7, -100]}, "labels are not shifted here"),
        ({"loss_weights": [0.0, 0.5, 1.0]}, "tokens have no weights here"),
        ({"train": 0}, "'train' is 0, and weights are read from 'weight'"),
        ({"Position_IDs": [0, 1, 0]}, "several examples are packed in the row"),
        ({"Labels": [5, 6, 8]}, "'labels' and 'Labels' are one name, and differ"),
        ({"Seq_Lengths": [2, 1]}, "'seq_lengths' is not read; give every packed"),
        ({"pixel_values": [[0.5]]}, "only text is learnt from"),
    ],
)
def test_rows_of_tokens_that_are_refused(tmp_path: Path, more: dict[str, Any], reason: str) -> None:
    row = {"input_ids": [5, 6, 7], "labels": [5, 6, 7], **more}
    assert reason in refused(tmp_path, row)
