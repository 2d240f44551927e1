"""What the context bench expects of a step: operations as real steps run them, and sums as by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmtrain.bench.context_expected import Rates, expected_seconds, product_operations
from mmtrain.bench.context_rows import heaviest
from mmtrain.config import ModelConfig, ParallelConfig
from mmtrain.model.mixers.registry import LIGHTNING, SOFTMAX
from mmtrain.model.packed_seq import Packing
from tests.model.small import draw_tokens, small_config, small_model

LENGTHS = (17, 28)
MODELS = {
    "dense": {"num_experts": 0, "layer_pattern": "LS", "num_layers": 2},
    "experts": {"layer_pattern": "LS", "num_layers": 2, "capacity_factor": 0.5},
    "shared expert": {"layer_pattern": "LS", "num_layers": 2, "shared_ffn_hidden_size": 24},
}
ATEN = torch.ops.aten


class Products(TorchDispatchMode):
    """Counts operations of products of two matrices, and of rows with experts'; those of attention are batched."""

    count = 0

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        packet, kwargs = func.overloadpacket, kwargs or {}
        if packet in (ATEN.mm, ATEN.addmm, ATEN.addmm_):
            (m, k), (_, n) = (x.shape for x in args[-2:])
            self.count += 2 * m * k * n
        elif packet is ATEN._grouped_mm:
            left, right, ends = args[0], args[1], args[2] if len(args) > 2 else kwargs["offs"]
            widths = (left.shape[0], right.shape[1]) if right.ndim == 2 else right.shape[1:]
            self.count += 2 * int(ends[-1]) * math.prod(widths)
        return func(*args, **kwargs)


def laid_out(parallel: ParallelConfig, sums: bool, changes: dict) -> nn.Module:
    """A model as `apply_parallel` leaves it on one process, with sums of the weights of its projections or without."""
    model = small_model(**changes)
    for block in model.layers:
        block.recompute = parallel.recomputes
        if parallel.ffn_chunk_tokens is not None:
            block.chunk_feed_forward(parallel.ffn_chunk_tokens)
        if block.spec is LIGHTNING:
            block.mixer.head_groups = parallel.lightning_head_groups
        if parallel.activation_checkpoint == "selective" and block.spec is SOFTMAX:
            block.keep_attention()
    for name, weight in model.named_parameters():
        if sums and weight.ndim > 1 and not any(part in name for part in ("experts", "router", "embed", "coefficient")):
            weight.gradient_sum = torch.zeros_like(weight)
    return model


def counted(parallel: ParallelConfig, sums: bool, changes: dict) -> tuple[int, float]:
    """Operations of a step's products, and assignments that were kept."""
    model, ids = laid_out(parallel, sums, changes), draw_tokens(sum(LENGTHS) + 1)
    with Products() as products:
        out = model(ids[:-1], Packing.from_lengths(list(LENGTHS)), ids[1:])
        (out.ce_sum + out.aux_loss).backward()
    kept = sum(float(1 - stats.drop_rate) for stats in out.router)
    return products.count, kept * sum(LENGTHS) * model.config.top_k


@pytest.mark.parametrize("sums", [False, True], ids=["gradients", "sums"])
@pytest.mark.parametrize("policy", ["none", "selective", "block"])
@pytest.mark.parametrize("model", MODELS)
def test_operations_are_those_of_real_steps(model: str, policy: str, sums: bool) -> None:
    config = small_config(**MODELS[model])
    for chunk, groups in product((None, 16), (1, 2)):
        parallel = ParallelConfig(activation_checkpoint=policy, ffn_chunk_tokens=chunk, lightning_head_groups=groups)
        found, kept = counted(parallel, sums, MODELS[model])
        assert kept < 2 * 2 * sum(LENGTHS) or model != "experts"  # some were dropped
        expected = product_operations(config, parallel, LENGTHS, sums, kept)
        assert sum(expected.values()) == pytest.approx(found, rel=1e-6), (chunk, groups)  # the drop rate is in fp32


RATES = Rates(products=2e9, experts=1e9, softmax=(4e8, 5e8), lightning=(3e-6, 7e-6), copy=8e9)
DENSE = ModelConfig("dense", vocab_size=100, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
                    ffn_hidden_size=64, rotary_dim=4, layer_pattern="LLS", num_experts=0)  # fmt: skip
DOCUMENTS = (100, 28)
PAIRS = 100 * 101 // 2 + 28 * 29 // 2
# Elements of matrices. A lightning layer: q, k, v, gate and output of 32 x 32 each; a softmax layer: q and output of
# 32 x 32, k and v of 32 x 16; a feed-forward: three of 32 x 64.
QKV_GATE, OUTPUT, SOFTMAX_MATRICES, FIRST, LAST, HEAD = 4 * 1024, 1024, 2 * 1024 + 2 * 512, 2 * 2048, 2048, 3200
SOFTMAX_FORWARD = 4 * PAIRS * 32  # scores and sums


