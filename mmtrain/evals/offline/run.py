"""Units of an evaluation run one after the other, each written down when it is done, and taken over on a second try."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmtrain.errors import ConfigError
from mmtrain.evals.answering import Answerer
from mmtrain.evals.offline.request import EvalRequest
from mmtrain.evals.offline.units import Unit, Work

Record = dict[str, Any]
Prepared = tuple[Unit, Work]


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
        batch: prompts that are generated from at once.
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
        for record in _ask(waiting, answerer):
            log.add(record)
            records.append(record)
            done(record)
    return records


def check_lengths_of_files(units: Sequence[Unit], request: EvalRequest) -> None:
    """Refuse samples of files that are longer than is allowed, before anything runs.

    Raises:
        ConfigError: naming the first one.
    """
    if request.max_length is not None and not request.leave_out_longer:
        for unit in units:
            if unit.length is None:
                _left_out(unit, unit.prepare(), request)


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
    """Units made ready: `batch` of a task and length at once where they generate, else each alone."""
    group: list[Prepared] = []
    for unit in units:
        work = unit.prepare()
        if group and (unit.task, unit.length, bool(work.max_tokens)) != (group[0][0].task, group[0][0].length, True):
            yield group
            group = []
        group.append((unit, work))
        if len(group) >= (batch if work.max_tokens else 1):
            yield group
            group = []
    if group:
        yield group


def _ask(group: Sequence[Prepared], answerer: Answerer) -> Iterator[Record]:
    if not group:
        return
    began = time.perf_counter()
    works = [work for _, work in group]
    answers: list[Any]
    if works[0].max_tokens:
        prompts: list[np.ndarray] = [work.rows[0] for work in works]
        found = answerer.generate(prompts, max(work.max_tokens for work in works))
        answers = [ids[: work.max_tokens] for ids, work in zip(found, works, strict=True)]
    else:
        answers = [answerer.score(work.rows) for work in works]
    seconds = (time.perf_counter() - began) / len(group)
    for (unit, work), answer in zip(group, answers, strict=True):
        yield {**_record(unit, work), **work.judge(answer), "seconds": round(seconds, 4)}


def _record(unit: Unit, work: Work) -> Record:
    return {"key": unit.key, "task": unit.task, "length": unit.length, "depth": unit.depth, "index": unit.index,
            "tokens": work.tokens, "hash": work.digest, **work.facts}  # fmt: skip
