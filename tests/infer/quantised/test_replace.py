"""Which weights become int8, and what a model with them computes."""

from __future__ import annotations

import argparse
import copy
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mmkernels.int8_weights import dequantise
from mmtrain.hf.naming import pieces_of
from mmtrain.infer.engine import Engine
from mmtrain.infer.quantised.modules import QuantisedExperts, QuantisedLinear, QuantisedModule
from mmtrain.infer.quantised.replace import quantise_model
from mmtrain.model.linear import Linear
from tests.infer.quantised.trained import logits_of, markov_text, trained_model
from tests.infer.served import MODELS, SMALL, full_logits, greedy, request, seen_logits, served_model, text_of
from tests.model.small import relative, small_model

# The released model's own int8 recipe: lm_head, embed_tokens, layers.i.coefficient, layers.i.block_sparse_moe.gate;
# norms are no matrices.
KEPT_THERE = re.compile(
    r"lm_head\.weight|model\.embed_tokens\.weight|model\.layers\.\d+\.(coefficient|block_sparse_moe\.gate)\.weight"
    r"|model\.norm\.weight|model\.layers\.\d+\.(input_layernorm|post_attention_layernorm|self_attn\.norm)\.weight"
)


def int8_of(model: nn.Module, grouped: bool = False) -> nn.Module:
    made = copy.deepcopy(model)
    quantise_model(made, grouped)
    return made


def held_of(model: nn.Module) -> dict[str, QuantisedModule]:
    """The replacements by the name of each parameter that they hold."""
    return {
        f"{path}.{name.removesuffix('_values')}": module
        for path, module in model.named_modules()
        if isinstance(module, QuantisedModule)
        for name, _ in module.named_buffers()
        if name.endswith("_values")
    }


