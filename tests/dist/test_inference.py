"""The engine under TP, EP and ETP: tokens, logits and states of one process, from checkpoints of every kind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mmtrain.build import meta_model
from mmtrain.checkpoint.progress import Progress
from mmtrain.checkpoint.save import begin_save
from mmtrain.config import ClusterConfig, OptimConfig, ParallelConfig
from mmtrain.errors import OutOfDeviceMemory
from mmtrain.infer.engine import Engine
from mmtrain.infer.joined_projections import end_to_end, project_at_once
from mmtrain.infer.layout import RankLayout
from mmtrain.infer.load import load_for_decoding
from mmtrain.infer.open import open_model
from mmtrain.infer.serving import sampler
from mmtrain.infer.serving.follow import LeadingEngine
from mmtrain.infer.serving.options import EngineOptions
from mmtrain.model.mixers.lightning import LightningAttention
from mmtrain.model.model import HybridLM
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel import mesh
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.parallelize import apply_parallel
from tests.dist.pool import Pool
from tests.dist.runs import environment
from tests.dist.saved_run import SavedRun
from tests.dist.served_ranks import SMALL, VOCAB, Seen, ids, model_of, request, serve, serve_alone
from tests.dist.warm import run_script
from tests.hf.folders import write
from tests.infer.chain import TEXT, chain_model, save_run
from tests.infer.served import full_logits

CASES = {
    ("experts", RankLayout(tp=2)),
    ("experts", RankLayout(ep=2)),
    ("experts", RankLayout(etp=2)),
    ("experts", RankLayout(tp=2, ep=2)),
    ("experts", RankLayout(tp=4, ep=2)),  # two copies of the experts
    ("experts", RankLayout(tp=2, ep=2, etp=2)),  # two copies of the heads
    ("dense", RankLayout(tp=2)),
    ("dense", RankLayout(tp=4)),
    ("pre-norm, shared expert", RankLayout(tp=2, etp=2)),
}
QUICK = {("experts", RankLayout(tp=2, ep=2)), ("dense", RankLayout(tp=2)),
         ("pre-norm, shared expert", RankLayout(tp=2, etp=2))}  # fmt: skip


def case(name: str, layout: RankLayout) -> object:
    text = f"{name}, tp {layout.tp}, ep {layout.ep}, etp {layout.etp}"
    marks = [] if (name, layout) in QUICK else [pytest.mark.slow]
    return pytest.param(name, layout, id=text, marks=marks)


def assert_close(ours: Tensor, theirs: Tensor, bound: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)


def assert_as_alone(got: Sequence[Seen], alone: Seen, model: HybridLM, layout: RankLayout) -> None:
    """All ranks chose from the same bits, which are those of whole forward passes but for rounding."""
    whole = {row: full_logits(model, row)[-1] for row in got[0].logits}
    for one in got:
        assert one.logits.keys() == alone.logits.keys()  # so all tokens before each choice are the same
        assert one.books == got[0].books
        for row, logits_V in one.logits.items():
            assert torch.equal(logits_V, got[0].logits[row])
            assert_close(logits_V, whole[row])
    sampled = [way for way in alone.made if way and isinstance(way[0], tuple)]
    assert [way for way in got[0].made if way not in sampled and not isinstance(way[0], tuple)] == [
        way for way in alone.made if way not in sampled
    ]
    for ours, theirs in zip([way for way in got[0].made if way and isinstance(way[0], tuple)], sampled, strict=True):
        for (tokens, *logprobs), (expected, *values) in zip(ours, theirs, strict=True):
            assert tokens == expected
            for mine, exact in zip(logprobs, values, strict=True):
                assert mine == pytest.approx(exact, abs=1e-5)
    assert all(way is None for one in got[1:] for way in one.made)
    assert_states(got, alone, layout)


def assert_states(got: Sequence[Seen], alone: Seen, layout: RankLayout) -> None:
    """The states of all heads, put together, are those of one process."""
    for number, layers in enumerate(alone.states):
        for place, whole in enumerate(layers):
            parts = [one.states[number][place] for one in got[: layout.tp]]
            dim = 0 if whole.shape[-1] == whole.shape[-2] and whole.ndim == 3 and whole.shape[0] == 4 else 1
            heads = whole.shape[dim]
            if heads < layout.tp:  # each rank works with one key/value head, which several have
                for rank, part in enumerate(parts):
                    assert_close(part, whole.narrow(dim, rank * heads // layout.tp, 1))
            else:
                assert_close(torch.cat(parts, dim), whole)


@pytest.mark.parametrize(("name", "layout"), [case(*one) for one in sorted(CASES, key=str)])
def test_a_layout_gives_what_one_process_gives(pool: Pool, tmp_path: Path, name: str, layout: RankLayout) -> None:
    model = model_of(name)
    save_run(tmp_path / "run", model)
    got = pool.run(serve, tmp_path / "run", layout, world=layout.ranks, timeout=100)
    assert_as_alone(got, serve_alone(model), model, layout)
    whole = sum(value.numel() for value in model.parameters())
    assert all(one.weights < whole for one in got)


def test_keys_over_ranks_give_what_one_process_gives(pool: Pool, tmp_path: Path) -> None:
    model, layout, ways = model_of("experts"), RankLayout(cp=2), (0, 1, 3, 4, 6)
    save_run(tmp_path / "run", model)
    got = pool.run(serve, tmp_path / "run", layout, ways, world=2, timeout=60)
    assert_as_alone(got, serve_alone(model, ways), model, layout)
    whole = sum(value.numel() for value in model.parameters())
    assert all(one.weights == whole for one in got)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_projections_of_own_heads_lie_together(pool: Pool, tmp_path: Path, precision: str) -> None:
    save_run(tmp_path / "run", model_of("experts"))
    for layout in (RankLayout(tp=2), RankLayout(ep=2)):
        got = pool.run(joined_layers, tmp_path / "run", layout, precision, world=2, timeout=60)
        alone = joined_layers(tmp_path / "run", RankLayout(), precision)
        assert alone and None not in alone
        assert got == [[(rows // layout.tp, width) for rows, width in alone]] * 2


def joined_layers(path: Path, layout: RankLayout, precision: str) -> list[tuple[int, ...] | None]:
    """Shape of both projections' weights of each lightning layer on this rank; None where they lie apart."""
    found: list[tuple[int, ...] | None] = []
    with open_model(path, layout, tokenizer="bytes", device="cpu", precision=precision, verify=False) as opened:
        for module in opened.load().modules():
            if isinstance(module, LightningAttention):
                both_ED = end_to_end(module.qkv_proj.weight, module.output_gate.weight)
                used = module.project is project_at_once
                found.append(tuple(both_ED.shape) if used and both_ED is not None else None)
    return found


