"""Folders of runs and sweeps made by hand, of any length, with all that can happen in a run."""

from __future__ import annotations

import json
import math
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

BEGIN = datetime(2026, 1, 5, 8, tzinfo=UTC)
NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def step_record(step: int, steps: int, seed: int = 0, layers: int = 4, experts: int = 8) -> dict[str, Any]:
    """The record of a step out of a run with three phases; loads of experts about a hundred times a run."""
    rng, phase = random.Random(seed * 1_000_003 + step), min(2, 3 * step // (steps + 1))
    seconds = 0.5 * (1 + 0.5 * phase) * rng.uniform(0.97, 1.1)
    loss = 1.9 + 8.0 * (1 + step * 400 / steps) ** -0.45 + rng.gauss(0, 0.03) + 0.05 * seed
    length = 8192 * 4**phase
    record: dict[str, Any] = {
        "step": step,
        "tokens": step * 524_288,
        "loss": loss,
        "aux_loss": 0.01 * layers * rng.uniform(1, 1.1),
        "lr": 2e-4 * min(1, step / (0.02 * steps)) * 0.3 ** (step / steps),
        "grad_norm": 0.4 * math.exp(rng.gauss(0, 0.2)),
        "seq_len": length,
        "rope_base": 10_000 * 10**phase,
        "phase": f"{length // 1024}k",
        "rows": 64 // 4**phase,
        "first_row": 0,
        "tokens_per_s": 524_288 / seconds,
        "mfu": 0.2 / seconds,
        "step_s": seconds,
        "drop_rate": 0.04 + 0.06 * math.exp(-20 * step / steps),
        "memory_gib": 61.5 + 9 * phase,
        "memory_predicted_gib": 60.2 + 9.4 * phase,
        "cp_balance": 1 + 0.02 * phase * rng.random(),
        "exchange_s": 0.1 * seconds,
        "exchange_hidden": rng.uniform(0.8, 0.9),
        "time": (BEGIN + timedelta(seconds=0.8 * step)).isoformat(timespec="milliseconds"),
    }
    if step % max(1, steps // 100) == 0:
        skew = [[math.exp(rng.gauss(0, 0.35 - 0.2 * step / steps)) for _ in range(experts)] for _ in range(layers)]
        record["router_load"] = [[round(load * experts / sum(row), 4) for load in row] for row in skew]
        record["router_entropy"] = [2.0 - 0.1 * layer for layer in range(layers)]
        record["drop_rate_per_layer"] = [0.02 * layer for layer in range(layers)]
    return record


def others(step: int, steps: int) -> list[dict[str, Any]]:
    """Records beside a step's: ten validations, twenty checks of pace, three evaluations of needles."""
    found: list[dict[str, Any]] = []
    loss = 1.95 + 8.0 * (1 + step * 400 / steps) ** -0.45
    if step % (steps // 10) == 0:
        found.append({"step": step, "tokens": 0, "val_loss": loss, "val_bits_per_byte": loss / 2.7})
    if step % (steps // 20) == 0:
        found.append(
            {
                "step": step,
                "pace_product_s": [0.0011, 0.0012, 0.0013 + 1e-9 * step, 3],
                "pace_rows_s": [0, 0.001, 0.02, 1],
            }
        )
    if step % (steps // 3) == 0:
        share = step / steps
        cells = [
            {
                "kind": kind,
                "length": length,
                "depth": depth,
                "passed": max(0.0, min(100.0, 130 * share - 9 * order - 20 * depth + 3 * i)),
                "samples": 4,
                "tokens": 1.0,
                "nats": 1.0,
                "repeats": 2.0 if length > 100_000 else 1.0,
            }
            for i, kind in enumerate(("single", "multi", "multi_key", "variable_tracking"))
            for order, length in enumerate((4096, 16384, 65536, 131072))
            for depth in (0.0, 0.25, 0.5, 0.75, 1.0)
        ]
        mean = sum(cell["passed"] for cell in cells) / len(cells)
        found.append(
            {
                "step": step,
                "tokens": 0,
                "phase": "8k",
                "needles": mean,
                "needles/single": mean + 5,
                "needle_cells": cells,
            }
        )
    return found


def make_run(folder: Path, steps: int = 60, seed: int = 0, eventful: bool = False, experts: int = 8) -> Path:
    """A run's folder; an eventful one was killed, restarted, rolled back, and skipped steps."""
    folder.mkdir(parents=True)
    records = [
        record
        for step in range(1, steps + 1)
        for record in (step_record(step, steps, seed, experts=experts), *others(step, steps))
    ]
    about = {
        "device": "NVIDIA H200",
        "device_gib": 140.4,
        "processes": 64,
        "layout": "PP2 x DP8 x CP2 x TP2 | PP2 x EDP4 x EP8 x ETP1",
        "parameters": 7_200_000_000,
        "activated": 1_100_000_000,
        "torch": "2.11.0",
        "host": "node-1",
        "last_step": steps,
    }
    launches = [{"event": "began", "step": 0, "time": BEGIN.isoformat(), **about}]
    if eventful:
        skipped = [record for record in records if record["step"] in (steps // 4, steps // 2) and "loss" in record]
        for record, loss in zip(skipped, (None, 9.75), strict=True):
            record |= {"skipped": True, "loss": loss, "grad_norm": 47.0}
        ledger = [
            {
                "step": record["step"],
                "phase": record["phase"],
                "first_row": 640,
                "rows": 64,
                "loss": record["loss"],
                "grad_norm": 47.0,
                "loss_limit": 5.0,
                "grad_norm_limit": 3.0,
                "finite": record["loss"] is not None,
            }
            for record in skipped
        ]
        back = {
            "step": steps // 2 + 1,
            "after_step": steps // 2 + 5,
            "skipped": [{**ledger[1], "step": steps // 2 + 3}],
            "left_out": [{"to_step": steps // 2 + 1, "phase": 1, "first": 100, "end": 164}],
        }
        write_lines(folder / "ledger.jsonl", [*ledger, back])
        launches.append(
            {"event": "began", "step": steps // 3, "time": (BEGIN + timedelta(hours=3)).isoformat(), **about}
        )
        (folder / "log.txt").write_text(
            "2026-01-05 09:00:00 rank 3 (node-1) is slow, and all wait for it: a product takes its "
            "device 9.1 ms, the others' 1.2 ms (median)\n"
        )
    launches.append({"event": "ended", "step": steps, "why": None})
    write_lines(folder / "metrics.jsonl", records)
    write_lines(folder / "launches.jsonl", launches)
    config = {
        "run": {"name": folder.name},
        "model": {"name": "hybrid_7b", "num_experts": experts},
        "parallel": {"ep": 4, "tp": 2},
        "optim": {"lr": 2e-4 * (1 + seed)},
        "stage": {"name": "curriculum", "phases": [{"name": "8k"}]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_sweep(folder: Path, fitted: bool = True) -> Path:
    """A sweep of three architectures and four sizes at three budgets each, with laws through them."""
    folder.mkdir(parents=True)
    rng, points, fits = random.Random(0), [], {}
    for order, name in enumerate(("softmax", "hybrid", "lightning")):
        beta, alpha = 2.9 - 0.1 * order, -0.061 + 0.002 * order
        for budget in (1e18, 1e19, 1e20):
            for size in (0.4, 0.7, 1.0, 1.6, 2.6):
                parameters = 3e7 * (budget / 1e18) ** 0.5 * size
                loss = beta * (budget / 8.64e19) ** alpha + 0.12 * math.log(size) ** 2 + rng.gauss(0, 0.004)
                for part in (0.5, 1.0):
                    points.append(
                        {
                            "architecture": name,
                            "run": f"{name}-{budget:.0e}-{size}",
                            "parameters": parameters,
                            "activated": parameters,
                            "experts": 0,
                            "tokens": part * budget / (6 * parameters),
                            "flops": part * budget,
                            "loss": loss + 0.3 * (1 - part),
                            "group": f"{budget:.0e}",
                            "final": part == 1.0,
                        }
                    )
        estimate = {
            "beta": {"value": beta, "low": beta - 0.1, "high": beta + 0.1},
            "alpha": {"value": alpha, "low": -0.08, "high": -0.05},
        }
        laws = {"isoflop_laws": {"loss": estimate, "parameters": None}, "doubts": [NASTY], "refused": ["too few sizes"]}
        fits[name] = {"label": name, "architecture": name, **laws}
    write_lines(folder / "points.jsonl", points)
    if fitted:
        (folder / "fit.json").write_text(json.dumps({"fits": fits, "note": NASTY}))
    return folder
