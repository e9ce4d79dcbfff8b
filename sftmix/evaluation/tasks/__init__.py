"""The paper's medical tasks, each a file in the form of EleutherAI's lm-evaluation-harness.

`lm_eval --include_path FOLDER --tasks sftmix_medqa ...` runs those that the hub has data for;
`sftmix evaluate` runs all, from local files too.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent

# The paper's names of the tasks, in the order of its tables' columns.
PAPER_NAMES = {
    "medqa": "MedQA",
    "medqa_5": "MedQA-5",
    "pubmedqa": "PubMedQA",
    "medmcqa": "MedMCQA",
}
