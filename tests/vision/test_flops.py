"""Operations of the eyes against torch's own counter, which sees every product that is computed."""

from __future__ import annotations

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmtrain.vision.flops import count_vision_parameters, encoder_flops
from mmtrain.vision.images import token_sources
from tests.model.small import small_config
from tests.vision.small import draw_images, small_vl_model


@pytest.mark.parametrize("vision", [{}, dict(unused_layers=2), dict(grids=[]), dict(keep_class_token=True)], ids=str)
def test_operations_are_those_that_torch_counts(vision: dict) -> None:
    model = small_vl_model(vision)
    images = draw_images(model.config.vision, (56, 28), (100, 9), (1, 1))
    patches = len(token_sources(images.layouts).patch_M)
    forward = encoder_flops(model.config, len(images.tiles_N3SS), patches)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        rows_ID = model.encoder(images)
    assert counter.get_total_flops() == forward
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        rows_ID = model.encoder(images)
        rows_ID.sum().backward()
    pixels = 2 * len(images.tiles_N3SS) * 16 * 147 * 32  # no gradient of the pixels is wanted
    assert counter.get_total_flops() == 3 * forward - pixels


def test_a_model_of_text_has_no_eyes_to_count() -> None:
    assert count_vision_parameters(small_config()) == {}
    model = small_vl_model()
    counted = sum(count_vision_parameters(model.config).values())
    assert counted == sum(parameter.numel() for parameter in model.encoder.parameters())
