"""Bring pages and pictures from outside of `docs/` into the site: a hook of `mkdocs.yml`.

README.md and its like stay where a forge looks for them. The site has a page under its path in the
repository, without `docs/`; links between files of the repository are rewritten to that.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"),
    *("recipes/README.md", "benchmarks/RESULTS.md"),
)
# The path in a link or a picture, but for addresses and headings of the same page.
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def place(file: Path) -> str:
    """Return where a file of the repository is in the site."""
    return file.relative_to(ROOT).as_posix().removeprefix("docs/")


def linked(page: Path) -> set[Path]:
    """Return the files of the repository that a page links to."""
    found = {(page.parent / path).resolve() for path in LINK.findall(page.read_text("utf-8"))}
    return {file for file in found if file.is_file()}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages, and what any page links to."""
    from mkdocs.structure.files import File

    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / page for page in PAGES)]
    for file in sorted({*pages, *(one for page in pages for one in linked(page))}):
        if place(file) not in files.src_uris:
            made = File.generated(config, place(file), abs_src_path=str(file))
            files.append(made)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a page to where their files are in the site."""
    source = Path(page.file.abs_src_path)
    folder = os.path.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        target = (source.parent / link[1]).resolve()
        return os.path.relpath(place(target), folder or ".")

    return LINK.sub(moved, markdown)
