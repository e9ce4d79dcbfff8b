"""Every format, rows as public data sets have them, and what is forgiven, refused or mended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sftmix.data.columns import SIDES, parse_columns
from sftmix.data.examples import Example, content_hash, load_examples
from sftmix.data.formats import FORMATS
from sftmix.data.selection import response_length
from sftmix.templates.chat import PLAIN_TEMPLATE
from sftmix.templates.tokenizing import tokenize_examples
from tests.sftmix.chats import CHATML, QWEN3, responses, said, tokenizer_of, user
from tests.sftmix.data.published import CALLED, PAIR, PUBLISHED, SHARED, SYSTEM, TOOL, TWO, oasst


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(tmp_path: Path, *rows: dict[str, Any], columns: str = "", **more: Any) -> list[Example]:
    given = parse_columns(columns) if columns else None
    return load_examples([write(tmp_path / "data.jsonl", *rows)], columns=given, **more)


def refused(tmp_path: Path, *rows: dict[str, Any], columns: str = "", **more: Any) -> str:
    with pytest.raises(ValueError, match=r"data\.jsonl") as caught:
        read(tmp_path, *rows, columns=columns, **more)
    return str(caught.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rows_become_conversations(tmp_path: Path, name: str) -> None:
    row, messages = PUBLISHED[name]
    [example] = read(tmp_path, row)
    assert example.messages == tuple(messages)
    assert example.content_hash == content_hash(row)
    if "tool_calls" not in str(messages):
        assert example.learnt is None
        assert example.content_hash == content_hash({"messages": messages})


EARLIER: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    ({"question": "Add 1 and 2.", "answer": "3", "conversations": SHARED}, PAIR),
    ({"instruction": "Add 1 and 2.", "output": "3", "prompt": "Below: Add 1 and 2."}, PAIR),
    ({"prompt": "Add 1 and 2.", "completion": "3", "question": "What?", "text": "x"}, PAIR),
    ({"messages": PAIR, "conversations": SHARED, "response": "4"}, PAIR),
    ({"question": "Add 1 and 2.", "answer": "3", "reasoning": "1 + 2"}, PAIR),
]


@pytest.mark.parametrize(("row", "messages"), EARLIER)
def test_rows_of_the_earlier_formats_keep_their_content(
    tmp_path: Path, row: dict[str, Any], messages: list[dict[str, Any]]
) -> None:
    [example] = read(tmp_path, row)
    assert example.content_hash == content_hash({"messages": messages})


TEXTS = {
    "ChatML": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAdd 1 and 2.<|im_end|>\n"
    "<|im_start|>assistant\n3<|im_end|>\n",
    "Llama 2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nAdd 1 and 2. [/INST] 3 </s>",
    "Mistral": "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Add 1 and 2.[/INST]3</s>",
    "Llama 3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nAdd 1 and 2.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n3<|eot_id|>",
    "Zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nAdd 1 and 2.</s>\n<|assistant|>\n3</s>",
    "Guanaco": "Be brief.\n### Human: Add 1 and 2.\n### Assistant: 3",
    "Alpaca": "Be brief.\n\n### Instruction:\nAdd 1 and 2.\n\n### Response:\n3</s>",
    "Vicuna": "Be brief. USER: Add 1 and 2. ASSISTANT: 3</s>",
    "HH-RLHF": "Be brief.\n\nHuman: Add 1 and 2.\n\nAssistant: 3",
}


@pytest.mark.parametrize("style", TEXTS)
def test_a_text_with_markers_becomes_turns(tmp_path: Path, style: str) -> None:
    [example] = read(tmp_path, {"text": TEXTS[style], "source": "web"})
    assert example.messages == (SYSTEM, *PAIR)


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("<bos><start_of_turn>user\nAdd 1 and 2.<end_of_turn>\n<start_of_turn>model\n3", PAIR),
        ("<s>[INST] Add 1 and 2. [/INST] 3 </s><s>[INST] And 4? [/INST] 7 </s>", TWO),
        ("### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n3",
         [user("Add.\n\n1, 2"), said("3")]),
        ("<|im_start|>user\nSay ### Human: a ### Assistant: b<|im_end|>\n<|im_start|>assistant\n3",
         [user("Say ### Human: a ### Assistant: b"), said("3")]),
        ("### Human: a### Assistant: Use ### User: and ### GPT: so.### Human: b### Assistant: c",
         [user("a"), said("Use ### User: and ### GPT: so."), user("b"), said("c")]),
        ("### Human: What is ### GPT: for?### Assistant: 3",
         [user("What is ### GPT: for?"), said("3")]),
        ("### User: a### GPT: ### Human: b", [user("a"), said("### Human: b")]),
        ("### Instruction:\na\n\n### Response:\nb\n\n### Input:\nc\n### System: d\n### Note:\ne",
         [user("a"), said("b\n\n### Input:\nc\n### System: d\n### Note:\ne")]),
        ("### System:\nBe brief.\n### Input:\na\n### Response:\nb", [SYSTEM, user("a"), said("b")]),
        ("USER: a ASSISTANT: Begin with SYSTEM: b", [user("a"), said("Begin with SYSTEM: b")]),
        ("<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|><|start_header_id|>assistant"
         "<|end_header_id|>\n\nb<|eom_id|><|start_header_id|>ipython<|end_header_id|>\n\nc<|eot_id|>"
         "<|start_header_id|>assistant<|end_header_id|>\n\nd<|eom_id|>",
         [user("a"), said("b"), {"role": "tool", "content": "c"}, said("d")]),
        ("<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n<eos>",
         [user("a"), said("b")]),
        # Tulu's texts end the answers, and not the questions.
        ("<|user|>\na\n<|assistant|>\nb<|endoftext|>\n<|user|>\nc\n<|assistant|>\nd",
         [user("a"), said("b"), user("c"), said("d")]),
    ],
)  # fmt: skip
def test_what_stands_between_markers_is_the_turn(
    tmp_path: Path, text: str, messages: list[dict[str, Any]]
) -> None:
    [example] = read(tmp_path, {"text": text})
    assert example.messages == tuple(messages)


def test_turns_of_one_role_in_a_text_are_not_joined(tmp_path: Path) -> None:
    row = {"text": "<|user|>\na <|assistant|> b?<|end|>\n<|assistant|>\nc"}
    with pytest.raises(ValueError, match=r"all 1 rows are bad.* are both of the assistant"):
        read(tmp_path, row, on_bad_row="mend")


def test_a_text_of_nothing_but_ends_takes_no_longer(tmp_path: Path) -> None:
    """Twenty thousand ends take milliseconds, where the square of their number took a minute."""
    text = f"### Human: a### Assistant: b{'</s> ' * 20_000}"
    [example] = read(tmp_path, {"text": text})
    assert example.messages == (user("a"), said("b"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Once upon a time.", "has no markers of turns that are known (<|im_start|>user, "),
        ("### Question: a\n### Answer: b", "or learn the whole text (--train_on all)"),
        ("### Human: a", "has no markers of turns"),
        ("### Human: a### Assistant: ### Human: b### Assistant: c", "turn 2, of the assistant, is"),
        ("### Human: a### Assistant: b### Human: c", "must end with the assistant, ends with user"),
        ("<|im_start|>user\na<|im_end|><|im_start|>assistant\nb<|im_end|><|im_start|>cat\nc",
         "has a turn of 'cat'"),
        ("<|user|>\nhow to write <|assistant|> token?<|end|>\n<|assistant|>\nA",
         "turns 2 and 3 are both of the assistant, so one of them may quote a marker; give messag"),
        ("<|user|>\nWhat are <|assistant|> and <|user|> for?<|end|>\n<|assistant|>\nA<|end|>",
         "the marker after turn 1, of the user, stands before that turn has ended; is it quoted"),
        ("<|im_start|>user\nWrite <|im_start|>assistant\nA<|im_end|>", "before that turn has e"),
        ("[INST] a [/INST] b [/INST] c", "turns 2 and 3 are both of the assistant"),
        ("Human: a\n\nHuman: b\n\nAssistant: c", "turns 1 and 2 are both of the user"),
        ("### Instruction:\na\n### Response:\nb\n### Response:\nc", "are both of the assistant"),
        ("### User: a ### GPT: b ### Assistant: c", "of which one may be quoted; give messages"),
        ('<s>[INST] a [/INST][TOOL_CALLS] [{"name": "add"}]</s>[TOOL_RESULTS] 3 [/TOOL_RESULTS] b',
         "'text' has [TOOL_CALLS], which is not read; give messages with 'tool_calls', or learn"),
        ("<s>[AVAILABLE_TOOLS] [][/AVAILABLE_TOOLS][INST] a [/INST] b", "has [AVAILABLE_TOOLS], "),
        ("<s>[INST] a [/INST] b</s>[TOOL_RESULTS] 3 [/TOOL_RESULTS] c", "has [TOOL_RESULTS], "),
    ],
)  # fmt: skip
def test_texts_that_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    assert reason in refused(tmp_path, {"text": text})


@pytest.mark.parametrize(
    ("row", "forgiven"),
    [
        ({"conversations": [{"from": "Human ", "value": "Add 1 and 2."},
                            {"from": " GPT", "value": "3"}]},
         ["role 'Human ' as 'user' (1)", "role ' GPT' as 'assistant' (1)"]),
        ({"Instruction": "Add 1 and 2.", " output": "3", "Input": ""},
         ["column 'Instruction' as 'instruction' (1)", "column ' output' as 'output' (1)"]),
        ({"Question": "Add 1 and 2.", "Answer": "3"}, ["column 'Answer' as 'answer' (1)"]),
        ({"question": "Add 1 and 2.", "Generated Solution": "3"}, ["column 'Generated Solution'"]),
        ({"Messages": [{"Role": "user", "Content": "Add 1 and 2."}, PAIR[1]]},
         ["field 'Role' as 'role' (1)", "column 'Messages' as 'messages' (1)"]),
    ],
)  # fmt: skip
def test_capitals_and_blanks_are_forgiven_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, row: dict[str, Any], forgiven: list[str]
) -> None:
    [example] = read(tmp_path, row)
    assert example.messages == tuple(PAIR)
    [line] = [record.getMessage() for record in caplog.records if "forgiven" in record.getMessage()]
    for what in forgiven:
        assert what in line


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "a", "response": "b", "output": "c"},
         "'output' and 'response' differ; say which is the response with --columns response=NAME"),
        ({"problem": "a", "solution": "b", "answer": "c"}, "'answer' and 'solution' differ"),
        ({"prompt": "a", "question": "b", "response": "c"}, "'prompt' and 'question' differ; say"),
        ({"question": "a", "Output": "b", "output": "c"}, "'output' and 'Output' are one name"),
        ({"instruction": "a", "input": "b", "context": "c", "output": "d"}, "'input' and 'contex"),
        ({"query": "a", "response": "b", "input": "c"}, "'input' is not read; write it into"),
        ({"question": "a", "response": "b", "rejected": "c"}, "'rejected' is not read"),
        ({"question": "a", "response": "b", "Images": ["c"]}, "'Images' is not read; only text is"),
        ({"conversations": SHARED, "system": "a", "custom_instruction": "b"}, "differ; leave one"),
        ({"conversations": [{"from": "cat", "value": "a"}]}, "[0].from' must be one of"),
        ({"conversations": [{"from": "human", "text": "a"}]}, "content' must be a string, got"),
        ({"conversations": {"from": ["human"], "value": []}}, "has lists of 0 and 1 items"),
        ({"conversations": [*SHARED[:1], {"from": "function_call", "value": "add"}]}, "is no JSON"),
        ({"message_tree_id": "t", "prompt": oasst("a", "prompter")}, "has no assistant message"),
        ({"message_tree_id": "t", "prompt": oasst("a", "cat")}, "'prompt.role' must be one of"),
        ({"conversations": [["a", "b"]]}, "'conversations[0]' must be an object with a role"),
        ({"text": "a", "parent_id": None, "message_id": "m", "role": "prompter",
          "message_tree_id": "t"}, "are the messages of trees, each a row"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "--columns response=chosen learns the"),
        ({"a": 1, "b": 2}, "are no known format; the formats known are messages; conversations or"),
        ({"a": 1, "b": 2}, "For others give --columns prompt=NAME,response=NAME or messages=NAME"),
    ],
)  # fmt: skip
def test_what_may_mean_two_things_or_none_is_refused(
    tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    assert reason in refused(tmp_path, row)


def test_columns_that_say_the_same_are_no_contradiction(tmp_path: Path) -> None:
    row = {"instruction": "Add 1 and 2.", "response": "3", "output": "3", "answer": " "}
    assert read(tmp_path, row)[0].messages == tuple(PAIR)


CHOSEN = {"chosen": PAIR, "rejected": [PAIR[0], said("4")]}
GIVEN: list[tuple[str, dict[str, Any], list[dict[str, Any]]]] = [
    ("prompt=ask,response=say,system=sys", {"ask": "Add 1 and 2.", "say": "3", "sys": "Be brief."},
     [SYSTEM, *PAIR]),
    ('{"prompt": "a, b", "response": "c=d"}', {"a, b": "Add 1 and 2.", "c=d": "3"}, PAIR),
    ("response=gold", {"question": "Add 1 and 2.", "gold": "3"}, PAIR),
    ("response=answer", {"question": "Add 1 and 2.", "answer": "3", "response": "4"}, PAIR),
    ("prompt=input,response=output", {"instruction": "Tell.", "input": "Add 1 and 2.",
                                      "output": "3"}, PAIR),
    ("prompt=q,input=more", {"q": "Add", "more": "it.", "answer": "3"},
     [user("Add\n\nit."), said("3")]),
    ("context=facts", {"question": "Many?", "answer": "3", "facts": "Ann has 3."},
     [user("Ann has 3.\n\nMany?"), said("3")]),
    ("response=deepseek_solution,reasoning=deepseek_reasoning",
     {"problem": "Add 1 and 2.", "deepseek_reasoning": "1 + 2", "deepseek_solution": "3"},
     [PAIR[0], said("3", reasoning_content="1 + 2")]),
    ("messages=dialog,role=speaker,content=utterance",
     {"dialog": [{"speaker": "user", "utterance": "Add 1 and 2."},
                 {"speaker": "assistant", "utterance": "3"}]}, PAIR),
    ("messages=chosen", CHOSEN, PAIR),
    ("text=chat", {"chat": TEXTS["Vicuna"]}, [SYSTEM, *PAIR]),
    ("text=chosen", {"chosen": TEXTS["HH-RLHF"], "rejected": "x"}, [SYSTEM, *PAIR]),
    ("tools=functions", {"messages": PAIR, "functions": [TOOL]}, PAIR),
    ("response=chosen", {"prompt": "Add 1 and 2.", "chosen": "3", "rejected": "4"}, PAIR),
    ("response=chosen", {"prompt": "Add 1 and 2.", **CHOSEN}, PAIR),
    ("response=chosen", {"prompt": [PAIR[0]], "chosen": [PAIR[1]], "rejected": [said("4")]}, PAIR),
    ("response=chosen", {"prompt": "Add 1 and 2.", "chosen": [PAIR[1]], "rejected": []}, PAIR),
    ("response=chosen", {"prompt": PAIR[:1], **CHOSEN}, PAIR),
    ("response=chosen", CHOSEN, PAIR),
    ("response=chosen", {"chosen": TEXTS["HH-RLHF"], "rejected": "x"}, [SYSTEM, *PAIR]),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "row", "messages"), GIVEN)
def test_columns_that_are_given(
    tmp_path: Path, columns: str, row: dict[str, Any], messages: list[dict[str, Any]]
) -> None:
    [example] = read(tmp_path, row, columns=columns)
    assert example.messages == tuple(messages)
    assert example.learnt is None
    assert (example.tools is not None) == ("tools" in columns)


def test_only_the_last_answer_of_a_chosen_conversation_is_learnt(tmp_path: Path) -> None:
    row = {"prompt": "And 4?", "chosen": TWO, "rejected": PAIR}
    [example] = read(tmp_path, row, columns="response=chosen")
    assert example.messages == tuple(TWO)
    assert example.learnt == (False, False, False, True)
    reason = refused(tmp_path, {**row, "prompt": "Other?"}, columns="response=chosen")
    assert "'prompt' is not the prompt in 'chosen', but another text" in reason
    reason = refused(tmp_path, {**row, "prompt": [user("Other?")]}, columns="response=chosen")
    assert "'prompt' is not the prompt in 'chosen'" in reason


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ("promt=a", "expected NAME=COLUMN with messages, role, content, prompt"),
        ("a", "got 'a'"),
        ("", "got ''"),
        ("prompt=", "expected a column's name after 'prompt='"),
        ("prompt= ,response=b", "expected a column's name after 'prompt='"),
        ("prompt=a,prompt=b", "expected each name once, got prompt=b beside prompt=a"),
        ("prompt=a,response=a", "expected each name once, got response=a beside prompt=a"),
        ('{"prompt": "a", "prompt": "b"}', "expected each name once"),
        ('{"prompt": 3}', "expected a column's name after 'prompt='"),
        ('{"prompt"', "is no JSON"),
        ("messages=a,response=b", "expected messages, a text, or a prompt and a response, got me"),
        ("prompt=a,role=b", "role and content are of messages; beside prompt leave them out"),
    ],
)
def test_names_of_columns_that_are_refused_before_reading(columns: str, reason: str) -> None:
    with pytest.raises(ValueError, match=r"^columns: ") as caught:
        parse_columns(columns)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "row", "reason"),
    [
        ("prompt=ask", {"question": "a", "answer": "b"}, "--columns prompt=ask: no row has"),
        ("prompt=ask", {"ask": "a", "say": "b"}, "--columns does not name a response"),
        ("response=a", {"question": "q", "a": ["b"]}, "'a[0]' must be an object with a role"),
        ("role=speaker", {"question": "a", "answer": "b"}, "nothing reads role of the format 'qu"),
        ("system=s", {"input_ids": [1, 2], "labels": [1, 2], "s": "a"}, "nothing reads system of"),
    ],
)  # fmt: skip
def test_given_columns_that_the_data_lack(
    tmp_path: Path, columns: str, row: dict[str, Any], reason: str
) -> None:
    assert reason in refused(tmp_path, row, columns=columns)


# The last one says whether the conversation is read without being mended, too.
SHAPES: list[tuple[list[dict[str, Any]], list[dict[str, Any]], str, bool]] = [
    ([*PAIR, user("And?")], PAIR, "what follows the last answer, cut", False),
    ([said("Hello."), *PAIR], PAIR, "answers before the first question, left out", False),
    ([SYSTEM, said("Hello."), *PAIR], [SYSTEM, *PAIR],
     "answers before the first question, left out", True),
    ([user("Add 1"), user("and 2."), said("3")], [user("Add 1\n\nand 2."), said("3")],
     "neighbours of one role, joined", True),
    ([PAIR[0], said("3"), said("!")], [PAIR[0], said("3\n\n!")],
     "neighbours of one role, joined", True),
    ([*PAIR, user(" "), said("7")], PAIR, "an empty turn, cut with what follows", False),
    ([*PAIR, user("And 4?"), said(None)], PAIR, "an empty turn, cut with what follows", False),
    ([{"role": "system", "content": ""}, *PAIR], PAIR, "an empty system prompt, left out", False),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "mended", "rule", "readable"), SHAPES)
def test_conversations_are_mended_where_that_is_asked_for(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    messages: list[dict[str, Any]],
    mended: list[dict[str, Any]],
    rule: str,
    readable: bool,
) -> None:
    rows = [{"messages": messages}, {"messages": PAIR}, {"messages": PAIR[:1]}]
    one, two = read(tmp_path, *rows, on_bad_row="mend")
    assert one.messages == tuple(mended)
    assert one.content_hash == content_hash({"messages": mended})
    assert two.content_hash == content_hash({"messages": PAIR})
    assert f"{rule} (1)" in caplog.text
    if readable:
        assert read(tmp_path, *rows[:1])[0].messages == tuple(messages)
    else:
        assert "messages" in refused(tmp_path, *rows[:1])


@pytest.mark.parametrize("first", [SYSTEM, {"role": "tool", "content": "1"}])
def test_an_answer_may_come_first_after_a_system_prompt_or_a_tool(
    tmp_path: Path, first: dict[str, Any]
) -> None:
    rows = [{"messages": [first, said("Hello.")]}, {"messages": [first, said("Hello."), *PAIR]}]
    one, two = read(tmp_path, *rows)
    assert one.messages == (first, said("Hello."))
    assert (one.learnt, two.learnt) == (None, None)
    [mended] = read(tmp_path, rows[0], on_bad_row="mend")
    assert mended.messages == one.messages


@pytest.mark.parametrize("messages", [[said("3")], [said("3"), user("a")], [said("3"), said("4")]])
@pytest.mark.parametrize("on_bad_row", ["error", "mend"])
def test_mending_is_not_named_where_it_leaves_nothing(
    tmp_path: Path, messages: list[dict[str, Any]], on_bad_row: Any
) -> None:
    with pytest.raises(ValueError, match=r"data\.jsonl") as caught:
        read(tmp_path, {"messages": messages}, on_bad_row=on_bad_row)
    assert "--on_bad_row mend" not in str(caught.value)
    assert "no answer follows a question" in str(caught.value) or on_bad_row == "mend"


def test_only_the_answer_to_a_list_of_messages_is_learnt(tmp_path: Path) -> None:
    for row in (
        {"prompt": TWO[:3], "completion": "7"},
        {"conversations": SHARED[:3], "answer": "7"},
    ):
        [example] = read(tmp_path, row)
        assert example.messages == tuple(TWO)
        assert example.learnt == (False, False, False, True)
    thought = {"messages": PAIR[:1], "answer": "3", "reasoning": "1 + 2"}
    columns = "prompt=messages,response=answer,reasoning=reasoning"
    [example] = read(tmp_path, thought, columns=columns)
    assert example.messages == (PAIR[0], said("3", reasoning_content="1 + 2"))
    # An answer beside a whole conversation is not its answer.
    assert read(tmp_path, {"messages": PAIR, "answer": "4"})[0].messages == tuple(PAIR)


def test_what_cannot_be_joined_stays_apart(tmp_path: Path) -> None:
    masked = [PAIR[0], said("3", weight=0), said("!", weight=1)]
    calls = [PAIR[0], CALLED, {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"},
             said("3")]  # fmt: skip
    one, two = read(tmp_path, {"messages": masked}, {"messages": calls}, on_bad_row="mend")
    assert one.learnt == (False, False, True)
    assert two.messages == tuple(calls)


LEARNT: dict[str, list[str]] = {
    "messages": ["3<|im_end|>"],
    "prompt": ["3<|im_end|>"],
    "instruction": ["3<|im_end|>"],
    "question": ["3<|im_end|>"],
    "conversations": ["3<|im_end|>"],
    "query": ["3<|im_end|>"],
    "problem": ["3<|im_end|>"],
    "inputs": ["3<|im_end|>"],
    "input": ["3<|im_end|>"],
    "tree": ["3<|im_end|>"],
    "text": ["3<|im_end|>"],
    "data": ["3<|im_end|>"],
}


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_the_example_of_each_format_decodes_to_its_answer(tmp_path: Path, form: Any) -> None:
    examples = read(tmp_path, form.example)
    tokenizer = tokenizer_of(CHATML)
    [row] = tokenize_examples(examples, tokenizer, disable_progress=True)
    if form.name == "tokens":
        assert list(row["labels"]) == [-100, 6, 7]
    else:
        assert responses(row, tokenizer) == LEARNT[form.name]


@pytest.mark.parametrize(
    ("row", "template", "learnt"),
    [
        ({"conversations": SHARED}, CHATML, ["3<|im_end|>", "7<|im_end|>"]),
        ({"conversations": [*SHARED[:1], {**SHARED[1], "weight": 0}, *SHARED[2:]]}, CHATML,
         ["7<|im_end|>"]),
        ({"system": "Be brief.", "conversations": SHARED[:2]}, CHATML, ["3<|im_end|>"]),
        ({"messages": [PAIR[0], {**PAIR[1], "reasoning": "1 + 2"}]}, QWEN3,
         ["<think>\n1 + 2\n</think>\n\n3<|im_end|>"]),
        ({"messages": [PAIR[0], said("<think>\n1 + 2\n</think>\n\n3")]}, QWEN3,
         ["<think>\n1 + 2\n</think>\n\n3<|im_end|>"]),
        (PUBLISHED["OASST, trees"][0], CHATML, ["3<|im_end|>", "7<|im_end|>"]),
        ({"text": TEXTS["ChatML"]}, PLAIN_TEMPLATE, ["3</s>"]),
        (PUBLISHED["LLaMA-Factory's tools"][0],
         "{{ tools | tojson }}" + CHATML.replace("{{ m.content }}<|im_end|>",
                        "{{ m.content }}{% for c in m.tool_calls %}call {{ c.name }} "
                        "{{ c.arguments | tojson }}{% endfor %}<|im_end|>"),
         ['call add {"a": 1, "b": 2}<|im_end|>', "3<|im_end|>"]),
    ],
)  # fmt: skip
def test_what_is_learnt_decodes_to_the_answers(
    tmp_path: Path, row: dict[str, Any], template: str, learnt: list[str]
) -> None:
    tokenizer = tokenizer_of(template)
    [tokens] = tokenize_examples(read(tmp_path, row), tokenizer, disable_progress=True)
    assert responses(tokens, tokenizer) == learnt


@pytest.mark.parametrize("row", [{"text": "Once upon a time."}, {"story": "Once upon a time."}])
def test_a_whole_text_is_learnt_with_its_end(tmp_path: Path, row: dict[str, Any]) -> None:
    columns = "text=story" if "story" in row else ""
    [example] = read(tmp_path, {**row, "id": 7}, columns=columns, train_on="all")
    assert (example.text, example.messages) == ("Once upon a time.", None)
    assert response_length(example) == 17
    assert example.content_hash == content_hash({"text": "Once upon a time."}) or columns
    tokenizer = tokenizer_of(None)
    [tokens] = tokenize_examples([example], tokenizer, disable_progress=True)
    assert tokenizer.decode(tokens["input_ids"]) == "Once upon a time.</s>"
    assert tokens["labels"] == tokens["input_ids"]


def test_a_whole_text_needs_a_text(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"--train_on all learns a column 'text', got \['messages'"
    ):
        read(tmp_path, {"messages": PAIR}, train_on="all")
    with pytest.raises(ValueError, match=r"^train_on: expected 'responses' or 'all', got 'some'"):
        read(tmp_path, {"text": "a"}, train_on="some")


def test_every_side_is_explained() -> None:
    assert all(SIDES.values())
