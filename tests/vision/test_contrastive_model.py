"""A model that trains on captions and on whose they are: what a caption sees, and where gradients come from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmtrain.build import build_model, meta_model
from mmtrain.config import ContrastiveConfig
from mmtrain.model.model import LossOutput
from mmtrain.model.packed_seq import Packing, RealTokens
from mmtrain.vision.caption_pairs import CaptionPairs, PairedInputs
from mmtrain.vision.contrastive import OneRank, contrastive_loss
from mmtrain.vision.contrastive_model import ContrastiveModel
from mmtrain.vision.flops import count_vision_parameters
from mmtrain.vision.images import Images
from mmtrain.vision.model import VisionLanguageModel, images_of
from tests.model.small import draw_tokens
from tests.vision.small import IMAGE, draw_images, small_vl_config, small_vl_model

CONFIG = ContrastiveConfig(size=12, weight=0.7, temperature=0.2)
CAPTIONS = (4, 6, 1, 9)


def model_of(**changes: object) -> ContrastiveModel:
    made = small_vl_model({"grids": [], "contrastive": CONFIG}, **changes)
    assert isinstance(made, ContrastiveModel)
    return made


def rows(model: ContrastiveModel, padding: int = 0) -> tuple[Tensor, Packing, PairedInputs]:
    """An image and its caption a document, a document of text between them, and padding."""
    images = draw_images(model.config.vision, *[(30, 30)] * len(CAPTIONS))
    size = images.layouts[0].tokens
    documents, pairs, start = [], [], 0
    for i, tokens in enumerate(CAPTIONS):
        if i == 2:
            documents.append(draw_tokens(7, 90, IMAGE))
            start += 7
        documents.append(torch.cat([torch.full((size,), IMAGE), draw_tokens(tokens, i, IMAGE)]))
        pairs.append((i, torch.arange(start + size, start + size + tokens)))
        start += size + tokens
    lengths = [*map(len, documents), *([padding] if padding else [])]
    tokens_T = torch.cat([*documents, torch.zeros(padding, dtype=torch.int64)])
    packing = Packing.from_lengths(lengths)
    if padding:
        packing = replace(packing, real=RealTokens.from_rows([start], start + padding))
    return tokens_T, packing, PairedInputs.over(images_of(tokens_T, images, IMAGE), CaptionPairs.of(pairs))


def labels_of(tokens_T: Tensor) -> Tensor:
    labels_T = tokens_T.roll(-1)
    return labels_T.masked_fill(labels_T == IMAGE, -100)


def gradients(model: ContrastiveModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def apart(model: ContrastiveModel, tokens_T: Tensor, packing: Packing, given: PairedInputs) -> tuple[Tensor, Tensor]:
    """Captioning loss and contrastive loss, each by passes of its own: captions one by one, images one by one."""
    plain = VisionLanguageModel.forward(model.eval(), tokens_T, packing, labels_of(tokens_T), given=given)
    captions = [tokens_T[at] for at in given.pairs.at_C.split(given.pairs.lengths)]
    text_PD = torch.stack([model.final_states(one, Packing.from_lengths([len(one)]))[-1] for one in captions])
    tiles = [given.images.tiles_N3SS[tile][None] for tile in given.pairs.tile_P.tolist()]
    image_PF = torch.cat([model.encoder.features(tile)[:, 1:].mean(1) for tile in tiles])
    head = model.train().contrastive
    caption_PE = model.embed_captions(torch.cat(captions), given.pairs.lengths)
    torch.testing.assert_close(model.embed_images(torch.cat(tiles)), head.embed_images(image_PF), rtol=1e-12, atol=0)
    torch.testing.assert_close(caption_PE, head.embed_texts(text_PD), rtol=1e-12, atol=1e-14)
    found = contrastive_loss(head.embed_images(image_PF), head.embed_texts(text_PD), head.scale, 4, OneRank())
    return plain.ce_sum, found.loss


@pytest.mark.parametrize("padding", [0, 5])
def test_one_pass_is_captioning_and_captions_and_images_apart(padding: int) -> None:
    model = model_of()
    tokens_T, packing, given = rows(model, padding)
    out = model(tokens_T, packing, labels_of(tokens_T), given=given)
    assert isinstance(out, LossOutput)
    ce_sum, contrastive = apart(model, tokens_T, packing, given)
    torch.testing.assert_close(out.ce_sum, ce_sum, rtol=1e-12, atol=0)
    torch.testing.assert_close(out.aux_loss, CONFIG.weight * contrastive, rtol=1e-12, atol=0)
    torch.testing.assert_close(out.figures["contrastive_loss"], contrastive, rtol=1e-12, atol=0)
    assert int(out.figures["contrastive_pairs"]) == len(CAPTIONS) and set(out.figures) == set(model.figures)
    ours = gradients(model, out.ce_sum + out.aux_loss)
    theirs = gradients(model, ce_sum + CONFIG.weight * contrastive)
    assert ours.keys() == theirs.keys() == dict(model.named_parameters()).keys()
    for name, grad in ours.items():
        assert (grad - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-6) < 1e-8, name


def test_a_caption_does_not_know_its_image() -> None:
    """Other pixels change embeddings of images alone: those of captions are the same to the bit."""
    model = model_of()
    tokens_T, packing, given = rows(model)
    seen: list[Tensor] = []
    model.contrastive.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    model(tokens_T, packing, labels_of(tokens_T), given=given)
    other = replace(given, images=Images(255 - given.images.tiles_N3SS, given.images.layouts))
    model(tokens_T, packing, labels_of(tokens_T), given=other)
    assert torch.equal(seen[0][1], seen[1][1]) and not torch.equal(seen[0][0], seen[1][0])


def test_experts_see_captions_as_tokens_that_are_no_padding() -> None:
    model = build_model(small_vl_config({"grids": [], "contrastive": CONFIG}, num_experts=4))
    tokens_T, packing, given = rows(model, 60)
    out = model(tokens_T, packing, labels_of(tokens_T), given=given)
    wanted = (len(tokens_T) - 60 + sum(CAPTIONS)) * model.config.top_k
    assert [int(stats.assigned_E.sum()) for stats in out.router] == [wanted] * 2


def test_without_images_or_pairs_every_weight_has_a_gradient() -> None:
    """Ranks that share weights reduce alike, whatever images fell to them."""
    model = model_of()
    tokens_T, packing = draw_tokens(20, vocab=IMAGE), Packing.from_lengths([20])
    none = PairedInputs.over(images_of(tokens_T, draw_images(model.config.vision), IMAGE), CaptionPairs.of([]))
    for given in (None, none):
        out = model(tokens_T, packing, labels_of(tokens_T), given=given)
        assert out.aux_loss == 0 and out.figures["contrastive_pairs"] == 0
        found = gradients(model, out.ce_sum + out.aux_loss)
        assert found.keys() == dict(model.named_parameters()).keys()
        assert all(found[name].abs().max() == 0 for name in found if name.startswith(("encoder.", "contrastive.")))


def test_evaluation_has_the_loss_of_captions_alone() -> None:
    model = model_of().eval()
    tokens_T, packing, given = rows(model)
    out = model(tokens_T, packing, labels_of(tokens_T), given=given)
    expected = VisionLanguageModel.forward(model, tokens_T, packing, labels_of(tokens_T), given=given)
    assert torch.equal(out.ce_sum, expected.ce_sum) and out.aux_loss == 0 and not out.figures


def test_counted_parameters() -> None:
    config = small_vl_config({"contrastive": CONFIG})
    model, counted = meta_model(config), count_vision_parameters(config)
    assert counted["contrastive"] == sum(p.numel() for p in model.contrastive.parameters())
    assert sum(counted.values()) == counted["contrastive"] + sum(p.numel() for p in model.encoder.parameters())
