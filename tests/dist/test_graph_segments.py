"""A model cut at its softmax attention, and the weights that a run of one process computes with, on a CPU.

That recorded graphs are these segments to the bit is tested on GPUs (`tests/gpu/test_graphs_gpu.py`).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmtrain.build import build_model, meta_model
from mmtrain.config import ClusterConfig, ModelConfig, OptimConfig, ParallelConfig
from mmtrain.model.model import LossOutput, ModelInputs
from mmtrain.model.packed_seq import Packing
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel import mesh
from mmtrain.parallel.graphs.recorded_model import RecordedModel, _load, _memory_like, _room
from mmtrain.parallel.graphs.segments import SegmentInputs, cut, run_segments
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.train.step import train_step
from tests.dist.pool import Pool
from tests.dist.test_memory import batch

DENSE = ModelConfig("small", vocab_size=128, hidden_size=64, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=16,
                    ffn_hidden_size=96, layer_pattern="LSLLS", rotary_dim=8, num_experts=0)  # fmt: skip
MODELS = {
    "dense": DENSE,
    "experts": replace(DENSE, num_experts=4, capacity_factor=1.1),
    "softmax only, pre-norm": replace(DENSE, layer_pattern="S", post_norm=False),
    "lightning only": replace(DENSE, layer_pattern="L"),
}


def micro_batch(lengths: list[int]) -> ModelInputs:
    tokens = torch.randint(0, 128, (sum(lengths),), generator=torch.Generator().manual_seed(len(lengths)))
    return ModelInputs(tokens, Packing.from_lengths(lengths), tokens.roll(-1), 1e4)


def gradients(model: torch.nn.Module, out: LossOutput) -> dict[str, Tensor]:
    model.zero_grad()
    (out.ce_sum / 64 + out.aux_loss).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_segments_are_the_model_to_the_bit(name: str) -> None:
    model = build_model(MODELS[name])
    given, other = micro_batch([30, 1, 33]), micro_batch([64])
    segments = cut(model)
    assert len(segments) == 1 + sum(letter == "S" for letter in MODELS[name].layer_types)
    memory = _memory_like(SegmentInputs.of(other, model))  # as graphs read it, with room for more documents
    _load(memory, SegmentInputs.of(other, model))
    _load(memory, SegmentInputs.of(given, model))
    out = run_segments(model, segments, segments, given, memory)
    whole = model(*given)
    assert torch.equal(out.ce_sum, whole.ce_sum) and torch.equal(out.aux_loss, whole.aux_loss)
    assert [stats.assigned_E.tolist() for stats in out.router] == [stats.assigned_E.tolist() for stats in whole.router]
    found = gradients(model, out)
    for parameter, gradient in gradients(model, whole).items():
        assert torch.equal(found[parameter], gradient), parameter


def saved_elements(model: torch.nn.Module, given: ModelInputs) -> int:
    """Elements that wait for the backward pass of segments, each storage counted once, but for weights."""
    weights, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(x: Tensor) -> Tensor:
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    segments = cut(model)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run_segments(model, segments, segments, given, SegmentInputs.of(given, model))
    return sum(size for place, size in found.items() if place not in weights)


@pytest.mark.parametrize("name", ["dense", "experts"])
def test_recomputation_inside_of_segments(name: str) -> None:
    """The same bits, and of softmax layers' feed-forwards nothing is kept: 3 widths of 96 a token and more."""
    model, given = build_model(replace(MODELS[name], layer_pattern="S")), micro_batch([30, 1, 33])
    segments, inputs = cut(model), SegmentInputs.of(given, model)
    plain = gradients(model, run_segments(model, segments, segments, given, inputs))
    kept = saved_elements(model, given)
    for block in model.layers:
        block.recompute = True
    found = gradients(model, run_segments(model, segments, segments, given, inputs))
    assert all(torch.equal(found[parameter], gradient) for parameter, gradient in plain.items())
    assert saved_elements(model, given) <= kept - 5 * 64 * 3 * 96


