"""Documents of several lengths, continued together from slots and pages, give what each gives alone."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import nn

from mmtrain.errors import ConfigError
from mmtrain.model.mixers.batch_cache import BatchCache, CacheShape, DocumentBatch
from mmtrain.model.mixers.registry import MIXERS, mixer_spec
from mmtrain.model.packed_seq import Packing
from tests.model.mixers.running_mean import SPEC
from tests.model.small import draw_tokens, small_config, small_model

PATTERNS = {"hybrid": "LLS", "softmax": "S", "lightning": "L"}
SHAPE = CacheShape(pages=40, page_tokens=4, slots=5)
CPU = torch.device("cpu")


def caches_of(model: nn.Module) -> list[BatchCache]:
    """Memory of all layers, poisoned: what nobody wrote must not count."""
    made = [
        mixer_spec(letter).batch_cache_class()(model.config, SHAPE, torch.float32, CPU)
        for letter in model.config.layer_types
    ]
    for cache in made:
        for value in vars(cache).values():
            value.fill_(torch.nan)
    return made


@torch.no_grad()
def read(model: nn.Module, caches: list[BatchCache], batch: DocumentBatch, tokens: list[torch.Tensor]) -> torch.Tensor:
    """Logits of all new tokens."""
    views = [cache.view(batch) for cache in caches]
    return model.lm_head(model.final_states(torch.cat(tokens), batch.packing, views))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tokens_at_once", [160, 40, 4])
def test_documents_in_one_row_are_those_alone(pattern: str, tokens_at_once: int) -> None:
    shape = replace(SHAPE, pages=tokens_at_once // 4)  # how many keys may be laid out; the memory itself is larger
    model = small_model(num_layers=3, layer_pattern=PATTERNS[pattern]).eval()
    texts = [draw_tokens(length, seed=length) for length in (23, 9, 31)]
    slots, free = [4, 0, 2], torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    pages = [[free.pop() for _ in range(8)] for _ in texts]
    caches, done = caches_of(model), [0, 0, 0]
    for cache in caches:
        for slot in slots:
            cache.begin(slot)
    found: list[list[torch.Tensor]] = [[], [], []]
    # Pieces of all documents, of some, and single tokens.
    for counts in ([5, 1, 17], [1, 1, 1], [0, 6, 1], [16, 0, 11], [1, 1, 1]):
        at_work = [n for n, count in enumerate(counts) if count]
        queries = [counts[n] for n in at_work]
        keys = [done[n] + counts[n] for n in at_work]
        batch = DocumentBatch.of(queries, keys, [slots[n] for n in at_work], [pages[n] for n in at_work], shape, CPU)
        assert batch.single == (max(queries) == 1)
        new = [texts[n][done[n] : done[n] + counts[n]] for n in at_work]
        for n, part in zip(at_work, read(model, caches, batch, new).split(queries), strict=True):
            found[n].append(part)
            done[n] += counts[n]
    assert done == [23, 9, 31]
    for text, parts in zip(texts, found, strict=True):
        with torch.no_grad():
            alone = model(text, Packing.from_lengths([len(text)]))
        torch.testing.assert_close(torch.cat(parts), alone, rtol=0, atol=1e-5)


def test_a_copied_slot_and_page_continue_as_their_sources() -> None:
    model = small_model(num_layers=2, layer_pattern="LS").eval()
    text, caches = draw_tokens(8), caches_of(model)
    for cache in caches:
        cache.begin(1)
    read(model, caches, DocumentBatch.of([6], [6], [1], [[3, 7]], SHAPE, CPU), [text[:6]])
    for cache in caches:
        cache.copy_slot(1, 4)
        cache.copy_page(7, 9)
    ones = [DocumentBatch.of([2], [8], [slot], [[3, page]], SHAPE, CPU) for slot, page in ((1, 7), (4, 9))]
    first, second = (read(model, caches, batch, [text[6:]]) for batch in ones)
    assert torch.equal(first, second) and first.isfinite().all()


def test_a_mixer_without_a_batch_cache_is_refused() -> None:
    one_by_one = mock.patch.dict(MIXERS, {"M": replace(SPEC, batch_cache=None)})
    with one_by_one, pytest.raises(ConfigError, match="running_mean layers cannot be served"):
        mixer_spec("M").batch_cache_class()


@pytest.mark.parametrize("letter", ["L", "S"])
def test_the_size_on_record_is_what_is_taken(letter: str) -> None:
    config, size = small_config(), mixer_spec(letter).cache_size(small_config())
    cache = mixer_spec(letter).batch_cache_class()(config, SHAPE, torch.float32, CPU)
    taken = sum(value.numel() for value in vars(cache).values())
    assert taken == size.token * SHAPE.pages * SHAPE.page_tokens + size.document * SHAPE.slots
