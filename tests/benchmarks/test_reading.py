"""The benchmark of reading: every reader reads every form of the same rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.reading import __main__ as reading


@pytest.mark.parametrize("reader", reading.READERS)
def test_every_reader_reads_every_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    monkeypatch.setattr(reading, "rows", lambda mib, rows=reading.rows: list(rows(mib))[:50])
    sizes = reading.write(tmp_path, 1)
    assert sizes["jsonl.gz"] < sizes["jsonl"] < 1 << 20
    found = [reading.READERS[reader](str(tmp_path / f"data.{form}")) for form in reading.FORMS]
    assert found == [50] * len(reading.FORMS)
    assert reading.peak_bytes() > 10 << 20
