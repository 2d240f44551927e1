"""A small model with eyes, images for it, and transformers' CLIP and LLaVA-NeXT with the same weights."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from mmdata.images.grid import lay_image
from mmtrain.build import build_model
from mmtrain.config import ModelConfig, VisionConfig
from mmtrain.hf.vision_weights import vision_tensors
from mmtrain.vision.images import Images, tile_rules
from mmtrain.vision.model import VisionLanguageModel
from tests.model.small import small_config

TOWER = "vision_tower.vision_model."
IMAGE = 159  # the last id of the small vocabulary


def small_eyes(**changes: object) -> VisionConfig:
    """Tiles of 28 pixels and 16 patches, three layers, five grids; with these options changed."""
    base = dict(image_token=IMAGE, tile_size=28, patch_size=7, hidden_size=32, num_layers=3, num_heads=4,
                ffn_hidden_size=40, grids=[[1, 1], [1, 2], [2, 1], [2, 2], [1, 3]])  # fmt: skip
    return VisionConfig(**(base | changes))


def small_vl_config(vision: dict | None = None, **changes: object) -> ModelConfig:
    """The small text model of two layers, dense (torch's grouped products know no float64), with small eyes."""
    text = dict(num_layers=2, layer_pattern="LS", num_experts=0, vision=small_eyes(**(vision or {})))
    return small_config(**(text | changes))


def small_vl_model(vision: dict | None = None, seed: int = 3, **changes: object) -> VisionLanguageModel:
    """A model in float64 of which no vector is constant, so that losing any of them shows."""
    model = build_model(small_vl_config(vision, **changes), seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name or "bias" in name:
                offset = 0.5 if name.endswith("weight") else -0.5
                parameter.copy_(torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + offset)
    return model


def draw_images(config: VisionConfig, *sizes: tuple[int, int], seed: int = 0) -> Images:
    """Random tiles of images of these sizes (width, height)."""
    layouts = tuple(lay_image(width, height, tile_rules(config)) for width, height in sizes)
    shape = sum(layout.tiles for layout in layouts), 3, config.tile_size, config.tile_size
    tiles = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Images(tiles, layouts)


def clip_of(encoder: nn.Module, attention: str = "sdpa") -> nn.Module:
    """transformers' CLIP vision tower with an encoder's weights; its "eager" attention rounds to fp32."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = encoder.config
    made = CLIPVisionModel(CLIPVisionConfig(
        hidden_size=config.hidden_size, intermediate_size=config.ffn_hidden_size, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads, image_size=config.tile_size, patch_size=config.patch_size,
        hidden_act=config.activation, layer_norm_eps=config.norm_eps, attn_implementation=attention,
    )).to(next(encoder.parameters()).dtype)  # fmt: skip
    theirs = {name.removeprefix(TOWER): tensor for name, tensor in vision_tensors(encoder) if name.startswith(TOWER)}
    missing, unexpected = made.load_state_dict(theirs, strict=False)
    assert not unexpected and {name.split(".")[0] for name in missing} <= {"post_layernorm"}
    return made


def packed_by_llava(features: list[Tensor], sizes: list[tuple[int, int]], encoder: nn.Module) -> Tensor:
    """Embeddings of images as LLaVA-NeXT joins them, of features [tiles, P, D] each; sizes are (width, height)."""
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

    config = encoder.config
    pinpoints = [[rows * config.tile_size, columns * config.tile_size] for rows, columns in config.grids]
    model = SimpleNamespace(config=SimpleNamespace(
        vision_config=SimpleNamespace(image_size=config.tile_size, patch_size=config.patch_size),
        image_grid_pinpoints=pinpoints,
    ))  # fmt: skip
    joined, lengths = LlavaNextModel.pack_image_features(
        model, features, [(height, width) for width, height in sizes], "default", encoder.newline_D
    )
    assert [len(one) for one in joined] == lengths.tolist()
    return torch.cat(joined)


def encoder_gradients(encoder: nn.Module) -> dict[str, Tensor]:
    """The gradients of the eyes by their released names; zeros where there are none."""
    from mmtrain.hf.vision_naming import pieces_of_encoder

    found = {}
    for parameter, pieces in pieces_of_encoder(encoder).values():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found |= {piece.name: grad[piece.at].reshape(piece.shape) for piece in pieces}
    return found
