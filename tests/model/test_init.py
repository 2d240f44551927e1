"""Initial weights: Xavier bounds with DeepNorm gains, uniform, independent, and the same however they are filled."""

from __future__ import annotations

import hashlib
import math
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mmtrain.build import build_model, meta_model
from mmtrain.config.cli import compose
from mmtrain.model import elements, init
from mmtrain.model.init import initialise
from tests.model.small import small_config

D, INNER, KV, F, SHARED, VOCAB, EXPERTS = 48, 64, 32, 40, 24, 160, 4
WHOLE = dict(num_layers=3, layer_pattern="LSL", shared_ffn_hidden_size=SHARED)
# leaf: (fan in, fan out, whether DeepNorm's beta scales it)
XAVIER = {
    "embed_tokens": (D, VOCAB, False),
    "lm_head": (D, VOCAB, False),
    "output_gate": (D, INNER, False),
    "out_proj": (INNER, D, True),
    "q_proj": (D, INNER, False),
    "k_proj": (D, KV, False),
    "v_proj": (D, KV, True),
    "o_proj": (INNER, D, True),
    "router": (D, EXPERTS, False),
    "experts.w13_E2FD": (D, F, True),
    "experts.w2_EDF": (F, D, True),
    "mlp.w13_2FD": (D, SHARED, True),
    "mlp.w2_DF": (SHARED, D, True),
    "coefficient": (D, 1, False),
}


