"""The hybrid of FLA's layers in the whole-step bench is ours, pre-norm, and its steps train.

FLA's kernels run in Triton's interpreter, but for those of linear attention, which it cannot run: a reference stands in
for them, with their arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmtrain.bench import step_fla
from mmtrain.bench.step_peers import PeerJob
from mmtrain.build import build_model
from mmtrain.config import ModelConfig
from mmtrain.model.flops import count_parameters
from tests.bench.shapes import copy_of, our_loss, tiny

pytest.importorskip("fla", reason="flash-linear-attention is not installed")


def reference(q: Tensor, k: Tensor, v: Tensor, gamma_H: Tensor, bounds: Tensor) -> Tensor:
    """Decayed linear attention within documents, [1, T, H, K]."""
    found, offsets = [], bounds.tolist()
    for begin, end in pairwise(offsets):
        q_HTK, k_HTK, v_HTK = (x[0, begin:end].transpose(0, 1).float() for x in (q, k, v))
        distance_TS = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        decay_HTS = torch.exp(gamma_H[:, None, None] * distance_TS.clamp(min=0)) * (distance_TS >= 0)
        found.append(((q_HTK @ k_HTK.mT * decay_HTS) @ v_HTK).transpose(0, 1).to(q.dtype))
    return torch.cat(found)[None]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton without measuring configurations, nothing compiled, and the reference."""
    import fla.ops.simple_gla
    from triton.runtime.autotuner import Autotuner

    signature = inspect.signature(fla.ops.simple_gla.chunk_simple_gla)

    def stand_in(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        given = signature.bind(*args, **kwargs).arguments
        assert given["scale"] == 1.0 and given["cu_seqlens"].dtype == torch.int64
        assert torch.equal(given["cu_seqlens"].cpu(), given["cu_seqlens_cpu"])
        return reference(given["q"], given["k"], given["v"], given["g_gamma"], given["cu_seqlens"]), None

    monkeypatch.setattr(fla.ops.simple_gla, "chunk_simple_gla", stand_in)
    monkeypatch.setattr(Autotuner, "_bench", lambda self, *args, config, **meta: [0.0, 0.0, 0.0])
    with torch.compiler.set_stance("force_eager"):
        yield


def renamed(model: nn.Module, config: ModelConfig) -> dict[str, Tensor]:
    """Our weights under the peer's names."""
    ours = model.state_dict()
    found = {"embedding.weight": ours["embed_tokens.weight"], "norm.weight": ours["norm.weight"],
             "lm_head.weight": ours["lm_head.weight"]}  # fmt: skip
    for layer, kind in enumerate(config.layer_types):
        at = f"layers.{layer}."
        w1, w3 = ours[f"{at}ffn.w13_2FD"]
        found |= {f"{at}mixer_norm.weight": ours[f"{at}input_norm.weight"], f"{at}mlp.gate_proj.weight": w1,
                  f"{at}mlp_norm.weight": ours[f"{at}post_attention_norm.weight"], f"{at}mlp.up_proj.weight": w3,
                  f"{at}mlp.down_proj.weight": ours[f"{at}ffn.w2_DF"]}  # fmt: skip
        if kind == "S":
            found |= {f"{at}mixer.{name}_proj.weight": ours[f"{at}mixer.{name}_proj.weight"] for name in "qkvo"}
            continue
        qkv = ours[f"{at}mixer.qkv_proj.weight"].unflatten(0, (config.num_heads, 3, -1)).unbind(1)
        found |= {f"{at}mixer.{name}_proj.weight": part.flatten(0, 1) for name, part in zip("qkv", qkv, strict=True)}
        found |= {f"{at}mixer.g_proj.weight": ours[f"{at}mixer.output_gate.weight"],
                  f"{at}mixer.o_proj.weight": ours[f"{at}mixer.out_proj.weight"],
                  f"{at}mixer.norm.weight": ours[f"{at}mixer.norm.weight"]}  # fmt: skip
    return found


def test_same_weights_have_the_same_loss_and_gradients() -> None:
    config, rows = tiny("LS", mean_document=40)
    ours, theirs = build_model(config), step_fla.FlaModel(config)
    copy_of(renamed(ours, config), theirs)
    loss, wanted = theirs(*step_fla._inputs(rows[0], torch.device("cpu"))), our_loss(ours, config, rows[0])
    torch.testing.assert_close(loss, wanted.float(), rtol=1e-5, atol=0)
    loss.backward()
    wanted.backward()
    gradient = theirs.embedding.weight.grad
    torch.testing.assert_close(gradient, ours.embed_tokens.weight.grad, rtol=1e-3, atol=1e-6)


def test_steps_train_the_whole_model() -> None:
    config, rows = tiny("LS", mean_document=40)
    step = step_fla.FlaStep(PeerJob(config, rows, torch.device("cpu")))
    assert step.parameters == count_parameters(config).total
    for part in step.optimizer.param_groups:
        part["lr"] = 1e-3
    losses = [step() for _ in range(3)]
    assert losses[2] < losses[1] - 0.01 < losses[0] - 0.02, losses
