"""A Hugging Face folder read directly into models of several layouts, each parameter bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmtrain.build import build_model, meta_model
from mmtrain.checkpoint.safetensors_file import TensorFile
from mmtrain.config import ClusterConfig, ModelConfig, ParallelConfig
from mmtrain.errors import ConfigError
from mmtrain.hf.folder import check_folder
from mmtrain.hf.read_weights import load_folder
from mmtrain.parallel import mesh
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.parallelize import apply_parallel
from tests.checkpoint.fake import config
from tests.dist.pool import Pool
from tests.dist.runs import SMALL, make_corpus, pretrain, steps
from tests.hf.folders import write

# One key/value head for two ranks of tensor parallelism, rows in another order, and a second softmax layer.
MODEL = ModelConfig("small", vocab_size=101, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=1, head_dim=8,
                    ffn_hidden_size=32, layer_pattern="LS", rotary_dim=4, num_experts=4)  # fmt: skip


def read(folder: Path, model: ModelConfig, parallel: ParallelConfig) -> tuple[dict[str, torch.Tensor], int]:
    """Read a folder; returns whole parameters of this rank's layers, and how many tensors it looked at."""
    layout = plan_layout(mesh.world_size(), parallel, model)
    context = mesh.start(ClusterConfig(device="cpu"), layout)
    laid = apply_parallel(meta_model(model), context, parallel, torch.float32)
    laid.initialise(7)
    looked, plain = [0], TensorFile.tensor

    def counted(self: TensorFile, entry: object) -> torch.Tensor:
        looked[0] += 1
        return plain(self, entry)

    TensorFile.tensor = counted
    try:
        load_folder("run.init_from", check_folder("run.init_from", folder, model), laid.module)
    finally:
        TensorFile.tensor = plain
    whole = {name: value.full_tensor().clone() for name, value in laid.module.named_parameters()}
    mesh.stop()
    return whole, looked[0]


CASES = {
    "fsdp 2": (2, dict()),
    "pp 2": (2, dict(pp=2)),
    "tp 2 x ep 2": (4, dict(tp=2, ep=2)),
    "tp 2, etp 2": (2, dict(tp=2, etp=2)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", ["hf", "hf-stacked"])
def test_every_layout_gets_the_weights_bit_for_bit(pool: Pool, tmp_path: Path, case: str, target: str) -> None:
    world, options = CASES[case]
    if target == "hf-stacked" and case != "tp 2 x ep 2":
        pytest.skip("one layout shows how stacked experts are cut")
    model = build_model(MODEL, seed=3)
    folder = write(model, tmp_path / "m", target, torch.bfloat16, shard_bytes=30_000)
    got = pool.run(read, folder, MODEL, ParallelConfig(**options), world=world)
    expected = {name: value.detach().bfloat16().float() for name, value in model.named_parameters()}
    found = {name: value for whole, _ in got for name, value in whole.items()}
    assert found.keys() == expected.keys()
    for whole, _ in got:
        for name, value in whole.items():
            assert torch.equal(value, expected[name]), name
    if target == "hf" and options.get("ep"):  # a rank looks at its own experts alone
        every = len(check_folder("x", folder, MODEL).places)
        assert all(looked < 0.75 * every for _, looked in got)


def read_what_is_gone(folder: Path) -> str:
    """Two ranks, one of which has another folder in mind, whose files are gone."""
    context = mesh.start(ClusterConfig(device="cpu"))
    try:
        laid = apply_parallel(meta_model(MODEL), context, ParallelConfig(), torch.float32)
        laid.initialise(7)
        checked = check_folder("run.init_from", folder, MODEL)
        if context.rank == 1:
            gone = {name: (path.with_name("gone"), entry) for name, (path, entry) in checked.places.items()}
            checked = replace(checked, places=gone)
        load_folder("run.init_from", checked, laid.module)
        return "read"
    except ConfigError as error:
        return str(error)
    finally:
        mesh.stop()


def test_a_file_that_one_rank_cannot_read_is_told_by_all(pool: Pool, tmp_path: Path) -> None:
    lines = pool.run(read_what_is_gone, write(build_model(MODEL), tmp_path / "m"), world=2)
    assert lines[0] == lines[1] and "cannot be read: FileNotFoundError" in lines[0] and "(rank 1)" in lines[0]


@pytest.mark.slow
def test_a_run_from_a_folder_is_the_run_from_the_same_initial_weights(tmp_path: Path) -> None:
    common = [*SMALL, f"data.path={make_corpus(tmp_path)}", f"run.dir={tmp_path / 'runs'}", "run.max_steps=2",
              "data.valid_rows=0", "checkpoint.save_final=false"]  # fmt: skip
    model = config(tmp_path, *(option for option in SMALL if option.startswith("model."))).model
    folder = write(build_model(model, seed=1234), tmp_path / "exported", "hf")
    pretrain(*common, "run.name=initial", "run.seed=1234", processes=None)
    told = pretrain(*common, "run.name=folder", "run.seed=5", f"run.init_from={folder}", processes=None)
    assert f"weights of {folder}" in told.stdout + told.stderr and "moments begin at 0" in told.stdout + told.stderr
    losses = [[record["loss"] for record in steps(tmp_path / "runs" / name)] for name in ("initial", "folder")]
    assert losses[0] == losses[1] and len(losses[0]) == 2
