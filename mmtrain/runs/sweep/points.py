"""Points of a sweep: the held-out losses of its runs, as the fit of scaling laws reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from mmtrain.runs.sweep.grid import SweepRun
from mmtrain.runs.sweep.state import SweepFolder, records
from mmtrain.scaling.points import Point, write_points


def collect_points(folder: SweepFolder, runs: Sequence[SweepRun]) -> list[Point]:
    """Return the points of all runs that have any, also of those that have not ended.

    With a constant learning rate a run's validation at another length of the grid is what a run of that length would
    have ended with, so it counts as final; validations in between count as points that are not. With a decaying rate
    the last validation alone is a point. Losses that are not finite are left out.
    """
    return [point for run in runs for point in _of_run(folder, run)]


def save_points(folder: SweepFolder, runs: Sequence[SweepRun]) -> tuple[Path, int] | None:
    """Write `points.jsonl` anew; returns its path and the number of points, None while there is no point.

    Raises:
        OSError: it cannot be written.
    """
    points = collect_points(folder, runs)
    return (write_points(folder.path, points), len(points)) if points else None


def _of_run(folder: SweepFolder, run: SweepRun) -> list[Point]:
    groups = {level.step: level.group for level in run.levels}
    usable = set(run.usable_steps) | groups.keys()
    found: dict[int, Point] = {}
    for record in records(folder, run):
        step, loss = record["step"], record.get("val_loss")
        if step not in usable or loss is None or not math.isfinite(loss):
            continue
        found[step] = Point(
            architecture=run.architecture if not run.settings else f"{run.architecture} {' '.join(run.settings)}",
            run=run.name, parameters=run.parameters, activated=run.activated, experts=run.experts,
            tokens=record["tokens"], flops=run.flops_per_token * record["tokens"], loss=loss, group=groups.get(step),
            learning_rate=run.learning_rate, batch_tokens=run.batch_tokens, final=step in groups,
        )  # fmt: skip
    return list(found.values())
