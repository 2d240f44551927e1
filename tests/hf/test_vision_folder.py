"""Folders of models with eyes in the released layout: bit for bit there and back, started from, and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmdata.images.grid import lay_image
from mmtrain.build import build_model
from mmtrain.config import ContrastiveConfig
from mmtrain.errors import ConfigError
from mmtrain.hf.export import PREPROCESSOR
from mmtrain.hf.folder import check_folder, open_folder
from mmtrain.hf.read_weights import load_folder, read_parameter
from mmtrain.hf.vision_naming import vision_language_file_shapes
from mmtrain.model.packed_seq import Packing
from mmtrain.vision.images import tile_rules
from mmtrain.vision.model import images_of
from tests.hf.folders import write
from tests.hf.test_round_trip import files, same
from tests.model.small import relative
from tests.vision.small import clip_of, draw_images, packed_by_llava, small_vl_config, small_vl_model

CASES = {
    "dense": {},
    "experts": dict(num_layers=3, layer_pattern="LLS", num_experts=4, top_k=2),
    "shared, class token": dict(num_experts=4, shared_ffn_hidden_size=24,
                                vision=dict(keep_class_token=True, unused_layers=1, grids=[])),
}  # fmt: skip
OTHERS = {"contrastive": dict(vision=dict(contrastive=ContrastiveConfig(size=8)))}


def seeing(case: str = "dense", seed: int = 3) -> nn.Module:
    """A model of a case in fp32, none of whose vectors is constant."""
    return small_vl_model(seed=seed, **(CASES | OTHERS)[case]).float()


def into(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a fresh model of the same shape that was started from a folder."""
    fresh = build_model(model.config, seed=99)
    load_folder("x", check_folder("x", folder, model.config), fresh)
    return dict(fresh.named_parameters())


@pytest.mark.parametrize("case", CASES)
def test_weights_come_back_bit_for_bit(case: str, tmp_path: Path) -> None:
    model = seeing(case)
    whole = dict(model.named_parameters())
    folder = write(model, tmp_path / "one", "minimax")
    same(into(folder, model), whole)
    many = write(model, tmp_path / "many", "minimax", shard_bytes=20_000)
    assert len(list(many.glob("model-*.safetensors"))) > 3
    same(into(many, model), whole)
    opened = open_folder("x", many)
    same({name: read_parameter(opened, name, value.shape) for name, value in whole.items()}, whole)
    half = write(model, tmp_path / "half", "minimax", torch.bfloat16)
    same(into(half, model), {name: value.bfloat16().float() for name, value in whole.items()})
    shapes = {name: tuple(value.shape) for name, value in files(folder).items()}
    wanted = vision_language_file_shapes(model.config)
    assert wanted.items() <= shapes.items()
    assert all(name.endswith("block_sparse_moe.gate.weight") for name in shapes.keys() - wanted.keys())


def test_the_folder_tells_the_model_and_how_its_images_are_cut(tmp_path: Path) -> None:
    model = seeing("shared, class token")
    folder = open_folder("x", write(model, tmp_path / "m", "minimax"))
    assert folder.model.vision == model.config.vision
    assert folder.config["model_type"] == "minimax_vl_01"
    assert folder.config["text_config"]["model_type"] == "minimax_text_01"
    told = json.loads((folder.path / PREPROCESSOR).read_text())
    assert (told["size"], told["image_grid_pinpoints"]) == ({"height": 28, "width": 28}, [])


def test_text_alone_starts_the_text_of_a_model_with_eyes(tmp_path: Path) -> None:
    model = seeing()
    text = build_model(replace(model.config, vision=None), seed=5)
    found = into(write(text, tmp_path / "text", "hf"), model)
    start = dict(build_model(model.config, seed=99).named_parameters())
    eyes = {name for name in found if name.startswith("encoder.")}
    assert eyes
    same({name: found[name] for name in found.keys() - eyes}, dict(text.named_parameters()))
    same({name: found[name] for name in eyes}, {name: start[name] for name in eyes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(vision=None), "vision eyes there, none here"),
        (dict(vision=dict(hidden_size=64, ffn_hidden_size=48)), "vision.hidden_size 32 there, 64 here"),
        (dict(vision=dict(unused_layers=1)), "vision.unused_layers 0 there, 1 here"),
        (dict(num_kv_heads=4), "num_kv_heads 2 there, 4 here"),
    ],
)
def test_another_model_is_refused(changes: dict, words: str, tmp_path: Path) -> None:
    folder = write(seeing(), tmp_path / "m", "minimax")
    vision = changes.get("vision", {})
    here = small_vl_config(**{**changes, "vision": vision or {}})
    here = replace(here, vision=None) if vision is None else here
    with pytest.raises(ConfigError) as caught:
        check_folder("run.init_from", folder, here)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_maps_of_a_contrastive_loss_are_left_out(tmp_path: Path) -> None:
    """A run of the stage that trains the vision transformer is exported, and its folder starts the stages after it."""
    model = seeing("contrastive")
    folder = write(model, tmp_path / "m", "minimax")
    assert set(files(folder)) == set(files(write(seeing(), tmp_path / "plain", "minimax")))
    plain = replace(model.config, vision=replace(model.config.vision, contrastive=None))
    whole = {name: value for name, value in model.named_parameters() if not name.startswith("contrastive.")}
    fresh = build_model(plain, seed=99)
    load_folder("x", check_folder("x", folder, plain), fresh)
    same(dict(fresh.named_parameters()), whole)


