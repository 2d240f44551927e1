"""Position embeddings of the eyes at another size of tile: torch's bicubic on the grid, the class token as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmtrain.checkpoint.positions import is_square, resize_positions

W = 5


def positions(side: int) -> torch.Tensor:
    return torch.randn(1 + side * side, W, generator=torch.Generator().manual_seed(side))


@pytest.mark.parametrize(("before", "now"), [(16, 24), (2, 3), (24, 16), (1, 4)])
def test_each_channel_is_torch_s_bicubic_of_its_own_grid(before: int, now: int) -> None:
    position_QW = positions(before)
    found_QW = resize_positions(position_QW, 1 + now * now)
    assert torch.equal(found_QW[0], position_QW[0])
    for channel in range(W):
        grid = torch.stack([position_QW[1 + row * before :][:before, channel] for row in range(before)])
        wanted = F.interpolate(grid[None, None], (now, now), mode="bicubic", align_corners=False)[0, 0]
        torch.testing.assert_close(found_QW[1:, channel].view(now, now), wanted)


def test_it_is_what_transformers_clip_does() -> None:
    from transformers import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

    config = CLIPVisionConfig(hidden_size=W, num_attention_heads=1, image_size=16 * 14, patch_size=14)
    clip, position_QW = CLIPVisionEmbeddings(config), positions(16)
    clip.position_embedding.weight.data.copy_(position_QW)
    wanted_1QW = clip.interpolate_pos_encoding(torch.zeros(1, 1 + 24 * 24, W), 24 * 14, 24 * 14)
    torch.testing.assert_close(resize_positions(position_QW, 1 + 24 * 24), wanted_1QW[0].detach())


def test_only_squares_of_one_width_are_resized() -> None:
    assert is_square((257, W), (577, W)) and not is_square((257, W), (257, W))
    assert not is_square((257, W), (577, W + 1)) and not is_square((257, W), (576, W)) and not is_square((1, W), (5, W))
