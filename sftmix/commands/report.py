"""Read runs, measure what is missing, and write the page (`sftmix report`)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sftmix.report.assembly import EXAMPLES, report_runs
from sftmix.report.sections import RESULTS
from sftmix.runs.failures import OneMessage

DESCRIPTION = """\
One HTML file about runs of `sftmix score` and `sftmix train`: what they reached beside each other,
with tests over seeds; the paper's figures; losses, confidence, representations, and what was mixed.
Runs that differ only in their seed form a row. A part that cannot be made is left out, and the
page says why. Needs the extra plots: pip install matplotlib scikit-learn scipy."""


OPTIONS = ("output", "examples", "title")


def main(words: Sequence[str]) -> None:
    """Run the command."""
    parser = OneMessage(
        prog="sftmix report",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--output", default="report.html", help="(default: report.html)")
    parser.add_argument(
        "--examples",
        type=int,
        default=EXAMPLES,
        help="training examples that are scored before and after training, a seeded sample; the "
        f"scores are kept in RUN/report; 0: none (default: {EXAMPLES})",
    )
    parser.add_argument("--title", default="SFTMix report", help="of the page")
    options = parser.parse_args(words)
    page = report_runs(
        options.runs, Path(options.output), examples=options.examples, title=options.title
    )
    for section in page.sections:
        for table in section.tables[:1] if section.title == RESULTS else ():
            print(table.text() + "\n")
        for warning in section.warnings:
            print(f"Note: {warning}")
        for missing in section.left_out:
            print(f"{missing.title} is left out: {missing.reason}")
    print(f"wrote {options.output}")