def test_other_grids_are_the_same_model(tmp_path: Path) -> None:
    model = seeing()
    folder = write(model, tmp_path / "m", "minimax")
    check_folder("x", folder, small_vl_config(vision=dict(grids=[], image_token=7)))


LOST = ("image_newline", "vision_tower.vision_model.encoder.layers.1.self_attn.k_proj.bias",
        "multi_modal_projector.linear_2.weight", "language_model.lm_head.weight")  # fmt: skip


@pytest.mark.parametrize("lost", LOST)
def test_a_folder_that_lacks_a_tensor_is_refused(lost: str, tmp_path: Path) -> None:
    folder = write(seeing(), tmp_path / "m", "minimax")
    every = load_file(folder / "model.safetensors")
    del every[lost]
    save_file(every, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=f"lacks 1 of .*{lost}"):
        open_folder("x", folder)


def test_a_norm_that_clip_has_and_the_release_has_not_is_passed_over(tmp_path: Path) -> None:
    model = seeing()
    folder = write(model, tmp_path / "m", "minimax")
    every = load_file(folder / "model.safetensors")
    every["vision_tower.vision_model.post_layernorm.weight"] = torch.ones(32)
    save_file(every, folder / "model.safetensors")
    same(into(folder, model), dict(model.named_parameters()))
    every["vision_tower.unknown"] = torch.ones(1)
    save_file(every, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"vision_tower\.unknown', which a model"):
        open_folder("x", folder)


@pytest.mark.parametrize("target", ["hf", "hf-stacked"])
def test_transformers_has_no_class_for_it(target: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --to minimax: the layout of MiniMax-VL-01"):
        write(seeing(), tmp_path / "m", target)


@torch.no_grad()
def test_logits_are_those_of_an_assembly_like_llava_next(tmp_path: Path) -> None:
    """CLIP and LLaVA-NeXT's joining out of transformers, with the tensors of the folder, before the text model."""
    model = seeing().eval()
    folder = write(model, tmp_path / "m", "minimax")
    fresh = build_model(model.config, seed=99).eval()
    load_folder("x", open_folder("x", folder), fresh)
    sizes = [(60, 25), (28, 28), (20, 70)]
    vision = model.config.vision
    images = draw_images(vision, *sizes)
    lengths = [lay_image(*size, tile_rules(vision)).tokens for size in sizes]
    tokens = [5, *[vision.image_token] * lengths[0], 6, *[vision.image_token] * sum(lengths[1:]), 7, 8]
    tokens_T, packing = torch.tensor(tokens), Packing.from_lengths([len(tokens)])
    ours = model(tokens_T, packing, given=images_of(tokens_T, images, vision.image_token))
    from mmtrain.model.given_embeddings import GivenEmbeddings
    from mmtrain.vision.images import normalise

    clip, tensors = clip_of(fresh.encoder), files(folder)
    features = clip(normalise(images.tiles_N3SS)).last_hidden_state[:, 1:]
    hidden = torch.nn.functional.gelu(
        features @ tensors["multi_modal_projector.linear_1.weight"].T + tensors["multi_modal_projector.linear_1.bias"]
    )
    projected = hidden @ tensors["multi_modal_projector.linear_2.weight"].T
    projected = projected + tensors["multi_modal_projector.linear_2.bias"]
    per_image = list(projected.split([layout.tiles for layout in images.layouts]))
    rows = packed_by_llava(per_image, sizes, fresh.encoder)
    at = (tokens_T == vision.image_token).nonzero().flatten()
    theirs = super(type(fresh), fresh).forward(tokens_T, packing, given=GivenEmbeddings(at, rows))
    assert relative(ours, theirs) < 1e-5
