"""Hints that the figures of a profiled step call for, each naming the option that it is about."""

from __future__ import annotations

from collections.abc import Iterator

from mmtrain.log.kernel_times import OPTIMIZER
from mmtrain.log.profile_report import ProfileReport

MOST = 3
LARGE = 0.1
"""Share of the step from which on something is worth a hint."""
READING = 0.05
"""Likewise, of waiting for rows, which should take nothing."""
ROOM = 0.6
"""Share of the device's memory under which the peak leaves room for activations that are recomputed now."""


def hints(report: ProfileReport) -> list[str]:
    """Return at most MOST hints, what costs most first; none where nothing stands out."""
    found = sorted(_found(report), reverse=True)
    return [hint for _, hint in found[:MOST]]


def _found(report: ProfileReport) -> Iterator[tuple[float, str]]:
    """Yield hints, each with the share of the step that it is about."""
    reading = max(rank.reading_ms for rank in report.ranks) / report.step_s / 1e3
    if reading > READING:
        yield reading, f"a rank waits for its rows in {reading:.0%} of the step: more data.num_workers"
    idle = 0.0 if report.busy is None else 1.0 - report.busy - reading  # what waits for rows was told
    if idle > LARGE:
        graphs = ", or parallel.cuda_graphs=auto" if report.graphs_possible else ""
        yield (idle, f"the device idles in {idle:.0%} of the step, as the host cannot feed it: "
                     f"larger parallel.micro_batch_rows{graphs}")  # fmt: skip
    exposed = (report.exposed_ms or 0.0) / report.step_s / 1e3
    if exposed > LARGE:
        yield (exposed, f"computing waits for communication in {exposed:.0%} of the step: larger "
                        "parallel.micro_batch_rows, or less of parallel.tp, parallel.cp and parallel.ep")  # fmt: skip
    optimizer = report.share_of(OPTIMIZER)
    if optimizer > LARGE:
        yield (optimizer, f"the optimizer takes {optimizer:.0%} of the step: more micro-batches in one, by larger "
                          f"stage.phases.{report.phase}.batch.0.tokens")  # fmt: skip
    peak = report.memory_gib.get("peak reserved")
    if report.recomputes and report.device_gib and peak is not None and peak < ROOM * report.device_gib:
        yield (0.0, f"blocks are recomputed though {report.device_gib - peak:.0f} GiB are free: "
                    "parallel.activation_checkpoint=selective or none")  # fmt: skip
