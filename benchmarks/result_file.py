"""The result file of a run: facts, records, and what is missing and why; saved as it grows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .measure import facts
from .settings import Settings


class Results:
    """`{device}-{suite}.json`, written whole after every record: a killed run keeps its figures."""

    def __init__(self, suite: str, settings: Settings, folder: Path | None) -> None:
        quick = "-quick" if settings.quick else ""
        self.file = folder and folder / f"{settings.device}-{suite}{quick}.json"
        found = facts()
        found["commit"] = settings.commit or found["commit"]
        self.report: dict[str, Any] = {
            "suite": suite,
            "facts": {**found, "command": settings.command},
            "settings": settings.facts(),
            "records": [],
            "left_out": {},
            "failed": {},
        }

    def add(self, **record: Any) -> None:
        """One figure: a flat record."""
        self.report["records"].append(record)
        self.save()

    def miss(self, kind: str, name: str, reason: str) -> None:
        """Something without a figure; ``kind`` is ``left_out`` or ``failed``."""
        self.report[kind][name] = " ".join(reason.split())[:500]
        self.save()

    def save(self) -> None:
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, self.file)
