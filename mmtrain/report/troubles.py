"""What went wrong in a run, one line each, the worst first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mmtrain.report.read_run import Record, RunData, number

BAD, CARE, NOTE = "bad", "care", "note"
RANKING = (BAD, CARE, NOTE)
DROPS = 0.1
"""Share of assignments that says experts are unbalanced, from `SETTLED` steps on (docs/metrics.md)."""
SETTLED = 1000
_TOLD = re.compile(r"is slow, and all wait for it|passed over a damaged checkpoint|cannot be written|stands? since")
MOST_TOLD = 8


def troubles(
    run: RunData, launches: Sequence[Record], ledger: Sequence[Record], checkpoints: Sequence[Record]
) -> list[dict[str, Any]]:
    """Return ``level`` ("bad", "care" or "note") and ``text`` of all that went wrong.

    Args:
        run: what the folder records.
        launches, ledger, checkpoints: its rows, as `tables` makes them.
    """
    found = [*_skips(run, ledger), *_launches(launches), *_files(run, checkpoints), *_told(run), *_figures(run)]
    found.sort(key=lambda one: RANKING.index(one[0]))
    return [{"level": level, "text": text} for level, text in found]


def _skips(run: RunData, ledger: Sequence[Record]) -> list[tuple[str, str]]:
    found = []
    for row in (row for row in ledger if row["kind"] == "rollback"):
        rows = sum(one["end"] - one["first"] for one in row["left_out"][-1:] if isinstance(one, dict))
        found.append((BAD, f"rolled back from step {count(row['step'])} to {count(row['to_step'])}, "
                           f"{count(rows)} rows left out"))  # fmt: skip
    skipped = [record for record in run.steps if record.get("skipped")]
    undone = sum(bool(row.get("undone")) for row in ledger)
    if skipped:
        spikes = {row["step"] for row in ledger if row["kind"] == "spike"}
        large = sum(record["step"] in spikes for record in skipped)
        steps = ", ".join(count(record["step"]) for record in skipped[:5]) + (", …" if len(skipped) > 5 else "")
        found.append((BAD, f"{_times(len(skipped), 'step')} skipped, weights left alone ({_times(large, 'spike')}, "
                           f"{len(skipped) - large} not finite): {steps}"))  # fmt: skip
    if undone:
        found.append((NOTE, f"{_times(undone, 'more skipped step')} undone by a rollback"))
    return found


def _launches(launches: Sequence[Record]) -> list[tuple[str, str]]:
    found = []
    for number_of, row in enumerate(launches, 1):
        following = launches[number_of] if number_of < len(launches) else None
        at = f"the launch of {str(row.get('time'))[:16].replace('T', ' ')} UTC, from step {count(row.get('step'))} on,"
        if row["end"] is None and following is not None:
            found.append((BAD, f"{at} has no end on record: it was killed"))
        elif row["end"] is None:
            found.append((NOTE, f"{at} has no end on record: it is at work, or was killed"))
        elif row["why"]:
            found.append((CARE if following else BAD, f"{at} ended at step {count(row['end'])}: {row['why']}"))
    if len(launches) > 1:
        again = ", ".join(count(row.get("step")) for row in launches[1:6]) + (", …" if len(launches) > 6 else "")
        found.append((NOTE, f"{_times(len(launches) - 1, 'restart')}, after step {again}"))
    return found


def _files(run: RunData, checkpoints: Sequence[Record]) -> list[tuple[str, str]]:
    found = [(BAD, f"damaged checkpoint: {row['damage']}") for row in checkpoints if row["damage"]]
    for name, lines in run.damaged.items():
        verdict = "is no record" if lines == 1 else "are no records"
        found.append((CARE, f"{_times(lines, 'line')} of {name} {verdict}: left out"))
    if run.repeated:
        found.append((CARE, f"{_times(run.repeated, 'record')} of steps that were recorded again: the last one counts"))
    aside = sorted(path.name for path in run.path.glob("abandoned/*"))
    if aside:
        found.append((NOTE, f"set aside what was done under {', '.join(aside)} (abandoned/)"))
    if (run.path / "stacks").is_dir():
        found.append((BAD, "a step took too long: stacks/ has the stacks of all ranks"))
    return found


def _told(run: RunData) -> list[tuple[str, str]]:
    """Lines of the log that tell of slow ranks and of files."""
    texts = list(dict.fromkeys(text for _, text in run.log if _TOLD.search(text)))
    return [(CARE, text) for text in texts[-MOST_TOLD:]]


def _figures(run: RunData) -> list[tuple[str, str]]:
    late = [record["drop_rate"] for record in run.steps[-100:]
            if record["step"] > SETTLED and number(record.get("drop_rate"))]  # fmt: skip
    if late and sum(late) / len(late) > DROPS:
        return [(CARE, f"{sum(late) / len(late):.0%} of assignments are dropped at the end: experts are not balanced")]
    return []


def count(value: Any) -> str:
    """Return a number with separators; "?" for what is none."""
    return f"{value:,.0f}" if number(value) else "?"


def _times(number_of: int, what: str) -> str:
    return f"{number_of:,} {what}" + ("" if number_of == 1 else "s")
