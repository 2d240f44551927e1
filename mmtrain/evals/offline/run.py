"""Units of an evaluation run one after the other, each written down when it is done, and taken over on a second try."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmtrain.errors import ConfigError
from mmtrain.evals.answering import Answerer
from mmtrain.evals.offline.request import EvalRequest
from mmtrain.evals.offline.units import Unit
from mmtrain.evals.offline.work import Work

Record = dict[str, Any]
Prepared = tuple[Unit, Work]
TOKENS_AT_ONCE = 2**20
"""Of samples that are asked together: what is lost by a stop is minutes, and a million tokens keep a device busy."""


class SampleLog:
    """File with a line of JSON for each sample that is done, `NAME.samples.jsonl`.

    Args:
        path: of the file; what stands in it already is taken over, but for a last line that was cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[tuple[str, str], Record] = {}
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        for line in text.splitlines():
            try:
                record = json.loads(line)
                self._known[record["key"], record["hash"]] = record
            except (ValueError, KeyError, TypeError):
                continue
        if text and not text.endswith("\n"):
            self._append("\n")

    def find(self, unit: Unit, work: Work) -> Record | None:
        """Return the record of a sample that is done: of the same place, with the same prompt and answers."""
        return self._known.get((unit.key, work.digest))

    def add(self, record: Record) -> None:
        """Write down a sample."""
        self._append(json.dumps(record) + "\n")

    def _append(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)


def run_units(
    units: Sequence[Unit], answerer: Answerer, request: EvalRequest, log: SampleLog, batch: int,
    done: Callable[[Record], None],
) -> list[Record]:  # fmt: skip
    """Ask every unit, in their order, and return a record of each.

    Args:
        units: of the evaluation.
        answerer: the model.
        request: says what becomes of samples that are too long.
        log: of samples that are done.
        batch: samples that are asked at once.
        done: is told of each record.

    Raises:
        ConfigError: a sample is longer than `max_length`.
    """
    records: list[Record] = []
    for group in _groups(units, batch):
        waiting: list[Prepared] = []
        for unit, work in group:
            known = log.find(unit, work) or _left_out(unit, work, request)
            if known is None:
                waiting.append((unit, work))
            else:
                records.append(known)
                done(known)
        for record in _ask(waiting, answerer) if waiting else ():
            log.add(record)
            records.append(record)
            done(record)
    return records


def longest_of(units: Sequence[Unit], request: EvalRequest) -> int:
    """Return the tokens of the longest sample with its answer, of those that are to be asked.

    Samples of files are made for it, one after the other: a tokenizer reads a text many times faster than a model.

    Raises:
        ConfigError: one of a file is longer than is allowed; it is named. Or all are left out, as they are.
    """
    longest = 0
    for unit in units:
        if unit.length is not None:
            longest = max(longest, unit.length)
        elif _left_out(unit, work := unit.prepare(), request) is None:
            longest = max(longest, work.tokens)
    if not longest and request.max_length is not None:
        problem = f"leaves all {len(units):,} samples out"
        raise ConfigError("--max-length", f"{request.max_length:,}", problem, "give more")
    return longest


def _left_out(unit: Unit, work: Work, request: EvalRequest) -> Record | None:
    """Record of a sample that is too long; None if it is not."""
    if unit.length is not None or request.max_length is None or work.tokens <= request.max_length:
        return None
    if not request.leave_out_longer:
        name = work.facts.get("name", unit.index)
        problem = f"{unit.task}, {name}, has {work.tokens:,} tokens, and none is cut"
        raise ConfigError("--max-length", f"{request.max_length:,}", problem, "give more, or --leave-out-longer")
    return {**_record(unit, work), "left_out": True}


def _groups(units: Sequence[Unit], batch: int) -> Iterator[list[Prepared]]:
    """Units made ready: up to `batch` of a task, length and way to ask, and up to `TOKENS_AT_ONCE`, at once."""
    group: list[Prepared] = []
    tokens = 0
    for unit in units:
        work = unit.prepare()
        others = group and _alike(unit, work) != _alike(*group[0])
        if group and (others or len(group) == batch or tokens + work.tokens > TOKENS_AT_ONCE):
            yield group
            group, tokens = [], 0
        group.append((unit, work))
        tokens += work.tokens
    if group:
        yield group


def _alike(unit: Unit, work: Work) -> tuple[str, int | None, bool]:
    """What samples that are asked together have in common."""
    return unit.task, unit.length, work.max_tokens > 0


def _ask(group: Sequence[Prepared], answerer: Answerer) -> Iterator[Record]:
    began = time.perf_counter()
    works = [work for _, work in group]
    answers: list[Any]
    shown = [None if work.images is None else work.images() for work in works]
    sees = any(one is not None for one in shown)  # what answers text alone is asked as ever
    if works[0].max_tokens:
        prompts, most = [work.rows[0] for work in works], [work.max_tokens for work in works]
        answers = answerer.generate(prompts, most, shown) if sees else answerer.generate(prompts, most)
    else:
        starts = [start for work in works for start in work.starts or [1] * len(work.rows)]
        rows = [row for work in works for row in work.rows]
        of_rows = [one for work, one in zip(works, shown, strict=True) for _ in work.rows]
        scores = iter(answerer.score(rows, starts, of_rows) if sees else answerer.score(rows, starts))
        answers = [[next(scores) for _ in work.rows] for work in works]
    seconds = (time.perf_counter() - began) / len(group)
    for (unit, work), answer in zip(group, answers, strict=True):
        yield {**_record(unit, work), **work.judge(answer), "seconds": round(seconds, 4)}


def _record(unit: Unit, work: Work) -> Record:
    return {"key": unit.key, "task": unit.task, "length": unit.length, "depth": unit.depth, "index": unit.index,
            "tokens": work.tokens, "hash": work.digest, **work.facts}  # fmt: skip
