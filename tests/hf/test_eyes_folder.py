"""Eyes out of folders of MiniMax-VL-01, CLIP and LLaVA-NeXT: the tower of transformers, interpolated, and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmtrain.build import build_model
from mmtrain.checkpoint.positions import POSITIONS, resize_positions
from mmtrain.config import ModelConfig
from mmtrain.errors import ConfigError
from mmtrain.hf.eyes_folder import load_eyes, open_eyes
from tests.hf.folders import write
from tests.hf.test_round_trip import same
from tests.vision.small import clip_of, small_vl_config, small_vl_model

ANEW = {"encoder.newline_D", *(f"encoder.projector.linear_{i}.{leaf}" for i in (1, 2) for leaf in ("weight", "bias"))}


def source(seed: int = 3) -> nn.Module:
    """A model in fp32, none of whose vectors is constant."""
    return small_vl_model(dict(activation="quick_gelu"), seed=seed).float()


def like(model: nn.Module, **changes: object) -> ModelConfig:
    return replace(model.config, vision=replace(model.config.vision, **changes))


def clip_folder(model: nn.Module, folder: Path) -> Path:
    """As `CLIPVisionModel` saves it."""
    clip_of(model.encoder).save_pretrained(folder)
    return folder


def whole_clip_folder(model: nn.Module, folder: Path) -> Path:
    """As `CLIPModel` saves it: a text tower, and two projections, lie beside."""
    from transformers import CLIPConfig, CLIPModel

    tower = clip_of(model.encoder)
    text = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=30,
                bos_token_id=1, eos_token_id=2)  # fmt: skip
    made = CLIPModel(CLIPConfig(vision_config=tower.config.to_dict(), text_config=text))
    made.vision_model.load_state_dict(tower.state_dict())
    made.save_pretrained(folder)
    return folder


def llava_folder(model: nn.Module, folder: Path) -> Path:
    """As `LlavaNextForConditionalGeneration` saves it, with a text model as wide as the small one."""
    from transformers import LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    tower = clip_of(model.encoder)
    text = LlamaConfig(hidden_size=model.config.hidden_size, num_hidden_layers=1, num_attention_heads=2,
                       intermediate_size=24, vocab_size=30)  # fmt: skip
    made = LlavaNextForConditionalGeneration(LlavaNextConfig(
        vision_config=tower.config, text_config=text, image_grid_pinpoints=[[28, 28]], image_token_index=1
    ))  # fmt: skip
    made.model.vision_tower.load_state_dict(tower.state_dict())
    made.save_pretrained(folder)
    return folder


def taken(folder: Path, config: ModelConfig) -> nn.Module:
    fresh = build_model(config, seed=99)
    load_eyes("x", open_eyes("x", folder, config), fresh)
    return fresh


@pytest.mark.parametrize("made", [clip_folder, whole_clip_folder, llava_folder], ids=lambda made: made.__name__)
def test_a_tower_of_transformers_is_taken_bit_for_bit_and_nothing_else(made, tmp_path: Path) -> None:
    model = source()
    folder = made(model, tmp_path / "theirs")
    assert set(open_eyes("x", folder, model.config).anew) == ANEW
    models = model, taken(folder, model.config), build_model(model.config, seed=99)
    whole, found, start = (dict(one.named_parameters()) for one in models)
    tower = {name for name in found if name.startswith("encoder.vision_tower.")}
    assert tower
    same({name: found[name] for name in tower}, {name: whole[name] for name in tower})
    same({name: found[name] for name in found.keys() - tower}, {name: start[name] for name in found.keys() - tower})


def test_hidden_states_are_those_of_the_saved_tower(tmp_path: Path) -> None:
    from transformers import CLIPVisionModel

    model = source()
    folder = clip_folder(model, tmp_path / "clip")
    pixels_N3SS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    theirs = CLIPVisionModel.from_pretrained(folder)(pixels_N3SS).last_hidden_state
    torch.testing.assert_close(taken(folder, model.config).encoder.vision_tower(pixels_N3SS), theirs)


def test_eyes_of_the_released_layout_come_whole_but_for_another_width_of_text(tmp_path: Path) -> None:
    model = source()
    folder = write(model, tmp_path / "m", "minimax")
    opened = open_eyes("x", folder, model.config)
    assert not opened.anew and len(opened.taken) == sum(1 for _ in model.encoder.parameters())
    same(dict(taken(folder, model.config).encoder.named_parameters()), dict(model.encoder.named_parameters()))
    wider = small_vl_config(dict(activation="quick_gelu"), hidden_size=2 * model.config.hidden_size)
    assert set(open_eyes("x", folder, wider).anew) == ANEW
    assert torch.equal(taken(folder, wider).encoder.vision_tower.layers[1].fc1.weight,
                       model.encoder.vision_tower.layers[1].fc1.weight)  # fmt: skip


def test_positions_of_other_tiles_are_interpolated(tmp_path: Path) -> None:
    model = source()
    larger = like(model, tile_size=42)
    folder = clip_folder(model, tmp_path / "clip")
    opened = open_eyes("x", folder, larger)
    assert opened.tile == 28
    before, after = (dict(one.named_parameters())[POSITIONS] for one in (model, taken(folder, larger)))
    assert len(before) == 17 and len(after) == 37
    torch.testing.assert_close(after, resize_positions(before.detach(), 37))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (dict(activation="gelu"), "model.vision.activation=gelu: x=.* holds eyes with quick_gelu"),
        (dict(num_layers=4), "model.vision.num_layers=4: x=.* holds eyes with 3"),
        (dict(num_heads=2), "model.vision.num_heads=2: x=.* holds eyes with 4"),
        (dict(norm_eps=1e-6), "model.vision.norm_eps=1e-06: x=.* holds eyes with 1e-05"),
        (dict(patch_size=14), "model.vision.patch_size=14: x=.* holds eyes with 7"),
    ],
    ids=str,
)
def test_other_eyes_are_refused_by_the_option_that_differs(change: dict, line: str, tmp_path: Path) -> None:
    model = source()
    with pytest.raises(ConfigError, match=line):
        open_eyes("x", clip_folder(model, tmp_path / "clip"), like(model, **change))


def test_options_that_a_config_leaves_out_have_clip_s_defaults(tmp_path: Path) -> None:
    """LLaVA's own files say nothing of the activation, which is CLIP's."""
    model = source()
    folder = clip_folder(model, tmp_path / "clip")
    told = json.loads((folder / "config.json").read_text())
    del told["hidden_act"], told["layer_norm_eps"]
    (folder / "config.json").write_text(json.dumps(told))
    open_eyes("x", folder, model.config)
    with pytest.raises(ConfigError, match="quick_gelu"):
        open_eyes("x", folder, like(model, activation="gelu"))


@pytest.mark.parametrize(
    ("name", "tensor", "line"),
    [
        ("encoder.layers.1.mlp.fc1.weight", None, "lacks 'vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight'"),
        ("encoder.layers.1.mlp.fc1.weight", torch.ones(2), r"fc1.weight' of \[2\], and the model's is \[40, 32\]"),
        ("encoder.layers.1.mlp.fc1.weight", torch.ones(40, 32).to(torch.int32), "in I32; F32, BF16, F16 are read"),
        ("other.embeddings.class_embedding", torch.ones(32), "holds 2 vision towers"),
        ("embeddings.class_embedding", None, "holds 0 vision towers"),
        ("embeddings.position_embedding.weight", torch.ones(12, 32), r"of \[12, 32\], and the model's is \[17, 32\]"),
    ],
)  # fmt: skip
def test_damaged_towers_are_refused_in_one_line(
    name: str, tensor: torch.Tensor | None, line: str, tmp_path: Path
) -> None:
    model = source()
    folder = clip_folder(model, tmp_path / "clip")
    every = load_file(folder / "model.safetensors")
    every.pop(name, None)
    save_file(every | ({} if tensor is None else {name: tensor}), folder / "model.safetensors")
    with pytest.raises(ConfigError, match=line) as caught:
        open_eyes("x", folder, model.config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("told", [{"model_type": "siglip_vision_model"}, {"vision_config": 3}, {}], ids=str)
def test_what_is_no_tower_of_clip_s_is_refused(told: dict, tmp_path: Path) -> None:
    model = source()
    folder = clip_folder(model, tmp_path / "clip")
    (folder / "config.json").write_text(json.dumps(told))
    with pytest.raises(ConfigError, match=r"config\.json (has|describes)"):
        open_eyes("x", folder, model.config)
