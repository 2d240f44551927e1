"""The whole model in all its variants: layout, gradients, recomputation, RoPE base, bf16 and refused shapes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.config import ModelConfig
from mmtrain.errors import ConfigError
from mmtrain.model.block import Block
from mmtrain.model.loss import IGNORE
from mmtrain.model.model import HybridLM, LossOutput
from mmtrain.model.packed_seq import Packing
from mmtrain.model.rope import rope_table
from tests.model.small import draw, draw_tokens, gradients, relative, small_config, small_model

VARIANTS = {
    "released": dict(num_layers=8, rotary_dim=8, capacity_factor=1.25),
    "softmax_only": dict(num_layers=2, layer_pattern="S", rotary_dim=8),
    "no_rope": dict(num_layers=2, layer_pattern="S", rotary_dim=0),
    "lightning_only": dict(num_layers=2, layer_pattern="L"),
    "cut_pattern": dict(num_layers=4, layer_pattern="SLL"),
    "dense": dict(num_layers=4, layer_pattern="LLLS", num_experts=0),
    "pre_norm": dict(num_layers=4, layer_pattern="LLLS", post_norm=False),
    "shared_expert": dict(num_layers=2, layer_pattern="LS", shared_ffn_hidden_size=24),
    "top_1": dict(num_layers=2, layer_pattern="LS", top_k=1),
    "top_3": dict(num_layers=2, layer_pattern="LS", top_k=3),
    "all_experts": dict(num_layers=2, layer_pattern="LS", top_k=4),
    "six_heads": dict(num_layers=2, layer_pattern="LS", num_heads=6, num_kv_heads=3, head_dim=8, rotary_dim=4),
    "one_head": dict(num_layers=2, layer_pattern="LS", num_heads=1, num_kv_heads=1),
    "drops_by_position": dict(num_layers=2, layer_pattern="LS", capacity_factor=0.7, drop_policy="position"),
    "drops_by_weight": dict(num_layers=2, layer_pattern="LS", capacity_factor=0.7),
}
LENGTHS = [60, 1, 29]


def batch() -> tuple[Tensor, Packing, Tensor]:
    tokens = draw_tokens(sum(LENGTHS))
    labels = tokens.roll(-1)
    labels[torch.tensor(LENGTHS).cumsum(0) - 1] = IGNORE
    return tokens, Packing.from_lengths(LENGTHS), labels


def train_step(model: HybridLM) -> tuple[LossOutput, dict[str, Tensor]]:
    out = model(*batch())
    (out.ce_sum / 87 + out.aux_loss).backward()
    return out, gradients(model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_has_a_finite_gradient(variant: str) -> None:
    model = small_model(**VARIANTS[variant])
    config = model.config
    out, grads = train_step(model)
    assert "".join(layer.spec.letter for layer in model.layers) == config.layer_types
    assert len(out.router) == (config.num_layers if config.num_experts else 0)
    assert torch.equal(out.aux_loss, sum((stats.aux_loss for stats in out.router), start=torch.zeros(())))
    assert (out.aux_loss > 0) == (config.num_experts > 0)
    assert set(grads) == {name for name, _ in model.named_parameters()}
    for name, grad in grads.items():
        assert torch.isfinite(grad).all() and grad.abs().max() > 0, name
    if not any(stats.drop_rate > 0 for stats in out.router):
        logits = model(*batch()[:2])
        expected = F.cross_entropy(logits, batch()[2], ignore_index=IGNORE, reduction="sum")
        torch.testing.assert_close(out.ce_sum, expected, rtol=1e-6, atol=0)
    assert any(stats.drop_rate > 0 for stats in out.router) == (config.capacity_factor is not None)


def test_router_of_one_choice_learns_from_the_auxiliary_loss_alone() -> None:
    model = small_model(**VARIANTS["top_1"])
    out = model(*batch())
    routers = [layer.ffn.router.weight for layer in model.layers]
    assert all(torch.count_nonzero(g) == 0 for g in torch.autograd.grad(out.ce_sum, routers, retain_graph=True))
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(out.aux_loss, routers))


@pytest.mark.parametrize("pattern", ["L", "S"])
def test_residuals_of_post_norm_and_pre_norm(pattern: str) -> None:
    for post_norm, alpha in [(True, 4**0.25), (False, 1.0)]:
        block = small_model(num_layers=2, layer_pattern=pattern, num_experts=0, post_norm=post_norm).layers[0]
        packing, h = Packing.from_lengths([20]), draw(20, 48, dtype=torch.float32)
        rope = rope_table(packing.position_ids_T, 16, 1e4)

        def mixed(x: Tensor, block: Block = block, rope: tuple = rope, packing: Packing = packing) -> Tensor:
            return block.mixer(x, packing, rope)

        x = block.input_norm(h)
        middle = alpha * (x if post_norm else h) + mixed(x)
        y = block.post_attention_norm(middle)
        expected = alpha * (y if post_norm else middle) + block.ffn(y)
        assert block.alpha == pytest.approx(alpha, rel=1e-12)
        assert relative(block(h, packing, rope)[0], expected) < 1e-6


def test_deepnorm_factors_of_the_released_model() -> None:
    config = small_config(num_layers=80)
    assert config.alpha == pytest.approx(3.5565588200778455, rel=1e-15)
    assert config.beta == pytest.approx(0.19881768219176266, rel=1e-15)
    given = small_config(deepnorm_alpha=2.0, deepnorm_beta=0.5)
    assert (given.alpha, given.beta) == (2.0, 0.5)


@pytest.mark.parametrize("variant", ["released", "shared_expert", "pre_norm", "drops_by_weight", "dense"])
def test_recomputation_changes_no_bit(variant: str) -> None:
    plain, again = small_model(**VARIANTS[variant]), small_model(**VARIANTS[variant])
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    for layer in again.layers:
        layer.recompute = True
        layer.input_norm.register_forward_hook(count)
    (expected, grads), (out, recomputed) = train_step(plain), train_step(again)
    assert runs == 2 * len(again.layers)
    assert torch.equal(out.ce_sum, expected.ce_sum) and torch.equal(out.aux_loss, expected.aux_loss)
    assert grads.keys() == recomputed.keys()
    for name, grad in grads.items():
        assert torch.equal(recomputed[name], grad), name


def test_rope_base_changes_softmax_models_alone() -> None:
    tokens, packing, _ = batch()
    with torch.no_grad():
        for variant, changes in [("softmax_only", True), ("lightning_only", False), ("no_rope", False)]:
            model = small_model(**VARIANTS[variant])
            before = model(tokens, packing)
            assert (relative(model(tokens, packing, rope_base=5e6), before) > 1e-3) == changes, variant


@pytest.mark.parametrize("variant", ["released", "dense", "shared_expert", "softmax_only", "lightning_only"])
def test_bf16_is_close_to_fp32(variant: str) -> None:
    model = small_model(**(VARIANTS[variant] | {"capacity_factor": None}))
    out, grads = train_step(model)
    for parameter in model.parameters():  # as FSDP casts them
        parameter.grad, parameter.data = None, parameter.data.bfloat16()
    low, low_grads = train_step(model)
    assert low.ce_sum.dtype == low.aux_loss.dtype == torch.float32
    assert relative(low.ce_sum, out.ce_sum) < 0.01 and relative(low.aux_loss, out.aux_loss) < 0.02
    assert model(*batch()[:2]).dtype == torch.bfloat16
    for name, grad in low_grads.items():
        assert grad.dtype == torch.bfloat16 and torch.isfinite(grad).all(), name
    ours, theirs = (torch.cat([g.flatten().double() for g in each.values()]) for each in (low_grads, grads))
    assert F.cosine_similarity(ours, theirs, dim=0) > 0.98


def test_a_single_token_runs() -> None:
    model = small_model(**VARIANTS["released"])
    out = model(torch.tensor([3]), Packing.from_lengths([1]), torch.tensor([5]))
    out.ce_sum.backward()
    assert torch.isfinite(out.ce_sum) and all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_training_goes_on_after_inference_mode() -> None:
    model = small_model(**VARIANTS["released"])
    with torch.inference_mode():
        model(*batch()[:2])
    _, grads = train_step(model)
    _, expected = train_step(small_model(**VARIANTS["released"]))
    assert all(torch.equal(grad, expected[name]) for name, grad in grads.items())


def test_evaluation_drops_nothing() -> None:
    model = small_model(**VARIANTS["drops_by_weight"])
    rates = [[stats.drop_rate.item() for stats in model.train(mode)(*batch()).router] for mode in (True, False)]
    assert min(rates[0]) > 0 and rates[1] == [0, 0]


def test_no_parameter_is_a_bias_and_embeddings_are_untied() -> None:
    model: nn.Module = small_model(**VARIANTS["shared_expert"])
    assert not [name for name, _ in model.named_parameters() if "bias" in name]
    assert model.embed_tokens.weight.data_ptr() != model.lm_head.weight.data_ptr()


@pytest.mark.parametrize(
    ("option", "changes"),
    [
        *((option, {option: 0}) for option in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads",
                                               "head_dim", "ffn_hidden_size", "loss_chunk_tokens")),
        ("layer_pattern", {"layer_pattern": ""}),
        ("layer_pattern", {"layer_pattern": "LLs"}),
        ("num_kv_heads", {"num_kv_heads": 3}),
        ("num_kv_heads", {"num_kv_heads": 8}),
        ("rotary_dim", {"rotary_dim": 18}),
        ("rotary_dim", {"rotary_dim": 7}),
        ("rotary_dim", {"rotary_dim": -2}),
        ("num_experts", {"num_experts": -1}),
        ("top_k", {"top_k": 5}),
        ("top_k", {"top_k": 0}),
        ("capacity_factor", {"capacity_factor": 0.0}),
        ("shared_ffn_hidden_size", {"shared_ffn_hidden_size": -1}),
        ("drop_policy", {"drop_policy": "prob"}),
        ("rope_base", {"rope_base": 1.0}),
    ],
)  # fmt: skip
def test_impossible_shapes_are_refused(option: str, changes: dict) -> None:
    values = vars(small_config()) | changes
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**values).validate()
    assert caught.value.option == f"model.{option}" and caught.value.value == changes[option]
    assert caught.value.fix and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [{"rotary_dim": 0}, {"rotary_dim": 16}, {"top_k": 4}, {"num_experts": 0, "top_k": 9}, {"capacity_factor": 0.01},
     {"num_kv_heads": 1}, {"num_kv_heads": 4}, {"layer_pattern": "S" * 20}],
)  # fmt: skip
def test_possible_shapes_are_accepted(changes: dict) -> None:
    config = small_config(**changes)
    assert len(config.layer_types) == 8 and math.isfinite(config.alpha)
