"""The auxiliary loss over the global batch: its definition, no matter how the batch is cut or spread, and a resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmtrain.build import meta_model
from mmtrain.checkpoint.load import load_checkpoint
from mmtrain.checkpoint.progress import Progress, read_progress
from mmtrain.checkpoint.save import begin_save
from mmtrain.config import ClusterConfig, OptimConfig, ParallelConfig
from mmtrain.model.moe.router import Router
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel import mesh
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.train.step import train_step
from tests.dist.layouts import MODEL, SEQ, Job, Outcome, alone, packed_row, train, whole
from tests.dist.pool import Pool
from tests.dist.runs import SMALL, pretrain, steps

slow = pytest.mark.slow
# A coefficient at which the loss is a good part of the routers' gradients; two layers of experts.
HEAVY = replace(MODEL, num_layers=2, layer_pattern="LS", aux_loss_coef=1.0)
OVER = {"aux_loss_over": "global_batch"}
LAYOUTS = {
    "DP2": ({}, 2),
    "TP2": ({"tp": 2}, 2),
    "EP2": ({"ep": 2}, 2),
    "PP2": ({"pp": 2}, 2),
    "PP2, interleaved": ({"pp": 2, "pp_schedule": "interleaved", "pp_chunks": 2}, 2),
    "TP2 x EP2 x ETP2": ({"tp": 2, "ep": 2, "etp": 2, "activation_checkpoint": True}, 4),
    "PP2 x TP2": ({"pp": 2, "tp": 2, "pp_schedule": "zero_bubble"}, 4),
}
QUICK = ("DP2", "EP2", "PP2", "TP2 x EP2 x ETP2")


def shares(assigned_E: Tensor) -> Tensor:
    """Assignments a token, float64."""
    return MODEL.top_k * assigned_E.double() / assigned_E.sum()


def naive_loss(x_TD: Tensor, weight_ED: Tensor, fractions_E: Tensor) -> Tensor:
    """coef E/k sum_i f_i m_i in float64."""
    mean_E = (x_TD.double() @ weight_ED.double().T).softmax(-1).mean(0)
    return HEAVY.aux_loss_coef * MODEL.num_experts / MODEL.top_k * (fractions_E * mean_E).sum()


def test_value_and_gradient_of_given_fractions() -> None:
    torch.manual_seed(0)
    router = Router(HEAVY)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(SEQ, MODEL.hidden_size, requires_grad=True)
    fractions = shares(torch.arange(1, MODEL.num_experts + 1))
    router.fractions_E = fractions.float()
    ours = router(x)[1].aux_loss
    theirs = naive_loss(x, router.weight, fractions)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for mine, exact in zip(*(torch.autograd.grad(loss, (x, router.weight)) for loss in (ours, theirs)), strict=True):
        assert (mine - exact).norm() < 1e-5 * exact.norm()
    router.fractions_E.fill_(MODEL.top_k / MODEL.num_experts)  # of the first step
    even = router(x)[1].aux_loss
    assert even.item() == pytest.approx(HEAVY.aux_loss_coef, rel=1e-6)
    assert torch.autograd.grad(even, router.weight)[0].norm() < 1e-5 * exact.norm()


def steps_by_hand(rows_a_step: int, count: int) -> list[tuple[float, float]]:
    """Train one process, and compute each step's auxiliary loss again in float64 from what the routers were given."""
    context = mesh.start(ClusterConfig(device="cpu"))
    try:
        parallel = ParallelConfig(**OVER)
        model = apply_parallel(meta_model(HEAVY), context, parallel, torch.float32)
        model.initialise(7)
        optimizer = build_optimizer(model.module, OptimConfig())
        inputs: list[list[Tensor]] = [[] for _ in model.module.layers]
        for block, seen in zip(model.module.layers, inputs, strict=True):
            block.ffn.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach()))
        fractions = [torch.full((MODEL.num_experts,), MODEL.top_k / MODEL.num_experts).double()] * len(inputs)
        found = []
        for step in range(count):
            weights = [block.ffn.router.weight.full_tensor().detach().clone() for block in model.module.layers]
            batches = [packed_row(row) for row in range(step * rows_a_step, (step + 1) * rows_a_step)]
            result = train_step(model, optimizer, batches, 1e-3, HEAVY.rope_base, clip_grad=None)
            expected = sum(
                naive_loss(x, weight, fraction).item() / rows_a_step
                for weight, fraction, seen in zip(weights, fractions, inputs, strict=True)
                for x in seen
            )
            found.append((result.aux_loss, expected))
            for layer, (weight, seen) in enumerate(zip(weights, inputs, strict=True)):
                best = (torch.cat(seen).double() @ weight.double().T).topk(MODEL.top_k).indices
                fractions[layer] = shares(torch.bincount(best.flatten(), minlength=MODEL.num_experts))
                seen.clear()
        return found
    finally:
        mesh.stop()


