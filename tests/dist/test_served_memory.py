"""Memory that ranks share, and what an engine over ranks refuses, on all of them alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from mmtrain.config import ClusterConfig
from mmtrain.errors import ConfigError
from mmtrain.infer.context.group import ContextParallel, RanksDiffer
from mmtrain.infer.engine import Engine
from mmtrain.infer.serving import device_memory
from mmtrain.infer.serving.cache_memory import CacheMemory
from mmtrain.infer.serving.generation import RequestRefused
from mmtrain.infer.serving.options import EngineOptions
from mmtrain.infer.serving.ranks import Ranks
from mmtrain.parallel import mesh
from tests.dist.pool import Pool
from tests.infer.served import SMALL, assert_nothing_held, greedy, request, served_model, text_of
from tests.model.mixers.running_mean import registered
from tests.model.small import small_model

PAGE_BYTES = 1 * 4 * 2 * 2 * 16 * 4  # one softmax layer, 4 tokens, keys and values, 2 heads of 16, fp32
SLOT_BYTES = 3 * 4 * 16 * 16 * 4  # three lightning layers, 4 heads
TINY = replace(SMALL, max_running=1, memory_bytes=2 * SLOT_BYTES + 6 * PAGE_BYTES)


def with_ranks(function: Callable[..., Any], *args: Any) -> Any:
    """Run on every rank: a function of the context and these arguments."""
    mesh.start(ClusterConfig(device="cpu"))
    try:
        return function(ContextParallel(dist.group.WORLD, cut_tokens=4), *args)
    finally:
        mesh.stop()


def refused(call: Callable[[], Any]) -> tuple[str, str]:
    """Name and text of the error that a call raises."""
    with pytest.raises(ConfigError) as caught:
        call()
    return type(caught.value).__name__, str(caught.value)


def serve_long(context: ContextParallel) -> Any:
    model = served_model()
    engine = Engine(model, options=TINY, context=context)
    longest = engine.plan.longest
    made = engine.generate([request(text_of(longest - 3), 3)])[0].tokens
    told = refused(lambda: engine.submit(request(text_of(longest - 3), 4)))
    assert_nothing_held(engine)
    return engine.memory.shape.pages, longest, made, told


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_request_may_be_as_long_as_all_ranks_memory(pool: Pool, ranks: int) -> None:
    model = served_model()
    alone = Engine(model, options=TINY)
    local = alone.plan.pages
    with pytest.raises(RequestRefused, match="the cache holds"):
        alone.submit(request(text_of(local * 4 - 2), 3))
    longest = local * 4 * ranks
    expected = greedy(model, text_of(longest - 3), 3)
    for shape_pages, found, made, (name, told) in pool.run(with_ranks, serve_long, world=ranks):
        assert (shape_pages, found, made) == (local, longest, expected)
        assert name == RequestRefused.__name__
        assert told.startswith(f"request.tokens={longest + 1:,} tokens: ") and f"the cache holds {longest:,}" in told


def take_uneven(context: ContextParallel, what: str) -> Any:
    model, said = served_model(), []
    rank, whole = context.rank, CacheMemory.__init__

    def full(self: CacheMemory, *args: Any) -> None:
        if rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        whole(self, *args)

    def free(*_: object) -> int:
        return TINY.memory_bytes << rank

    if what == "free memory":
        with mock.patch.object(device_memory, "cache_bytes", free):
            return Engine(model, options=TINY, context=context).plan
    if what == "full":
        with mock.patch.object(CacheMemory, "__init__", full):
            return refused(lambda: Engine(model, options=TINY, context=context))
    if what == "options":
        return refused(lambda: Engine(model, options=replace(TINY, prefix_slots=rank), context=context))
    if what == "cut":
        return refused(lambda: Engine(model, options=TINY, context=replace(context, cut_tokens=0)))
    if what == "split weights":
        ranks = Ranks()
        ranks.size, ranks.splits_weights = 2, True
        return refused(lambda: Engine(model, options=TINY, ranks=ranks, context=context))
    if what == "graphs":
        return refused(lambda: Engine(model, options=replace(TINY, cuda_graphs=True), context=context))
    if what == "mixer":
        with registered():
            third = small_model(num_layers=3, layer_pattern="LMS")
            return refused(lambda: Engine(third, options=SMALL, context=context))
    if what == "warning":
        options = EngineOptions(page_tokens=4, memory_bytes=1 << 22, prefix_interval=4, warn_after=2)
        engine = Engine(model, options=options, warn=said.append, context=context)
        engine.generate([request(text_of(6, seed=n), 1) for n in range(4)])
        return len(said)
    engine = Engine(model, options=TINY, context=context)
    engine.submit(request(text_of(6 + (what == "length") * rank, seed=rank * (what == "tokens")), 4))
    return refused(engine.step)


def test_ranks_agree_on_the_least_memory(pool: Pool) -> None:
    plans = pool.run(with_ranks, take_uneven, "free memory", world=2)
    assert plans[0] == plans[1] and plans[0].pages == 2 * Engine(served_model(), options=TINY).plan.pages
    assert plans[0].bytes <= TINY.memory_bytes


def test_what_one_rank_lacks_is_refused_by_all(pool: Pool) -> None:
    for name, told in pool.run(with_ranks, take_uneven, "full", world=2):
        assert name == ConfigError.__name__ and told.startswith("engine.memory_bytes=") and "cannot be had" in told


@pytest.mark.parametrize("what", ["options", "length", "tokens"])
def test_ranks_that_were_asked_for_different_things_stop(pool: Pool, what: str) -> None:
    told = "model or options" if what == "options" else "the requests that they serve"
    for name, text in pool.run(with_ranks, take_uneven, what, world=2):
        assert name == RanksDiffer.__name__
        assert text.startswith(f"engine.context=2 ranks: differ in {told}; make the same calls")


def test_what_makes_no_sense_is_refused(pool: Pool) -> None:
    assert all("context.cut_tokens=0" in text for _, text in pool.run(with_ranks, take_uneven, "cut", world=2))
    assert all("engine.cuda_graphs=True" in text for _, text in pool.run(with_ranks, take_uneven, "graphs", world=2))
    for _, text in pool.run(with_ranks, take_uneven, "split weights", world=2):
        assert "engine.context=2 ranks: the weights are split over 2; split either weights or keys" in text
    for _, text in pool.run(with_ranks, take_uneven, "mixer", world=2):
        assert "RunningMeanSlots: cannot be served under context parallelism" in text


def test_warnings_are_told_once(pool: Pool) -> None:
    assert pool.run(with_ranks, take_uneven, "warning", world=2) == [1, 0]
