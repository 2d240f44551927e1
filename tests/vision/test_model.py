"""A text model with eyes: rows with images are the rows of their embeddings, and gradients reach every part rightly."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmtrain.build import build_model, meta_model
from mmtrain.config.cli import compose
from mmtrain.errors import ConfigError
from mmtrain.model.flops import count_parameters
from mmtrain.model.packed_seq import Packing
from mmtrain.vision.images import Images
from mmtrain.vision.model import VisionLanguageModel, images_of
from tests.model.small import draw_tokens, relative, small_config
from tests.vision.small import IMAGE, draw_images, small_vl_config, small_vl_model

CONFIGS = Path(__file__).parents[2] / "configs"


def row_of(*parts: int | Images, seed: int = 0) -> Tensor:
    """Tokens of text (their number) and placeholders of images, one after the other."""
    made = [draw_tokens(part, seed + i, IMAGE) if isinstance(part, int) else
            torch.full((sum(layout.tokens for layout in part.layouts),), IMAGE)
            for i, part in enumerate(parts)]  # fmt: skip
    return torch.cat(made)


def joined(*images: Images) -> Images:
    return Images(torch.cat([one.tiles_N3SS for one in images]), sum((one.layouts for one in images), ()))


def labels_of(tokens_T: Tensor) -> Tensor:
    labels_T = tokens_T.roll(-1)
    return labels_T.masked_fill((labels_T == IMAGE) | (tokens_T == IMAGE), -100)


def by_embeddings(model: VisionLanguageModel, tokens_T: Tensor, packing: Packing, images: Images) -> Tensor:
    """The loss, with embeddings put together by hand and a text model that has no table."""
    text = copy.copy(model)
    text._modules = dict(text._modules)
    table_VD, text.embed_tokens = text.embed_tokens.weight, None
    rows_ID = list(model.encoder(images))
    embeddings = [rows_ID.pop(0) if token == IMAGE else table_VD[token] for token in tokens_T.tolist()]
    assert not rows_ID
    out = text(torch.stack(embeddings), packing, labels_of(tokens_T))
    return out.ce_sum + out.aux_loss


def text_parameters(model: VisionLanguageModel) -> list[Tensor]:
    return [parameter for name, parameter in model.named_parameters() if not name.startswith("encoder.")]


def rows(model: VisionLanguageModel) -> tuple[Tensor, Packing, Images]:
    """Three documents: two images with text between them, text alone, an image at the very end."""
    first, second, third = (draw_images(model.config.vision, size, seed=i) for i, size in
                            enumerate(((30, 30), (100, 9), (1, 1))))  # fmt: skip
    documents = [row_of(3, first, 4, second, 2), row_of(11, seed=10), row_of(5, third, seed=20)]
    return torch.cat(documents), Packing.from_lengths(list(map(len, documents))), joined(first, second, third)


def backward(model: VisionLanguageModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_row_with_images_is_the_row_of_its_embeddings() -> None:
    model = small_vl_model()
    tokens_T, packing, images = rows(model)
    out = model(tokens_T, packing, labels_of(tokens_T), given=images_of(tokens_T, images, IMAGE))
    plain = by_embeddings(model, tokens_T, packing, images)
    assert relative(out.ce_sum + out.aux_loss, plain) < 1e-12
    ours, theirs = backward(model, out.ce_sum + out.aux_loss), backward(model, plain)
    assert ours.keys() == theirs.keys() == dict(model.named_parameters()).keys()
    for name, grad in ours.items():
        assert (grad - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-3) < 1e-8, name


def test_gradients_are_the_slopes_of_the_loss() -> None:
    model = small_vl_model()
    tokens_T, packing, images = rows(model)

    def loss() -> Tensor:
        out = model(tokens_T, packing, labels_of(tokens_T), given=images_of(tokens_T, images, IMAGE))
        return out.ce_sum + out.aux_loss

    grads = backward(model, loss())
    for name in ("encoder.newline_D", "encoder.projector.linear_1.weight", "encoder.vision_tower.embedding.class_W",
                 "encoder.vision_tower.layers.0.attention.qkv_3WW", "embed_tokens.weight"):  # fmt: skip
        parameter = model.get_parameter(name)
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        ends = []
        for step in (1e-6, -2e-6):
            parameter.data += step * direction
            ends.append(loss().item())
        parameter.data += 1e-6 * direction
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx((grads[name] * direction).sum().item(), rel=1e-4), name


def test_the_placeholder_s_own_embedding_is_not_used_and_gets_no_gradient() -> None:
    model = small_vl_model()
    tokens_T, packing, images = rows(model)
    out = model(tokens_T, packing, labels_of(tokens_T), given=images_of(tokens_T, images, IMAGE))
    grads = backward(model, out.ce_sum)
    assert grads["embed_tokens.weight"][IMAGE].abs().max() == 0
    model.embed_tokens.weight.data[IMAGE] = 1e3
    assert torch.equal(
        model(tokens_T, packing, labels_of(tokens_T), given=images_of(tokens_T, images, IMAGE)).ce_sum, out.ce_sum
    )


def test_a_packed_row_is_its_documents_one_by_one() -> None:
    model = small_vl_model()
    tokens_T, packing, images = rows(model)
    labels_T = labels_of(tokens_T)
    whole = model(tokens_T, packing, labels_T, given=images_of(tokens_T, images, IMAGE)).ce_sum
    packed = backward(model, whole)
    tiles = list(images.tiles_N3SS.split([layout.tiles for layout in images.layouts]))
    single, first = torch.zeros((), dtype=torch.float64), 0
    lengths = list(packing.lengths)
    for count, document, labels in zip((2, 0, 1), tokens_T.split(lengths), labels_T.split(lengths), strict=True):
        mine = slice(first, first + count)
        own = Images(torch.cat(tiles[mine]), images.layouts[mine]) if count else None
        own = own and images_of(document, own, IMAGE)
        single = single + model(document, Packing.from_lengths([len(document)]), labels, given=own).ce_sum
        first += count
    assert relative(whole, single) < 1e-12
    alone = backward(model, single)
    for name, grad in packed.items():
        assert (grad - alone[name]).norm() / alone[name].norm().clamp(min=1e-3) < 1e-8, name


def test_text_alone_is_the_text_model_s_to_the_bit() -> None:
    config = small_vl_config(num_experts=4)
    eyes, text = build_model(config, seed=9), build_model(replace(config, vision=None), seed=9)
    tokens_T, packing = draw_tokens(40, vocab=IMAGE), Packing.from_lengths([25, 15])
    expected = text(tokens_T, packing, tokens_T.roll(-1))
    for images in (None, images_of(tokens_T, draw_images(config.vision), IMAGE)):
        out = eyes(tokens_T, packing, tokens_T.roll(-1), given=images)
        assert torch.equal(out.ce_sum, expected.ce_sum) and torch.equal(out.aux_loss, expected.aux_loss)
    out.ce_sum.backward()
    assert all(parameter.grad is None for parameter in eyes.encoder.parameters())


def test_frozen_text_lets_gradients_through_to_the_eyes() -> None:
    model = small_vl_model()
    tokens_T, packing, images = rows(model)
    expected = backward(
        model, model(tokens_T, packing, labels_of(tokens_T), given=images_of(tokens_T, images, IMAGE)).ce_sum
    )
    model.requires_grad_(False)
    model.encoder.requires_grad_(True)
    found = backward(
        model, model(tokens_T, packing, labels_of(tokens_T), given=images_of(tokens_T, images, IMAGE)).ce_sum
    )
    assert found.keys() == {name for name in expected if name.startswith("encoder.")}
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_logits_and_scores_see_images_too() -> None:
    model = small_vl_model()
    tokens_T, packing, images = rows(model)
    logits = model(tokens_T, packing, given=images_of(tokens_T, images, IMAGE))
    assert logits.shape == (len(tokens_T), 160)
    labels_T = labels_of(tokens_T)
    hits = ((logits.argmax(-1) == labels_T) & (labels_T != -100)).sum()
    assert model(tokens_T, packing, labels_T, given=images_of(tokens_T, images, IMAGE), score=True).correct == hits


@pytest.mark.parametrize("change", [-1, 1])
def test_more_or_fewer_placeholders_than_tokens_are_refused_with_both_counts(change: int) -> None:
    model = small_vl_model()
    images = draw_images(model.config.vision, (30, 30), (1, 1))
    wanted = sum(layout.tokens for layout in images.layouts)
    tokens_T = torch.full((wanted + change,), IMAGE)
    with pytest.raises(ConfigError) as caught:
        images_of(tokens_T, images, IMAGE)
    assert caught.value.option == "model.vision.image_token"
    assert f"{wanted + change} of them, and their 2 images {wanted} tokens" in str(caught.value)
    with pytest.raises(ConfigError):  # placeholders, and an empty batch of images
        images_of(tokens_T, draw_images(model.config.vision), IMAGE)


def test_a_model_without_eyes_is_refused() -> None:
    with pytest.raises(ConfigError, match="no eyes"):
        VisionLanguageModel(small_config())


def test_seeds_give_other_eyes_and_one_seed_the_same() -> None:
    config = small_vl_config()
    first, again, other = (build_model(config, seed=seed).encoder for seed in (1, 1, 2))
    for name, parameter in first.named_parameters():
        assert torch.isfinite(parameter).all()
        assert torch.equal(parameter, again.get_parameter(name)), name
        if parameter.std() > 0:
            assert not torch.equal(parameter, other.get_parameter(name)), name
    assert first.newline_D.std().item() == pytest.approx(48**-0.5, rel=0.3)


# (text parameters, those of the vision tower)
COUNTS = {"minimax_vl_01": (456_089_655_296, 303_505_408), "vl_3b": (4_018_250_240, 303_505_408),
          "tiny_vl": (17_192_960, 820_608)}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_configurations_have_the_parameters_of_their_text_model_and_the_eyes(name: str) -> None:
    from mmtrain.vision.flops import count_vision_parameters

    config = compose([f"model={name}", "run.name=a", "data.path=b"], CONFIGS).model
    model = meta_model(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    text = sum(parameter.numel() for parameter in text_parameters(model))
    tower = sum(parameter.numel() for parameter in model.encoder.vision_tower.parameters())
    assert (text, tower) == COUNTS[name] and text == count_parameters(config).total
    counted = count_vision_parameters(config)
    assert counted["vision_tower"] == tower
    assert sum(counted.values()) == sum(parameter.numel() for parameter in model.encoder.parameters())