def test_three_steps_by_hand(pool: Pool) -> None:
    found = pool.run(steps_by_hand, 3, 3, world=1)[0]
    for ours, expected in found:
        assert ours == pytest.approx(expected, rel=1e-6)
    assert found[0][0] == pytest.approx(2.0, rel=1e-6) and found[2][0] > 2.01  # two layers, even at first


def agree(mine: Outcome, theirs: Outcome, gradient: float) -> None:
    """Auxiliary losses of all steps, and gradients, of which one rank may have a part of the parameters."""
    for ours, expected in zip(mine.results, theirs.results, strict=True):
        assert ours.aux_loss == pytest.approx(expected.aux_loss, rel=1e-6)
    assert mine.gradients.keys() == mine.before.keys()
    for name, value in mine.gradients.items():
        error = (value - theirs.gradients[name]).norm() / theirs.gradients[name].norm()
        assert error < gradient, f"{name}: {error:.1e}"


def test_cutting_the_batch_changes_nothing(pool: Pool) -> None:
    """Micro-batches of one row or of two, where no capacity depends on it."""
    dropless = replace(HEAVY, capacity_factor=None)
    outcomes = []
    for rows, over in ((1, "global_batch"), (2, "global_batch"), (1, "micro_batch"), (2, "micro_batch")):
        parallel = ParallelConfig(micro_batch_rows=rows, aux_loss_over=over)
        outcomes += pool.run(train, Job(dropless, parallel, rows=4, steps=3, lr=0.0, probe=2), world=1)
    agree(outcomes[1], outcomes[0], 1e-5)
    weight = "layers.1.ffn.router.weight"
    for i, j in ((0, 2), (2, 3)):  # the loss is felt; over micro-batches it is another for each cut
        difference = (outcomes[i].gradients[weight] - outcomes[j].gradients[weight]).norm()
        assert difference > 1e-2 * outcomes[j].gradients[weight].norm()


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=slow) for n in LAYOUTS])
def test_layouts_against_one_process(pool: Pool, name: str) -> None:
    options, world = LAYOUTS[name]
    model = replace(HEAVY, num_layers=4, layer_pattern="LLLS") if "interleaved" in name else HEAVY
    job = Job(model, ParallelConfig(**options, **OVER), rows=4, steps=3, lr=0.0, probe=2)
    one = pool.run(train, alone(job), world=1)[0]
    assert one.results[2].aux_loss != pytest.approx(one.results[0].aux_loss, rel=1e-2)
    for many in pool.run(train, job, world=world):
        agree(many, one, 1e-4)


