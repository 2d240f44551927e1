"""The bench of int8 products runs through on small shapes and writes every row."""

from __future__ import annotations

import json
from pathlib import Path

from bench.gpu import int8_products, int8_shapes
from mmkernels.int8_weights import empty_int8


def test_it_writes_all_rows(tmp_path: Path) -> None:
    out = tmp_path / "int8.json"
    assert int8_products.main(["--out", str(out), "--tokens", "1,8", "--device", "cpu", "--quick"]) == 0
    found = json.loads(out.read_text())
    assert len(found["rows"]) == 2 * 2 * 5
    for row in found["rows"]:
        times = [value for name, value in row.items() if name.endswith("_ms")]
        assert len(times) >= 3 and all(isinstance(value, float) for value in times), row


def test_the_sweep_finds_the_best_of_what_it_tried(tmp_path: Path) -> None:
    out = tmp_path / "shapes.json"
    given = ["--out", str(out), "--tokens", "1,64", "--products", "qkv", "--device", "cpu", "--seconds", "20"]
    assert int8_shapes.main(given) == 0
    for row in json.loads(out.read_text()):
        times = [ms for ms, _, _ in row["all"]]
        assert row["tried"] == len(times) > 0 and times == sorted(times) and row["best_ms"] == times[0]
        assert isinstance(row["dequantise_ms"], float) and row["failed"] == 0


def test_candidates_cut_k_in_different_ways() -> None:
    found = list(int8_shapes.candidates(20, empty_int8((64, 1024), False)))
    assert len(set(found)) == len(found) and all(shape.block_m == 32 for shape, _ in found)
    assert max(shape.block_k for shape, _ in int8_shapes.candidates(1, empty_int8((64, 1024), True))) == 128