@pytest.mark.parametrize("changes", [dict(shared_ffn_hidden_size=24), dict(num_experts=0)], ids=["experts", "dense"])
def test_what_is_int8_and_what_stays(changes: dict[str, int]) -> None:
    model = small_model(**changes)
    made = int8_of(model)
    quantised, kept = held_of(made), dict(made.named_parameters())
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert quantised.keys() | kept.keys() == shapes.keys() and not quantised.keys() & kept.keys()
    for name, shape in shapes.items():
        for piece in pieces_of(name, shape, stacked=False):
            assert bool(KEPT_THERE.fullmatch(piece.name)) == (name in kept), piece.name
    for name, parameter in model.named_parameters():
        if name in kept:
            assert torch.equal(kept[name], parameter), name
    named = [re.sub(r"\d+", "i", name) for name in quantised]
    ffn = {"ffn.w13_2FD", "ffn.w2_DF"} if not model.config.num_experts else {
        "ffn.experts.w13_E2FD", "ffn.experts.w2_EDF", "ffn.shared.mlp.w13_2FD", "ffn.shared.mlp.w2_DF"
    }  # fmt: skip
    mixers = {"qkv_proj", "output_gate", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"}
    wanted = ffn | {f"mixer.{name}.weight" for name in mixers}
    assert {re.sub(r"[^.]*\.i\.", "", name, count=1) for name in named} == {re.sub(r"\d+", "i", w) for w in wanted}


@pytest.mark.parametrize("grouped", [False, True])
def test_the_weights_are_those_of_the_model_to_half_a_step(grouped: bool) -> None:
    model = small_model(hidden_size=160, num_layers=2, layer_pattern="LS")
    made = held_of(int8_of(model, grouped))
    for name, parameter in model.named_parameters():
        if name in made:
            weight = made[name].held(name.rpartition(".")[2])
            groups = -(-parameter.shape[-1] // 128) if grouped else 1
            assert weight.values.shape == parameter.shape and weight.scale.shape[-1] == groups
            step = weight.scale.amax(-1, keepdim=True)
            assert ((dequantise(weight, torch.float32) - parameter).abs() <= 0.51 * step).all()


def test_a_projection_to_some_rows() -> None:
    source = Linear(40, 24)
    nn.init.normal_(source.weight)
    made, x = QuantisedLinear(source, grouped=False), torch.randn(5, 40)
    torch.testing.assert_close(made(x, slice(8, 16)), made(x)[:, 8:16])


def test_experts_go_through_the_call_that_they_had() -> None:
    model, seen = served_model(), []
    source = model.layers[0].ffn.experts

    class Call:
        def __call__(self, experts: nn.Module, x_TD: Tensor, plan: object) -> Tensor:
            seen.append(type(experts))
            return x_TD

    source.call = Call()
    quantise_model(model)
    full_logits(model, text_of(5))
    assert seen == [QuantisedExperts]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_of_the_engine_are_those_of_the_whole_forward_pass(name: str, grouped: bool) -> None:
    model, texts = int8_of(served_model(name), grouped), [text_of(length) for length in (21, 1, 6)]
    with seen_logits() as seen:
        made = Engine(model, options=SMALL).generate([request(text, 5) for text in texts])
    for text, one in zip(texts, made, strict=True):
        assert one.tokens == greedy(model, text, 5)
        full = full_logits(model, (*text, *one.tokens))
        for length in range(len(text), len(text) + 5):
            torch.testing.assert_close(seen[(*text, *one.tokens)[:length]], full[length - 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_error_of_logits_is_bounded(name: str, grouped: bool) -> None:
    """Weights at random. Without DeepNorm, which makes the residual large, errors weigh more, and some tokens go to
    other experts: the median over tokens is held tight, all together less.
    """
    model = small_model(**(MODELS[name] | dict(hidden_size=160, ffn_hidden_size=144)))
    text = text_of(200)
    exact, found = full_logits(model, text), full_logits(int8_of(model, grouped), text)
    error_T = (found - exact).norm(dim=1) / exact.norm(dim=1)
    bound = 0.002 if model.config.post_norm else 0.03
    assert 0.0003 < error_T.median() < bound and relative(found, exact) < 2 * bound


@pytest.mark.parametrize("grouped", [False, True])
def test_the_likeliest_tokens_of_a_trained_model_are_the_same(grouped: bool, trained: nn.Module) -> None:
    text = markov_text(10_240, seed=1)
    ours, theirs = logits_of(int8_of(trained, grouped), text), logits_of(trained, text)
    loss = nn.functional.cross_entropy(theirs[:-1], text[1:])
    assert loss < 1.4, "the model is not trained"  # 4.2 untrained, 0.8 at best
    assert (ours.argmax(1) == theirs.argmax(1)).float().mean() >= 0.99
    assert relative(ours, theirs) < 0.02
    assert abs(nn.functional.cross_entropy(ours[:-1], text[1:]) - loss) < 0.002


@pytest.mark.slow  # five minutes of a core
def test_the_likeliest_tokens_of_a_model_trained_on_python_are_the_same() -> None:
    """Bytes of the standard library's sources, the last of which are held out; rows of most weights have two groups."""
    sources = sorted(Path(argparse.__file__).parent.glob("*.py"))
    row = torch.tensor(list(b"".join(source.read_bytes() for source in sources)))
    model = trained_model(row[:-200_000], steps=600, vocab_size=256, hidden_size=160, ffn_hidden_size=144)
    text = row[-10_240:]
    theirs = logits_of(model, text)
    loss = nn.functional.cross_entropy(theirs[:-1], text[1:])
    assert loss < 2.5, "the model is not trained"  # 5.5 untrained
    for grouped in (False, True):
        ours = logits_of(int8_of(model, grouped), text)
        same = (ours.argmax(1) == theirs.argmax(1)).float().mean()
        print(f"grouped {grouped}: loss {loss:.3f}, same {same:.4f}, error {relative(ours, theirs):.4f}")
        assert same >= 0.99 and relative(ours, theirs) < 0.02


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A model of three layers with experts, that has learned most of its text's source."""
    return trained_model(markov_text(200_000, seed=0), steps=90)
