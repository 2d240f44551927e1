"""Images to embeddings: joined as LLaVA-NeXT joins them, with the same gradients for every part."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmdata.images.tiles import cut_tiles
from mmdata.images.tiles import normalise as normalise_on_host
from mmtrain.errors import ConfigError
from mmtrain.vision.encoder import ImageEncoder
from mmtrain.vision.images import Images, normalise, tile_rules, token_sources
from tests.model.small import draw, relative
from tests.vision.small import clip_of, draw_images, encoder_gradients, packed_by_llava, small_eyes, small_vl_model

SIZES = [(30, 30), (56, 28), (28, 56), (100, 9), (9, 100), (1, 1), (1, 90), (90, 1), (56, 56), (61, 40)]


def naive(encoder: ImageEncoder, images: Images, sizes: list[tuple[int, int]]) -> tuple[Tensor, dict[str, Tensor]]:
    """transformers' CLIP, the projector as two products, LLaVA-NeXT's joining; and the weights computed with."""
    clip = clip_of(encoder)
    config = encoder.config
    hidden = clip(normalise(images.tiles_N3SS).double(), output_hidden_states=True).hidden_states
    features = hidden[-1 - config.unused_layers][:, 1:]
    projector = {name: parameter.detach().clone().requires_grad_() for name, parameter in
                 encoder.projector.named_parameters()}  # fmt: skip
    x = F.linear(features, projector["linear_1.weight"], projector["linear_1.bias"])
    x = F.linear(0.5 * x * (1 + torch.erf(x / 2**0.5)), projector["linear_2.weight"], projector["linear_2.bias"])
    newline = encoder.newline_D.detach().clone().requires_grad_()
    counts = [layout.tiles for layout in images.layouts]
    holder = type("Holder", (), {"config": config, "newline_D": newline})
    joined = packed_by_llava(list(x.split(counts)), sizes, holder)
    weights = {f"multi_modal_projector.{name}": parameter for name, parameter in projector.items()}
    weights |= {f"vision_tower.vision_model.{name}": parameter for name, parameter in clip.named_parameters()}
    return joined, weights | {"image_newline": newline}


@pytest.mark.parametrize("sizes", [SIZES, [(30, 30)], [(100, 9)] * 2, [(1, 90)]], ids=str)
def test_embeddings_and_gradients_are_those_of_a_naive_composition(sizes: list[tuple[int, int]]) -> None:
    encoder = small_vl_model().encoder
    images = draw_images(encoder.config, *sizes)
    ours, (theirs, weights) = encoder(images), naive(encoder, images, sizes)
    assert ours.shape == theirs.shape and relative(ours, theirs) < 1e-12
    weight = draw(*ours.shape, seed=2)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    grads = encoder_gradients(encoder)
    for name, parameter in weights.items():
        if parameter.grad is not None:
            assert (grads[name] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-3) < 1e-8, name


def test_a_fixed_resolution_has_one_newline() -> None:
    encoder = small_vl_model(dict(grids=[])).encoder
    images = draw_images(encoder.config, (30, 30), (500, 2))
    ours, (theirs, _) = encoder(images), naive(encoder, images, [(30, 30), (500, 2)])
    assert ours.shape == (2 * 17, 48) and relative(ours, theirs) < 1e-12


def test_a_class_token_that_is_kept_comes_first_in_the_thumbnail_alone() -> None:
    kept, dropped = (small_vl_model(dict(keep_class_token=kept)).encoder for kept in (True, False))
    images = draw_images(kept.config, (56, 28))
    with_it, without = kept(images), dropped(draw_images(dropped.config, (56, 28)))
    assert images.layouts[0].tokens == len(with_it) == len(without) + 1
    class_1W = kept.features(images.tiles_N3SS)[:1, 0]
    assert relative(with_it[:1], kept.projector(class_1W)) < 1e-12 and relative(with_it[1:], without) < 1e-12


def test_newlines_stand_at_the_end_of_each_row_of_the_whole_grid() -> None:
    encoder = small_vl_model().encoder
    images = draw_images(encoder.config, (56, 56))
    rows = encoder(images)[16:].view(8, 9, 48)
    assert torch.equal(rows[:, 8], encoder.newline_D.expand(8, -1))
    features = encoder.projector(encoder.features(images.tiles_N3SS)[:, 1:].flatten(0, 1)).view(5, 4, 4, 48)
    for row in range(8):  # tiles 1 and 2 are the upper ones
        for column in range(8):
            tile = 1 + row // 4 * 2 + column // 4
            assert relative(rows[row, column], features[tile, row % 4, column % 4]) < 1e-12


def test_every_patch_is_used_once_and_padding_never() -> None:
    config = small_vl_model().encoder.config
    for size in SIZES:
        images = draw_images(config, size, size)
        sources, layout = token_sources(images.layouts), images.layouts[0]
        assert sources.tokens == 2 * layout.tokens
        assert len(sources.patch_M.unique()) == len(sources.patch_M) == 2 * (16 + layout.rows * layout.columns)
        assert (sources.patch_M % 17 != 0).all()  # no class token


def test_no_images_are_no_embeddings() -> None:
    """A process may have no image where others have some: it runs all the same, and its gradients are zeros."""
    encoder = small_vl_model().encoder
    rows_ID = encoder(draw_images(encoder.config))
    assert rows_ID.shape == (0, 48)
    rows_ID.sum().backward()
    assert all((parameter.grad == 0).all() for parameter in encoder.parameters())


def test_pixels_are_normalised_as_on_the_host() -> None:
    tiles = draw_images(small_vl_model().encoder.config, (30, 30)).tiles_N3SS
    assert torch.equal(normalise(tiles), torch.from_numpy(normalise_on_host(tiles.numpy())))


def test_images_go_in_as_they_are_cut() -> None:
    from PIL import Image

    encoder = small_vl_model().encoder
    tiles, layout = cut_tiles(Image.linear_gradient("L").resize((90, 31)), tile_rules(encoder.config))
    assert encoder(Images(torch.from_numpy(tiles), (layout,))).shape == (layout.tokens, 48)


def test_tiles_that_are_not_the_images_are_refused() -> None:
    encoder = small_vl_model().encoder
    images = draw_images(encoder.config, (30, 30))
    for wrong, words in (
        (Images(images.tiles_N3SS[1:], images.layouts), "tiles=4: 1 images have 5 tiles"),
        (Images(images.tiles_N3SS[:, :, 1:], images.layouts), "tiles are torch.uint8 of [3, 27, 28]"),
        (Images(images.tiles_N3SS, draw_images(small_eyes(patch_size=14), (30, 30)).layouts), "of 2 patches a side"),
        (Images(images.tiles_N3SS, draw_images(small_eyes(keep_class_token=True), (30, 30)).layouts), "by other rules"),
        (Images(images.tiles_N3SS.float(), images.layouts), "tiles are torch.float32 of [3, 28, 28]"),
    ):
        with pytest.raises(ConfigError) as caught:
            encoder(wrong)
        assert words in str(caught.value)