@pytest.mark.parametrize("precision", ["int8", "int8-g128", "bf16"])
def test_weights_of_other_precisions_are_split_too(pool: Pool, tmp_path: Path, precision: str) -> None:
    model, layout = model_of("experts"), RankLayout(tp=2, ep=2)
    save_run(tmp_path / "run", model)
    got = pool.run(score_at, tmp_path / "run", layout, precision, world=2, timeout=60)
    alone = score_at(tmp_path / "run", RankLayout(), precision)
    assert got[1] is None and alone is not None
    # Columns that lie on two ranks have scales of their own under int8; bf16 sums in another order.
    assert got[0] == pytest.approx(alone, abs=0.05)
    exact = Engine(model, options=SMALL).score(ids(40))
    for ours in (alone, got[0]):
        assert ours == pytest.approx(exact, abs=0.1) and ours != pytest.approx(exact, abs=1e-6)


def score_at(path: Path, layout: RankLayout, precision: str) -> list[float] | None:
    """Log-probabilities of a text on rank 0."""
    with open_model(path, layout, tokenizer="bytes", device="cpu", precision=precision, verify=False) as opened:
        return opened.run(SMALL, lambda engine: engine.score(ids(40)))


def test_ranks_whose_experts_get_no_token(pool: Pool, tmp_path: Path) -> None:
    model = model_of("experts")
    for block in model.layers:
        torch.nn.init.zeros_(block.ffn.router.weight)  # of equal logits the lower experts are chosen: 0 and 1 of 4
    save_run(tmp_path / "run", model)
    layout = RankLayout(ep=2)
    got = pool.run(serve, tmp_path / "run", layout, (0, 5), world=2, timeout=60)
    assert_as_alone(got, serve_alone(model, (0, 5)), model, layout)


