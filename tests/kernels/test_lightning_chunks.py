"""Chunks of a row with states of their own: put together again they are the row, forward and backward.

Legend: T tokens, H heads, D width of q and k, E width of v, M chunks of the row, C tokens of a chunk.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError
from mmkernels.lightning import ChunkPlan, chunks_backward, chunks_forward, states_between
from tests.kernels.chunk_cases import NAMES, TABLES, Row, chunk_inputs, whole_row

ROWS = {
    "short documents": (3, 1, 2, 7, 0, 5, 6),
    "one document": (24,),
    "an edge": (8, 4, 12),
    "spans all but one": (3, 20, 1),
    "of prime lengths": (13, 11),
    "tiles of a chunk": (101, 1, 58, 120),
}
SLOPES = torch.tensor([1.0, 0.004, 0.0])


def _inputs(lengths: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return chunk_inputs(sum(lengths), SLOPES, (4, 5), dtype, seed=len(lengths))


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
def test_chunks_are_the_row(lengths: tuple[int, ...], table: str) -> None:
    inputs = _inputs(lengths)
    found = Row(lengths, TABLES[table], SLOPES).run(*inputs)
    for name, x, y in zip(NAMES, found, whole_row(lengths, SLOPES, *inputs), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_a_chunk_does_not_depend_on_who_has_it() -> None:
    inputs = _inputs(ROWS["spans all but one"], torch.float32)
    found = [Row(ROWS["spans all but one"], table, SLOPES).run(*inputs) for table in TABLES.values()]
    for other in found[1:]:
        for x, y in zip(found[0], other, strict=True):
            assert torch.equal(x, y)


def test_gradients_are_those_of_the_projection_before_its_silu() -> None:
    lengths = ROWS["spans all but one"]
    inputs = _inputs(lengths)
    found = Row(lengths, TABLES["zigzag"], SLOPES).run(*inputs, silu=True)
    for x, y in zip(found, whole_row(lengths, SLOPES, *inputs, silu=True), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_chunks_that_do_not_fit_are_refused() -> None:
    q, k, v, do = _inputs((24,))
    states = torch.zeros(5, 3, 4, 5, dtype=torch.float64)
    with pytest.raises(KernelArgumentError, match="5 chunks"):
        chunks_forward(q, k, v, SLOPES, torch.tensor([0, 24]), states)
    with pytest.raises(KernelArgumentError, match="edge of a chunk of 6"):
        chunks_forward(q, k, v, SLOPES, torch.tensor([0, 12, 24]), states[:4])
    cu_seqlens, before = torch.tensor([0, 24]), states[:1]
    _, saved = chunks_forward(q, k, v, SLOPES, cu_seqlens, before)
    for grads, problem in (
        ((q, k, v.mT.contiguous().mT), r"grads\[2\]: got strides"),
        ((q, k.float(), v), r"grads\[1\]: got \[\[1, 24, 3, 4\], torch.float32"),
        ((q, k, q), r"grads\[2\]: got \[\[1, 24, 3, 4\]"),
    ):
        with pytest.raises(KernelArgumentError, match=problem):
            chunks_backward(q, k, v, do, SLOPES, cu_seqlens, before, lambda: before, saved, grads)


THROUGH, ENTERS = [False, True, True, False, False, False], [False, True, True, True, False, True]


def test_a_plan_says_which_states_are_read_and_where_they_go() -> None:
    """One document runs through chunks 0 to 3, another through 4 and 5; nobody wants what enters 2."""
    plan = ChunkPlan.of(7, THROUGH, ENTERS, [3, 1], [5, 4, 3, 2, 1, 0])
    ahead = [(-1, 5, 0), (1, 4, 1), (-1, 3, 1), (0, -1, 0)]
    back = [(-1, -1, 0), (-1, -1, 0), (0, 2, 0), (-1, 3, 1), (1, -1, 0)]
    assert [[tuple(step) for step in way] for way in plan.steps] == [ahead, back]
    assert (plan.chunk_tokens, plan.num_chunks, plan.num_wanted) == (7, 6, 2)
    assert plan.steps_2L3.tolist() == [[*map(list, way), *[[-1, -1, 0]] * (7 - len(way))] for way in (ahead, back)]


def test_a_state_is_the_decayed_sum_as_far_as_its_document_reaches() -> None:
    states = torch.randn(6, 3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plan = ChunkPlan.of(7, THROUGH, ENTERS, range(6), range(6))
    decay = torch.exp(-SLOPES.double() * 7)[:, None, None]
    s = states
    ahead = [s[0] * 0, s[0], s[1] + decay * s[0], s[2] + decay * (s[1] + decay * s[0]), s[0] * 0, s[4]]
    back = [s[1] + decay * (s[2] + decay * s[3]), s[2] + decay * s[3], s[3], s[0] * 0, s[5], s[0] * 0]
    for reverse, want in enumerate((ahead, back)):
        got = states_between(states, SLOPES, plan, reverse=bool(reverse))
        torch.testing.assert_close(got, torch.stack(want), rtol=1e-14, atol=1e-14)


def test_plans_and_states_that_do_not_fit_are_refused() -> None:
    for change, problem in (
        ({"enters_M": ENTERS[1:]}, "enters_M: got 5 flags"),
        ({"place_M": [0, 1, 2, 3, 4, 4]}, "place_M"),
        ({"wanted_N": [6]}, "wanted_N"),
        ({"wanted_N": [1, 1]}, "wanted_N"),
    ):
        given = {"through_M": THROUGH, "enters_M": ENTERS, "wanted_N": [0], "place_M": range(6)}
        with pytest.raises(KernelArgumentError, match=problem):
            ChunkPlan.of(7, **{**given, **change})
    plan = ChunkPlan.of(7, THROUGH, ENTERS, range(6), range(6))
    with pytest.raises(KernelArgumentError, match="states_MHDE: got 5 states"):
        states_between(torch.zeros(5, 3, 4, 5), SLOPES, plan)
    with pytest.raises(KernelArgumentError, match="slopes_H"):
        states_between(torch.zeros(6, 2, 4, 5), SLOPES, plan)
