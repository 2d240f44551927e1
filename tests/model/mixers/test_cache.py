"""One document continued by its mixers' caches gives the logits of the whole forward pass."""

from __future__ import annotations

import pytest
import torch

from mmtrain.model.packed_seq import Packing
from tests.model.mixers.decoding import OneDocument
from tests.model.small import small_model


@pytest.mark.parametrize("pattern", ["LLLS", "S", "L"])
@pytest.mark.parametrize("pieces", [[300], [1] * 40, [7, 1, 260, 1, 31], [128, 128]])
def test_cached_pieces_give_the_logits_of_the_full_forward(pattern: str, pieces: list[int]) -> None:
    model = small_model(num_layers=4, layer_pattern=pattern, vocab_size=97).eval()
    tokens = torch.randint(0, 97, (sum(pieces),), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        full = model(tokens, Packing.from_lengths([len(tokens)]))
    document = OneDocument(model)
    cached = torch.cat([document.read(part) for part in tokens.split(pieces)])
    assert document.length == len(tokens)
    torch.testing.assert_close(cached, full, rtol=1e-4, atol=2e-5)