def save_under(folder: Path, name: str, parallel: ParallelConfig) -> None:
    """Save initial weights under a layout of training."""
    config = meta_model_config(name)
    context = mesh.start(ClusterConfig(device="cpu"), plan_layout(mesh.world_size(), parallel, config))
    try:
        model = apply_parallel(meta_model(config), context, parallel, torch.float32)
        model.initialise(7)
        optimizer = build_optimizer(model.module, OptimConfig())
        record = {"model": asdict(config)}
        begin_save(folder, model.module, optimizer, Progress(2, 64), record, config.rope_base).finish()
        dist.barrier()
    finally:
        mesh.stop()


def meta_model_config(name: str) -> object:
    return model_of(name).config


def test_a_checkpoint_of_another_layout(pool: Pool, tmp_path: Path) -> None:
    pool.run(save_under, tmp_path, "experts", ParallelConfig(tp=2, ep=2, etp=2), world=4)
    model = load_for_decoding(tmp_path / "step-00000002", "bytes", "cpu")[0]
    alone = serve_alone(model, (0,))
    for layout in (RankLayout(ep=2), RankLayout(tp=2, etp=2)):
        got = pool.run(serve, tmp_path / "step-00000002", layout, (0,), world=2, timeout=60)
        assert_as_alone(got, alone, model, layout)


@pytest.mark.slow
def test_a_run_of_training(pool: Pool, saved: SavedRun) -> None:
    path = saved.folder / "runs/r"
    model = load_for_decoding(path, None, "cpu")[0]
    layout = RankLayout(tp=2, ep=2)
    got = pool.run(serve, path, layout, (0,), None, world=2, timeout=60)
    assert_as_alone(got, serve_alone(model, (0,)), model, layout)


def test_a_hugging_face_folder(pool: Pool, tmp_path: Path) -> None:
    model = model_of("experts")
    folder = write(model, tmp_path / "m", "hf", torch.float32, shard_bytes=100_000)
    layout = RankLayout(tp=2, ep=2)
    got = pool.run(serve, folder, layout, (1,), world=2, timeout=60)
    assert_as_alone(got, serve_alone(model, (1,)), model, layout)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("layout", [RankLayout(tp=2, ep=2), RankLayout(ep=2), RankLayout(tp=2, etp=2)], ids=str)
def test_two_gpus_choose_from_the_same_bits(pool: Pool, tmp_path: Path, layout: RankLayout) -> None:
    model = model_of("experts")
    save_run(tmp_path / "run", model)
    got = pool.run(serve, tmp_path / "run", layout, (0, 1, 3, 4, 6), "bytes", "cuda", world=2)
    assert got[0].logits.keys() == got[1].logits.keys() and got[0].books == got[1].books
    for row, logits_V in got[0].logits.items():
        assert_close(logits_V, full_logits(model, row)[-1], 1e-3)
        if layout.tp == 2:
            assert torch.equal(logits_V, got[1].logits[row])


def draw_apart(path: Path) -> list[tuple[int, ...]]:
    """Serve where rank 1 draws other tokens than rank 0, as sums in another order may let it."""
    draw = sampler.draw_tokens

    def drawn(*arguments: object) -> Tensor:
        return (draw(*arguments) + 7 * dist.get_rank()) % VOCAB

    with mock.patch.object(sampler, "draw_tokens", drawn):
        return sorted(serve(path, RankLayout(tp=2), (6,)).logits)


def test_all_ranks_take_the_token_that_rank_0_drew(pool: Pool, tmp_path: Path) -> None:
    model = model_of("dense")
    save_run(tmp_path / "run", model)
    rows = pool.run(draw_apart, tmp_path / "run", world=2, timeout=60)
    assert rows[0] == rows[1] == sorted(serve_alone(model, (6,)).logits)


def plan_apart(path: Path) -> tuple[int, int, int]:
    """Plan memory where rank 1 has less free than rank 0; returns pages, slots, and steps that were seen."""
    with open_model(path, RankLayout(tp=2), device="cpu", verify=False) as opened:
        model = opened.load()
        free = (3 if opened.ranks.rank else 40) << 20
        plans: list[tuple[int, int]] = []
        made = Engine.__init__

        def noted(self: Engine, *arguments: object, **named: object) -> None:
            made(self, *arguments, **named)
            plans.append((self.plan.pages, self.plan.running))

        with (
            mock.patch("mmtrain.infer.memory.free_bytes", lambda device: free),
            mock.patch.object(Engine, "__init__", noted),
        ):
            opened.run(EngineOptions(max_running=4), lambda engine: engine.generate([request(ids(5), 2)]), model)
    return (*plans[0], len(plans))


