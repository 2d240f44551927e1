"""Pages of ranks: every token of a document lies on one rank, at a place of its own, however long the document is."""

from __future__ import annotations

import random
from array import array

import numpy as np
import pytest
import torch

from mmtrain.infer.serving.page_owner import PageOwner
from mmtrain.infer.serving.pages import PagePool
from mmtrain.model.mixers.batch_cache import CacheShape, DocumentBatch

MI = 1 << 20


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_token_is_written_once_and_read_from_there(ranks: int) -> None:
    rng = random.Random(ranks)
    pages = rng.sample(range(8 * ranks + 8), 12)
    for tokens in (1, 3, 4, 5, 17, 47, 48):
        found: dict[int, tuple[int, int]] = {}
        for rank in range(ranks):
            owner = PageOwner(ranks, rank, 4)
            first = rng.randrange(tokens)
            mine: list[int] = []
            for begin, count in ((0, first), (first, tokens - first)):
                here, places = owner.written(pages, begin, count)
                found |= {begin + n: (rank, place) for n, place in zip(here.tolist(), places.tolist(), strict=True)}
                mine += [begin + n for n in here.tolist()]
            local, held = owner.stored(pages, tokens)
            assert held == len(mine)
            read = [page * 4 + place for page in local.tolist() for place in range(4)][:held]
            assert [found[token] for token in mine] == [(rank, place) for place in read]
        assert sorted(found) == list(range(tokens)) and len(set(found.values())) == tokens
        for token, (rank, place) in found.items():
            assert PageOwner(ranks, rank, 4).place(pages[token // 4]) == (rank, place // 4) and token % 4 == place % 4


def test_offsets_of_four_mi_tokens_beyond_two_to_the_31() -> None:
    size, ranks, first_page = 64, 8, 1 << 30  # pages of which 64 tokens lie at 2^33 and above on each rank
    pages = array("q", range(first_page, first_page + 4 * MI // size))
    for rank in range(ranks):
        owner = PageOwner(ranks, rank, size)
        local, held = owner.stored(pages, 4 * MI)
        assert held == 4 * MI // ranks and local.dtype == np.int64
        assert local[-1] == (first_page + 4 * MI // size - ranks + rank) // ranks
        here, places = owner.written(pages, 4 * MI - 600, 600)
        assert places.dtype == here.dtype == np.int64
        for n, place in zip(here.tolist(), places.tolist(), strict=True):
            page = pages[(4 * MI - 600 + n) // size]
            assert (page % ranks, page // ranks * size + (4 * MI - 600 + n) % size) == (rank, place) and place > 1 << 31
    assert sum(len(PageOwner(ranks, rank, size).written(pages, 4 * MI - 600, 600)[0]) for rank in range(ranks)) == 600


def test_places_on_the_device_do_not_overflow_at_four_mi_tokens() -> None:
    size, first_page, tokens = 64, 1 << 26, 4 * MI
    pages = array("q", range(first_page, first_page + tokens // size))
    shape = CacheShape((1 << 26) + len(pages), size, 1)
    batch = DocumentBatch.of([3], [tokens], [0], [pages], shape, torch.device("cpu"))
    assert batch.packing.position_ids_T.tolist() == [tokens - 3, tokens - 2, tokens - 1]
    end = (first_page + len(pages)) * size
    assert end > 1 << 32 and batch.write_T.tolist() == [end - 3, end - 2, end - 1]
    assert batch.read_S.dtype == torch.int64 and batch.read_S[-1] == end - 1 and len(batch.read_S) == tokens
    assert batch.suffixes.cu_keys.tolist() == [0, tokens]
    # What such a place means in elements of a layer: 2^32 tokens of 8 heads of 128.
    pages_PLGK = torch.empty(shape.pages, size, 8, 128, device="meta")
    flat_AGK = pages_PLGK.flatten(0, 1)
    assert flat_AGK[end - 1].storage_offset() == (end - 1) * 1024 > 1 << 41


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_pages_come_from_the_rank_with_the_most(ranks: int) -> None:
    pool, rng, held = PagePool(12 * ranks, ranks), random.Random(0), []
    assert pool.take(2 * ranks) == list(range(2 * ranks))  # one document goes round the ranks
    pool.release(range(2 * ranks))
    for _ in range(300):
        if held and rng.random() < 0.5:
            pool.release(held.pop(rng.randrange(len(held))))
        elif pool.free >= (count := rng.randint(0, 5)):
            before = [sum(not pool.owners[page] for page in range(rank, 12 * ranks, ranks)) for rank in range(ranks)]
            held.append(pool.take(count))
            after = [sum(not pool.owners[page] for page in range(rank, 12 * ranks, ranks)) for rank in range(ranks)]
            assert max(after) - min(after) <= max(1, max(before) - min(before))
        used = [page for pages in held for page in pages]
        assert len(set(used)) == len(used) and pool.free == 12 * ranks - len(used)