def test_a_dense_step_by_hand() -> None:
    # All twice forward and twice backward, but the last product of a feed-forward, once forward; the head three times.
    elements = 2 * 4 * (QKV_GATE + OUTPUT) + 4 * SOFTMAX_MATRICES + 3 * (4 * FIRST + 3 * LAST) + 3 * HEAD
    parameters = 2 * 3200 + 2 * (5 * 1024 + 32) + 3072 + 3 * 6144 + 7 * 32  # norms: one of each lightning layer's heads
    ranks = 2
    # Width 32 of the model and of the heads, 64 between: norms 6 and 8, SwiGLU 3 and 5, gradients of what two read 6
    # and 2; of the two lightning layers norm and gate 3 and 5, a third reader 3. Then the last addition, norm and loss.
    forward, backward = 3 * (6 * 32 + 3 * 64) + 2 * 3 * 32, 3 * (16 * 32 + 5 * 64) + 2 * 8 * 32
    streamed = 2 * forward + backward + 3 * 3 * 32 + 5 * 32 + 3 * 100
    expected = {
        "products": 2 * 128 * elements / 2e9 / ranks,
        "experts": 0.0,
        "softmax": (2 * SOFTMAX_FORWARD / 4e8 + 2.5 * SOFTMAX_FORWARD / 5e8) / ranks,
        "lightning": 2 * 128 * (2 * 3e-6 + 7e-6) / ranks,
        "streams": 2 * 128 * streamed / 8e9 / ranks,
        "optimizer": 28 * parameters / 8e9 / ranks,
    }
    found = expected_seconds(DENSE, ParallelConfig(activation_checkpoint="block"), DOCUMENTS, RATES, ranks)
    assert found == pytest.approx(expected)


def test_groups_of_heads_chunks_and_kept_attention_by_hand() -> None:
    parallel = ParallelConfig(activation_checkpoint="selective", lightning_head_groups=2, ffn_chunk_tokens=32)
    found = expected_seconds(DENSE, parallel, DOCUMENTS, RATES, 1)
    elements = 2 * (5 * QKV_GATE + 4 * OUTPUT) + 4 * SOFTMAX_MATRICES + 3 * (4 * FIRST + 3 * LAST) + 3 * HEAD
    assert found["products"] == pytest.approx(2 * 128 * elements / 2e9)
    assert found["softmax"] == pytest.approx(SOFTMAX_FORWARD / 4e8 + 2.5 * SOFTMAX_FORWARD / 5e8)  # once forward
    assert found["lightning"] == pytest.approx(2 * 128 * (3 * 3e-6 + 7e-6))  # three times forward
    plain = expected_seconds(DENSE, ParallelConfig(activation_checkpoint="none"), DOCUMENTS, RATES, 1)
    elements = 3 * (2 * (QKV_GATE + OUTPUT) + SOFTMAX_MATRICES + 3 * (FIRST + LAST) + HEAD)
    assert plain["products"] == pytest.approx(2 * 128 * elements / 2e9)


def test_a_step_of_experts_by_hand() -> None:
    experts = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 64, "capacity_factor": 1.0}
    model = ModelConfig("experts", vocab_size=100, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2,
                        head_dim=8, rotary_dim=4, layer_pattern="L", **experts)  # fmt: skip
    kept = 450.0  # of 2 layers x 128 tokens x 2
    found = expected_seconds(model, ParallelConfig(activation_checkpoint="block"), (128,), RATES, 1, False, kept)
    elements = 2 * 4 * (QKV_GATE + OUTPUT + 4 * 32) + 3 * HEAD  # the router is 4 x 32
    parameters = 2 * 3200 + 2 * (5 * 1024 + 32 + 4 * 32 + 4 * 6144) + 5 * 32
    # Of each token, and of each row that an expert has: SwiGLU, and to and from it.
    streamed = 2 * 128 * (2 * (6 * 32 + 3 * 32 + 2 * 32) + 3 * 32 + 16 * 32 + 8 * 32 + 2 * 32) + 128 * (5 * 32 + 300)
    streamed += kept * (2 * (3 * 64 + 2 * 32) + 5 * 64 + 2 * 32)
    expected = {
        "products": 2 * 128 * elements / 2e9,
        "experts": 2 * kept * 4 * (FIRST + LAST) / 1e9,
        "softmax": 0.0,
        "lightning": 2 * 128 * (2 * 3e-6 + 7e-6),
        "streams": 2 * streamed / 8e9,
        "optimizer": 28 * parameters / 8e9,
    }
    assert found == pytest.approx(expected)
    chunks = ParallelConfig(activation_checkpoint="block", ffn_chunk_tokens=32)
    found = expected_seconds(model, chunks, (128,), RATES, 1, False, kept)
    assert found["experts"] == pytest.approx(2 * kept * (5 * FIRST + 4 * LAST) / 1e9)


def test_the_documents_that_rates_are_measured_on() -> None:
    assert heaviest((3, 9, 5), 17, 1e9) == (9, 5, 3)
    assert heaviest((3, 9, 5), 12, 1e9) == (9, 3)
    assert heaviest((3, 1000), 10**6, 5000.0) == (100,)  # 100 x 100 / 2 pairs
    assert heaviest((3, 1000), 10**6, 0.1) == (1,)
