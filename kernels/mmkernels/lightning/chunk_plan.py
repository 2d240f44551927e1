"""How states go from chunk to chunk of a row: worked out once a micro-batch, for all layers, forward and backward.

Shape letters: M chunks of the row, N wanted ones, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError


class Step(NamedTuple):
    """One chunk on the way of the state along the row.

    Attributes:
        out: where the state that enters the chunk goes among the wanted ones; -1 where nobody wants it.
        place: where the chunk's own state lies; -1 where no state goes on that any wanted one is made of.
        keeps: 1 where the state that entered, decayed, goes on with the chunk's own, else 0.
    """

    out: int
    place: int
    keeps: int


@dataclass(frozen=True)
class ChunkPlan:
    """Steps of :func:`~mmkernels.lightning.states_between`, on the host and on the device.

    Attributes:
        chunk_tokens: C.
        num_chunks: M.
        num_wanted: N.
        steps: for the forward [0] and the reversed [1] way the steps in order, up to the last wanted chunk.
        steps_2L3: int32 [2, L, 3] with L = M + 1, the same on the device; behind the last step all are -1, -1, 0.
    """

    chunk_tokens: int
    num_chunks: int
    num_wanted: int
    steps: tuple[tuple[Step, ...], tuple[Step, ...]]
    steps_2L3: Tensor

    @staticmethod
    def of(
        chunk_tokens: int,
        through_M: Sequence[bool],
        enters_M: Sequence[bool],
        wanted_N: Sequence[int],
        place_M: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> ChunkPlan:
        """Plan from how documents lie in the row; the host does not wait for the device.

        Args:
            chunk_tokens: C.
            through_M: whether a document runs through each chunk, from before it to behind it.
            enters_M: whether the document of each chunk's first token began before the chunk.
            wanted_N: numbers of the chunks whose states are wanted, each once.
            place_M: where each chunk's state lies among the M states.
            device: where the states will be.

        Raises:
            KernelArgumentError: the flags, the places or the wanted chunks are not those of M chunks.
        """
        chunks = len(through_M)
        if len(enters_M) != chunks:
            raise KernelArgumentError("enters_M", f"{len(enters_M)} flags", f"one for each of the {chunks} chunks")
        if sorted(int(place) for place in place_M) != list(range(chunks)):
            raise KernelArgumentError("place_M", list(place_M), f"each of the {chunks} places once")
        if len({*wanted_N}) != len(wanted_N) or not all(0 <= chunk < chunks for chunk in wanted_N):
            raise KernelArgumentError("wanted_N", list(wanted_N), f"numbers of the {chunks} chunks, each once")
        # What enters chunk c comes out of chunk c - 1; on the reversed way, what enters chunk c - 1 comes out of c.
        goes_on = [bool(enters) for enters in (*enters_M[1:], False)]
        ways = (
            _steps(range(chunks), goes_on, through_M, wanted_N, place_M),
            _steps(range(chunks)[::-1], enters_M, through_M, wanted_N, place_M),
        )
        steps_2L3 = torch.tensor([-1, -1, 0], dtype=torch.int32).repeat(2, chunks + 1, 1)
        for way, steps in enumerate(ways):
            if steps:
                steps_2L3[way, : len(steps)] = torch.tensor(steps, dtype=torch.int32)
        if torch.device(device).type == "cuda":
            steps_2L3 = steps_2L3.pin_memory().to(device, non_blocking=True)
        return ChunkPlan(int(chunk_tokens), chunks, len(wanted_N), ways, steps_2L3)


def _steps(
    order: range, goes_on: Sequence[bool], through_M: Sequence[bool], wanted_N: Sequence[int], place_M: Sequence[int]
) -> tuple[Step, ...]:
    """Steps of one way; states that reach no wanted chunk are not read."""
    out = {int(chunk): n for n, chunk in enumerate(wanted_N)}
    steps: list[Step] = []
    needed = False  # whether the state that comes out of the chunk is part of a wanted one
    for chunk in reversed(order):
        place = int(place_M[chunk]) if needed and goes_on[chunk] else -1
        keeps = place >= 0 and bool(through_M[chunk])
        if chunk in out or steps:
            steps.append(Step(out.get(chunk, -1), place, int(keeps)))
        needed = chunk in out or keeps
    return tuple(reversed(steps))
