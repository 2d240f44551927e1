"""Report on some profiled steps of a run: its figures, and the page that tells them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mmtrain.log.console import count_text
from mmtrain.log.kernel_times import Gap, KindTime

GAPS_SHOWN = 5
NAME_SHOWN = 44  # of a kernel, characters


@dataclass(frozen=True)
class KindRow:
    """Time of a kind of kernel, or operator, in a step.

    Attributes:
        kind: of `mmtrain.log.kernel_times.KINDS`.
        ms: milliseconds a step, summed over its kernels.
        share: of a step that nothing watches.
        launches: kernels a step.
        tflops: achieved, in useful operations; None for kinds whose operations are not counted.
        floor_ms: milliseconds that these operations take at the rate of a large product.
    """

    kind: str
    ms: float
    share: float
    launches: float
    tflops: float | None = None
    floor_ms: float | None = None


@dataclass(frozen=True)
class RankRow:
    """Figures of one rank, so that a slow one is seen.

    Attributes:
        rank: among all processes.
        step_ms: median of the steps that nothing watches.
        busy: share of such a step in which the device ran a kernel; None on a CPU.
        reading_ms: milliseconds a step that it waited for its rows, median.
        exposed_ms: milliseconds a step in which its device communicated and did nothing else; None on a CPU.
        peak_gib: the most that the device has held; None on a CPU.
    """

    rank: int
    step_ms: float
    busy: float | None
    reading_ms: float
    exposed_ms: float | None
    peak_gib: float | None


@dataclass(frozen=True)
class GapRow:
    """A pause of the device in the profiled steps: milliseconds, and the kernels around it."""

    ms: float
    before: str
    after: str


@dataclass(frozen=True)
class ProfileReport:
    """Figures of some profiled steps, the main process's unless said otherwise.

    Attributes:
        header: lines on run, device, layout, model and numbers.
        versions: of what computes, by name.
        steps: how many were profiled.
        timed: how many were timed before, with nothing that watches.
        tokens: tokens of text a step, all processes together.
        step_s: median seconds of a step that nothing watches.
        mfu: of such a step.
        busy: share of such a step in which the device ran at least one kernel; None on a CPU.
        rate_tflops: of a large product, measured behind the steps.
        kinds: the longest first.
        exposed_ms: milliseconds a step of communication alone; None on a CPU.
        idle_ms: milliseconds a step in which the device paused while it was profiled; None on a CPU.
        gaps: the longest pauses.
        memory_gib: by kind, in GiB.
        ranks: all of them.
        losses: of every step, warm-up included, as the run's own metrics would have them.
        phase: number of the stage's phase that was profiled.
        graphs_possible: whether CUDA graphs are off, and could be on.
        recomputes: whether blocks are recomputed in backward.
        device_gib: memory of the device; None on a CPU.
    """

    header: Sequence[str]
    versions: dict[str, str]
    steps: int
    timed: int
    tokens: float
    step_s: float
    mfu: float
    busy: float | None
    rate_tflops: float
    kinds: Sequence[KindRow]
    exposed_ms: float | None
    idle_ms: float | None
    gaps: Sequence[GapRow]
    memory_gib: dict[str, float]
    ranks: Sequence[RankRow]
    losses: Sequence[float] = ()
    phase: int = 0
    graphs_possible: bool = False
    recomputes: bool = False
    device_gib: float | None = None

    @property
    def tokens_per_s(self) -> float:
        """Tokens of text a second, all processes together."""
        return self.tokens / self.step_s

    def share_of(self, kind: str) -> float:
        """Share of a step that a kind takes; 0 for one that is not there."""
        return sum(row.share for row in self.kinds if row.kind == kind)

    def as_record(self, hints: Sequence[str], files: Sequence[str]) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        return {**asdict(self), "tokens_per_s": self.tokens_per_s, "hints": list(hints), "files": list(files)}


def kind_rows(
    kinds: dict[str, KindTime], steps: int, step_s: float, operations: dict[str, float], rate: float
) -> list[KindRow]:
    """Return a row for each kind, the longest first.

    Args:
        kinds: time of each over all profiled steps.
        steps: how many these are.
        step_s: seconds of a step that nothing watches.
        operations: useful floating-point operations of a step on this rank, by kind.
        rate: FLOP/s of a large product.
    """
    rows = []
    for kind, time in kinds.items():
        seconds, work = time.seconds / steps, operations.get(kind, 0.0)
        known = (work / seconds / 1e12, work / rate * 1e3) if work and seconds else (None, None)
        rows.append(KindRow(kind, seconds * 1e3, seconds / step_s, time.launches / steps, *known))
    return rows


def gap_rows(gaps: Sequence[Gap]) -> list[GapRow]:
    """Return the longest pauses, as they are shown."""
    return [GapRow(gap.seconds * 1e3, gap.before, gap.after) for gap in gaps[:GAPS_SHOWN]]


def report_lines(report: ProfileReport, hints: Sequence[str], files: Sequence[str]) -> list[str]:
    """Return the page.

    Args:
        report: the figures.
        hints: what to try, in plain language.
        files: what was written, with what each is for.
    """
    return [
        *report.header,
        "with    " + ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        "",
        *_speed(report),
        "",
        *_kinds(report),
        "",
        *([*_pauses(report), ""] if report.idle_ms is not None else []),
        *_memory(report),
        *(["", *_ranks(report)] if len(report.ranks) > 1 else []),
        "",
        *(f"try     {hint}" for hint in hints or ["nothing stands out: the time is where the work is"]),
        *(f"file    {file}" for file in files),
    ]


def _speed(report: ProfileReport) -> list[str]:
    busy = "" if report.busy is None else f"; the device is busy in {report.busy:.1%} of it"
    reading = report.ranks[0].reading_ms
    return [
        f"step    {report.step_s * 1e3:.1f} ms, median of {report.timed} that nothing watched{busy}",
        f"speed   {count_text(report.tokens)} tokens a step, {count_text(report.tokens_per_s)} tokens/s, "
        f"MFU {report.mfu:.1%}; {reading:.1f} ms waiting for rows",
    ]


def _kinds(report: ProfileReport) -> list[str]:
    what = "kernels" if report.busy is not None else "operators"
    lines = [f"{f'kind of {what}':24}{'ms a step':>10}{'share':>8}{'launches':>10}{'TFLOP/s':>10}{'floor ms':>10}"]
    for row in report.kinds:
        known = ["", ""] if row.tflops is None else [f"{row.tflops:.4g}", f"{row.floor_ms:.2f}"]
        cells = [f"{row.ms:.2f}", f"{row.share:.1%}", f"{row.launches:.0f}", *known]
        widths = zip(cells, (10, 8, 10, 10, 10), strict=True)
        lines.append(f"{row.kind:24}" + "".join(f"{cell:>{width}}" for cell, width in widths))
    floor = f"floor   the operations at {report.rate_tflops:.4g} TFLOP/s, the rate of a large product just now"
    lines.append(floor)
    if report.exposed_ms is not None:
        share = report.exposed_ms / report.step_s / 1e3
        lines.append(f"exposed communication that no computing hides: {report.exposed_ms:.2f} ms a step, {share:.1%}")
    return lines


def _pauses(report: ProfileReport) -> list[str]:
    lines = [f"idle    {report.idle_ms:.2f} ms a step while profiled; the longest pauses:"]
    return lines + [f"        {gap.ms:.3f} ms  {_short(gap.before)} -> {_short(gap.after)}" for gap in report.gaps]


def _short(name: str) -> str:
    """A kernel's name without what C++ puts around it, at a length that fits a line."""
    bare = name.removeprefix("void ").split("<", 1)[0].split("::")[-1]
    return bare[:NAME_SHOWN] or name[:NAME_SHOWN]


def _memory(report: ProfileReport) -> list[str]:
    parts = ", ".join(f"{kind} {gib:.3g}" for kind, gib in report.memory_gib.items())
    of = "" if report.device_gib is None else f" of {report.device_gib:.0f}"
    return [f"memory  GiB{of}: {parts}"]


def _ranks(report: ProfileReport) -> list[str]:
    lines = [f"{'rank':>4}{'step ms':>12}{'busy':>8}{'rows ms':>10}{'exposed ms':>12}{'peak GiB':>10}"]
    for one in report.ranks:
        busy = "" if one.busy is None else f"{one.busy:.1%}"
        exposed = "" if one.exposed_ms is None else f"{one.exposed_ms:.2f}"
        peak = "" if one.peak_gib is None else f"{one.peak_gib:.2f}"
        lines.append(f"{one.rank:>4}{one.step_ms:>12.1f}{busy:>8}{one.reading_ms:>10.1f}{exposed:>12}{peak:>10}")
    return lines
