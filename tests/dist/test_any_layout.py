"""A checkpoint of any layout and number of processes, loaded under any other: every tensor to the last bit."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mmtrain.build import meta_model
from mmtrain.checkpoint.load import load_checkpoint
from mmtrain.checkpoint.progress import Progress
from mmtrain.checkpoint.save import begin_save
from mmtrain.checkpoint.tensors import StoredTensors
from mmtrain.config import ClusterConfig, ModelConfig, OptimConfig, ParallelConfig
from mmtrain.errors import ConfigError
from mmtrain.optim.host_kernel import load_host_adam
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel import mesh
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.parallelize import apply_parallel
from tests.dist.layouts import MODEL, SEQ
from tests.dist.pool import Pool
from tests.dist.runs import SMALL, pretrain, records, steps
from tests.dist.test_random_layouts import draw

ROUTED = replace(MODEL, shared_ffn_hidden_size=16)
ONE = (1, ParallelConfig())
PAIRS = {
    "one to fsdp 2": (ONE, (2, ParallelConfig())),
    "fsdp 4 to one": ((4, ParallelConfig()), ONE),
    "fsdp 2 to 3": ((2, ParallelConfig()), (3, ParallelConfig())),
    "tp 2 to 4": ((2, ParallelConfig(tp=2)), (4, ParallelConfig(tp=4))),
    "tp 4 to fsdp 4": ((4, ParallelConfig(tp=4)), (4, ParallelConfig())),
    "ep 2 to 4": ((2, ParallelConfig(ep=2)), (4, ParallelConfig(ep=4))),
    "ep 4 to tp 2": ((4, ParallelConfig(ep=4)), (2, ParallelConfig(tp=2))),
    "etp 2 to ep 2": ((4, ParallelConfig(ep=2, etp=2)), (2, ParallelConfig(ep=2))),
    "one to etp 2, tp 2": (ONE, (2, ParallelConfig(tp=2, etp=2))),
    "etp 2 to etp 4": ((2, ParallelConfig(etp=2)), (4, ParallelConfig(etp=4))),
    "cp 2 to 4": ((2, ParallelConfig(cp=2)), (4, ParallelConfig(cp=4, cp_chunks=3))),
    "cp 4, ep 2 to fsdp 2": ((4, ParallelConfig(cp=4, ep=2, cp_chunks=3)), (2, ParallelConfig())),
    "pp 2 to one": ((2, ParallelConfig(pp=2)), ONE),
    "fsdp 2 to pp 4": ((2, ParallelConfig()), (4, ParallelConfig(pp=4))),
    "pp 4 to pp 2 of 2 chunks": (
        (4, ParallelConfig(pp=4)),
        (2, ParallelConfig(pp=2, pp_schedule="interleaved", pp_chunks=2)),
    ),
    "pp 2 of 2 chunks to tp 2, pp 2": (
        (2, ParallelConfig(pp=2, pp_schedule="zero_bubble", pp_chunks=2)),
        (4, ParallelConfig(tp=2, pp=2)),
    ),
    "tp 2, ep 2, etp 2 to cp 2, pp 2": (
        (4, ParallelConfig(tp=2, ep=2, etp=2)),
        (4, ParallelConfig(cp=2, pp=2, ep=2)),
    ),
    "cp 2, tp 2 to ep 3 of 6 experts": ((4, ParallelConfig(cp=2, tp=2)), (3, ParallelConfig(ep=3))),
}
QUICK = {"fsdp 2 to 3", "tp 2, ep 2, etp 2 to cp 2, pp 2"}


def save_and_load(
    folder: Path, parallel: ParallelConfig, model_of: ModelConfig, load: bool, optim: str = "adamw"
) -> None:
    """Save a model whose moments are all different; or load that, and save what was loaded."""
    context = mesh.start(ClusterConfig(device="cpu"), plan_layout(mesh.world_size(), parallel, model_of, [SEQ]))
    try:
        host = optim == "cpu_offload"
        model = apply_parallel(meta_model(model_of), context, parallel, torch.float32, host_parameters=host)
        model.initialise(8 if load else 7)
        optimizer = build_optimizer(model.module, OptimConfig(name=optim))
        if load:
            load_checkpoint(folder / "saved/step-00000002", model.module, optimizer)
        else:
            for power in (1.0, 0.5):
                for parameter in model.module.parameters():
                    parameter.grad = parameter.detach().abs().pow(power)  # by its value: not the same in two places
                optimizer.step()
        name = "loaded" if load else "saved"
        begin_save(folder / name, model.module, optimizer, Progress(2, 64), {"model": {}}, 5e6).finish()
        dist.barrier()
    finally:
        mesh.stop()


def check_pair(
    pool: Pool,
    folder: Path,
    before: tuple[int, ParallelConfig],
    now: tuple[int, ParallelConfig],
    optim: str = "adamw",
) -> None:
    model_of = replace(ROUTED, num_experts=6) if now[1].ep == 3 else ROUTED
    pool.run(save_and_load, folder, before[1], model_of, False, optim, world=before[0])
    pool.run(save_and_load, folder, now[1], model_of, True, optim, world=now[0])
    alone = folder / "alone"
    pool.run(save_and_load, alone, ParallelConfig(), model_of, False, optim, world=1)
    saved, loaded, one = (StoredTensors(path / "step-00000002")
                          for path in (folder / "saved", folder / "loaded", alone / "saved"))  # fmt: skip
    assert saved.shapes == loaded.shapes == one.shapes
    assert sum(name.endswith(".exp_avg_sq") for name in saved.shapes) == len(list(meta_model(model_of).parameters()))
    for name in saved.shapes:
        value = saved.whole(name)
        assert torch.equal(value, loaded.whole(name)), name
        rounding = 1e-6 if optim == "cpu_offload" else 0.0  # its kernel rounds the end of a part otherwise
        torch.testing.assert_close(value, one.whole(name), rtol=rounding, atol=0.0)  # the saved one is not scrambled


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PAIRS]
)
def test_every_tensor_is_the_saved_one(pool: Pool, tmp_path: Path, name: str) -> None:
    check_pair(pool, tmp_path, *PAIRS[name])


HOST = ("one to fsdp 2", "cp 4, ep 2 to fsdp 2", "tp 2, ep 2, etp 2 to cp 2, pp 2", "pp 2 to one")


@pytest.mark.slow
@pytest.mark.parametrize("name", HOST)
def test_every_tensor_in_host_memory_is_the_saved_one(pool: Pool, tmp_path: Path, name: str) -> None:
    pytest.importorskip("deepspeed", reason="the extra `offload` is not installed")
    load_host_adam()  # compiles the kernel, if it has to, without a limit of time
    check_pair(pool, tmp_path, *PAIRS[name], optim="cpu_offload")


def draw_fitting(rng: random.Random) -> tuple[int, ParallelConfig]:
    while True:
        world, parallel = rng.choice([1, 2, 3, 4]), draw(rng)
        try:
            plan_layout(world, parallel, ROUTED, [SEQ])
        except ConfigError:
            continue
        return world, parallel


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_random_pairs(pool: Pool, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    check_pair(pool, tmp_path, draw_fitting(rng), draw_fitting(rng))


MOVES = {
    "2 to 4 processes": ((2, []), (4, [])),
    "4 to 2": ((4, ["parallel.ep=2"]), (2, ["parallel.tp=2"])),
    "2 to 1": ((2, ["parallel.tp=2"]), (1, [])),
    "to cp": ((2, ["parallel.ep=2"]), (4, ["parallel.cp=2", "parallel.tp=2"])),
    "by itself": (
        (4, ["parallel=auto", "parallel.tp=2", "parallel.ep=4"]),
        (2, ["parallel=auto", "parallel.tp=2", "parallel.ep=4"]),
    ),
    "from cp to pp": ((2, ["parallel.cp=2"]), (2, ["parallel.pp=2"])),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MOVES)
def test_a_run_that_moves_is_the_run_that_did_not(corpus: Path, tmp_path: Path, name: str) -> None:
    """The losses, the norms, the rows that were read, and the validation at the end."""
    (first, options), (second, others) = MOVES[name]
    common = [*SMALL, f"data.path={corpus}", f"run.dir={tmp_path}"]
    pretrain(*common, *options, "run.name=stays", processes=first)
    pretrain(*common, *options, "run.name=moves", "run.max_steps=3", processes=first)
    done = pretrain(*common, *others, "run.name=moves", "run.resume=auto", processes=second)
    assert f"since {tmp_path}/moves/checkpoints/step-00000003: the run goes on the same but for rounding" in (
        done.stdout + done.stderr
    )
    mine, theirs = steps(tmp_path / "moves"), steps(tmp_path / "stays")
    assert [record["step"] for record in mine] == [record["step"] for record in theirs]
    for moved, stayed in zip(mine, theirs, strict=True):
        assert moved["loss"] == pytest.approx(stayed["loss"], rel=1e-5)
        assert moved["grad_norm"] == pytest.approx(stayed["grad_norm"], rel=1e-4)
        assert moved["tokens"] == stayed["tokens"] and moved["first_row"] == stayed["first_row"]
    ends = [records(tmp_path / name)[-1]["val_loss"] for name in ("moves", "stays")]
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)
