"""Write the formats into docs/data.md, and docs/formats.md: rows, and what is learnt of each.

python -m tools.formats_page
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sftmix.conventions import IGNORE_INDEX
from sftmix.data.examples import Example
from sftmix.data.formats import FORMATS, format_of, read_content
from sftmix.data.messages import Notes
from sftmix.templates.tokenizing import tokenize_examples
from tests.sftmix.data.published import PUBLISHED

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- formats: python -m tools.formats_page -->", "<!-- end of the formats -->"
# ChatML with thoughts, calls and tools.
TEMPLATE = """\
{%- if tools %}{{ tools | tojson }}{{ '\\n' }}{% endif %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}
    {{- m.content or '' }}
    {%- for call in m.tool_calls or () %}{{ call | tojson }}{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
HEADING = """# Public data sets

An example of each in the shape in which it is published, written for the tests, and what is learnt
of it under ChatML: the decoded tokens that carry loss, one text for each answer. All are read
without an option. [Data](data.md#formats) has the formats; `--columns` names the columns of others.

| data | an example | learnt |
|---|---|---|
"""


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(["</s>", *alphabet])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    made.chat_template = TEMPLATE
    return made


def learnt(row: dict[str, Any]) -> list[str]:
    """Return what is learnt of a row: the text of each answer, or its tokens if it has some."""
    content = read_content(row, format_of([row]), Notes())
    example = Example(0, "example:1", content.digest(), **vars(content))
    tokenizer = bytes_tokenizer()
    [tokens] = tokenize_examples([example], tokenizer, disable_progress=True)
    runs = itertools.groupby(tokens["labels"], key=lambda label: label != IGNORE_INDEX)
    labels = [list(run) for is_learnt, run in runs if is_learnt]
    if content.input_ids is not None:
        return [", ".join(map(str, run)) for run in labels]
    return [str(tokenizer.decode(run)) for run in labels]


def code(*texts: str) -> str:
    """Return texts as code in a cell of a table."""
    return "<br>".join("`" + text.replace("|", "\\|").replace("\n", "\\n") + "`" for text in texts)


def formats() -> str:
    """Return the formats in Markdown."""
    lines = ["| columns | an example | becomes | learnt |", "|---|---|---|---|"]
    lines += [
        f"| {code(one.columns())} | {code(json.dumps(one.example))} | {one.says} | "
        f"{code(*learnt(one.example))} |"
        for one in FORMATS
    ]
    return "\n".join(lines)


def pages() -> dict[Path, str]:
    """Return the pages as they are now."""
    data = DOCS / "data.md"
    before, _, rest = data.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    rows = "".join(
        f"| {name} | {code(json.dumps(row))} | {code(*learnt(row))} |\n"
        for name, (row, _) in PUBLISHED.items()
    )
    return {
        data: f"{before}{BEGIN}\n\n{formats()}\n\n{END}{after}",
        DOCS / "formats.md": HEADING + rows,
    }


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
