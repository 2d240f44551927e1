"""The script that builds and compares apex's FusedAdam, with kernels and a class that stand in for apex's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mmtrain.bench import apex_adam
from mmtrain.errors import ConfigError

FUSED_ADAM = """
import torch
from apex.multi_tensor_apply import multi_tensor_applier

class FusedAdam(torch.optim.Optimizer):
    def __init__(self, groups, lr, betas, eps, adam_w_mode):
        import amp_C
        assert adam_w_mode
        self.kernel = amp_C.multi_tensor_adam
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                lists = [[p.grad], [p], [state["exp_avg"]], [state["exp_avg_sq"]]]
                multi_tensor_applier(self.kernel, lists, group["lr"], *group["betas"], group["eps"], group["step"],
                                     group["weight_decay"])
"""
SHAPES = [torch.Size((64, 32)), torch.Size((32,)), torch.Size((2, 48, 16))]


def kernels(wrong: float = 0.0) -> ModuleType:
    """The kernel of Adam, whose second moments may be wrong by a factor."""
    module = ModuleType("amp_C")

    def adam(lists, lr, beta1, beta2, eps, step, decay) -> None:
        for g, p, m, v in zip(*lists, strict=True):
            m.mul_(beta1).add_(g, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=(1 - beta2) * (1 + wrong))
            p.sub_(lr * (m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + eps) + decay * p))

    module.multi_tensor_adam = adam
    return module


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that looks like apex's; no module of it is left behind."""
    for name in apex_adam.NEEDED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "apex/optimizers/fused_adam.py").write_text(FUSED_ADAM)
    applier = tmp_path / "apex/multi_tensor_apply/__init__.py"
    applier.write_text("def multi_tensor_applier(call, *args):\n call(*args)")
    before = set(sys.modules)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("apex", "amp_C") and name not in before]:
        del sys.modules[name]


def beyond(source: Path, wrong: float = 0.0) -> dict[str, float]:
    """How far each way is from torch's steps."""
    fused = apex_adam.load_fused_adam(source, kernels(wrong))
    found = apex_adam.measure(fused, SHAPES, torch.device("cpu"))
    assert found["parameters"] == sum(shape.numel() for shape in SHAPES)
    return {name: row["beyond_rounding"] for name, row in found["optimizers"].items()}


def test_the_same_steps_are_within_rounding(source: Path) -> None:
    found = beyond(source)
    assert list(found) == ["torch", "apex", "optim=adamw", "optim=apex"]
    assert max(found.values()) < 1 and found["optim=adamw"] == 0


def test_wrong_steps_are_beyond_it(source: Path) -> None:
    found = beyond(source, wrong=1e-4)
    assert found["apex"] > 1 and found["optim=apex"] > 1 and found["optim=adamw"] == 0


def test_a_folder_without_the_kernels_is_refused(source: Path) -> None:
    apex_adam.check_source(source)
    (source / "csrc/type_shim.h").unlink()
    with pytest.raises(ConfigError, match=r"--source=.* it has no csrc/type_shim.h; give a checkout"):
        apex_adam.main(["--source", str(source), "--out", str(source / "out")])


def test_without_a_gpu_nothing_is_built(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="FusedAdam needs a GPU"):
        apex_adam.main(["--source", str(source), "--out", str(source / "out")])
    assert not (source / "out").exists()
