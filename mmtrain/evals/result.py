"""Result of one evaluation: its record for `metrics.jsonl` and trackers, and its line for the console."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mmtrain.evals.cell_score import CellScore


@dataclass(frozen=True)
class NeedleResult:
    """Figures of one evaluation, over all ranks.

    Attributes:
        phase: its name.
        scores: of every cell.
        samples: of each cell.
        repeats: how often a sample of each length reads the held-out text, where that is more than once.
        seconds: that it took.
    """

    phase: str
    scores: Sequence[CellScore]
    samples: int
    repeats: dict[int, float]
    seconds: float

    @property
    def passed(self) -> float:
        """Percentage of all samples whose answer is right."""
        return _mean(score.passed for score in self.scores)

    def by_kind(self) -> dict[str, float]:
        """Return the percentage of samples that passed, of each kind."""
        kinds = dict.fromkeys(score.cell.kind for score in self.scores)
        return {kind: _mean(score.passed for score in self.scores if score.cell.kind == kind) for kind in kinds}

    def record(self) -> dict[str, Any]:
        """Return the figures as a record of `metrics.jsonl`: numbers, each a series for trackers, and all cells.

        ``needles`` and ``needles/KIND[/LENGTH]`` are percentages of samples that passed, ``needles_tokens`` and
        ``needles_nats`` means over cells, ``needle_cells`` a list of a mapping for each cell.
        """
        record: dict[str, Any] = {"phase": self.phase, "needles": round(self.passed, 3)}
        record |= {f"needles/{kind}": round(passed, 3) for kind, passed in self.by_kind().items()}
        for kind, length in dict.fromkeys((score.cell.kind, score.cell.length) for score in self.scores):
            of_both = (score.passed for score in self.scores if score.cell[:2] == (kind, length))
            record[f"needles/{kind}/{length}"] = round(_mean(of_both), 3)
        record["needles_tokens"] = round(_mean(score.tokens for score in self.scores), 3)
        record["needles_nats"] = _mean(score.nats for score in self.scores)
        record["needles_s"] = round(self.seconds, 3)
        record["needle_cells"] = [
            score.record(self.samples, self.repeats.get(score.cell.length, 1.0)) for score in self.scores
        ]
        return record

    def line(self) -> str:
        """Return the figures as one line."""
        kinds = ", ".join(f"{kind} {passed:.1f}" for kind, passed in self.by_kind().items())
        lengths = sorted({score.cell.length for score in self.scores})
        span = f"{lengths[0]:,}" + (f" to {lengths[-1]:,}" if len(lengths) > 1 else "")
        tokens, nats = _mean(score.tokens for score in self.scores), _mean(score.nats for score in self.scores)
        repeats = "".join(f"; held-out text is read {times:.1f} times at {length:,} tokens"
                          for length, times in self.repeats.items())  # fmt: skip
        return (f"needles {self.passed:.1f}% ({kinds}) at {span} tokens, answer tokens {tokens:.1f}% right, "
                f"{nats:.3f} nats, in {self.seconds:.1f} s{repeats}")  # fmt: skip


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
