"""Embeddings given from outside: they take the place of the table's, in training, in decoding and in a pipeline."""

from __future__ import annotations

import torch
from torch import Tensor

from mmtrain.model.given_embeddings import GivenEmbeddings
from mmtrain.model.packed_seq import Packing
from tests.model.mixers.decoding import OneDocument
from tests.model.small import draw, draw_tokens, gradients, relative, small_model

SHAPE = dict(num_layers=2, layer_pattern="LS")
AT = torch.tensor([0, 7, 8, 19])
TOKENS, PACKING = draw_tokens(20), Packing.from_lengths([8, 12])


def given(rows_ID: Tensor) -> GivenEmbeddings:
    return GivenEmbeddings(AT, rows_ID)


def test_given_rows_of_the_table_are_those_of_their_tokens() -> None:
    """Giving what the table has for other tokens is having these tokens, gradients of the table included."""
    other = TOKENS.clone()
    other[AT] = draw_tokens(4, seed=9)
    models = small_model(**SHAPE), small_model(**SHAPE)
    losses = [
        models[0](other, PACKING, TOKENS.roll(-1)),
        models[1](TOKENS, PACKING, TOKENS.roll(-1), given=given(models[1].embed_tokens(other[AT]))),
    ]
    assert relative(losses[1].ce_sum, losses[0].ce_sum) < 1e-6
    for loss in losses:
        (loss.ce_sum + loss.aux_loss).backward()
    ours, theirs = gradients(models[1]), gradients(models[0])
    assert all(relative(ours[name], theirs[name]) < 1e-5 for name in theirs)


def test_rows_of_another_dtype_become_the_table_s_and_get_their_own_gradient() -> None:
    rows_ID = draw(4, 48).requires_grad_()
    model = small_model(**SHAPE)
    model(TOKENS, PACKING, TOKENS.roll(-1), given=given(rows_ID)).ce_sum.backward()
    assert rows_ID.grad.dtype == torch.float64 and (rows_ID.grad.norm(dim=1) > 0).all()


def test_nothing_is_written_into_what_was_given_or_looked_up() -> None:
    h_TD, rows_ID = draw(20, 8), draw(4, 8, seed=1)
    before = h_TD.clone()
    put = given(rows_ID).put(h_TD)
    assert torch.equal(h_TD, before) and torch.equal(put[AT], rows_ID)
    rest = [i for i in range(20) if i not in AT.tolist()]
    assert torch.equal(put[rest], before[rest])


@torch.no_grad()
def test_decoding_after_given_embeddings_is_the_full_pass() -> None:
    model, rows_ID = small_model(**SHAPE), draw(2, 48, dtype=torch.float32)
    whole = GivenEmbeddings(torch.tensor([1, 2]), rows_ID)
    tokens, packing = draw_tokens(9), Packing.from_lengths([9])
    expected = model(tokens, packing, given=whole)
    assert torch.equal(model.lm_head(model.final_states(tokens, packing, given=whole)), expected)
    document = OneDocument(model)
    logits = [document.read(tokens[:6], given=whole), *(document.read(tokens[i : i + 1]) for i in range(6, 9))]
    assert relative(torch.cat(logits), expected) < 1e-5


def test_a_later_stage_of_a_pipeline_gives_nothing() -> None:
    stage, hidden = small_model(**SHAPE), draw(20, 48, dtype=torch.float32)
    stage.prune({1}, embedding=False, head=True)
    assert torch.equal(stage(hidden, PACKING, given=given(draw(4, 48))), stage(hidden, PACKING))