def part_of_a_run(parallel: ParallelConfig, folder: Path, first: int, last: int) -> tuple[dict[str, Tensor], list]:
    """Steps [first, last) from a checkpoint, if first is not 0, and save; returns weights and buffers, and results."""
    layout = plan_layout(mesh.world_size(), parallel, HEAVY, [SEQ])
    context = mesh.start(ClusterConfig(device="cpu"), layout)
    try:
        model = apply_parallel(meta_model(HEAVY), context, parallel, torch.float32)
        model.initialise(7)
        optimizer = build_optimizer(model.module, OptimConfig())
        if first:
            load_checkpoint(folder / f"step-{first:08d}", model.module, optimizer)
            assert read_progress(folder / f"step-{first:08d}").step == first
        results = []
        for step in range(first, last):
            rows = range(4 * step + context.dp_rank, 4 * step + 4, context.dp_size)
            batches = [packed_row(row) for row in rows]
            results.append(train_step(model, optimizer, batches, 1e-3, HEAVY.rope_base, clip_grad=1.0))
        begin_save(folder, model.module, optimizer, Progress(last, last), {}, HEAVY.rope_base).finish()
        return {
            **whole(model.module),
            **{name: buffer.clone() for name, buffer in model.module.named_buffers()},
        }, results
    finally:
        mesh.stop()


@slow
@pytest.mark.parametrize("options", [{"ep": 2}, {"pp": 2}], ids=str)
def test_a_resumed_run_has_the_fractions_of_the_step_before(
    pool: Pool, tmp_path: Path, options: dict[str, int]
) -> None:
    parallel = ParallelConfig(**options, **OVER)
    cut, through = tmp_path / "cut", tmp_path / "through"
    half = pool.run(part_of_a_run, parallel, cut, 0, 2, world=2)
    resumed = pool.run(part_of_a_run, parallel, cut, 2, 4, world=2)
    uninterrupted = pool.run(part_of_a_run, parallel, through, 0, 4, world=2)
    for (mine, results), (theirs, all_results) in zip(resumed, uninterrupted, strict=True):
        assert mine.keys() == theirs.keys() and any(name.endswith("fractions_E") for name in mine)
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
        assert results == all_results[2:]
    saved = {name: value for state, _ in half for name, value in state.items()}
    same = pool.run(part_of_a_run, ParallelConfig(**OVER), cut, 2, 2, world=1)[0][0]  # another layout reads them too
    assert same.keys() == saved.keys() and all(torch.equal(value, saved[name]) for name, value in same.items())
    assert not torch.equal(saved["layers.0.ffn.router.fractions_E"], torch.full((8,), 0.25))


def test_checkpoints_with_and_without_fractions_load_either_way(pool: Pool, tmp_path: Path) -> None:
    with_them, without = ParallelConfig(**OVER), ParallelConfig()
    pool.run(part_of_a_run, without, tmp_path / "plain", 0, 1, world=1)
    state, results = pool.run(part_of_a_run, with_them, tmp_path / "plain", 1, 2, world=1)[0]
    assert results[0].aux_loss == pytest.approx(2.0, rel=1e-6)  # even, as at a first step
    assert state["layers.0.ffn.router.fractions_E"].sum().item() == pytest.approx(MODEL.top_k)
    pool.run(part_of_a_run, with_them, tmp_path / "fractions", 0, 1, world=1)
    state, _ = pool.run(part_of_a_run, without, tmp_path / "fractions", 1, 2, world=1)[0]
    assert not any(name.endswith("fractions_E") for name in state)


@slow
def test_a_run_through_the_trainer_resumes_to_the_last_bit(corpus: Path, tmp_path: Path) -> None:
    """With both figures of drops in every record."""
    common = [*SMALL, f"data.path={corpus}", f"run.dir={tmp_path}", "parallel.aux_loss_over=global_batch",
              "parallel.ep=2", "parallel.global_router=true"]  # fmt: skip
    pretrain(*common, "run.name=whole", "run.max_steps=5", processes=2)
    pretrain(*common, "run.name=cut", "run.max_steps=3", processes=2)
    pretrain(*common, "run.name=cut", "run.resume=auto", "run.max_steps=5", processes=2)
    keys = ("step", "loss", "aux_loss", "grad_norm", "drop_rate", "drop_rate_alone")
    found = [[tuple(record[key] for key in keys) for record in steps(tmp_path / name)] for name in ("whole", "cut")]
    assert found[0] == found[1] and len(found[0]) == 5
    assert any(record["drop_rate_alone"] > record["drop_rate"] for record in steps(tmp_path / "whole"))