def test_longer_micro_batches_than_auto_records_run_plain() -> None:
    told = RecordedModel(build_model(DENSE), most_tokens=63)
    assert "records up to 63 tokens" in told._problem(micro_batch([64])) and not told._problem(micro_batch([63]))
    assert not RecordedModel(build_model(DENSE))._problem(micro_batch([64]))


def test_experts_in_float32_run_plain() -> None:
    """Their products ask the device how many rows each has, which a graph cannot."""
    experts, given = build_model(MODELS["experts"]), micro_batch([64])
    assert "not in bfloat16" in RecordedModel(experts, dtype=torch.float32)._problem(given)
    assert not RecordedModel(experts)._problem(given)
    assert not RecordedModel(build_model(DENSE), dtype=torch.float32)._problem(given)


def test_documents_that_a_row_has_not_got_are_empty() -> None:
    memory = _memory_like(SegmentInputs.of(micro_batch([64]), build_model(DENSE)))
    for lengths in ([2] * 32, [64], [10, 54]):
        _load(memory, SegmentInputs.of(micro_batch(lengths), build_model(DENSE)))
        found = memory.packing.cu_seqlens.diff().tolist()
        assert found == lengths + [0] * (_room(64) - len(lengths))


def alone(dtype: torch.dtype, steps: int) -> tuple[list[float], dict[str, Tensor], list[Tensor]]:
    """Losses of steps of two micro-batches, weights, and the types of what modules compute with."""
    context = mesh.start(ClusterConfig(device="cpu"))
    model = replace(DENSE, vocab_size=512, num_experts=4)
    laid = apply_parallel(meta_model(model), context, ParallelConfig(), dtype)
    laid.initialise(3)
    optimizer = build_optimizer(laid.module, OptimConfig())
    seen: list[torch.dtype] = []
    hook = laid.module.layers[0].register_forward_pre_hook(
        lambda block, _: seen.extend([block.mixer.qkv_proj.weight.dtype, block.ffn.router.weight.dtype])
    )
    losses = [train_step(laid, optimizer, [batch(0), batch(1)], 1e-2, 1e4, clip_grad=1.0).loss for _ in range(steps)]
    before = {name: p.to_local().clone() for name, p in laid.module.named_parameters()}
    losses.append(float(laid.evaluate(micro_batch([64]))))
    assert all(p.grad is None for p in laid.module.parameters())
    hook.remove()
    mesh.stop()
    return losses, before, seen


def reference(steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """The same by torch alone, in fp32."""
    model = build_model(replace(DENSE, vocab_size=512, num_experts=4), seed=3)
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1}, {"params": plain}]
    config = OptimConfig()
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        labelled, total = 0, 0.0
        for row in (batch(0), batch(1)):
            labelled += int(row.loss_mask_BS.sum())
        for row in (batch(0), batch(1)):
            packing = Packing(row.cu_seqlens, row.position_ids_BS.flatten(), row.max_seqlen)
            out = model(row.tokens_BS.flatten(), packing, row.labels_BS.flatten(), 1e4)
            (out.ce_sum / labelled + out.aux_loss / 2).backward()
            total += float(out.ce_sum.detach()) / labelled
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(total)
    model.eval()
    losses.append(float(model(*micro_batch([64])).ce_sum.detach()))
    return losses, dict(model.named_parameters())


def test_one_process_trains_as_torch_alone_does(pool: Pool) -> None:
    """Sums over micro-batches, clipping, decay and updates, and a validation on the newest weights."""
    ((losses, weights, seen),) = pool.run(alone, torch.float32, 3, world=1)
    expected, exact = reference(3)
    assert losses[:3] == pytest.approx(expected[:3], rel=1e-5)
    for name, weight in weights.items():
        assert (weight - exact[name]).norm() <= 2e-5 * exact[name].norm(), name
    assert set(seen) == {torch.float32}


def test_one_process_computes_in_bf16_with_routers_in_fp32(pool: Pool) -> None:
    ((losses, _, seen),) = pool.run(alone, torch.bfloat16, 3, world=1)
    assert seen[:2] == [torch.bfloat16, torch.float32]
    assert losses[:3] == pytest.approx(reference(3)[0][:3], rel=1e-2)