def test_memory_is_planned_from_the_rank_that_has_least(pool: Pool, tmp_path: Path) -> None:
    save_run(tmp_path / "run", model_of("dense"))
    plans = pool.run(plan_apart, tmp_path / "run", world=2, timeout=60)
    assert plans[0] == plans[1]
    assert plans[0][0] < 3 * (1 << 20) // (2 * 64 * 16 * 4)  # keys and values of a page: 1 head of 16, 64 tokens, fp32


def fail_apart(path: Path) -> str:
    """Serve where a step does not fit into the memory of rank 1; returns what this rank met."""
    try:
        with open_model(path, RankLayout(tp=2), device="cpu", verify=False) as opened:
            model, passes = opened.load(), model_passes(opened.ranks.rank)
            with mock.patch.object(HybridLM, "final_states", passes):
                opened.run(SMALL, two_tries, model)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def model_passes(rank: int) -> object:
    """The model's passes, of which the second fails on rank 1."""
    real, count = HybridLM.final_states, [0]

    def passes(self: HybridLM, *arguments: object) -> Tensor:
        count[0] += 1
        if rank == 1 and count[0] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *arguments)

    return passes


def two_tries(engine: LeadingEngine) -> None:
    """Go on after a failure, as a server might."""
    engine.submit(request(ids(5), 9))
    try:
        while engine.unfinished:
            engine.step()
    except RuntimeError:
        engine.step()


def test_a_rank_without_memory_ends_and_the_others_do_not_go_on(pool: Pool, tmp_path: Path) -> None:
    save_run(tmp_path / "run", model_of("dense"))
    first, second = pool.run(fail_apart, tmp_path / "run", world=2, timeout=60)
    assert second.startswith(OutOfDeviceMemory.__name__) and "rank 1: a step of 1 tokens does not fit" in second
    assert "an earlier step broke off on this rank alone" in first


def generate(run: Path, *options: str) -> tuple[int, str, str]:
    """Run launch/generate.py on two ranks."""
    arguments = [str(run), "--greedy", "--device", "cpu", *options]
    done = run_script("launch/generate.py", arguments, environment(), 2, timeout=120)
    told = [line for line in done.stderr.splitlines() if line.startswith(("error", str(run)))]
    return done.returncode, done.stdout, "\n".join(told)


def test_the_command_writes_on_one_rank(tmp_path: Path) -> None:
    save_run(tmp_path / "run", chain_model(certainty=3.0))
    code, out, told = generate(tmp_path / "run", "--tp", "2", "--ep", "2", "--prompt", "n")
    assert (code, out) == (0, f"{TEXT}\n") and "on 2 ranks (cpu): 1 token of prompt" in told and told.count("\n") == 0
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "n"}\n{"prompt": "né", "max_tokens": 3}\n', encoding="utf-8")
    code, out, told = generate(tmp_path / "run", "--tp", "2", "--prompts", str(tmp_path / "prompts.jsonl"))
    assert code == 0 and [json.loads(line)["text"] for line in out.splitlines()] == [TEXT[1:], "€"]
    code, out, told = generate(tmp_path / "run", "--prompt", "n")
    assert (code, out) == (2, "") and "error: --tp=1: 2 processes were started" in told


@pytest.mark.parametrize(
    ("script", "options", "said"),
    [
        ("eval", "--tasks nedle --lengths 512", "error: --tasks=nedle: is no task; did you mean 'needle'?"),
        ("serve", "--port 70000", "error: --port=70000: must lie in 0 to 65535; 0 takes a free one"),
    ],
)
def test_a_mistake_is_told_once_by_all_ranks(tmp_path: Path, script: str, options: str, said: str) -> None:
    if script == "serve":
        pytest.importorskip("uvicorn")
        pytest.importorskip("starlette")
    arguments = [str(tmp_path), *options.split(), "--tp", "2", "--device", "cpu"]
    done = run_script(f"launch/{script}.py", arguments, environment(), 2, timeout=120)
    told = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert (done.returncode, done.stdout, told) == (2, "", [said])
