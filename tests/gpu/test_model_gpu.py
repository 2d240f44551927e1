"""The model on a GPU against itself on the CPU in fp32, and a training run through NCCL."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mmkernels.softmax import dispatch
from mmtrain.build import build_model
from mmtrain.config import ModelConfig
from mmtrain.model.mixers.attention import LocalAttention
from mmtrain.model.packed_seq import Packing
from tests.dist.runs import SMALL, make_corpus, pretrain, records, steps

pytestmark = pytest.mark.gpu
LENGTHS = [1, 130, 2, 257, 60, 1, 61]


def config() -> ModelConfig:
    return ModelConfig("small", vocab_size=256, hidden_size=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32,
                       ffn_hidden_size=96, layer_pattern="LLLS", rotary_dim=16, num_experts=4,
                       capacity_factor=None)  # fmt: skip


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-4), (torch.bfloat16, 4e-2)])
def test_loss_and_gradients_equal_the_cpu(dtype: torch.dtype, bound: float) -> None:
    tokens = torch.randint(0, 256, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    results = []
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        model = build_model(config(), device).to(kind)
        out = model(tokens.to(device), Packing.from_lengths(LENGTHS, device), tokens.roll(-1).to(device))
        (out.ce_sum / len(tokens) + out.aux_loss).backward()
        gradients = {name: p.grad.double().cpu() for name, p in model.named_parameters()}
        results.append((out.ce_sum.item(), gradients))
    (loss, gradients), (gpu_loss, gpu_gradients) = results
    assert gpu_loss == pytest.approx(loss, rel=bound / 10)
    total = torch.cat([g.flatten() for g in gradients.values()])
    found = torch.cat([gpu_gradients[name].flatten() for name in gradients])
    assert ((found - total).norm() / total.norm()).item() < bound


def test_initial_weights_are_the_cpus_to_the_bit() -> None:
    for (name, here), there in zip(
        build_model(config(), "cuda").named_parameters(), build_model(config()).parameters(), strict=True
    ):
        assert torch.equal(here.cpu(), there), name


@pytest.mark.parametrize("long", [dispatch.LONG, 100])  # FlashAttention-2 alone, and cuDNN for the long ones
def test_packed_softmax_equals_documents_one_by_one(monkeypatch: pytest.MonkeyPatch, long: int) -> None:
    monkeypatch.setattr(dispatch, "LONG", long)
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(sum(LENGTHS), h, 64, device="cuda") for h in (8, 2, 2, 8))
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):  # in torch, and through the kernels
        leaves = [t.to(dtype).clone().requires_grad_() for t in (q, k, v)]
        o = LocalAttention().softmax(*leaves, Packing.from_lengths(LENGTHS, "cuda"))
        o.backward(do.to(dtype))
        outputs.append([o.detach().float(), *(t.grad.float() for t in leaves)])
    for exact, fast in zip(*outputs, strict=True):
        assert ((fast - exact).norm() / exact.norm()).item() < 1e-2


def test_grouped_products_read_no_unused_rows() -> None:
    torch.manual_seed(0)
    x, w, dy = (torch.randn(*s, device="cuda").bfloat16() for s in ((512, 128), (3, 128, 64), (512, 64)))
    x[300:] = dy[300:] = torch.nan
    leaves = x.requires_grad_(), w.requires_grad_()
    y = F.grouped_mm(*leaves, offs=torch.tensor([101, 101, 300], dtype=torch.int32, device="cuda"))
    dx, dw = torch.autograd.grad(y, leaves, dy)
    assert torch.isfinite(y[:300]).all() and torch.isfinite(dx[:300]).all() and torch.isfinite(dw).all()
    assert torch.count_nonzero(dw[1]) == 0


@pytest.mark.parametrize("factor", [None, 1.1])
def test_the_host_never_waits_in_forward_or_backward(factor: float | None) -> None:
    model = build_model(replace(config(), capacity_factor=factor), "cuda").bfloat16()
    tokens = torch.randint(0, 256, (sum(LENGTHS),), device="cuda")
    packing, labels = Packing.from_lengths(LENGTHS, "cuda"), tokens.roll(-1)

    def step() -> None:
        out = model(tokens, packing, labels)
        (out.ce_sum / len(tokens) + out.aux_loss).backward()

    step()  # compile, and fill caches
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_run_on_nccl_follows_the_run_on_gloo(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    common = [*SMALL, f"data.path={corpus}", f"run.dir={tmp_path}"]
    pretrain(*common, "run.name=cpu", processes=None)
    pretrain(*common, "run.name=gpu", "cluster.device=cuda", processes=1)
    pretrain(*common, "run.name=bf16", "cluster.device=cuda", "optim.precision=auto", processes=1)
    for gpu, bf16, cpu in zip(*(steps(tmp_path / name) for name in ("gpu", "bf16", "cpu")), strict=True):
        assert gpu["loss"] == pytest.approx(cpu["loss"], rel=1e-3)
        assert bf16["loss"] == pytest.approx(cpu["loss"], rel=2e-2)
    assert records(tmp_path / "gpu")[-1]["val_loss"] == pytest.approx(
        records(tmp_path / "cpu")[-1]["val_loss"], rel=1e-3
    )


def test_parameters_and_moments_in_host_memory_follow_adamw(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="the extra `offload` is not installed")
    corpus = make_corpus(tmp_path)
    common = [*SMALL, f"data.path={corpus}", f"run.dir={tmp_path}", "cluster.device=cuda"]
    pretrain(*common, "run.name=adamw", processes=1)
    pretrain(*common, "run.name=host", "optim=cpu_offload", "optim.precision=fp32", processes=1)
    for host, adamw in zip(steps(tmp_path / "host"), steps(tmp_path / "adamw"), strict=True):
        assert host["loss"] == pytest.approx(adamw["loss"], rel=1e-3)
