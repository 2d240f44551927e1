"""Whole weights out of the shards of several ranks, and shards of their gradients out of whole sums, in buckets.

Once a step each, beside the step's first forward and its last backward pass: on a GPU the exchange has a stream of its
own, so that nothing of it is inside of a recorded graph. Weights belong to units, numbered in the order in which a
forward pass needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.distributed import ProcessGroup

from mmtrain.parallel.weight_buckets import Buffers, ShardedWeight, fill_buckets


class WeightExchange:
    """The ranks of a group and the weights that each of them has whole.

    All ranks have to start the same exchanges in the same order; which of a rank's units they are told to be needed, or
    done, one by one and which together, is its own affair.

    Args:
        weights: at least one, in the same order on all ranks, by their units.
        group: the ranks.
    """

    def __init__(self, weights: Sequence[ShardedWeight], group: ProcessGroup) -> None:
        self._buckets = fill_buckets(weights, group)
        most, device = max(bucket.elements for bucket in self._buckets), weights[0].shard.device
        # Two, so that one bucket is copied while another is on its way.
        count = min(2, len(self._buckets))
        self._buffers = [Buffers(most, group.size(), device) for _ in range(count)]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._arrivals: list[torch.cuda.Event] = []  # of the buckets of a gather that nobody has waited for yet
        self._unreduced = len(self._buckets)  # of a reduction; the last buckets go first

    def start_gather(self) -> None:
        """Begin to bring every rank's whole weights up to date with the shards, in their own type. Collective.

        They are so after :meth:`wait_for` their unit; without a GPU at once.
        """
        with self._beside():
            arrived = self._in_turns([bucket.start_gather for bucket in self._buckets])
        self._arrivals = arrived[::-1]

    def wait_for(self, unit: int) -> None:
        """Let the device go on when the weights of all units up to this one are there. Not collective."""
        while self._arrivals and self._buckets[-len(self._arrivals)].units[0] <= unit:
            torch.cuda.current_stream().wait_event(self._arrivals.pop())

    def gather(self) -> None:
        """Bring the whole weights up to date, and wait for them. Collective."""
        self.start_gather()
        self.wait_for(self._buckets[-1].units[1])

    def start_reduce(self, unit: int) -> None:
        """Begin to reduce the sums of all units from this one on, which are whole. Collective, see the class."""
        ready = self._unreduced
        while ready and self._buckets[ready - 1].units[0] >= unit:
            ready -= 1
        if ready < self._unreduced:
            with self._beside():
                self._in_turns([bucket.start_reduce for bucket in self._buckets[ready : self._unreduced][::-1]])
            self._unreduced = ready

    def finish_reduce(self) -> None:
        """Reduce what is left, and let the device go on when all shards' gradients are the mean of all ranks' sums."""
        self.start_reduce(self._buckets[0].units[0])
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        self._unreduced = len(self._buckets)

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """The exchange's own stream, behind all that the current one has been given."""
        with torch.no_grad():
            if self._stream is None:
                yield
                return
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                yield

    def _in_turns(self, starts: Sequence[Callable[[Buffers], Callable[[], None]]]) -> list[torch.cuda.Event]:
        """Start each bucket's collective before that of the bucket before it is waited for; returns when each is done.

        There are no such events without a GPU, where all are done on return.
        """
        events: list[torch.cuda.Event] = []
        finish: Callable[[], None] | None = None
        for number, start in enumerate(starts):
            started = start(self._buffers[number % len(self._buffers)])
            if finish is not None:
                self._finish(finish, events)
            finish = started
        if finish is not None:
            self._finish(finish, events)
        return events

    def _finish(self, finish: Callable[[], None], events: list[torch.cuda.Event]) -> None:
        finish()
        if self._stream is not None:
            events.append(torch.cuda.Event())
            events[-1].record(self._stream)
