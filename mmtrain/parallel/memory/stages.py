"""Stages of a pipeline that cost about the same and fit a device: which layers each rank can hold, by prediction.

Balance by cost alone gives stages of few long softmax layers and stages of many lightning layers, and so ranks that
hold several times the experts of others.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace

from mmtrain.parallel.memory.options import most_with_error, most_with_margin
from mmtrain.parallel.memory.predict import GIB, peak_with_layers, predict
from mmtrain.parallel.memory.workload import Workload, layer_parameters
from mmtrain.parallel.pipeline.split import layer_costs, partition

PARAMETER_RATIO = 2.0
"""Parameters of the layers of the largest stage over those of the smallest, at most, where a device's memory is not
known. Ours: the paper states no split."""
_STEP = GIB / 16  # of a search for the least memory that is enough


def balance_stages(
    works: Sequence[Workload], seq_len: int, device_bytes: float | None, search: bool = True
) -> tuple[range, ...]:
    """Return the layers of each stage: the costliest stage costs as little as it can while every stage fits.

    With its margin, if that can be; else without (`cannot_fit`); else the ranks need as little as they can. A rank of
    several stages gives each an equal share of its memory. Where memory is not known, parameters bound the stages.

    Args:
        works: phases that are trained with these stages, of one layout with a pipeline.
        seq_len: length at which the stages cost about the same.
        device_bytes: memory of a device; None where it is not known.
        search: look for the least need where nothing fits, which takes seconds; else the balance is by cost alone.
    """
    first = works[0]
    costs, head = layer_costs(first.model, seq_len)
    count = first.layout.pp * first.parallel.pp_chunks
    by_cost = partition(costs, head, count)
    assert by_cost is not None
    if device_bytes is None:
        return tuple(_by_parameters(first, costs, head, by_cost))
    need, needs = _Need(works), max(predict(replace(work, stages=tuple(by_cost))).peak for work in works)
    world = first.layout.world
    for limit in (most_with_margin(device_bytes, world), most_with_error(device_bytes)):
        if needs <= limit:
            return tuple(by_cost)
        found = partition(costs, head, count, need.within(limit))
        if found is not None:
            return tuple(found)
    if not search:
        return tuple(by_cost)
    found = partition(costs, head, count, need.within(need.least_limit(count, by_cost)))
    assert found is not None
    return tuple(found)


class _Need:
    """Predicted peaks of ranks by the layers that a stage of theirs has; more layers never need less."""

    def __init__(self, works: Sequence[Workload]) -> None:
        self.works, self.letters = works, works[0].model.layer_types
        self.pp, self.chunks = works[0].layout.pp, works[0].parallel.pp_chunks
        self.found: dict[tuple[int, str], float] = {}

    def peak(self, stage: int, start: int, end: int) -> float:
        """Bytes of the rank of a stage if each of its stages had such layers, in the phase that needs most."""
        key = stage % self.pp, self.letters[start:end]
        if key not in self.found:
            rank, letters = key
            self.found[key] = max(peak_with_layers(work, rank, letters * self.chunks) for work in self.works)
        return self.found[key]

    def reach(self, stage: int, start: int, limit: float) -> int:
        """The last layer up to which a stage may go from `start` on; `start` itself where it may hold none."""
        size, count = 1, len(self.letters)
        while start + size < count and self.peak(stage, start, start + size) <= limit:
            size = min(2 * size, count - start)
        # By bisection between ends that may be and ends that may not, so that long stages are seldom predicted.
        ends = range(start + 1, start + size + 1)
        return start + bisect_right(ends, limit, key=lambda end: self.peak(stage, start, end))

    def within(self, limit: float) -> Callable[[int, int, int], bool]:
        """Return whether a stage's rank needs at most so many bytes, for :func:`partition`."""
        reached: dict[tuple[int, int], int] = {}

        def fits(stage: int, start: int, end: int) -> bool:
            key = stage, start
            if key not in reached:
                reached[key] = self.reach(stage, start, limit)
            return end <= reached[key]

        return fits

    def least_limit(self, count: int, stages: Sequence[range]) -> float:
        """Bytes, to a 16th of a GiB, that are enough for some cut into `count` stages, as these are enough for one."""
        high = max(self.peak(stage, part.start, part.stop) for stage, part in enumerate(stages))
        low = 0.0
        while high - low > _STEP:
            middle = (low + high) / 2
            low, high = (low, middle) if self._is_enough(count, middle) else (middle, high)
        return high

    def _is_enough(self, count: int, limit: float) -> bool:
        """Whether stages that each go as far as they may, but leave a layer to each of the others, reach the end."""
        start, layers = 0, len(self.letters)
        for stage in range(count):
            end = min(self.reach(stage, start, limit), layers - (count - stage - 1))
            if end == start:
                return False
            start = end
        return start == layers


def _by_parameters(work: Workload, costs: Sequence[float], head: float, by_cost: list[range]) -> list[range]:
    """The cut of least cost whose stages' layers differ by at most PARAMETER_RATIO in parameters, or by the least
    power of it that some cut allows.
    """
    of_kind = {letter: layer_parameters(work.model, work.layout, letter).whole for letter in work.model.layer_pattern}
    before = [0]
    for letter in work.model.layer_types:
        before.append(before[-1] + of_kind[letter])

    def held(start: int, end: int) -> int:
        return before[end] - before[start]

    ratio, count = PARAMETER_RATIO, len(by_cost)
    while True:
        sizes = [held(part.start, part.stop) for part in by_cost]
        if max(sizes) <= ratio * min(sizes):
            return by_cost
        share = before[-1] / count  # the smallest stage has at most this, and the largest no less
        lows = {held(i, j) for i in range(len(costs)) for j in range(i + 1, len(costs) + 1)}
        found = [
            partition(costs, head, count, lambda _, i, j, low=low, high=ratio * low: low <= held(i, j) <= high)
            for low in sorted(low for low in lows if share / ratio <= low <= share)
        ]
        cuts = [cut for cut in found if cut is not None]
        if cuts:
            return min(cuts, key=lambda cut: _costs(costs, head, cut))
        ratio *= PARAMETER_RATIO


def _costs(costs: Sequence[float], head: float, cut: Sequence[range]) -> tuple[float, float, list[int]]:
    """What :func:`partition` prefers by: the largest cost, the sum of squares, the bounds."""
    sums = [sum(costs[part.start : part.stop]) for part in cut]
    sums[-1] += head
    return max(sums), sum(one * one for one in sums), [part.start for part in cut]
