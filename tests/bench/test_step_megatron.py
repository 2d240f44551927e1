"""megatron-core's model of the whole-step bench is ours, pre-norm, and its steps train, as far as a CPU can tell."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmtrain.bench import step_megatron
from mmtrain.bench.step_peers import PeerJob
from mmtrain.build import build_model
from mmtrain.config import ClusterConfig, ModelConfig
from mmtrain.model.flops import count_parameters
from mmtrain.parallel import mesh
from tests.bench.shapes import copy_of, our_loss, tiny

pytest.importorskip("megatron.core")
EXPERTS = ("model.num_experts=4", "model.top_k=2")


def _release() -> tuple[int, ...]:
    import megatron.core

    try:
        given = getattr(megatron.core, "__version__", None) or version("megatron-core")
    except PackageNotFoundError:
        given = "0"
    return tuple(int(number) for number in re.findall(r"\d+", given)[:2])


class NoStream:
    """The stream of a CPU."""

    def wait_stream(self, other: object) -> None:
        """Everything is done already."""


class CpuAsGpu(TorchFunctionMode):
    """Tensors that are asked for on a GPU come to lie on the CPU, and say that they do not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` on the CPU."""
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = "cpu"
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.type and len(args) == 1:
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


@pytest.fixture
def group() -> Iterator[None]:
    """One process, and no group of megatron-core's left behind."""
    mesh.start(ClusterConfig(device="cpu"))
    yield
    mesh.stop()


@pytest.fixture
def as_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What megatron-core asks CUDA for, on a CPU; nothing is compiled."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: NoStream())
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: NoStream())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    with torch.compiler.set_stance("force_eager"), CpuAsGpu():
        yield


def renamed(model: nn.Module, config: ModelConfig) -> dict[str, Tensor]:
    """Our weights under megatron-core's names; a group's query rows stand before its key and value rows."""
    ours, groups = model.state_dict(), config.num_kv_heads
    found = {"embedding.word_embeddings.weight": ours["embed_tokens.weight"],
             "output_layer.weight": ours["lm_head.weight"],
             "decoder.final_layernorm.weight": ours["norm.weight"]}  # fmt: skip
    for layer in range(config.num_layers):
        here, there = f"layers.{layer}.", f"decoder.layers.{layer}."
        qkv = [ours[f"{here}mixer.{name}_proj.weight"].unflatten(0, (groups, -1)) for name in "qkv"]
        found |= {
            f"{there}input_layernorm.weight": ours[f"{here}input_norm.weight"],
            f"{there}self_attention.linear_qkv.weight": torch.cat(qkv, dim=1).flatten(0, 1),
            f"{there}self_attention.linear_proj.weight": ours[f"{here}mixer.o_proj.weight"],
            f"{there}pre_mlp_layernorm.weight": ours[f"{here}post_attention_norm.weight"],
            f"{there}mlp.linear_fc1.weight": ours[f"{here}ffn.w13_2FD"].flatten(0, 1),
            f"{there}mlp.linear_fc2.weight": ours[f"{here}ffn.w2_DF"],
        }
    return found


def test_same_weights_have_the_same_loss_and_gradients(group: None, as_gpu: None) -> None:
    from megatron.core import parallel_state

    config, rows = tiny("S")
    ours, row = build_model(config), rows[0]
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    transformer = step_megatron.transformer_config(config, torch.float32, 1, on_cpu=True, graphs=False)
    theirs = step_megatron.build_model(config, row.tokens_BS.shape[1], transformer)
    copy_of(renamed(ours, config), theirs)
    names = ("tokens_BS", "position_ids_BS", "labels_BS", "loss_mask_BS")
    loss_BS, reduce = step_megatron.forward_step(iter([{name: getattr(row, name) for name in names}]), theirs)
    loss, wanted = reduce(loss_BS)[0], our_loss(ours, config, row)
    torch.testing.assert_close(loss, wanted.float(), rtol=1e-5, atol=0)
    loss.backward()
    wanted.backward()
    gradient, right = theirs.embedding.word_embeddings.weight.grad, ours.embed_tokens.weight.grad
    assert (gradient - right).norm() < 4e-3 * right.norm()  # the fused loss rounds its gradient to bf16


@pytest.mark.parametrize("experts", [(), EXPERTS])
def test_steps_train_the_whole_model(group: None, as_gpu: None, experts: tuple[str, ...]) -> None:
    if experts and _release() < (0, 19):
        pytest.skip("megatron-core's router needs Transformer Engine before 0.19")
    config, rows = tiny("S", *experts)
    step = step_megatron.MegatronStep(PeerJob(config, rows, torch.device("cpu")))
    assert step.parameters == count_parameters(config).total
    for part in step.optimizer.param_groups:
        part["lr"] = 1e-3
    losses = [step() for _ in range(4)]
    assert all(later < before - 0.01 for before, later in pairwise(losses)), losses
    assert ("EP1" in step.settings) == bool(experts)
    step.close()
