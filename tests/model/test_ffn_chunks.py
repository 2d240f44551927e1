"""The feed-forward in chunks of tokens: values, rounding, what is computed again, and memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmtrain.model.ffn import SwiGLU
from mmtrain.model.ffn_chunks import ChunkedFeedForward
from mmtrain.model.mixers.registry import SOFTMAX
from mmtrain.model.packed_seq import Packing
from tests.model.small import draw, draw_tokens, gradients, relative, small_model
from tests.parallel.memory.storage_peak import StoragePeak

HIDDEN, WIDTH = 24, 40


def layer(dtype: torch.dtype = torch.float64, chunk: int | None = None) -> SwiGLU:
    ffn = SwiGLU(HIDDEN, WIDTH).to(dtype)
    with torch.no_grad():
        for i, parameter in enumerate(ffn.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=i) / 5)
    if chunk is not None:
        ffn.call = ChunkedFeedForward(chunk)
    return ffn


def results(ffn: SwiGLU, x: Tensor, upstream: Tensor) -> list[Tensor]:
    """Output, and gradients of x and of both weights."""
    leaf = x.clone().requires_grad_()
    out = ffn(leaf)
    out.backward(upstream)
    return [out.detach(), leaf.grad, *(parameter.grad for parameter in ffn.parameters())]


def formula(ffn: SwiGLU, x: Tensor, upstream: Tensor) -> list[Tensor]:
    """The same by plain autograd in float64."""
    leaf, w13, w2 = (t.detach().double().requires_grad_() for t in (x, ffn.w13_2FD, ffn.w2_DF))
    out = (nn.functional.silu(leaf @ w13[0].T) * (leaf @ w13[1].T)) @ w2.T
    out.backward(upstream.double())
    return [out.detach(), leaf.grad, w13.grad, w2.grad]


@pytest.mark.parametrize("tokens", [0, 1, 26])
@pytest.mark.parametrize("chunk", [1, 7, 13, 26, 1000])
def test_chunks_equal_one_plain_layer(tokens: int, chunk: int) -> None:
    x, upstream = draw(tokens, HIDDEN, seed=5), draw(tokens, HIDDEN, seed=6)
    found = results(layer(chunk=chunk), x, upstream)
    for ours, theirs in zip(found, formula(layer(), x, upstream), strict=True):
        assert ours.shape == theirs.shape and relative(ours, theirs) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 26])
def test_one_chunk_is_the_plain_layer_to_the_bit(dtype: torch.dtype, tokens: int) -> None:
    x, upstream = draw(tokens, HIDDEN, seed=5, dtype=dtype), draw(tokens, HIDDEN, seed=6, dtype=dtype)
    for ours, theirs in zip(
        results(layer(dtype, chunk=26), x, upstream), results(layer(dtype), x, upstream), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_rounding_in_bf16_is_no_worse_than_that_of_one_product() -> None:
    x, upstream = (draw(1024, HIDDEN, seed=seed, dtype=torch.bfloat16) for seed in (5, 6))
    exact = formula(layer(torch.bfloat16), x, upstream)
    whole = results(layer(torch.bfloat16), x, upstream)
    for ours, theirs, right in zip(results(layer(torch.bfloat16, chunk=16), x, upstream), whole, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert relative(ours, right) <= 1.02 * relative(theirs, right)


@pytest.mark.gpu
def test_on_a_gpu_sums_over_chunks_are_in_fp32() -> None:
    x, upstream = (draw(4096, HIDDEN, seed=seed, dtype=torch.bfloat16).cuda() for seed in (5, 6))
    exact = formula(layer(torch.bfloat16).cuda(), x, upstream)
    whole = results(layer(torch.bfloat16).cuda(), x, upstream)
    found = results(layer(torch.bfloat16, chunk=100).cuda(), x, upstream)
    for ours, theirs, right in zip(found, whole, exact, strict=True):
        assert relative(ours, right) <= 1.02 * relative(theirs, right)


def test_gradients_of_frozen_weights_and_of_a_strided_upstream() -> None:
    ffn, plain = layer(chunk=5), layer()
    ffn.w2_DF.requires_grad_(False)
    x, leaf = draw(12, HIDDEN, seed=5), draw(12, HIDDEN, seed=5).requires_grad_()
    ffn(leaf).sum().backward()  # an upstream of stride 0
    expected = formula(plain, x, torch.ones_like(x))
    assert ffn.w2_DF.grad is None and relative(leaf.grad, expected[1]) < 1e-13
    assert relative(ffn.w13_2FD.grad, expected[2]) < 1e-13


def model_of(policy: str, chunk: int | None, **options: object) -> nn.Module:
    model = small_model(layer_pattern="LS", num_layers=2, **options)
    if options.get("num_experts") == 0:  # grouped products know no float64
        model.double()
    for block in model.layers:
        block.recompute = policy != "none"
        if policy == "selective" and block.spec is SOFTMAX:
            block.keep_attention()
        if chunk is not None:
            block.chunk_feed_forward(chunk)
    return model


def step(model: nn.Module, tokens: int = 45) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a row of two documents."""
    ids = draw_tokens(tokens + 1)
    out = model(ids[:-1], Packing.from_lengths([17, tokens - 17]), ids[1:])
    (out.ce_sum + out.aux_loss).backward()
    return out.ce_sum.detach(), gradients(model)


MODELS = {"dense": {"num_experts": 0}, "experts": {"shared_ffn_hidden_size": 24, "capacity_factor": 1.0}}


@pytest.mark.parametrize("policy", ["none", "selective", "block"])
@pytest.mark.parametrize("model", MODELS)
def test_gradients_of_a_model_are_the_same_under_each_recomputation(model: str, policy: str) -> None:
    loss, expected = step(model_of("none", None, **MODELS[model]))
    tolerance = 1e-12 if model == "dense" else 1e-5
    for chunk in (7, 1000):
        ours, found = step(model_of(policy, chunk, **MODELS[model]))
        assert relative(ours, loss) < tolerance and found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert relative(found[name], gradient) < tolerance, (chunk, name)


def operations(policy: str, chunk: int | None) -> int:
    with FlopCounterMode(display=False) as counter:
        step(model_of(policy, chunk, num_experts=0))
    return counter.get_total_flops()


def test_under_recomputation_of_a_block_nothing_is_computed_more_often() -> None:
    product = 2 * 45 * 48 * 40  # of all tokens with one of the three matrices
    assert operations("block", 1000) == operations("block", None)
    assert operations("none", 1000) - operations("none", None) == 2 * 2 * product  # the first, of two layers
    uncounted = 2 * 3 * product  # what is added to a sum in place
    assert operations("block", 16) + uncounted == operations("block", None)


def held(policy: str, chunk: int | None, model: str, tokens: int = 2048) -> int:
    """Bytes at the peak of a step, beside weights, over those of hidden states."""
    built = model_of(policy, chunk, hidden_size=16, head_dim=4, rotary_dim=4, ffn_hidden_size=256, **MODELS[model])
    with StoragePeak() as found:
        step(built, tokens)
    return found.peak


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("policy", ["none", "block"])
def test_memory_falls_by_what_waited_for_backward(policy: str, model: str) -> None:
    """By the first product and the activation, of each layer that keeps them; experts keep no activation."""
    layers, widths = (1 if policy == "block" else 2), (3 if model == "dense" else 2 * 2)  # two rows a token
    least = layers * widths * 2048 * 256 * (8 if model == "dense" else 4)
    assert held(policy, None, model) - held(policy, 128, model) > 0.95 * least