def matrices(model: nn.Module) -> dict[str, tuple[Tensor, float]]:
    """Each matrix that is drawn as one, and its expected bound; qkv_proj counts as three."""
    beta, found = (8 * 3) ** -0.25, {}
    for name, parameter in model.named_parameters():
        short = name.removesuffix(".weight")
        if short.endswith("qkv_proj"):
            bound = math.sqrt(6 / (D + INNER))
            for part, rows in zip("qkv", parameter.detach().view(4, 3, 16, D).unbind(1), strict=True):
                found[f"{short}.{part}"] = rows, bound * (beta if part == "v" else 1)
        elif "norm" not in short:
            (fan_in, fan_out, scaled), = [row for leaf, row in XAVIER.items() if short.endswith(f".{leaf}")
                                          or short == leaf]  # fmt: skip
            found[short] = parameter.detach(), math.sqrt(6 / (fan_in + fan_out)) * (beta if scaled else 1)
    return found


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation over its standard deviation for independent numbers: beyond 5 is no accident."""
    a, b = a.flatten().double() - a.double().mean(), b.flatten().double() - b.double().mean()
    return (a @ b / (a.norm() * b.norm())).item() * math.sqrt(a.numel())


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_model(small_config(**WHOLE))


def test_every_matrix_is_uniform_within_its_xavier_bound(model: nn.Module) -> None:
    found = matrices(model)
    assert len(found) == 2 + 2 * 5 + 4 + 3 * 6
    for name, (weight, bound) in found.items():
        unit, count = weight.double().flatten() / bound, weight.numel()
        assert unit.abs().max() <= 1 + 1e-6, name
        assert unit.abs().max() > 1 - 20 / count, name
        assert abs(unit.mean()) < 5 * math.sqrt(1 / 3 / count), name
        assert abs(unit.square().mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / count), name


def test_values_fill_their_interval_evenly(model: nn.Module) -> None:
    weight, bound = matrices(model)["layers.0.ffn.experts.w13_E2FD"]
    bins = torch.histc(weight / bound, bins=16, min=-1, max=1)
    expected = weight.numel() / 16
    chi_square = ((bins - expected) ** 2 / expected).sum().item()
    assert chi_square < 45  # 15 degrees of freedom: 1e-4


# Of all parameters of commit 1970967, in order, with their names: what a seed gives must never change.
FINGERPRINTS = {
    "31f226918bc43950": WHOLE,
    "879eb954f745a0a5": dict(num_layers=2, layer_pattern="LS", num_experts=0),
    "c9d5f299967a52ba": dict(num_layers=2, layer_pattern="SL", post_norm=False),
    "bc2dc3329fae90b0": dict(num_layers=2, layer_pattern="LS", deepnorm_beta=0.3, num_heads=3, num_kv_heads=1,
                             capacity_factor=0.7),
}  # fmt: skip


@pytest.mark.parametrize("digest", FINGERPRINTS)
def test_a_seed_gives_the_weights_that_it_always_gave(digest: str) -> None:
    found = hashlib.blake2b(digest_size=8)
    for name, parameter in build_model(small_config(**FINGERPRINTS[digest])).named_parameters():
        found.update(name.encode())
        found.update(parameter.detach().numpy().tobytes())
    assert found.hexdigest() == digest


def test_a_parameter_of_which_nothing_is_said_is_refused() -> None:
    model = build_model(small_config(num_layers=1))
    model.layers[0].ffn.experts.extra = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(TypeError, match=r"layers\.0\.ffn\.experts\.extra: Experts\.initial"):
        initialise(model, 1)


def test_norms_begin_at_one(model: nn.Module) -> None:
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert len(norms) == 1 + 3 * 2 + 2 and all((p == 1).all() for p in norms)


def test_dense_feed_forward_is_scaled_too() -> None:
    dense = build_model(small_config(num_layers=1, num_experts=0))
    bound = 8**-0.25 * math.sqrt(6 / (D + F))
    for weight in (dense.layers[0].ffn.w13_2FD, dense.layers[0].ffn.w2_DF):
        assert 0.99 * bound < weight.abs().max() <= bound * (1 + 1e-6)


def test_pre_norm_models_have_gain_one() -> None:
    plain = build_model(small_config(num_layers=1, layer_pattern="S", post_norm=False))
    assert 0.99 < plain.layers[0].mixer.o_proj.weight.abs().max() / math.sqrt(6 / (INNER + D)) <= 1 + 1e-6


def test_parameters_are_independent_of_one_another(model: nn.Module) -> None:
    weights = {name: weight for name, (weight, _) in matrices(model).items() if weight.numel() >= 192}
    for (name_a, a), (name_b, b) in combinations(weights.items(), 2):
        count = min(a.numel(), b.numel())
        assert abs(correlation(a.flatten()[:count], b.flatten()[:count])) < 5, (name_a, name_b)


@pytest.mark.parametrize("lag", [1, 2, D, 16 * D, F * D])
def test_elements_are_independent_of_one_another(model: nn.Module, lag: int) -> None:
    for name, (weight, _) in matrices(model).items():
        flat = weight.flatten()
        if flat.numel() >= lag + 100:
            assert abs(correlation(flat[:-lag], flat[lag:])) < 5, name
            assert (flat[:-lag] == flat[lag:]).float().mean() < 0.01, name


def test_experts_differ(model: nn.Module) -> None:
    for weight in (model.layers[0].ffn.experts.w13_E2FD, model.layers[0].ffn.experts.w2_EDF):
        for a, b in combinations(weight.detach().unbind(), 2):
            assert abs(correlation(a, b)) < 5


def test_seeds_give_other_weights_and_one_seed_the_same(model: nn.Module) -> None:
    again, other = (matrices(build_model(small_config(**WHOLE), seed=seed)) for seed in (1234, 1235))
    for name, (weight, _) in matrices(model).items():
        assert torch.equal(weight, again[name][0])
        assert abs(correlation(weight, other[name][0])) < 5
        assert (weight == other[name][0]).float().mean() < 0.01


@pytest.mark.parametrize("chunk", [1, 7, 50, 5000])
def test_values_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    config = small_config(num_layers=2, layer_pattern="LS", vocab_size=20, ffn_hidden_size=8, hidden_size=8,
                          num_heads=2, num_kv_heads=1, head_dim=4, rotary_dim=4, num_experts=3)  # fmt: skip
    expected = dict(build_model(config).named_parameters())
    monkeypatch.setattr(elements, "CHUNK", chunk)
    for name, parameter in build_model(config).named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_scratch_is_bounded_by_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, mix = [], init._uniform

    def watched(index: Tensor, key: int) -> Tensor:
        sizes.append(index.numel())
        return mix(index, key)

    monkeypatch.setattr(elements, "CHUNK", 1000)
    monkeypatch.setattr(init, "_uniform", watched)
    model = build_model(small_config(**WHOLE))
    assert max(sizes) <= 1000
    assert sum(sizes) == sum(p.numel() for name, p in model.named_parameters() if "norm" not in name)


def test_every_element_is_written() -> None:
    model = meta_model(small_config(**WHOLE)).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
    initialise(model, 1)
    assert all(torch.isfinite(tensor).all() for tensor in (*model.parameters(), *model.buffers()))


def test_released_model_on_the_meta_device_has_exactly_the_published_parameters() -> None:
    configs = Path(__file__).parents[2] / "configs"
    model = meta_model(compose(["model=minimax_text_01", "run.name=a", "data.path=b"], configs).model)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == 456_089_655_296
