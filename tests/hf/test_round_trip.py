"""What is exported comes back bit for bit, and the files are what the safetensors package reads and writes."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmtrain.build import build_model
from mmtrain.checkpoint import safetensors_file
from mmtrain.checkpoint.safetensors_file import TensorFile
from mmtrain.errors import ConfigError
from mmtrain.hf import export as export_module
from mmtrain.hf import read_weights
from mmtrain.hf.export import export
from mmtrain.hf.folder import HFFolder, check_folder, open_folder
from mmtrain.hf.read_weights import load_folder
from mmtrain.hf.sources import FolderWeights
from mmtrain.hf.target import TARGETS
from tests.hf.folders import PRE_NORM, SHAPES, SHARED, made, write
from tests.model.small import small_config


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: NaN, -0 and all."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.shape == theirs[name].shape and torch.equal(bits(value), bits(theirs[name])), name


def load_into(folder: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    fresh = build_model(model.config, seed=99)
    load_folder("x", check_folder("x", folder, model.config), fresh)
    return dict(fresh.named_parameters())


CASES = [(shape, target) for shape in SHAPES for target in TARGETS]
CASES += [("shared", "minimax"), ("pre-norm", "minimax")]


@pytest.mark.parametrize(("shape", "target"), CASES)
def test_weights_come_back_bit_for_bit(shape: str, target: str, tmp_path: Path) -> None:
    model = made({"shared": SHARED, "pre-norm": PRE_NORM}.get(shape, shape))
    whole = dict(model.named_parameters())
    rounded = {name: value.bfloat16().float() for name, value in whole.items()}
    same(load_into(write(model, tmp_path / "one", target), model), whole)
    same(load_into(write(model, tmp_path / "many", target, shard_bytes=20_000), model), whole)
    half = write(model, tmp_path / "half", target, torch.bfloat16, shard_bytes=20_000)
    same(load_into(half, model), rounded)
    again = build_model(model.config)
    load_folder("x", open_folder("x", half), again)
    same(files(write(again, tmp_path / "again", target, torch.bfloat16)), files(half))


def files(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, as the safetensors package reads them."""
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def test_another_format_of_a_folder_holds_the_same_weights(tmp_path: Path) -> None:
    model = made("hybrid, half of each head rotated")
    first = write(model, tmp_path / "first", "minimax", torch.bfloat16)
    for before, name in ((first, "hf"), (tmp_path / "hf", "hf-stacked"), (tmp_path / "hf-stacked", "minimax")):
        folder: HFFolder = open_folder("x", before)
        export(folder.model, FolderWeights(folder), TARGETS[name], tmp_path / name, torch.bfloat16)
    same(files(tmp_path / "minimax"), files(first))


def test_files_of_the_safetensors_package_are_read_without_an_index_too(tmp_path: Path) -> None:
    model = made(SHARED)
    folder = write(model, tmp_path / "m", "minimax")
    every = files(folder)
    (folder / "model.safetensors").unlink()
    half = dict(list(every.items())[::2])
    save_file(half, folder / "a.safetensors")
    save_file({name: value for name, value in every.items() if name not in half}, folder / "b.safetensors")
    same(load_into(folder, model), dict(model.named_parameters()))


def test_a_dense_layer_is_one_expert_whose_router_has_no_say(tmp_path: Path) -> None:
    dense = made("dense, 6 heads, lightning last")
    every = files(write(dense, tmp_path / "m"))
    gate = every["model.layers.0.block_sparse_moe.gate.weight"]
    assert gate.shape == (1, 48) and not gate.any()
    config = small_config(**{**SHAPES["dense, 6 heads, lightning last"], "num_experts": 1, "top_k": 1})
    mixture = build_model(config)
    load_folder("x", check_folder("x", tmp_path / "m", config), mixture)  # and it is, for us too
    assert torch.equal(mixture.layers[0].ffn.experts.w13_E2FD[0], dense.layers[0].ffn.w13_2FD)
    x_TD = torch.randn(50, 48, generator=torch.Generator().manual_seed(0)) * 100
    torch.nn.init.ones_(mixture.layers[0].ffn.router.weight)
    plan, _ = mixture.eval().layers[0].ffn.router(x_TD)
    assert (plan.weight_TK == 1).all()  # exactly, whatever its router holds


def test_one_file_is_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("hybrid, half of each head rotated")
    folder = write(model, tmp_path / "m", shard_bytes=30_000)
    alive: weakref.WeakSet[TensorFile] = weakref.WeakSet()
    most = []

    class Counted(TensorFile):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr(read_weights, "TensorFile", Counted)
    load_into(folder, model)
    assert max(most) == 1 and 2 < len(most) <= len(list(folder.glob("*.safetensors")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_tensors_make_the_same_files(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, threads = made("hybrid, half of each head rotated"), torch.get_num_threads()
    whole = write(model, tmp_path / "whole", dtype=dtype)
    for module in (export_module, safetensors_file):
        monkeypatch.setattr(module, "BLOCK", 256)
    same(files(write(model, tmp_path / "parts", dtype=dtype)), files(whole))
    assert torch.get_num_threads() == threads
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)  # whose sum is no number of any float type any more
        write(model, tmp_path / "huge", dtype=dtype)
        model.lm_head.weight[-1, -1] = -torch.inf
    with pytest.raises(ConfigError, match=r"lm_head\.weight: holds weights that are not finite"):
        write(model, tmp_path / "n", dtype=dtype)


def test_a_rounded_part_holds_until_the_next_but_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "BLOCK", 256)
    values, before = torch.randn(1000), None
    for now in export_module._Last(None).parts(values, torch.bfloat16):
        assert before is None or torch.equal(before[0], before[1])
        before = (now, now.clone())


def test_nothing_is_written_over_and_nothing_half_written_stays(tmp_path: Path) -> None:
    model = made(SHARED)
    folder = write(model, tmp_path / "m", "minimax")
    with pytest.raises(ConfigError, match=r"output=.*m: is there already"):
        write(model, folder, "minimax")
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(ConfigError, match=r"checkpoint=norm\.weight: holds weights that are not finite"):
        write(model, tmp_path / "n", "minimax")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(("shape", "option"), [(SHARED, "model.shared_ffn_hidden_size"), (PRE_NORM, "model.post_norm")])
def test_what_transformers_has_not_is_refused(shape: dict, option: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{option}=.*--to minimax"):
        write(made(shape), tmp_path / "m")
