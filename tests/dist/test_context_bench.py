"""The bench of context parallelism, tiny, on two processes: its ways agree, failures are told, rows are as said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmtrain.bench.context_rows import MIXTURES, first_tokens, mixture, short_documents
from tests.dist.pool import Pool

PARTS = "planning,softmax,lightning,moving,step,softmax_long"
WRITTEN = PARTS.replace("step", "rates,step").split(",")


def measure(out: str, only: str) -> None:
    from mmtrain.bench.context_gpu import main

    main(["--smoke", "--out", out, "--only", only])


@pytest.mark.slow
def test_every_way_is_measured_and_agrees_with_one_process(pool: Pool, tmp_path: Path) -> None:
    pool.run(measure, str(tmp_path), PARTS, world=2)
    found = json.loads((tmp_path / "context-2.json").read_text())
    rows = found["rows"]
    assert list(dict.fromkeys(row["part"] for row in rows)) == WRITTEN
    assert not [row for row in rows if "note" in row]
    shared = [row for row in rows if row["part"].startswith("softmax") and "balance" in row]
    shared += [row for row in rows if row.get("what") == "core" and row["way"] != "one GPU alone"]
    assert len(shared) == 11 + 5 + 2 * 5 and all(row["error"] < 2e-5 for row in shared)
    others = {"plain all-gather", "Ulysses", "head all-to-all"}
    assert {row["way"] for row in shared} > {"allgather", "ring", "varlen"} | others
    lines = (tmp_path / "context-2.md").read_text().splitlines()
    assert sum(line.startswith("| ") for line in lines) == len(rows) + len(WRITTEN)
    assert found["documents"]["softmax, 64 tokens a GPU, 2 GPUs"] == list(short_documents(128))
    steps = [row for row in rows if "step_s" in row]
    assert len(steps) == 2 and len({row["expected_s"] for row in steps}) == 1  # whichever table
    check_expected(rows)


def check_expected(rows: list[dict]) -> None:
    """Each measured step has what was expected of it, out of rates that were measured before any model was built."""
    built = next(i for i, row in enumerate(rows) if "built" in row.get("table", ""))
    assert all(row["part"] == "rates" for row in rows if "products_tflops" in row)
    assert all(i < built for i, row in enumerate(rows) if row["part"] == "rates")
    for row in (row for row in rows if "step_s" in row):
        parts = [row[f"{part}_s"] for part in ("products", "experts", "softmax", "lightning", "streams", "optimizer")]
        assert [part > 0 for part in parts] == [True, False, True, True, True, True]
        assert row["expected_s"] == pytest.approx(sum(parts), rel=2e-3)
        assert row["of_expected"] == pytest.approx(row["step_s"] / row["expected_s"], rel=2e-2)


def measure_cases(out: str, cases: str) -> None:
    from mmtrain.bench.context_gpu import main

    main(["--smoke", "--out", out, "--only", "step", "--step-tables", "balanced", "--step-cases", cases])


def test_steps_of_given_cases_beside_what_is_expected(pool: Pool, tmp_path: Path) -> None:
    pool.run(measure_cases, str(tmp_path), "64:2:0,256:0:0,64:1:0", world=2)
    rows = json.loads((tmp_path / "context-2.json").read_text())["rows"]
    assert not [row for row in rows if "note" in row]
    assert [(row["tokens"], row["documents"]) for row in rows if row["part"] == "rates"] == [(64, ""), (256, "one")]
    measured = [(row["tokens"], row["documents"]) for row in rows if "step_s" in row]
    assert measured == [(64, ""), (256, "one"), (64, "")]
    check_expected(rows)
    head = next(line for line in (tmp_path / "context-2.md").read_text().splitlines() if "x expected" in line)
    assert "| expected s | of it products | experts | softmax | lightning | streams | optimizer | x expected |" in head


def fail_on_one(out: str) -> list[object]:
    from mmtrain.bench.context_gpu import SMOKE
    from mmtrain.bench.context_report import Bench, check
    from mmtrain.config import ClusterConfig, ParallelConfig
    from mmtrain.parallel import mesh
    from mmtrain.parallel.layout import plan_layout

    layout = plan_layout(mesh.world_size(), ParallelConfig(cp=2), SMOKE, [128])
    bench = Bench(mesh.start(ClusterConfig(device="cpu"), layout), Path(out), "title", 0.0, limit=60.0)

    def measure() -> dict[str, int]:
        if bench.rank == 1:
            raise ValueError("no\nroom")
        return {"loss": 1}

    try:
        found = [bench.case("step", {}, measure), bench.case("step", {}, lambda: {"loss": 2})]
        value = torch.tensor([float("nan") if bench.rank else 1.0])
        found.append(bench.case("step", {}, lambda: check([value], None)))
        bench._stop = 0.0
        found.append(bench.case("planning", {}, dict))
        return [*found, [row.get("note") for row in bench.rows]]
    finally:
        mesh.stop()


def test_what_fails_on_a_rank_is_a_row_and_the_next_is_measured(pool: Pool, tmp_path: Path) -> None:
    old = {"rows": [{"part": "softmax", "note": "kept"}, {"part": "step", "note": "gone"}], "documents": {"a": [1]}}
    (tmp_path / "context-2.json").write_text(json.dumps(old))
    first, second = pool.run(fail_on_one, str(tmp_path), world=2)
    nan = "FloatingPointError: a result is not finite"
    assert first == [None, {"loss": 2}, None, None, ["another rank failed", None, nan, "no time left"]]
    assert second == [None, {"loss": 2}, None, None, ["ValueError: no", None, nan, "no time left"]]
    found = json.loads((tmp_path / "context-2.json").read_text())
    assert [(row["part"], row.get("note")) for row in found["rows"]] == [
        ("softmax", "kept"), ("step", "another rank failed"), ("step", None), ("step", nan),
        ("planning", "no time left"),
    ]  # fmt: skip
    assert found["documents"] == {"a": [1]}


def test_rows_of_documents() -> None:
    lengths = short_documents(2**16)
    assert sum(lengths) == 2**16 and max(lengths) <= 2**14 and min(lengths[:-1]) >= 2**10
    assert lengths == short_documents(2**16) != short_documents(2**16, seed=1)
    assert first_tokens((5, 3, 4), 7) == (5, 2) and first_tokens((5, 3), 5) == (5,)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_has_its_shares_of_tokens(name: str) -> None:
    lengths = mixture(2**28, name, 0)
    assert sum(lengths) == 2**28
    for share, low, high in MIXTURES[name]:
        assert sum(n for n in lengths if low <= n < high) / 2**28 == pytest.approx(share, abs=0.05)


def rates_of_experts(out: str) -> list[tuple[float, float]]:
    from mmtrain.bench.context_cases import StepCase
    from mmtrain.bench.context_gpu import SMOKE
    from mmtrain.bench.context_rates import measure_rates
    from mmtrain.bench.context_report import Bench
    from mmtrain.config import ClusterConfig, ParallelConfig
    from mmtrain.parallel import mesh
    from mmtrain.parallel.layout import plan_layout

    model = replace(SMOKE, num_experts=4, top_k=2, layer_pattern="L")
    parallel = ParallelConfig(cp=2, lightning_head_groups=2, ffn_chunk_tokens=16)
    bench = Bench(
        mesh.start(ClusterConfig(device="cpu"), plan_layout(2, parallel, model, [64])), Path(out), "", 0.0, 60.0
    )
    try:
        found = measure_rates(bench, model, parallel, [StepCase(64, 1)], 0)
        assert not any("note" in row for row in bench.rows), bench.rows
        return [(rates.experts, rates.softmax[0]) for rates in found.values()]
    finally:
        mesh.stop()


def test_rates_of_a_model_of_experts_without_softmax_layers(pool: Pool, tmp_path: Path) -> None:
    for ((experts, softmax),) in pool.run(rates_of_experts, str(tmp_path), world=2):
        assert experts > 0 and softmax == 0
