"""`sftmix report`: compare runs in one self-contained HTML file.

- `runs`: what is read of a run, and which runs differ only in their seed
- `tables`: the comparison, the paper's figures, what differs, recipes
- `curves`, `confidence`, `mixing`, `representations`: the pictures, drawn by `drawing`
- `measured`: one scoring of the same examples under the model before and after training
- `assembly`: puts them together; `page` writes the file

Nothing here imports torch or matplotlib before it is needed.
"""

from __future__ import annotations

from sftmix.report.assembly import report_runs
from sftmix.report.drawing import require_plots
from sftmix.report.page import Page, Section, Table, write_page

__all__ = [
    "Page",
    "Section",
    "Table",
    "report_runs",
    "require_plots",
    "write_page",
]
