"""Write the report as a file: sections of text, tables and pictures, all text escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from markupsafe import Markup

from sftmix.report.drawing import LeftOut, Picture
from sftmix.runs.folders import atomic_write


@dataclass(frozen=True)
class Table:
    """A table of cells as they are shown; the first column names the row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = "Results"
    notes: Sequence[str] = ()

    def text(self) -> str:
        """Return the table as plain text, the first column left and the others right."""
        lines = [self.columns, *self.rows]
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )


@dataclass(frozen=True)
class Section:
    """A part of the page; it ends with what was left out. Tables in `folded` are shown closed.

    `blocks` are elements of the page as they are, whose text is escaped already.
    """

    title: str
    paragraphs: Sequence[str] = ()
    warnings: Sequence[str] = ()
    tables: Sequence[Table] = ()
    parts: Sequence[Picture | LeftOut] = ()
    commands: Sequence[str] = ()
    folded: Sequence[Table] = ()
    blocks: Sequence[Markup] = ()

    @property
    def pictures(self) -> list[Picture]:
        """The parts that could be drawn."""
        return [part for part in self.parts if isinstance(part, Picture)]

    @property
    def left_out(self) -> list[LeftOut]:
        """The parts that could not."""
        return [part for part in self.parts if isinstance(part, LeftOut)]


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    paragraphs: Sequence[str] = ()
    sections: Sequence[Section] = field(default=())


def write_page(path: Path, page: Page) -> None:
    """Write the report, atomically; all text is escaped.

    Raises:
        OSError: the file cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    html = environment.get_template("template.html").render(page=page)
    atomic_write(path, lambda file: file.write_text(html, encoding="utf-8"))
