"""This rank's micro-batches of each step, read ahead of need, phase after phase."""

from __future__ import annotations

from collections.abc import Callable, Generator
from itertools import islice

from mmdata.images.stream_batches import read_batches
from mmdata.rows.loader import PackedBatch
from mmtrain.train.curriculum import RunStep, rank_rows
from mmtrain.train.inputs import RunInputs


class BatchReader:
    """Reader of the rows that fall to one of the ranks that share a batch.

    Which rows a step reads is known only when the one before has been counted, but their order is not in doubt: a rank
    reads on through its share of the phase's stream, and a new phase opens its own.

    Args:
        inputs: the corpora of the run.
        dp_rank: this rank among those that share a batch.
        dp_size: how many they are.
        micro_batch_rows: rows of a micro-batch.
        num_workers: processes that read ahead; 0 reads when asked. Of rows with images, also threads that decode them.
        log: gets a line for each of the first images that could not be decoded, on this rank.
    """

    def __init__(
        self,
        inputs: RunInputs,
        dp_rank: int,
        dp_size: int,
        micro_batch_rows: int,
        num_workers: int,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self._log = log
        self._inputs, self._rank, self._ranks = inputs, dp_rank, dp_size
        self._rows, self._workers = micro_batch_rows, num_workers
        self._next: tuple[int, int] | None = None  # phase and row that the open stream goes on with
        self._stream: Generator[PackedBatch] | None = None

    def read(self, step: RunStep) -> list[PackedBatch]:
        """Return this rank's micro-batches of a step; all ranks that share the batch get equally many."""
        if self._next != (step.phase_index, step.first_row):
            self.close()
            rows = rank_rows(step.first_row, self._rank, self._ranks, self._rows)
            stream = self._inputs.train_stream(step.phase_index)
            self._stream = read_batches(stream, rows, num_workers=self._workers, log=self._log)
        assert self._stream is not None
        self._next = (step.phase_index, step.first_row + step.num_rows)
        return list(islice(self._stream, step.num_rows // (self._ranks * self._rows)))

    def close(self) -> None:
        """End the processes that read ahead."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
