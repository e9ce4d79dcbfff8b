"""Read and measure runs, and write the report's page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sftmix.report.drawing import require_plots
from sftmix.report.findings import Findings, find
from sftmix.report.page import Page, Section, write_page
from sftmix.report.runs import read_runs
from sftmix.report.sections import sections
from sftmix.report.tables import last_part

EXAMPLES = 1000


def report_runs(
    folders: Sequence[str | Path],
    output: Path,
    *,
    examples: int | None = EXAMPLES,  # None: all
    title: str = "SFTMix report",
    paragraphs: Sequence[str] = (),
    first: Sequence[Section] = (),
    last: Sequence[Section] = (),
) -> Page:
    """Write the report about these runs; `first` and `last` are sections around its own.

    Raises:
        ValueError: a folder is no run, the output is a folder, or `examples` is below 0.
        ImportError: a package for the pictures is not installed.
        OSError: the file cannot be written.
    """
    require_plots()
    if examples is not None and examples < 0:
        raise ValueError(f"examples: expected at least 0, got {examples}")
    if output.is_dir():
        raise ValueError(f"output: expected a file, got the folder {output}")
    findings = find(read_runs(folders), examples)
    own = sections(findings)
    page = Page(title, paragraphs or introduction(findings), [*first, *own, *last])
    output.parent.mkdir(parents=True, exist_ok=True)
    write_page(output, page)
    return page


def introduction(findings: Findings) -> list[str]:
    """Return sentences that say what the page is about and which runs it has."""
    trained = sum(not run.scored for run in findings.runs)
    scored = len(findings.runs) - trained
    text = [
        f"{_counted(trained, 'run')} of sftmix train in {_counted(len(findings.groups), 'row')}"
        + (f", {_counted(scored, 'run')} of sftmix score." if scored else ".")
        + " SFTMix adds to next-token prediction (NTP) a Mixup loss between examples that a "
        "reference model is sure of and examples that it is not sure of (arXiv 2410.05248)."
    ]
    models = dict.fromkeys(last_part(run.recipe["model"]) for run in findings.runs)
    data = dict.fromkeys(last_part(name) for run in findings.runs for name in run.recipe["data"])
    return [*text, f"Model: {', '.join(models)}. Data: {', '.join(data)}."]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
