"""Read a text whose turns stand between markers, as chat templates write them.

A style is taken if its markers of the user and of the assistant both stand in the text; of several
the one that begins first. What precedes the first marker is the system message. Blanks around a
turn, and the tokens that end it, belong to the markers.

Markers of words may be quoted in a turn, so those of another pair, and those at another place than
their own, are text. Where a marker may be either, the text is refused.
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
_STYLES = {shown: (literal, re.compile(pattern)) for shown, (literal, pattern) in STYLES.items()}
# Styles of tokens that end every turn, and those of words, which texts may quote.
_ENDED = ("<|im_start|>user", "<|start_header_id|>user<|end_header_id|>", "<start_of_turn>user")
_OF_WORDS = ("### Human:", "### Instruction:", "USER:", "Human:")
# Markers of calls and of tools, of which no turn is made.
_OF_TOOLS = {
    "[INST]": ("[TOOL_CALLS]", "[TOOL_RESULTS]", "[AVAILABLE_TOOLS]"),
    "<|user|>": ("<|tool_call|>", "<|tool_response|>", "<|/tool|>"),
}
_OR_WHOLE = "or learn the whole text (--train_on all)"
_WORDS = {
    **dict.fromkeys(("[inst]", "instruction", "input"), "user"),
    **dict.fromkeys(("[/inst]", "response"), "assistant"),
    "[system_prompt]": "system",
}
_ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>"),
    *("<|end_of_text|>", "<eos>", "</s>", "[/SYSTEM_PROMPT]"),
)
_BEGINNINGS = re.compile(r"^\s*(?:<s>|<bos>|<\|begin_of_text\|>)")
_SYSTEM = re.compile(r"\s*<<SYS>>(.*?)<</SYS>>", re.DOTALL)


def marked_turns(text: str, name: str, notes: Notes) -> tuple[Messages, Masks]:
    """Return the turns between a text's markers, not yet checked to be a conversation.

    Raises:
        BadField: the text has no markers that are known, an unknown role, an empty turn, two turns
            of one role in a row, a turn that does not end before the next, or calls of tools.
    """
    found = []
    for shown, (literal, style) in _STYLES.items():
        marks = list(style.finditer(text)) if literal in text else []
        if shown in _OF_WORDS:
            marks = _placed(marks)
        if {"user", "assistant"} <= {_role(mark[1]) for mark in marks}:
            found.append((marks[0].start(), shown, marks))
    if not found:
        raise BadField(
            f"'{name}' has no markers of turns that are known ({', '.join(STYLES)}); name the "
            f"columns (--columns prompt=NAME,response=NAME), {_OR_WHOLE}"
        )
    begin, shown, marks = min(found, key=lambda one: one[0])
    for marker in _OF_TOOLS.get(shown, ()):
        if marker in text:
            raise BadField(
                f"'{name}' has {marker}, which is not read; give messages with 'tool_calls', "
                f"{_OR_WHOLE}"
            )
    if shown == "### Human:" and "User" in {mark[1] for mark in marks}:
        both = {"Assistant", "GPT"} & {mark[1] for mark in _STYLES[shown][1].finditer(text)}
        if len(both) == 2:
            raise BadField(
                f"'{name}' has markers of '### Assistant:' and of '### GPT:', of which one may be "
                f"quoted; give messages, {_OR_WHOLE}"
            )
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    pieces = [(mark[1], text[mark.end() : end]) for mark, end in zip(marks, ends, strict=True)]
    messages = _messages(text[:begin], pieces)
    _check(messages, name, notes)
    _check_ends(pieces, shown in _ENDED, name)
    return tuple(messages), [None] * len(messages)


def _placed(marks: list[re.Match[str]]) -> list[re.Match[str]]:
    """Return the markers of words that separate turns; any others are quoted in a turn.

    The system's stands first, Alpaca's input after its instruction, and a user's and an assistant's
    are of the pair that the text begins with.
    """
    words = [mark[1].lower() for mark in marks]
    users = [word for word in words if _role(word) == "user" and word != "input"]
    answers = [word for word in words if _role(word) == "assistant"]
    if users[:1] == ["human"] and "assistant" in answers:
        answers = ["assistant"]  # Guanaco's own pair; its variants are quoted
    pair = {*users[:1], *answers[:1]}
    kept: list[re.Match[str]] = []
    for mark, word in zip(marks, words, strict=True):
        before = kept[-1][1].lower() if kept else "system"
        if word == "input":
            fits = before in ("system", "instruction")
        elif _role(word) == "system":
            fits = not kept
        else:
            fits = word in pair or _role(word) == "tool"
        if fits:
            kept.append(mark)
    return kept


def _check(messages: Messages | list[dict[str, Any]], name: str, notes: Notes) -> None:
    before = ""
    for i, message in enumerate(messages):
        role = message["role"]
        if role not in ROLES:
            raise BadField(f"'{name}' has a turn of {role!r:.60}; expected {', '.join(ROLES)}")
        if not (message["content"] or role == "tool" or notes.mend):
            raise BadField(f"'{name}': turn {i + 1}, of the {role}, is empty")
        if role == before != "tool":
            raise BadField(
                f"'{name}': turns {i} and {i + 1} are both of the {role}, so one of them may quote "
                f"a marker; give messages, {_OR_WHOLE}"
            )
        before = role


def _check_ends(pieces: list[tuple[str, str]], always: bool, name: str) -> None:
    """Refuse a turn that goes on to the next marker where others of its role end with a token."""
    ended = [piece.rstrip().endswith(_ENDS) for _, piece in pieces]
    roles = [_role(word) for word, _ in pieces]
    ending = {role for role, ends in zip(roles, ended, strict=True) if ends or always}
    for i, (role, ends) in enumerate(zip(roles[:-1], ended[:-1], strict=True)):
        if role in ending and not ends:
            raise BadField(
                f"'{name}': the marker after turn {i + 1}, of the {role}, stands before that turn "
                f"has ended; is it quoted there? Give messages, {_OR_WHOLE}"
            )


def _messages(lead: str, pieces: list[tuple[str, str]]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    system = _bare(lead)
    for word, piece in pieces:
        text = piece
        if not messages and (inside := _SYSTEM.match(text)):
            system = "\n\n".join(filter(None, (system, _bare(inside[1]))))
            text = text[inside.end() :]
        text = _bare(text)
        if word.lower() == "input" and messages and messages[-1]["role"] == "user":
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
