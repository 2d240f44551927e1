"""Parameters and operations of the configurations, against the paper's figures and against counting by hand."""

from pathlib import Path

import pytest

from mmtrain.config import ModelConfig
from mmtrain.config.cli import compose
from mmtrain.model.flops import count_parameters, paper_table1, peak_flops, step_flops

CONFIGS = Path(__file__).parents[2] / "configs"


def named(model, *overrides):
    return compose([f"model={model}", "run.name=a", "data.path=b", *overrides], CONFIGS).model


def small(**changes):
    shape = dict(name="small", vocab_size=100, hidden_size=16, num_layers=8, num_heads=4, num_kv_heads=2, head_dim=8,
                 rotary_dim=4, ffn_hidden_size=24, num_experts=4, top_k=2)  # fmt: skip
    return ModelConfig(**(shape | changes))


def test_release_has_exactly_the_published_counts():
    count = count_parameters(named("minimax_text_01"))
    assert count.total == 456_089_655_296
    assert count.activated_without_embeddings == 45_944_920_064
    assert count.by_part["embedding"] == count.by_part["head"] == 1_229_193_216
    assert count.by_part["experts"] == 80 * 32 * 169_869_312
    assert count.by_part["lightning"] == 70 * 251_666_432
    assert count.by_part["softmax"] == 10 * 113_246_208
    assert sum(count.by_part.values()) == count.total


@pytest.mark.parametrize(
    ("model", "total", "activated", "tolerance"),
    [("moe_28b", 28e9, 5e9, 0.01), ("proxy_100m", None, 100e6, 0.05)],
)
def test_mixtures_have_the_size_of_their_name(model, total, activated, tolerance):
    count = count_parameters(named(model))
    assert total is None or count.total == pytest.approx(total, rel=tolerance)
    assert count.activated_without_embeddings == pytest.approx(activated, rel=tolerance)


@pytest.mark.parametrize(
    ("model", "size"), [("hybrid_7b", 7e9), ("hybrid_3b", 3e9), ("hybrid_1b", 1e9), ("hybrid_410m", 410e6)]
)
def test_dense_hybrids_have_the_size_of_their_name(model, size):
    shape = named(model)
    count = count_parameters(shape)
    assert count.activated_without_embeddings == pytest.approx(size, rel=0.05)
    assert count.activated == count.total
    assert shape.layer_types.count("S") * 8 == shape.num_layers


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_experts": 0}, {"shared_ffn_hidden_size": 12}, {"layer_pattern": "S"}, {"layer_pattern": "L"},
     {"num_experts": 0, "shared_ffn_hidden_size": 12}],
)  # fmt: skip
def test_counts_equal_the_model_on_the_meta_device(changes):
    import torch

    from mmtrain.model.model import HybridLM

    config = small(**changes)
    with torch.device("meta"):
        model = HybridLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(config).total


def test_operations_by_hand():
    flops = step_flops(small(), [3, 5])
    tokens, inner, hidden, pairs = 8, 32, 16, 6 + 15
    assert flops.by_part == {
        "lightning_projections": 7 * 2 * tokens * 5 * inner * hidden,
        "lightning_attention": 7 * tokens * 4 * (2 * 8 * 8 + 2 * 8 * 8),
        "softmax_projections": 2 * tokens * hidden * (32 + 32 + 16 + 16),
        "softmax_attention": pairs * 4 * (2 * 8 + 2 * 8),
        "router": 8 * 2 * tokens * hidden * 4,
        "experts": 8 * tokens * 2 * (3 * 2 * hidden * 24),
        "dense_ffn": 0,
        "shared_expert": 0,
        "head": 2 * tokens * hidden * 100,
    }
    assert flops.backward == 2 * flops.forward == 2 * sum(flops.by_part.values())
    assert flops.total == 3 * flops.forward


def test_documents_and_drops_are_counted_as_they_are():
    whole, cut = step_flops(small(), [8]), step_flops(small(), [4, 4])
    assert cut.by_part["softmax_attention"] / whole.by_part["softmax_attention"] == 20 / 36
    assert cut.by_part["lightning_attention"] == whole.by_part["lightning_attention"]
    half = step_flops(small(), [8], kept_assignments=8 * 8 * 2 / 2)
    assert half.by_part["experts"] * 2 == whole.by_part["experts"]


def test_dense_products_are_six_operations_a_parameter_and_token():
    config = small(num_experts=0)
    flops = step_flops(config, [1] * 1000)
    count = count_parameters(config)
    attention = flops.by_part["lightning_attention"] + flops.by_part["softmax_attention"]
    weights = count.total - count.by_part["embedding"] - count.by_part["norms"] - 7 * 32
    assert 3 * (flops.forward - attention) == 6 * 1000 * weights


def test_table_1_of_the_paper():
    # 12 l d^2 with heads * head_dim = d and a feed-forward of 8/3 d counts what our softmax-only model counts.
    layers, hidden, heads, seq = 24, 3072, 24, 8192
    config = ModelConfig("m", 1, hidden, layers, heads, heads, hidden // heads, 8 * hidden // 3, "S", num_experts=0)
    count = count_parameters(config)
    parameters, flops = paper_table1("softmax", layers, hidden, heads, 2, seq)
    assert count.activated_without_embeddings == pytest.approx(parameters, rel=1e-3)
    # The paper counts all n^2 pairs; we count the causal half of them.
    ours = step_flops(config, [seq] * 2)
    assert ours.total + 3 * ours.by_part["softmax_attention"] == pytest.approx(flops, rel=1e-3)
    assert paper_table1("lightning", 1, 10, 5, 1, 1)[0] == 12 * 100 + 2 * 100 / 5
    assert paper_table1("hybrid", 1, 10, 5, 1, 1)[0] == 12 * 100 + 7 * 100 / 20
    hybrid, lightning = (paper_table1(arch, 32, 4096, 32, 1, 2**20)[1] for arch in ("hybrid", "lightning"))
    assert lightning < hybrid < paper_table1("softmax", 32, 4096, 32, 1, 2**20)[1]
    with pytest.raises(ValueError, match="mamba"):
        paper_table1("mamba", 1, 1, 1, 1, 1)


def test_peaks():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H800", "torch.bfloat16") == 989e12
    assert peak_flops("NVIDIA H200", "bf16") == 989e12
    assert peak_flops("NVIDIA H20", "bf16") == 148e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp16") == 312e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "float32") == 19.5e12
    assert peak_flops("Some CPU", "bf16") is None
    assert peak_flops("NVIDIA H100 80GB HBM3", "int3") is None
