"""Read a text whose turns stand between markers, as chat templates write them.

A style is taken if its markers of the user and of the assistant both stand in the text; of several
the one that begins first. What precedes the first marker is the system message. Blanks around a
turn, and the tokens that end it, belong to the markers.
"""

from __future__ import annotations

import re
from typing import Any

from sftmix.data.messages import ROLES, SYNONYMS, BadField, Masks, Messages, Notes

# Each marker as it is shown, what stands in every text that has it, and a pattern whose group is
# the word that names the role.
STYLES = {
    "<|im_start|>user": ("<|im_start|>", r"<\|im_start\|>[ \t]*(\w+)[ \t]*(?:\n|$)"),
    "<|start_header_id|>user<|end_header_id|>": (
        "<|start_header_id|>",
        r"<\|start_header_id\|>(\w+)<\|end_header_id\|>",
    ),
    "<start_of_turn>user": ("<start_of_turn>", r"<start_of_turn>(\w+)\s"),
    "<|user|>": ("<|user|>", r"<\|(system|user|assistant|tool|observation)\|>"),
    "[INST]": ("[/INST]", r"(?:<s>\s*)?(\[(?:/?INST|SYSTEM_PROMPT)\])"),
    "### Human:": ("###", r"###[ \t]*(System|Human|User|Assistant|GPT)[ \t]*:"),
    "### Instruction:": (
        "###",
        r"(?:^|\n)[ \t]*###[ \t]*(System|Instruction|Input|Response)[ \t]*:",
    ),
    "USER:": (
        "ASSISTANT:",
        r"(?:^|(?<=\s)|(?<=</s>))(SYSTEM|USER|ASSISTANT|FUNCTION RESPONSE):",
    ),
    "Human:": ("\nAssistant:", r"(?:^|\n)[ \t]*(System|Human|Assistant):"),
}
_STYLES = [(literal, re.compile(pattern)) for literal, pattern in STYLES.values()]
_WORDS = {
    **dict.fromkeys(("[inst]", "instruction", "input"), "user"),
    **dict.fromkeys(("[/inst]", "response"), "assistant"),
    "[system_prompt]": "system",
}
_ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>"),
    *("</s>", "[/SYSTEM_PROMPT]"),
)
_BEGINNINGS = re.compile(r"^\s*(?:<s>|<bos>|<\|begin_of_text\|>)")
_SYSTEM = re.compile(r"\s*<<SYS>>(.*?)<</SYS>>", re.DOTALL)


def marked_turns(text: str, name: str, notes: Notes) -> tuple[Messages, Masks]:
    """Return the turns between a text's markers, not yet checked to be a conversation.

    Raises:
        BadField: the text has no markers that are known, an unknown role, or an empty turn.
    """
    found = []
    for literal, style in _STYLES:
        pieces = style.split(text) if literal in text else []
        if {"user", "assistant"} <= {_role(word) for word in pieces[1::2]}:
            found.append(pieces)
    if not found:
        raise BadField(
            f"'{name}' has no markers of turns that are known ({', '.join(STYLES)}); name the "
            "columns (--columns prompt=NAME,response=NAME), or learn the whole text "
            "(--train_on all)"
        )
    lead, *pieces = min(found, key=lambda pieces: len(pieces[0]))
    messages = _messages(lead, pieces)
    for i, message in enumerate(messages):
        if message["role"] not in ROLES:
            raise BadField(
                f"'{name}' has a turn of {message['role']!r:.60}; expected {', '.join(ROLES)}"
            )
        if not (message["content"] or message["role"] == "tool" or notes.mend):
            raise BadField(f"'{name}': turn {i + 1}, of the {message['role']}, is empty")
    return tuple(messages), [None] * len(messages)


def _messages(lead: str, pieces: list[str]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    system = _bare(lead)
    for word, piece in zip(pieces[::2], pieces[1::2], strict=True):
        text = piece
        if not messages and (inside := _SYSTEM.match(text)):
            system = "\n\n".join(filter(None, (system, _bare(inside[1]))))
            text = text[inside.end() :]
        text = _bare(text)
        if word.lower() == "input" and messages:
            # Alpaca's input follows the instruction after an empty line.
            messages[-1]["content"] += f"\n\n{text}" if text else ""
        else:
            messages.append({"role": _role(word), "content": text})
    # A template that asks for the next answer ends with its marker.
    if messages and messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return [{"role": "system", "content": system}, *messages] if system else messages


def _role(word: str) -> str:
    word = word.lower().replace(" ", "_")
    return _WORDS.get(word) or SYNONYMS.get(word, word)


def _bare(text: str) -> str:
    text = _BEGINNINGS.sub("", text).rstrip()
    end = len(text)
    while found := next((one for one in _ENDS if text.endswith(one, 0, end)), None):
        end -= len(found)
        while end and text[end - 1].isspace():
            end -= 1
    return text[:end].lstrip()
