"""Rows in the shapes in which public data sets are published, for the tests and the docs."""

from __future__ import annotations

import json
from typing import Any

from tests.sftmix.chats import said, user

SYSTEM = {"role": "system", "content": "Be brief."}
PAIR = [user("Add 1 and 2."), said("3")]
TWO = [*PAIR, user("And 4?"), said("7")]
SHARED = [
    {"from": "human", "value": "Add 1 and 2."},
    {"from": "gpt", "value": "3"},
    {"from": "human", "value": "And 4?"},
    {"from": "gpt", "value": "7"},
]
CALL = {"name": "add", "arguments": {"a": 1, "b": 2}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def oasst(text: str, role: str = "assistant", *replies: dict[str, Any], **more: Any) -> Any:
    return {"message_id": text, "text": text, "role": role, "replies": list(replies), **more}


TREE = oasst(
    "Add 1 and 2.",
    "prompter",
    oasst("4", rank=1),
    oasst("5", rank=0, deleted=True),
    oasst(
        "3",
        "assistant",
        oasst("Thanks.", "prompter", rank=1),
        oasst("And 4?", "prompter", oasst("8", rank=None), oasst("7", rank=0), rank=0),
        rank=0,
    ),
)
PUBLISHED: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "ShareGPT": ({"id": "x_0", "conversations": SHARED}, TWO),
    "ShareGPT, older roles": (
        {
            "conversations": [
                {"from": "user", "value": "Add 1 and 2."},
                {"from": "chatgpt", "value": "3"},
                {"from": "human", "value": "And 4?"},
                {"from": "bing", "value": "7"},
            ]
        },
        TWO,
    ),
    "OpenHermes 2.5": (
        {
            **{"custom_instruction": True, "topic": None, "model_name": None, "model": "gpt-4"},
            **{"skip_prompt_formatting": False, "category": "riddle", "source": "airoboros2.2"},
            "conversations": [
                {"from": "system", "value": "Be brief.", "weight": None},
                {"from": "human", "value": "Add 1 and 2.", "weight": None},
                {"from": "gpt", "value": "3", "weight": None},
            ],
            "system_prompt": "Be brief.",
        },
        [SYSTEM, *PAIR],
    ),
    "OpenHermes": ({"instruction": "Add 1 and 2.", "input": "", "output": "3"}, PAIR),
    "SlimOrca": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief.", "weight": None},
                {"from": "human", "value": "Add 1 and 2.", "weight": 0.0},
                {"from": "gpt", "value": "3", "weight": 1.0},
            ]
        },
        [SYSTEM, *PAIR],
    ),
    "WizardLM v2": ({"idx": "q", "conversations": SHARED[:2]}, PAIR),
    "WizardLM": ({"instruction": "Add 1 and 2.", "output": "3"}, PAIR),
    "Magpie": (
        {
            **{"uuid": "u", "model": "m", "gen_input_configs": {"temperature": 1.0}},
            **{"instruction": "Add 1 and 2.", "response": "3", "instruction_length": 12},
            "conversations": SHARED,  # of several turns; the columns beside hold the first
        },
        TWO,
    ),
    "OpenThoughts": (
        {
            "system": "Be brief.",
            "conversations": [
                {"from": "user", "value": "Add 1 and 2."},
                {"from": "assistant", "value": "<|begin_of_thought|>1 + 2<|end_of_thought|>3"},
            ],
        },
        [SYSTEM, PAIR[0], said("<|begin_of_thought|>1 + 2<|end_of_thought|>3")],
    ),
    "LIMA": ({"conversations": ["Add 1 and 2.", "3", "And 4?", "7"], "source": "multi"}, TWO),
    "Dolly": (
        {"instruction": "How many?", "context": "Ann has 3.", "response": "3", "category": "qa"},
        [user("How many?\n\nAnn has 3."), said("3")],
    ),
    "Dolly without a context": (
        {"instruction": "Add 1 and 2.", "context": "", "response": "3", "category": "open_qa"},
        PAIR,
    ),
    "Guanaco": (
        {"text": "### Human: Add 1 and 2.### Assistant: 3### Human: And 4?### Assistant: 7"},
        TWO,
    ),
    "MetaMath": (
        {
            **{"type": "MATH_AnsAug", "original_question": "What is 1 + 2?"},
            **{"query": "Add 1 and 2.", "response": "3"},
        },
        PAIR,
    ),
    "OpenOrca": (
        {"id": "cot.1", "system_prompt": "Be brief.", "question": "Add 1 and 2.", "response": "3"},
        [SYSTEM, *PAIR],
    ),
    "OpenOrca without a system prompt": (
        {"id": "cot.1", "system_prompt": "", "question": "Add 1 and 2.", "response": "3"},
        PAIR,
    ),
    "OpenMathInstruct-1": (
        {
            **{"question": "Add 1 and 2.", "generated_solution": "3", "expected_answer": "3"},
            **{"predicted_answer": "3", "error_message": "", "is_correct": True, "dataset": "math"},
        },
        PAIR,
    ),
    "OpenMathInstruct-2": (
        {"problem": "Add 1 and 2.", "generated_solution": "3", "expected_answer": "3"},
        PAIR,
    ),
    "MATH": ({"problem": "Add 1 and 2.", "level": "Level 1", "solution": "3"}, PAIR),
    "OASST, trees": ({"message_tree_id": "t", "tree_state": "ready", "prompt": TREE}, TWO),
    "OASST, the root of a tree": (TREE, TWO),
    "UltraChat-200K": ({"prompt": "Add 1 and 2.", "prompt_id": "p", "messages": TWO}, TWO),
    "UltraChat": ({"id": "0", "data": ["Add 1 and 2.", "3", "And 4?", "7"]}, TWO),
    "Tulu-3": ({"id": "t_0", "messages": [SYSTEM, *PAIR], "source": "ai2"}, [SYSTEM, *PAIR]),
    "Tulu-3's personas": (
        {"id": "p", "prompt": "Add 1 and 2.", "messages": PAIR, "constraints": ["short"]},
        PAIR,
    ),
    "MedAlpaca": (
        {"instruction": "Answer truthfully.", "input": "Is it 3?", "output": "Yes."},
        [user("Answer truthfully.\n\nIs it 3?"), said("Yes.")],
    ),
    "MedAlpaca, input last": (
        {"output": "Yes.", "instruction": "Is it 3?", "input": None, "__index_level_0__": 7},
        [user("Is it 3?"), said("Yes.")],
    ),
    "Alpaca with its text": (
        {
            **{"instruction": "Add 1 and 2.", "input": "", "output": "3"},
            "text": "Below is one.\n\n### Instruction:\nAdd 1 and 2.\n\n### Response:\n3",
        },
        PAIR,
    ),
    "FLAN": ({"inputs": "Add 1 and 2.", "targets": "3", "task": "sums"}, PAIR),
    "Natural instructions": ({"input": "Add 1 and 2.", "output": "3"}, PAIR),
    "Capybara": (
        {"source": "s", "conversation": [{"input": "Add 1 and 2.", "output": "3"}]},
        PAIR,
    ),
    "turns with a system prompt": (
        {"conversation": [{"input": "Add 1 and 2.", "output": "3", "system": "Be brief."}]},
        [SYSTEM, *PAIR],
    ),
    "MOSS, as Firefly has it": (
        {"conversation": [{"human": "Add 1 and 2.", "assistant": "3"}], "category": "sums"},
        PAIR,
    ),
    "LLaMA-Factory's tools": (
        {
            "conversations": [
                {"from": "human", "value": "Add 1 and 2."},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "3"},
            ],
            "system": "Be brief.",
            "tools": json.dumps([TOOL]),
        },
        [SYSTEM, PAIR[0], CALLED, {"role": "tool", "content": "3"}, PAIR[1]],
    ),
    "OpenAI's older calls": (
        {
            "messages": [
                PAIR[0],
                {
                    "role": "assistant",
                    "content": None,
                    "function_call": {**CALL, "arguments": json.dumps(CALL["arguments"])},
                },
                {"role": "function", "name": "add", "content": "3"},
                PAIR[1],
            ]
        },
        [PAIR[0], CALLED, {"role": "tool", "name": "add", "content": "3"}, PAIR[1]],
    ),
    "reasoning": (
        {"messages": [PAIR[0], {**PAIR[1], "reasoning": "1 + 2"}]},
        [PAIR[0], said("3", reasoning_content="1 + 2")],
    ),
    "messages as JSON text": ({"messages": json.dumps(PAIR)}, PAIR),
    "a sequence as datasets reads it": (
        {"conversations": {"from": ["human", "gpt"], "value": ["Add 1 and 2.", "3"]}},
        PAIR,
    ),
    "parts": (
        {"messages": [user([{"type": "input_text", "text": "Add 1 and 2."}]), PAIR[1]]},  # type: ignore[arg-type]
        PAIR,
    ),
    "parts, as Gemini and Bedrock have them": (
        {
            "messages": [
                {"role": "user", "parts": [{"text": "Add 1 and 2."}]},
                {"role": "model", "parts": [{"text": "3"}]},
            ]
        },
        PAIR,
    ),
    "Nemotron": (
        {
            **{"input": PAIR[:1], "output": "3", "category": "math", "reasoning": "off"},
            **{"generator": "m", "used_in_training": "yes", "system_prompt": "Be brief."},
        },
        [SYSTEM, *PAIR],
    ),
    "Dolphin-R1": ({"messages": [SYSTEM, PAIR[0]], "answer": "3", "model": "m"}, [SYSTEM, *PAIR]),
}
