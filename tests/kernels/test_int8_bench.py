"""The bench of int8 products runs through on small shapes and writes every row."""

from __future__ import annotations

import json
from pathlib import Path

from bench.gpu import int8_products


def test_it_writes_all_rows(tmp_path: Path) -> None:
    out = tmp_path / "int8.json"
    assert int8_products.main(["--out", str(out), "--tokens", "1,8", "--device", "cpu", "--quick"]) == 0
    found = json.loads(out.read_text())
    assert len(found["rows"]) == 2 * 2 * 5
    for row in found["rows"]:
        times = [value for name, value in row.items() if name.endswith("_ms")]
        assert len(times) >= 3 and all(isinstance(value, float) for value in times), row
